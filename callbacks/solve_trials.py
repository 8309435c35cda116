"""Solving a head on the way, to see whether its structure still gains."""

from typing import Any

from glai_lightning.callbacks.callback_state import check_state
from glai_lightning.solvers import SolveReport

#: A solved head is far ahead of the MLP by this much accuracy, or part of the squared error; a trial then gains little
#: if it gains at most this part of that.
_FAR_AHEAD, _PART_OF_LEAD = 0.05, 0.05
#: What the last trial must gain for training to go on: accuracy, or a part of the squared error; and the part of its
#: rise since the trial before by which the MLP must be behind.
_LEAST_ACCURACY, _LEAST_PART_OF_ERROR, _PACE = 0.006, 0.02, 0.6
#: The most trials: a structure that still gains by the last one gains for long, as does one that gains this much, in
#: accuracy or as a part of the squared error, from one to the next.
_MOST_TRIALS, _MUCH_ACCURACY, _MUCH_PART_OF_ERROR = 3, 0.015, 0.05

_STATE = {"step": int, "count": int, "score": float | None, "start_score": float | None}


class SolveTrials:
    """Solves of one head as its structure is trained, each after twice as many optimizer steps as the one before.

    Churn says that patterns have come to rest, and not what they are worth: where it is small from the start, a
    structure may gain for long. A trial solves the head as it is. The structure is worth no more training if the solved
    head is far ahead of the MLP and gained little of that lead since the trial before; at the last trial also if it
    validates hardly better than at the one before, and the MLP is behind by more than it rose, at a slower pace.
    """

    def __init__(self) -> None:
        self.start_over()

    def start_over(self) -> None:
        """Forget the trials that were."""
        self._step = self._count = 0
        self._score: float | None = None
        self._start_score: float | None = None

    def is_due(self, step: int) -> bool:
        """Tell whether a trial is to be made after so many optimizer steps."""
        return step >= 2 * self._step and self._count < _MOST_TRIALS

    def why_settled(self, step: int, report: SolveReport) -> str | None:
        """Take note of a trial, and say why training the structure further is not worth it; ``None`` if it may be.

        Args:
            step: optimizer steps by then.
            report: what the solve did.
        """
        before, start_before, before_step = self._score, self._start_score, self._step
        self._step, self._count = step, self._count + 1
        score, start = self._score, self._start_score = report.score, report.start_score
        if score is None or start is None:
            return None
        is_accuracy = report.method != "closed_form"
        if is_accuracy and 1.0 - score <= _LEAST_ACCURACY:
            return f"solved as it is, it validates at {score:.4f}"
        if before is None or start_before is None:
            return None
        gain, lead, rise = score - before, score - start, start - start_before
        far_ahead = lead >= _FAR_AHEAD * (1.0 if is_accuracy else -start) and gain <= _PART_OF_LEAD * lead
        least, much = (_LEAST_ACCURACY, _MUCH_ACCURACY)
        if not is_accuracy:
            least, much = _LEAST_PART_OF_ERROR * -before, _MUCH_PART_OF_ERROR * -before
        stands_still = self._count == _MOST_TRIALS and gain <= least and lead > _PACE * rise
        if not far_ahead and not stands_still:
            if gain > much:
                self._count = _MOST_TRIALS
            return None
        return f"solved as it is, it validates at {score:.4f}, after {before:.4f} at step {before_step}"

    def describe(self) -> str:
        """Say that training goes on after a trial."""
        return f"validates at {self._score:.4f}" if self._score is not None else "cannot be validated"

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed fit needs, in primitives."""
        return {"step": self._step, "count": self._count, "score": self._score, "start_score": self._start_score}

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
        self._score, self._start_score = state["score"], state["start_score"]
