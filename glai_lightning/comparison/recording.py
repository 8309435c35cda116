"""The callback that times a fit, follows its scores and keeps its best weights."""

import copy
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import Callback
from torch import Tensor

from glai_lightning.callbacks.structure_freeze import StructureFreezeCallback
from glai_lightning.comparison.energy import EnergyMeter, NoMeter
from glai_lightning.comparison.memory import peak_memory_bytes, watch_peak_memory
from glai_lightning.comparison.runs import Epoch, Parameters, Run
from glai_lightning.fitting.sizes import count_bytes, count_trainable

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


class RunRecorder(Callback):
    """Times a fit, and keeps what a comparison wants to know of it.

    To be the first in the list of callbacks, so that it counts what the others do. The clock starts behind the set-up
    of the data module. While the recorder itself works at a validation (notes, a copy of the best weights) it stands
    still.

    Args:
        score: name of the validation score.
        mode: whether the best score is the largest or the smallest.
        freeze: the callback that freezes the head, if there is one.
        meter: measures the energy of the fit.
        on_validated: is told the number of finished epochs after each validation.
    """

    def __init__(
        self,
        score: str,
        mode: Mode,
        freeze: StructureFreezeCallback | None = None,
        meter: EnergyMeter | None = None,
        on_validated: Callable[[int], object] | None = None,
    ) -> None:
        super().__init__()
        self.score = score
        self.mode = mode
        self.freeze = freeze
        self.meter = meter or NoMeter()
        self.on_validated = on_validated
        self.best_weights: dict[str, Any] | None = None
        self._epochs: list[Epoch] = []
        self._best: Epoch | None = None
        self._bookkeeping = self._training = Seconds()
        self._batches_started: Seconds | None = None
        self._trains_frozen = False
        self._steps = 0
        self._epoch_cpu_seconds = 0.0
        self._step_seconds: list[tuple[bool, float]] = []
        self._loss: Tensor | None = None
        self._losses = 0
        self._checks = 0

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Start the clock."""
        if stage == "fit":
            watch_peak_memory(pl_module.device)
            self.meter.start()
            self._started = Seconds.now()

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin an epoch."""
        self._losses = self._steps = 0
        self._epoch_cpu_seconds = 0.0
        self._checks = self._num_checks()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Start the clock of the training batches, at the start of an epoch or behind a validation inside it."""
        if self._batches_started is None:
            self._trains_frozen = self._is_frozen()
            self._batches_started = _now(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note the loss; behind the last batch, stop the clock before other callbacks check, convert and solve."""
        self._steps += 1
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            loss = loss.detach()
            self._loss = loss.clone() if self._losses == 0 or self._loss is None else self._loss.add_(loss)
            self._losses += 1
        if trainer.is_last_batch:
            self._stop_clock_of_batches(pl_module)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Stop the clock of the training batches, where a validation is inside the epoch."""
        self._stop_clock_of_batches(pl_module)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Note the score, and keep the weights if they are the best."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        with self._clock_standing_still(pl_module):
            epoch = self._note(trainer, pl_module, trainer.callback_metrics.get(self.score))
            if self._is_best(epoch):
                self._best = epoch
                # With the metadata, in which a frozen head says that it is one.
                self.best_weights = copy.deepcopy(pl_module.state_dict())
            if self.on_validated is not None:
                self.on_validated(trainer.current_epoch + 1)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Note an epoch that was not validated."""
        with self._clock_standing_still(pl_module):
            self._stop_clock_of_batches(pl_module)
            if not self._epochs or self._epochs[-1].epoch < trainer.current_epoch:
                self._note(trainer, pl_module, None)
            if self._steps:
                self._step_seconds.append((self._trains_frozen, self._epoch_cpu_seconds / self._steps))

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Stop the clock."""
        self._finished = self._since_start(pl_module)
        self._energy = self.meter.stop()
        self._peak_memory = peak_memory_bytes(pl_module.device)
        self._parameters = Parameters(
            total=sum(parameter.numel() for parameter in pl_module.parameters()),
            trainable=count_trainable(pl_module),
            optimizer_state_bytes=sum(count_bytes(dict(optimizer.state)) for optimizer in trainer.optimizers),
        )

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Let go of the meter."""
        self.meter.stop()

    def run(self, variant: str, seed: int, test_score: float | None) -> Run:
        """Sum up the fit, which must have ended."""
        solved = self.freeze.solve_report if self.freeze is not None else None
        validations = sum(epoch.val_score is not None for epoch in self._epochs)
        looks = 0
        if solved is not None and solved.score is not None:
            # Before the first step, and after each: of minibatch steps after each pass.
            by_pass = getattr(self.freeze.solver if self.freeze else None, "method", None) == "minibatch"
            looks = 1 + (solved.passes if by_pass else solved.steps)
        steps = [seconds for _, seconds in self._step_seconds]
        frozen_steps = [seconds for frozen, seconds in self._step_seconds if frozen]
        best = self._best
        return Run(
            variant=variant,
            seed=seed,
            epochs=self._epochs,
            finished_seconds=self._finished.wall,
            finished_cpu_seconds=self._finished.cpu,
            best_seconds=None if best is None else best.seconds,
            best_cpu_seconds=None if best is None else best.cpu_seconds,
            training_seconds=self._training.wall,
            training_cpu_seconds=self._training.cpu,
            best_val_score=None if best is None else best.val_score,
            best_epoch=None if best is None else best.epoch,
            test_score=test_score,
            evaluations=validations + looks,
            freeze_epoch=None if self.freeze is None else self.freeze.freeze_epoch,
            parameters=self._parameters,
            step_cpu_seconds=statistics.median(frozen_steps or steps or [0.0]),
            peak_memory_bytes=self._peak_memory,
            bookkeeping_cpu_seconds=self._bookkeeping.cpu,
            energy_watt_hours=self._energy,
        )

    def _since_start(self, pl_module: Any) -> Seconds:
        return _now(pl_module) - self._started - self._bookkeeping

    @contextmanager
    def _clock_standing_still(self, pl_module: Any) -> Iterator[None]:
        started = _now(pl_module)
        yield
        self._bookkeeping += _now(pl_module) - started

    def _stop_clock_of_batches(self, pl_module: Any) -> None:
        if self._batches_started is not None:
            spent = _now(pl_module) - self._batches_started
            self._batches_started = None
            self._training += spent
            self._epoch_cpu_seconds += spent.cpu

    def _note(self, trainer: Any, pl_module: Any, score: Tensor | None) -> Epoch:
        seconds = self._since_start(pl_module)
        loss = None
        if self._losses and self._loss is not None:
            # Lightning hands out the loss divided by the number of batches whose gradients are accumulated.
            loss = float(self._loss) * trainer.accumulate_grad_batches / self._losses
        churn = None
        if self.freeze is not None and self._num_checks() > self._checks:
            churn = self.freeze.churn_history[-1]
        epoch = Epoch(
            trainer.current_epoch,
            seconds.wall,
            seconds.cpu,
            _finite(loss),
            _finite(None if score is None else float(score)),
            _finite(churn),
            self._is_frozen(),
        )
        self._epochs.append(epoch)
        return epoch

    def _is_best(self, epoch: Epoch) -> bool:
        if epoch.val_score is None or self._best is None or self._best.val_score is None:
            return epoch.val_score is not None
        if self.mode == "max":
            return epoch.val_score > self._best.val_score
        return epoch.val_score < self._best.val_score

    def _is_frozen(self) -> bool:
        return self.freeze is not None and self.freeze.frozen

    def _num_checks(self) -> int:
        return 0 if self.freeze is None else len(self.freeze.churn_history)


def _now(pl_module: Any) -> Seconds:
    if pl_module.device.type == "cuda":
        torch.cuda.synchronize(pl_module.device)
    return Seconds.now()


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
