"""Standardisation of what a head is given, as a part of the module that holds the head."""

from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

#: So many rows' worth of evidence says that a column varies as the average column does.
_PRIOR_ROWS = 16


class Standardise(nn.Module):
    """The map x -> (x - mean) / scale, a column at a time; the identity until it is set or measured.

    Its buffers stay in float32 whatever the precision of the module around them. The mean is kept in two parts, what
    float32 holds of it and the rest, because columns may lie far from zero.

    Args:
        num_features: number D of columns.

    Example:
        >>> standardise = Standardise(2)
        >>> standardise.set(torch.tensor([1.0, 7.0]), torch.tensor([2.0, 1.0]))
        >>> standardise(torch.tensor([[3.0, 7.0]]))
        tensor([[1., 0.]])
    """

    mean: Tensor
    scale: Tensor
    rows: Tensor

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(2, num_features))
        self.register_buffer("scale", torch.ones(num_features))
        self.register_buffer("rows", torch.zeros((), dtype=torch.int64))
        # What `rows` says, without a wait for the device.
        self.is_set = False

    def forward(self, x: Tensor) -> Tensor:
        """Standardise rows (batch, D), in at least float32; the outputs have the dtype of the inputs."""
        if not self.is_set:
            return x
        centred = x.to(torch.promote_types(x.dtype, torch.float32)) - self.mean[0] - self.mean[1]
        return (centred / self.scale).to(x.dtype)

    def set(self, mean: Tensor, scale: Tensor, rows: int = 1) -> None:
        """Set the statistics: mean (D,), deviation (D,) above 0, and how many rows they are of, 0 for the identity."""
        self.mean[0] = mean
        self.mean[1] = mean - self.mean[0].to(mean.dtype)
        self.scale.copy_(scale)
        self.rows.fill_(rows)
        self.is_set = rows > 0

    def copy_from(self, statistics: tuple[Tensor, Tensor] | None) -> None:
        """Take over mean and deviation (D,) from elsewhere, or become the identity for ``None``."""
        if statistics is None:
            self.set(torch.zeros_like(self.scale), torch.ones_like(self.scale), rows=0)
        else:
            self.set(*statistics)

    @torch.no_grad()
    def measure(self, x: Tensor, group: Any = None) -> None:
        """Set the statistics to those of rows, over all processes.

        A batch says little of a column that seldom varies, so each variance is drawn towards the mean variance of the
        columns, with the weight of 16 rows. No column is enlarged beyond measure for that.

        Args:
            x: rows (batch, D); at least one, in some process.
            group: the processes that have rows of their own; ``None`` for this one alone.
        """
        rows = x.detach().to(torch.float32 if x.device.type == "mps" else torch.float64)
        totals = torch.stack([rows.sum(0), rows.square().sum(0), torch.full_like(rows[0], len(rows))])
        if group is not None:
            torch.distributed.all_reduce(totals, group=group)
        count = totals[2, 0]
        mean = totals[0] / count
        variance = (totals[1] / count - mean.square()).clamp(min=0.0)
        drawn = (variance * count + variance.mean() * _PRIOR_ROWS) / (count + _PRIOR_ROWS)
        self.set(mean, drawn.sqrt().where(drawn > 0, torch.ones_like(drawn)), int(count))

    def _apply(self, fn: Any, recurse: bool = True) -> "Standardise":
        kept = [self.mean, self.scale]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.mean, self.scale = (old.to(now.device) for old, now in zip(kept, (self.mean, self.scale), strict=True))
        return self

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self.is_set = bool(self.rows > 0)
