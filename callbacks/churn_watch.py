"""Measuring the churn of one head while a Trainer fits: on which inputs, when, and over all processes."""

import math
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from glai_lightning.callbacks.callback_state import check_state
from glai_lightning.fitting.across_processes import churn_over_processes, share_buffers
from glai_lightning.fitting.heads_in_module import HeadSlot, name_heads
from glai_lightning.fitting.misconfiguration import UserMisconfigurationError
from glai_lightning.heads.churn import ChurnProbe, Compared


class ChurnWatch:
    """A probe on one head of a fit, which knows when its next measurement is due.

    A head need not be called in every batch. A check for which it has seen no input is left out.

    Args:
        probe_size: number of inputs on which churn is measured.
        every_n_steps: measure every so many optimizer steps; ``None`` for once an epoch.
    """

    def __init__(self, probe_size: int, every_n_steps: int | None) -> None:
        self.probe_size = probe_size
        self.every_n_steps = every_n_steps
        self._probe: ChurnProbe | None = None
        self._steps_at_check = 0
        self._rows = self._seen_before = self._batches = self._batches_called = 0
        self._called_in_epoch = self._told_of_uncalled = False

    def start(self, trainer: Any, slot: HeadSlot) -> None:
        """Watch a head from here on."""
        self.close()
        self._steps_at_check = trainer.global_step
        self._rows = self._seen_before = self._batches = self._batches_called = 0
        # Of an epoch that has begun it is not known.
        self._called_in_epoch = trainer.fit_loop.batch_idx >= 0
        self._probe = ChurnProbe(slot.module, self.probe_size)

    def detach(self) -> None:
        """Stop watching, and keep what was seen."""
        if self._probe is not None:
            self._probe.detach()

    def close(self) -> None:
        """Stop watching."""
        if self._probe is not None:
            self._probe.close()
            self._probe = None

    def before_batch(self, trainer: Any, batch_idx: int) -> None:
        """Keep the inputs of the last batches before a check only."""
        if self._probe is not None:
            self._seen_before = self._probe.seen
            self._probe.listen(self._check_is_near(trainer, batch_idx))

    def after_batch(self, trainer: Any, slot: HeadSlot) -> float | None:
        """Return the churn since the last check, if a check is due after this batch; NaN for weights not finite.

        Raises:
            MisconfigurationException: after the first batch, if layers of the head were called, and itself was not.
        """
        if self._probe is None:
            return None
        rows = self._probe.seen - self._seen_before
        self._batches += 1
        self._batches_called += rows > 0
        self._rows += rows
        self._called_in_epoch |= rows > 0
        if self._batches == 1 and rows == 0 and any(p.grad is not None for p in slot.module.parameters()):
            self.close()
            raise UserMisconfigurationError(
                f"Expected the head at {slot.name!r} to be called by `training_step`, in training mode, but only "
                f"modules in it are called. {name_heads(slot.pl_module)}"
            )
        if trainer.is_last_batch:
            self._tell_of_uncalled(trainer, slot)
        return self._measure(trainer, slot, self._probe) if self._check_is_due(trainer) else None

    def _tell_of_uncalled(self, trainer: Any, slot: HeadSlot) -> None:
        if not self._called_in_epoch and not self._told_of_uncalled:
            rank_zero_warn(
                f"The head at {slot.name!r} was not called in training in the whole of epoch {trainer.current_epoch}: "
                "its churn cannot be measured. Name the module whose forward `training_step` calls."
            )
            self._told_of_uncalled = True
        self._called_in_epoch = False

    def _check_is_near(self, trainer: Any, batch_idx: int) -> bool:
        # Where a head is not called in every batch, its last inputs may be from anywhere in the epoch.
        if not self._rows or self._batches_called < self._batches:
            return True
        # One batch more than it takes, because the last of an epoch may be short.
        needed = math.ceil(self.probe_size * self._batches / self._rows) + 1
        if self.every_n_steps is None:
            return bool(trainer.num_training_batches - batch_idx <= needed or math.isinf(trainer.num_training_batches))
        steps = self.every_n_steps - trainer.global_step % self.every_n_steps
        return bool(steps <= math.ceil(needed / trainer.accumulate_grad_batches) + 1)

    def _check_is_due(self, trainer: Any) -> bool:
        if self.every_n_steps is None:
            return bool(trainer.is_last_batch)
        # Steps of the optimizer: a check never falls between two batches whose gradients are accumulated.
        stepped = trainer.global_step != self._steps_at_check
        return bool(stepped and trainer.global_step % self.every_n_steps == 0)

    def _measure(self, trainer: Any, slot: HeadSlot, probe: ChurnProbe) -> float | None:
        self._steps_at_check = trainer.global_step
        share_buffers(trainer, probe.head)
        churn = measure_churn(trainer, probe)
        if churn is not None and math.isnan(churn):
            rank_zero_warn(f"The weights of the head at {slot.name!r} are not finite: its structure cannot settle.")
        return churn

    def state_dict(self) -> dict[str, Any]:
        """Return the snapshot of the last check, for a fit that is resumed in the middle of an epoch.

        The inputs that were seen since then are training data, and have no place in a checkpoint.
        """
        # Right after a check there is nothing to keep: the snapshot then is the head itself.
        if self._probe is None or not self._probe.seen:
            return {}
        return {"snapshot": dict(self._probe.snapshot)}

    def resume(self, slot: HeadSlot, state: dict[str, Any]) -> None:
        """Go on from the snapshot of a checkpoint, once started."""
        if self._probe is None or "snapshot" not in state:
            return
        holder = f"the churn of the head at {slot.name!r}"
        check_state(state, {"snapshot": dict}, holder)
        check_state(state["snapshot"], dict.fromkeys(self._probe.snapshot, Tensor), holder)
        self._probe.resume(state["snapshot"])

    def __getstate__(self) -> dict[str, Any]:
        # What a probe watches belongs to one process.
        return {**vars(self), "_probe": None}


def measure_churn(
    trainer: Any, probe: ChurnProbe, show: Callable[[list[Compared]], None] | None = None
) -> float | None:
    """Return the churn that a probe measures over all processes of a fit, all of which must call this together.

    Args:
        trainer: the Trainer of the fit.
        probe: what measures.
        show: is called with the patterns that were compared in this process.

    Returns:
        The fraction of pattern bits that flipped; NaN for weights that are not finite; ``None`` if no process saw an
        input since the last measurement.
    """
    finite = probe.is_finite()
    device = next(iter(probe.snapshot.values())).device
    flipped, bits = probe.measure(show) if probe.has_inputs else (torch.zeros((), device=device), 0)
    if not finite:
        # Added up like any count, because running statistics may diverge in one process alone.
        flipped = torch.full_like(flipped, math.nan, dtype=torch.float64)
    return churn_over_processes(trainer, flipped, bits)
