"""Modules described in primitives and tensors, so that a checkpoint can make them again.

A description names a class of ``torch.nn`` or of this package, the arguments of its constructor, and which parameters
are not trained. No other class is ever made of one: it may come from any file.
"""

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from glai_lightning.checks import UserValueError

#: Where described classes are found, by the beginning of their ``__module__``.
_HOMES = {
    "torch.nn.modules": "torch.nn",
    "glai_lightning.heads": "glai_lightning.heads",
    "glai_lightning.backbones": "glai_lightning.backbones",
}
_PRIMITIVES = (bool, int, float, str, type(None))


def describe(module: nn.Module) -> dict[str, Any] | None:
    """Describe a module: a layer of ``torch.nn``, an ``nn.Sequential`` of such, or a backbone of this package.

    Args:
        module: any module; its weights do not matter.

    Returns:
        The description, or ``None`` for a module that holds something else.

    Example:
        >>> describe(nn.Linear(4, 3))
        {'class': 'torch.nn.Linear', 'arguments': {'in_features': 4, 'out_features': 3, 'bias': True}}
    """
    name = _name_of(type(module))
    if name is None:
        return None
    if isinstance(module, nn.Sequential):
        layers = {child: describe(layer) for child, layer in module.named_children()}
        return None if None in layers.values() else {"class": name, "layers": layers}
    if hasattr(module, "from_description"):
        return {"class": name, "description": module.description()}  # type: ignore[operator]
    if list(module.children()) or any(is_lazy(parameter) for parameter in module.parameters()):
        return None
    arguments = {
        argument: _plain(getattr(module, argument, inspect.Parameter.empty))
        for argument in inspect.signature(type(module).__init__).parameters
        if argument not in ("self", "device", "dtype", "args", "kwargs")
    }
    if not all(_is_plain(value) for value in arguments.values()):
        return None
    description: dict[str, Any] = {"class": name, "arguments": arguments}
    if fixed := [key for key, parameter in module.named_parameters() if not parameter.requires_grad]:
        description["fixed"] = fixed
    return description if _describes(description, module) else None


def build(description: object, *, most_numbers: int | None = None) -> nn.Module:
    """Make the module that a description is of, with weights of its own.

    Args:
        description: what ``describe`` returned, maybe from a file.
        most_numbers: how many numbers the weights of a module made of layers may be; ``None`` for no limit.

    Raises:
        ValueError: if it is not the description of a module that may be made, or one of more weights.

    Example:
        >>> build(describe(nn.Sequential(nn.Linear(4, 8), nn.ReLU())))
        Sequential(
          (0): Linear(in_features=4, out_features=8, bias=True)
          (1): ReLU()
        )
    """
    if not isinstance(description, Mapping) or not isinstance(description.get("class"), str):
        raise UserValueError(f"Expected the description of a module in the checkpoint, but got {description!r}.")
    kind = _class_of(description["class"])
    if most_numbers is not None and not hasattr(kind, "from_description"):
        with torch.device("meta"):
            numbers = sum(parameter.numel() for parameter in build(description).parameters())
        if numbers > most_numbers:
            raise UserValueError(
                f"Expected the checkpoint to describe a module of at most the {most_numbers:,} numbers that it holds, "
                f"but got one of {numbers:,}."
            )
    try:
        if kind is nn.Sequential:
            layers = nn.Sequential()
            for name, layer in description["layers"].items():
                layers.add_module(name, build(layer))
            return layers
        if hasattr(kind, "from_description"):
            made: nn.Module = kind.from_description(description["description"])
            return made
        module: nn.Module = kind(**description["arguments"])
        for key in description.get("fixed", ()):
            module.get_parameter(key).requires_grad_(False)
        return module
    except (TypeError, KeyError, AttributeError, RuntimeError, ValueError) as error:
        if isinstance(error, UserValueError):
            raise
        raise UserValueError(
            f"Expected the checkpoint to describe a `{description['class']}`, but it cannot be made: {error}"
        ) from error


def _describes(description: dict[str, Any], module: nn.Module) -> bool:
    """Tell whether a description makes a module of the same kind and sizes; its weights take no memory."""
    try:
        with torch.device("meta"):
            made = build(description)
    except UserValueError:
        return False
    shapes, own = ([(key, entry.shape) for key, entry in m.state_dict().items()] for m in (made, module))
    return shapes == own and made.extra_repr() == module.extra_repr()


def _name_of(kind: type[nn.Module]) -> str | None:
    for beginning, home in _HOMES.items():
        if f"{kind.__module__}.".startswith(f"{beginning}."):
            name = f"{home}.{kind.__name__}"
            return name if _find(name) is kind else None
    return None


def _class_of(name: str) -> Any:
    kind = _find(name)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)) or _name_of(kind) != name:
        raise UserValueError(
            f"Expected the checkpoint to hold modules of `torch.nn` or of this package, but it names {name!r}."
        )
    return kind


def _find(name: str) -> Any:
    home, _, kind = name.rpartition(".")
    return getattr(importlib.import_module(home), kind, None) if home in _HOMES.values() else None


def _plain(value: Any) -> Any:
    """Return the argument that made an attribute: layers keep a bias as a parameter, sizes as tuples."""
    if isinstance(value, Tensor):
        return True
    return list(value) if isinstance(value, tuple) else value


def _is_plain(value: Any) -> bool:
    return isinstance(value, _PRIMITIVES) or (
        isinstance(value, list) and all(isinstance(v, _PRIMITIVES) for v in value)
    )
