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
from glai_lightning.callbacks.one_pass import OnePass, check_alone, one_pass_if_possible
from glai_lightning.callbacks.stopping import StopAfterSolve
from glai_lightning.callbacks.watched_heads import FreezeJudge, WatchedHeads
from glai_lightning.checks import expect_flag
from glai_lightning.fitting.conversion import (
    check_head,
    frozen_head,
    load_as_mlp,
    restore_in_fit,
)
from glai_lightning.fitting.first_call import read_first_call
from glai_lightning.fitting.fit_record import OnePassRecord
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
    """Freezes the structure of a head once it settles, solves the head where that is possible, and stops.

    The callback works on any LightningModule. It measures *churn*, the fraction of pattern bits that flipped since the
    last check on the inputs that the head was last trained on. A structure has settled once churn is small, also
    against the largest so far, the training loss has fallen clearly, and validation rises no more. A head that can be
    solved is also tried out on the way: a solve is kept, and the structure frozen, once it is hardly better than the
    one tried before it. With output paths parameters, optimizer groups and keys stay what they were.

    It logs, once an epoch from the first on, ``structure/churn`` (NaN until it is measured, 0 once frozen),
    ``structure/frozen`` (0 or 1) and ``structure/freeze_epoch`` (-1 until then). Several heads of one module freeze
    independently, and ``/<name>`` is appended to the keys of what is logged. A head without a loss of its own, because
    it feeds another head, is not solved. Heads that want different arguments can have a callback each.
    ``StructureRevert`` beside this callback takes back a freeze that validates worse.

    Args:
        head: qualified name of the head in the LightningModule; or names of its layers where they lie apart, joined by
            '+'; or a pattern such as ``heads.*`` that stands for all heads that it matches; or a list of these.
        paths: what stays trainable, see ``freeze_structure``: 'output' (last-layer training), 'tangent' (linearisation)
            or 'independent'.
        churn_tolerance: largest churn that counts as settled, in [0, 1].
        relative_tolerance: largest churn that counts as settled, as a fraction of the largest so far, in (0, 1].
        patience: number of checks in a row that must pass.
        min_epochs: finished epochs before which the structure is not frozen by churn.
        min_steps: optimizer steps before which it is not. At 0 churn alone decides.
        freeze_at_epoch: first epoch (0-based) to train frozen, whatever the churn; ``None`` to let churn decide.
        check_every_n_steps: measure churn every so many optimizer steps instead of once an epoch, and convert between
            two steps, for data so large that the structure settles in the first epoch (with ``min_epochs=0``).
        probe_size: inputs on which churn is measured.
        solver: minimises the training loss over the path weights, by a pass over the training data that leaves no
            trace in the fit, at the end of an epoch. Of several processes each reads its own part. 'auto' chooses it by
            the loss of the first step; it chooses none, and says why, where layers before the head are trained, the
            data is augmented at random, or the loss cannot be solved. A solver of your own raises an error there.
            ``None`` never solves.
        stop_after_solve: whether the fit stops after the validation of the solved head (of several: of the last one);
            else the optimizer goes on.
        one_pass: whether the frozen backbone reads the training data once: the head's inputs, which must be fixed, are
            kept in the first epoch. At its end the head is trained on them in passes, as the fit would have, until it
            is frozen and solved, and the fit stops. 'auto' does so where the inputs are fixed and what stands before
            the head takes at least three times its multiply-adds. See ``docs/one_pass.md``.
        verbose: whether to say when and why the structure was frozen.

    Attributes:
        frozen: whether the head is frozen; of several heads, whether all are. Where the strategy starts processes
            (``ddp_spawn``, ``ddp_fork``, ``ddp_notebook``), this object is not told; ask the module.
        freeze_epoch: first epoch that trained with all heads frozen, or ``None``.
        freeze_reason: why, in a sentence, or ``None``.
        churn_history: churn at each check until the freeze; of several heads that of the first.
        solve_report: what the solve did, or ``None``; of several heads that of the first.
        one_pass_record: samples, passes and seconds of a fit with ``one_pass``, once it has solved; else ``None``.
        heads: every head, by its name, with the same attributes, and ``solve.report``.

    Raises:
        MisconfigurationException: if an argument is out of range; at the start of a fit or on its first batch, if a
            head is not there or cannot be frozen, or if strategy, optimizers or other callbacks rule a freeze out.

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
        one_pass: bool | Literal["auto"] = False,
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
        self.one_pass = one_pass
        with as_misconfiguration():
            expect_flag("stop_after_solve", stop_after_solve)
            expect_flag("verbose", verbose)
            settings = FreezeSettings(**{field.name: getattr(self, field.name) for field in fields(FreezeSettings)})
        super().__init__(head, settings, verbose)
        self._logs_names = not stands_alone(self._names)
        self._judges: list[FreezeJudge] = []
        self._learning = LearningWatch(min_steps)
        self._restored: dict[str, Any] | None = None
        self._stopping = StopAfterSolve()
        self._unread: set[str] = set()
        self._one_pass: OnePass | None = None
        self.one_pass_record: OnePassRecord | None = None

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
        """Return what a head is given for a batch, and what it is to be solved for; by default its step is read.

        Args:
            batch: a batch on the device of the module.
            batch_idx: index of the batch.
            stage: 'training' or 'validation'.
            head: the head, with its ``name``, its ``module``, ``pl_module`` in eval mode, and ``trainer``.

        Returns:
            Head inputs (n, D), targets (n,) or (n, C), and weights of samples (n,) that differ; ``None`` for no part.

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
        if self.one_pass is True:
            check_alone(self._judges)
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
            if slot.name not in self._unread:
                self._restore(trainer, watch, slot)

    def _restore(self, trainer: Any, watch: HeadWatch, slot: HeadSlot) -> None:
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
            if slot.name not in self._unread:
                watch.start(trainer, slot, self._state_of(watch))
        self._stopping.wanted = self.stop_after_solve and not self._finished
        if self._restored is not None and self.stop_after_solve and self._finished:
            names = " and ".join(repr(name) for name in self.heads)
            self.say(f"The head at {names} was solved before the checkpoint, after which the fit was to stop.")
            trainer.should_stop = True
        self._one_pass = self.one_pass_record = None
        possible = self.one_pass is True or (self.stop_after_solve and not self._judges)
        if self.one_pass and possible and not self._finished:
            own = type(self).inputs_and_targets is StructureFreezeCallback.inputs_and_targets
            begin = OnePass if self.one_pass is True else one_pass_if_possible
            heads = list(self._watched(pl_module))
            self._one_pass = begin(trainer, pl_module, heads, self.inputs_and_targets, is_own=own, tell=self.say)

    @property
    def _finished(self) -> bool:
        judged = any(judge.is_judging(name) for judge in self._judges for name in self.heads)
        left = [] if self._module is None else [watch for watch, _ in self._watched(self._module())]
        return not judged and all(watch.solve.solved for watch in left)

    def stop_if_finished(self, trainer: Any) -> None:
        """Stop the fit if that was asked for, and the last head is solved and not judged any more."""
        if self._stopping.wanted and self._finished:
            self._stopping.stop(trainer)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Validate what was solved, and what was kept."""
        self._stopping.restore(trainer)
        if self._one_pass is not None:
            self._one_pass.before_validation()

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Convert what settled or was asked for; after the checkpoint of the epoch before, which holds the MLP."""
        for watch, slot in self._watched(pl_module):
            reason = self._due_reason(trainer, watch, trainer.current_epoch)
            if reason is not None and slot.name not in self._unread:
                self._freeze(trainer, watch, slot, trainer.current_epoch, reason)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Keep the inputs of the last batches before a check; see, on the first batch, that the loss can be solved."""
        for watch, slot in self._watched(pl_module):
            if slot.name in self._unread:
                read_first_call(trainer, slot, batch, batch_idx)
                if self._check(trainer, slot):
                    self._unread.remove(slot.name)
                    self._restore(trainer, watch, slot)
                    watch.start(trainer, slot, self._state_of(watch))
        self._restored = None
        if batch_idx == 0:
            # Where a fit resumes from its save after an epoch's last batch, Lightning starts no new epoch.
            self.on_train_epoch_start(trainer, pl_module)
        for watch, slot in self._watched(pl_module):
            watch.before_batch(trainer, slot, batch_idx)
            others = [other.module for _, other in self._watched(pl_module) if other != slot]
            calls, read = None if self._one_pass is None else self._one_pass.first_look, self.inputs_and_targets
            if slot.name not in self._unread:
                watch.solve.before_batch(trainer, slot, batch, batch_idx, read, others=others, calls=calls)
        if self._one_pass is not None and not self._one_pass.record_next_step(trainer, pl_module, batch, batch_idx):
            self._one_pass = None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Measure churn after the last batch of an epoch, before validation and its checkpoint, or every n steps."""
        if self._one_pass is not None and trainer.is_last_batch and not self._one_pass.complete(trainer):
            self._one_pass = None
        self._after_batch(pl_module, trainer, outputs)
        if self._one_pass is None or not trainer.is_last_batch:
            return
        self._one_pass.train(trainer, partial(self._after_batch, pl_module), self._learning.before_pass)
        for watch, slot in self._watched(pl_module):
            if not watch.frozen:
                self._freeze_and_solve(trainer, watch, slot, "the fit allows for no further pass")
        self.one_pass_record = self._one_pass.finish()
        self.say(self.one_pass_record)
        self.stop_if_finished(trainer)

    def _after_batch(self, pl_module: Any, trainer: Any, outputs: Any) -> None:
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

    def _freeze_and_solve(self, trainer: Any, watch: HeadWatch, slot: HeadSlot, reason: str | None = None) -> None:
        """Freeze in the middle of an epoch where checks are made there, and at its end where a solve follows."""
        epoch = trainer.current_epoch + int(trainer.is_last_batch)
        within_epoch = self.check_every_n_steps is not None and not trainer.fit_loop._should_accumulate()
        if watch.solve.pending if trainer.is_last_batch else within_epoch:
            reason = reason or self._due_reason(trainer, watch, epoch)
        if reason is None and trainer.is_last_batch and watch.is_quiet and self._tries_solves(watch):
            reason = self._learning.why_over(trainer)
            tries = reason is None and watch.may_be_tried(trainer)
            if tries and self._learning.missing(trainer, by_score=False) is None:
                self._try_solve(trainer, watch, slot, epoch)
                return
        solves = watch.solve.pending and (reason is not None or (watch.frozen and trainer.is_last_batch))
        with unwinding(trainer, slot, partial(watch.unwind, trainer, slot)) if reason and solves else nullcontext():
            if reason is not None:
                self._freeze(trainer, watch, slot, epoch, reason)
            if solves:
                self.say(watch.run_solve(trainer, slot, self.inputs_and_targets, self._one_pass))

    def _tries_solves(self, watch: HeadWatch) -> bool:
        """Tell whether solves of a head decide on its freeze, and not churn and validation alone."""
        by_rule = self.min_steps > 0 and not self._judges and not watch.is_asked
        return by_rule and watch.solve.pending and not watch.frozen

    def _try_solve(self, trainer: Any, watch: HeadWatch, slot: HeadSlot, epoch: int) -> None:
        solve = partial(watch.run_solve, trainer, slot, self.inputs_and_targets, self._one_pass)
        with unwinding(trainer, slot, partial(watch.unwind, trainer, slot)) as before:
            for event in watch.try_solve(trainer, slot, epoch, solve, *before):
                self.say(event)

    def _due_reason(self, trainer: Any, watch: HeadWatch, epoch: int) -> str | None:
        """Say why a head is to train frozen in an epoch; ``None`` if it is not, or is frozen already."""
        reason = watch.due_reason(epoch)
        if reason is None or not all(judge.allows_freeze(watch.name) for judge in self._judges):
            return None
        if watch.is_asked:
            return reason
        watch.waits_for = self._learning.missing(trainer, by_score=not watch.solve.pending or self._tries_solves(watch))
        return reason if watch.waits_for is None else None

    def _freeze(self, trainer: Any, watch: HeadWatch, slot: HeadSlot, epoch: int, reason: str) -> None:
        for judge in self._judges:
            judge.before_freeze(trainer, slot)
        self.say(watch.freeze(trainer, slot, epoch, reason))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Take note of the score."""
        if self._one_pass is not None:
            self._one_pass.after_validation()
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._learning.after_validation(trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log churn and whether the head is frozen."""
        self._learning.after_epoch(trainer)
        # All ranks have the same numbers, and Lightning warns of values that are not synchronised.
        for name, watch in self.heads.items():
            for key, value in watch.metrics().items():
                pl_module.log(self.log_key(key, name), value, prog_bar=key == "churn", sync_dist=True)

    def log_key(self, key: str, head_name: str) -> str:
        """Return the name under which something is logged of a head: the head's is in it where there are several."""
        return f"structure/{key}/{head_name}" if self._logs_names else f"structure/{key}"

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Say which heads are still MLPs."""
        for watch, _ in self._watched(pl_module):
            if not watch.frozen:
                self.say(watch.describe_unfrozen())
        for watch in self.heads.values():
            watch.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Stop watching; what was seen is kept for the checkpoint that other callbacks may save of the exception."""
        self._fits = False
        if self._one_pass is not None:
            self._one_pass.after_validation()
        for watch in self.heads.values():
            watch.detach()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Stop watching."""
        self._fits, self._one_pass = False, None
        self._stopping.restore(trainer)
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
