"""Telling whether a module has learned: a head whose loss has not begun to fall has quiet patterns too."""

import math
from typing import Any

import torch
from torch import Tensor

from glai_lightning.callbacks.callback_state import check_state

#: Training batches whose mean loss is where a fit started.
_FIRST_BATCHES = 10
#: What the training loss must have fallen by: a part of where it started, and standard errors of its recent mean.
_SMALLEST_FALL, _STANDARD_ERRORS = 0.05, 3.0
#: By what part of the largest score so far a validation must be better than the best to count as a rise, and how many
#: in a row that are not better end it.
_SMALLEST_RISE, _VALIDATIONS_WITHOUT_RISE = 0.005, 2
#: Validations in a row that are not better than the best, by however little: early stopping would end the fit by then.
_VALIDATIONS_WITHOUT_BEST = 3

_STATE = {
    "start": list,
    "recent": list,
    "last": list,
    "validated": bool,
    "best": int | float | None,
    "largest": int | float,
    "without_rise": int,
    "top": int | float | None,
    "without_best": int,
}


class LearningWatch:
    """Watches the training loss and the validation score of a fit.

    A structure may be frozen once the optimizer has made ``min_steps`` steps and the training loss lies clearly below
    where it started, and validation rises no more: a frozen head learns less. A head that is solved may be frozen
    before that, once solves of it that are tried on the way gain no more (``SolveTrials``).

    The validation score is the metric that the first callback with a ``monitor`` goes by, ModelCheckpoint or
    EarlyStopping for one. Without such a callback the training loss takes its place.

    Args:
        min_steps: optimizer steps before which nothing is frozen; at 0 nothing here keeps a freeze waiting.
    """

    def __init__(self, min_steps: int) -> None:
        self.min_steps = min_steps
        self.start_over()

    def start_over(self) -> None:
        """Begin a fit."""
        self._start = _Mean()
        self._recent = _Mean()
        self._last = _Mean()
        self._validated = False
        self._best: float | None = None
        self._largest = 0.0
        self._without_rise = 0
        self._top: float | None = None
        self._without_best = 0

    def after_batch(self, outputs: Any) -> None:
        """Take note of the loss of a training batch, as Lightning hands it to callbacks."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            if self._start.count < _FIRST_BATCHES:
                self._start.add(loss)
            self._recent.add(loss)

    def after_check(self) -> None:
        """Let the losses since the last check be what is judged, until the next one."""
        self._last, self._recent = self._recent, _Mean()

    def after_validation(self, trainer: Any) -> None:
        """Take note of the score of a validation, or of the training loss where there is none to go by."""
        self._validated = True
        self._note(trainer, *_monitored(trainer))

    def before_pass(self, trainer: Any, score: float | None) -> None:
        """Take note of a validation score before a pass over kept inputs; of the training loss where there is none."""
        self._note(trainer, score, "max")

    def after_epoch(self, trainer: Any) -> None:
        """Take note of the training loss of an epoch, in a fit without validation."""
        if not self._validated:
            self._note(trainer, None, "min")

    def _note(self, trainer: Any, score: float | None, mode: str) -> None:
        if score is None:
            score, mode = self._last.over_processes(trainer)[0], "min"
        if score is None or not math.isfinite(score):
            return
        sign = 1.0 if mode == "max" else -1.0
        better = math.inf if self._best is None else (score - self._best) * sign
        self._largest = max(self._largest, abs(score))
        is_best = self._top is None or (score - self._top) * sign > 0.0
        self._top, self._without_best = (score, 0) if is_best else (self._top, self._without_best + 1)
        if better > _SMALLEST_RISE * self._largest:
            self._best, self._without_rise = score, 0
        else:
            self._without_rise += 1

    def missing(self, trainer: Any, *, by_score: bool) -> str | None:
        """Say what a freeze still waits for, ``None`` for nothing; all processes must ask together.

        Args:
            trainer: the Trainer of the fit.
            by_score: whether it waits until validation rises no more.
        """
        if self.min_steps == 0:
            return None
        if by_score and self._without_rise < _VALIDATIONS_WITHOUT_RISE:
            return self.has_learned(trainer) or "validation still rises"
        return self.has_learned(trainer)

    def has_learned(self, trainer: Any) -> str | None:
        """Say what is missing for the module to have learned, ``None`` for nothing; all processes must ask together."""
        if trainer.global_step < self.min_steps:
            return f"the optimizer has made {trainer.global_step} of {self.min_steps} steps (`min_steps`)"
        start, _ = self._start.over_processes(trainer)
        recent, error = self._last.over_processes(trainer)
        if start is not None and recent is not None:
            fall = max(_SMALLEST_FALL * abs(start), _STANDARD_ERRORS * error)
            if not start - recent > fall:
                return f"the training loss, {recent:.4g}, is not clearly below where it started, {start:.4g}"
        return None

    def why_over(self, trainer: Any) -> str | None:
        """Say why a fit that has learned learns no more, whether or not patterns are at rest; ``None`` if it may."""
        is_last = trainer.max_epochs is not None and trainer.current_epoch + 1 == trainer.max_epochs
        stands_still = self._without_best >= _VALIDATIONS_WITHOUT_BEST
        if not (is_last or stands_still) or self.has_learned(trainer) is not None:
            return None
        if is_last:
            return "the fit ends with this epoch"
        return f"the last {self._without_best} validations were not better than the one before"

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed fit needs, in primitives."""
        return {
            "start": self._start.numbers(),
            "recent": self._recent.numbers(),
            "last": self._last.numbers(),
            "validated": self._validated,
            "best": self._best,
            "largest": self._largest,
            "without_rise": self._without_rise,
            "top": self._top,
            "without_best": self._without_best,
        }

    def load_state_dict(self, state: Any) -> None:
        """Go on from the state of a checkpoint.

        Raises:
            MisconfigurationException: if it is not such a state.
        """
        check_state(state, _STATE, "what the fit has learned")
        self._start, self._recent, self._last = (_Mean(state[name]) for name in ("start", "recent", "last"))
        self._validated = state["validated"]
        self._best, self._largest, self._without_rise = state["best"], state["largest"], state["without_rise"]
        self._top, self._without_best = state["top"], state["without_best"]


class _Mean:
    """A mean and its standard error, added up on the device, so that no batch waits for a number."""

    def __init__(self, numbers: list[float] | None = None) -> None:
        total, squares, count = numbers or [0.0, 0.0, 0]
        self._total: Any = total
        self._squares: Any = squares
        self.count = int(count)

    def add(self, value: Tensor) -> None:
        value = value.detach().double().mean()
        self._total = self._total + value
        self._squares = self._squares + value.square()
        self.count += 1

    def numbers(self) -> list[float]:
        return [float(self._total), float(self._squares), self.count]

    def over_processes(self, trainer: Any) -> tuple[float | None, float]:
        counted = torch.tensor(self.numbers(), dtype=torch.float64, device=trainer.strategy.root_device)
        total, squares, count = trainer.strategy.reduce(counted, reduce_op="sum").tolist()
        if not count:
            return None, 0.0
        mean = total / count
        return mean, math.sqrt(max(0.0, squares / count - mean * mean) / count)


def _monitored(trainer: Any) -> tuple[float | None, str]:
    for callback in trainer.callbacks:
        monitor, mode = getattr(callback, "monitor", None), getattr(callback, "mode", None)
        if not isinstance(monitor, str) or mode not in ("min", "max"):
            continue
        # Where one process lacks it, the others would wait for it for ever.
        if trainer.strategy.reduce_boolean_decision(monitor in trainer.callback_metrics):
            value = torch.as_tensor(
                trainer.callback_metrics[monitor], dtype=torch.float64, device=trainer.strategy.root_device
            )
            return float(trainer.strategy.reduce(value, reduce_op="mean")), mode
    return None, "max"
