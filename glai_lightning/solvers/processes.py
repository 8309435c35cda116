"""The processes that share the samples of a solve: sums over all of them, and failures that all of them learn of."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Processes:
    """The processes of a ``torch.distributed`` group, or the one that runs, of which every sum is its own.

    What is summed is the same in all of them to the last bit, so that whatever follows from sums alone does too. All
    processes must call the same methods in the same order.

    Args:
        group: the processes, ``None`` for the one that runs.
        device: where the backend of the group wants its tensors.

    Example:
        >>> alone = Processes()
        >>> alone.count, alone.sum_numbers(2, 0.5)
        (1, [2.0, 0.5])
    """

    def __init__(self, group: "ProcessGroup | None" = None, device: torch.device | str = "cpu") -> None:
        self._group = group
        self._device = device
        self.count = 1 if group is None else dist.get_world_size(group)

    def sum(self, values: Tensor) -> Tensor:
        """Add a tensor up over all processes, in place, and return it."""
        if self._group is not None:
            dist.all_reduce(values, dist.ReduceOp.SUM, group=self._group)
        return values

    def all_rows(self, rows: Tensor) -> Tensor:
        """Return the rows (n, ...) of all processes, one after the other."""
        if self._group is None:
            return rows
        counts = torch.zeros(self.count, dtype=torch.int64, device=rows.device)
        rank = dist.get_rank(self._group)
        counts[rank] = len(rows)
        ends = self.sum(counts).cumsum(0).tolist()
        together = rows.new_zeros(ends[-1], *rows.shape[1:])
        together[ends[rank] - len(rows) : ends[rank]] = rows
        return self.sum(together)

    def all_objects(self, value: Any) -> list[Any]:
        """Return the object of each process, which must be picklable."""
        values: list[Any] = [value] * self.count
        if self._group is not None:
            dist.all_gather_object(values, value, group=self._group)
        return values

    def sum_numbers(self, *numbers: float) -> list[float]:
        """Return the sum over all processes of each number, in float64."""
        summed: list[float] = self.sum(torch.tensor(numbers, dtype=torch.float64, device=self._device)).tolist()
        return summed

    def from_first(self, values: Tensor) -> Tensor:
        """Give all processes the tensor of the first, in place, and return it."""
        if self._group is not None:
            dist.broadcast(values, dist.get_global_rank(self._group, 0), group=self._group)
        return values

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Context for what each process does by itself: where it raises in one, it raises in all.

        Without, the others would wait for ever for a process that is not going to answer.

        Raises:
            RuntimeError: if the context raised in another process and not in this one; the message says what.
        """
        try:
            yield
        except Exception as error:
            self._tell(error)
            raise
        self._tell(None)

    def _tell(self, error: Exception | None) -> None:
        """Tell the other processes of an error, and raise for one of theirs."""
        (failures,) = self.sum_numbers(float(error is not None))
        if self._group is None or not failures:
            return
        said = self.all_objects(None if error is None else f"{type(error).__name__}: {error}")
        if error is None:
            rank, message = next((rank, message) for rank, message in enumerate(said) if message is not None)
            raise RuntimeError(f"Process {rank} of {self.count} failed. {message}")
