"""Loading a state dict completely or not at all, whatever file it comes from."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from glai_lightning.checks import UserTypeError, UserValueError

_REGISTRIES = ("_parameters", "_buffers", "_modules")


class Snapshot:
    """What a module is now: its modules, parameters, gradients, numbers, modes and attributes.

    It holds a copy of the module's tensors.

    Args:
        module: the module that ``put_back`` is to make what it was.
    """

    def __init__(self, module: nn.Module) -> None:
        modules = list(module.modules())
        self._attributes = [(child, dict(vars(child))) for child in modules]
        registries = [vars(child)[name] for child in modules for name in _REGISTRIES]
        self._registries = [(registry, dict(registry)) for registry in registries]
        self._parameters = [(p, p.requires_grad, p.grad) for p in module.parameters()]
        tensors = [t for t in chain(module.parameters(), module.buffers()) if not is_lazy(t)]
        self._numbers = [(tensor, tensor.detach().clone()) for tensor in tensors]

    def put_back(self) -> None:
        """Make the module what it was."""
        for child, attributes in self._attributes:
            vars(child).clear()
            vars(child).update(attributes)
        for registry, entries in self._registries:
            registry.clear()
            registry.update(entries)
        with torch.no_grad():
            for tensor, numbers in self._numbers:
                tensor.copy_(numbers)
        for parameter, required, gradient in self._parameters:
            parameter.requires_grad_(required)
            parameter.grad = gradient


@contextmanager
def unchanged_on_error(module: nn.Module) -> Iterator[None]:
    """Context that leaves a module as it was if an error ends it.

    ``load_state_dict`` by itself reads what fits before it raises for what does not. A copy of the module's tensors is
    held for the time of the context.

    Example:
        >>> linear = nn.Linear(2, 2)
        >>> before = linear.weight.clone()
        >>> try:
        ...     with unchanged_on_error(linear):
        ...         _ = linear.load_state_dict({"weight": torch.zeros(2, 2)})
        ... except RuntimeError:
        ...     print(torch.equal(linear.weight, before))
        True
    """
    before = Snapshot(module)
    try:
        yield
    except BaseException:
        before.put_back()
        raise


def check_state_dict(state_dict: object) -> None:
    """Check that something is built like a state dict; it may come from any file.

    Raises:
        TypeError: if it is not a mapping.
        ValueError: if its keys or its metadata are not those of a state dict.
    """
    if not isinstance(state_dict, Mapping):
        raise UserTypeError(f"Expected the state dict to be a mapping, but got `{type(state_dict).__name__}`.")
    wrong = [key for key in state_dict if not isinstance(key, str)]
    if wrong:
        raise UserValueError(f"Expected the keys of the state dict to be strings, but got {wrong}.")
    metadata: Any = getattr(state_dict, "_metadata", None)
    if metadata is None:
        return
    if not isinstance(metadata, Mapping) or not all(isinstance(entry, Mapping) for entry in metadata.values()):
        raise UserValueError(
            f"Expected the metadata of the state dict to be a mapping for every module, but got {metadata!r}."
        )
    for name, entry in metadata.items():
        version = entry.get("version")
        if not isinstance(version, int | None):
            raise UserValueError(
                f"Expected the version of '{name}' in the metadata of the state dict to be an integer, "
                f"but got {version!r}."
            )
