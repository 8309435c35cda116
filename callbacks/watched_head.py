"""One head under the watch of a ``StructureFreezeCallback``: its churn, its freeze, its state."""

from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from glai_lightning.callbacks.callback_state import COUNT, FLAG, NUMBERS, TEXT, check_entries, or_none
from glai_lightning.callbacks.churn_watch import ChurnWatch
from glai_lightning.callbacks.head_solve import HeadSolve
from glai_lightning.callbacks.revert_guard import RevertGuard, check_guard_state
from glai_lightning.checks import UserValueError
from glai_lightning.fitting.conversion import (
    check_launcher,
    check_optimizers,
    find_head,
    follow_in_fit,
    freeze_head_in_fit,
)
from glai_lightning.fitting.misconfiguration import UserMisconfigurationError
from glai_lightning.fitting.solving import check_solvable
from glai_lightning.heads.frozen import GLAIHead, check_freezable, freeze_in_place, unfreeze_in_place
from glai_lightning.heads.restoring import HeadRestorer

if TYPE_CHECKING:
    from glai_lightning.callbacks.structure_freeze import StructureFreezeCallback

_STATE = {
    "frozen": FLAG,
    "freeze_epoch": or_none(COUNT),
    "freeze_reason": or_none(TEXT),
    "churn_history": NUMBERS,
    "settled": FLAG,
    "solved": FLAG,
}


def check_head_state(state: Any, head_name: str) -> None:
    """Check that a checkpoint holds the state of a head as ``WatchedHead.state_dict`` returns it.

    Raises:
        MisconfigurationException: otherwise.
    """
    check_entries(state, _STATE, f"the head at {head_name!r}")
    if "guard" in state:
        check_entries(state, {"checks_before_revert": COUNT}, f"the head at {head_name!r}")
        check_guard_state(state["guard"], head_name)


class WatchedHead:
    """A head of a LightningModule, from its first check to the end of the fit.

    Args:
        name: qualified name of the head.
        callback: whose settings it goes by.

    Attributes:
        frozen: whether the head is frozen.
        freeze_epoch: first epoch that trained frozen, or ``None``.
        freeze_reason: why it was frozen, in a sentence, or ``None``.
        churn_history: churn at each check until the freeze.
    """

    def __init__(self, name: str, callback: "StructureFreezeCallback") -> None:
        self.name = name
        self.callback = callback
        self.frozen = False
        self.freeze_epoch: int | None = None
        self.freeze_reason: str | None = None
        self.churn_history: list[float] = []
        self.solve = HeadSolve(name, callback)
        self.guard = RevertGuard(name, callback)
        self._watch = ChurnWatch(name, callback.probe_size, callback.check_every_n_steps)
        self._settled = False
        self._checks_before_revert = 0

    def prepare(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        """Prepare for a checkpoint from either side of the freeze."""
        if stage == "fit":
            check_launcher(trainer, pl_module, self.name, self.callback.paths)
        HeadRestorer.of(pl_module, self.name).deferred = stage == "fit"

    def check(self, trainer: Any, pl_module: nn.Module) -> None:
        """Check, before a fit, that the head can be frozen, trained on and solved.

        Raises:
            MisconfigurationException: otherwise.
        """
        head = find_head(pl_module, self.name)
        if not isinstance(head, GLAIHead):
            try:
                check_freezable(head, paths=self.callback.paths)
            except ValueError as error:
                raise UserMisconfigurationError(f"The head at {self.name!r} cannot be frozen. {error}") from error
        check_optimizers(trainer, head, self.name)
        if self.callback.solver is not None:
            check_solvable(head, self.name, self.callback.paths)

    def enter_fit(self, trainer: Any, pl_module: nn.Module, state: dict[str, Any] | None, continues: bool) -> None:
        """Take up the state of a checkpoint, and freeze the head again where it was frozen in it.

        Args:
            trainer: the Trainer of the fit.
            pl_module: its module.
            state: the state of the head in the checkpoint that the fit resumes from, or ``None``.
            continues: whether the fit before was one of the same module.
        """
        restorer = HeadRestorer.of(pl_module, self.name)
        restorer.deferred = False
        if state is not None:
            self._load(state)
        elif continues:
            # What the guard keeps is for the optimizer of another fit.
            self.guard.start_over()
        else:
            self.start_over()
        if restorer.pending:
            follow_in_fit(trainer, restorer.restore(pl_module))
        head = find_head(pl_module, self.name)
        if isinstance(head, GLAIHead):
            self._find_frozen(head)
        elif self.frozen:
            self.start_over()

    def _find_frozen(self, head: GLAIHead) -> None:
        if not self.frozen:
            self._now_frozen(head.freeze_epoch, "frozen before this fit")
        self.callback.say(f"The structure of {self.name!r} is frozen already ({head.paths} paths).")
        if head.paths != self.callback.paths:
            rank_zero_warn(
                f"Expected the head at {self.name!r} to be frozen with {self.callback.paths!r} paths, but got one that "
                f"was frozen with {head.paths!r} paths before. It stays as it is."
            )

    def start(self, trainer: Any, pl_module: nn.Module, state: dict[str, Any] | None) -> None:
        """Start to watch the head, going on from the state of a checkpoint if there is one."""
        self._watch.close()
        self.solve.start()
        if not self.frozen:
            self._watch.start(trainer, find_head(pl_module, self.name))
            if state is not None:
                self._watch.resume(trainer, state)

    def start_epoch(self, trainer: Any, pl_module: nn.Module) -> None:
        """Take the head back to the MLP, or convert it, as was decided in the epoch before or asked for this one."""
        # At the start of an epoch, so that the checkpoint of the epoch just ended holds the MLP, and a resume from it
        # converts once more, to the same weights.
        if self.guard.lost:
            self._revert(trainer, pl_module)
        if self.frozen:
            return
        epoch = trainer.current_epoch
        if self._is_asked(epoch):
            self._convert(trainer, pl_module, epoch, self._describe_asked())
        elif self._may_settle():
            self._convert(trainer, pl_module, epoch, self._describe_settled())

    def before_batch(self, trainer: Any, pl_module: nn.Module, batch: Any, batch_idx: int) -> None:
        """Keep the inputs that the next check is made on; see, on the first batch, that the loss can be solved."""
        # Lightning calls no `on_train_epoch_start` where it resumes from the last batch of the epoch before.
        self.start_epoch(trainer, pl_module)
        self._watch.before_batch(trainer, batch_idx)
        self.solve.before_batch(trainer, pl_module, batch, batch_idx)

    def after_batch(self, trainer: Any, pl_module: nn.Module) -> None:
        """Make the check that is due, and convert, solve and go back where that is done here."""
        churn = self._watch.after_batch(trainer)
        if churn is not None:
            self.churn_history.append(churn)
            # An overridden `should_freeze` may go by what only one process knows.
            self._settled = trainer.strategy.reduce_boolean_decision(self._has_settled(trainer))
        converted = not self.frozen and self._convert_after_batch(trainer, pl_module)
        if self.frozen and self.solve.pending and (converted or trainer.is_last_batch):
            self.solve.run(trainer, pl_module)
        if self.callback.check_every_n_steps is not None and self.guard.lost_before(trainer.global_step):
            self._revert(trainer, pl_module)

    def _has_settled(self, trainer: Any) -> bool:
        finished_epochs = trainer.current_epoch + (1 if trainer.is_last_batch else 0)
        checks = len(self.churn_history) - self._checks_before_revert
        return (
            finished_epochs >= self.callback.min_epochs
            and checks >= self.callback.patience
            and self.callback.should_freeze(self)
        )

    def _may_settle(self) -> bool:
        return self._settled and self.guard.allows_freeze

    def after_validation(self, trainer: Any, score: float) -> None:
        """Judge the freeze by the score of the validation that just ended."""
        self.guard.judge(trainer, score, solved=self.solve.solved)

    def _revert(self, trainer: Any, pl_module: nn.Module) -> None:
        self.guard.revert(trainer, pl_module)
        self.frozen = False
        self.freeze_epoch = None
        self.freeze_reason = None
        self.solve.start_over()
        self._settled = False
        # Earlier checks still say how large churn can be, and no longer that it has settled.
        self._checks_before_revert = len(self.churn_history)
        self._watch.start(trainer, pl_module.get_submodule(self.name))

    @property
    def finished(self) -> bool:
        """Whether the head is solved, and not about to be judged for it."""
        return self.solve.solved and self.guard.trial is None

    def _convert_after_batch(self, trainer: Any, pl_module: nn.Module) -> bool:
        """Convert in the middle of an epoch where checks are made there, and at its end where a solve follows."""
        epoch = trainer.current_epoch
        if not trainer.is_last_batch:
            due = self._may_settle() and self.callback.check_every_n_steps is not None
        else:
            epoch += 1
            due = self.callback.solver is not None and (self._may_settle() or self._is_asked(epoch))
        if due:
            reason = self._describe_settled() if self._may_settle() else self._describe_asked()
            self._convert(trainer, pl_module, epoch, reason)
        return due

    def _is_asked(self, epoch: int) -> bool:
        asked = self.callback.freeze_at_epoch
        # What went back once is not forced again: churn decides from then on.
        return asked is not None and epoch >= asked and self.guard.reverts == 0

    def metrics(self) -> dict[str, float]:
        """Return what is logged of the head at the end of an epoch."""
        metrics = {
            "churn": self.churn_history[-1] if self.churn_history and not self.frozen else 0.0,
            "frozen": float(self.frozen),
            "freeze_epoch": float(-1 if self.freeze_epoch is None else self.freeze_epoch),
        }
        return metrics if self.callback.monitor is None else {**metrics, "reverts": float(self.guard.reverts)}

    def finish(self, trainer: Any, pl_module: nn.Module) -> None:
        """Go back to the MLP if that was decided last; say so if the head ends as an MLP or unproven; stop watching."""
        if self.guard.lost:
            self._revert(trainer, pl_module)
        elif self.guard.trial is not None:
            self.callback.say(f"The fit ends before the freeze of {self.name!r} is proven: {self.guard.describe()}.")
        elif not self.frozen:
            last = f"{self.churn_history[-1]:.2%}" if self.churn_history else "not measured"
            state = "settled only in the last epoch" if self._settled else "did not settle"
            self.callback.say(f"The structure of {self.name!r} {state} (last churn {last}): the head stays an MLP.")
        self.close()

    def detach(self) -> None:
        """Stop watching, and keep what was seen."""
        self._watch.detach()

    def close(self) -> None:
        """Stop watching."""
        self._watch.close()

    def is_frozen_in(self, pl_module: nn.Module) -> bool:
        """Tell whether the module holds a frozen head."""
        return isinstance(find_head(pl_module, self.name), GLAIHead)

    def check_convertible(self, pl_module: nn.Module) -> None:
        """Check that the MLP could be frozen.

        Raises:
            ValueError: otherwise.
        """
        check_freezable(find_head(pl_module, self.name), paths=self.callback.paths)

    def freeze(self, pl_module: nn.Module) -> None:
        """Freeze the structure of the head, between fits."""
        freeze_in_place(find_head(pl_module, self.name), paths=self.callback.paths)
        self._now_frozen(None, "frozen by hand")

    def check_thawable(self, pl_module: nn.Module) -> None:
        """Check that the frozen head equals an MLP.

        Raises:
            ValueError: if its paths are not 'output'.
        """
        head = self._frozen_head(pl_module)
        if head.paths != "output":
            raise UserValueError(
                f"Expected the head at {self.name!r} to be frozen with 'output' paths to be an MLP again, but got "
                f"{head.paths!r} paths, which no MLP equals once they are trained."
            )

    def unfreeze(self, pl_module: nn.Module) -> None:
        """Put the MLP back in the place of the frozen head, between fits."""
        unfreeze_in_place(self._frozen_head(pl_module))
        self.start_over()

    def _frozen_head(self, pl_module: nn.Module) -> GLAIHead:
        head = find_head(pl_module, self.name)
        assert isinstance(head, GLAIHead)
        return head

    def start_over(self) -> None:
        """Be a head of which nothing is known yet."""
        self.frozen = False
        self.freeze_epoch = None
        self.freeze_reason = None
        self.churn_history = []
        self.solve.start_over()
        self.guard.start_over()
        self._settled = False
        self._checks_before_revert = 0

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed fit needs; primitives and tensors only, so that ``weights_only`` loading reads it."""
        state = {
            "frozen": self.frozen,
            "freeze_epoch": self.freeze_epoch,
            "freeze_reason": self.freeze_reason,
            "churn_history": list(self.churn_history),
            "settled": self._settled,
            "solved": self.solve.solved,
            **self._watch.state_dict(),
        }
        if self.callback.monitor is not None:
            state["guard"] = self.guard.state_dict()
            state["checks_before_revert"] = self._checks_before_revert
        return state

    def complete_state(self, trainer: Any, state: dict[str, Any]) -> None:
        """Add to a state what the other processes saw since the last check."""
        if not self.frozen:
            self._watch.complete_state(trainer, state)

    def _load(self, state: dict[str, Any]) -> None:
        self.frozen = state["frozen"]
        self.freeze_epoch = state["freeze_epoch"]
        self.freeze_reason = state["freeze_reason"]
        self.churn_history = list(state["churn_history"])
        self._settled = state["settled"]
        self.solve.solved = state["solved"]
        self.guard.start_over()
        if self.callback.monitor is not None and "guard" in state:
            self.guard.load_state_dict(state["guard"])
        self._checks_before_revert = state.get("checks_before_revert", 0)

    def _convert(self, trainer: Any, pl_module: nn.Module, epoch: int, reason: str) -> None:
        paths = self.callback.paths
        before = _count_trainable(pl_module)
        dropout = any(
            isinstance(module, torch.nn.modules.dropout._DropoutNd) and module.p > 0
            for module in pl_module.get_submodule(self.name).modules()
        )
        self.guard.begin(trainer, pl_module.get_submodule(self.name))
        freeze_head_in_fit(trainer, pl_module, self.name, paths=paths, freeze_epoch=epoch)
        self._now_frozen(epoch, reason)
        self.callback.say(
            f"Froze the structure of {self.name!r} at step {trainer.global_step}, epoch {epoch} ({paths} paths): "
            f"{reason}. Trainable parameters: {before:,} before, {_count_trainable(pl_module):,} now."
            + (" Dropout inside the head is gone from here on." if dropout else "")
        )

    def _now_frozen(self, epoch: int | None, reason: str) -> None:
        self.frozen = True
        self.freeze_epoch = epoch
        self.freeze_reason = reason
        self._watch.close()

    def _describe_settled(self) -> str:
        churn, largest = self.churn_history[-1], max(self.churn_history)
        return (
            f"churn {churn:.2%} is at most {self.callback.churn_tolerance:.0%} "
            f"and at most {self.callback.relative_tolerance:g} of the largest, {largest:.2%}"
        )

    def _describe_asked(self) -> str:
        return f"asked to freeze at epoch {self.callback.freeze_at_epoch}"


def _count_trainable(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
