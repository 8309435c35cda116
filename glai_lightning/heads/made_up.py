"""Inputs to call a head with whose forward expects features and no more."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from glai_lightning.heads.recording import innermost, is_layer, layer_sizes


def made_up_inputs(head: nn.Module) -> Iterator[Tensor]:
    """Yield inputs of the shapes that a head may take, the likeliest first."""
    layers = [module for _, module in innermost(head) if is_layer(module)]
    weight: Any = layers[0].weight
    generator = torch.Generator().manual_seed(0)
    width = input_width(head, layers[0])
    around: list[tuple[int, ...]] = [(), (1, 1), (7, 7)]
    if isinstance(layers[0], nn.Conv1d | nn.Conv2d | nn.Conv3d):
        around = [(1,) * (layers[0].weight.ndim - 2), (7,) * (layers[0].weight.ndim - 2), ()]
    widths = [width, *{layer_sizes(layer)[0] for layer in layers[1:]} - {width}]
    for shape in [
        *((2, width, *more) for width in widths[:1] for more in around),
        # No number of tokens that a module may take for its channels.
        (2, 13, width),
        (2, 7, 7, width),
        *((2, width) for width in widths[1:]),
        *((2, tokens, width) for tokens in widths[1:]),
    ]:
        inputs = torch.randn(shape, generator=generator)
        if weight.is_meta:
            inputs = inputs.to("meta")
        yield inputs.to(weight.device, weight.dtype if weight.is_floating_point() else torch.float32)


def input_width(head: nn.Module, first: Any) -> int:
    """Return the width of a head's inputs: what it says itself, or else what its first layer takes."""
    own = getattr(head, "in_features", None)
    return own if isinstance(own, int) else layer_sizes(first)[0]


def count_required(head: nn.Module) -> int:
    """Count the arguments that a forward cannot do without; what comes second often is a residual like the first."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(head.forward).parameters.values()
    required = [p for p in parameters if p.kind in positional and p.default is inspect.Parameter.empty]
    return max(1, len(required))
