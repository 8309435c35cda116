"""Recording a fit while it runs, for whatever callback wants to tell of it."""

import copy
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from glai_lightning.fitting.fit_record import EpochRecord, FitRecord, Mode, Parameters, Seconds, SolveRecord
from glai_lightning.fitting.sizes import count_bytes, count_trainable


class FitRecorder:
    """Hooks that record a fit: a mixin for a ``Callback``, which is to stand first in the list of callbacks.

    The clock starts after the set-up of the data module, and stands still while the recorder itself works at a
    validation.

    Args:
        score: name of the validation score, or ``None``.
        mode: whether the best score is the largest or the smallest.
        keeps_best: whether to keep a copy of the weights with the best score.

    Attributes:
        freeze: the ``StructureFreezeCallback`` of the fit; ``None`` for a fit that never freezes.
        best_weights: state dict of the best validation, or ``None``.
    """

    def __init__(self, score: str | None, mode: Mode, *, keeps_best: bool = False) -> None:
        super().__init__()
        self.score = score
        self.mode = mode
        self.freeze: Any = None
        self.best_weights: dict[str, Any] | None = None
        self._keeps_best = keeps_best
        self._epochs: list[EpochRecord] = []
        self._open: EpochRecord | None = None
        self._mlp_parameters: int | None = None
        self._step = 0
        self._freeze_step: int | None = None
        self._solve: SolveRecord | None = None
        self._restored: dict[str, Any] | None = None
        self._before_resume = self._started = self._bookkeeping = self._batch_ended = Seconds()
        self._batches_started: Seconds | None = None
        self._checks: dict[str, int] = {}
        self._loss: Tensor | None = None
        self._losses = 0

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Start the clock."""
        self._restored = None
        if stage == "fit":
            device = trainer.strategy.root_device
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            self._started, self._bookkeeping = Seconds.now(), Seconds()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin a record, or continue that of the fit that is resumed."""
        # A checkpoint's state is read for a mere test as well, which must not touch the record: hence only here.
        if self._restored is not None:
            self._epochs = [EpochRecord(**epoch) for epoch in self._restored["epochs"]]
            self._open = None if self._restored["open"] is None else EpochRecord(**self._restored["open"])
            self._mlp_parameters, self._freeze_step = self._restored["mlp_parameters"], self._restored["freeze_step"]
            self._solve = None if self._restored["solve"] is None else SolveRecord(**self._restored["solve"])
        else:
            self._epochs = [epoch for epoch in self._epochs if epoch.epoch < trainer.current_epoch]
            self._open = None
            self._solve = None
            if not self._epochs:
                self._mlp_parameters = self._freeze_step = None
        self._restored = self._batches_started = self.best_weights = None
        last = self._epochs[-1] if self._epochs else EpochRecord(0)
        self._before_resume = Seconds(last.seconds, last.cpu_seconds)
        self._checks = self._count_checks()
        self._losses = 0
        if self.freeze is None or not self.freeze.frozen:
            self._mlp_parameters = count_trainable(pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Start the clock of the training batches, where it stands."""
        self._step = trainer.global_step
        self._note_freeze()
        if self._note_solve(pl_module):
            self._stop_batches()
        if self._open is None:
            self._open = EpochRecord(trainer.current_epoch)
        if self._batches_started is None:
            self._batches_started = _now(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the batch and its loss, before other callbacks check, convert and solve."""
        self._note_freeze()
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            loss = loss.detach()
            self._loss = loss.clone() if self._losses == 0 or self._loss is None else self._loss.add_(loss)
            self._losses += 1
        if self._open is not None:
            if self._open.steps == 0:
                self._open.trained_frozen = self._is_frozen()
            self._open.steps += 1
        self._step = trainer.global_step
        self._batch_ended = _now(pl_module) if trainer.is_last_batch else Seconds.now()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Stop the clock of the training batches."""
        if _validates(trainer):
            self._leave_batches(pl_module)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Note the score, and keep the weights if they are the best. Checkpoints of this validation hold both."""
        if not _validates(trainer):
            return
        with self._clock_standing_still(pl_module):
            score = None if self.score is None else trainer.callback_metrics.get(self.score)
            epoch = self._close(trainer, pl_module, None if score is None else float(score))
            if self._keeps_best and self._record_of_scores().best is epoch:
                # With the metadata, in which a frozen head says that it is one.
                self.best_weights = copy.deepcopy(pl_module.state_dict())

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Note an epoch that was not validated."""
        with self._clock_standing_still(pl_module):
            self._leave_batches(pl_module)
            if self._open is not None:
                self._close(trainer, pl_module, None)

    def finish(self, trainer: Any, pl_module: Any) -> FitRecord:
        """Stop the clock, and return what the fit was like."""
        finished = self._since_start(pl_module)
        freeze = self.freeze
        return FitRecord(
            epochs=list(self._epochs),
            mode=self.mode,
            score_name=self.score,
            frozen=self._is_frozen(),
            freeze_epoch=None if freeze is None else freeze.freeze_epoch,
            freeze_step=self._freeze_step if self._is_frozen() else None,
            freeze_reason=None if freeze is None else freeze.freeze_reason,
            churn_tolerance=None if freeze is None else freeze.churn_tolerance,
            relative_tolerance=None if freeze is None else freeze.relative_tolerance,
            max_epochs=trainer.max_epochs if (trainer.max_epochs or -1) > 0 else None,
            mlp_parameters=self._mlp_parameters,
            solve=self._solve,
            one_pass=None if freeze is None else freeze.one_pass_record,
            finished_seconds=finished.wall,
            finished_cpu_seconds=finished.cpu,
            bookkeeping_cpu_seconds=self._bookkeeping.cpu,
            parameters=Parameters(
                sum(parameter.numel() for parameter in pl_module.parameters()),
                count_trainable(pl_module),
                _optimizer_bytes(trainer),
            ),
            peak_memory_bytes=_peak_memory_bytes(pl_module.device),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the record so far, in primitives."""
        return {
            "epochs": [asdict(epoch) for epoch in self._epochs],
            "open": None if self._open is None else asdict(self._open),
            "mlp_parameters": self._mlp_parameters,
            "freeze_step": self._freeze_step,
            "solve": None if self._solve is None else asdict(self._solve),
        }

    def _leave_batches(self, pl_module: Any) -> None:
        self._note_freeze()
        self._note_solve(pl_module)
        self._stop_batches()

    def _stop_batches(self) -> None:
        if self._batches_started is not None and self._open is not None:
            spent = self._batch_ended - self._batches_started
            self._open.training_seconds += spent.wall
            self._open.training_cpu_seconds += spent.cpu
        self._batches_started = None

    def _note_freeze(self) -> None:
        if not self._is_frozen():
            self._freeze_step = None
        elif self._freeze_step is None and self.freeze is not None and self.freeze.freeze_epoch is not None:
            self._freeze_step = self._step

    def _note_solve(self, pl_module: Any) -> bool:
        """Note a solve since the last batch; tell whether there was one."""
        if self.freeze is None or not self._is_frozen():
            self._solve = None
        if self.freeze is None or self._solve is not None:
            return False
        reports = [head.solve.report for head in self.freeze.heads.values() if head.solve.report is not None]
        if len(reports) < len(self.freeze.heads) or not reports or self._batches_started is None:
            return False
        seconds = sum(report.seconds for report in reports)
        self._solve = SolveRecord(
            seconds=seconds,
            collecting_seconds=max(0.0, (_now(pl_module) - self._batch_ended).wall - seconds),
            passes=sum(report.passes for report in reports),
            # Before the first step, and after each; of minibatch steps after each pass.
            evaluations=sum(1 + min(r.steps, r.passes) for r in reports if r.score is not None),
            start_score=reports[0].start_score,
            score=reports[0].score,
        )
        return True

    def _close(self, trainer: Any, pl_module: Any, score: float | None) -> EpochRecord:
        epoch = self._open or EpochRecord(trainer.current_epoch, trained_frozen=self._is_frozen())
        seconds = self._since_start(pl_module)
        epoch.seconds, epoch.cpu_seconds = seconds.wall, seconds.cpu
        epoch.val_score = _finite(score)
        epoch.frozen = self._is_frozen()
        if self._losses and self._loss is not None:
            # Lightning hands out the loss divided by the number of batches whose gradients are accumulated.
            epoch.train_loss = _finite(float(self._loss) * trainer.accumulate_grad_batches / self._losses)
        self._losses = 0
        checks = self._count_checks()
        checked = [name for name, count in checks.items() if count > self._checks.get(name, 0)]
        if checked and self.freeze is not None:
            epoch.churn = _finite(max(self.freeze.heads[name].churn_history[-1] for name in checked))
        self._checks = checks
        epoch.trainable_parameters = count_trainable(pl_module)
        epoch.optimizer_state_bytes = _optimizer_bytes(trainer)
        self._epochs.append(epoch)
        self._open = None
        return epoch

    def _record_of_scores(self) -> FitRecord:
        return FitRecord(epochs=self._epochs, mode=self.mode)

    def _since_start(self, pl_module: Any) -> Seconds:
        return self._before_resume + _now(pl_module) - self._started - self._bookkeeping

    @contextmanager
    def _clock_standing_still(self, pl_module: Any) -> Iterator[None]:
        started = _now(pl_module)
        yield
        self._bookkeeping += _now(pl_module) - started

    def _is_frozen(self) -> bool:
        return self.freeze is not None and self.freeze.frozen

    def _count_checks(self) -> dict[str, int]:
        heads = {} if self.freeze is None else self.freeze.heads
        return {name: len(head.churn_history) for name, head in heads.items()}


def _validates(trainer: Any) -> bool:
    return bool(trainer.state.fn == "fit" and not trainer.sanity_checking)


def _now(pl_module: Any) -> Seconds:
    if pl_module.device.type == "cuda":
        torch.cuda.synchronize(pl_module.device)
    return Seconds.now()


def _optimizer_bytes(trainer: Any) -> int:
    return sum(count_bytes(dict(optimizer.state)) for optimizer in trainer.optimizers)


def _peak_memory_bytes(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
