"""Solving a head on the way, to see whether its structure still gains."""

from typing import Any

from glai_lightning.callbacks.callback_state import check_state
from glai_lightning.solvers import SolveReport

#: What a trial must gain for training to go on, as a part of its lead over the MLP.
_PART_OF_LEAD = 0.1
#: Errors, as a part of all, that are not worth training on for.
_FEW_ERRORS = 0.006
_MOST_TRIALS = 3

_STATE = {"step": int, "count": int, "score": float | None}


class SolveTrials:
    """Solves of one head as its structure is trained, each after twice as many optimizer steps as the one before.

    Churn says that patterns have come to rest, and not what they are worth: where it is small from the start, a
    structure may gain for long. A trial solves the head as it is. If that makes at most half of the MLP's errors, it is
    the numbers that are late and not the structure. The structure is worth no more training once the next trial gains
    little. If it makes more, there are no further trials.
    """

    def __init__(self) -> None:
        self.start_over()

    def start_over(self) -> None:
        """Forget the trials that were."""
        self._step = self._count = 0
        self._score: float | None = None

    def is_due(self, step: int) -> bool:
        """Tell whether a trial is to be made after so many optimizer steps."""
        return step >= 2 * self._step and self._count < _MOST_TRIALS

    def why_settled(self, step: int, report: SolveReport) -> str | None:
        """Take note of a trial, and say why training the structure further is not worth it; ``None`` if it may be.

        Args:
            step: optimizer steps by then.
            report: what the solve did.
        """
        before, before_step = self._score, self._step
        self._step, self._count, self._score = step, self._count + 1, report.score
        score, start = report.score, report.start_score
        if score is None or start is None:
            return None
        is_accuracy = report.method != "closed_form"
        errors, lead = (1.0 if is_accuracy else 0.0) - score, score - start
        if is_accuracy and errors <= _FEW_ERRORS:
            return f"solved as it is, it validates at {score:.4f}"
        if lead < errors:
            self._count = _MOST_TRIALS
        elif before is not None and score - before <= _PART_OF_LEAD * lead:
            return f"solved as it is, it validates at {score:.4f}, after {before:.4f} at step {before_step}"
        return None

    def describe(self) -> str:
        """Say that training goes on after a trial."""
        return f"validates at {self._score:.4f}" if self._score is not None else "cannot be validated"

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed fit needs, in primitives."""
        return {"step": self._step, "count": self._count, "score": self._score}

    @staticmethod
    def check_state(state: object, name: str) -> None:
        """Check that a checkpoint holds what ``state_dict`` returns.

        Raises:
            MisconfigurationException: otherwise.
        """
        check_state(state, _STATE, f"the trials of {name!r}")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the state of a checkpoint."""
        self._step, self._count = state["step"], state["count"]
        self._score = state["score"]
