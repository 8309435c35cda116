"""The callback that freezes the structure of a head in the middle of a fit."""

import math
import weakref
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from glai_lightning.callbacks.collection import Stage, watch_next_step, without_a_trace
from glai_lightning.callbacks.conversion import (
    check_launcher,
    check_optimizers,
    check_trainer,
    find_head,
    follow_in_fit,
    freeze_head_in_fit,
)
from glai_lightning.callbacks.reduction import churn_over_processes
from glai_lightning.callbacks.solving import (
    Solver,
    check_loss,
    check_solvable,
    follow_loss,
    has_validation,
    read_step,
    solve_in_fit,
    validates_by_loss,
    warn_of_moving_inputs,
)
from glai_lightning.churn import ChurnProbe, structure_settled
from glai_lightning.heads import GLAIHead, Paths, check_convertible
from glai_lightning.loss_watching import LossCall
from glai_lightning.optimizers import forget_state
from glai_lightning.restoring import HeadRestorer
from glai_lightning.solvers import LogisticSolver, RidgeSolver, SolveReport


class StructureFreezeCallback(Callback):
    """Freezes the structure of an MLP head once its activation patterns settle, and converts the head in place.

    The callback works on any LightningModule, without a change to its code. It measures *churn*, the fraction of
    pattern bits that flipped since the last check on the inputs that the head was last trained on. Once churn is small,
    and small against the largest so far, the head is converted at the start of the next epoch into one that is
    linear in what it still trains. With output paths (the default) parameters, optimizer groups and keys stay
    what they were.

    It logs, once an epoch from the first on, ``structure/churn`` (0 once frozen), ``structure/frozen`` (0 or 1) and
    ``structure/freeze_epoch`` (-1 until then).

    Args:
        head: qualified name of the MLP head in the LightningModule.
        paths: what stays trainable, see ``freeze_structure``: 'output', 'tangent' or 'independent'.
        churn_tolerance: largest churn that counts as settled, in [0, 1].
        relative_tolerance: largest churn that counts as settled, as a fraction of the largest so far, in (0, 1].
        patience: number of checks in a row that must pass.
        min_epochs: finished epochs before which the structure is not frozen by churn.
        freeze_at_epoch: first epoch (0-based) to train frozen, whatever the churn; ``None`` to let churn decide.
        check_every_n_steps: measure churn every so many optimizer steps instead of once an epoch, and convert between
            two steps. For data so large that the structure settles within the first epoch; ``min_epochs`` then wants
            to be 0.
        probe_size: number of inputs on which churn is measured.
        solver: minimises the training loss over the path weights once the structure is frozen, by one pass over the
            training data that leaves no trace in the fit. The freeze then is at the end of an epoch, so that validation
            and checkpoint of that epoch are those of the solved head.
        stop_after_solve: whether the fit stops after the validation of the solved head; else the optimizer goes on.
        monitor: not built yet.
        mode: not built yet.
        revert_tolerance: not built yet.
        revert_patience: not built yet.
        verbose: whether to say when and why the structure was frozen.

    Attributes:
        frozen: whether the head is frozen.
        freeze_epoch: first epoch that trained frozen, or ``None``.
        freeze_reason: why it was frozen, in a sentence, or ``None``.
        churn_history: churn at each check until the freeze.
        solve_report: what the solve did, or ``None``.

    Raises:
        MisconfigurationException: if an argument is out of range; at the start of a fit, if the head is not there,
            cannot be read or is not trained, or if strategy, optimizers or other callbacks rule a conversion out;
            after the first batch, if the head was not called.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from glai_lightning.callbacks import StructureFreezeCallback
        >>> trainer = Trainer(callbacks=[StructureFreezeCallback("head")], logger=False, accelerator="cpu")
    """

    def __init__(
        self,
        head: str = "head",
        paths: Literal["output", "tangent", "independent"] = "output",
        churn_tolerance: float = 0.10,
        relative_tolerance: float = 0.25,
        patience: int = 1,
        min_epochs: int = 1,
        freeze_at_epoch: int | None = None,
        check_every_n_steps: int | None = None,
        probe_size: int = 1024,
        solver: LogisticSolver | RidgeSolver | None = None,
        stop_after_solve: bool = False,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "max",
        revert_tolerance: float = 0.005,
        revert_patience: int = 2,
        verbose: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(head, str) or any(character in head for character in "*?["):
            raise NotImplementedError(
                f"Expected `head` to be the name of one module, but got {head!r}: several heads are not built yet."
            )
        if paths not in ("output", "tangent", "independent"):
            raise MisconfigurationException(
                f"Expected `paths` to be 'output', 'tangent' or 'independent', but got {paths!r}."
            )
        _check_range("churn_tolerance", churn_tolerance, 0.0, 1.0)
        _check_range("relative_tolerance", relative_tolerance, 0.0, 1.0, above=True)
        _check_least("patience", patience, 1)
        _check_least("min_epochs", min_epochs, 0)
        if freeze_at_epoch is not None:
            _check_least("freeze_at_epoch", freeze_at_epoch, 0)
        _check_least("probe_size", probe_size, 1)
        if check_every_n_steps is not None:
            _check_least("check_every_n_steps", check_every_n_steps, 1)
        if solver is not None and not isinstance(solver, LogisticSolver | RidgeSolver):
            raise MisconfigurationException(
                f"Expected `solver` to be a `LogisticSolver` or a `RidgeSolver`, but got {solver!r}."
            )
        if stop_after_solve and solver is None:
            raise MisconfigurationException("Expected `solver` to be given with `stop_after_solve`, but got None.")
        later = {
            "monitor": monitor is not None,
            "mode": mode != "max",
            "revert_tolerance": revert_tolerance != 0.005,
            "revert_patience": revert_patience != 2,
        }
        for name, given in later.items():
            if given:
                raise NotImplementedError(f"Expected `{name}` to be left at its default, but it is not built yet.")
        self.head = head
        self.paths: Paths = paths
        self.churn_tolerance = churn_tolerance
        self.relative_tolerance = relative_tolerance
        self.patience = patience
        self.min_epochs = min_epochs
        self.freeze_at_epoch = freeze_at_epoch
        self.check_every_n_steps = check_every_n_steps
        self.probe_size = probe_size
        self.solver = solver
        self.stop_after_solve = stop_after_solve
        self.verbose = verbose

        self.frozen = False
        self.freeze_epoch: int | None = None
        self.freeze_reason: str | None = None
        self.churn_history: list[float] = []
        self.solve_report: SolveReport | None = None
        self._settled = False
        self._solved = False
        self._steps_at_check = 0
        self._rows_per_batch: int | None = None
        self._solver: Solver | None = None
        self._probe: ChurnProbe | None = None
        self._restored: dict[str, Any] | None = None
        self._module: weakref.ReferenceType[Any] | None = None
        self._fits = False

    @property
    def state_key(self) -> str:
        """Key of this callback's state in a checkpoint: one for each head."""
        return self._generate_state_key(head=self.head)

    def should_freeze(self) -> bool:
        """Tell, after a check, whether the structure has settled; override to decide otherwise."""
        return structure_settled(
            self.churn_history,
            churn_tolerance=self.churn_tolerance,
            relative_tolerance=self.relative_tolerance,
            patience=self.patience,
        )

    def inputs_and_targets(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, stage: Stage
    ) -> tuple[Tensor, Tensor]:
        """Return what the head is given for a batch, and what it is to be solved for; override where it cannot be seen.

        By default the step of the module is run up to its loss call, whose arguments say it.

        Args:
            trainer: the Trainer of the fit.
            pl_module: the module, in eval mode.
            batch: a batch on the device of the module.
            batch_idx: index of the batch.
            stage: 'training' or 'validation'.

        Returns:
            Head inputs (batch, D), and targets (batch,).

        Raises:
            MisconfigurationException: if the step calls no known loss on the outputs of the head.
        """
        return read_step(trainer, pl_module, pl_module.get_submodule(self.head), batch, batch_idx, stage)

    def freeze(self) -> None:
        """Freeze the structure of the head now, between fits.

        Raises:
            MisconfigurationException: if the callback has not been part of a fit, or the head is frozen already.
        """
        pl_module = self._fitted_module()
        head = find_head(pl_module, self.head)
        if isinstance(head, GLAIHead):
            raise MisconfigurationException(
                f"Expected the head at {self.head!r} to be an MLP, but it is frozen already."
            )
        check_convertible(head, paths=self.paths)
        frozen = GLAIHead.adopt(head, paths=self.paths)
        pl_module.set_submodule(self.head, frozen)
        self._now_frozen(None, "frozen by hand")

    def unfreeze(self) -> None:
        """Put the MLP back in the place of a head frozen with output paths, all of it trainable, between fits.

        Raises:
            MisconfigurationException: if the callback has not been part of a fit, or the head is not frozen.
            ValueError: if the head was frozen with other than output paths.
        """
        pl_module = self._fitted_module()
        head = find_head(pl_module, self.head)
        if not isinstance(head, GLAIHead):
            raise MisconfigurationException(f"Expected the head at {self.head!r} to be frozen, but it is an MLP.")
        pl_module.set_submodule(self.head, head.thaw())
        self._start_over()

    def _fitted_module(self) -> Any:
        pl_module = None if self._module is None else self._module()
        if self._fits:
            raise MisconfigurationException(
                "Expected no fit to be running, but `freeze` or `unfreeze` was called in one."
            )
        if pl_module is None:
            raise MisconfigurationException("Expected the callback to have been part of a fit, but it was in none yet.")
        return pl_module

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check trainer and module, and prepare for a checkpoint from either side of the freeze."""
        if stage == "fit":
            check_trainer(trainer, pl_module)
            check_launcher(trainer, pl_module, self.head, self.paths)
        HeadRestorer.of(pl_module, self.head).deferred = stage == "fit"
        self._restored = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Check the head, and freeze it again where the fit resumes from after the freeze."""
        # Weights are restored by now and optimizer state is not: the only place where both the user's
        # configure_optimizers has met the MLP and the optimizer can still follow a conversion before its state is read.
        restorer = HeadRestorer.of(pl_module, self.head)
        restorer.deferred = False
        head = find_head(pl_module, self.head)
        if not isinstance(head, GLAIHead):
            self._check_head(head)
        check_optimizers(trainer, head, self.head)
        if self.solver is not None:
            check_solvable(trainer, head, self.head, self.paths)
        continues = self._module is not None and self._module() is pl_module
        self._module = weakref.ref(pl_module)
        self._fits = True
        if self._restored is not None:
            self._apply_state(self._restored)
        elif not continues:
            self._start_over()
        if restorer.pending:
            follow_in_fit(trainer, restorer.restore(pl_module))
        head = find_head(pl_module, self.head)
        if isinstance(head, GLAIHead):
            if not self.frozen:
                self._now_frozen(head.freeze_epoch, "frozen before this fit")
            self._say(f"The structure of {self.head!r} is frozen already ({head.paths} paths).")
            if head.paths != self.paths:
                rank_zero_warn(
                    f"Expected the head at {self.head!r} to be frozen with {self.paths!r} paths, but got one that was "
                    f"frozen with {head.paths!r} paths before. It stays as it is."
                )
        elif self.frozen:
            self._start_over()

    def _check_head(self, head: torch.nn.Module) -> None:
        try:
            check_convertible(head, paths=self.paths)
        except ValueError as error:
            raise MisconfigurationException(f"The head at {self.head!r} cannot be frozen. {error}") from error

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start to watch the head."""
        self._close_probe()
        self._solver = None
        self._steps_at_check = trainer.global_step
        self._rows_per_batch = None
        if self._restored is not None and self._solved and self.stop_after_solve:
            self._say(f"The head at {self.head!r} was solved before the checkpoint, after which the fit was to stop.")
            trainer.should_stop = True
        if not self.frozen:
            self._probe = ChurnProbe(find_head(pl_module, self.head), self.probe_size)
            if self._restored is not None:
                self._resume_probe(self._restored)
        self._restored = None

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Convert the head, if its structure settled in the epoch before or this is the epoch to freeze at."""
        # At the start of an epoch, so that the checkpoint of the epoch just ended holds the MLP, and a resume from it
        # converts once more, to the same weights.
        if self.frozen:
            return
        epoch = trainer.current_epoch
        if self.freeze_at_epoch is not None and epoch >= self.freeze_at_epoch:
            self._convert(trainer, pl_module, epoch, self._describe_asked())
        elif self._settled:
            self._convert(trainer, pl_module, epoch, self._describe_settled())

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Keep the inputs of the last batches before a check; see, on the first batch, that the loss can be solved."""
        if self._probe is not None:
            self._probe.listen(self._rows_per_batch is None or self._check_is_near(trainer, batch_idx))
        if self.solver is None or self._solved or self._solver is not None:
            return
        self._solver = self.solver
        if self._watches_the_loss():
            watch_next_step(pl_module, pl_module.get_submodule(self.head), self._follow_loss)
        else:
            with without_a_trace(pl_module):
                self.inputs_and_targets(trainer, pl_module, batch, batch_idx, "training")
        warn_of_moving_inputs(pl_module, pl_module.get_submodule(self.head), trainer.train_dataloader)

    def _follow_loss(self, calls: list[LossCall]) -> None:
        assert self.solver is not None
        self._solver = follow_loss(self.solver, check_loss(calls, self.solver))

    def _watches_the_loss(self) -> bool:
        return type(self).inputs_and_targets is StructureFreezeCallback.inputs_and_targets

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Measure churn after the last batch of an epoch, before validation and its checkpoint, or every n steps."""
        if self._probe is not None:
            if not self._probe.seen:
                self._close_probe()
                raise MisconfigurationException(
                    f"Expected the head at {self.head!r} to be called by `training_step`, but it saw no input in the "
                    "first batch. Name the module whose forward is called."
                )
            if self._rows_per_batch is None:
                self._rows_per_batch = self._probe.seen
            if self._check_is_due(trainer):
                self._check(trainer)
        converted = not self.frozen and self._convert_after_batch(trainer, pl_module)
        if self.frozen and self.solver is not None and not self._solved and (converted or trainer.is_last_batch):
            self._solve(trainer, pl_module)

    def _check_is_near(self, trainer: Any, batch_idx: int) -> bool:
        if self.check_every_n_steps is None:
            if math.isinf(trainer.num_training_batches):
                return True
            remaining = trainer.num_training_batches - batch_idx
        else:
            steps = self.check_every_n_steps - trainer.global_step % self.check_every_n_steps
            remaining = steps * trainer.accumulate_grad_batches
        assert self._rows_per_batch is not None
        # One batch more than it takes, because the last of an epoch may be short.
        return bool(remaining <= math.ceil(self.probe_size / self._rows_per_batch) + 1)

    def _check_is_due(self, trainer: Any) -> bool:
        if self.check_every_n_steps is None:
            return bool(trainer.is_last_batch)
        # Steps of the optimizer: a check never falls between two batches whose gradients are accumulated.
        stepped = trainer.global_step != self._steps_at_check
        return bool(stepped and trainer.global_step % self.check_every_n_steps == 0)

    def _convert_after_batch(self, trainer: Any, pl_module: Any) -> bool:
        """Convert in the middle of an epoch where checks are made there, and at its end where a solve follows."""
        epoch = trainer.current_epoch
        if not trainer.is_last_batch:
            due = self._settled and self.check_every_n_steps is not None
        else:
            epoch += 1
            asked = self.freeze_at_epoch is not None and epoch >= self.freeze_at_epoch
            due = self.solver is not None and (self._settled or asked)
        if due:
            reason = self._describe_settled() if self._settled else self._describe_asked()
            self._convert(trainer, pl_module, epoch, reason)
        return due

    def _solve(self, trainer: Any, pl_module: Any) -> None:
        assert self._solver is not None
        head = pl_module.get_submodule(self.head)

        def read(stage: Stage) -> Any:
            return lambda batch, batch_idx: self.inputs_and_targets(trainer, pl_module, batch, batch_idx, stage)

        validates = has_validation(trainer)
        if self._watches_the_loss():
            validates = validates and validates_by_loss(trainer, pl_module, head)
        report = solve_in_fit(trainer, head, self._solver, read, validate=validates)
        # What the optimizer remembers is about weights that are far away by now.
        forget_state(trainer.optimizers[0], (p for p in head.parameters() if p.requires_grad))
        self._solved = True
        self.solve_report = report
        self._say(
            f"Solved for the path weights of {self.head!r} in {report.passes} passes and {report.seconds:.2f} s "
            f"({report.reason}): loss {report.start_loss:.4g} before, {report.loss:.4g} now"
            + ("." if report.score is None else f"; validation score {report.start_score:.4f}, {report.score:.4f}.")
        )
        if report.best_step == 0 and report.steps > 0:
            rank_zero_warn(
                f"The solve of {self.head!r} found no path weights that are better than those it started from, and "
                "leaves these as they were. More passes or another `center` or `l2` may."
            )
        if self.stop_after_solve:
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log churn and whether the head is frozen."""
        churn = self.churn_history[-1] if self.churn_history and not self.frozen else 0.0
        # All ranks have the same numbers, and Lightning warns of values that are not synchronised.
        pl_module.log("structure/churn", churn, prog_bar=True, sync_dist=True)
        pl_module.log("structure/frozen", float(self.frozen), sync_dist=True)
        epoch = -1 if self.freeze_epoch is None else self.freeze_epoch
        pl_module.log("structure/freeze_epoch", float(epoch), sync_dist=True)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Say so if the head is still an MLP."""
        if not self.frozen:
            last = f"{self.churn_history[-1]:.2%}" if self.churn_history else "not measured"
            state = "settled only in the last epoch" if self._settled else "did not settle"
            self._say(f"The structure of {self.head!r} {state} (last churn {last}): the head stays an MLP.")
        self._close_probe()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Stop watching."""
        self._fits = False
        self._close_probe()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Stop watching."""
        self._fits = False
        self._close_probe()

    def __getstate__(self) -> dict[str, Any]:
        # A weak reference does not pickle, and what a probe watches belongs to one process.
        return {**vars(self), "_module": None, "_probe": None}

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed fit needs; primitives and tensors only, so that ``weights_only`` loading reads it."""
        state: dict[str, Any] = {
            "frozen": self.frozen,
            "freeze_epoch": self.freeze_epoch,
            "freeze_reason": self.freeze_reason,
            "churn_history": list(self.churn_history),
            "settled": self._settled,
            "solved": self._solved,
        }
        if self._probe is not None and self._probe.seen:
            # In the middle of an epoch the next check goes by what was seen since the last one. Right after a check
            # there is nothing to keep: the snapshot then is the head itself.
            state["snapshot"] = [units.tensors() for units in self._probe.snapshot]
            state["inputs"] = list(self._probe.inputs)
            state["seen"] = self._probe.seen
            state["rows_per_batch"] = self._rows_per_batch
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state for the start of the fit; a mere test or validation changes nothing."""
        self._restored = state_dict

    def _apply_state(self, state: dict[str, Any]) -> None:
        self.frozen = state["frozen"]
        self.freeze_epoch = state["freeze_epoch"]
        self.freeze_reason = state["freeze_reason"]
        self.churn_history = list(state["churn_history"])
        self._settled = state["settled"]
        self._solved = state["solved"]

    def _resume_probe(self, state: dict[str, Any]) -> None:
        if self._probe is not None and "snapshot" in state:
            self._rows_per_batch = state["rows_per_batch"]
            device = self._probe.snapshot[0].weight.device
            self._probe.resume(
                [{name: value.to(device) for name, value in tensors.items()} for tensors in state["snapshot"]],
                [inputs.to(device) for inputs in state["inputs"]],
                state["seen"],
            )

    def _start_over(self) -> None:
        self.frozen = False
        self.freeze_epoch = None
        self.freeze_reason = None
        self.churn_history = []
        self.solve_report = None
        self._settled = False
        self._solved = False

    def _now_frozen(self, epoch: int | None, reason: str) -> None:
        self.frozen = True
        self.freeze_epoch = epoch
        self.freeze_reason = reason
        self._close_probe()

    def _close_probe(self) -> None:
        if self._probe is not None:
            self._probe.close()
            self._probe = None

    def _check(self, trainer: Any) -> None:
        assert self._probe is not None
        finite = self._probe.is_finite()
        flipped, bits = self._probe.measure()
        if not finite:
            # Added up like any count, because running statistics may diverge in one process alone.
            flipped = torch.full_like(flipped, math.nan, dtype=torch.float64)
        churn = churn_over_processes(trainer, flipped, bits)
        if math.isnan(churn):
            rank_zero_warn(f"The weights of the head at {self.head!r} are not finite: its structure cannot settle.")
        self.churn_history.append(churn)
        self._steps_at_check = trainer.global_step
        finished_epochs = trainer.current_epoch + (1 if trainer.is_last_batch else 0)
        self._settled = finished_epochs >= self.min_epochs and self.should_freeze()

    def _describe_settled(self) -> str:
        churn, largest = self.churn_history[-1], max(self.churn_history)
        return (
            f"churn {churn:.2%} is at most {self.churn_tolerance:.0%} "
            f"and at most {self.relative_tolerance:g} of the largest, {largest:.2%}"
        )

    def _describe_asked(self) -> str:
        return f"asked to freeze at epoch {self.freeze_at_epoch}"

    def _convert(self, trainer: Any, pl_module: Any, epoch: int, reason: str) -> None:
        before = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        dropout = any(
            isinstance(module, torch.nn.modules.dropout._DropoutNd) and module.p > 0
            for module in pl_module.get_submodule(self.head).modules()
        )
        freeze_head_in_fit(trainer, pl_module, self.head, paths=self.paths, freeze_epoch=epoch)
        self._now_frozen(epoch, reason)
        after = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        self._say(
            f"Froze the structure of {self.head!r} at step {trainer.global_step}, epoch {epoch} ({self.paths} paths): "
            f"{reason}. Trainable parameters: {before:,} before, {after:,} now."
            + (" Dropout inside the head is gone from here on." if dropout else "")
        )

    def _say(self, message: str) -> None:
        if self.verbose:
            rank_zero_info(message)


def _check_range(name: str, value: float, low: float, high: float, *, above: bool = False) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (low < value if above else low <= value) or not value <= high:
        bracket = "(" if above else "["
        raise MisconfigurationException(
            f"Expected `{name}` to be a number in {bracket}{low:g}, {high:g}], but got {value!r}."
        )


def _check_least(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise MisconfigurationException(f"Expected `{name}` to be an integer of at least {least}, but got {value!r}.")
