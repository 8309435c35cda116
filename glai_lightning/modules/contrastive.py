"""The contrastive loss of SimCLR, out of one matrix product."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class NTXentLoss(nn.Module):
    """The normalised, temperature-scaled cross-entropy of two views (NT-Xent; Chen et al. 2020, equation 1).

    For each of the 2 B projections of a batch the other view of its sample is to be found among the 2 B - 1 others:
    the mean of -log(exp(s_ij / t) / sum over k != i of exp(s_ik / t)), with cosine similarities s. It is equal to
    lightly's ``NTXentLoss``, which computes four products and copies them without their diagonals; here one product
    holds all similarities. Where ``torch.distributed`` is initialised, the others are those of all processes, which
    need batches of the same size; gradients flow through them.

    Args:
        temperature: what the similarities are divided by, above 0.

    Shape:
        Projections (batch, C) of one view and of the other -> 0-d.

    Example:
        >>> one = torch.eye(3)
        >>> round(float(NTXentLoss(0.5)(one, one)), 4)
        0.4327
    """

    def __init__(self, temperature: float = 0.5) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        """Return the loss: projections (batch, C) of both views -> 0-d."""
        directions = F.normalize(torch.cat((one, other)), dim=1)
        samples, rows = len(one), len(directions)
        gathers = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        first, everyone = (dist.get_rank() * rows, _gather(directions)) if gathers else (0, directions)
        similarities = (directions / self.temperature) @ everyone.T  # (2 batch, 2 batch * processes)
        similarities[:, first : first + rows].fill_diagonal_(-torch.inf)
        return F.cross_entropy(similarities, torch.arange(rows, device=one.device).roll(samples) + first)


class _Gather(torch.autograd.Function):
    """Stacks the rows of all processes; ``torch.distributed.nn.all_gather`` is deprecated."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


#: Stacks the rows of all processes: (rows, C) -> (processes * rows, C).
_gather: Callable[[Tensor], Tensor] = _Gather.apply
