"""What a head was given and trained on in one epoch of a fit, kept: in memory, and beyond a limit in a file."""

import math
import os
import tempfile
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from glai_lightning.checks import UserValueError
from glai_lightning.fitting.head_data import INPUTS_IN_MEMORY, GrowingRows, joined_targets, joined_weights
from glai_lightning.fitting.loss_reading import HeadBatch

_ROWS_READ_TOGETHER = 4096


class KeptInputs:
    """Rows of inputs, targets and weights of a head, kept batch after batch, to be read in any order, many times.

    Inputs that take more than ``INPUTS_IN_MEMORY`` bytes are in a memory-mapped temporary file without a name, which
    goes with the process at the latest.

    Args:
        num_batches: how many batches are to come.

    Attributes:
        samples: how many rows there are.

    Example:
        >>> kept = KeptInputs(num_batches=2)
        >>> kept.add(HeadBatch(torch.zeros(3, 4), torch.zeros(3)))
        >>> kept.add(HeadBatch(torch.ones(2, 4), torch.ones(2)))
        >>> kept.rows(torch.tensor([4, 0])).targets
        tensor([1., 0.])
    """

    def __init__(self, num_batches: int) -> None:
        self.samples = 0
        self._num_batches = num_batches
        self._inputs: GrowingRows | None = None
        self._targets: list[Tensor] = []
        self._weights: list[Tensor | None] = []

    @property
    def weighted(self) -> bool:
        """Whether weights differ in any batch."""
        return any(weights is not None for weights in self._weights)

    def add(self, batch: HeadBatch) -> None:
        """Keep a batch.

        Raises:
            ValueError: if the temporary folder has no room for the inputs.
        """
        if self._inputs is None:
            self._inputs = GrowingRows(len(batch.inputs) * self._num_batches, _reserved)
        self._inputs.add(batch.inputs)
        # Of a view the whole would be kept.
        self._targets.append(batch.targets.clone())
        self._weights.append(batch.weights)
        self.samples += len(batch.inputs)

    def leave_out_last(self, rows: int) -> None:
        """Forget the last rows."""
        targets = self._joined().targets
        self.samples -= rows
        weights = joined_weights(self._weights, self._targets)
        self._targets = [targets[: self.samples]]
        self._weights = [None if weights is None else weights[: self.samples]]

    def held(self) -> HeadBatch | None:
        """Return all rows; ``None`` if they are in a file, or there are none."""
        return self._joined() if self.samples and not self._is_in_file else None

    def rows(self, numbers: Tensor) -> HeadBatch:
        """Return rows by their numbers, a CPU tensor (n,), on the device of the targets."""
        inputs, targets, weights = self._joined()
        there = numbers.to(targets.device)
        return HeadBatch(
            inputs[numbers.to(inputs.device)].to(targets.device),
            targets[there],
            None if weights is None else weights[there],
        )

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for numbers in torch.split(torch.arange(self.samples), _ROWS_READ_TOGETHER):
            inputs, targets, weights = self.rows(numbers)
            yield (inputs, targets) if weights is None else (inputs, targets, weights)

    @property
    def _is_in_file(self) -> bool:
        return self._inputs is not None and self._inputs.reserved_bytes > INPUTS_IN_MEMORY

    def _joined(self) -> HeadBatch:
        assert self._inputs is not None
        if len(self._targets) > 1:
            weights = joined_weights(self._weights, self._targets)
            self._targets, self._weights = [joined_targets(self._targets)], [weights]
        return HeadBatch(self._inputs.together()[: self.samples], self._targets[0], self._weights[0])


def _reserved(like: Tensor, rows: int) -> Tensor:
    shape = (rows, *like.shape[1:])
    size = math.prod(shape) * like.element_size()
    if size <= INPUTS_IN_MEMORY:
        return like.new_empty(shape)
    with tempfile.TemporaryFile() as file:
        try:
            # A map over a file with holes would end the process once the disk is full.
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise UserValueError(
                f"Expected {size:,} bytes of room in {tempfile.gettempdir()!r} for the inputs of the head, which "
                f"`one_pass=True` keeps, but got: {error.strerror}. Set `TMPDIR` to a folder with more."
            ) from error
        mapped = np.memmap(file, np.uint8, mode="r+", shape=(size,))
    return torch.from_numpy(mapped).view(like.dtype).reshape(shape)
