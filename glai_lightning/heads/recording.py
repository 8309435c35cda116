"""Recording one real call of a head: its layers, its activations, and what flows between them.

Nothing is traced symbolically. Hooks on the innermost modules and a ``TorchFunctionMode`` see what a forward does for
inputs that it is given, whatever it does to decide it, and are gone afterwards.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

_NOT_ELEMENTWISE = {"GLU", "LogSoftmax", "Module", "MultiheadAttention", "Softmax", "Softmax2d", "Softmin"}
#: Modules of torch that apply one function, which bends, to every element.
_MODULES = tuple(getattr(nn, name) for name in nn.modules.activation.__all__ if name not in _NOT_ELEMENTWISE)
_NAMES = {*(kind.__name__.lower() for kind in _MODULES), "leaky_relu", "log_sigmoid", "erf", "expit"}
_PLACES = (F, torch, Tensor, torch._C._nn, torch.special)
#: The same as functions.
_ACTIVATIONS = {
    getattr(place, name + end)
    for place in _PLACES
    for name in _NAMES
    for end in ("", "_")
    if hasattr(place, name + end)
}
_GATES = {F.glu, torch._C._nn.glu}


class ReachedOutput(BaseException):
    """Ends a forward at the last layer; not an error, and not for the user's code to catch."""


@dataclass(frozen=True)
class RecordedCall:
    """A step of a forward: a call of an innermost module or of a layer, or of a torch function outside of both.

    Args:
        name: qualified name of the module, or the name of the function.
        module: the module; ``None`` for a function.
        function: the function; ``None`` for a module.
        arguments: positional and named arguments of a function.
        follows: whether it takes the result of the step before and nothing else that was computed.
        feeds_on: positions of the layers' calls that its inputs depend on.
        shown: what messages call it, where that is not its name.
    """

    name: str
    module: nn.Module | None
    function: Any
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    follows: bool
    feeds_on: frozenset[int]
    shown: str = ""

    @property
    def title(self) -> str:
        """What messages call it."""
        return self.shown or self.name

    @property
    def is_layer(self) -> bool:
        """Whether it is a layer: a map that is linear in its weight."""
        return self.module is not None and is_layer(self.module)


def is_layer(module: nn.Module) -> bool:
    """Tell whether a module maps the last dimension, or channels, of its inputs linearly: Linear, 1 x 1 convolution."""
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return set(module.kernel_size) == {1} and module.groups == 1
    # The layer of GPT-2 in transformers is a Linear whose weight is the other way round.
    return isinstance(module, nn.Linear) or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))


def layer_sizes(layer: Any) -> tuple[int, int]:
    """Return inputs and outputs of a layer."""
    if isinstance(layer, nn.Linear):
        return int(layer.in_features), int(layer.out_features)
    if type(layer).__name__ == "Conv1D":
        return tuple(map(int, layer.weight.shape))  # type: ignore[return-value]
    return int(layer.in_channels), int(layer.out_channels)


def innermost(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield layers, and the modules that hold none, with their qualified names."""
    if is_layer(module) or not any(map(is_layer, module.modules())):
        yield name, module
        return
    # Not `named_children`, which passes over a module that is used a second time.
    for child_name, child in module._modules.items():
        if child is not None:
            yield from innermost(child, f"{name}.{child_name}" if name else child_name)


@dataclass(frozen=True)
class _Flow:
    """What is known of a tensor: the layers that it depends on, and whether a layer came after the last activation."""

    feeds_on: frozenset[int] = frozenset()
    fresh: bool = False


class CallRecorder(TorchFunctionMode):
    """Context that records what the forward of a head does.

    A *preactivation* is what an elementwise activation is given, or the gate of a GLU, where a layer came after the
    activation before it. A module that holds no layer may say itself which of its units fire: by a method ``pattern``,
    which takes what its forward takes and returns a bool tensor (..., H).

    Args:
        head: the head.
        activations: names of the modules that are elementwise activations; ``None`` to find out.
        stop_at: the module at which to end the forward by ``ReachedOutput``; ``None`` to let it end.

    Attributes:
        calls: the steps, in order.
        preactivations: of every activation, in order.
        kinds: names of the activations, in order, and for modules their qualified names.
        positions: of the step, among the calls, in which each activation is.
        output_inputs: what the module at which the forward ended was given.
    """

    def __init__(
        self, head: nn.Module, *, activations: Collection[str] | None = None, stop_at: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.calls: list[RecordedCall] = []
        self.preactivations: list[Tensor] = []
        self.kinds: list[tuple[str, str | None]] = []
        self.positions: list[int] = []
        self.output_inputs: Any = None
        self._head = head
        self._activations = activations
        self._stop_at = stop_at
        self._flows: dict[int, tuple[Tensor, _Flow]] = {}
        self._last: Tensor | None = None
        self._quiet = False
        self._inside: list[tuple[_Flow, int, Tensor | None]] = []

    def start(self, inputs: Sequence[Tensor]) -> None:
        """Take note of what the head is given."""
        self._last = next(iter(inputs), None)

    def type_of(self, outputs: Any) -> str:
        """Return the type of what the head returned: 'Tensor' if that is the result of the last step and no other."""
        if isinstance(outputs, Tensor):
            return "Tensor" if outputs is self._last else "other tensor"
        return type(outputs).__name__

    def __enter__(self) -> "CallRecorder":
        self._handles = []
        modules = {id(module): (name, module) for name, module in reversed(list(innermost(self._head)))}
        if self._stop_at is not None and id(self._stop_at) not in modules:
            modules[id(self._stop_at)] = ("", self._stop_at)
        for name, module in modules.values():
            self._handles += [
                module.register_forward_pre_hook(self._before(name), with_kwargs=True),
                module.register_forward_hook(self._after(name), with_kwargs=True),
            ]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()

    def _flow_of(self, tensors: Sequence[Tensor]) -> _Flow:
        flows = [self._flows[id(tensor)][1] for tensor in tensors if id(tensor) in self._flows]
        return _Flow(frozenset().union(*(flow.feeds_on for flow in flows)), any(flow.fresh for flow in flows))

    def _set_flow(self, outputs: Any, flow: _Flow, *, anew: bool = True) -> None:
        for tensor in _tensors(outputs):
            if anew or id(tensor) not in self._flows:
                # The tensor is kept, so that no other takes its id.
                self._flows[id(tensor)] = (tensor, flow)

    def _before(self, name: str) -> Callable[..., None]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module is self._stop_at:
                self.output_inputs = next(iter(_tensors((args, kwargs))), None)
                raise ReachedOutput
            inputs = _tensors((args, kwargs))
            flow = self._flow_of(inputs)
            follows = len(inputs) == 1 and inputs[0] is self._last
            self.calls.append(RecordedCall(name, module, None, ((), {}), follows, flow.feeds_on))
            given = self._given(module, args, kwargs, inputs) if flow.fresh and not is_layer(module) else None
            self._inside.append((flow, len(self.preactivations), given))

        return before

    def _after(self, name: str) -> Callable[..., None]:
        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> None:
            flow, seen, given = self._inside.pop()
            if is_layer(module):
                self._set_flow(outputs, _Flow(flow.feeds_on | {len(self.calls) - 1}, fresh=True))
            elif given is not None and self._is_activation(name, module, given, outputs):
                self.preactivations[seen:] = [given]
                self.kinds[seen:] = [(getattr(module, "function_name", type(module).__name__), name)]
                self.positions[seen:] = [len(self.calls) - 1]
                self._set_flow(outputs, _Flow(flow.feeds_on))
            else:
                self._set_flow(outputs, flow, anew=False)
            self._last = outputs if isinstance(outputs, Tensor) else None

        return after

    def _given(self, module: nn.Module, args: Any, kwargs: Any, inputs: Sequence[Tensor]) -> Tensor | None:
        if not hasattr(module, "pattern"):
            return self._copy(inputs[0]) if len(inputs) == 1 else None
        self._quiet = True
        try:
            pattern: Any = module.pattern
            fires: Tensor = pattern(*args, **kwargs)
            return fires.to(inputs[0].dtype) - 0.5
        finally:
            self._quiet = False

    def _copy(self, tensor: Tensor) -> Tensor:
        self._quiet = True
        try:
            return tensor.detach().clone()
        finally:
            self._quiet = False

    def _is_activation(self, name: str, module: nn.Module, given: Tensor, outputs: Any) -> bool:
        if self._activations is not None:
            return name in self._activations
        if hasattr(module, "pattern"):
            return True
        if not isinstance(outputs, Tensor) or outputs.shape != given.shape or isinstance(module, _DropoutNd):
            return False
        if isinstance(module, _MODULES) and type(module).__module__.startswith("torch.nn"):
            return True
        self._quiet = True
        try:
            return _bends_each_element(module, given)
        finally:
            self._quiet = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a torch function, and take note of it."""
        kwargs = kwargs or {}
        if self._quiet:
            return func(*args, **kwargs)
        inputs = _tensors((args, kwargs))
        computed = [tensor for tensor in inputs if not isinstance(tensor, nn.Parameter)]
        flow = self._flow_of(computed)
        follows = len(inputs) == 1 and inputs[0] is self._last
        # What is in place changes what it was given.
        given = _preactivation(func, args, kwargs) if flow.fresh else None
        if given is not None:
            given = self._copy(given)
        outputs = func(*args, **kwargs)
        results = _tensors(outputs)
        if not results or not inputs:
            return outputs
        if not self._inside:
            name = getattr(func, "__name__", str(func)).strip("_")
            self.calls.append(RecordedCall(name, None, func, (args, kwargs), follows, flow.feeds_on))
            self._last = outputs if isinstance(outputs, Tensor) else None
        if given is not None:
            self.preactivations.append(given)
            self.kinds.append((getattr(func, "__name__", "activation").strip("_"), None))
            self.positions.append(len(self.calls) - 1)
            flow = _Flow(flow.feeds_on)
        elif computed and any(isinstance(tensor, nn.Parameter) and tensor.ndim > 1 for tensor in inputs):
            flow = _Flow(flow.feeds_on, fresh=True)
        self._set_flow(outputs, flow)
        return outputs


def _preactivation(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    given = args[0] if args else kwargs.get("input")
    if not isinstance(given, Tensor):
        return None
    if func in _GATES:
        return given.chunk(2, args[1] if len(args) > 1 else kwargs.get("dim", -1))[1]
    cuts_at_zero = getattr(func, "__name__", "") in ("clamp", "clamp_", "clamp_min", "clamp_min_") and 0 in [
        value for value in (*args[1:], *kwargs.values()) if isinstance(value, int | float)
    ]
    return given if func in _ACTIVATIONS or cuts_at_zero else None


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


@torch.no_grad()
def _bends_each_element(module: nn.Module, given: Tensor) -> bool:
    """Tell whether a module applies one function to every element, and the function is not a straight line."""
    own = next((tensor for tensor in (*module.parameters(), *module.buffers())), None)
    # Where numbers cannot be computed, on the meta device, a module without tensors of its own computes elsewhere.
    device = "cpu" if own is None else own.device
    if torch.device(device).type == "meta":
        return False
    # A few numbers are enough, and any of them may meet its own parameter.
    points = torch.linspace(-3.0, 3.0, given[:2].numel(), dtype=torch.float32, device=device).reshape(given[:2].shape)
    points = points.to(given.dtype)
    moved = points.clone()
    moved.view(-1)[1::2] += 0.5
    try:
        values, others, ahead = (module.forward(x.clone()) for x in (points, moved, points + 1.0))
        further = module.forward(points + 2.0)
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False
    elementwise = torch.equal(values.reshape(-1)[::2], others.reshape(-1)[::2])
    return elementwise and not torch.allclose(further - ahead, ahead - values, atol=1e-3)


@contextmanager
def unchanged(head: nn.Module) -> Iterator[None]:
    """Context in which a head is called, after which its attributes, buffers and random numbers are as before."""
    modules = list(head.modules())
    attributes = [dict(vars(module)) for module in modules]
    buffers = [(module, dict(module._buffers)) for module in modules if module._buffers]
    values = [(buffer, buffer.clone()) for _, own in buffers for buffer in own.values() if buffer is not None]
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            for module, kept in zip(modules, attributes, strict=True):
                vars(module).clear()
                vars(module).update(kept)
            for module, own in buffers:
                module._buffers.clear()
                module._buffers.update(own)
            with torch.no_grad():
                for buffer, value in values:
                    # Only what changed: a copy in place would change the version of the rest.
                    if not buffer.is_meta and not torch.equal(buffer, value):
                        buffer.copy_(value)


class _Bound(nn.Module):
    """A function of a head as a module, for ``functional_call``."""

    def __init__(self, head: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.head = head
        self._function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)


def call_with(
    head: nn.Module,
    function: Callable[..., Any],
    tensors: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Call a function of a head with other tensors in the place of some of its own, by their names in the head."""
    named = {f"head.{name}": value for name, value in tensors.items()}
    return torch.func.functional_call(_Bound(head, function), named, args, dict(kwargs))
