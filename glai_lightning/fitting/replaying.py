"""Running a step again without the fixed modules before a head: they return what they returned the first time."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from glai_lightning.fitting.misconfiguration import UserMisconfigurationError

Mode = Literal["run", "record", "replay", "keep", "reuse"]

#: Bytes of what modules return that are kept from one reading of the validation data to the next.
KEPT_FOR_VALIDATION = 2**28

_ELEMENTS_TOGETHER = 2**20
_MULTIPLIER = 0x9E3779B97F4A7C1
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class FixedCalls:
    """The calls of modules outside of heads in a step: recorded as the step runs, replayed when it is run again.

    What a module returns with a gradient is not recorded. ``forward`` of the modules is replaced meanwhile (of a module
    that was compiled in place, what was compiled), so that they run as always.

    Args:
        pl_module: the module of the fit.
        heads: its heads.

    Attributes:
        random: whether a module drew random numbers in the first step that was recorded.
        compiled: whether any module is compiled.
    """

    def __init__(self, pl_module: nn.Module, heads: Sequence[nn.Module]) -> None:
        inside = {id(module) for head in heads for module in head.modules()}
        around = {id(m) for m in pl_module.modules() if any(id(part) in inside for part in m.modules())}
        compiled = {
            id(part)
            for module in pl_module.modules()
            if is_compiled(module)
            for part in module.modules()
            if part is not module
        }
        self.compiled = any(map(is_compiled, pl_module.modules()))
        passed_over = inside | around | compiled
        self._modules = [(n, m) for n, m in pl_module.named_modules() if id(m) not in passed_over]
        # Networks that hold a head: what they do before it need not be kept if they return what it returns.
        self._networks = [
            (name, module, head)
            for name, module in pl_module.named_modules()
            for head in heads
            # By identity: a metric equals whatever it is compared with.
            if name and module is not head and not self.compiled and any(part is head for part in module.modules())
        ]
        self._given: list[tuple[Tensor, Any]] = []
        self._calls: dict[str, deque[tuple[list[Any], Any]]] = {}
        self._depth = 0
        self._mode: Mode = "run"
        self._kept: dict[tuple[object, ...], Any] = {}
        self._room = KEPT_FOR_VALIDATION
        self._looks_for_draws = True
        self.random = False

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Context in which a step runs whose calls are recorded; afterwards they are forgotten."""
        try:
            with self._installed("record"):
                yield
        finally:
            self._calls.clear()

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Context in which what modules return is kept for ``reusing``, up to ``KEPT_FOR_VALIDATION`` bytes."""
        with ExitStack() as stack:
            for head in {id(head): head for *_, head in self._networks}.values():
                stack.callback(head.register_forward_hook(self._note_head).remove)
            stack.enter_context(self._installed("keep"))
            yield

    @contextmanager
    def reusing(self) -> Iterator[None]:
        """Context in which modules that are given inputs of ``keeping`` once more return what they returned then."""
        with self._installed("reuse"):
            yield

    def _note_head(self, head: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if len(args) == 1 and isinstance(args[0], Tensor):
            self._given.append((args[0], output))

    @contextmanager
    def _installed(self, mode: Mode) -> Iterator[None]:
        networks = self._networks if mode in ("keep", "reuse") else []
        touched = [module for _, module in self._modules] + [module for _, module, _ in networks]
        replaced = [(vars(m), _entry(m), vars(m).get(_entry(m))) for m in touched]
        for name, module in self._modules:
            vars(module)[_entry(module)] = self._wrapped(name, module, getattr(module, _entry(module)))
        for name, module, head in networks:
            vars(module)["forward"] = self._wrapped_network(name, head, module.forward)
        try:
            with self._in(mode):
                yield
        finally:
            for attributes, entry, before in reversed(replaced):
                attributes.pop(entry, None)
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
    def _in(self, mode: Mode) -> Iterator[None]:
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
            key = (name, *_fingerprint((args, kwargs))) if self._mode in ("keep", "reuse") else ()
            if key in self._kept:
                return self._kept[key]
            self._depth += 1
            try:
                before = _generator_states(module) if self._looks_for_draws else None
                output = run(*args, **kwargs)
            finally:
                self._depth -= 1
            if self._mode == "keep":
                self._keep(key, output)
            elif self._mode == "record" and not any(
                isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(output)
            ):
                self.random |= before is not None and not all(map(torch.equal, before, _generator_states(module)))
                self._calls.setdefault(name, deque()).append((tree_leaves((args, kwargs)), output))
            return output

        return called

    def _wrapped_network(self, name: str, head: nn.Module, run: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            key = (name, *_fingerprint((args, kwargs)))
            if key in self._kept:
                return head(self._kept[key])
            kept, room, self._given = dict(self._kept), self._room, []
            output = run(*args, **kwargs)
            if len(self._given) == 1 and output is self._given[0][1]:
                self._kept, self._room = kept, room
                # Of a view the whole would be kept.
                self._keep(key, self._given[0][0].detach().clone())
            return output

        return called

    def _keep(self, key: tuple[object, ...], output: Any) -> None:
        self._room -= sum(leaf.nbytes for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
        if self._room >= 0:
            self._kept[key] = output

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


def is_compiled(module: nn.Module) -> bool:
    """Tell whether a module is compiled, by ``torch.compile(module)`` or in place."""
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


def _fingerprint(arguments: Any) -> tuple[object, ...]:
    """Return what tells arguments of a call from others, without the arguments."""
    return tuple(map(_fingerprint_of_leaf, tree_leaves(arguments)))


def _fingerprint_of_leaf(leaf: Any) -> object:
    if not isinstance(leaf, Tensor):
        return leaf if isinstance(leaf, int | float | str | None) else id(leaf)
    integers = leaf.detach().contiguous().flatten().view(_INTEGERS.get(leaf.element_size(), torch.uint8))
    mixed = torch.zeros(2, dtype=torch.int64, device=leaf.device)
    for number, part in enumerate(torch.split(integers, _ELEMENTS_TOGETHER)):
        places = torch.arange(1, len(part) + 1, device=leaf.device) + number * _ELEMENTS_TOGETHER
        # Products of 64 bits that wrap around: sums that depend on the order of what is summed.
        scrambled = (part.long() + places * _MULTIPLIER) * (2 * places + 1)
        mixed += torch.stack([scrambled.sum(), (scrambled ^ (scrambled >> 29)).mul(_MULTIPLIER).sum()])
    return (leaf.shape, leaf.dtype, *mixed.tolist())
