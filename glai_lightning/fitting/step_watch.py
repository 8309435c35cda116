"""Watching a step of a module as it runs: what its head is given and returns, and what becomes of that."""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from glai_lightning.fitting.loss_reading import LossKind, LossNotReadError
from glai_lightning.heads.chain import FunctionStep
from glai_lightning.heads.joined import JoinedHead, entry_of
from glai_lightning.heads.patterns import FORMS, changing_steps, layout_of

_LOSSES: dict[Callable[..., Any], LossKind] = {
    F.cross_entropy: "cross_entropy",
    F.binary_cross_entropy_with_logits: "binary_cross_entropy",
    F.mse_loss: "mse",
}

_SIGNATURES = {loss: inspect.signature(loss) for loss in _LOSSES}


class LossReached(BaseException):
    """Ends a step at the loss call that was looked for; not an error, and not for user code to catch."""


@dataclass(frozen=True)
class LossCall:
    """A plain call of a known loss function on what the head returned: a mean over samples, with hard targets."""

    kind: LossKind
    place: int
    targets: Tensor
    label_smoothing: float
    ignore_index: int


class StepWatch(TorchFunctionMode):
    """Context that notes what a head is given and returns, and what becomes of it.

    Args:
        head: the head.
        outputs: what the head returns instead of running, from its inputs; ``None`` to let it run.
        stop: whether to end the step, by raising ``LossReached``, at the first plain loss call.

    Attributes:
        inputs: what the head was given, call by call.
        outputs: what it returned, call by call; before any change that is made to it in place.
        calls: plain loss calls on what it returned.
        numbers: all numbers with a gradient that were computed.
        between: names of the functions that changed what it returned before a loss of it was computed.
    """

    def __init__(
        self, head: nn.Module, outputs: Callable[[Tensor], Tensor] | None = None, *, stop: bool = False
    ) -> None:
        super().__init__()
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.calls: list[LossCall] = []
        self.numbers: list[Tensor] = []
        self.between: list[str] = []
        self._computed: dict[int, Tensor] = {}
        self._head = head
        self._replacement = outputs
        self._stop = stop
        self._passed: list[Tensor] = []

    def __enter__(self) -> "StepWatch":
        self.watch_head()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        self.leave_head()

    def watch_head(self) -> None:
        """Note from here on what the head is given and returns."""
        entry, last = entry_of(self._head), self._last_layer()
        self._kept = [(module, module.__dict__.get("forward")) for module in (entry, last)]
        forward, enter = last.forward, entry.forward
        given: list[Tensor | None] = []

        def entered(*args: Any, **kwargs: Any) -> Any:
            given.append(self._inputs_among(enter, args, kwargs))
            return enter(*args, **kwargs)

        @functools.wraps(forward)
        def noted(*args: Any, **kwargs: Any) -> Any:
            own = self._inputs_among(forward, args, kwargs)
            inputs = own if entry is last else given.pop()
            if own is None or inputs is None:
                return forward(*args, **kwargs)
            outputs = forward(*args, **kwargs) if self._replacement is None else self._replacement(inputs)
            if not isinstance(outputs, Tensor):
                return outputs
            if entry is not last:
                outputs = outputs.reshape(*own.shape[:-1], -1)
            # What follows may change the copy in place; the gradient is asked for by the original.
            passed = outputs.clone()
            self.inputs.append(inputs)
            self.outputs.append(outputs)
            self._passed.append(passed)
            self._computed[id(passed)] = passed
            return passed

        entry.__dict__["forward"] = entered
        last.__dict__["forward"] = noted

    def _last_layer(self) -> nn.Module:
        """Return the module whose outputs are the head's: its last Linear, where another form of them is returned."""
        if isinstance(self._head, JoinedHead):
            return self._head[-1]
        layout = layout_of(self._head)
        changed = any(isinstance(step, FunctionStep | nn.LogSoftmax | nn.Flatten) for step in layout.trailing)
        last: nn.Module = layout.output
        return last if changed and not changing_steps(layout) else self._head

    def _inputs_among(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor | None:
        given = (*args, *kwargs.values())
        tensor = next((value for value in given if isinstance(value, Tensor)), None)
        if self._replacement is not None and (tensor is None or len(given) > 1):
            others = [value for value in _arguments_set(forward, args, kwargs) if value is not tensor]
            if tensor is None or others:
                kinds = ", ".join(type(value).__name__ for value in given)
                raise LossNotReadError(
                    f"Expected a head that is given one tensor alone, so that it can be solved, but got {kinds}."
                )
        return tensor

    def leave_head(self) -> None:
        """Let the head run as it did before."""
        for module, kept in dict(self._kept).items():
            del module.__dict__["forward"]
            if kept is not None:
                module.__dict__["forward"] = kept

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a torch function, and note what is of interest."""
        kwargs = kwargs or {}
        if func in _LOSSES and self.note_loss(func, args, kwargs) and self._stop:
            raise LossReached
        result = func(*args, **kwargs)
        if self._passed and isinstance(result, Tensor):
            if result.ndim == 0 and result.requires_grad:
                self.numbers.append(result)
            self._note_between(func, (args, kwargs), result)
        return result

    def _note_between(self, func: Callable[..., Any], given: Any, result: Tensor) -> None:
        if func in _LOSSES or result.ndim == 0 or not any(id(leaf) in self._computed for leaf in tree_leaves(given)):
            return
        # The tensor is kept, so that no other takes its id.
        self._computed[id(result)] = result
        name = getattr(func, "__name__", str(func)).strip("_")
        if name not in FORMS and name not in self.between:
            self.between.append(name)

    def note_loss(self, loss: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Note a call of a known loss function; tell whether it is a plain one on what the head returned."""
        if not self._passed:
            return False
        call = self._plain_call(_LOSSES[loss], _SIGNATURES[loss].bind(*args, **kwargs))
        self.calls += [] if call is None else [call]
        return call is not None

    def _plain_call(self, kind: LossKind, bound: inspect.BoundArguments) -> LossCall | None:
        bound.apply_defaults()
        arguments = bound.arguments
        scored, targets = arguments["input"], arguments["target"]
        weighted = any(arguments.get(name) is not None for name in ("weight", "pos_weight"))
        hard = kind != "cross_entropy" or not targets.is_floating_point()
        if arguments["reduction"] != "mean" or weighted or not hard:
            return None
        for place, passed in enumerate(self._passed):
            whole = scored.numel() == passed.numel() and scored.is_contiguous() and passed.is_contiguous()
            if whole and scored.untyped_storage().data_ptr() == passed.untyped_storage().data_ptr():
                smoothing, ignored = arguments.get("label_smoothing", 0.0), arguments.get("ignore_index", -100)
                return LossCall(kind, place, targets.detach(), float(smoothing), ignored)
        return None


def _arguments_set(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """List what a function is given, without what it would have taken by itself."""
    signature, given = inspect.signature(forward), list[Any]()
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        parameter = signature.parameters[name]
        if parameter.kind is parameter.VAR_POSITIONAL:
            given += value
        elif parameter.kind is parameter.VAR_KEYWORD:
            given += value.values()
        elif value is not parameter.default:
            given.append(value)
    return given


class StepWatches(TorchFunctionMode):
    """Context that notes, in a step that runs as always, what several heads are given and which loss each has.

    One context for all of them: torch functions pass through contexts one after the other.

    Args:
        heads: the heads by name.

    Attributes:
        watches: what is noted of each head, by name.
    """

    def __init__(self, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.watches = {name: StepWatch(head) for name, head in heads.items()}

    def __enter__(self) -> "StepWatches":
        for watch in self.watches.values():
            watch.watch_head()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        for watch in reversed(self.watches.values()):
            watch.leave_head()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a torch function, and note the loss of a head."""
        kwargs = kwargs or {}
        if func in _LOSSES:
            for watch in self.watches.values():
                watch.note_loss(func, args, kwargs)
        return func(*args, **kwargs)
