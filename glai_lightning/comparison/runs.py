"""One run of a comparison, and the file that keeps finished runs while a comparison is under way."""

import gc
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, seed_everything

from glai_lightning.comparison.variants import Fit
from glai_lightning.fitting.fit_record import (
    EpochRecord,
    FitRecord,
    Mode,
    Parameters,
    SolveRecord,
    seconds_per_step,
)
from glai_lightning.fitting.fit_recorder import FitRecorder
from glai_lightning.fitting.heads_in_module import find_head
from glai_lightning.fitting.misconfiguration import UserMisconfigurationError


@dataclass(frozen=True, kw_only=True)
class Run(FitRecord):
    """One fit of one variant; the fields of ``FitRecord`` and these.

    Args:
        variant: name of the variant.
        seed: its seed.
        test_score: test score of the best epoch's weights; ``None`` where there is no test data.
        head_parameters: numbers in the parameters of its head, fixed ones included.
    """

    variant: str
    seed: int
    test_score: float | None
    head_parameters: int = 0

    @property
    def best_val_score(self) -> float | None:
        """The best validation score; ``None`` without a finite one."""
        return None if self.best is None else self.best.val_score

    @property
    def best_epoch(self) -> int | None:
        """The epoch of the best validation score."""
        return None if self.best is None else self.best.epoch

    @property
    def best_seconds(self) -> float | None:
        """Wall-clock seconds until the best validation score."""
        return None if self.best is None else self.best.seconds

    @property
    def best_cpu_seconds(self) -> float | None:
        """CPU seconds until then."""
        return None if self.best is None else self.best.cpu_seconds

    @property
    def training_seconds(self) -> float:
        """Wall-clock seconds in the training batches alone."""
        return sum(epoch.training_seconds for epoch in self.epochs)

    @property
    def training_cpu_seconds(self) -> float:
        """CPU seconds in the training batches alone."""
        return sum(epoch.training_cpu_seconds for epoch in self.epochs)

    @property
    def evaluations(self) -> int:
        """How often a validation score was looked at, by the trainer and by the solver."""
        return len(self.scored) + (0 if self.solve is None else self.solve.evaluations)

    @property
    def step_cpu_seconds(self) -> float:
        """CPU seconds of a training step, by the median over epochs: those that trained frozen, where there are any."""
        step = seconds_per_step(self.phase(frozen=True)) or seconds_per_step(self.phase(frozen=False))
        return 0.0 if step is None else step.cpu

    def as_dict(self) -> dict[str, Any]:
        """Return the run as JSON holds it: its fields, and what follows from them."""
        return {**asdict(self), **{name: getattr(self, name) for name in _DERIVED}}

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> "Run":
        """Return the run that ``as_dict`` wrote."""
        fields = {name: value for name, value in entries.items() if name not in _DERIVED}
        fields["epochs"] = [EpochRecord(**epoch) for epoch in fields["epochs"]]
        fields["parameters"] = Parameters(**fields["parameters"])
        fields["solve"] = None if fields["solve"] is None else SolveRecord(**fields["solve"])
        return cls(**fields)


_DERIVED = tuple(name for name, value in vars(Run).items() if isinstance(value, property))


class Recorder(FitRecorder, Callback):
    """Records a fit of a comparison, and keeps its best weights.

    Args:
        score: name of the validation score.
        mode: whether the best score is the largest or the smallest.
        freeze: the callback that freezes the head, if there is one.
        on_validated: is told the number of finished epochs after each validation.
    """

    def __init__(
        self, score: str, mode: Mode, freeze: Any = None, on_validated: Callable[[int], object] | None = None
    ) -> None:
        super().__init__(score, mode, keeps_best=True)
        # The freeze rule goes by what a callback monitors, and the fit's own checkpoint has been taken out.
        self.monitor = score
        self.freeze = freeze
        self.on_validated = on_validated
        self.fit_record: FitRecord | None = None

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Note the score, and tell of it."""
        super().on_validation_end(trainer, pl_module)
        if self.on_validated is not None and trainer.state.fn == "fit":
            self.on_validated(trainer.current_epoch + 1)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Stop the clock."""
        self.fit_record = self.finish(trainer, pl_module)


def run_fit(fit: Fit, seed: int, test_score: str | None, on_validated: Callable[[int], object] | None = None) -> Run:
    """Run a fit and test the weights of its best epoch.

    Args:
        fit: what is fitted.
        seed: from which batches and dropout are drawn, whatever its variant has drawn for its head.
        test_score: name of the test score; ``None`` for no test.
        on_validated: is told the number of finished epochs after each validation.
    """
    head_parameters = sum(parameter.numel() for parameter in find_head(fit.module, fit.rules.head).parameters())
    recorder = Recorder(fit.rules.score, fit.rules.mode, fit.freeze, on_validated)
    fit.trainer.callbacks.insert(0, recorder)
    # What is left of the run before is collected now, and not on this run's clock.
    gc.collect()
    seed_everything(seed, workers=True, verbose=False)
    fit.trainer.fit(fit.module, datamodule=fit.data)
    record = recorder.fit_record
    assert record is not None
    tested = None
    if test_score is not None:
        if recorder.best_weights is not None:
            fit.module.load_state_dict(recorder.best_weights)
        fit.trainer.test(fit.module, datamodule=fit.data, verbose=False)
        tested = float(fit.trainer.callback_metrics[test_score])
    return Run(**vars(record), variant=fit.variant.name, seed=seed, test_score=tested, head_parameters=head_parameters)


class RunsFile:
    """Finished runs, a line each, after a first line that says what they are runs of.

    A run is appended as soon as it is finished, so that an interrupted comparison continues after it.

    Args:
        path: the file; made with its folder if it is not there.
        configuration: what was run and where, in what JSON can hold.

    Raises:
        MisconfigurationException: if the file holds runs of another configuration, or is not such a file, or cannot be
            written.
    """

    def __init__(self, path: Path, configuration: Mapping[str, Any]) -> None:
        self.path = path
        self.runs: dict[tuple[str, int], Run] = {}
        first_line = json.dumps(configuration, allow_nan=False) + "\n"
        with named_file(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            text = path.read_bytes() if path.exists() else b""
        # A line without its end was being written when the comparison was interrupted.
        if not first_line.encode().startswith(text) or text == first_line.encode():
            # As it was read back: tuples are lists then, and keys are strings.
            self._read(text, json.loads(first_line))
            return
        with named_file(path):
            path.write_text("")
        self._append(first_line)

    def append(self, run: Run) -> None:
        """Add a finished run, on disk when this returns."""
        self._append(json.dumps(run.as_dict(), allow_nan=False) + "\n")
        self.runs[run.variant, run.seed] = run

    def _append(self, line: str) -> None:
        with named_file(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def _read(self, text: bytes, expected: Any) -> None:
        whole = text[: text.rfind(b"\n") + 1]
        try:
            configuration, *runs = [json.loads(line) for line in whole.splitlines()]
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
            with named_file(self.path):
                os.truncate(self.path, len(whole))
        self.runs = {(run.variant, run.seed): run for run in found}


@contextmanager
def named_file(path: Path) -> Iterator[None]:
    """Context in which a file that cannot be written is an error that names it."""
    try:
        yield
    except OSError as error:
        raise UserMisconfigurationError(
            f"Expected '{path}' to be a file that can be read and written, but got: {error.strerror or error}. "
            "Runs that were finished before are kept."
        ) from error


def _differences(one: Any, other: Any, name: str) -> Iterator[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted({*one, *other}):
            yield from _differences(one.get(key), other.get(key), f"{name}.{key}" if name else key)
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for position, (before, after) in enumerate(zip(one, other, strict=True)):
            yield from _differences(before, after, f"{name}[{position}]")
    elif one != other:
        yield f"`{name}`"
