"""Solving for the path weights of a head that was just frozen, in the middle of a fit."""

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from glai_lightning.fitting.across_processes import process_group, processes_of, share_buffers
from glai_lightning.fitting.heads_in_module import HeadSlot
from glai_lightning.fitting.loaders import draws_at_random, iterate_copy, on_device, single_loader, validation_loader
from glai_lightning.fitting.loss_reading import LossNotReadError
from glai_lightning.fitting.misconfiguration import UserMisconfigurationError
from glai_lightning.fitting.step_reading import HeadBatch, SeenStep, Stage, StepReader, isolated_step, rows_of
from glai_lightning.heads.frozen import GLAIHead
from glai_lightning.heads.optimizers import copy_state, forget_state
from glai_lightning.heads.patterns import layout_of
from glai_lightning.solvers import LogisticSolver, RidgeSolver, SolveReport

#: Bytes of head inputs kept in memory for a solve. Beyond it every pass of the solve reads the loader anew.
INPUTS_IN_MEMORY = 2**30

Solver = LogisticSolver | RidgeSolver
#: Returns what a head is given and trained on, from (batch, batch_idx, stage, head): inputs (n, D), targets, and the
#: weights of samples (n,) if they differ; ``None`` for a batch in which the head has no part.
ReadBatch = Callable[[Any, int, Stage, StepReader], tuple[Tensor, ...] | None]


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
    acting = [module for module in layout_of(head).trailing if not isinstance(module, _DropoutNd | nn.Identity)]
    if acting:
        raise UserMisconfigurationError(
            f"Expected the head at {head_name!r} to end with its last Linear, so that it can be solved, "
            f"but got `{type(acting[0]).__name__}` after it."
        )


@contextmanager
def unwinding(
    trainer: Any, slot: HeadSlot, revert: Callable[[dict[str, Tensor], dict[str, dict[str, Any]]], None]
) -> Iterator[None]:
    """Context in which a head is frozen and solved: if a solve fails, the head is as it was before the freeze.

    Args:
        trainer: the Trainer of the fit.
        slot: the place of the head.
        revert: makes a frozen head an MLP again, from its state dict and what the optimizer remembered of its
            parameters, by their names.
    """
    frozen_before = isinstance(slot.module, GLAIHead)
    weights = {name: value.detach().clone() for name, value in slot.module.state_dict().items()}
    optimizer_state = copy_state(trainer.optimizers[0], slot.module)
    try:
        yield
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
        solver: what to solve with; ``None`` for no solve.

    Attributes:
        solved: whether the head is solved.
        report: what the solve did, or ``None``.
    """

    def __init__(self, solver: Solver | None) -> None:
        self.solver = solver
        self.solved = False
        self.report: SolveReport | None = None
        self._reader: StepReader | None = None
        self._solver: Solver | None = None

    @property
    def pending(self) -> bool:
        """Whether there is a solve to come."""
        return self.solver is not None and not self.solved

    def start(self) -> None:
        """Begin a fit: its loss has not been seen yet."""
        self._reader = None
        self._solver = None

    def start_over(self) -> None:
        """Forget the solve that was, because its head is an MLP again."""
        self.solved = False
        self.report = None

    def before_batch(
        self,
        trainer: Any,
        slot: HeadSlot,
        batch: Any,
        batch_idx: int,
        read: ReadBatch,
        *,
        others: Sequence[nn.Module] = (),
    ) -> None:
        """See, on the first batch of a fit and of an epoch, that the loss can be solved.

        Args:
            trainer: the Trainer of the fit; all of its processes must call this together.
            slot: the place of the head.
            batch: a batch, on the device of the module.
            batch_idx: its index.
            read: reads a batch.
            others: other heads with a loss of their own, which are beside this one and not before it.

        Raises:
            MisconfigurationException: if there are several data loaders, or the loss cannot be solved.
        """
        if not self.pending:
            return
        if self._reader is None:
            self._reader = StepReader(trainer, slot.pl_module, slot.name)
        if self._solver is not None:
            if batch_idx == 0 and self._reader.kind is not None:
                self._reader.see_next_step(partial(self._check_again, trainer))
            return
        with processes_of(trainer).failing_together():
            loader = single_loader(trainer.train_dataloader, "training")
        validation_loader(trainer)
        with processes_of(trainer).failing_together(), isolated_step(slot.pl_module):
            first = _as_head_batch(read(batch, batch_idx, "training", self._reader))
        if not trainer.strategy.reduce_boolean_decision(first is not None):
            self._reader.look_anew()
            return
        assert first is not None
        self._solver = self.solver
        random = draws_at_random(loader, partial(on_device, trainer))
        if self._reader.kind is None:
            _warn_of_moving_inputs(slot, None, first.inputs, random, others)
        else:
            self._reader.see_next_step(partial(self._check_first, trainer, slot, first, random, others))

    def _check_first(
        self, trainer: Any, slot: HeadSlot, first: HeadBatch, random: bool, others: Sequence[nn.Module], seen: SeenStep
    ) -> None:
        assert self._reader is not None
        assert self.solver is not None
        with processes_of(trainer).failing_together():
            inputs = self._reader.inputs_read
            self._reader.check(seen)
            self._solver = _solver_for(self.solver, self._reader, first)
        _warn_of_moving_inputs(slot, seen, inputs, random, others)

    def _check_again(self, trainer: Any, seen: SeenStep) -> None:
        assert self._reader is not None
        with processes_of(trainer).failing_together():
            self._reader.check(seen)

    def run(self, trainer: Any, slot: HeadSlot, read: ReadBatch) -> SolveReport:
        """Solve for the path weights over the training data of the fit, and set them.

        Each process of the fit reads its own part of the data; all of them must call this together.

        What is held: one number for each feature and sample (inputs of the head, and path activations beside them), the
        targets, and what one batch takes.

        Args:
            trainer: the Trainer of the fit.
            slot: the place of the frozen head.
            read: reads a batch.

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
        self._reader.look_anew()
        training = _Pass(trainer, trainer.train_dataloader, _batches_to_read(trainer), self._read_in("training", read))
        with processes.failing_together():
            data = training.held()
        validation = self._validation(trainer, read)
        if processes.sum_numbers(data is None) != [0.0]:
            data = None
        options = {"validation": validation, "group": process_group(trainer)}
        if data is None:
            report = self._solver.solve(head, training, **options)
        else:
            inputs, targets, weights = data
            if processes.sum_numbers(weights is not None) != [0.0]:
                options["sample_weights"] = inputs.new_ones(len(inputs)) if weights is None else weights
            report = self._solver.solve(head, inputs, targets, **options)
        # What the optimizer remembers is about weights that are far away by now.
        forget_state(trainer.optimizers[0], (p for p in head.parameters() if p.requires_grad))
        self.solved = True
        self.report = report
        if report.best_step == 0 and report.steps > 0:
            rank_zero_warn(
                f"The solve of {slot.name!r} found no path weights that are better than those it started from, "
                "and leaves these as they were."
            )
        return report

    def _read_in(self, stage: Stage, read: ReadBatch) -> Callable[[Any, int], HeadBatch | None]:
        return lambda batch, batch_idx: _as_head_batch(read(batch, batch_idx, stage, self._reader))

    def _validation(self, trainer: Any, read: ReadBatch) -> Any:
        loader = validation_loader(trainer)
        if loader is None:
            return None
        batches = _Pass(trainer, loader, trainer.num_val_batches[0], self._read_in("validation", read))
        problem, held = None, None
        with processes_of(trainer).failing_together():
            try:
                held = batches.held()
            except LossNotReadError as error:
                problem = error
        if not trainer.strategy.reduce_boolean_decision(problem is None):
            rank_zero_info(f"The solve does not look at the validation data. {problem or ''}")
            return None
        if processes_of(trainer).sum_numbers(held is None) != [0.0]:
            return batches
        return held[:2]


class _Pass:
    """What a head is given and trained on, over the batches of a loader, to be read any number of times.

    Args:
        trainer: the Trainer in whose fit this happens.
        loader: where the batches come from; its position in the fit is left alone.
        num_batches: most batches to read.
        read: reads a batch, from itself and its index.
    """

    def __init__(
        self, trainer: Any, loader: Any, num_batches: float, read: Callable[[Any, int], HeadBatch | None]
    ) -> None:
        self._trainer = trainer
        self._loader = loader
        self._num_batches = num_batches
        self._read = read

    def _batches(self) -> Iterator[HeadBatch]:
        with isolated_step(self._trainer.lightning_module):
            for batch_idx, batch in enumerate(iterate_copy(self._loader)):
                if batch_idx >= self._num_batches:
                    return
                read = self._read(on_device(self._trainer, batch), batch_idx)
                if read is not None:
                    yield read

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for inputs, targets, weights in self._batches():
            yield (inputs, targets) if weights is None else (inputs, targets, weights)

    def held(self) -> HeadBatch | None:
        """Read all batches into memory; ``None`` if there are none, or they take too much of it."""
        rows: _Rows | None = None
        targets: list[Tensor] = []
        weights: list[Tensor | None] = []
        for batch in self._batches():
            if rows is None:
                rows = _Rows(len(batch.inputs) * self._num_batches)
            rows.add(batch.inputs)
            targets.append(batch.targets)
            weights.append(batch.weights)
            if rows.nbytes > INPUTS_IN_MEMORY:
                return None
        if rows is None:
            return None
        return HeadBatch(rows.together(), _joined_targets(targets), _joined_weights(weights, targets))


class _Rows:
    """Rows of tensors put together in memory that is reserved once, so that none of it is held twice."""

    def __init__(self, expected: float) -> None:
        self._expected = int(expected)
        self._held: Tensor | None = None
        self._count = 0

    @property
    def nbytes(self) -> int:
        return self.together().nbytes

    def add(self, rows: Tensor) -> None:
        count = self._count + len(rows)
        if self._held is None or count > len(self._held):
            grown = rows.new_empty((max(count + count // 4, self._expected), *rows.shape[1:]))
            if self._held is not None:
                grown[: self._count] = self.together()
            self._held = grown
        self._held[self._count : count] = rows
        self._count = count

    def together(self) -> Tensor:
        assert self._held is not None
        return self._held[: self._count]


def _joined_targets(targets: list[Tensor]) -> Tensor:
    """Put targets together; where some are labels and some are probabilities, all as probabilities."""
    wide = next((part for part in targets if part.ndim == 2), None)
    if wide is not None:
        classes = wide.shape[1]
        targets = [part if part.ndim == 2 else _as_probabilities(part, classes).to(wide.dtype) for part in targets]
    return torch.cat(targets)


def _as_probabilities(labels: Tensor, classes: int) -> Tensor:
    return labels.unsqueeze(1) if classes == 1 else F.one_hot(labels, classes)


def _joined_weights(weights: list[Tensor | None], targets: list[Tensor]) -> Tensor | None:
    given = next((part for part in weights if part is not None), None)
    if given is None:
        return None
    pairs = zip(weights, targets, strict=True)
    return torch.cat([given.new_ones(len(part)) if own is None else own for own, part in pairs])


def _as_head_batch(read: tuple[Tensor, ...] | None) -> HeadBatch | None:
    return None if read is None else HeadBatch(*read)


def _batches_to_read(trainer: Any) -> float:
    """Return how many batches a solve reads: an epoch's, or as many as were trained on where an epoch has no end."""
    batches: float = trainer.num_training_batches
    return min(batches, trainer.fit_loop.epoch_loop.total_batch_idx + 1) if batches == float("inf") else batches


def _solver_for(solver: Solver, reader: StepReader, first: HeadBatch) -> Solver:
    """Return the solver for the very loss that was read: with its label smoothing.

    Raises:
        MisconfigurationException: if the solver is for another loss.
    """
    if isinstance(solver, LogisticSolver) and reader.kind == "mse":
        raise UserMisconfigurationError(
            "Expected `solver` to be a `RidgeSolver` for a module that minimises a squared error, but got "
            "`LogisticSolver`."
        )
    if first.weights is not None and "sample_weights" not in inspect.signature(solver.solve).parameters:
        raise UserMisconfigurationError(
            f"Expected a loss in which all samples count the same with a `{type(solver).__name__}`, but got weights "
            "that differ, of classes or of samples."
        )
    if isinstance(solver, LogisticSolver) and reader.label_smoothing:
        return dataclasses.replace(solver, label_smoothing=reader.label_smoothing)
    return solver


def moving_inputs(
    slot: HeadSlot, seen: SeenStep | None, inputs: Tensor | None, random: bool, others: Sequence[nn.Module]
) -> list[str]:
    """List the reasons for which what a head is given is not fixed.

    Args:
        slot: the place of the head.
        seen: what was seen of the first step, if it was.
        inputs: what the head was given when the same batch was read in eval mode, (n, D).
        random: whether the loader draws at random.
        others: other heads with a loss of their own, which are beside this one and not before it.
    """
    pl_module = slot.pl_module
    inside = {id(module) for module in slot.module.modules()}
    own = {id(parameter) for one in (slot.module, *others) for parameter in one.parameters()}
    outside = [module for module in pl_module.modules() if id(module) not in inside]
    reasons = []
    if any(parameter.requires_grad for parameter in pl_module.parameters() if id(parameter) not in own):
        reasons.append("layers outside the head are trained: the solve is for their embeddings as they are by then")
    if any(isinstance(module, _DropoutNd) and module.p > 0 and module.training for module in outside):
        reasons.append("there is dropout outside the head: the solve is for embeddings without it")
    elif seen is not None and inputs is not None and _differ(seen, inputs):
        reasons.append(
            "a batch gives the head other inputs when it is read again in eval mode (augmentation in `training_step`, "
            "normalisation by the batch): the solve is for those of one reading"
        )
    if random:
        reasons.append("the training data is drawn at random: the solve is for one draw of it")
    return reasons


def _differ(seen: SeenStep, inputs: Tensor) -> bool:
    rows = rows_of(seen.inputs, seen.outputs)
    if rows.shape != inputs.shape:
        return True
    return not torch.allclose(rows, inputs, rtol=1e-3, atol=1e-4 * float(inputs.abs().max()))


def _warn_of_moving_inputs(
    slot: HeadSlot, seen: SeenStep | None, inputs: Tensor | None, random: bool, others: Sequence[nn.Module]
) -> None:
    for reason in moving_inputs(slot, seen, inputs, random, others):
        rank_zero_warn(f"The head will be solved over inputs that are not fixed. Here {reason}.")
