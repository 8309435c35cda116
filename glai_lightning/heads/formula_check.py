"""Telling whether the formulas of tangent and independent paths compute what a head's own forward computes."""

import inspect

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from glai_lightning.heads.layout import HeadLayout, in_mode, record
from glai_lightning.heads.path_kinds import apply_trailing
from glai_lightning.heads.patterns import apply_leading, hidden_units


def unlike_formula(head: nn.Module, layout: HeadLayout) -> str | None:
    """Say why the formulas of tangent and independent paths do not compute what the forward of a head computes.

    Returns:
        The reason; ``None`` where they do.
    """
    if isinstance(layout.names.chain, str):
        return layout.names.chain
    reason = _unlike_formula(head, layout)
    return reason and (
        f"Expected a head that computes what the formula of its paths computes, which takes the place of its forward, "
        f"but {reason}."
    )


def _unlike_formula(head: nn.Module, layout: HeadLayout) -> str | None:
    arguments = list(inspect.signature(head.forward).parameters.values())
    if len(arguments) != 1:
        return f"got a forward with {len(arguments)} arguments"
    for name, module in head.named_modules():
        if name and (module._forward_hooks or module._forward_pre_hooks):
            return f"got a hook on '{name}'"
    if any(isinstance(step, _DropoutNd) for step in layout.names.trailing):
        return "its forward calls a dropout function after the last Linear"
    if all(isinstance(module, nn.Flatten | nn.LayerNorm | _BatchNorm) for module in layout.leading):
        return _unlike_on_random_inputs(head, layout)
    return None


def _unlike_on_random_inputs(head: nn.Module, layout: HeadLayout) -> str | None:
    weight = layout.output.weight
    parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), in_mode([head], training=False):
        x = torch.randn(8, layout.widths[0]).to(weight)
        steps = [[call.name for call in record(head, (x,), {}, training=training)[0]] for training in (False, True)]
        if steps[0] != steps[1]:
            return "its forward takes other steps in train mode than in eval mode"
        outputs, expected = head.forward(x), _formula(layout, x)
        reached = torch.autograd.grad(outputs.sum(), parameters, allow_unused=True) if outputs.requires_grad else ()
        due = torch.autograd.grad(expected.sum(), parameters, allow_unused=True) if expected.requires_grad else ()
    tolerance = 8.0 * torch.finfo(weight.dtype).eps ** 0.75 * max(1.0, float(expected.detach().abs().max()))
    if outputs.shape != expected.shape or not bool((outputs - expected).abs().max() <= tolerance):
        return "its outputs for random inputs are others"
    if [gradient is None for gradient in reached] != [gradient is None for gradient in due]:
        return "its gradients reach other parameters"
    return None


def _formula(layout: HeadLayout, x: Tensor) -> Tensor:
    x = apply_leading(layout, x)
    for layer in hidden_units(layout):
        z = layer.preactivations(x)
        x = layer.gates(z) * z
    return apply_trailing(layout, nn.functional.linear(x, layout.output.weight, layout.output.bias))
