"""Running a step again without the fixed modules before a head: they return what they returned the first time."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from glai_lightning.fitting.misconfiguration import UserMisconfigurationError


class FixedCalls:
    """The calls of modules outside of heads in a step: recorded as the step runs, replayed when it is run again.

    What a module returns with a gradient is not recorded. ``forward`` of the modules is replaced meanwhile (of a module
    that was compiled in place, what was compiled), so that they run as always.

    Args:
        pl_module: the module of the fit.
        heads: its heads.

    Attributes:
        random: whether a module drew random numbers in the first step that was recorded.
    """

    def __init__(self, pl_module: nn.Module, heads: Sequence[nn.Module]) -> None:
        inside = {id(module) for head in heads for module in head.modules()}
        around = {id(module) for module in pl_module.modules() if any(head in module.modules() for head in heads)}
        compiled = {
            id(part)
            for module in pl_module.modules()
            if _is_compiled(module)
            for part in module.modules()
            if part is not module
        }
        passed_over = inside | around | compiled
        self._modules = [(n, m) for n, m in pl_module.named_modules() if id(m) not in passed_over]
        self._calls: dict[str, deque[tuple[list[Any], Any]]] = {}
        self._depth = 0
        self._mode: Literal["run", "record", "replay"] = "run"
        self._looks_for_draws = True
        self.random = False

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Context in which a step runs whose calls are recorded; afterwards they are forgotten."""
        replaced = [(vars(m), _entry(m), vars(m).get(_entry(m))) for _, m in self._modules]
        for name, module in self._modules:
            vars(module)[_entry(module)] = self._wrapped(name, module, getattr(module, _entry(module)))
        try:
            with self._in("record"):
                yield
        finally:
            self._calls.clear()
            for attributes, entry, before in replaced:
                del attributes[entry]
                if before is not None:
                    attributes[entry] = before

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Context, within that of ``recording``, in which the step is run again.

        Raises:
            MisconfigurationException: if the step changes in place what a recorded module returned, or gives a module
                with parameters other inputs than it did before.
        """
        self._looks_for_draws = False
        versions = self._versions()
        kept = {name: deque(calls) for name, calls in self._calls.items()}
        with self._in("replay"):
            yield
        self._calls = kept
        if self._versions() != versions:
            raise UserMisconfigurationError(
                "Expected a step that leaves what the modules before the head return as it is with `one_pass=True`, "
                "but it changes it in place. Write `x = x / 2` for `x /= 2`."
            )

    @contextmanager
    def _in(self, mode: Literal["run", "record", "replay"]) -> Iterator[None]:
        before, self._mode = self._mode, mode
        try:
            yield
        finally:
            self._mode = before

    def _versions(self) -> list[int]:
        outputs = (leaf for calls in self._calls.values() for _, output in calls for leaf in tree_leaves(output))
        return [x._version for x in outputs if isinstance(x, Tensor) and not x.is_inference()]

    def _wrapped(self, name: str, module: nn.Module, run: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            if self._depth or self._mode == "run":
                return run(*args, **kwargs)
            if self._mode == "replay":
                return self._replay(name, module, run, args, kwargs)
            self._depth += 1
            try:
                before = _generator_states(module) if self._looks_for_draws else None
                output = run(*args, **kwargs)
            finally:
                self._depth -= 1
            if not any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(output)):
                self.random |= before is not None and not all(map(torch.equal, before, _generator_states(module)))
                self._calls.setdefault(name, deque()).append((tree_leaves((args, kwargs)), output))
            return output

        return called

    def _replay(self, name: str, module: nn.Module, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        calls = self._calls.get(name)
        if calls and _same(calls[0][0], tree_leaves((args, kwargs))):
            return calls.popleft()[1]
        if calls and next(module.parameters(), None) is not None:
            raise UserMisconfigurationError(
                f"Expected inputs of the head that are fixed with `one_pass=True`, but {name!r} is given other inputs "
                "when `training_step` is run again on the same batch: it draws at random."
            )
        with self._in("run"):
            return run(*args, **kwargs)


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


def _entry(module: nn.Module) -> str:
    return "forward" if module._compiled_call_impl is None else "_compiled_call_impl"


def _generator_states(module: nn.Module) -> list[Tensor]:
    devices = {parameter.device for parameter in module.parameters() if parameter.device.type != "cpu"}
    states = [torch.get_device_module(device).get_rng_state(device) for device in devices]
    return [torch.get_rng_state(), *states]


def _same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(map(_same_leaf, one, other))


def _same_leaf(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and not isinstance(one, Tensor) and bool(one == other)
