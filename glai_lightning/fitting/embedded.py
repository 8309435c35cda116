"""Batches that hold embeddings where a backbone expects its inputs."""

from typing import NamedTuple

from torch import Tensor


class Embedded(NamedTuple):
    """What a backbone returns for a batch, in the place of its inputs.

    Args:
        values: embeddings (batch, D).
    """

    values: Tensor
