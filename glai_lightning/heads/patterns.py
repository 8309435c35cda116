"""Activation patterns: which hidden units of a head fire for which input."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_map_only

from glai_lightning.checks import UserTypeError, UserValueError
from glai_lightning.heads.chain import Chain, FunctionStep, HiddenLayer
from glai_lightning.heads.layout import HeadLayout, in_mode, read_head
from glai_lightning.heads.record import find_record
from glai_lightning.heads.recording import CallRecorder, ReachedOutput, call_with, unchanged


@dataclass(frozen=True)
class HiddenUnits:
    """The numbers that decide which units of one hidden layer fire.

    With inputs of width D and H units: ``weight`` (H, D), everything else (H,) or ``None``. The statistics and the
    affine weights are those of the BatchNorm between Linear and activation, which counts with its running statistics.
    """

    weight: Tensor
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    eps: float
    negative_slope: Tensor | float

    @classmethod
    def of(cls, layer: HiddenLayer) -> "HiddenUnits":
        """Return the units of a layer as they are now: the tensors are the layer's own."""
        # A layer that was put in the place of another, a LoRA layer for one, has these attributes too.
        linear: Any = layer.linear
        norm: Any = layer.norm
        activation = layer.activation
        if isinstance(activation, nn.PReLU):
            slope: Tensor | float = activation.weight
        else:
            slope = activation.negative_slope if isinstance(activation, nn.LeakyReLU) else 0.0
        return cls(
            weight=linear.weight,
            bias=linear.bias,
            running_mean=None if norm is None else norm.running_mean,
            running_var=None if norm is None else norm.running_var,
            norm_weight=None if norm is None else norm.weight,
            norm_bias=None if norm is None else norm.bias,
            eps=0.0 if norm is None else norm.eps,
            negative_slope=slope,
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are there, by the names of the fields."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def with_tensors(self, tensors: dict[str, Tensor]) -> "HiddenUnits":
        """Return the same layer with other numbers.

        Args:
            tensors: new tensors by the names of the fields; the rest stays.
        """
        return replace(self, **tensors)  # type: ignore[arg-type]

    def snapshot(self) -> "HiddenUnits":
        """Return a copy that goes on as it is when the layer is trained."""
        return self.with_tensors({name: value.detach().clone() for name, value in self.tensors().items()})

    def normalise(self, z: Tensor) -> Tensor:
        """Apply the BatchNorm, if there is one, with its running statistics: (batch, H) -> (batch, H)."""
        if self.running_mean is None:
            return z
        if z.ndim != 2:
            # BatchNorm takes the second of three dimensions for its units, whatever their number.
            raise UserValueError(
                "Expected inputs of shape (batch, features) for a head with BatchNorm, but got activations of shape "
                f"{tuple(z.shape)}."
            )
        return F.batch_norm(z, self.running_mean, self.running_var, self.norm_weight, self.norm_bias, eps=self.eps)

    def preactivations(self, x: Tensor) -> Tensor:
        """Return what the activation is applied to: (..., D) -> (..., H)."""
        return self.normalise(F.linear(x, self.weight, self.bias))

    def gates(self, z: Tensor) -> Tensor:
        """Return the factor by which the activation multiplies: 1 where a unit fires, else its slope; (..., H)."""
        slope = self.negative_slope
        fires = z > 0
        if not isinstance(slope, Tensor) and slope == 0.0:
            return fires.to(z.dtype)
        if isinstance(slope, Tensor) and slope.numel() > 1 and z.ndim != 2:
            # PReLU takes the second of three dimensions for its units, whatever their number.
            raise UserValueError(
                "Expected inputs of shape (batch, features) for a head whose PReLU has a slope for each unit, but got "
                f"activations of shape {tuple(z.shape)}."
            )
        return torch.where(fires, torch.ones((), dtype=z.dtype, device=z.device), slope)

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Return weight (H, D) and bias (H,) of the one affine map that Linear and BatchNorm make together."""
        if self.running_mean is None or self.running_var is None:
            return self.weight, self.bias
        scale = torch.rsqrt(self.running_var + self.eps)
        if self.norm_weight is not None:
            scale = scale * self.norm_weight
        bias = -self.running_mean if self.bias is None else self.bias - self.running_mean
        bias = bias * scale
        if self.norm_bias is not None:
            bias = bias + self.norm_bias
        return self.weight * scale.unsqueeze(-1), bias


def layout_of(head: nn.Module) -> HeadLayout:
    """Return the layout of a head, or the one that a frozen head carries."""
    record = find_record(head)
    return read_head(head) if record is None else record.names.find(head)


def holds_weight(output: nn.Module) -> bool:
    """Tell whether the last layer of a head can be set: a Linear, or independent paths, with a weight of its own."""
    kind = isinstance(output, nn.Linear) or hasattr(output, "path_weights")
    return kind and ("weight" in output._parameters or hasattr(output, "path_weights"))


#: Functions after which the outputs of the last Linear are still what a loss is computed of, in another form.
FORMS = {"log_softmax", "squeeze", "unsqueeze", "flatten", "view", "reshape", "float", "double", "to", "contiguous"}


def changing_steps(layout: HeadLayout) -> list[nn.Module]:
    """List what comes after the last Linear of a head and changes its outputs in eval mode."""
    return [module for module in layout.trailing if not _keeps_outputs(module)]


def _keeps_outputs(module: nn.Module) -> bool:
    if isinstance(module, FunctionStep):
        returned = module.function.startswith("returned ") and module.function != "returned other tensor"
        return returned or module.function in FORMS
    return isinstance(module, _DropoutNd | nn.Identity | nn.LogSoftmax | nn.Flatten)


def hidden_units(layout: HeadLayout) -> list[HiddenUnits]:
    """Return the units of every hidden layer of an MLP as they are now."""
    return [HiddenUnits.of(layer) for layer in layout.hidden]


def apply_leading(layout: HeadLayout, x: Tensor) -> Tensor:
    """Apply what comes before the first Linear of an MLP: a Flatten, a LayerNorm; (..., D) -> (..., D)."""
    for module in layout.leading:
        x = module(x)
    return x


def sample_shape(layout: HeadLayout, x: Tensor) -> torch.Size:
    """Return how many samples inputs of a head hold, by dimension: the shape (...) of outputs (..., C).

    Raises:
        ValueError: for inputs other than (n, D) of a head that is no chain of modules.
    """
    if isinstance(layout.names.chain, Chain):
        return apply_leading(layout, x).shape[:-1]
    if x.ndim != 2:
        raise UserValueError(
            f"Expected inputs (n, D) of a head that is no chain of modules, to solve for it, but got {tuple(x.shape)}."
        )
    return x.shape[:-1]


def run_feature_map(
    layout: HeadLayout, args: tuple[Any, ...], kwargs: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None
) -> CallRecorder:
    """Run a head's own forward in eval mode, without autocast, up to its last Linear.

    Args:
        layout: the layout of the head.
        args: what the head is given.
        kwargs: the same by name.
        tensors: parameters and buffers to run it with instead of its own, by their names.

    Returns:
        What was recorded: preactivations, and what the last Linear is given.
    """
    head, output = layout.head, layout.output
    record = find_record(head)
    forward = head.forward if record is None else record.original.forward.__get__(head)
    known = {name for _, name in layout.names.activations if name is not None}
    device = next(iter(layout.structure_tensors().values())).device.type
    # Under autocast the bits of a half-precision product would differ from those of the frozen float32 structure.
    with (
        in_mode([head], training=False),
        torch.autocast(device_type=device, enabled=False),
        suppress(ReachedOutput),
        CallRecorder(head, activations=known, stop_at=output) as recorder,
    ):
        call_with(head, forward, tensors or {}, args, kwargs)
    return recorder


@torch.no_grad()
def patterns_of(
    layout: HeadLayout,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> list[Tensor]:
    """Return the activation patterns (..., H) of a head, one for each activation, see ``run_feature_map``."""
    dtype = next(iter(layout.head.parameters())).dtype
    args, kwargs = tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, (args, kwargs or {}))
    with unchanged(layout.head):
        preactivations = run_feature_map(layout, args, kwargs, tensors).preactivations
    if len(preactivations) != len(layout.names.activations):
        raise UserValueError(
            f"Expected every call of `{type(layout.head).__name__}` to go through the {len(layout.names.activations)} "
            f"activations of the call that it was read from, but got one with {len(preactivations)}."
        )
    return [z > 0 for z in preactivations]


def activation_patterns(head: nn.Module, x: Tensor) -> list[Tensor]:
    """Return which hidden units fire for which input: the sign of what each activation is given.

    For a gated head it is the sign of what the gate's activation is given. BatchNorm inside the head counts with its
    running statistics and Dropout not at all, whatever mode the head is in, because two draws of either flip bits of
    the same weights.

    Args:
        head: a head or a ``GLAIHead``; it is not changed.
        x: inputs of shape (batch, D), floating point. More leading dimensions are kept.

    Returns:
        One bool tensor of shape (batch, width) for each activation.

    Raises:
        TypeError: if ``head`` is not a module, or ``x`` not a floating-point tensor.
        ValueError: if ``head`` has no activation before a last Linear, or ``x`` has another width.

    Example:
        >>> import torch
        >>> from glai_lightning import mlp_head
        >>> head = mlp_head(2, 3, 1)
        >>> with torch.no_grad():
        ...     _ = head[0].weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]))
        ...     _ = head[0].bias.zero_()
        >>> activation_patterns(head, torch.tensor([[1.0, -1.0]]))
        [tensor([[ True, False, False]])]
    """
    layout = layout_of(head)
    check_inputs("x", x, layout)
    return patterns_of(layout, (x,), tensors=frozen_tensors(head))


def frozen_tensors(head: nn.Module) -> dict[str, Tensor]:
    """Return the weights at the freeze that a head with tangent paths remembers, by the names of those trained now."""
    record = find_record(head)
    return {} if record is None else record.references


def check_inputs(name: str, x: object, layout: HeadLayout) -> None:
    """Check that an argument holds inputs of a head.

    Raises:
        TypeError: if it is not a floating-point tensor.
        ValueError: if its inputs have another width.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = f"a tensor of {x.dtype}" if isinstance(x, Tensor) else f"`{type(x).__name__}`"
        raise UserTypeError(f"Expected `{name}` to be a floating-point tensor, but got {got}.")
    width = layout.widths[0]
    if layout.takes_rows and (x.ndim < 1 or x.shape[-1] != width):
        raise UserValueError(f"Expected `{name}` to be of shape (..., {width}), but got {tuple(x.shape)}.")
