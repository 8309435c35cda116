"""One head that a ``StructureFreezeCallback`` watches: its churn, its freeze, its solve, its state."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.hooks import RemovableHandle

from glai_lightning.callbacks.callback_state import check_state
from glai_lightning.callbacks.churn_watch import ChurnWatch
from glai_lightning.callbacks.solve_trials import SolveTrials
from glai_lightning.checks import (
    UserTypeError,
    UserValueError,
    expect_choice,
    expect_integer,
    expect_number,
)
from glai_lightning.fitting.conversion import freeze_in_fit, unfreeze_in_fit
from glai_lightning.fitting.first_call import compare_calls
from glai_lightning.fitting.heads_in_module import HeadSlot
from glai_lightning.fitting.sizes import count_trainable
from glai_lightning.fitting.solving import HeadSolve, KeptEpoch, ReadBatch
from glai_lightning.heads.frozen import frozen_parameters
from glai_lightning.heads.joined import JoinedHead
from glai_lightning.heads.patterns import layout_of
from glai_lightning.heads.record import Paths
from glai_lightning.solvers import LogisticSolver, RidgeSolver, SolveReport

_STATE = {
    "frozen": bool,
    "freeze_epoch": int | None,
    "freeze_reason": str | None,
    "churn_history": list,
    "settled": bool,
    "solved": bool,
    "reverted_at_check": int | None,
    "trials": dict,
}


@dataclass(frozen=True)
class FreezeSettings:
    """When and how a head is frozen, see ``StructureFreezeCallback``.

    Raises:
        TypeError: if a value is of the wrong type.
        ValueError: if a value is out of range.
    """

    paths: Paths = "output"
    churn_tolerance: float = 0.10
    relative_tolerance: float = 0.25
    patience: int = 1
    min_epochs: int = 1
    min_steps: int = 50
    freeze_at_epoch: int | None = None
    check_every_n_steps: int | None = None
    probe_size: int = 1024
    solver: LogisticSolver | RidgeSolver | Literal["auto"] | None = None
    stop_after_solve: bool = True
    one_pass: bool | Literal["auto"] = False

    def __post_init__(self) -> None:
        expect_choice("paths", self.paths, ("output", "tangent", "independent"))
        expect_number("churn_tolerance", self.churn_tolerance, low=0.0, high=1.0)
        expect_number("relative_tolerance", self.relative_tolerance, low=0.0, high=1.0, above=True)
        expect_integer("patience", self.patience, least=1)
        expect_integer("min_epochs", self.min_epochs, least=0)
        expect_integer("min_steps", self.min_steps, least=0)
        if self.freeze_at_epoch is not None:
            expect_integer("freeze_at_epoch", self.freeze_at_epoch, least=0)
        if self.check_every_n_steps is not None:
            expect_integer("check_every_n_steps", self.check_every_n_steps, least=1)
        expect_integer("probe_size", self.probe_size, least=1)
        if self.solver not in (None, "auto") and not isinstance(self.solver, LogisticSolver | RidgeSolver):
            raise UserTypeError(
                f"Expected `solver` to be 'auto', a `LogisticSolver` or a `RidgeSolver`, but got {self.solver!r}."
            )
        if not isinstance(self.one_pass, bool) and self.one_pass != "auto":
            raise UserTypeError(f"Expected `one_pass` to be True, False or 'auto', but got {self.one_pass!r}.")
        if self.one_pass is True and (self.solver is None or not self.stop_after_solve):
            given = "solver=None" if self.solver is None else "stop_after_solve=False"
            raise UserValueError(f"Expected a solve after which the fit stops with `one_pass=True`, but got `{given}`.")


@dataclass(frozen=True)
class Frozen:
    """A head was frozen.

    Args:
        head: its name.
        reason: why, in a sentence.
        step: optimizer steps by then.
        epoch: first epoch that trains frozen.
        paths: what stays trainable.
        trainable: trainable numbers of the whole module, before and after.
        dropout: whether the freeze ended dropout inside the head.
    """

    head: str
    reason: str
    step: int
    epoch: int
    paths: Paths
    trainable: tuple[int, int]
    dropout: bool

    def __str__(self) -> str:
        before, after = self.trainable
        return (
            f"Froze the structure of {self.head!r} at step {self.step}, epoch {self.epoch} ({self.paths} paths): "
            f"{self.reason}. Trainable parameters: {before:,} before, {after:,} now."
            + (" Dropout inside the head is gone from here on." if self.dropout else "")
        )


@dataclass(frozen=True)
class Solved:
    """A head was solved.

    Args:
        head: its name.
        report: what the solve did.
    """

    head: str
    report: SolveReport

    def __str__(self) -> str:
        same = self.report.best_step == 0 and self.report.steps > 0
        return f"Solved for the path weights of {self.head!r}: {self.report}" + (
            " None were better than those before, which stay." if same else ""
        )


class HeadWatch:
    """A head of a LightningModule, from its first check to the end of the fit.

    Args:
        name: qualified name of the head.
        settings: when and how it is frozen.

    Attributes:
        frozen: whether the head is frozen.
        freeze_epoch: first epoch that trained frozen, or ``None``.
        freeze_reason: why it was frozen, in a sentence, or ``None``.
        churn_history: churn at each check until the freeze.
        solve: the solve of the head, with its ``report``.
        trials: the solves of the head that were tried and taken back.
    """

    def __init__(self, name: str, settings: FreezeSettings) -> None:
        self.name = name
        self.settings = settings
        self.solve = HeadSolve(settings.solver, settings.paths, one_pass=settings.one_pass)
        self.trials = SolveTrials()
        self._watch = ChurnWatch(settings.probe_size, settings.check_every_n_steps)
        self._is_compared = False
        self._hooks: list[RemovableHandle] = []
        self.start_over()

    def start_over(self) -> None:
        """Be a head of which nothing is known yet."""
        self.churn_history: list[float] = []
        self.trials.start_over()
        self._reverted_at_check: int | None = None
        self._just_reverted = False
        self._now_an_mlp()

    def _now_an_mlp(self) -> None:
        self.frozen = False
        self.freeze_epoch: int | None = None
        self.freeze_reason: str | None = None
        self._settled = False
        #: What the freeze of a structure that has settled waits for, in words.
        self.waits_for: str | None = None
        self.solve.start_over()

    def now_frozen(self, epoch: int | None, reason: str) -> None:
        """Take note that the head is frozen."""
        self.frozen = True
        self.freeze_epoch = epoch
        self.freeze_reason = reason
        self._watch.close()

    def start(self, trainer: Any, slot: HeadSlot, state: Mapping[str, Any] | None) -> None:
        """Start to watch the head, from the snapshot of a checkpoint if there is one."""
        self.close()
        self._is_compared = False
        self.solve.start()
        if not self.frozen:
            self._watch.start(trainer, slot)
            if state is not None:
                self._watch.resume(slot, dict(state))

    def hold_still(self, slot: HeadSlot) -> bool:
        """Stop the gradients of what the freeze has stopped; tell whether there were any again."""
        moving = [p for p in frozen_parameters(slot.module) if p.requires_grad] if self.frozen else []
        for parameter in moving:
            parameter.requires_grad_(False)
            parameter.grad = None
        return bool(moving)

    def before_batch(self, trainer: Any, slot: HeadSlot, batch_idx: int) -> None:
        """Keep the inputs that the next check is made on."""
        if self._just_reverted:
            # A validation ends by giving all modules the modes back that they had when it began, with the head frozen.
            slot.module.train(slot.module.training)
            self._just_reverted = False
        if self.frozen and isinstance(slot.module, JoinedHead):
            # It is no part of the module, whose `train` reaches its layers past it.
            for module in layout_of(slot.module).frozen_modules():
                module.eval()
        if not self._is_compared:
            self._is_compared, self._hooks = True, compare_calls(slot)
        self._watch.before_batch(trainer, batch_idx)

    def after_batch(self, trainer: Any, slot: HeadSlot) -> bool:
        """Make the check that is due; tell whether there was one."""
        self._remove_hooks()
        churn = self._watch.after_batch(trainer, slot)
        if churn is not None:
            self.churn_history.append(churn)
        return churn is not None

    def note_settled(self, trainer: Any, settled: bool) -> None:
        """Take note of what the rule says of the last check."""
        finished_epochs = trainer.current_epoch + (1 if trainer.is_last_batch else 0)
        # After a revert, earlier checks still say how large churn can be, and no longer that it has settled.
        checks = len(self.churn_history) - (self._reverted_at_check or 0)
        enough = finished_epochs >= self.settings.min_epochs and checks >= self.settings.patience
        # An overridden `should_freeze` may go by what only one process knows.
        self._settled = trainer.strategy.reduce_boolean_decision(enough and settled)

    @property
    def is_asked(self) -> bool:
        """Whether the epoch of the freeze was given, and not taken back since."""
        return self.settings.freeze_at_epoch is not None and self._reverted_at_check is None

    def due_reason(self, epoch: int) -> str | None:
        """Say why the head is to train frozen in an epoch; ``None`` if it is not, or is frozen already."""
        if self.frozen:
            return None
        asked = self.settings.freeze_at_epoch
        if self.is_asked:
            assert asked is not None
            return f"asked to freeze at epoch {asked}" if epoch >= asked else None
        if not self._settled:
            return None
        return (
            f"churn {self.churn_history[-1]:.2%} is at most {self.settings.churn_tolerance:.0%} "
            f"and at most {self.settings.relative_tolerance:g} of the largest, {max(self.churn_history):.2%}"
        )

    def freeze(self, trainer: Any, slot: HeadSlot, epoch: int, reason: str) -> Frozen:
        """Freeze the head in the fit."""
        before = count_trainable(slot.pl_module)
        dropout = any(isinstance(module, _DropoutNd) and module.p > 0 for module in slot.module.modules())
        self._watch.close()
        freeze_in_fit(trainer, slot, paths=self.settings.paths, freeze_epoch=epoch)
        self.now_frozen(epoch, reason)
        trainable = (before, count_trainable(slot.pl_module))
        return Frozen(self.name, reason, trainer.global_step, epoch, self.settings.paths, trainable, dropout)

    def run_solve(self, trainer: Any, slot: HeadSlot, read: ReadBatch, kept: KeptEpoch | None = None) -> Solved:
        """Solve the frozen head, on what was kept of an epoch if it was."""
        return Solved(self.name, self.solve.run(trainer, slot, read, kept))

    def revert(
        self, trainer: Any, slot: HeadSlot, weights: Mapping[str, Tensor], optimizer_state: Mapping[str, dict[str, Any]]
    ) -> None:
        """Make the frozen head the MLP that it was before, and watch it anew.

        Args:
            trainer: the Trainer of the fit.
            slot: the place of the head.
            weights: state dict of the MLP to go back to.
            optimizer_state: what the optimizer remembered of its parameters, by their names.
        """
        self.unwind(trainer, slot, weights, optimizer_state)
        self._reverted_at_check = len(self.churn_history)
        self._just_reverted = True
        self._watch.start(trainer, slot)

    def unwind(
        self, trainer: Any, slot: HeadSlot, weights: Mapping[str, Tensor], optimizer_state: Mapping[str, dict[str, Any]]
    ) -> None:
        """Make the frozen head the MLP that it was before, because its solve failed or was tried."""
        unfreeze_in_fit(trainer, slot, weights, optimizer_state)
        self._now_an_mlp()

    def may_be_tried(self, trainer: Any) -> bool:
        """Tell whether a solve of a head that is to be solved may be tried at the end of this epoch."""
        return trainer.current_epoch + 1 >= self.settings.min_epochs and self.trials.is_due(trainer.global_step)

    @property
    def is_quiet(self) -> bool:
        """Whether churn was at most ``churn_tolerance`` at the last check, however large it was before."""
        return bool(self.churn_history) and self.churn_history[-1] <= self.settings.churn_tolerance

    def try_solve(
        self,
        trainer: Any,
        slot: HeadSlot,
        epoch: int,
        solve: Callable[[], Solved],
        weights: Mapping[str, Tensor],
        optimizer_state: Mapping[str, dict[str, Any]],
    ) -> tuple[object, ...]:
        """Freeze and solve the head, and leave it so if that is not worth putting off; else it is the MLP again.

        Args:
            trainer: the Trainer of the fit.
            slot: the place of the head.
            epoch: first epoch that would train frozen.
            solve: solves the frozen head.
            weights: state dict of the MLP.
            optimizer_state: what the optimizer remembers of its parameters, by their names.

        Returns:
            What is to be said of it.
        """
        frozen = self.freeze(trainer, slot, epoch, "a trial")
        solved = solve()
        reason = self.trials.why_settled(trainer.global_step, solved.report)
        if reason is not None:
            self.freeze_reason = reason
            return replace(frozen, reason=reason), solved
        self.unwind(trainer, slot, weights, optimizer_state)
        # The modes of what was frozen.
        slot.module.train(slot.module.training)
        self._watch.start(trainer, slot)
        return (f"Tried a solve of {self.name!r} at step {trainer.global_step}: {self.trials.describe()}.",)

    def metrics(self) -> dict[str, float]:
        """Return what is logged of the head at the end of an epoch."""
        churn = self.churn_history[-1] if self.churn_history else math.nan
        return {
            "churn": 0.0 if self.frozen else churn,
            "frozen": float(self.frozen),
            "freeze_epoch": float(-1 if self.freeze_epoch is None else self.freeze_epoch),
        }

    def describe_unfrozen(self) -> str:
        """Say that the fit ends with the head an MLP."""
        last = f"{self.churn_history[-1]:.2%}" if self.churn_history else "not measured"
        state = "settled only in the last epoch" if self._settled else "did not settle"
        if self.waits_for is not None:
            state = f"settled and was not frozen, because {self.waits_for}"
        return f"The structure of {self.name!r} {state} (last churn {last}): the head stays an MLP."

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def detach(self) -> None:
        """Stop watching, and keep what was seen."""
        self._remove_hooks()
        self._watch.detach()

    def close(self) -> None:
        """Stop watching."""
        self._remove_hooks()
        self._watch.close()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed fit needs; primitives and tensors only, so that ``weights_only`` loading reads it."""
        return {
            "frozen": self.frozen,
            "freeze_epoch": self.freeze_epoch,
            "freeze_reason": self.freeze_reason,
            "churn_history": list(self.churn_history),
            "settled": self._settled,
            "solved": self.solve.solved,
            "reverted_at_check": self._reverted_at_check,
            "trials": self.trials.state_dict(),
            **self._watch.state_dict(),
        }

    @staticmethod
    def check_state(state: object, name: str) -> None:
        """Check that a checkpoint holds the state of a head as ``state_dict`` returns it.

        Raises:
            MisconfigurationException: otherwise.
        """
        check_state(state, _STATE, f"the head at {name!r}")
        SolveTrials.check_state(state["trials"], name)  # type: ignore[index]
        history: list[Any] = state["churn_history"]  # type: ignore[index]
        kinds = {f"churn {number}": float for number in range(len(history))}
        check_state(dict(zip(kinds, history, strict=True)), kinds, f"the churn history of {name!r}")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the state of a checkpoint."""
        self.frozen = state["frozen"]
        self.freeze_epoch = state["freeze_epoch"]
        self.freeze_reason = state["freeze_reason"]
        self.churn_history = list(state["churn_history"])
        self._settled = state["settled"]
        self._reverted_at_check = state["reverted_at_check"]
        self.trials.load_state_dict(state["trials"])
        self.solve.solved = state["solved"]
