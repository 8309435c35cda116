"""Solving for the path weights of a head that was just frozen, in the middle of a fit."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, Protocol

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from glai_lightning.fitting.across_processes import process_group, processes_of, share_buffers
from glai_lightning.fitting.head_data import HeadPass
from glai_lightning.fitting.heads_in_module import HeadSlot
from glai_lightning.fitting.kept_inputs import KeptInputs
from glai_lightning.fitting.loaders import draws_at_random, on_device, single_loader, validation_loader
from glai_lightning.fitting.loss_reading import HeadBatch, LossNotReadError
from glai_lightning.fitting.messages import say
from glai_lightning.fitting.misconfiguration import UserMisconfigurationError
from glai_lightning.fitting.replaying import FixedCalls
from glai_lightning.fitting.solver_choice import FirstLook, choose_solver
from glai_lightning.fitting.step_reading import SeenStep, Stage, StepReader, isolated_step
from glai_lightning.heads.chain import title
from glai_lightning.heads.frozen import GLAIHead
from glai_lightning.heads.layout import CannotBeCalledError
from glai_lightning.heads.optimizers import copy_state, forget_state
from glai_lightning.heads.patterns import changing_steps, holds_weight, layout_of
from glai_lightning.solvers import LogisticSolver, RidgeSolver, SolveReport

Solver = LogisticSolver | RidgeSolver
#: Returns what a head is given and trained on, from (batch, batch_idx, stage, head): inputs (n, D), targets, and the
#: weights of samples (n,) if they differ; ``None`` for a batch in which the head has no part.
ReadBatch = Callable[[Any, int, Stage, StepReader], HeadBatch | tuple[Tensor, ...] | None]

#: What a head is given and held against in validation: in memory, or read anew every time; ``None`` for nothing.
Validation = HeadPass | tuple[Tensor, Tensor] | None


class KeptEpoch(Protocol):
    """What was kept of an epoch: what heads were given, by their names, and a record of the modules before them."""

    calls: FixedCalls
    kept: dict[str, KeptInputs]
    validation: dict[str, "Validation"]


def check_solvable(head: nn.Module, head_name: str, paths: str) -> None:
    """Refuse, before training starts, a solve that could not be done later.

    Raises:
        MisconfigurationException: for tangent paths, or modules after the last Linear that do something in eval mode.
    """
    if paths == "tangent":
        raise UserMisconfigurationError(
            "Expected `paths` to be 'output' or 'independent' with a solver, but got 'tangent', "
            "whose weights the optimizer trains."
        )
    try:
        layout = layout_of(head)
    except CannotBeCalledError as error:
        raise UserMisconfigurationError(f"The head at {head_name!r} cannot be solved. {error}") from error
    acting = changing_steps(layout)
    if acting or not holds_weight(layout.output):
        got = f"`{title(acting[0])}` after it" if acting else "one whose weight is no parameter of it"
        raise UserMisconfigurationError(
            f"Expected the head at {head_name!r} to end with its last Linear, so that it can be solved, but got {got}."
        )


@contextmanager
def unwinding(
    trainer: Any, slot: HeadSlot, revert: Callable[[dict[str, Tensor], dict[str, dict[str, Any]]], None]
) -> Iterator[tuple[dict[str, Tensor], dict[str, dict[str, Any]]]]:
    """Context in which a head is frozen and solved: if a solve fails, the head is as it was before the freeze.

    Args:
        trainer: the Trainer of the fit.
        slot: the place of the head.
        revert: makes a frozen head an MLP again, from its state dict and what the optimizer remembered of its
            parameters, by their names.

    Yields:
        What ``revert`` would be given.
    """
    frozen_before = isinstance(slot.module, GLAIHead)
    weights = {name: value.detach().clone() for name, value in slot.module.state_dict().items()}
    optimizer_state = copy_state(trainer.optimizers[0], slot.module)
    try:
        yield weights, optimizer_state
    except Exception:
        if isinstance(slot.module, GLAIHead) and not frozen_before:
            revert(weights, optimizer_state)
        raise


class HeadSolve:
    """The solve of one head in a fit: from the look at its loss on the first batch to the solved path weights.

    The first step of a fit that calls the head is read twice: once beside the fit, in eval mode, and once as it runs.
    Both must show one and the same loss. The first step of every epoch is seen again, and the first batch of a solve is
    read as a whole.

    Args:
        solver: what to solve with; "auto" to choose by that first step, see ``choose_solver``; ``None`` for no solve.
        paths: what stays trainable of the head.
        one_pass: whether the inputs of the head are kept from an epoch: they must be fixed, and there must be a solve;
            "auto" if that is to be told.

    Attributes:
        solved: whether the head is solved.
        report: what the solve did, or ``None``.
        inputs_fixed: whether the first step showed that the head is given the same inputs in every epoch.
        work_before_head: with ``one_pass="auto"`` the multiply-adds of the first step outside of the heads over those
            of the heads; 0 until it was read.
    """

    def __init__(
        self,
        solver: Solver | Literal["auto"] | None,
        paths: str = "output",
        *,
        one_pass: bool | Literal["auto"] = False,
    ) -> None:
        self.solver = solver
        self.paths = paths
        self.keeps_inputs = one_pass is True
        self._weighs = one_pass == "auto"
        self.solved = False
        self.report: SolveReport | None = None
        self.start()

    @property
    def pending(self) -> bool:
        """Whether there is a solve to come, as far as is known by now."""
        return self.solver is not None and not self.solved and not self._declined

    def start(self) -> None:
        """Begin a fit: its loss has not been seen yet."""
        self._reader: StepReader | None = None
        self._solver: Solver | None = None
        self._declined = False
        self._news: str | None = None
        self._after_step: Callable[[], None] | None = None
        self._reads_validation = True
        self.inputs_fixed = False
        self.work_before_head = 0.0

    def start_over(self) -> None:
        """Forget the solve that was, because its head is an MLP again."""
        self.solved = False
        self.report = None

    def take_news(self) -> str | None:
        """Return, once, the line that says why ``solver="auto"`` stands for no solver; ``None`` if there is no news."""
        news, self._news = self._news, None
        return news

    def before_batch(
        self,
        trainer: Any,
        slot: HeadSlot,
        batch: Any,
        batch_idx: int,
        read: ReadBatch,
        *,
        others: Sequence[nn.Module] = (),
        calls: FixedCalls | None = None,
    ) -> None:
        """See, on the first batch of a fit and of an epoch, that the loss can be solved.

        Args:
            trainer: the Trainer of the fit; all of its processes must call this together.
            slot: the place of the head.
            batch: a batch, on the device of the module.
            batch_idx: its index.
            read: reads a batch.
            others: other heads with a loss of their own, which are beside this one and not before it.
            calls: what modules before the heads return in the next step, if that is recorded. The batch then is read
                by ``after_step``, without running them again.

        Raises:
            MisconfigurationException: if there are several data loaders, or the loss cannot be solved; with "auto" that
                means no solve.
        """
        if not self.pending:
            return
        if self._solver is not None:
            if batch_idx == 0 and self._reader is not None and self._reader.kind is not None:
                self._reader.see_next_step(partial(self._check_again, trainer))
            return
        look = FirstLook(slot, others)
        look.calls = calls
        reader = StepReader(trainer, slot.pl_module, slot.name)
        with self._deciding(trainer, look):
            check_solvable(slot.module, slot.name, self.paths)
            look.random = draws_at_random(
                single_loader(trainer.train_dataloader, "training"), partial(on_device, trainer)
            )
            validation_loader(trainer)
        first_look = partial(self._look, trainer, look, reader, lambda: read(batch, batch_idx, "training", reader))
        if calls is not None:
            seen: list[SeenStep] = []
            reader.see_next_step(seen.append)
            self._after_step = partial(self._look_and_check, trainer, look, first_look, seen)
        elif not self._declined and first_look() and reader.kind is not None:
            reader.see_next_step(partial(self._check_first, trainer, look))

    def _look(
        self,
        trainer: Any,
        look: FirstLook,
        reader: StepReader,
        read: Callable[[], HeadBatch | tuple[Tensor, ...] | None],
    ) -> bool:
        """Read the batch; tell whether the head is called by it, and may be solved."""
        with self._deciding(trainer, look):
            counts = self.solver == "auto" or self._weighs
            quietly = look.counting() if counts and look.calls is None else nullcontext()
            with quietly if look.calls is None else look.calls.replaying(), isolated_step(reader.pl_module):
                look.batch = _as_head_batch(read())
            if self._weighs and look.batch is not None:
                self.work_before_head = look.work_before_head
        if self._declined or not trainer.strategy.reduce_boolean_decision(look.batch is not None):
            # A head that this batch does not call is looked at in the next.
            return False
        self._reader = reader
        if reader.kind is None:
            # An override said what the head is trained on, and its step was not looked at.
            self._decide(trainer, look)
        return True

    def after_step(self) -> None:
        """Read the step that was recorded, if it is the first that is looked at, once it has run."""
        after_step, self._after_step = self._after_step, None
        if after_step is not None:
            after_step()

    def _look_and_check(
        self, trainer: Any, look: FirstLook, first_look: Callable[[], bool], seen: list[SeenStep]
    ) -> None:
        if first_look() and self._reader is not None and self._reader.kind is not None:
            self._check_first(trainer, look, seen[0])

    def _check_first(self, trainer: Any, look: FirstLook, seen: SeenStep) -> None:
        assert self._reader is not None
        look.compare(seen, self._reader.inputs_read)
        with self._deciding(trainer, look):
            self._reader.check(seen)
        if not self._declined:
            self._decide(trainer, look)

    def _check_again(self, trainer: Any, seen: SeenStep) -> None:
        assert self._reader is not None
        with processes_of(trainer).failing_together():
            self._reader.check(seen)

    def _decide(self, trainer: Any, look: FirstLook) -> None:
        assert self._reader is not None
        assert look.batch is not None
        moving = look.moving_inputs()
        self.inputs_fixed = not moving and not look.normalises_by_batch
        with self._deciding(trainer, look):
            if moving and self.keeps_inputs:
                raise UserMisconfigurationError(
                    f"Expected inputs of the head at {self._reader.name!r} that are fixed with `one_pass=True`, but "
                    f"{moving[0][0]}."
                )
            if self.solver == "auto":
                if moving:
                    raise UserMisconfigurationError(moving[0][0])
                self._solver = choose_solver(self._reader.kind, look.batch.targets)
            else:
                self._solver = self.solver
            if self._solver is not None:
                _solver_for(self._solver, self._reader, weighted=look.batch.weights is not None)
        for cause, meaning in () if self._declined else moving:
            rank_zero_warn(f"The head will be solved over inputs that are not fixed. Here {cause}: {meaning}.")

    @contextmanager
    def _deciding(self, trainer: Any, look: FirstLook) -> Iterator[None]:
        """Context in which an obstacle to a solve raises in all processes, or means no solve where that is allowed."""
        obstacle = None
        with processes_of(trainer).failing_together():
            try:
                yield
            except UserMisconfigurationError as error:
                if self.solver != "auto" or self.keeps_inputs:
                    raise
                obstacle = str(error)
        if (
            self.solver == "auto"
            and not self.keeps_inputs
            and not trainer.strategy.reduce_boolean_decision(obstacle is None)
        ):
            self._declined, self._solver = True, None
            self._news = look.describe_freeze(obstacle or "another process found that it cannot be", self.paths)

    @property
    def reader(self) -> StepReader | None:
        """What reads the steps of the fit, once it has read the first that calls the head."""
        return self._reader

    @property
    def chosen(self) -> Solver:
        """The solver, once it is chosen."""
        assert self._solver is not None
        return self._solver

    def collect(self, trainer: Any, read: ReadBatch) -> HeadPass:
        """Return what the head is given and trained on over the training data, to be read from its loader."""
        loader = single_loader(trainer.train_dataloader, "training")
        assert self._reader is not None
        read_training = _read_in("training", read, self._reader)
        return HeadPass(trainer, loader, _batches_to_read(trainer), "training", read_training)

    def run(self, trainer: Any, slot: HeadSlot, read: ReadBatch, kept: KeptEpoch | None = None) -> SolveReport:
        """Solve for the path weights over the training data of the fit, and set them.

        Each process of the fit reads its own part of the data; all of them must call this together.

        For N samples, D inputs and F path activations N (D + F) numbers are held, the targets, and 4,096 rows of what
        is computed on the way. Where the inputs take more than ``INPUTS_IN_MEMORY`` bytes, nothing is held, and every
        pass of the solve reads the loader again.

        Args:
            trainer: the Trainer of the fit.
            slot: the place of the frozen head.
            read: reads a batch.
            kept: what the head was given and trained on in an epoch, if that was kept.

        Returns:
            What the solve did.

        Raises:
            MisconfigurationException: if the loss of a batch cannot be read. After this and any other error the head
                and the optimizer are as they were.
            RuntimeError: if another process of the fit raised an error.
        """
        if self._solver is None or self._reader is None:
            raise UserMisconfigurationError(
                f"Expected `training_step` to call the head at {slot.name!r} before it is solved, but it did not yet."
            )
        head: Any = slot.module
        processes = processes_of(trainer)
        share_buffers(trainer, slot.pl_module)
        reader = self._reader
        reader.look_anew()
        source = self.collect(trainer, read) if kept is None else kept.kept[slot.name]
        with processes.failing_together():
            data = source.held()
        validation = self._read_validation(trainer, read) if kept is None else self.validation(trainer, read, kept)
        if processes.sum_numbers(data is None) != [0.0]:
            data = None
        weighted = processes.sum_numbers(source.weighted) != [0.0]
        solver = _solver_for(self._solver, reader, weighted=weighted)
        options: dict[str, Any] = {"validation": validation, "group": process_group(trainer)}
        if data is None:
            report = solver.solve(head, source, **options)
        else:
            inputs, targets, weights = data
            if weighted:
                options["sample_weights"] = inputs.new_ones(len(inputs)) if weights is None else weights
            report = solver.solve(head, inputs, targets, **options)
        # What the optimizer remembers is about weights that are far away by now.
        forget_state(trainer.optimizers[0], (p for p in head.parameters() if p.requires_grad))
        self.solved = True
        self.report = report
        return report

    def validation(self, trainer: Any, read: ReadBatch, kept: KeptEpoch) -> Validation:
        """Return the validation data, read once for what was kept: the inputs of the head are fixed."""
        assert self._reader is not None
        name = self._reader.name
        if name not in kept.validation:
            # The fit validates next, on what the modules before the head return here.
            with kept.calls.keeping():
                kept.validation[name] = self._read_validation(trainer, read)
        return kept.validation[name]

    def _read_validation(self, trainer: Any, read: ReadBatch) -> Validation:
        """Read the validation data; where its loss cannot be read, say so once a fit, and leave it alone from there."""
        loader = validation_loader(trainer)
        if loader is None or not self._reads_validation:
            return None
        assert self._reader is not None
        read_batch = _read_in("validation", read, self._reader)
        batches = HeadPass(trainer, loader, trainer.num_val_batches[0], "validation", read_batch)
        problem, held = None, None
        with processes_of(trainer).failing_together():
            try:
                held = batches.held()
            except LossNotReadError as error:
                problem = error
        if not trainer.strategy.reduce_boolean_decision(problem is None):
            self._reads_validation = False
            say(f"The solve does not look at the validation data. {problem or ''}")
            return None
        if processes_of(trainer).sum_numbers(batches.samples) == [0.0]:
            self._reads_validation = False
            say("The solve does not look at the validation data: `validation_step` does not call the head.")
            return None
        held_everywhere = processes_of(trainer).sum_numbers(held is None) == [0.0]
        return held[:2] if held is not None and held_everywhere else batches


def _read_in(stage: Stage, read: ReadBatch, reader: StepReader) -> Callable[[Any, int], HeadBatch | None]:
    return lambda batch, batch_idx: _as_head_batch(read(batch, batch_idx, stage, reader))


def _as_head_batch(read: HeadBatch | tuple[Tensor, ...] | None) -> HeadBatch | None:
    return None if read is None else HeadBatch(*read)


def _batches_to_read(trainer: Any) -> float:
    """Return how many batches a solve reads: an epoch's, or as many as were trained on where an epoch has no end."""
    batches: float = trainer.num_training_batches
    return min(batches, trainer.fit_loop.epoch_loop.total_batch_idx + 1) if batches == float("inf") else batches


def _solver_for(solver: Solver, reader: StepReader, *, weighted: bool) -> Solver:
    """Return the solver for the very loss that was read, in which the weights of samples may differ.

    Raises:
        MisconfigurationException: if the solver is for another loss.
    """
    if isinstance(solver, LogisticSolver) and reader.kind == "mse":
        raise UserMisconfigurationError(
            "Expected `solver` to be a `RidgeSolver` for a module that minimises a squared error, but got "
            "`LogisticSolver`."
        )
    if weighted and isinstance(solver, RidgeSolver):
        raise UserMisconfigurationError(
            "Expected a loss in which all samples count the same with a `RidgeSolver`, but got weights that differ, of "
            "classes or of samples."
        )
    if isinstance(solver, LogisticSolver) and reader.kind is not None:
        several = reader.kind == "binary_cross_entropy" and layout_of(reader.module).output.out_features > 1
        return dataclasses.replace(
            solver,
            loss="binary_cross_entropy" if several else "cross_entropy",
            label_smoothing=reader.label_smoothing or solver.label_smoothing,
            class_weights=None if weighted else solver.class_weights,
        )
    return solver
