"""Reading a head that takes more than one tensor of features from the first call that a step of the fit makes."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from glai_lightning.checks import listed
from glai_lightning.fitting.heads_in_module import HeadSlot
from glai_lightning.fitting.misconfiguration import UserMisconfigurationError, as_misconfiguration
from glai_lightning.fitting.replaying import is_compiled
from glai_lightning.fitting.step_reading import call_step, isolated_step
from glai_lightning.heads.joined import JoinedHead, remember_joined
from glai_lightning.heads.layout import read_head
from glai_lightning.heads.patterns import layout_of
from glai_lightning.heads.recording import CallRecorder, innermost, is_layer


class _HeadReached(BaseException):
    """Ends a step at the head; not an error, and not for user code to catch."""


def read_first_call(trainer: Any, slot: HeadSlot, batch: Any, batch_idx: int) -> None:
    """Run a training step, without a trace, and read a head from its first call, at which the step ends.

    For a head whose layers lie at several names the whole step runs, to see what is between them.

    Args:
        trainer: the Trainer of the fit.
        slot: the place of the head.
        batch: a batch on the device of the module.
        batch_idx: its index.

    Raises:
        MisconfigurationException: if the head cannot be read from that call.
    """
    if isinstance(slot.module, JoinedHead):
        with _step_in(trainer, slot.pl_module), torch.no_grad(), CallRecorder(slot.pl_module) as recorder:
            call_step(slot.pl_module.training_step, batch, batch_idx)
        with as_misconfiguration():
            remember_joined(slot.pl_module, slot.name, recorder)
        return

    def read(head: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with as_misconfiguration():
            read_head(head, *args, **kwargs)
        raise _HeadReached

    handle = slot.module.register_forward_pre_hook(read, with_kwargs=True)
    try:
        with _step_in(trainer, slot.pl_module), suppress(_HeadReached):
            call_step(slot.pl_module.training_step, batch, batch_idx)
    finally:
        handle.remove()


@contextmanager
def _step_in(trainer: Any, pl_module: Any) -> Iterator[None]:
    with isolated_step(pl_module), trainer.precision_plugin.forward_context():
        yield


def compare_calls(slot: HeadSlot) -> list[RemovableHandle]:
    """Compare the calls of a head from here on with the call that it was read from.

    Returns:
        Hooks to be removed. A call by another way raises ``MisconfigurationException``. What is compiled, and joined
        heads, are not looked at.
    """
    head = slot.module
    if isinstance(head, JoinedHead) or any(map(is_compiled, slot.pl_module.modules())):
        return []
    layers, seen = layout_of(head).names.layers, list[str]()

    def note(name: str) -> Callable[..., None]:
        return lambda *_: seen.append(name)

    def compare(*_: Any) -> None:
        taken = list(seen)
        seen.clear()
        if Counter(taken) - Counter(layers):
            raise UserMisconfigurationError(
                f"Expected every call of the head at {slot.name!r} to go through the layers of the call that it was "
                f"read from, {listed(map(repr, layers))}, but one goes through {listed(map(repr, taken))}. Name a part "
                "that is called in one way, or read it by `find_heads(module, batch)` before the fit."
            )

    own = {id(module): (name, module) for name, module in reversed(list(innermost(head))) if is_layer(module)}
    hooks = [module.register_forward_pre_hook(note(name)) for name, module in own.values()]
    return [*hooks, head.register_forward_hook(compare)]
