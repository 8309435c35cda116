"""The callback that freezes the structure of a head in the middle of a fit."""

import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import fields
from functools import partial
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from glai_lightning.callbacks.callback_state import check_state
from glai_lightning.callbacks.head_watch import FreezeSettings, HeadWatch
from glai_lightning.callbacks.learning_watch import LearningWatch
from glai_lightning.callbacks.watched_heads import FreezeJudge, WatchedHeads
from glai_lightning.fitting.conversion import (
    check_head,
    frozen_head,
    load_as_mlp,
    restore_in_fit,
)
from glai_lightning.fitting.first_call import read_first_call
from glai_lightning.fitting.heads_in_module import HeadSlot, match_heads, stands_alone
from glai_lightning.fitting.loss_reading import HeadBatch
from glai_lightning.fitting.misconfiguration import as_misconfiguration
from glai_lightning.fitting.solving import check_solvable, unwinding
from glai_lightning.fitting.step_reading import Stage, StepReader
from glai_lightning.fitting.support import check_launcher, check_optimizers, check_order, check_trainer
from glai_lightning.heads.churn import structure_settled
from glai_lightning.heads.record import Paths
from glai_lightning.solvers import LogisticSolver, RidgeSolver


class StructureFreezeCallback(WatchedHeads):
    """Freezes the structure of a head once its activation patterns settle, and converts the head in place.

    The callback works on any LightningModule, without a change to its code. It measures *churn*, the fraction of
    pattern bits that flipped since the last check on the inputs that the head was last trained on. Once churn is small,
    and small against the largest so far, the head is converted at the start of the next epoch into one that is
    linear in what it still trains. With output paths (the default) parameters, optimizer groups and keys stay
    what they were.

    The default thresholds were compared with other rules on six data sets, see "When to freeze" in
    ``benchmarks/README.md``. The best moment follows the learning rate: at a constant 3e-3 it came after two or three
    epochs, where churn often does not settle (then set ``freeze_at_epoch``), at 3e-4 much later than churn settles.

    It logs, once an epoch from the first on, ``structure/churn`` (NaN until it is measured, 0 once frozen),
    ``structure/frozen`` (0 or 1) and ``structure/freeze_epoch`` (-1 until then).

    Several heads of one module freeze independently, and ``/<name>`` is appended to the keys of what is logged. A
    solver solves each head when it freezes, by the loss that is called on that head's outputs. A head without a loss of
    its own, because it feeds another head, is refused on the first batch. Heads that want different arguments can have
    a callback each.

    A head need not be called in every batch. ``StructureRevert`` beside this callback takes back a freeze that
    validates worse.

    Args:
        head: qualified name of the head in the LightningModule; or names of its layers where they lie apart, joined by
            '+'; or a pattern such as ``heads.*`` that stands for all heads that it matches; or a list of these.
        paths: what stays trainable, see ``freeze_structure``: 'output' (last-layer training), 'tangent' (linearisation)
            or 'independent'.
        churn_tolerance: largest churn that counts as settled, in [0, 1].
        relative_tolerance: largest churn that counts as settled, as a fraction of the largest so far, in (0, 1].
        patience: number of checks in a row that must pass.
        min_epochs: finished epochs before which the structure is not frozen by churn.
        min_steps: optimizer steps before which it is not. At 0 churn alone decides; else the training loss must have
            fallen clearly, and a head that is not solved waits until validation rises no more.
        freeze_at_epoch: first epoch (0-based) to train frozen, whatever the churn; ``None`` to let churn decide.
        check_every_n_steps: measure churn every so many optimizer steps instead of once an epoch, and convert between
            two steps. For data so large that the structure settles within the first epoch; ``min_epochs`` then wants
            to be 0.
        probe_size: number of inputs on which churn is measured.
        solver: minimises the training loss over the path weights once the structure is frozen, by one pass over the
            training data that leaves no trace in the fit. The freeze then is at the end of an epoch, so that validation
            and checkpoint of that epoch are those of the solved head. Of several processes each reads its own part.
        stop_after_solve: whether the fit stops after the validation of the solved head (of several: of the last one);
            else the optimizer goes on.
        verbose: whether to say when and why the structure was frozen.

    Attributes:
        frozen: whether the head is frozen; of several heads, whether all are. Where a strategy starts the processes
            that fit (``ddp_spawn``, ``ddp_fork``, ``ddp_notebook``), this object is not told; ask the module.
        freeze_epoch: first epoch that trained frozen, of several heads with all of them; or ``None``.
        freeze_reason: why it was frozen, in a sentence, or ``None``.
        churn_history: churn at each check until the freeze; of several heads that of the first.
        solve_report: what the solve did, or ``None``; of several heads that of the first.
        heads: every head that is watched, by its name, with ``frozen``, ``freeze_epoch``, ``freeze_reason``,
            ``churn_history`` and ``solve.report`` of its own.

    Raises:
        MisconfigurationException: if an argument is out of range; at the start of a fit, if a head is not there,
            cannot be read or is not trained, a pattern matches none, one head lies inside another or has two names, or
            if strategy, optimizers or other callbacks rule a conversion out; after the first batch, if modules in a
            head are called, and the head is not.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from glai_lightning.callbacks import StructureFreezeCallback
        >>> trainer = Trainer(callbacks=[StructureFreezeCallback("head")], logger=False, accelerator="cpu")
    """

    def __init__(
        self,
        head: str | Sequence[str] = "head",
        paths: Literal["output", "tangent", "independent"] = "output",
        *,
        churn_tolerance: float = 0.10,
        relative_tolerance: float = 0.25,
        patience: int = 1,
        min_epochs: int = 1,
        min_steps: int = 50,
        freeze_at_epoch: int | None = None,
        check_every_n_steps: int | None = None,
        probe_size: int = 1024,
        solver: LogisticSolver | RidgeSolver | Literal["auto"] | None = "auto",
        stop_after_solve: bool = True,
        verbose: bool = True,
    ) -> None:
        self.head = list(head) if isinstance(head, tuple) else head
        self.paths: Paths = paths
        self.churn_tolerance = churn_tolerance
        self.relative_tolerance = relative_tolerance
        self.patience = patience
        self.min_epochs = min_epochs
        self.min_steps = min_steps
        self.freeze_at_epoch = freeze_at_epoch
        self.check_every_n_steps = check_every_n_steps
        self.probe_size = probe_size
        self.solver = solver
        self.stop_after_solve = stop_after_solve
        with as_misconfiguration():
            settings = FreezeSettings(**{field.name: getattr(self, field.name) for field in fields(FreezeSettings)})
        super().__init__(head, settings, verbose)
        self._logs_names = not stands_alone(self._names)
        self._judges: list[FreezeJudge] = []
        self._learning = LearningWatch(min_steps)
        self._restored: dict[str, Any] | None = None
        self._is_to_stop = False
        self._val_every: int | None = None
        self._told_of_moving = False
        self._unread: set[str] = set()

    @property
    def state_key(self) -> str:
        """Key of this callback's state in a checkpoint: one for each head."""
        return self._generate_state_key(head=self.head)

    def should_freeze(self, head: HeadWatch) -> bool:
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
        self, batch: Any, batch_idx: int, stage: Stage, head: StepReader
    ) -> HeadBatch | tuple[Tensor, ...] | None:
        """Return what a head is given for a batch, and what it is to be solved for; override where it cannot be seen.

        By default the step of the module is run, and the loss that it returns says it.

        Args:
            batch: a batch on the device of the module.
            batch_idx: index of the batch.
            stage: 'training' or 'validation'.
            head: the head, with its ``name``, its ``module``, ``pl_module`` in eval mode, and ``trainer``.

        Returns:
            Head inputs (n, D), targets (n,) or (n, C), and the weights of the samples (n,) if they differ; ``None`` for
            a batch in which the head has no part.

        Raises:
            MisconfigurationException: if the loss of the step is none that can be solved for.
        """
        return head.read(batch, batch_idx, stage)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check trainer and module, and prepare for a checkpoint from either side of the freeze."""
        if stage == "fit":
            check_trainer(trainer, pl_module)
            check_order(trainer, self, self.paths)
        names = match_heads(pl_module, self._names)
        self.heads = {name: self.heads.get(name) or HeadWatch(name, self._settings) for name in names}
        self._judges = [other for other in trainer.callbacks if isinstance(other, FreezeJudge)]
        watching = [other for other in trainer.callbacks if isinstance(other, StructureFreezeCallback)]
        # Heads that have a callback each are told apart in the logs too.
        match_heads(pl_module, [name for other in watching for name in match_heads(pl_module, other._names)])
        self._logs_names = not stands_alone(self._names) or len(watching) > 1
        for _, slot in self._watched(pl_module):
            if stage == "fit":
                check_launcher(trainer, slot, self.paths)
            load_as_mlp(slot, deferred=stage == "fit")
        self._restored = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Check the heads, and freeze those again that were frozen where the fit resumes from."""
        # Weights are restored by now and optimizer state is not: the only place where both the user's
        # configure_optimizers has met the MLP and the optimizer can still follow a conversion before its state is read.
        self._unread = {slot.name for _, slot in self._watched(pl_module) if not self._check(trainer, slot)}
        continues = self._module is not None and self._module() is pl_module
        self._module = weakref.ref(pl_module)
        self._fits = True
        self._learning.start_over()
        if self._restored is not None:
            self._learning.load_state_dict(self._restored["learning"])
        for watch, slot in self._watched(pl_module):
            state = self._state_of(watch)
            if state is not None:
                watch.load_state_dict(state)
            elif not continues:
                watch.start_over()
            restore_in_fit(trainer, slot)
            if slot.is_frozen:
                self._find_frozen(watch, slot)
            elif watch.frozen:
                watch.start_over()

    def _check(self, trainer: Any, slot: HeadSlot) -> bool:
        if not check_head(slot, self.paths):
            return False
        check_optimizers(trainer, slot, self.paths)
        if self.solver not in (None, "auto"):
            check_solvable(slot.module, slot.name, self.paths)
        return True

    def _find_frozen(self, watch: HeadWatch, slot: HeadSlot) -> None:
        head = frozen_head(slot)
        if not watch.frozen:
            watch.now_frozen(head.freeze_epoch, "frozen before this fit")
        self.say(f"The structure of {slot.name!r} is frozen already ({head.paths} paths).")
        if head.paths != self.paths:
            rank_zero_warn(
                f"Expected the head at {slot.name!r} to be frozen with {self.paths!r} paths, but got one that was "
                f"frozen with {head.paths!r} paths before. It stays as it is."
            )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start to watch."""
        for watch, slot in self._watched(pl_module):
            watch.start(trainer, slot, self._state_of(watch))
        self._is_to_stop = self.stop_after_solve and not self._finished
        if self._restored is not None and self.stop_after_solve and self._finished:
            names = " and ".join(repr(name) for name in self.heads)
            self.say(f"The head at {names} was solved before the checkpoint, after which the fit was to stop.")
            trainer.should_stop = True
        self._restored = None

    @property
    def _finished(self) -> bool:
        judged = any(judge.is_judging(name) for judge in self._judges for name in self.heads)
        return not judged and all(watch.solve.solved for watch in self.heads.values())

    def stop_if_finished(self, trainer: Any) -> None:
        """Stop the fit if that was asked for, and the last head is solved and not judged any more."""
        if self._is_to_stop and self._finished:
            self._is_to_stop = False
            trainer.should_stop = True
            # Lightning validates before it stops, unless the epoch is one of those without validation.
            if trainer.check_val_every_n_epoch is not None:
                self._val_every, trainer.check_val_every_n_epoch = trainer.check_val_every_n_epoch, 1

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Let checkpoints, which go by how often there is validation, find the user's own setting."""
        self._restore_val_every(trainer)

    def _restore_val_every(self, trainer: Any) -> None:
        if self._val_every is not None:
            trainer.check_val_every_n_epoch, self._val_every = self._val_every, None

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Convert what settled in the epoch before, or was asked for this one."""
        # At the start of an epoch, so that the checkpoint of the epoch just ended holds the MLP, and a resume from it
        # converts once more, to the same weights.
        for watch, slot in self._watched(pl_module):
            reason = self._due_reason(trainer, watch, trainer.current_epoch)
            if reason is not None and slot.name not in self._unread:
                self._freeze(trainer, watch, slot, trainer.current_epoch, reason)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Keep the inputs of the last batches before a check; see, on the first batch, that the loss can be solved."""
        for _, slot in self._watched(pl_module):
            if slot.name in self._unread and read_first_call(trainer, slot, batch, batch_idx, self.paths):
                self._check(trainer, slot)
                self._unread.remove(slot.name)
        if batch_idx == 0:
            # Where a fit resumes from its save after an epoch's last batch, Lightning starts no new epoch.
            self.on_train_epoch_start(trainer, pl_module)
        for watch, slot in self._watched(pl_module):
            watch.before_batch(trainer, slot, batch_idx)
            others = [other.module for _, other in self._watched(pl_module) if other != slot]
            if slot.name not in self._unread:
                watch.solve.before_batch(trainer, slot, batch, batch_idx, self.inputs_and_targets, others=others)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Measure churn after the last batch of an epoch, before validation and its checkpoint, or every n steps."""
        self._learning.after_batch(outputs)
        checked = False
        for watch, slot in self._watched(pl_module):
            if (news := watch.solve.take_news()) is not None:
                self.say(news)
            if watch.after_batch(trainer, slot):
                checked = True
                watch.note_settled(trainer, self.should_freeze(watch))
        if checked or trainer.is_last_batch:
            self._learning.after_check()
        for watch, slot in self._watched(pl_module):
            self._freeze_and_solve(trainer, watch, slot)
        self.stop_if_finished(trainer)

    def _freeze_and_solve(self, trainer: Any, watch: HeadWatch, slot: HeadSlot) -> None:
        """Freeze in the middle of an epoch where checks are made there, and at its end where a solve follows."""
        reason, epoch = None, trainer.current_epoch + int(trainer.is_last_batch)
        within_epoch = self.check_every_n_steps is not None and not trainer.fit_loop._should_accumulate()
        if watch.solve.pending if trainer.is_last_batch else within_epoch:
            reason = self._due_reason(trainer, watch, epoch)
        solves = watch.solve.pending and (reason is not None or (watch.frozen and trainer.is_last_batch))
        with unwinding(trainer, slot, partial(watch.unwind, trainer, slot)) if reason and solves else nullcontext():
            if reason is not None:
                self._freeze(trainer, watch, slot, epoch, reason)
            if solves:
                self.say(watch.run_solve(trainer, slot, self.inputs_and_targets))

    def _due_reason(self, trainer: Any, watch: HeadWatch, epoch: int) -> str | None:
        """Say why a head is to train frozen in an epoch; ``None`` if it is not, or is frozen already."""
        reason = watch.due_reason(epoch)
        if reason is None or not all(judge.allows_freeze(watch.name) for judge in self._judges):
            return None
        if watch.is_asked:
            return reason
        watch.waits_for = self._learning.missing(trainer, solves=watch.solve.pending)
        return reason if watch.waits_for is None else None

    def _freeze(self, trainer: Any, watch: HeadWatch, slot: HeadSlot, epoch: int, reason: str) -> None:
        for judge in self._judges:
            judge.before_freeze(trainer, slot)
        self.say(watch.freeze(trainer, slot, epoch, reason))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """See to it that a frozen structure stands still, whatever was done to ``requires_grad``."""
        moved = [slot.name for watch, slot in self._watched(pl_module) if watch.hold_still(slot)]
        if moved and not self._told_of_moving:
            self._told_of_moving = True
            rank_zero_warn(
                f"Parameters of the frozen structure of {moved} were set to require gradients. They stay frozen. Call "
                "`unfreeze` of the callback between two fits to train the MLP again."
            )

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Take note of the score, by which a head that is not solved is frozen."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._learning.after_validation(trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log churn and whether the head is frozen."""
        self._learning.after_epoch(trainer)
        for name, watch in self.heads.items():
            for key, value in watch.metrics().items():
                # All ranks have the same numbers, and Lightning warns of values that are not synchronised.
                pl_module.log(self.log_key(key, name), value, prog_bar=key == "churn", sync_dist=True)

    def log_key(self, key: str, head_name: str) -> str:
        """Return the name under which something is logged of a head: the head's is in it where there are several."""
        return f"structure/{key}/{head_name}" if self._logs_names else f"structure/{key}"

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Say so if a head is still an MLP."""
        for watch in self.heads.values():
            if not watch.frozen:
                self.say(watch.describe_unfrozen())
            watch.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Stop watching; what was seen is kept for the checkpoint that other callbacks may save of the exception."""
        self._fits = False
        for watch in self.heads.values():
            watch.detach()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Stop watching."""
        self._fits = False
        self._restore_val_every(trainer)
        for watch in self.heads.values():
            watch.close()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed fit needs; primitives and tensors only, so that ``weights_only`` loading reads it."""
        return {
            "heads": {name: watch.state_dict() for name, watch in self.heads.items()},
            "learning": self._learning.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state for the start of the fit; a mere test or validation changes nothing.

        Raises:
            MisconfigurationException: if it is not what this callback saves for the same ``head``.
        """
        check_state(state_dict, {"heads": dict, "learning": dict}, "the heads")
        for name, state in state_dict["heads"].items():
            HeadWatch.check_state(state, name)
        self._restored = state_dict

    def _state_of(self, watch: HeadWatch) -> dict[str, Any] | None:
        return None if self._restored is None else self._restored["heads"].get(watch.name)
