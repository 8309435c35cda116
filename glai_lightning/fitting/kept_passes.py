"""Training heads further on inputs that were kept: steps of the fit's own optimizer, without its data loader."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from glai_lightning.fitting.across_processes import processes_of
from glai_lightning.fitting.heads_in_module import HeadSlot
from glai_lightning.fitting.kept_inputs import KeptInputs
from glai_lightning.fitting.loss_reading import LossKind
from glai_lightning.fitting.solving import HeadSolve
from glai_lightning.fitting.step_reading import StepReader, isolated_step
from glai_lightning.heads.patterns import layout_of
from glai_lightning.solvers import LogisticSolver

_ROWS_SCORED_TOGETHER = 4096


class TrainerInPass:
    """A Trainer as it would be in a later epoch: it says so, and is the Trainer in all else.

    Args:
        trainer: the Trainer, at the last batch of an epoch.

    Attributes:
        current_epoch: number of the epoch that the pass stands for.
        is_last_batch: whether the last batch of the pass was trained on.
    """

    def __init__(self, trainer: Any) -> None:
        vars(self).update(trainer=trainer, current_epoch=trainer.current_epoch, is_last_batch=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["trainer"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in vars(self):
            vars(self)[name] = value
        else:
            setattr(self.trainer, name, value)

    @property
    def passes_left(self) -> float:
        """How many more passes ``max_epochs`` of the Trainer allows for."""
        epochs = self.trainer.max_epochs
        return float("inf") if epochs is None or epochs < 0 else epochs - 1 - self.current_epoch

    @property
    def steps_left(self) -> bool:
        """Whether ``max_steps`` of the Trainer allows for another step."""
        steps = self.trainer.max_steps
        return bool(steps < 0 or self.trainer.global_step < steps)


@dataclass(frozen=True)
class KeptHead:
    """A head to be trained on inputs that were kept.

    Args:
        slot: the place of the head.
        solve: its solve, which knows its loss.
        inputs: what was kept.
    """

    slot: HeadSlot
    solve: HeadSolve
    inputs: KeptInputs

    def loss(self, numbers: Tensor) -> Tensor:
        """Return the loss of the fit, as it was read off its first step, of rows by their numbers (n,)."""
        inputs, targets, weights = self.inputs.rows(numbers)
        reader = self.solve.reader
        assert reader is not None
        # Of a head that ends by changing the shape of its outputs: what was read is of the last Linear.
        outputs = self.slot.module(inputs).reshape(len(inputs), -1)
        losses = _losses(self._kind(reader), outputs, targets, self._label_smoothing(reader))
        return (losses if weights is None else losses * weights).mean() * reader.scale

    @torch.no_grad()
    def score(self, inputs: Tensor, targets: Tensor) -> tuple[float, int]:
        """Return how many rows (n, D) the head labels as their targets, or minus its squared errors, and their number.

        Several outputs count one by one.
        """
        reader = self.solve.reader
        assert reader is not None
        kind, total, count = self._kind(reader), 0.0, 0
        with isolated_step(self.slot.module):
            for x, y in zip(*(torch.split(part, _ROWS_SCORED_TOGETHER) for part in (inputs, targets)), strict=True):
                outputs = self.slot.module(x.to(y.device)).reshape(len(x), -1)
                if kind == "cross_entropy":
                    points = outputs.argmax(1) == (y.argmax(1) if y.ndim == 2 else y)
                elif kind == "binary_cross_entropy":
                    points = (outputs > 0) == (y.reshape(outputs.shape) > 0.5)
                else:
                    points = -(outputs - y.reshape(outputs.shape)).square()
                total, count = total + float(points.double().sum()), count + points.numel()
        return total, count

    def _kind(self, reader: StepReader) -> LossKind:
        if reader.kind is not None:
            return reader.kind
        solver = self.solve.chosen
        if not isinstance(solver, LogisticSolver):
            return "mse"
        return "binary_cross_entropy" if layout_of(self.slot.module).output.out_features == 1 else solver.loss

    def _label_smoothing(self, reader: StepReader) -> float:
        solver, smoothing = self.solve.chosen, reader.label_smoothing
        return smoothing or (solver.label_smoothing if isinstance(solver, LogisticSolver) else 0.0)


def train_pass(view: TrainerInPass, heads: list[KeptHead]) -> Iterator[tuple[int, "PassStep"]]:
    """Yield the steps of one pass over the kept inputs, in an order that is drawn anew, each to be run.

    A pass has as many batches as the epoch had, for which the schedules of the fit are. A plateau schedule rests.

    Args:
        view: the Trainer in this pass.
        heads: the heads to train; all have the same samples.
    """
    samples = heads[0].inputs.samples
    num_batches = min(int(view.num_training_batches), samples)
    _step_schedules(view, "epoch", view.current_epoch)
    for batch_idx, numbers in enumerate(torch.randperm(samples).tensor_split(num_batches)):
        view.is_last_batch = batch_idx == num_batches - 1
        yield batch_idx, PassStep(view, heads, numbers, batch_idx)


@dataclass(frozen=True)
class PassStep:
    """One batch of a pass, and the step of the optimizer after it."""

    view: TrainerInPass
    heads: list[KeptHead]
    numbers: Tensor
    batch_idx: int

    def run(self) -> Tensor:
        """Train on the batch, and return its loss as Lightning hands it to callbacks."""
        view, batch_idx = self.view, self.batch_idx
        loop = view.fit_loop.epoch_loop
        zero_grad = loop.automatic_optimization._make_zero_grad_fn(batch_idx, view.optimizers[0])
        losses: list[Tensor] = []

        def closure() -> Tensor:
            with view.precision_plugin.train_step_context():
                whole = torch.stack([head.loss(self.numbers) for head in self.heads]).sum()
                loss: Tensor = whole / view.accumulate_grad_batches
            if zero_grad is not None:
                zero_grad()
            view.strategy.backward(loss, view.optimizers[0])
            _average_gradients(view, self.heads)
            losses.append(loss.detach())
            return loss

        if view.is_last_batch or (batch_idx + 1) % view.accumulate_grad_batches == 0:
            # Lightning is at the last batch of its epoch, and so does not accumulate by itself.
            loop.automatic_optimization._optimizer_step(batch_idx, closure)
            loop._batches_that_stepped += 1
            _step_schedules(view, "step", batch_idx)
        else:
            closure()
        return losses[-1]


def _losses(kind: LossKind, outputs: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    if kind == "cross_entropy":
        return F.cross_entropy(outputs, targets, label_smoothing=label_smoothing, reduction="none")
    targets = targets.reshape(outputs.shape).to(outputs.dtype)
    if kind == "mse":
        return 0.5 * F.mse_loss(outputs, targets, reduction="none").sum(1)
    return F.binary_cross_entropy_with_logits(outputs, targets, reduction="none").sum(1)


def _average_gradients(view: TrainerInPass, heads: list[KeptHead]) -> None:
    processes = processes_of(view)
    if processes.count > 1:
        for gradient in (parameter.grad for head in heads for parameter in head.slot.module.parameters()):
            if gradient is not None:
                processes.sum(gradient).div_(processes.count)


def _step_schedules(view: TrainerInPass, interval: str, number: int) -> None:
    """Step the schedules of an interval as the fit would after its batch, or before its epoch, of a number."""
    ended = number + 1 if interval == "step" else number
    for schedule in view.lr_scheduler_configs:
        if schedule.interval == interval and not schedule.reduce_on_plateau and ended % schedule.frequency == 0:
            view.lightning_module.lr_scheduler_step(schedule.scheduler, None)
            progress = view.fit_loop.epoch_loop.scheduler_progress
            progress.increment_ready()
            progress.increment_completed()
