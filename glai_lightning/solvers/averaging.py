"""The mean of heads of one structure."""

import copy
from collections.abc import Sequence

from torch import Tensor

from glai_lightning.checks import UserTypeError, UserValueError, expect_number
from glai_lightning.heads.frozen import GLAIHead
from glai_lightning.solvers.feature_map import FeatureMap
from glai_lightning.solvers.head_weights import LinearPathWeights


def average_heads(heads: Sequence[GLAIHead], weights: Sequence[float] | None = None) -> GLAIHead:
    """Return the mean of frozen heads of one structure: its outputs are the mean of their outputs.

    Heads whose structures differ have no such mean, and are refused.

    Args:
        heads: heads with output or independent paths, frozen from one head; they stay as they are.
        weights: how much each counts, at least 0; ``None`` for all alike.

    Returns:
        A copy of the first head, with the mean of the path weights, computed in float64.

    Raises:
        TypeError: if one is not a ``GLAIHead``, or a weight not a number.
        ValueError: if there is none, or structures or sizes differ, or the weights are not one a head.

    Example:
        >>> import torch
        >>> from glai_lightning import freeze_structure, mlp_head
        >>> first = freeze_structure(mlp_head(4, 8, 3))
        >>> x, second = torch.randn(5, 4), copy.deepcopy(first)
        >>> _ = torch.nn.init.normal_(second[-1].weight)
        >>> torch.allclose(average_heads([first, second])(x), (first(x) + second(x)) / 2, atol=1e-6)
        True
    """
    for name, given in (("heads", heads), ("weights", weights)):
        if not isinstance(given, list | tuple | None):
            raise UserTypeError(f"Expected `{name}` to be a list, but got {given!r}.")
    if not heads:
        raise UserValueError("Expected at least one head, but got none.")
    shares = [1.0] * len(heads) if weights is None else list(weights)
    for share in shares:
        expect_number("weights", share, low=0.0)
    if len(shares) != len(heads) or not sum(shares):
        raise UserValueError(f"Expected a weight for each of {len(heads)} heads, not all 0, but got {shares}.")
    parts = [LinearPathWeights(head) for head in heads]
    if (
        len({(FeatureMap(head).fingerprint(), part.weight().shape) for head, part in zip(heads, parts, strict=True)})
        > 1
    ):
        raise UserValueError("Expected heads of one structure and size, but got different ones.")
    mean = copy.deepcopy(heads[0])
    total = sum(shares)

    def averaged(tensors: list[Tensor]) -> Tensor:
        return sum((tensor.detach().double() * (share / total) for tensor, share in zip(tensors, shares, strict=True)))  # type: ignore[return-value]

    biases = [part.bias for part in parts if part.bias is not None]
    LinearPathWeights(mean).set(averaged([part.weight() for part in parts]), averaged(biases) if biases else None)
    return mean
