"""Reading a head: which Linear, normalisation and activation follow one another, whatever class wraps them."""

import copy
import inspect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.fx
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from glai_lightning.checks import UserTypeError, UserValueError

SUPPORTED = (
    "Supported are Linear, BatchNorm, ReLU, LeakyReLU, PReLU with a fixed slope and Dropout, in the order "
    "Linear, BatchNorm, activation, Dropout, with any modules after the last Linear."
)

#: The forwards that compute what a kind of module stands for.
_FORWARDS: dict[type[nn.Module], tuple[Any, ...]] = {
    nn.ReLU: (nn.ReLU.forward,),
    nn.LeakyReLU: (nn.LeakyReLU.forward,),
    nn.PReLU: (nn.PReLU.forward,),
    nn.Identity: (nn.Identity.forward,),
    _BatchNorm: (_BatchNorm.forward, nn.SyncBatchNorm.forward),
    _DropoutNd: tuple(kind.forward for kind in (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)),
}
_RELU_FUNCTIONS = {F.relu, F.relu_, torch.relu, torch.relu_}
_RELU_METHODS = {"relu", "relu_"}


#: A step of a head's forward: the qualified name of a module in it or, for a function, a module that does the same.
Step = str | nn.Module


@dataclass(frozen=True)
class HiddenLayer:
    """One hidden layer: the modules between a layer's input and its activations."""

    linear: nn.Module
    norm: nn.Module | None
    activation: nn.Module

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that decide which of the layer's units fire."""
        yield from self.linear.parameters()
        if self.norm is not None:
            yield from self.norm.parameters()


@dataclass(frozen=True)
class HeadLayout:
    """The modules of a head, in the order in which its forward calls them.

    Dropout has no part in the function that a head computes in eval mode. It is listed apart: ``inner_dropout`` stands
    before the last hidden activation, and stops with the structure.
    """

    names: "HeadNames"
    leading: tuple[nn.Module, ...]
    hidden: tuple[HiddenLayer, ...]
    output: nn.Linear
    trailing: tuple[nn.Module, ...]
    inner_dropout: tuple[nn.Module, ...]

    @property
    def widths(self) -> tuple[int, ...]:
        """Inputs, units of every hidden layer, outputs: (D, H1, ..., C)."""
        linears = [layer.linear for layer in self.hidden]
        return (_size(linears[0].in_features), *(_size(linear.out_features) for linear in linears), self.num_outputs)

    @property
    def num_outputs(self) -> int:
        """Outputs C of the last Linear."""
        return self.output.out_features

    def frozen_modules(self) -> list[nn.Module]:
        """List the modules of the structure that compute something else in train mode, to be kept in eval mode."""
        norms = [layer.norm for layer in self.hidden if layer.norm is not None]
        return [*self.leading, *norms, *self.inner_dropout]

    def structure_parameters(self) -> list[nn.Parameter]:
        """List the parameters on which the activation patterns depend, leading modules included."""
        leading = [parameter for module in self.leading for parameter in module.parameters()]
        return leading + [parameter for layer in self.hidden for parameter in layer.parameters()]


@dataclass(frozen=True)
class _HiddenNames:
    linear: str
    norm: str | None
    activation: Step


@dataclass(frozen=True)
class HeadNames:
    """Where the steps of a head stand in it, by qualified names, which outlive a module that is replaced."""

    leading: tuple[Step, ...]
    hidden: tuple[_HiddenNames, ...]
    output: str
    trailing: tuple[Step, ...]
    inner_dropout: tuple[Step, ...]

    def find(self, head: nn.Module) -> HeadLayout:
        """Return the modules that stand at these names now."""

        def at(step: Step) -> nn.Module:
            return head.get_submodule(step) if isinstance(step, str) else step

        return HeadLayout(
            names=self,
            leading=tuple(map(at, self.leading)),
            hidden=tuple(
                HiddenLayer(at(layer.linear), None if layer.norm is None else at(layer.norm), at(layer.activation))
                for layer in self.hidden
            ),
            output=cast(nn.Linear, at(self.output)),
            trailing=tuple(map(at, self.trailing)),
            inner_dropout=tuple(map(at, self.inner_dropout)),
        )


def read_head(head: nn.Module, *, training: bool = False) -> HeadLayout:
    """Read the layers of an MLP head from what its forward does, not from its class.

    ``nn.Sequential`` is read as it stands, nested too. Any other class is traced symbolically, and accepted if its
    forward is one chain of modules and functional ReLUs: ``torchvision.ops.MLP``, lightly's projection heads, timm's
    ``Mlp``, and classes of your own.

    Args:
        head: the head to read. It is neither run nor changed.
        training: whether to read what it does in train mode instead of eval mode.

    Returns:
        The modules of the head (the very objects) by the part that they play.

    Raises:
        TypeError: if the head is not a module.
        ValueError: if the head is not an MLP of piecewise-linear layers; the message names the module at fault.

    Example:
        >>> from torch import nn
        >>> layout = read_head(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)))
        >>> layout.widths
        (4, 8, 3)
    """
    if not isinstance(head, nn.Module):
        raise UserTypeError(f"Expected the head to be a module, but got {head!r}.")
    with in_mode([head], training):
        steps = [step for step in _chain(head, "") if not _does_nothing(step.module)]
    linears = [position for position, step in enumerate(steps) if isinstance(step.module, nn.Linear)]
    if len(linears) < 2:
        raise UserValueError(
            "Expected the head to be an MLP with at least one hidden layer between two Linear layers, "
            f"but got `{type(head).__name__}` with {len(linears)} Linear. {SUPPORTED}"
        )
    if len({id(steps[position].module) for position in linears}) < len(linears):
        raise UserValueError("Expected every Linear of the head to be called once, but got one that is called twice.")
    hidden = tuple(_read_hidden_layer(steps[start:end]) for start, end in itertools.pairwise(linears))
    _check_linear(steps[linears[-1]])
    for before, after in itertools.pairwise(steps[position] for position in linears):
        _check_inputs(before, after)
    return HeadNames(
        leading=tuple(step.place for step in steps[: linears[0]] if not _is_dropout(step)),
        hidden=hidden,
        output=steps[linears[-1]].name,
        trailing=tuple(step.place for step in steps[linears[-1] + 1 :]),
        inner_dropout=tuple(step.place for step in steps[: linears[-2]] if _is_dropout(step)),
    ).find(head)


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


@dataclass(frozen=True)
class _Call:
    """A step as the forward makes it: where it stands, or how it is called there, and what it does."""

    name: str
    module: nn.Module
    is_function: bool = False

    @property
    def place(self) -> Step:
        return self.module if self.is_function else self.name


def _read_hidden_layer(steps: Sequence[_Call]) -> _HiddenNames:
    linear = steps[0]
    _check_linear(linear)
    norm: str | None = None
    activation: Step | None = None
    for step in steps[1:]:
        module = step.module
        if _is_dropout(step):
            continue
        if activation is None and norm is None and _is_plain(module, _BatchNorm):
            _check_norm(step)
            _check_width(step, module.num_features, linear)
            norm = step.name
        elif activation is None and _is_plain(module, nn.ReLU, nn.LeakyReLU, nn.PReLU):
            _check_slope(step)
            if isinstance(module, nn.PReLU) and module.num_parameters > 1:
                _check_width(step, module.num_parameters, linear)
            activation = step.place
        else:
            raise UserValueError(_unexpected(step, after_activation=activation is not None))
    if activation is None:
        raise UserValueError(
            "Expected an activation with two linear pieces (ReLU, LeakyReLU, PReLU with a fixed slope) after the "
            f"Linear at '{linear.name}', but got none before the next Linear. {SUPPORTED}"
        )
    return _HiddenNames(linear.name, norm, activation)


def _is_plain(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Tell whether a module does what its kind does; a subclass with a forward of its own may do anything."""
    return any(isinstance(module, kind) and _forward_of(module) in _FORWARDS[kind] for kind in kinds)


def _forward_of(module: nn.Module) -> Any:
    return module.__dict__.get("forward", type(module).forward)


def _is_dropout(step: _Call) -> bool:
    return _is_plain(step.module, _DropoutNd)


def _size(size: Any) -> int:
    return int(size)


def _unexpected(step: _Call, *, after_activation: bool) -> str:
    if after_activation:
        expected = "nothing but Dropout between an activation and the next Linear"
    else:
        expected = (
            "the activation after a Linear to be piecewise linear with two pieces "
            "(ReLU, LeakyReLU, PReLU with a fixed slope), so that its units have an activation pattern"
        )
    return f"Expected {expected}, but got `{type(step.module).__name__}` at '{step.name}'. {SUPPORTED}"


def _check_linear(step: _Call) -> None:
    module = step.module
    # A weight that is computed from others (weight_norm, spectral_norm, a parametrization) cannot be frozen or set.
    plain = _forward_of(module) is nn.Linear.forward and "weight" in module._parameters
    if not plain or isinstance(module, nn.LazyLinear):
        raise UserValueError(
            f"Expected the Linear at '{step.name}' to compute x W^T + b with a weight that is a parameter of a known "
            f"shape, but got `{type(module).__name__}`."
        )
    assert isinstance(module, nn.Linear)
    if not module.weight.is_floating_point():
        raise UserValueError(
            f"Expected the Linear at '{step.name}' to hold real numbers, but got {module.weight.dtype}."
        )


def _check_inputs(before: _Call, after: _Call) -> None:
    units, inputs = before.module.out_features, after.module.in_features
    if units != inputs:
        raise UserValueError(
            f"Expected the Linear at '{after.name}' to take the {units} units of the layer before, "
            f"but got one that takes {inputs}."
        )


def _check_width(step: _Call, width: Any, linear: _Call) -> None:
    units = linear.module.out_features
    if width != units:
        raise UserValueError(
            f"Expected the module at '{step.name}' to be for the {units} units of its layer, but got one for {width}."
        )


def _check_norm(step: _Call) -> None:
    norm = step.module
    # Without running statistics there is no fixed affine map to fold; with momentum=None they are the plain average
    # over all that was ever seen, far from what the head computes while it trains.
    if norm.running_mean is None or norm.momentum is None:
        setting = "track_running_stats=False" if norm.running_mean is None else "momentum=None"
        raise UserValueError(
            f"Expected the BatchNorm at '{step.name}' to keep running statistics with a momentum, so that it can be "
            f"folded into the frozen structure, but got {setting}."
        )


def _check_slope(step: _Call) -> None:
    if isinstance(step.module, nn.PReLU) and step.module.weight.requires_grad:
        raise UserValueError(
            f"Expected the slope of the PReLU at '{step.name}' to be fixed (requires_grad=False), "
            "but got a slope that is trained."
        )


def _does_nothing(module: nn.Module) -> bool:
    return _is_plain(module, nn.Identity) or (_is_plain(module, _DropoutNd) and getattr(module, "p", None) == 0.0)


def _contains_linear(module: nn.Module) -> bool:
    return any(isinstance(child, nn.Linear) for child in module.modules())


def _chain(module: nn.Module, name: str) -> Iterator[_Call]:
    """Yield the steps of a forward, in order, with the qualified names of their modules."""
    if isinstance(module, nn.Linear) or not _contains_linear(module):
        yield _Call(name, module)
    elif isinstance(module, nn.Sequential) and _forward_of(module) is nn.Sequential.forward:
        # Not `named_children`, which passes over a ReLU that is used a second time.
        for child_name, child in module._modules.items():
            if child is not None:
                yield from _chain(child, f"{name}.{child_name}" if name else child_name)
    else:
        yield from _traced_chain(module, name)


class _ChainTracer(torch.fx.Tracer):
    """Steps into whatever holds a Linear, and takes the rest as it is."""

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return isinstance(module, nn.Linear) or not _contains_linear(module)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """Leave every argument after the first at its default, where it has one."""
        function, arguments = super().create_args_for_root(root_fn, is_module, concrete_args)
        defaults = [parameter.default for parameter in inspect.signature(root_fn).parameters.values()]
        kept = [
            given if position < 2 or default is inspect.Parameter.empty else default
            for position, (given, default) in enumerate(zip(arguments, defaults, strict=False))
        ]
        return function, kept + arguments[len(kept) :]


def _traced_chain(module: nn.Module, name: str) -> Iterator[_Call]:
    kind = type(module).__name__
    where = f"`{kind}` at '{name}'" if name else f"`{kind}`"
    try:
        # A copy, which shares the children: the forward may set attributes, as counters do.
        graph = _ChainTracer().trace(copy.copy(module))
    except Exception as error:
        raise UserValueError(
            f"Expected the forward of {where} to be one chain of modules, but it could not be traced ({error}). "
            f"{SUPPORTED}"
        ) from error
    previous: torch.fx.Node | None = None
    for node in graph.nodes:
        if node.op == "placeholder":
            previous = previous or node
            continue
        inputs = list(node.args) if node.op == "output" else list(node.all_input_nodes)
        if inputs != [previous]:
            raise UserValueError(
                f"Expected the forward of {where} to be one chain of modules, "
                f"but `{node.name}` does not take the output of the step before it alone. {SUPPORTED}"
            )
        if node.op == "call_module":
            target = str(node.target)
            yield _Call(f"{name}.{target}" if name else target, module.get_submodule(target))
        elif node.op in ("call_function", "call_method"):
            yield _Call(node.name, _functional_step(node, where), is_function=True)
        previous = node


def _functional_step(node: torch.fx.Node, where: str) -> nn.Module:
    if node.target in _RELU_FUNCTIONS or (node.op == "call_method" and node.target in _RELU_METHODS):
        return nn.ReLU()
    if node.target is F.leaky_relu:
        slope = node.args[1] if len(node.args) > 1 else node.kwargs.get("negative_slope", 0.01)
        if not isinstance(slope, float | int):
            raise UserValueError(f"Expected the slope of the leaky_relu in {where} to be a number, but got {slope!r}.")
        return nn.LeakyReLU(float(slope))
    if node.target is F.dropout:
        return nn.Dropout()
    called = getattr(node.target, "__name__", str(node.target))
    raise UserValueError(
        f"Expected the forward of {where} to call modules, relu, leaky_relu and dropout only, "
        f"but it calls `{called}`. {SUPPORTED}"
    )
