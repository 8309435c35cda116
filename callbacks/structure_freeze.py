"""The callback that freezes the structure of a head in the middle of a fit."""

import weakref
from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from glai_lightning.callbacks.argument_checks import check_least, check_range
from glai_lightning.callbacks.collection import Stage
from glai_lightning.callbacks.conversion import check_trainer
from glai_lightning.callbacks.solving import read_step
from glai_lightning.callbacks.watched_head import WatchedHead
from glai_lightning.churn import structure_settled
from glai_lightning.heads import Paths
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
        heads: the head that is watched, by its name, with the state of all of this.

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
        check_range("churn_tolerance", churn_tolerance, 0.0, 1.0)
        check_range("relative_tolerance", relative_tolerance, 0.0, 1.0, above=True)
        check_least("patience", patience, 1)
        check_least("min_epochs", min_epochs, 0)
        if freeze_at_epoch is not None:
            check_least("freeze_at_epoch", freeze_at_epoch, 0)
        check_least("probe_size", probe_size, 1)
        if check_every_n_steps is not None:
            check_least("check_every_n_steps", check_every_n_steps, 1)
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

        self.heads = {head: WatchedHead(head, self)}
        self._restored: dict[str, Any] | None = None
        self._module: weakref.ReferenceType[Any] | None = None
        self._fits = False

    @property
    def state_key(self) -> str:
        """Key of this callback's state in a checkpoint: one for each head."""
        return self._generate_state_key(head=self.head)

    @property
    def _first(self) -> WatchedHead:
        return next(iter(self.heads.values()))

    @property
    def frozen(self) -> bool:
        """Whether the head is frozen."""
        return self._first.frozen

    @property
    def freeze_epoch(self) -> int | None:
        """First epoch that trained frozen, or ``None``."""
        return self._first.freeze_epoch

    @property
    def freeze_reason(self) -> str | None:
        """Why the head was frozen, in a sentence, or ``None``."""
        return self._first.freeze_reason

    @property
    def churn_history(self) -> list[float]:
        """Churn at each check until the freeze."""
        return self._first.churn_history

    @property
    def solve_report(self) -> SolveReport | None:
        """What the solve did, or ``None``."""
        return self._first.solve.report

    def should_freeze(self, head: WatchedHead) -> bool:
        """Tell, after a check, whether the structure of a head has settled; override to decide otherwise.

        Args:
            head: the head, with its ``name`` and its ``churn_history``, this check included.
        """
        return structure_settled(
            head.churn_history,
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
        return read_step(trainer, pl_module, pl_module.get_submodule(self._first.name), batch, batch_idx, stage)

    @property
    def says_inputs_and_targets(self) -> bool:
        """Whether a subclass says what the head is to be solved for."""
        return type(self).inputs_and_targets is not StructureFreezeCallback.inputs_and_targets

    def freeze(self) -> None:
        """Freeze the structure of the head now, between fits.

        Raises:
            MisconfigurationException: if the callback has not been part of a fit, or the head is frozen already.
        """
        pl_module = self._fitted_module()
        for head in self.heads.values():
            head.freeze(pl_module)

    def unfreeze(self) -> None:
        """Put the MLP back in the place of a head frozen with output paths, all of it trainable, between fits.

        Raises:
            MisconfigurationException: if the callback has not been part of a fit, or the head is not frozen.
            ValueError: if the head was frozen with other than output paths.
        """
        pl_module = self._fitted_module()
        for head in self.heads.values():
            head.unfreeze(pl_module)

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
        for head in self.heads.values():
            head.prepare(trainer, pl_module, stage)
        self._restored = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Check the heads, and freeze those again that were frozen where the fit resumes from."""
        # Weights are restored by now and optimizer state is not: the only place where both the user's
        # configure_optimizers has met the MLP and the optimizer can still follow a conversion before its state is read.
        for head in self.heads.values():
            head.check(trainer, pl_module)
        continues = self._module is not None and self._module() is pl_module
        self._module = weakref.ref(pl_module)
        self._fits = True
        for head in self.heads.values():
            head.enter_fit(trainer, pl_module, self._restored, continues)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start to watch."""
        for head in self.heads.values():
            head.start(trainer, pl_module, self._restored)
        if self._restored is not None and self.stop_after_solve and self._solved:
            names = ", ".join(repr(name) for name in self.heads)
            self.say(f"The head at {names} was solved before the checkpoint, after which the fit was to stop.")
            trainer.should_stop = True
        self._restored = None

    @property
    def _solved(self) -> bool:
        return all(head.solve.solved for head in self.heads.values())

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Convert what settled in the epoch before, or was asked for this one."""
        for head in self.heads.values():
            head.start_epoch(trainer, pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Keep the inputs of the last batches before a check; see, on the first batch, that the loss can be solved."""
        for head in self.heads.values():
            head.before_batch(trainer, pl_module, batch, batch_idx)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Measure churn after the last batch of an epoch, before validation and its checkpoint, or every n steps."""
        to_solve = not self._solved
        for head in self.heads.values():
            head.after_batch(trainer, pl_module)
        if self.stop_after_solve and to_solve and self._solved:
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log churn and whether the head is frozen."""
        for head in self.heads.values():
            for key, value in head.metrics().items():
                # All ranks have the same numbers, and Lightning warns of values that are not synchronised.
                pl_module.log(f"structure/{key}", value, prog_bar=key == "churn", sync_dist=True)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Say so if a head is still an MLP."""
        for head in self.heads.values():
            head.finish()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Stop watching."""
        self._leave_fit()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Stop watching."""
        self._leave_fit()

    def _leave_fit(self) -> None:
        self._fits = False
        for head in self.heads.values():
            head.close()

    def __getstate__(self) -> dict[str, Any]:
        # A weak reference does not pickle.
        return {**vars(self), "_module": None}

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed fit needs; primitives and tensors only, so that ``weights_only`` loading reads it."""
        return self._first.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state for the start of the fit; a mere test or validation changes nothing."""
        self._restored = state_dict

    def say(self, message: str) -> None:
        """Tell the user, once and not once a process, if the callback is verbose."""
        if self.verbose:
            rank_zero_info(message)
