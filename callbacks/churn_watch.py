"""Measuring the churn of one head while a Trainer fits: on which inputs, when, and over all processes."""

import math
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from glai_lightning.callbacks.callback_state import (
    COUNT,
    MAPPINGS,
    TENSORS,
    TENSORS_BY_NAME,
    check_entries,
    or_none,
)
from glai_lightning.fitting.across_processes import churn_over_processes, from_all_processes, share_buffers
from glai_lightning.fitting.misconfiguration import UserMisconfigurationError
from glai_lightning.heads.churn import ChurnProbe

_STATE = {"snapshot": TENSORS_BY_NAME, "processes": MAPPINGS}
_SEEN = {"inputs": TENSORS, "seen": COUNT, "rows_per_batch": or_none(COUNT), "running": TENSORS_BY_NAME}


class ChurnWatch:
    """A probe on one head of a fit, which knows when its next measurement is due.

    Args:
        head_name: qualified name of the head, for messages.
        probe_size: number of inputs on which churn is measured.
        every_n_steps: measure every so many optimizer steps; ``None`` for once an epoch.
    """

    def __init__(self, head_name: str, probe_size: int, every_n_steps: int | None) -> None:
        self.head_name = head_name
        self.probe_size = probe_size
        self.every_n_steps = every_n_steps
        self._probe: ChurnProbe | None = None
        self._steps_at_check = 0
        self._rows_per_batch: int | None = None

    def start(self, trainer: Any, head: nn.Module) -> None:
        """Watch a head from here on."""
        self.close()
        self._steps_at_check = trainer.global_step
        self._rows_per_batch = None
        self._probe = ChurnProbe(head, self.probe_size)

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
            self._probe.listen(self._rows_per_batch is None or self._check_is_near(trainer, batch_idx))

    def after_batch(self, trainer: Any) -> float | None:
        """Return the churn since the last check, if a check is due after this batch; NaN for weights not finite.

        Raises:
            MisconfigurationException: if the head was not called.
        """
        if self._probe is None:
            return None
        if not self._probe.seen:
            self.close()
            raise UserMisconfigurationError(
                f"Expected the head at {self.head_name!r} to be called by `training_step`, but it saw no input in the "
                "first batch. Name the module whose forward is called."
            )
        if self._rows_per_batch is None:
            self._rows_per_batch = self._probe.seen
        return self._measure(trainer, self._probe) if self._check_is_due(trainer) else None

    def _check_is_near(self, trainer: Any, batch_idx: int) -> bool:
        if self.every_n_steps is None:
            if math.isinf(trainer.num_training_batches):
                return True
            remaining = trainer.num_training_batches - batch_idx
        else:
            steps = self.every_n_steps - trainer.global_step % self.every_n_steps
            remaining = steps * trainer.accumulate_grad_batches
        assert self._rows_per_batch is not None
        # One batch more than it takes, because the last of an epoch may be short.
        return bool(remaining <= math.ceil(self.probe_size / self._rows_per_batch) + 1)

    def _check_is_due(self, trainer: Any) -> bool:
        if self.every_n_steps is None:
            return bool(trainer.is_last_batch)
        # Steps of the optimizer: a check never falls between two batches whose gradients are accumulated.
        stepped = trainer.global_step != self._steps_at_check
        return bool(stepped and trainer.global_step % self.every_n_steps == 0)

    def _measure(self, trainer: Any, probe: ChurnProbe) -> float:
        share_buffers(trainer, probe.head)
        finite = probe.is_finite()
        flipped, bits = probe.measure()
        if not finite:
            # Added up like any count, because running statistics may diverge in one process alone.
            flipped = torch.full_like(flipped, math.nan, dtype=torch.float64)
        churn = churn_over_processes(trainer, flipped, bits)
        if math.isnan(churn):
            rank_zero_warn(
                f"The weights of the head at {self.head_name!r} are not finite: its structure cannot settle."
            )
        self._steps_at_check = trainer.global_step
        return churn

    def state_dict(self) -> dict[str, Any]:
        """Return what was seen since the last check, for a fit that is resumed in the middle of an epoch."""
        # Right after a check there is nothing to keep: the snapshot then is the head itself.
        if self._probe is None or not self._probe.seen:
            return {}
        return {"snapshot": [units.tensors() for units in self._probe.snapshot], "processes": [self._seen_here()]}

    def complete_state(self, trainer: Any, state: dict[str, Any]) -> None:
        """Add to a state what every process saw, for only the first of them writes a checkpoint.

        Args:
            trainer: the Trainer of the fit; all of its processes must call this together.
            state: the ``state_dict`` of this process.
        """
        processes = from_all_processes(trainer, None if self._probe is None else self._seen_here())
        if "processes" in state:
            state["processes"] = processes

    def _seen_here(self) -> dict[str, Any]:
        assert self._probe is not None
        return {
            "inputs": [inputs.cpu() for inputs in self._probe.inputs],
            "seen": self._probe.seen,
            "rows_per_batch": self._rows_per_batch,
            # Weights are the same everywhere; the statistics of a BatchNorm that is not synchronised are not.
            "running": [
                {name: value.cpu() for name, value in units.tensors().items() if name.startswith("running_")}
                for units in self._probe.snapshot
            ],
        }

    def resume(self, trainer: Any, state: dict[str, Any]) -> None:
        """Go on from where the watch of a checkpoint stood, once started."""
        if self._probe is None or "snapshot" not in state:
            return
        holder = f"the churn of the head at {self.head_name!r}"
        check_entries(state, _STATE, holder)
        seen = state["processes"][trainer.global_rank % len(state["processes"])]
        check_entries(seen, _SEEN, holder)
        self._rows_per_batch = seen["rows_per_batch"]
        device = self._probe.snapshot[0].weight.device
        self._probe.resume(
            [
                {name: value.to(device) for name, value in (tensors | running).items()}
                for tensors, running in zip(state["snapshot"], seen["running"], strict=False)
            ]
        )

    def __getstate__(self) -> dict[str, Any]:
        # What a probe watches belongs to one process.
        return {**vars(self), "_probe": None}
