"""Heads whose layers lie at several names of a module, whose own forward calls them: ``"linear1+linear2"``."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from glai_lightning.checks import UserValueError
from glai_lightning.heads.layout import CannotBeCalledError, in_mode, made_up_inputs
from glai_lightning.heads.recording import CallRecorder, RecordedCall, unchanged


class Applied(nn.Module):
    """A function as a module.

    Args:
        function: of a tensor and what follows.
        args: positional arguments after the tensor.
        kwargs: named arguments.
    """

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.function, self.args, self.kwargs = function, args, kwargs
        self.function_name = getattr(function, "__name__", "function")

    def forward(self, x: Tensor) -> Any:
        """Apply the function."""
        return self.function(x, *self.args, **self.kwargs)


class JoinedHead(nn.Sequential):
    """The steps between the first and the last of some layers of a module, which calls them itself.

    It holds the very modules, under numbers, and is no part of the module that they belong to.

    Args:
        owner: the module.
        steps: qualified names of modules in it, and functions.
    """

    def __init__(self, owner: nn.Module, steps: Sequence[str | Applied]) -> None:
        super().__init__()
        self.steps = list(steps)
        self.look_up(owner)

    def look_up(self, owner: nn.Module) -> None:
        """Take the modules that stand at the names now."""
        for position, step in enumerate(self.steps):
            self._modules[str(position)] = owner.get_submodule(step) if isinstance(step, str) else step
        self.training = self.entry.training

    @property
    def entry(self) -> nn.Module:
        """The first layer."""
        return self[0]


def entry_of(head: nn.Module) -> nn.Module:
    """Return the module that a step of a user calls: the head itself, or the first layer of a joined one."""
    return head.entry if isinstance(head, JoinedHead) else head


#: The joined heads of modules, by their names.
_JOINED: "WeakKeyDictionary[nn.Module, dict[str, JoinedHead]]" = WeakKeyDictionary()


def head_at(owner: nn.Module, name: str) -> nn.Module:
    """Return the head at a qualified name, or the one whose layers lie at several, joined by '+'.

    Raises:
        AttributeError: if there is no such module.
        ValueError: if the layers do not follow one another, or it cannot be seen whether they do.
    """
    if "+" not in name:
        return owner.get_submodule(name)
    joined = _JOINED.setdefault(owner, {})
    if name not in joined:
        joined[name] = JoinedHead(owner, _steps_of(owner, name.split("+")))
    joined[name].look_up(owner)
    return joined[name]


def known_joined(owner: nn.Module, name: str) -> JoinedHead | None:
    """Return the joined head of that name, if it was asked for before."""
    return _JOINED.get(owner, {}).get(name)


def remember_joined(owner: nn.Module, name: str, calls: Sequence[RecordedCall]) -> JoinedHead:
    """Join layers by a recorded call of their module, and return the head from here on for that name."""
    head = JoinedHead(owner, _between(calls, name.split("+"), ""))
    return _JOINED.setdefault(owner, {}).setdefault(name, head)


def _steps_of(owner: nn.Module, parts: list[str]) -> list[str | Applied]:
    for part in parts:
        owner.get_submodule(part)
    failed: Exception | None = None
    for prefix in _common_prefixes(parts):
        parent = owner.get_submodule(prefix)
        for inputs in made_up_inputs(parent):
            try:
                with unchanged(parent), torch.no_grad(), in_mode([parent], False), CallRecorder(parent) as recorder:
                    recorder.start([inputs])
                    parent.forward(inputs)
            except Exception as error:
                # What a forward expects is not known, so it may object in any way.
                failed = failed or error
                continue
            return _between(recorder.calls, parts, f"{prefix}." if prefix else "")
    raise CannotBeCalledError(
        f"Expected a module that calls {' and '.join(map(repr, parts))} to take one tensor of features, but a call "
        f"with such inputs failed ({failed}). `find_heads(module, batch)` reads them from a real call."
    )


def _common_prefixes(parts: Sequence[str]) -> Iterator[str]:
    """Yield the names of the modules that hold all parts, the innermost first."""
    paths = [part.split(".")[:-1] for part in parts]
    shared = next((i for i, names in enumerate(zip(*paths, strict=False)) if len(set(names)) > 1), min(map(len, paths)))
    for length in range(shared, -1, -1):
        yield ".".join(paths[0][:length])


def _between(calls: Sequence[RecordedCall], parts: Sequence[str], prefix: str) -> list[str | Applied]:
    name = "+".join(parts)
    named = [(i, f"{prefix}{call.name}.") for i, call in enumerate(calls) if call.module is not None]
    at = {part: [i for i, own in named if own.startswith(f"{part}.")] for part in parts}
    uncalled = [part for part, positions in at.items() if not positions]
    if uncalled:
        raise UserValueError(f"Expected all layers of the head {name!r} to be called, but {uncalled[0]!r} is not.")
    for one, other in itertools.pairwise(parts):
        if at[one][-1] >= at[other][0]:
            raise UserValueError(
                f"Expected the layers of the head {name!r} in the order in which they are called, once each, but got "
                f"{one!r} before {other!r}."
            )
    span = calls[at[parts[0]][0] : at[parts[-1]][-1] + 1]
    steps: list[str | Applied] = []
    for position, call in enumerate(span):
        if position and not call.follows:
            raise UserValueError(
                f"Expected each step of the head {name!r} to take what the one before computes and nothing else, but "
                f"`{call.name}` does not. Name the module that holds them as the head."
            )
        if isinstance(call.module, _BatchNorm) and position < len(span) - 1:
            raise UserValueError(
                f"Expected no BatchNorm between the layers of the head {name!r}, whose statistics would go on moving, "
                f"but got '{prefix}{call.name}'. Name the module that holds them as the head."
            )
        if call.module is not None:
            steps.append(prefix + call.name)
        else:
            args, kwargs = call.arguments
            steps.append(Applied(call.function, args[1:], {k: v for k, v in kwargs.items() if k != "input"}))
    return steps
