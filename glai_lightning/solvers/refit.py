"""Refitting layers to what others compute, on inputs without labels, by ridge regression."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from glai_lightning.checks import UserTypeError, UserValueError
from glai_lightning.heads.frozen import check_freezable
from glai_lightning.heads.layout import HeadLayout, in_mode
from glai_lightning.heads.patterns import check_inputs
from glai_lightning.heads.random_features import EUGenHead, eugen_head
from glai_lightning.heads.recording import is_layer
from glai_lightning.solvers.ridge import RidgeSolver


@dataclass(frozen=True)
class Rectified:
    """A head whose smooth activations were replaced by ReLU.

    Args:
        head: the head, on which paths with a formula are possible.
        error_before: mean squared error of its outputs against those of the head that it was, over their variance,
            with the activations replaced and nothing refitted.
        error: the same with every layer after the first activation refitted.
    """

    head: nn.Module
    error_before: float
    error: float


def rectify(head: nn.Module, inputs: Tensor, *, l2: float | None = None) -> Rectified:
    """Replace the smooth activations of a trained head by ReLU, and refit the layers after them to the old outputs.

    Layer by layer, W minimises the squared distance between the layer's old outputs and W a + b, a being what the new
    head gives the layer, by one ridge solve each: the MLP reconstruction of APHQ-ViT (arXiv 2504.02508) with the plain
    squared error. Exact paths become available that way, at the price of the error that is left.

    Args:
        head: a head whose activations are modules; it is not changed.
        inputs: (N, D), without labels; a few thousand of what the head sees.
        l2: strength of the penalty; ``None`` to choose it by leave-one-out.

    Returns:
        A copy of the head that is rectified, and its error before and after the refit.

    Raises:
        TypeError: if ``head`` is not a module or frozen, or ``inputs`` not a floating-point tensor.
        ValueError: if ``head`` cannot be read or called with ``inputs``, these are not finite or less than two, an
            activation is a function, all are ReLU already, or a layer after one is no Linear.

    Example:
        >>> head = nn.Sequential(nn.Linear(4, 32), nn.GELU(), nn.Linear(32, 3))
        >>> rectified = rectify(head, torch.randn(256, 4))
        >>> type(rectified.head[1]).__name__, rectified.error < rectified.error_before
        ('ReLU', True)
    """
    layout = check_freezable(head)
    check_inputs("inputs", inputs, layout)
    solver = RidgeSolver(l2=l2)
    _outputs_of("head", head, inputs)
    smooth = [(kind, name) for kind, name in layout.names.activations if kind.lower() != "relu"]
    if not smooth:
        raise UserValueError("Expected a head with an activation to replace by ReLU, but got one with ReLU alone.")
    new = copy.deepcopy(head)
    for kind, name in smooth:
        if name is None:
            raise UserValueError(
                f"Expected the activations of the head to be modules, to replace them, but got the function `{kind}`."
            )
        new.set_submodule(name, nn.ReLU())
    before = _relative_error(new, head, inputs)
    for name in _layers_after_activation(layout, inputs):
        given, wanted = _seen(new, name, inputs)[0], _seen(head, name, inputs)[1]
        _fit(new.get_submodule(name), given, wanted, solver)
    return Rectified(new, before, _relative_error(new, head, inputs))


def distil_eugen(
    layer: nn.Module, inputs: Tensor, *, order: int = 2, features: int = 64, l2: float | None = None
) -> EUGenHead:
    """Fit a head on products of random projections to what a layer, or a whole head, computes: one ridge solve.

    Args:
        layer: any module from (N, D) to (N, C); it is not changed.
        inputs: (N, D), without labels.
        order: see ``eugen_head``.
        features: see ``eugen_head``.
        l2: strength of the penalty; ``None`` to choose it by leave-one-out.

    Returns:
        The head, with fixed projections.

    Raises:
        TypeError: if ``layer`` is not a module, or ``inputs`` not a floating-point tensor.
        ValueError: if shapes are not (N, D) and (N, C), or ``inputs`` are not finite or less than two.

    Example:
        >>> layer = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        >>> distil_eugen(layer, torch.randn(256, 4), features=32)(torch.randn(5, 4)).shape
        torch.Size([5, 8])
    """
    if not isinstance(layer, nn.Module):
        raise UserTypeError(f"Expected `layer` to be a module, but got {layer!r}.")
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        raise UserTypeError(f"Expected `inputs` to be a floating-point tensor, but got `{type(inputs).__name__}`.")
    solver = RidgeSolver(l2=l2)
    outputs = _outputs_of("layer", layer, inputs)
    if inputs.ndim != 2 or outputs.ndim != 2:
        shapes = f"{tuple(inputs.shape)} and {tuple(outputs.shape)}"
        raise UserValueError(f"Expected inputs (N, D) and outputs (N, C), but got {shapes}.")
    head = eugen_head(inputs.shape[1], outputs.shape[1], order=order, features=features).to(inputs)
    _fit(head.output, _seen(head, "output", inputs)[0], outputs, solver)
    return head


@torch.no_grad()
def _outputs_of(name: str, module: nn.Module, inputs: Tensor) -> Tensor:
    """Return what a module makes of inputs, both of which are checked."""
    count = len(inputs) if inputs.ndim else 0
    if count < 2 or not bool(inputs.isfinite().all()):
        got = str(count) if count < 2 else "some that are not"
        raise UserValueError(f"Expected `inputs` to be two or more that are finite, but got {got}.")
    try:
        with in_mode([module], training=False):
            outputs = module(inputs)
    except Exception as error:
        # What a forward expects is not known, so it may object in any way.
        raise UserValueError(
            f"Expected `inputs` to be what `{name}` takes, but got {inputs.dtype} {tuple(inputs.shape)} ({error})."
        ) from error
    if not isinstance(outputs, Tensor):
        raise UserTypeError(f"Expected `{name}` to return a tensor, but got `{type(outputs).__name__}`.")
    return outputs


def _fit(layer: Any, given: Tensor, wanted: Tensor, solver: RidgeSolver) -> None:
    if not isinstance(layer, nn.Linear):
        raise UserValueError(f"Expected a Linear after an activation, to refit it, but got `{type(layer).__name__}`.")
    features, targets = given.flatten(0, -2), wanted.flatten(0, -2)
    bias = None if layer.bias is None else layer.bias.detach()
    solution = solver.solve_features(features, targets, weight=layer.weight.detach(), bias=bias)
    with torch.no_grad():
        layer.weight.copy_(solution.weight)
        if solution.bias is not None:
            layer.bias.copy_(solution.bias)


@torch.no_grad()
def _seen(head: nn.Module, name: str, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a layer of a head is given and returns in eval mode."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = head.get_submodule(name).register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    try:
        with in_mode([head], training=False):
            head(inputs)
    finally:
        handle.remove()
    return seen[0]


@torch.no_grad()
def _relative_error(head: nn.Module, other: nn.Module, inputs: Tensor) -> float:
    with in_mode([head, other], training=False):
        wanted = other(inputs)
        return float((head(inputs) - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum())


def _layers_after_activation(layout: HeadLayout, inputs: Tensor) -> list[str]:
    """Return the names of the layers that depend on an activation, in the order of their calls."""
    calls: list[str] = []
    activations = {name for _, name in layout.names.activations}
    handles = [
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
        for name, module in layout.head.named_modules()
        if name in activations or is_layer(module)
    ]
    try:
        with torch.no_grad(), in_mode([layout.head], training=False):
            layout.head(inputs[:2])
    finally:
        for handle in handles:
            handle.remove()
    first = min(calls.index(name) for name in activations if name is not None)
    return [name for name in calls[first:] if name not in activations]
