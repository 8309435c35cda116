"""What a fit was like, epoch by epoch: plain data for tables and plots."""

from dataclasses import dataclass, field
from statistics import median
from typing import Literal


@dataclass
class EpochRecord:
    """One epoch of training.

    Args:
        epoch: number of the epoch, from 0.
        seconds: wall-clock seconds of training; validation is not in them.
        steps: training batches.
        frozen: whether the epoch trained with frozen structure.
        churn: fraction of pattern bits that flipped, in [0, 1]; of several heads the largest; ``None`` where there was
            no check.
        score: validation score; ``None`` where there was no validation.
        trainable_parameters: numbers that require gradients, at the end of the epoch.
        optimizer_state_bytes: bytes of the tensors that the optimizers keep, at the end of the epoch.
    """

    epoch: int
    seconds: float = 0.0
    steps: int = 0
    frozen: bool = False
    churn: float | None = None
    score: float | None = None
    trainable_parameters: int = 0
    optimizer_state_bytes: int = 0


@dataclass(frozen=True)
class FitRecord:
    """A whole fit.

    Args:
        epochs: its epochs, in order.
        frozen: whether the structure is frozen at the end.
        freeze_epoch: first epoch (0-based) that trained frozen; ``None`` if there is none, or it is not known.
        freeze_reason: why the structure was frozen, in a sentence.
        churn_tolerance: largest churn that counts as settled.
        relative_tolerance: largest churn that counts as settled, as a fraction of the largest so far.
        score_name: name under which the validation score was logged, if there is one.
        mode: whether the best score is the largest ('max') or the smallest ('min').
        mlp_parameters: numbers that required gradients before the first step, where the structure was not frozen yet.
        tested: which weights were tested.
        test_scores: scores on the test split, by name.
    """

    epochs: list[EpochRecord]
    frozen: bool
    freeze_epoch: int | None
    freeze_reason: str | None
    churn_tolerance: float
    relative_tolerance: float
    score_name: str | None = None
    mode: Literal["min", "max"] = "max"
    mlp_parameters: int | None = None
    tested: str | None = None
    test_scores: dict[str, float] = field(default_factory=dict)

    def phase(self, *, frozen: bool) -> list[EpochRecord]:
        """Return the epochs after the freeze, or those before it."""
        return [epoch for epoch in self.epochs if epoch.frozen == frozen and epoch.steps]

    @property
    def scored(self) -> list[EpochRecord]:
        """The epochs that were validated."""
        return [epoch for epoch in self.epochs if epoch.score is not None]

    @property
    def best(self) -> EpochRecord | None:
        """The epoch with the best score, the first of several; ``None`` without a score."""
        choose = max if self.mode == "max" else min
        return choose(self.scored, key=lambda epoch: epoch.score or 0.0, default=None)


def seconds_per_step(epochs: list[EpochRecord]) -> float | None:
    """Return the median over epochs of the mean seconds of a training step; ``None`` without epochs.

    Steps are not timed one by one, for that would have to stop an accelerator after each of them.

    Example:
        >>> seconds_per_step([EpochRecord(0, 9.0, 10), EpochRecord(1, 2.0, 10), EpochRecord(2, 3.0, 10)])
        0.3
    """
    return median(epoch.seconds / epoch.steps for epoch in epochs) if epochs else None
