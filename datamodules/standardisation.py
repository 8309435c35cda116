"""Columns to mean 0 and variance 1, by the statistics of the training rows."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Blocks of 4 MiB in float64: statistics are exact for every input dtype without a float64 copy of the data.
_ELEMENTS_PER_BLOCK = 2**19


@dataclass(frozen=True)
class Standardisation:
    """The map x -> (x - mean) / scale, a column at a time.

    Args:
        mean: training mean of each column, shape (D,), float64.
        scale: training standard deviation of each column (biased, as in scikit-learn), shape (D,), float64;
            1 where the column is constant in training, so that it becomes 0 instead of NaN.

    Example:
        >>> standardise = Standardisation.fit(torch.tensor([[0.0, 7.0], [2.0, 7.0]]))
        >>> standardise(torch.tensor([[0.0, 7.0], [4.0, 8.0]]))
        tensor([[-1.,  0.],
                [ 3.,  1.]])
    """

    mean: Tensor
    scale: Tensor

    @classmethod
    def fit(cls, inputs: Tensor) -> "Standardisation":
        """Measure the columns.

        Args:
            inputs: training rows, shape (N, D), N at least 1, any real dtype.

        Returns:
            The standardisation of these rows.
        """
        mean = _sum_of_rows(_blocks(inputs)) / len(inputs)
        variance = _sum_of_rows((block - mean).square_() for block in _blocks(inputs)) / len(inputs)
        # The mean of equal numbers may be off by a rounding error, which must not pass for a deviation.
        constant = (inputs == inputs[0]).all(0) | (variance == 0)
        return cls(mean, variance.sqrt().masked_fill(constant, 1.0))

    def __call__(self, inputs: Tensor) -> Tensor:
        """Standardise rows.

        Args:
            inputs: shape (N, D), any real dtype.

        Returns:
            A new tensor, shape (N, D), float32.
        """
        outputs = torch.empty(inputs.shape, dtype=torch.float32)
        for target, block in zip(_split(outputs), _blocks(inputs), strict=True):
            target.copy_((block - self.mean).div_(self.scale))
        return outputs


def _split(inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.split(inputs, max(1, _ELEMENTS_PER_BLOCK // inputs.shape[1]))


def _blocks(inputs: Tensor) -> Iterator[Tensor]:
    return (block.double() for block in _split(inputs))


def _sum_of_rows(blocks: Iterator[Tensor]) -> Tensor:
    return torch.stack([block.sum(0) for block in blocks]).sum(0)
