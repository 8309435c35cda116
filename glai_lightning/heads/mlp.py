"""The MLP head to start from."""

import itertools
from collections.abc import Sequence

from torch import nn

from glai_lightning.checks import UserValueError, expect_flag, expect_integer, expect_number


def mlp_head(
    in_features: int,
    hidden_features: int | Sequence[int],
    out_features: int,
    *,
    batch_norm: bool = False,
    dropout: float = 0.0,
) -> nn.Sequential:
    """Build an MLP head: Linear, BatchNorm1d, ReLU, Dropout for every hidden layer, then a Linear.

    Args:
        in_features: width D of the inputs, at least 1.
        hidden_features: units of the hidden layer, or of each hidden layer from input to output, each at least 1.
        out_features: number C of outputs, at least 1.
        batch_norm: whether a BatchNorm1d stands between each hidden Linear and its ReLU.
        dropout: probability of dropping a hidden activation, in [0, 1); no Dropout modules at 0.

    Returns:
        A head from (batch, D) to (batch, C).

    Raises:
        TypeError: if a size is not an integer, ``dropout`` not a number, or ``batch_norm`` not a bool.
        ValueError: if a size is below 1, there is no hidden layer, or ``dropout`` is out of range.

    Example:
        >>> mlp_head(4, 8, 3)
        Sequential(
          (0): Linear(in_features=4, out_features=8, bias=True)
          (1): ReLU()
          (2): Linear(in_features=8, out_features=3, bias=True)
        )
    """
    hidden = list(hidden_features) if isinstance(hidden_features, Sequence) else [hidden_features]
    expect_integer("in_features", in_features, least=1)
    if not hidden:
        raise UserValueError("Expected `hidden_features` to name at least one hidden layer, but got none.")
    for width in hidden:
        expect_integer("hidden_features", width, least=1)
    expect_integer("out_features", out_features, least=1)
    expect_flag("batch_norm", batch_norm)
    expect_number("dropout", dropout, low=0.0, high=1.0, below=True)
    modules: list[nn.Module] = []
    for before, width in itertools.pairwise([in_features, *hidden]):
        modules.append(nn.Linear(before, width))
        if batch_norm:
            modules.append(nn.BatchNorm1d(width))
        modules.append(nn.ReLU())
        if dropout > 0.0:
            modules.append(nn.Dropout(dropout))
    return nn.Sequential(*modules, nn.Linear(hidden[-1], out_features))
