"""Judging a freeze by a validation score, and keeping what it takes to undo it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from glai_lightning.callbacks.callback_state import COUNT, MAPPING, NUMBER, NUMBERS, check_entries, or_none
from glai_lightning.fitting.conversion import thaw_head_in_fit
from glai_lightning.fitting.misconfiguration import UserMisconfigurationError
from glai_lightning.heads.optimizers import copy_state

if TYPE_CHECKING:
    from glai_lightning.callbacks.structure_freeze import StructureFreezeCallback


_STATE = {"reverts": COUNT, "score": or_none(NUMBER), "validations_to_wait": COUNT, "trial": or_none(MAPPING)}
_TRIAL = {
    "step": COUNT,
    "reference": or_none(NUMBER),
    "scores": NUMBERS,
    "lost_at": or_none(COUNT),
    "weights": MAPPING,
    "optimizer_state": MAPPING,
}


def check_guard_state(state: Any, head_name: str) -> None:
    """Check that a checkpoint holds the state of a guard as ``RevertGuard.state_dict`` returns it.

    Raises:
        MisconfigurationException: otherwise.
    """
    check_entries(state, _STATE, f"the guard of the head at {head_name!r}")
    if state["trial"] is None:
        return
    check_entries(state["trial"], _TRIAL, f"the freeze of the head at {head_name!r} that is judged")
    held = [state["trial"]["weights"], *state["trial"]["optimizer_state"].values()]
    if not all(isinstance(entries, Mapping) for entries in held) or not all(
        isinstance(weight, Tensor) for weight in held[0].values()
    ):
        raise UserMisconfigurationError(
            f"Expected the checkpoint to hold the MLP of the head at {head_name!r} and its optimizer state as tensors "
            "by name, but got something else."
        )


def monitored_score(trainer: Any, monitor: str) -> float:
    """Return a metric of the validation that just ended, averaged over all processes so that these decide alike.

    Raises:
        MisconfigurationException: if the validation did not log it.
    """
    score = trainer.callback_metrics.get(monitor)
    # All processes stop where one lacks it, for the others would wait for it for ever.
    if trainer.strategy.reduce_boolean_decision(score is None, all=False):
        raise UserMisconfigurationError(
            f"Expected `monitor` to name a metric that the validation logs, but got {monitor!r}. "
            f"Logged are: {sorted(trainer.callback_metrics) or 'none'}."
        )
    mean = trainer.strategy.reduce(
        torch.as_tensor(score, dtype=torch.float64, device=trainer.strategy.root_device), reduce_op="mean"
    )
    return float(mean)


@dataclass
class Trial:
    """A freeze that was not proven yet, and what it takes to undo it.

    Args:
        step: optimizer steps at the freeze.
        reference: score of the last validation before the freeze; ``None`` if there was none.
        weights: state dict of the MLP at the freeze.
        optimizer_state: what the optimizer remembered of its parameters, by their names.
        scores: scores of the validations since, all of them worse.
        lost_at: optimizer steps when the last chance was missed; ``None`` before.
    """

    step: int
    reference: float | None
    weights: dict[str, Tensor]
    optimizer_state: dict[str, dict[str, Any]]
    scores: list[float] = field(default_factory=list)
    lost_at: int | None = None


class RevertGuard:
    """Takes a head back to the MLP of its freeze, if it validates worse than then.

    Args:
        head_name: qualified name of the head.
        callback: whose ``monitor``, ``mode``, ``revert_tolerance`` and ``revert_patience`` count.

    Attributes:
        reverts: how often the head went back in this fit.
        trial: the freeze that is judged now, if one is.
    """

    def __init__(self, head_name: str, callback: "StructureFreezeCallback") -> None:
        self.head_name = head_name
        self.callback = callback
        self.start_over()

    def start_over(self) -> None:
        """Know nothing, as at the start of a fit."""
        self.reverts = 0
        self.trial: Trial | None = None
        self._score: float | None = None
        self._validations_to_wait = 0

    @property
    def allows_freeze(self) -> bool:
        """Whether the head has trained for long enough since it went back last."""
        return self._validations_to_wait == 0

    @property
    def lost(self) -> bool:
        """Whether the head is to go back."""
        return self.trial is not None and self.trial.lost_at is not None

    def lost_before(self, step: int) -> bool:
        """Tell whether the head is to go back, and the optimizer has made a step since that was decided."""
        return self.trial is not None and self.trial.lost_at is not None and self.trial.lost_at < step

    def begin(self, trainer: Any, mlp: nn.Module) -> None:
        """Keep the MLP and its optimizer state, right before it is frozen."""
        if self.callback.monitor is not None:
            self.trial = Trial(
                step=trainer.global_step,
                reference=self._score,
                weights={name: value.detach().clone() for name, value in mlp.state_dict().items()},
                optimizer_state=copy_state(trainer.optimizers[0], mlp),
            )

    def judge(self, trainer: Any, score: float, *, solved: bool) -> None:
        """Take note of a validation score, and judge the freeze by it."""
        self._score = score
        trial = self.trial
        if trial is None:
            self._validations_to_wait = max(0, self._validations_to_wait - 1)
        elif trainer.global_step == trial.step and not solved:
            # Nothing was trained since the freeze, which changes no output: this is the score at the freeze itself.
            trial.reference = score
        elif trial.lost_at is None:
            self._count(trainer, trial, score)

    def _count(self, trainer: Any, trial: Trial, score: float) -> None:
        if not self._is_worse(score, trial.reference):
            self.trial = None
            return
        trial.scores.append(score)
        if len(trial.scores) >= self.callback.revert_patience:
            trial.lost_at = trainer.global_step

    def _is_worse(self, score: float, reference: float | None) -> bool:
        # What cannot be shown to be as good counts as worse.
        if math.isnan(score) or reference is None:
            return True
        gain = score - reference if self.callback.mode == "max" else reference - score
        return gain < -self.callback.revert_tolerance

    def revert(self, trainer: Any, pl_module: nn.Module) -> None:
        """Put the MLP of the freeze back in its place, with its optimizer state."""
        assert self.trial is not None
        thaw_head_in_fit(trainer, pl_module, self.head_name, self.trial.weights, self.trial.optimizer_state)
        # Twice as long after every time: only so many freezes that are of no use fit into a fit.
        self._validations_to_wait = self.callback.revert_patience * 2**self.reverts
        self.reverts += 1
        self.callback.say(
            f"Took the head at {self.head_name!r} back to the MLP of the freeze at step {trainer.global_step}, epoch "
            f"{trainer.current_epoch}: {self.describe()}. It may freeze again after {self._validations_to_wait} "
            f"validations."
        )
        self.trial = None

    def describe(self) -> str:
        """Say how the freeze that is judged did so far."""
        assert self.trial is not None
        scores = ", ".join(f"{score:.4g}" for score in self.trial.scores) or "not measured"
        before = self.trial.reference
        return f"`{self.callback.monitor}` is {scores} since it was frozen, and was " + (
            "not measured before" if before is None else f"{before:.4g} before"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return all of it, in primitives and tensors; the MLP and its optimizer state while a freeze is judged."""
        return {
            "reverts": self.reverts,
            "score": self._score,
            "validations_to_wait": self._validations_to_wait,
            "trial": None if self.trial is None else {**vars(self.trial), "scores": list(self.trial.scores)},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where the guard of a checkpoint stood."""
        self.reverts = state["reverts"]
        self._score = state["score"]
        self._validations_to_wait = state["validations_to_wait"]
        trial = state["trial"]
        self.trial = None if trial is None else Trial(**{name: trial[name] for name in _TRIAL})
        if self.trial is not None:
            self.trial.scores = list(self.trial.scores)
