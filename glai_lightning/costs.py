"""Counted costs: multiply-adds of training a head, and of solving for its path weights."""

import itertools
from collections.abc import Sequence


def training_cost(widths: Sequence[int]) -> int:
    """Count the multiply-adds of one training step of an MLP head, for one sample.

    Every layer is multiplied once forward and twice backward, but the first, whose inputs need no gradient.

    Args:
        widths: inputs, hidden units of every layer, outputs: (D, H1, ..., C).

    Returns:
        2 D H + 3 H C for one hidden layer.

    Example:
        >>> training_cost((384, 512, 150))
        623616
    """
    layers = [before * after for before, after in itertools.pairwise(widths)]
    return 2 * layers[0] + 3 * sum(layers[1:])


def activation_cost(widths: Sequence[int]) -> int:
    """Count the multiply-adds of the last hidden activations of an MLP head, for one sample.

    Args:
        widths: inputs, hidden units of every layer, outputs: (D, H1, ..., C).

    Returns:
        D H for one hidden layer.

    Example:
        >>> activation_cost((384, 512, 150))
        196608
    """
    return sum(before * after for before, after in itertools.pairwise(widths[:-1]))
