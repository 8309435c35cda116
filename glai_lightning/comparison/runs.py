"""What was measured in each run, and the file that keeps it while a comparison is under way."""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glai_lightning.fitting.misconfiguration import UserMisconfigurationError


@dataclass(frozen=True)
class Epoch:
    """A validation of a run, or an epoch without one.

    Args:
        epoch: number of the epoch, from 0.
        seconds: wall-clock seconds since the fit began.
        cpu_seconds: CPU seconds of the process since then, all threads together.
        train_loss: mean of the losses that ``training_step`` returned; ``None`` where it returned none.
        val_score: validation score; ``None`` for an epoch that was not validated.
        churn: fraction of pattern bits that flipped; ``None`` where it was not measured.
        frozen: whether the structure was frozen at the end of the epoch.
    """

    epoch: int
    seconds: float
    cpu_seconds: float
    train_loss: float | None
    val_score: float | None
    churn: float | None
    frozen: bool


@dataclass(frozen=True)
class Parameters:
    """Sizes of a module at the end of its fit.

    Args:
        total: numbers in its parameters.
        trainable: those that require gradients.
        optimizer_state_bytes: bytes of the tensors that the optimizers keep.
    """

    total: int
    trainable: int
    optimizer_state_bytes: int


@dataclass(frozen=True)
class Run:
    """One fit of one variant.

    Seconds are those of the whole fit, with validation, checks, conversion, collection and solve, and without data
    preparation and what the comparison itself does in between. CPU seconds are those of the process, all threads
    together, and of its worker processes once they have ended.

    Args:
        variant: name of the variant.
        seed: its seed.
        epochs: its validations, in order.
        finished_seconds: wall-clock seconds until the head was finished.
        finished_cpu_seconds: CPU seconds until then.
        best_seconds: wall-clock seconds until the best validation score; ``None`` without a finite score.
        best_cpu_seconds: CPU seconds until then.
        training_seconds: wall-clock seconds in the training batches alone.
        training_cpu_seconds: CPU seconds in them.
        best_val_score: the best validation score.
        best_epoch: the epoch that it was reached in.
        test_score: test score of the best epoch's weights; ``None`` where there is no test data.
        evaluations: how often a validation score was looked at, by the trainer and by the solver.
        freeze_epoch: first epoch that trained frozen; ``None`` for a head that stayed an MLP.
        parameters: sizes at the end of the fit.
        step_cpu_seconds: CPU seconds of a training step: the median over epochs of their means, over the epochs that
            trained frozen where there are any.
        peak_memory_bytes: the most memory resident in the process during the fit, or allocated on the GPU where it ran
            there; ``None`` where the system does not tell.
        bookkeeping_cpu_seconds: what the comparison itself did during the fit, which no other figure counts.
        energy_watt_hours: of the machine during the fit, as codecarbon estimates it; ``None`` without codecarbon.
    """

    variant: str
    seed: int
    epochs: list[Epoch]
    finished_seconds: float
    finished_cpu_seconds: float
    best_seconds: float | None
    best_cpu_seconds: float | None
    training_seconds: float
    training_cpu_seconds: float
    best_val_score: float | None
    best_epoch: int | None
    test_score: float | None
    evaluations: int
    freeze_epoch: int | None
    parameters: Parameters
    step_cpu_seconds: float
    peak_memory_bytes: int | None
    bookkeeping_cpu_seconds: float
    energy_watt_hours: float | None = None

    @property
    def frozen(self) -> bool:
        """Whether the head was frozen at the end."""
        return bool(self.epochs) and self.epochs[-1].frozen

    def as_dict(self) -> dict[str, Any]:
        """Return the run as JSON holds it; energy is absent where it was not measured."""
        entries = dataclasses.asdict(self)
        if self.energy_watt_hours is None:
            del entries["energy_watt_hours"]
        return entries

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> "Run":
        """Return the run that ``as_dict`` wrote."""
        epochs = [Epoch(**epoch) for epoch in entries["epochs"]]
        return cls(**{**entries, "epochs": epochs, "parameters": Parameters(**entries["parameters"])})


class RunsFile:
    """Finished runs, a line each, behind a line that says what they are runs of.

    A run is appended as soon as it is finished, so that an interrupted comparison goes on behind it.

    Args:
        path: the file; made with its folder if it is not there.
        configuration: what was run and where, in what JSON can hold.

    Raises:
        MisconfigurationException: if the file holds runs of another configuration, or is not such a file.
    """

    def __init__(self, path: Path, configuration: Mapping[str, Any]) -> None:
        self.path = path
        self.runs: dict[tuple[str, int], Run] = {}
        # As it will be read back: tuples are lists then, and keys are strings.
        expected = json.loads(json.dumps(configuration, allow_nan=False))
        if not path.exists() or path.stat().st_size == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._append(expected)
            return
        self._read(expected)

    def append(self, run: Run) -> None:
        """Add a finished run, on disk when this returns."""
        self._append(run.as_dict())
        self.runs[run.variant, run.seed] = run

    def _append(self, entries: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entries, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _read(self, expected: Mapping[str, Any]) -> None:
        text = self.path.read_text(encoding="utf-8")
        # A line without its end was being written when the comparison was interrupted.
        whole = text[: text.rfind("\n") + 1]
        lines = whole.splitlines()
        try:
            configuration, *runs = [json.loads(line) for line in lines]
            found = [Run.from_dict(run) for run in runs]
        except (ValueError, TypeError, KeyError) as error:
            raise UserMisconfigurationError(
                f"Expected '{self.path}' to hold the runs of a comparison, but got something else: choose another "
                "folder, or delete the file."
            ) from error
        changed = list(_differences(configuration, expected, ""))
        if changed:
            raise UserMisconfigurationError(
                f"Expected the finished runs in '{self.path}' to be of this configuration, but they are of another, "
                f"which differs in {', '.join(changed)}: choose another folder, or delete the file."
            )
        if whole != text:
            os.truncate(self.path, len(whole.encode("utf-8")))
        self.runs = {(run.variant, run.seed): run for run in found}


def _differences(one: Any, other: Any, name: str) -> Iterator[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted({*one, *other}):
            yield from _differences(one.get(key), other.get(key), f"{name}.{key}" if name else key)
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for position, (before, after) in enumerate(zip(one, other, strict=True)):
            yield from _differences(before, after, f"{name}[{position}]")
    elif one != other:
        yield f"`{name}`"
