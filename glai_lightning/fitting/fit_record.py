"""What a fit was like from validation to validation, and what it took: plain data for tables and plots."""

import os
import time
from dataclasses import dataclass, field
from statistics import median
from typing import Literal

Mode = Literal["min", "max"]


@dataclass(frozen=True)
class Seconds:
    """A reading of two clocks, or the time between two readings: wall-clock and CPU seconds."""

    wall: float = 0.0
    cpu: float = 0.0

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(self.wall + other.wall, self.cpu + other.cpu)

    def __sub__(self, other: "Seconds") -> "Seconds":
        return Seconds(self.wall - other.wall, self.cpu - other.cpu)

    @classmethod
    def now(cls) -> "Seconds":
        """Read the clocks; CPU seconds are those of this process and of its workers that have ended."""
        times = os.times()
        return cls(time.perf_counter(), time.process_time() + times.children_user + times.children_system)


@dataclass
class EpochRecord:
    """A validation and the training before it, or an epoch without a validation.

    Args:
        epoch: number of the epoch, from 0.
        seconds: wall-clock seconds since the fit began, everything included.
        cpu_seconds: CPU seconds of the process since then, all threads together.
        train_loss: mean of the losses that ``training_step`` returned; ``None`` where it returned none.
        val_score: validation score; ``None`` where there was no validation, or the score was not finite.
        churn: fraction of pattern bits that flipped, in [0, 1]; of several heads the largest; ``None`` where there was
            no check.
        frozen: whether the structure was frozen at the end.
        trained_frozen: whether it was frozen at the first step.
        steps: training batches.
        training_seconds: wall-clock seconds in the training batches alone.
        training_cpu_seconds: CPU seconds in them.
        trainable_parameters: numbers that require gradients, at the end.
        optimizer_state_bytes: bytes of the tensors that the optimizers keep, at the end.
    """

    epoch: int
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    train_loss: float | None = None
    val_score: float | None = None
    churn: float | None = None
    frozen: bool = False
    trained_frozen: bool = False
    steps: int = 0
    training_seconds: float = 0.0
    training_cpu_seconds: float = 0.0
    trainable_parameters: int = 0
    optimizer_state_bytes: int = 0


@dataclass(frozen=True)
class SolveRecord:
    """A solve in a fit.

    Args:
        seconds: wall-clock seconds of the solve; of several heads of all solves.
        collecting_seconds: wall-clock seconds of the last check, the conversion and the reading of the head's inputs.
        passes: how many times the solver read the training data.
        evaluations: how often the solver looked at a validation score.
        start_score: validation score before the solve, as the solver measures it; ``None`` without validation.
        score: the same after it.
    """

    seconds: float
    collecting_seconds: float
    passes: int
    evaluations: int
    start_score: float | None
    score: float | None


@dataclass(frozen=True)
class OnePassRecord:
    """A fit that read its training data once.

    Args:
        samples: training samples that went through the backbone.
        passes: over the kept inputs of the heads, after the epoch that kept them.
        backbone_seconds: wall-clock seconds of the training batches of that epoch.
        head_seconds: wall-clock seconds of the passes, the freeze and the solve, for which the backbone also reads the
            validation data.
    """

    samples: int
    passes: int
    backbone_seconds: float
    head_seconds: float

    def __str__(self) -> str:
        return (
            f"One pass: {self.samples:,} training samples went through the backbone in {self.backbone_seconds:.2f} s; "
            f"{self.passes} passes over the kept inputs of the head, its freeze and its solve took "
            f"{self.head_seconds:.2f} s."
        )


@dataclass(frozen=True)
class Parameters:
    """Sizes of a module at the end of its fit.

    Args:
        total: numbers in its parameters.
        trainable: those that require gradients.
        optimizer_state_bytes: bytes of the tensors that the optimizers keep.
    """

    total: int = 0
    trainable: int = 0
    optimizer_state_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class FitRecord:
    """A whole fit.

    Seconds are those of the whole fit, with validation, checks, conversion, collection and solve, without data
    preparation and what the recorder itself does. CPU seconds are those of the process, all threads together, and of
    its worker processes once they have ended.

    Args:
        epochs: its validations, and epochs without one, in order.
        mode: whether the best score is the largest ('max') or the smallest ('min').
        score_name: name under which the validation score was logged, if there is one.
        frozen: whether the structure is frozen at the end.
        freeze_epoch: first epoch (0-based) that trains frozen; ``None`` if there is none, or it is not known.
        freeze_step: optimizer steps before the freeze; ``None`` likewise.
        freeze_reason: why the structure was frozen, in a sentence.
        churn_tolerance: largest churn that counts as settled; ``None`` for a fit that never freezes.
        relative_tolerance: largest churn that counts as settled, as a fraction of the largest so far; likewise.
        max_epochs: how many epochs the fit was to have at most; ``None`` where that is not said.
        mlp_parameters: numbers that required gradients before the first step, where the structure was not frozen yet.
        solve: the solve, if there was one.
        one_pass: what it took to read the training data once, where the fit did that.
        finished_seconds: wall-clock seconds until the end of the fit.
        finished_cpu_seconds: CPU seconds until then.
        bookkeeping_cpu_seconds: what the recorder did meanwhile, which no other figure counts.
        parameters: sizes at the end.
        peak_memory_bytes: the most memory that was resident in the process by the end of the fit, or allocated on the
            GPU during it; ``None`` where the system does not tell.
        tested: which weights were tested.
        test_scores: scores on the test split, by name.
    """

    epochs: list[EpochRecord]
    mode: Mode = "max"
    score_name: str | None = None
    frozen: bool = False
    freeze_epoch: int | None = None
    freeze_step: int | None = None
    freeze_reason: str | None = None
    churn_tolerance: float | None = None
    relative_tolerance: float | None = None
    max_epochs: int | None = None
    mlp_parameters: int | None = None
    solve: SolveRecord | None = None
    one_pass: OnePassRecord | None = None
    finished_seconds: float = 0.0
    finished_cpu_seconds: float = 0.0
    bookkeeping_cpu_seconds: float = 0.0
    parameters: Parameters = field(default_factory=Parameters)
    peak_memory_bytes: int | None = None
    tested: str | None = None
    test_scores: dict[str, float] = field(default_factory=dict)

    def phase(self, *, frozen: bool) -> list[EpochRecord]:
        """Return what was trained after the freeze, or before it."""
        return [epoch for epoch in self.epochs if epoch.trained_frozen == frozen and epoch.steps]

    @property
    def num_epochs(self) -> int:
        """How many epochs were begun."""
        return len({epoch.epoch for epoch in self.epochs})

    @property
    def scored(self) -> list[EpochRecord]:
        """The validations that have a score."""
        return [epoch for epoch in self.epochs if epoch.val_score is not None]

    @property
    def best(self) -> EpochRecord | None:
        """The validation with the best score, the first of several; ``None`` without a score."""
        choose = max if self.mode == "max" else min
        return choose(self.scored, key=lambda epoch: epoch.val_score or 0.0, default=None)


def seconds_per_step(epochs: list[EpochRecord]) -> Seconds | None:
    """Return the median over epochs of the mean seconds of a training step; ``None`` without epochs.

    Steps are not timed one by one, because an accelerator would have to stop after each of them.

    Example:
        >>> timed = [EpochRecord(n, steps=10, training_seconds=s) for n, s in enumerate((9.0, 2.0, 3.0))]
        >>> seconds_per_step(timed).wall
        0.3
    """
    if not epochs:
        return None
    return Seconds(
        median(epoch.training_seconds / epoch.steps for epoch in epochs),
        median(epoch.training_cpu_seconds / epoch.steps for epoch in epochs),
    )
