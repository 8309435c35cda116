"""A head as a chain of piecewise-linear layers, whose paths have a formula."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from glai_lightning.checks import UserValueError
from glai_lightning.heads.recording import RecordedCall

SUPPORTED = (
    "Paths with a formula are those of Linear, BatchNorm, ReLU, LeakyReLU, PReLU with a fixed slope and Dropout, in "
    "the order Linear, BatchNorm, activation, Dropout, with any modules after the last Linear."
)

#: The forwards that compute what a kind of module stands for.
_FORWARDS: dict[type[nn.Module], tuple[Any, ...]] = {
    nn.Linear: (nn.Linear.forward,),
    nn.ReLU: (nn.ReLU.forward,),
    nn.LeakyReLU: (nn.LeakyReLU.forward,),
    nn.PReLU: (nn.PReLU.forward,),
    nn.Identity: (nn.Identity.forward,),
    _BatchNorm: (_BatchNorm.forward, nn.SyncBatchNorm.forward),
    _DropoutNd: tuple(kind.forward for kind in (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)),
}
_RELUS = {F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}

#: A step of a head's forward: the qualified name of a module in it or, for a function, a module in its place.
Step = str | nn.Module


class FunctionStep(nn.Module):
    """Stands for a function that a forward calls.

    Args:
        function: its name.
    """

    def __init__(self, function: str) -> None:
        super().__init__()
        self.function = function

    def extra_repr(self) -> str:
        """Name the function."""
        return self.function


def title(module: nn.Module) -> str:
    """Return how messages call a step of a forward."""
    return module.function if isinstance(module, FunctionStep) else type(module).__name__


def function_step(call: RecordedCall) -> nn.Module:
    """Return the module that does what a function does, where there is a formula for it."""
    args, kwargs = call.arguments
    if call.function in _RELUS:
        return nn.ReLU()
    if call.function is F.leaky_relu:
        slope = args[1] if len(args) > 1 else kwargs.get("negative_slope", 0.01)
        if isinstance(slope, float | int):
            return nn.LeakyReLU(float(slope))
    return nn.Dropout() if call.function is F.dropout else FunctionStep(call.name)


@dataclass(frozen=True)
class HiddenLayer:
    """One hidden layer: the modules from a layer's input to its activations, and Dropout among and after them."""

    linear: nn.Module
    norm: nn.Module | None
    activation: nn.Module
    dropout: tuple[nn.Module, ...]


@dataclass(frozen=True)
class HiddenNames:
    """Where the modules of a hidden layer stand."""

    linear: str
    norm: str | None
    activation: Step
    dropout: tuple[str, ...]


@dataclass(frozen=True)
class Chain:
    """Where the steps before the last Linear of an MLP stand in it."""

    leading: tuple[Step, ...]
    hidden: tuple[HiddenNames, ...]


@dataclass(frozen=True)
class _Link:
    name: str
    module: nn.Module
    step: Step


def read_chain(kind: str, calls: Sequence[RecordedCall], returned: str) -> Chain | str:
    """Read the recorded steps of a forward as an MLP of piecewise-linear layers; or say why they are none."""
    try:
        return _read(kind, calls, returned)
    except UserValueError as error:
        return str(error)


def _read(kind: str, calls: Sequence[RecordedCall], returned: str) -> Chain:
    for call in calls:
        if not call.follows:
            raise UserValueError(
                f"Expected the forward of `{kind}` to be one chain of modules, but `{call.name}` does not take the "
                f"output of the step before it alone. {SUPPORTED}"
            )
    if returned != "Tensor":
        raise UserValueError(
            f"Expected the forward of `{kind}` to return the result of its last step, but got {returned}. {SUPPORTED}"
        )
    links = [
        _Link(call.name, module, call.name if call.module is not None else module)
        for call in calls
        if not does_nothing(module := function_step(call) if call.module is None else call.module)
    ]
    linears = [position for position, link in enumerate(links) if isinstance(link.module, nn.Linear)]
    if len(linears) < 2 or len({id(links[position].module) for position in linears}) < len(linears):
        raise UserValueError(f"Expected two or more Linear layers that are called once each. {SUPPORTED}")
    hidden = tuple(_read_hidden_layer(links[start:end]) for start, end in itertools.pairwise(linears))
    for before, after in itertools.pairwise(links[position] for position in linears):
        _check_width(after, after.module.in_features, before)
    leading = tuple(link.step for link in links[: linears[0]] if not _is_dropout(link))
    for link in (*links[: linears[0]], *links[linears[-1] + 1 :]):
        if isinstance(link.module, FunctionStep):
            raise UserValueError(
                f"Expected the forward of `{kind}` to call modules, relu, leaky_relu and dropout only, but it calls "
                f"`{link.module.function}`. {SUPPORTED}"
            )
    return Chain(leading, hidden)


def _read_hidden_layer(links: Sequence[_Link]) -> HiddenNames:
    linear = links[0]
    _check_linear(linear)
    norm: str | None = None
    activation: Step | None = None
    dropout: list[str] = []
    for link in links[1:]:
        module = link.module
        if _is_dropout(link):
            dropout += [link.step] if isinstance(link.step, str) else []
            continue
        if activation is None and norm is None and _is_plain(module, _BatchNorm):
            _check_width(link, module.num_features, linear)
            norm = link.name
        elif activation is None and _is_plain(module, nn.ReLU, nn.LeakyReLU, nn.PReLU):
            _check_slope(link, linear)
            activation = link.step
        else:
            expected = (
                "the activation after a Linear to be piecewise linear with two pieces "
                "(ReLU, LeakyReLU, PReLU with a fixed slope), so that its paths are a sum"
                if activation is None
                else "nothing but Dropout between an activation and the next Linear"
            )
            raise UserValueError(f"Expected {expected}, but got `{title(module)}` at '{link.name}'. {SUPPORTED}")
    if activation is None:
        raise UserValueError(
            "Expected an activation with two linear pieces (ReLU, LeakyReLU, PReLU with a fixed slope) after the "
            f"Linear at '{linear.name}', but got none before the next Linear. {SUPPORTED}"
        )
    return HiddenNames(linear.name, norm, activation, tuple(dropout))


def _is_plain(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Tell whether a module does what its kind does; a subclass with a forward of its own may do anything."""
    forward = module.__dict__.get("forward", type(module).forward)
    return any(isinstance(module, kind) and forward in _FORWARDS[kind] for kind in kinds)


def _is_dropout(link: _Link) -> bool:
    return _is_plain(link.module, _DropoutNd)


def does_nothing(module: nn.Module) -> bool:
    """Tell whether a module returns what it is given, whatever the mode."""
    return _is_plain(module, nn.Identity) or (_is_plain(module, _DropoutNd) and getattr(module, "p", None) == 0.0)


def _check_linear(link: _Link) -> None:
    # A weight that is computed from others (weight_norm, spectral_norm, a parametrization) cannot be frozen or set.
    if not _is_plain(link.module, nn.Linear) or "weight" not in link.module._parameters:
        raise UserValueError(
            f"Expected the Linear at '{link.name}' to compute x W^T + b with a weight that is a parameter, "
            f"but got `{type(link.module).__name__}`."
        )


def _check_width(link: _Link, width: Any, linear: _Link) -> None:
    units = linear.module.out_features
    if width != units:
        raise UserValueError(
            f"Expected the module at '{link.name}' to be for the {units} units of its layer, but got one for {width}."
        )


def _check_slope(link: _Link, linear: _Link) -> None:
    prelu = link.module
    if not isinstance(prelu, nn.PReLU):
        return
    if prelu.weight.requires_grad:
        raise UserValueError(
            f"Expected the slope of the PReLU at '{link.name}' to be fixed (requires_grad=False), "
            "but got a slope that is trained."
        )
    if prelu.num_parameters > 1:
        _check_width(link, prelu.num_parameters, linear)
