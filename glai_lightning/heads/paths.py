"""Path weights: how many there are, and the three functions that are linear in them.

With inputs of width D, hidden layers of H1 ... HL units and C outputs, a path runs from one input through one unit of
every hidden layer to one output; it is active for x when every unit on it fires. A bias starts a path of its own, with
input 1. Notation here: ``gates`` (..., Hl) is what the activation of layer l multiplies by (1 or 0 for ReLU), and
``joint_gates[l]`` (..., Hl * ... * HL) the products over the units of layers l to L: the bits of whole paths.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from glai_lightning.checks import expect_sizes
from glai_lightning.heads.patterns import HiddenUnits


def matched_hidden_features(in_features: int, hidden_features: int, out_features: int) -> int:
    """Return the hidden width whose independent paths have as many weights as a reference MLP.

    An MLP of H hidden units has about H (D + C) weights, and h hidden units make h D C paths, so that
    h = H (D + C) / (D C), rounded.

    Args:
        in_features: width D of the inputs, at least 1.
        hidden_features: hidden units H of the reference MLP, at least 1.
        out_features: number C of outputs, at least 1.

    Returns:
        The number of hidden units, at least 1.

    Raises:
        TypeError: if a size is not an integer.
        ValueError: if a size is below 1.

    Example:
        >>> matched_hidden_features(512, 512, 10)
        52
    """
    expect_sizes(in_features=in_features, hidden_features=hidden_features, out_features=out_features)
    return max(1, round(hidden_features * (in_features + out_features) / (in_features * out_features)))


def count_path_weights(widths: Sequence[int], hidden_bias: Sequence[bool], output_bias: bool) -> int:
    """Count the paths of a head, those that start at a bias included.

    Args:
        widths: inputs, hidden units of every layer, outputs: (D, H1, ..., HL, C).
        hidden_bias: for each hidden layer, whether it has a bias (or a BatchNorm, which acts as one).
        output_bias: whether the outputs have a bias.

    Returns:
        The number of path weights: D H C + H C + C for one hidden layer with biases.

    Example:
        >>> count_path_weights((512, 64, 10), [True], True)
        328330
    """
    count = math.prod(widths) + (widths[-1] if output_bias else 0)
    for layer, has_bias in enumerate(hidden_bias, start=1):
        count += math.prod(widths[layer:]) if has_bias else 0
    return count


def joint_gates(units: Sequence[HiddenUnits], x: Tensor) -> list[Tensor]:
    """Return the gates of whole paths, for paths that start before each hidden layer.

    Args:
        units: the frozen structure.
        x: inputs (..., D).

    Returns:
        For each hidden layer l a tensor of shape (..., Hl * ... * HL), without gradient.
    """
    layer_gates = []
    with torch.no_grad():
        for layer in units:
            z = layer.preactivations(x)
            gates = layer.gates(z)
            layer_gates.append(gates)
            x = gates * z
        joint = layer_gates[-1:]
        for gates in reversed(layer_gates[:-1]):
            joint.insert(0, (gates.unsqueeze(-1) * joint[0].unsqueeze(-2)).flatten(-2))
    return joint


def path_features(joint: Sequence[Tensor], x: Tensor, hidden_bias: Sequence[bool]) -> Tensor:
    """Return the features in which any head of this structure is linear: the inputs of its active paths.

    Args:
        joint: gates of whole paths, as ``joint_gates`` returns them.
        x: inputs (..., D).
        hidden_bias: for each hidden layer, whether paths start at its bias.

    Returns:
        A tensor (..., F): the P = H1 * ... * HL gates times the D inputs, ordered (P, D), and after them, layer by
        layer, the gates of the paths that start at a bias.
    """
    products = (joint[0].unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2)
    return torch.cat([products, *(gates for gates, start in zip(joint, hidden_bias, strict=True) if start)], dim=-1)


def multiply_along_paths(units: Sequence[HiddenUnits], output_weight: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """Multiply the weights along every path.

    Args:
        units: the hidden layers; BatchNorm is folded in.
        output_weight: weight of the last Linear, (C, HL).

    Returns:
        The weights of the paths that start at an input, (C, P, D) with P = H1 * ... * HL, and for each hidden layer l
        those of the paths that start at its bias, (C, Hl * ... * HL), or ``None`` where it has none.
    """
    # All products are made in float32 at least. An output at a time: beside the result, by far the largest tensor,
    # nothing of its size is held.
    dtype = torch.promote_types(output_weight.dtype, torch.float32)
    layers = [[None if t is None else t.detach().to(dtype) for t in layer.folded()] for layer in units]
    weights = [weight for weight, _ in layers if weight is not None]
    joint_widths = [math.prod(len(weight) for weight in weights[layer:]) for layer in range(len(units))]
    path_weights = output_weight.new_empty(len(output_weight), joint_widths[0], weights[0].shape[1])
    path_biases = [
        None if bias is None else output_weight.new_empty(len(output_weight), width)
        for width, (_, bias) in zip(joint_widths, layers, strict=True)
    ]
    for output, onward in enumerate(output_weight.detach().to(dtype)):
        for position in range(len(units) - 1, -1, -1):
            by_unit = onward.reshape(len(weights[position]), -1)
            bias, into = layers[position][1], path_biases[position]
            if bias is not None and into is not None:
                into[output] = (by_unit * bias.unsqueeze(-1)).flatten()
            if position > 0:
                # (Hl, rest) becomes (H(l-1), Hl * rest).
                onward = (weights[position].t().unsqueeze(-1) * by_unit).flatten(1)
        products = path_weights[output].view(*by_unit.shape, -1)
        if products.dtype == dtype:
            torch.mul(by_unit.unsqueeze(-1), weights[0].unsqueeze(1), out=products)
        else:
            for row, factors, weight in zip(products, by_unit, weights[0], strict=True):
                row.copy_(factors.unsqueeze(-1) * weight)
    return path_weights, path_biases


def independent_logits(
    joint: Sequence[Tensor],
    x: Tensor,
    path_weights: Tensor,
    path_biases: Sequence[Tensor | None],
    output_bias: Tensor | None,
) -> Tensor:
    """Sum the independent paths that are active: two matrix products, and no (batch, P, D) tensor.

    Args:
        joint: gates of whole paths, as ``joint_gates`` returns them.
        x: inputs (..., D).
        path_weights: (C, P, D).
        path_biases: for each hidden layer, (C, Hl * ... * HL) or ``None``.
        output_bias: (C,) or ``None``.

    Returns:
        Outputs of shape (..., C).
    """
    num_outputs, num_joint, _ = path_weights.shape
    first_bias = path_biases[0]
    per_path = F.linear(x, path_weights.flatten(0, 1), None if first_bias is None else first_bias.flatten())
    per_path = per_path.reshape(*x.shape[:-1], num_outputs, num_joint)
    # Autocast chooses the dtype of the products; the gates, zeros and ones or slopes, follow it.
    logits: Tensor = (per_path * joint[0].to(per_path.dtype).unsqueeze(-2)).sum(-1)
    for gates, bias in zip(joint[1:], path_biases[1:], strict=True):
        if bias is not None:
            logits = logits + F.linear(gates, bias)
    return logits if output_bias is None else logits + output_bias.to(logits.dtype)


def tangent_logits(
    units: Sequence[HiddenUnits],
    reference: Sequence[HiddenUnits],
    x: Tensor,
    output_weight: Tensor,
    output_reference: Tensor,
    output_bias: Tensor | None,
) -> Tensor:
    """Evaluate the first-order expansion of a head around its weights at the freeze, with its gates as they were there.

    For one hidden layer, with W1', b1', W2' the weights at the freeze and m the pattern that they give x:
    f(x) = W2' (m * (W1 x + b1)) + (W2 - W2') (m * (W1' x + b1')) + b2. Deeper heads carry both vectors, the one of the
    reference and the one of the expansion, through every layer.

    Args:
        units: the hidden layers, as they are trained.
        reference: the same layers at the freeze.
        x: inputs (..., D).
        output_weight: weight of the last Linear as it is trained, (C, HL).
        output_reference: the same at the freeze.
        output_bias: (C,) or ``None``.

    Returns:
        Outputs of shape (..., C), linear in every weight that is trained.
    """
    fixed = moving = x
    for layer, origin in zip(units, reference, strict=True):
        fixed_z = F.linear(fixed, origin.weight, origin.bias)
        if moving is x:
            moving_z = F.linear(x, layer.weight, layer.bias)
        else:
            moving_z = F.linear(moving, origin.weight) + F.linear(fixed, layer.weight - origin.weight, layer.bias)
        if layer.norm_weight is not None and origin.norm_weight is not None and origin.norm_bias is not None:
            unscaled = replace(layer, norm_weight=None, norm_bias=None)
            normed = unscaled.normalise(fixed_z)
            moving_z = (
                origin.norm_weight * unscaled.normalise(moving_z)
                + (layer.norm_weight - origin.norm_weight) * normed
                + (origin.norm_bias if layer.norm_bias is None else layer.norm_bias)
            )
            fixed_z = origin.norm_weight * normed + origin.norm_bias
        else:
            moving_z, fixed_z = layer.normalise(moving_z), layer.normalise(fixed_z)
        gates = origin.gates(fixed_z)
        fixed, moving = gates * fixed_z, gates * moving_z
    return F.linear(moving, output_reference) + F.linear(fixed, output_weight - output_reference, output_bias)
