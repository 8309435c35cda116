"""The heads of a comparison: what takes the place of the configured MLP, with as many parameters."""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from glai_lightning.heads.chain import HiddenLayer
from glai_lightning.heads.gated import glu_head, polyglu_head
from glai_lightning.heads.layout import HeadLayout, read_head
from glai_lightning.heads.paths import count_path_weights, matched_hidden_features
from glai_lightning.heads.random_features import eugen_head, random_feature_head


@dataclass(frozen=True)
class HeadKind:
    """A kind of head.

    Args:
        description: what it is, in plain words.
        layers: makes its layers, for the configured MLP.
        learns: whether anything before its last Linear is trained.
    """

    description: str
    layers: Callable[[HeadLayout], Sequence[nn.Module]]
    learns: bool = True


def head_in_place(head: nn.Module, name: str) -> nn.Module:
    """Return a fresh head of a kind, with what stands before and after the layers of the one given.

    Its width is the one at which its number of parameters, fixed ones included, is nearest to that of the MLP.

    Args:
        head: an MLP head that can be read; it is not changed.
        name: one of ``HEADS``.

    Raises:
        ValueError: if the head cannot be read.

    Example:
        >>> from glai_lightning import mlp_head
        >>> mlp = mlp_head(64, 1024, 10)
        >>> [sum(p.numel() for p in head.parameters()) for head in (mlp, head_in_place(mlp, "glu"))]
        [76810, 76870]
    """
    layout = read_head(head)
    return _around(layout, HEADS[name].layers(layout))


def _around(layout: HeadLayout, layers: Iterable[nn.Module]) -> nn.Module:
    leading, trailing = (map(copy.deepcopy, around) for around in (layout.leading, layout.trailing))
    modules = [*leading, *layers, *trailing]
    # A head of a class of its own says itself how many features it takes.
    head = modules[0] if len(modules) == 1 else nn.Sequential(*modules)
    return head.to(layout.output.weight.dtype)


def _like(layout: HeadLayout, widths: Sequence[int], activation: nn.Module | None = None) -> list[nn.Module]:
    """Make the layers of the MLP with other widths, or with another activation."""
    modules: list[nn.Module] = []
    for layer, before, width in zip(layout.hidden, widths, widths[1:], strict=False):
        modules += _hidden_modules(layer, before, width, activation or layer.activation)
    return [*modules, _linear(layout.output, widths[-2], widths[-1])]


def _hidden_modules(layer: HiddenLayer, before: int, width: int, activation: nn.Module) -> list[nn.Module]:
    norm: Any = layer.norm
    norms = [] if norm is None else [type(norm)(width, eps=norm.eps, momentum=norm.momentum, affine=norm.affine)]
    return [_linear(layer.linear, before, width), *norms, *map(copy.deepcopy, (activation, *layer.dropout))]


def _linear(like: Any, before: int, width: int) -> nn.Linear:
    return nn.Linear(before, width, bias=like.bias is not None)


def _activated(activation: type[nn.Module]) -> HeadKind:
    return HeadKind(f"the MLP with {activation.__name__}", lambda layout: _like(layout, layout.widths, activation()))


def _of_equal_size(make: Callable[[int, int, int], nn.Module], layout: HeadLayout) -> list[nn.Module]:
    inputs, *_, outputs = layout.widths

    def size(width: int) -> int:
        return _count([make(inputs, width, outputs)])

    # The number of parameters is a straight line over the width.
    wanted = (_count(_like(layout, layout.widths)) - size(1)) / (size(2) - size(1))
    return [make(inputs, max(1, 1 + round(wanted)), outputs)]


def _count(modules: Iterable[nn.Module]) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def _without_hidden_layer(layout: HeadLayout) -> list[nn.Module]:
    # An identity and an activation that is one too, so that it freezes as other heads do.
    inputs, *_, outputs = layout.widths
    same = nn.Linear(inputs, inputs, bias=False)
    del same.weight
    same.register_buffer("weight", torch.eye(inputs))
    return [same, nn.LeakyReLU(1.0), _linear(layout.output, inputs, outputs)]


#: The heads that can be compared, by their names.
HEADS = {
    "mlp": HeadKind("the MLP", lambda layout: _like(layout, layout.widths)),
    "gelu": _activated(nn.GELU),
    "silu": _activated(nn.SiLU),
    "tanh": _activated(nn.Tanh),
    "glu": HeadKind("SwiGLU gates", partial(_of_equal_size, glu_head)),
    "polyglu": HeadKind("gates that choose among activations", partial(_of_equal_size, polyglu_head)),
    "eugen": HeadKind(
        "products of fixed random projections",
        partial(_of_equal_size, lambda inputs, width, outputs: eugen_head(inputs, outputs, features=width)),
        learns=False,
    ),
    "random": HeadKind("random features", partial(_of_equal_size, random_feature_head), learns=False),
    "linear": HeadKind("no hidden layer", _without_hidden_layer, learns=False),
}


def matched_head(head: nn.Module) -> nn.Module:
    """Return a fresh head like the one given, so narrow that its independent paths have as many weights as that MLP.

    One hidden layer has the width of ``matched_hidden_features``; several are narrowed in proportion, to the widest
    that have no more path weights than the MLP has weights.

    Args:
        head: an MLP head that can be read; it is not changed.

    Returns:
        A head of the same layers: kinds, biases, BatchNorm, activations, Dropout, what stands before and after them.

    Raises:
        ValueError: if the head cannot be read.

    Example:
        >>> from glai_lightning import mlp_head
        >>> matched_head(mlp_head(64, 1024, 10))
        Sequential(
          (0): Linear(in_features=64, out_features=118, bias=True)
          (1): ReLU()
          (2): Linear(in_features=118, out_features=10, bias=True)
        )
    """
    layout = read_head(head)
    return _around(layout, _like(layout, _matched_widths(layout)))


def _matched_widths(layout: HeadLayout) -> tuple[int, ...]:
    inputs, *hidden, outputs = layout.widths
    if len(hidden) == 1:
        return inputs, matched_hidden_features(inputs, hidden[0], outputs), outputs
    hidden_bias = [layer.linear.bias is not None or layer.norm is not None for layer in layout.hidden]
    output_bias = layout.output.bias is not None
    linears = [*(layer.linear for layer in layout.hidden), layout.output]
    weights = sum(parameter.numel() for linear in linears for parameter in linear.parameters())

    def narrowed(first: int) -> tuple[int, ...]:
        scaled = (max(1, round(width * first / hidden[0])) for width in hidden[1:])
        return (inputs, first, *scaled, outputs)

    fitting = (
        narrowed(first)
        for first in range(hidden[0], 0, -1)
        if count_path_weights(narrowed(first), hidden_bias, output_bias) <= weights
    )
    return next(fitting, narrowed(1))
