"""What a head consists of: a feature map, which is what a freeze freezes, and its last Linear."""

import copy
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from glai_lightning.checks import UserTypeError, UserValueError
from glai_lightning.heads.chain import Chain, FunctionStep, HiddenLayer, Step, does_nothing, function_step, read_chain
from glai_lightning.heads.made_up import count_required, input_width, made_up_inputs
from glai_lightning.heads.recording import (
    CallRecorder,
    RecordedCall,
    innermost,
    is_layer,
    layer_sizes,
    unchanged,
)


class CannotBeCalledError(UserValueError):
    """A head that cannot be called with inputs that are made up, and so is read when it is called for real."""


@dataclass(frozen=True)
class HeadNames:
    """Where the parts of a head stand in it, by qualified names, which outlive a module that is replaced.

    Args:
        output: name of the last Linear.
        kept: names of the innermost modules that stay as they are at a freeze: the last Linear, those after it, and
            Dropout after the last activation.
        trailing: what comes after the last Linear.
        activations: name of the class or function of every activation with, for a module, its qualified name.
        widths: inputs of the first layer, units of every activation, outputs.
        layers: names of the layers in the order of their calls.
        products: inputs times outputs of every layer in the order of the calls.
        chain: the head as an MLP of piecewise-linear layers, for paths that have a formula; or why it is none.
    """

    output: str
    kept: tuple[str, ...]
    trailing: tuple[Step, ...]
    activations: tuple[tuple[str, str | None], ...]
    widths: tuple[int, ...]
    layers: tuple[str, ...]
    products: tuple[int, ...]
    chain: Chain | str

    def find(self, head: nn.Module) -> "HeadLayout":
        """Return the modules that stand at these names now."""
        return HeadLayout(self, head)


class HeadLayout:
    """The modules of a head, as they stand in it now, by the part that they play.

    Args:
        names: where they stand.
        head: the head.
    """

    def __init__(self, names: HeadNames, head: nn.Module) -> None:
        self.names = names
        self.head = head

    def _at(self, step: Step) -> nn.Module:
        return self.head.get_submodule(step) if isinstance(step, str) else step

    @property
    def chain(self) -> Chain:
        """The head as an MLP of piecewise-linear layers.

        Raises:
            ValueError: if it is none; the message says why.
        """
        if isinstance(self.names.chain, str):
            raise UserValueError(self.names.chain)
        return self.names.chain

    @property
    def leading(self) -> tuple[nn.Module, ...]:
        """What comes before the first Linear of an MLP."""
        return tuple(map(self._at, self.chain.leading))

    @property
    def hidden(self) -> tuple[HiddenLayer, ...]:
        """The hidden layers of an MLP."""
        return tuple(
            HiddenLayer(
                self._at(layer.linear),
                None if layer.norm is None else self._at(layer.norm),
                self._at(layer.activation),
                tuple(map(self._at, layer.dropout)),
            )
            for layer in self.chain.hidden
        )

    @property
    def output(self) -> Any:
        """The last Linear."""
        return self._at(self.names.output)

    @property
    def trailing(self) -> tuple[nn.Module, ...]:
        """What comes after the last Linear."""
        return tuple(map(self._at, self.names.trailing))

    @property
    def takes_rows(self) -> bool:
        """Whether the head is an MLP that takes inputs (..., D), row by row."""
        return isinstance(self.names.chain, Chain) and not self.names.chain.leading

    @property
    def widths(self) -> tuple[int, ...]:
        """Inputs, units of every activation, outputs: (D, H1, ..., C)."""
        if not isinstance(self.names.chain, Chain):
            return self.names.widths
        linears: list[Any] = [layer.linear for layer in self.hidden]
        return (int(linears[0].in_features), *(int(linear.out_features) for linear in linears), self.num_outputs)

    @property
    def num_outputs(self) -> int:
        """Outputs C of the last Linear."""
        return int(self.output.out_features) if hasattr(self.output, "out_features") else layer_sizes(self.output)[1]

    def _innermost(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the modules of the structure that hold no others."""
        for name, module in self.head.named_modules():
            kept = any(name == own or name.startswith(f"{own}.") for own in self.names.kept)
            if not kept and next(module.children(), None) is None:
                yield name, module

    def frozen_modules(self) -> list[nn.Module]:
        """List the modules of the structure that may compute something else in train mode, to be kept in eval mode."""
        return [module for _, module in self._innermost()]

    def structure_tensors(self) -> dict[str, Tensor]:
        """Return the parameters and buffers on which the inputs of the last Linear depend, by their names."""
        prefixes = tuple(f"{name}." for name in self.names.kept)
        named = {**dict(self.head.named_parameters()), **dict(self.head.named_buffers())}
        return {name: value for name, value in named.items() if not name.startswith(prefixes)}

    def structure_parameters(self) -> list[nn.Parameter]:
        """List the parameters on which the inputs of the last Linear depend."""
        return [value for value in self.structure_tensors().values() if isinstance(value, nn.Parameter)]

    def linearised_parameters(self) -> list[str]:
        """List the names of the parameters around which tangent paths expand: all but the last bias."""
        own = self.structure_tensors()
        output = [f"{self.names.output}.{name}" for name, _ in self.output.named_parameters() if name != "bias"]
        return [*(name for name in own if isinstance(own[name], nn.Parameter)), *output]


#: What was read of heads that are still as they were, so that a fit calls each once for it.
_READ: "WeakKeyDictionary[nn.Module, tuple[object, HeadNames]]" = WeakKeyDictionary()


def read_head(head: nn.Module, *args: Any, **kwargs: Any) -> HeadLayout:
    """Read the parts of a head from one real call of it.

    A head is a feature map with activations, and a last Linear. How its forward is written does not matter: control
    flow, flags, functions, views, layers side by side, residual links, what comes after the last Linear.

    Args:
        head: the head to read. It is called in eval mode without gradients, and as it was afterwards.
        *args: inputs to call it with; without any a few rows are made up.
        **kwargs: the same by name.

    Returns:
        The modules of the head (the very objects) by the part that they play.

    Raises:
        TypeError: if the head is not a module.
        ValueError: if it has no activation between two layers, or its last layer is not a Linear, is called twice or
            does not take what the other layers compute; or if no inputs are given and none can be made up.

    Example:
        >>> from torch import nn
        >>> layout = read_head(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)))
        >>> layout.widths
        (4, 8, 3)
    """
    if not isinstance(head, nn.Module):
        raise UserTypeError(f"Expected the head to be a module, but got {head!r}.")
    state = _state_of(head)
    known = _READ.get(head)
    if known is not None and known[0] == state:
        return known[1].find(head)
    _check_layers(head)
    names = _names_of(head, *record(head, args, kwargs)) if args or kwargs else _read_made_up(head)
    _READ[head] = (_state_of(head), names)
    return names.find(head)


def is_readable(head: nn.Module) -> bool:
    """Tell whether a head was read, or can be without a real call of it."""
    try:
        read_head(head)
    except CannotBeCalledError:
        return False
    return True


def read_recorded(head: nn.Module, recorder: CallRecorder) -> None:
    """Read the parts of a head from a call of it that was recorded.

    Raises:
        ValueError: as ``read_head``.
    """
    _check_layers(head)
    _READ[head] = (_state_of(head), _names_of(head, recorder.calls, "Tensor", recorder))


def copy_head(head: nn.Module, names: HeadNames) -> nn.Module:
    """Return a copy of a head for which what was read of the head holds too."""
    copied = copy.deepcopy(head)
    _READ[copied] = (_state_of(copied), names)
    return copied


def _state_of(head: nn.Module) -> object:
    """Return what a reading depends on: which modules there are, their settings, and which PReLU is trained."""
    return [
        (
            name,
            id(module),
            type(module),
            [setting for key, value in vars(module).items() if (setting := _setting(key, value)) is not None],
            [(key, None if p is None else (p.shape, p.requires_grad)) for key, p in module._parameters.items()]
            if isinstance(module, nn.PReLU)
            else [],
            "forward" in vars(module),
        )
        for name, module in head.named_modules()
    ]


def _setting(name: str, value: object) -> object:
    if name == "training":
        return None
    if isinstance(value, bool | int | float | str | None):
        return name, value
    return (name, id(value)) if callable(value) else None


def _check_layers(head: nn.Module) -> None:
    layers = [(name, module) for name, module in innermost(head) if is_layer(module)]
    if len(layers) < 2:
        raise UserValueError(
            "Expected a head with at least one hidden layer between two Linear layers, "
            f"but got `{type(head).__name__}` with {len(layers)} Linear."
        )
    for name, module in head.named_modules():
        if isinstance(module, nn.modules.lazy.LazyModuleMixin):
            raise UserValueError(
                f"Expected the layer at '{name}' to have a weight of a known shape, but got `{type(module).__name__}`."
            )


def _read_made_up(head: nn.Module) -> HeadNames:
    failed: Exception | None = None
    for inputs in made_up_inputs(head):
        try:
            return _names_of(head, *record(head, (inputs,) * count_required(head), {}))
        except UserValueError:
            raise
        except Exception as error:
            # What a forward expects is not known, so it may object in any way.
            failed = failed or error
    rest = _after_leading(head)
    if rest is None:
        raise CannotBeCalledError(
            f"Expected the forward of `{type(head).__name__}` to take one tensor of features, but a call with such "
            f"inputs failed ({failed}). `find_heads(module, batch)` reads it from a real call."
        )
    names = _read_made_up(rest)
    leading = tuple(name for name in head._modules if name not in rest._modules)
    chain = names.chain
    return replace(names, chain=replace(chain, leading=leading + chain.leading) if isinstance(chain, Chain) else chain)


def _after_leading(head: nn.Module) -> nn.Module | None:
    """Return a Sequential from its first part with a Linear on: what comes before may take images, or words."""
    if not isinstance(head, nn.Sequential) or type(head).forward is not nn.Sequential.forward:
        return None
    parts = [(name, part) for name, part in head._modules.items() if part is not None]
    holds_linear = [any(isinstance(module, nn.Linear) for module in part.modules()) for _, part in parts]
    first = holds_linear.index(True) if True in holds_linear else 0
    return nn.Sequential(OrderedDict(parts[first:])) if first else None


def _names_of(head: nn.Module, calls: Sequence[RecordedCall], returned: str, recorder: CallRecorder) -> HeadNames:
    layers = [position for position, call in enumerate(calls) if call.is_layer]
    kind = type(head).__name__
    if len(layers) < 2:
        raise UserValueError(f"Expected two layers of `{kind}` to be called, but {len(layers)} were.")
    last = layers[-1]
    output = calls[last]
    _check_output(head, output, [calls[position] for position in layers])
    beside = [calls[position].title for position in layers[:-1] if position not in output.feeds_on]
    if beside and output.feeds_on:
        raise UserValueError(
            f"Expected every layer of the head before its last Linear, at '{output.title}', to feed it, but got "
            f"'{beside[-1]}' beside it. Name each as a head of its own."
        )
    points = [point for point, at in zip(recorder.preactivations, recorder.positions, strict=True) if at < last]
    if not points:
        raise UserValueError(
            f"Expected an activation before the last Linear of `{kind}`, at '{output.title}', so that units have a "
            "pattern, but got none."
        )
    _check_norms(calls[:last])
    after = [
        (call, function_step(call) if call.module is None else call.module)
        for call in calls[last + 1 :]
        if call.follows or last in call.feeds_on
    ]
    final = recorder.positions[len(points) - 1]
    late = [call.name for call in calls[final:last] if isinstance(call.module, _DropoutNd)]
    early = {call.name for call in calls[:last]}
    kept = [output.name, *late, *(call.name for call in calls[last + 1 :] if call.module and call.name not in early)]
    channels = -1 if not isinstance(output.module, nn.Conv1d | nn.Conv2d | nn.Conv3d) else 1
    return HeadNames(
        output=output.name,
        kept=tuple(dict.fromkeys(kept)),
        trailing=(
            *(module if call.module is None else call.name for call, module in after if not does_nothing(module)),
            *(() if returned == "Tensor" else (FunctionStep(f"returned {returned}"),)),
        ),
        activations=tuple(recorder.kinds[: len(points)]),
        widths=(
            input_width(head, calls[layers[0]].module),
            *(point.shape[channels] for point in points),
            layer_sizes(output.module)[1],
        ),
        layers=tuple(calls[position].name for position in layers),
        products=tuple(math.prod(layer_sizes(calls[position].module)) for position in layers),
        chain=read_chain(kind, calls, returned),
    )


def record(
    head: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, training: bool = False
) -> tuple[list[RecordedCall], str, CallRecorder]:
    """Record a call of a head that leaves no trace.

    Returns:
        Its steps, the type of what it returns ('Tensor' for the result of the last step alone), and the recorder.
    """
    with unchanged(head), torch.no_grad(), in_mode([head], training), CallRecorder(head) as recorder:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        versions = [None if x.is_inference() else x._version for x in given]
        recorder.start(given)
        outputs = head.forward(*args, **kwargs)
        returned = recorder.type_of(outputs)
    if versions != [None if x.is_inference() else x._version for x in given]:
        _check_in_place(head, args, kwargs, given)
    return recorder.calls, returned, recorder


@torch.no_grad()
def _check_in_place(head: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], given: Sequence[Tensor]) -> None:
    """Check that a head which changes its inputs in place, as a ReLU does, changes them once."""
    before = [x.clone() for x in given]
    with unchanged(head), in_mode([head], False):
        head.forward(*args, **kwargs)
    if not all(map(torch.equal, before, given)):
        raise UserValueError(
            f"Expected the forward of `{type(head).__name__}` to leave its inputs as they are, but it changes them in "
            "place. Pass `inplace=False` to the module that it begins with."
        )


def _check_output(head: nn.Module, output: RecordedCall, layers: Sequence[RecordedCall]) -> None:
    module: Any = output.module
    if sum(call.module is module for call in layers) > 1:
        raise UserValueError("Expected every Linear of the head to be called once, but got one that is called twice.")
    own_forward = isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward
    if "forward" in vars(module) or (own_forward and not _maps_linearly(module)):
        raise UserValueError(
            f"Expected the Linear at '{output.title}' to compute x W^T + b, but got `{type(module).__name__}`."
        )
    if not module.weight.is_floating_point():
        raise UserValueError(
            f"Expected the Linear at '{output.title}' to hold real numbers, but got {module.weight.dtype}."
        )
    # With weight_norm the weight is none of the parameters.
    names = [name for name, own in head.named_parameters(remove_duplicate=False) if own is module.weight]
    if len(names) > 1:
        raise UserValueError(
            f"Expected the weight of the last Linear, at '{output.title}', to be its own, but got it as {names} too."
        )


@torch.no_grad()
def _maps_linearly(linear: nn.Linear) -> bool:
    """Tell whether a Linear with a forward of its own computes x W^T + b; one without numbers is taken at its word."""
    if linear.weight.is_meta:
        return True
    x = torch.randn(2, linear.in_features, generator=torch.Generator().manual_seed(0)).to(linear.weight)
    outputs = linear.forward(x)
    return torch.allclose(outputs, nn.functional.linear(x, linear.weight, linear.bias), rtol=1e-3, atol=1e-4)


def _check_norms(calls: Sequence[RecordedCall]) -> None:
    for call in calls:
        norm = call.module
        # Without running statistics outputs depend on the batch; with momentum=None they are the plain average over all
        # that was ever seen, far from what the head computes while it trains.
        if isinstance(norm, _BatchNorm) and (norm.running_mean is None or norm.momentum is None):
            setting = "track_running_stats=False" if norm.running_mean is None else "momentum=None"
            raise UserValueError(
                f"Expected the BatchNorm at '{call.title}' to keep running statistics with a momentum, so that it can "
                f"be frozen, but got {setting}."
            )


class in_mode:  # noqa: N801
    """Context in which modules and their children are in train or in eval mode; each gets its own mode back."""

    def __init__(self, modules: Sequence[nn.Module], training: bool) -> None:
        self._modes = [(child, child.training) for module in modules for child in module.modules()]
        self._training = training

    def __enter__(self) -> None:
        for module, _ in self._modes:
            module.training = self._training

    def __exit__(self, *_: object) -> None:
        for module, mode in self._modes:
            module.training = mode
