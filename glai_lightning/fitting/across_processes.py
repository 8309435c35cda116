"""What the processes of a fit tell each other."""

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed
from torch import Tensor, nn

from glai_lightning.solvers.processes import Processes

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def process_group(trainer: Any) -> "ProcessGroup | None":
    """Return the group of all processes of a fit, ``None`` if there is one."""
    return torch.distributed.group.WORLD if trainer.world_size > 1 else None


def processes_of(trainer: Any) -> Processes:
    """Return the processes of a fit."""
    return Processes(process_group(trainer), trainer.strategy.root_device)


def churn_over_processes(trainer: Any, flipped: Tensor, bits: int) -> float | None:
    """Return the fraction of pattern bits that flipped, counted over all processes; ``None`` if none was compared.

    Counts are added up before they are divided, so that every process sees the same churn and decides alike.

    Args:
        trainer: the Trainer of the fit; all of its processes must call this together.
        flipped: number of bits that differ in this process, a 0-d tensor on its device.
        bits: number of bits compared in this process.
    """
    counts = torch.stack([flipped.double(), flipped.new_tensor(bits, dtype=torch.float64)])
    flipped_everywhere, bits_everywhere = trainer.strategy.reduce(counts, reduce_op="sum").tolist()
    return float(flipped_everywhere / bits_everywhere) if bits_everywhere else None


def share_buffers(trainer: Any, module: nn.Module) -> None:
    """Give all processes the buffers of the first, as DistributedDataParallel does before its next forward.

    Running statistics that were updated by the last batch differ between processes until then, and a checkpoint holds
    those of the first.

    Args:
        trainer: the Trainer of the fit; all of its processes must call this together.
        module: the module of the fit, or a part of it.
    """
    if getattr(trainer.strategy.model, "broadcast_buffers", False):
        processes = processes_of(trainer)
        for buffer in module.buffers():
            processes.from_first(buffer)
