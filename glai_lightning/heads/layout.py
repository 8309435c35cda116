"""Reading a head: which Linear, normalisation and activation follow one another, whatever class wraps them."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

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

_RELU_FUNCTIONS = {F.relu, F.relu_, torch.relu, torch.relu_}
_RELU_METHODS = {"relu", "relu_"}


@dataclass(frozen=True)
class HiddenLayer:
    """One hidden layer: the modules between a layer's input and its activations."""

    linear: nn.Linear
    norm: _BatchNorm | None
    activation: nn.ReLU | nn.LeakyReLU | nn.PReLU

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that decide which of the layer's units fire."""
        yield from self.linear.parameters()
        if self.norm is not None:
            yield from self.norm.parameters()


@dataclass(frozen=True)
class HeadLayout:
    """The modules of a head, in the order in which its forward calls them.

    Dropout between the modules is left out: it has no part in the function that the head computes in eval mode.
    """

    leading: tuple[nn.Module, ...]
    hidden: tuple[HiddenLayer, ...]
    output: nn.Linear
    output_name: str
    trailing: tuple[nn.Module, ...]

    @property
    def widths(self) -> tuple[int, ...]:
        """Inputs, units of every hidden layer, outputs: (D, H1, ..., C)."""
        hidden = tuple(layer.linear.out_features for layer in self.hidden)
        return (self.hidden[0].linear.in_features, *hidden, self.output.out_features)

    def norms(self) -> list[_BatchNorm]:
        """List the modules that are a BatchNorm."""
        hidden = [layer.norm for layer in self.hidden]
        return [module for module in (*self.leading, *hidden, *self.trailing) if isinstance(module, _BatchNorm)]

    def with_norms(self, replaced: Mapping[_BatchNorm, _BatchNorm]) -> "HeadLayout":
        """Return the layout with others in the place of some BatchNorms."""

        def follow(module: nn.Module) -> nn.Module:
            return replaced.get(module, module) if isinstance(module, _BatchNorm) else module

        hidden = (
            layer if layer.norm is None else replace(layer, norm=replaced.get(layer.norm, layer.norm))
            for layer in self.hidden
        )
        return replace(
            self,
            leading=tuple(follow(module) for module in self.leading),
            hidden=tuple(hidden),
            trailing=tuple(follow(module) for module in self.trailing),
        )

    def frozen_modules(self) -> list[nn.Module]:
        """List the modules before the last Linear that compute otherwise in training, unless they are in eval mode."""
        return [*self.leading, *(layer.norm for layer in self.hidden if layer.norm is not None)]

    def structure_parameters(self) -> list[nn.Parameter]:
        """List the parameters on which the activation patterns depend, leading modules included."""
        leading = [parameter for module in self.leading for parameter in module.parameters()]
        return leading + [parameter for layer in self.hidden for parameter in layer.parameters()]


def read_head(head: nn.Module) -> HeadLayout:
    """Read the layers of an MLP head from what its forward does, not from its class.

    ``nn.Sequential`` is read as it stands, nested too. Any other class is traced symbolically, and accepted if its
    forward is one chain of modules and functional ReLUs: ``torchvision.ops.MLP``, lightly's projection heads, timm's
    ``Mlp``, and classes of one's own.

    Args:
        head: the head to read. It is neither run nor changed.

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
    steps = [(name, module) for name, module in _chain(head, "") if not _does_nothing(module)]
    linears = [position for position, (_, module) in enumerate(steps) if isinstance(module, nn.Linear)]
    if len(linears) < 2:
        raise UserValueError(
            "Expected the head to be an MLP with at least one hidden layer between two Linear layers, "
            f"but got `{type(head).__name__}` with {len(linears)} Linear. {SUPPORTED}"
        )
    if len({id(steps[position][1]) for position in linears}) < len(linears):
        raise UserValueError("Expected every Linear of the head to be called once, but got one that is called twice.")
    hidden = tuple(_read_hidden_layer(steps[start:end]) for start, end in itertools.pairwise(linears))
    output_name, output = steps[linears[-1]]
    _check_linear(output_name, output)
    assert isinstance(output, nn.Linear)
    for layer, (name, following) in zip(hidden, (steps[position] for position in linears[1:]), strict=True):
        assert isinstance(following, nn.Linear)
        if following.in_features != layer.linear.out_features:
            raise UserValueError(
                f"Expected the Linear at '{name}' to take the {layer.linear.out_features} units of the layer before, "
                f"but got one that takes {following.in_features}."
            )
    return HeadLayout(
        leading=tuple(module for _, module in steps[: linears[0]] if not isinstance(module, _DropoutNd)),
        hidden=hidden,
        output=output,
        output_name=output_name,
        trailing=tuple(module for _, module in steps[linears[-1] + 1 :]),
    )


def _read_hidden_layer(steps: Sequence[tuple[str, nn.Module]]) -> HiddenLayer:
    linear_name, linear = steps[0]
    _check_linear(linear_name, linear)
    norm: _BatchNorm | None = None
    activation: nn.Module | None = None
    for name, module in steps[1:]:
        if isinstance(module, _DropoutNd):
            continue
        if activation is None and norm is None and isinstance(module, _BatchNorm):
            _check_norm(name, module)
            _check_width(name, module.num_features, linear)
            norm = module
        elif activation is None and isinstance(module, nn.ReLU | nn.LeakyReLU | nn.PReLU):
            _check_slope(name, module)
            if isinstance(module, nn.PReLU) and module.num_parameters > 1:
                _check_width(name, module.num_parameters, linear)
            activation = module
        else:
            raise UserValueError(_unexpected(name, module, after_activation=activation is not None))
    if activation is None:
        raise UserValueError(
            "Expected an activation with two linear pieces (ReLU, LeakyReLU, PReLU with a fixed slope) after the "
            f"Linear at '{linear_name}', but got none before the next Linear. {SUPPORTED}"
        )
    assert isinstance(linear, nn.Linear)
    assert isinstance(activation, nn.ReLU | nn.LeakyReLU | nn.PReLU)
    return HiddenLayer(linear, norm, activation)


def _unexpected(name: str, module: nn.Module, *, after_activation: bool) -> str:
    if after_activation:
        expected = "nothing but Dropout between an activation and the next Linear"
    else:
        expected = (
            "the activation after a Linear to be piecewise linear with two pieces "
            "(ReLU, LeakyReLU, PReLU with a fixed slope), so that its units have an activation pattern"
        )
    return f"Expected {expected}, but got `{type(module).__name__}` at '{name}'. {SUPPORTED}"


def _check_linear(name: str, module: nn.Module) -> None:
    # A weight that is computed from others (weight_norm, spectral_norm, a parametrization) cannot be frozen or set.
    plain = type(module).forward is nn.Linear.forward and "weight" in module._parameters
    if not plain or isinstance(module, nn.LazyLinear):
        raise UserValueError(
            f"Expected the Linear at '{name}' to compute x W^T + b with a weight that is a parameter of a known shape, "
            f"but got `{type(module).__name__}`."
        )
    assert isinstance(module, nn.Linear)
    if not module.weight.is_floating_point():
        raise UserValueError(f"Expected the Linear at '{name}' to hold real numbers, but got {module.weight.dtype}.")


def _check_width(name: str, width: int, linear: nn.Module) -> None:
    assert isinstance(linear, nn.Linear)
    if width != linear.out_features:
        raise UserValueError(
            f"Expected the module at '{name}' to be for the {linear.out_features} units of its layer, "
            f"but got one for {width}."
        )


def _check_norm(name: str, norm: _BatchNorm) -> None:
    # Without running statistics there is no fixed affine map to fold; with momentum=None they are the plain average
    # over all that was ever seen, far from what the head computes while it trains.
    if norm.running_mean is None or norm.momentum is None:
        setting = "track_running_stats=False" if norm.running_mean is None else "momentum=None"
        raise UserValueError(
            f"Expected the BatchNorm at '{name}' to keep running statistics with a momentum, so that it can be "
            f"folded into the frozen structure, but got {setting}."
        )


def _check_slope(name: str, activation: nn.Module) -> None:
    if isinstance(activation, nn.PReLU) and activation.weight.requires_grad:
        raise UserValueError(
            f"Expected the slope of the PReLU at '{name}' to be fixed (requires_grad=False), "
            "but got a slope that is trained."
        )


def _does_nothing(module: nn.Module) -> bool:
    return isinstance(module, nn.Identity) or (isinstance(module, _DropoutNd) and module.p == 0.0)


def _contains_linear(module: nn.Module) -> bool:
    return any(isinstance(child, nn.Linear) for child in module.modules())


def _chain(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that the forward calls, in order, with their qualified names."""
    if isinstance(module, nn.Linear) or not _contains_linear(module):
        yield name, module
    elif isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
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


def _traced_chain(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    kind = type(module).__name__
    where = f"`{kind}` at '{name}'" if name else f"`{kind}`"
    try:
        graph = _ChainTracer().trace(module)
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
            yield f"{name}.{target}" if name else target, module.get_submodule(target)
        elif node.op in ("call_function", "call_method"):
            yield node.name, _functional_step(node, where)
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
