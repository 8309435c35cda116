"""Heads whose layers lie at several names of a module, whose own forward calls them: ``"linear1+linear2"``."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from glai_lightning.checks import UserError, UserValueError, listed
from glai_lightning.heads.layout import CannotBeCalledError, in_mode, read_recorded
from glai_lightning.heads.made_up import made_up_inputs
from glai_lightning.heads.recording import CallRecorder, RecordedCall, unchanged


class UncalledError(UserValueError):
    """A joined head of which a call of its module does not call every layer."""


#: Functions that take sizes, of which a forward may have computed the first from what it was given.
_SHAPING = {"view", "reshape", "expand"}


class Applied(nn.Module):
    """A function as a module.

    Args:
        function: of a tensor and what follows.
        args: positional arguments, the tensor that a recorded call was given first.
        kwargs: named arguments.
    """

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.function, self.kwargs = function, {name: value for name, value in kwargs.items() if name != "input"}
        self.function_name = getattr(function, "__name__", "function")
        self.args = args[1:]
        #: For how many leading dimensions the first of some sizes stands.
        self.leading: int | None = None
        if self.function_name not in _SHAPING or not isinstance(next(iter(self.args), None), int | tuple | list):
            return
        sizes = self.args[0] if isinstance(self.args[0], tuple | list) else self.args
        if self.function_name != "expand" and -1 not in sizes:
            sizes = (-1, *sizes[1:])
        shape = args[0].shape
        self.leading = next((k for k in range(1, len(shape) + 1) if shape[:k].numel() == sizes[0]), None)
        self.args = (tuple(sizes),)

    def forward(self, x: Tensor) -> Any:
        """Apply the function."""
        args = self.args
        if self.leading is not None:
            args = ((x.shape[: self.leading].numel(), *args[0][1:]),)
        return self.function(x, *args, **self.kwargs)


class JoinedHead(nn.Sequential):
    """The steps between the first and the last of some layers of a module, which calls them itself.

    It holds the very modules, under numbers, and is no part of the module that they belong to. Until a call of that
    module was read it holds the layers alone.

    Args:
        owner: the module.
        name: qualified names of layers in it, joined by '+'.
    """

    def __init__(self, owner: nn.Module, name: str) -> None:
        super().__init__()
        self.name = name
        self.steps: list[str | Applied] = list(name.split("+"))
        self.unread: str | None = "no call of it was read"
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

    def forward(self, x: Any) -> Any:
        """Take the steps.

        Raises:
            ValueError: if no call was read that shows which they are.
        """
        if self.unread is not None:
            raise CannotBeCalledError(
                f"Expected a module that calls {' and '.join(map(repr, self.name.split('+')))} to take one tensor of "
                f"features, but a call with such inputs failed ({self.unread}). `find_heads(module, batch)` reads them "
                "from a real call."
            )
        return super().forward(x)  # type: ignore[no-untyped-call]

    def read(self, owner: nn.Module, recorder: CallRecorder, prefix: str = "") -> None:
        """Read the steps, and the parts of the head, from a recorded call.

        Args:
            owner: the module.
            recorder: recorded the call of the module, or of one in it.
            prefix: stands before the names of that one.

        Raises:
            ValueError: if the layers do not follow one another, or are no head.
        """
        span = _span_of(self.name, recorder.calls, prefix)
        self.steps = _steps_of(self.name, recorder.calls[span.start : span.stop], prefix)
        self.unread = None
        self.look_up(owner)
        read_recorded(self, _part_of(recorder, self, span))


def entry_of(head: nn.Module) -> nn.Module:
    """Return the module that a step of a user calls: the head itself, or the first layer of a joined one."""
    return head.entry if isinstance(head, JoinedHead) else head


#: The joined heads of modules, by their names.
_JOINED: "WeakKeyDictionary[nn.Module, dict[str, JoinedHead]]" = WeakKeyDictionary()


def head_at(owner: nn.Module, name: str) -> nn.Module:
    """Return the head at a qualified name, or the one whose layers lie at several, joined by '+'.

    A joined head is read from a call of the innermost module around its layers that takes made-up features. Where there
    is none it is unread, until ``remember_joined`` reads it from a real call.

    Raises:
        AttributeError: if there is no such module.
        ValueError: if the layers do not follow one another.
    """
    if "+" not in name:
        return owner.get_submodule(name)
    head = known_joined(owner, name)
    if head is None:
        head = JoinedHead(owner, name)
        _read_made_up(head, owner)
        _JOINED.setdefault(owner, {})[name] = head
    head.look_up(owner)
    return head


def known_joined(owner: nn.Module, name: str) -> JoinedHead | None:
    """Return the joined head of that name, if it was asked for before."""
    return _JOINED.get(owner, {}).get(name)


def remember_joined(owner: nn.Module, name: str, recorder: CallRecorder) -> JoinedHead:
    """Join layers by a recorded call of their module, and return the head from here on for that name."""
    head = known_joined(owner, name) or JoinedHead(owner, name)
    if head.unread is not None:
        head.read(owner, recorder)
        _JOINED.setdefault(owner, {})[name] = head
    return head


def _read_made_up(head: JoinedHead, owner: nn.Module) -> None:
    failed: Exception | None = None
    for prefix in _common_prefixes(head.name.split("+")):
        parent = owner.get_submodule(prefix)
        for inputs in made_up_inputs(parent):
            try:
                with unchanged(parent), torch.no_grad(), in_mode([parent], False), CallRecorder(parent) as recorder:
                    recorder.start([inputs])
                    parent.forward(inputs)
                head.read(owner, recorder, f"{prefix}." if prefix else "")
            except UncalledError as error:
                # Another call of the module may come by them.
                failed = failed or error
                break
            except UserError:
                raise
            except Exception as error:
                # What a forward expects is not known, so it may object in any way.
                failed = failed or error
            else:
                return
    head.unread = str(failed)


def _common_prefixes(parts: Sequence[str]) -> Iterator[str]:
    """Yield the names of the modules that hold all parts, the innermost first."""
    paths = [part.split(".")[:-1] for part in parts]
    shared = next((i for i, names in enumerate(zip(*paths, strict=False)) if len(set(names)) > 1), min(map(len, paths)))
    for length in range(shared, -1, -1):
        yield ".".join(paths[0][:length])


def _span_of(name: str, calls: Sequence[RecordedCall], prefix: str) -> range:
    """Return where the steps of a head stand among those of a call; of several times that it is called, the first."""
    parts = name.split("+")
    runs: list[list[tuple[int, str]]] = [[]]
    for position, call in enumerate(calls):
        own = f"{prefix}{call.name}."
        part = next((part for part in parts if call.module is not None and own.startswith(f"{part}.")), None)
        if part is None:
            continue
        if runs[-1] and parts.index(part) < parts.index(runs[-1][-1][1]):
            runs.append([])
        runs[-1].append((position, part))
    called = [part for run in runs for part, _ in itertools.groupby(part for _, part in run)]
    uncalled = [part for part in parts if part not in called]
    if uncalled:
        raise UncalledError(f"Expected all layers of the head {name!r} to be called, but {uncalled[0]!r} is not.")
    if called != parts * len(runs):
        raise UserValueError(
            f"Expected the layers of the head {name!r} in the order in which they are called, but that is "
            f"{listed(map(repr, called))}."
        )
    spans = [range(run[0][0], run[-1][0] + 1) for run in runs]
    taken = [[calls[position].name for position in span] for span in spans]
    other = next((steps for steps in taken if steps != taken[0]), None)
    if other is not None:
        raise UserValueError(
            f"Expected every call of the head {name!r} to take the same steps, but got {', '.join(taken[0])} and "
            f"{', '.join(other)}."
        )
    return spans[0]


def _steps_of(name: str, span: Sequence[RecordedCall], prefix: str) -> list[str | Applied]:
    steps: list[str | Applied] = []
    for position, call in enumerate(span):
        if position and not call.follows:
            raise UserValueError(
                f"Expected each step of the head {name!r} to take what the one before computes and nothing else, but "
                f"`{call.name}` does not. Name the module that holds them as the head."
            )
        if call.module is not None:
            steps.append(prefix + call.name)
        else:
            steps.append(Applied(call.function, *call.arguments))
    return steps


def _part_of(recorder: CallRecorder, head: JoinedHead, span: range) -> CallRecorder:
    """Return what was recorded of the steps of a head, as if it had been called itself."""
    part = CallRecorder(head)
    for position, at in enumerate(span):
        call = recorder.calls[at]
        feeds_on = frozenset(source - span.start for source in call.feeds_on if source in span)
        part.calls.append(replace(call, name=str(position), module=head[position], feeds_on=feeds_on, shown=call.name))
    for preactivation, (kind, name), at in zip(
        recorder.preactivations, recorder.kinds, recorder.positions, strict=True
    ):
        if at in span:
            part.preactivations.append(preactivation)
            part.positions.append(at - span.start)
            part.kinds.append((kind, None if name is None else str(at - span.start)))
    return part
