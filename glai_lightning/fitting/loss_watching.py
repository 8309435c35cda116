"""Finding what a head is trained on, by watching the loss call of somebody's own training step."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

LossKind = Literal["cross_entropy", "binary_cross_entropy", "mse"]

_LOSSES: dict[Callable[..., Any], LossKind] = {
    F.cross_entropy: "cross_entropy",
    F.binary_cross_entropy_with_logits: "binary_cross_entropy",
    F.mse_loss: "mse",
}


@dataclass(frozen=True)
class LossCall:
    """One call of a loss function on the outputs of a head.

    Args:
        kind: which loss.
        inputs: what the head was given, (batch, D).
        targets: what the loss was given beside the outputs.
        class_weights: weight of each class, (C,), or ``None``.
        label_smoothing: of a cross-entropy, in [0, 1].
        ignore_index: target of the samples that a cross-entropy passes over.
        unusual: what a mean over samples would not account for, in words, or ``None``.
    """

    kind: LossKind
    inputs: Tensor
    targets: Tensor
    class_weights: Tensor | None
    label_smoothing: float
    ignore_index: int | None
    unusual: str | None


class LossReached(BaseException):
    """Ends a training step at the loss call that was looked for; not an error, and not for user code to catch."""


class LossWatcher(TorchFunctionMode):
    """Context that notes every call of a known loss function on the outputs of a head.

    Outputs count as the head's while they share its memory: reshaped and squeezed outputs do, scaled ones do not.

    Args:
        head: the head.
        outputs: what the head returns instead of running, from its inputs, for who needs its inputs and targets only.
        stop: whether to end the step, by raising ``LossReached``, at the first such call. What user code does behind
            its loss, logging for one, then does not happen.

    Example:
        >>> import torch
        >>> head = nn.Linear(4, 3)
        >>> with LossWatcher(head) as watcher:
        ...     _ = nn.CrossEntropyLoss()(head(torch.zeros(2, 4)), torch.tensor([0, 2]))
        >>> watcher.calls[0].kind, watcher.calls[0].targets
        ('cross_entropy', tensor([0, 2]))
    """

    def __init__(
        self, head: nn.Module, *, outputs: Callable[[Tensor], Tensor] | None = None, stop: bool = False
    ) -> None:
        super().__init__()
        self.calls: list[LossCall] = []
        self._head = head
        self._outputs = outputs
        self._stop = stop
        self._passed: list[tuple[Tensor, Tensor]] = []
        self._handle: RemovableHandle | None = None

    def __enter__(self) -> "LossWatcher":
        self._handle = self._head.register_forward_hook(self._note_outputs, with_kwargs=True)
        if self._outputs is not None:
            self._head.__dict__["forward"] = self._outputs
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        assert self._handle is not None
        self._handle.remove()
        self._head.__dict__.pop("forward", None)
        self._passed.clear()

    def _note_outputs(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Tensor) -> None:
        inputs = args[0] if args else next(iter(kwargs.values()))
        self._passed.append((inputs, outputs))

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a torch function, and note it if it is a loss of the head's outputs."""
        kwargs = kwargs or {}
        kind = _LOSSES.get(func)
        if kind is not None:
            call = self._read(kind, inspect.signature(func).bind(*args, **kwargs))
            if call is not None:
                self.calls.append(call)
                if self._stop:
                    raise LossReached
        return func(*args, **kwargs)

    def _read(self, kind: LossKind, bound: inspect.BoundArguments) -> LossCall | None:
        bound.apply_defaults()
        arguments = bound.arguments
        scored: Tensor = arguments["input"]
        for inputs, outputs in reversed(self._passed):
            if scored.numel() == outputs.numel() and _share_memory(scored, outputs):
                return LossCall(
                    kind=kind,
                    inputs=inputs.detach(),
                    targets=arguments["target"].detach(),
                    class_weights=arguments.get("pos_weight" if kind == "binary_cross_entropy" else "weight"),
                    label_smoothing=float(arguments.get("label_smoothing", 0.0)),
                    ignore_index=arguments.get("ignore_index"),
                    unusual=_unusual(kind, arguments, outputs),
                )
        return None


def _unusual(kind: LossKind, arguments: dict[str, Any], outputs: Tensor) -> str | None:
    if arguments["reduction"] != "mean":
        return f"reduction={arguments['reduction']!r}"
    if kind != "cross_entropy" and arguments["weight"] is not None:
        return "a weight for each sample"
    if kind == "cross_entropy" and arguments["target"].is_floating_point():
        return "class probabilities as targets"
    if kind == "binary_cross_entropy" and outputs.shape[-1] != 1:
        return f"{outputs.shape[-1]} binary outputs"
    targets = arguments["target"]
    if kind == "binary_cross_entropy" and not bool(((targets == 0) | (targets == 1)).all()):
        return "targets other than 0 and 1"
    return None


def _share_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
