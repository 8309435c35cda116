"""Churn: how much of a head's structure still moves, and when it has settled."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from glai_lightning.checks import UserTypeError, UserValueError, expect_integer, expect_number
from glai_lightning.heads.joined import entry_of
from glai_lightning.heads.layout import CannotBeCalledError, HeadLayout, read_head
from glai_lightning.heads.patterns import layout_of, patterns_of

#: Patterns of one call of a head, one bool tensor (..., units) for each activation: before, and now.
Compared = tuple[list[Tensor], list[Tensor]]


def pattern_churn(before: Sequence[Tensor], after: Sequence[Tensor]) -> Tensor:
    """Return the fraction of pattern bits that differ, over all hidden layers together.

    Args:
        before: one bool tensor of shape (batch, width) for each hidden layer, as ``activation_patterns`` gives them.
        after: the patterns of the same inputs, later.

    Returns:
        A 0-d float tensor in [0, 1].

    Raises:
        TypeError: if a pattern is not a bool tensor.
        ValueError: if there is no bit to compare, or numbers or shapes of the patterns differ.

    Example:
        >>> import torch
        >>> pattern_churn([torch.tensor([[True, False]])], [torch.tensor([[True, True]])])
        tensor(0.5000)
    """
    for name, patterns in (("before", before), ("after", after)):
        if not isinstance(patterns, Sequence) or isinstance(patterns, str | bytes):
            raise UserTypeError(f"Expected `{name}` to be a list of patterns, but got {_describe(patterns)}.")
    for pattern in (*before, *after):
        if not isinstance(pattern, Tensor) or pattern.dtype is not torch.bool:
            raise UserTypeError(f"Expected patterns to be bool tensors, but got {_describe(pattern)}.")
    shapes = [tuple(pattern.shape) for pattern in before], [tuple(pattern.shape) for pattern in after]
    if shapes[0] != shapes[1]:
        raise UserValueError(
            f"Expected `before` and `after` to have the same shapes, but got {shapes[0]} and {shapes[1]}."
        )
    flipped, bits = count_flipped(before, after)
    if bits == 0:
        raise UserValueError("Expected `before` and `after` to hold at least one bit, but got none.")
    return (flipped.double() / bits).float()


def _describe(value: object) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else f"`{type(value).__name__}`"


def count_flipped(before: Sequence[Tensor], after: Sequence[Tensor]) -> tuple[Tensor, int]:
    """Return the number of bits that differ (0-d int64 tensor) and the number of bits."""
    device = before[0].device if before else None
    flipped = torch.zeros((), dtype=torch.int64, device=device)
    for old, new in zip(before, after, strict=True):
        flipped += torch.count_nonzero(old ^ new)
    return flipped, sum(pattern.numel() for pattern in before)


def structure_settled(
    churn_history: Sequence[float],
    *,
    churn_tolerance: float = 0.10,
    relative_tolerance: float = 0.25,
    patience: int = 1,
) -> bool:
    """Tell whether the structure has settled: churn is small, and small against the largest churn so far.

    An absolute threshold alone is wrong: with a tiny learning rate churn is small from the first epoch, long before
    anything was learnt. A check passes if its churn is at most ``relative_tolerance`` times the largest churn up to and
    including that check, and at most ``churn_tolerance``.

    Args:
        churn_history: the churn at each check, oldest first, in [0, 1]; NaN for a check that could not be made, which
            does not pass.
        churn_tolerance: largest churn that counts as settled, in [0, 1].
        relative_tolerance: largest churn that counts as settled, as a fraction of the largest so far, in (0, 1].
        patience: number of checks in a row, the last one included, that must pass.

    Returns:
        Whether the last ``patience`` checks passed.

    Raises:
        TypeError: if the history is not a sequence of numbers, or another argument not a number.
        ValueError: if an argument is out of its range.

    Example:
        >>> structure_settled([0.24, 0.058])
        True
        >>> structure_settled([0.005])
        False
    """
    numbers = isinstance(churn_history, Sequence) and not isinstance(churn_history, str | bytes)
    if not numbers or not all(isinstance(churn, int | float) for churn in churn_history):
        raise UserTypeError(f"Expected `churn_history` to be a list of numbers, but got {churn_history!r}.")
    expect_number("churn_tolerance", churn_tolerance, low=0.0, high=1.0)
    expect_number("relative_tolerance", relative_tolerance, low=0.0, high=1.0, above=True)
    expect_integer("patience", patience, least=1)
    if len(churn_history) < patience:
        return False
    for check in range(len(churn_history) - patience, len(churn_history)):
        largest = max((churn for churn in churn_history[: check + 1] if not math.isnan(churn)), default=0.0)
        # Where no bit ever flipped nothing was trained yet: a warm-up that starts at a rate of zero.
        if largest == 0.0 or not churn_history[check] <= min(churn_tolerance, relative_tolerance * largest):
            return False
    return True


class ChurnProbe:
    """Measures the churn of a head on the inputs that it was last trained on.

    It keeps a snapshot of the feature map's weights and references to the last inputs seen in training mode with
    gradients enabled (nothing is copied), and compares snapshot and head on those same inputs. That makes churn
    independent of shuffling, of augmentation, of a moving backbone, and of whether there is validation at all.

    Args:
        head: a head or a ``GLAIHead``.
        probe_size: number of inputs to compare on, at least 1; of a head whose layers lie at several names, tokens.

    Raises:
        TypeError: if ``head`` is not a module, or ``probe_size`` not an integer.
        ValueError: if ``head`` has no activation before a last Linear, or ``probe_size`` is below 1.

    Example:
        >>> import torch
        >>> from glai_lightning import mlp_head
        >>> head = mlp_head(4, 8, 2)
        >>> probe = ChurnProbe(head, probe_size=16)
        >>> _ = head(torch.randn(32, 4))
        >>> flipped, bits = probe.measure()
        >>> int(flipped), bits
        (0, 128)
        >>> probe.close()
    """

    def __init__(self, head: nn.Module, probe_size: int = 1024) -> None:
        expect_integer("probe_size", probe_size, least=1)
        self.head = head
        self.probe_size = probe_size
        self._layout: HeadLayout | None = None
        with suppress(CannotBeCalledError):
            self._layout = layout_of(head)
        self.snapshot = self._copied()
        self.inputs: deque[Tensor] = deque()
        #: All that the head was given, call by call; ``None`` where that is one tensor.
        self._others: deque[tuple[tuple[Any, ...], dict[str, Any]] | None] = deque()
        self._kept = 0
        #: Inputs seen since the last measurement, kept or not.
        self.seen = 0
        self._listens = True
        self._detach = _watch_inputs(entry_of(head), self._keep)

    def _tensors(self) -> dict[str, Tensor]:
        if self._layout is not None:
            tensors = self._layout.structure_tensors()
        else:
            tensors = {**dict(self.head.named_parameters()), **dict(self.head.named_buffers())}
        return {name: value.detach() for name, value in tensors.items() if value.is_floating_point()}

    def _copied(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self._tensors().items()}

    def _keep(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not (entry_of(self.head).training and torch.is_grad_enabled()):
            return
        if self._layout is None:
            self._layout = read_head(self.head, *args, **kwargs)
            own = self._tensors()
            self.snapshot = {name: value for name, value in self.snapshot.items() if name in own}
        # Most heads are given one tensor, in every step of a fit.
        plain = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
        x = args[0] if plain else next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        flattened = self._layout.takes_rows
        rows = x.shape[:-1].numel() if flattened else self._count(x)
        self.seen += rows
        if not self._listens:
            return
        x = x.detach()
        if flattened and x.ndim != 2:
            x = x.reshape(-1, x.shape[-1])
        self.inputs.append(x)
        others = None if plain or flattened else tree_map_only(Tensor, Tensor.detach, (args, kwargs))
        self._others.append(others)
        self._kept += rows
        while self._kept - self._count(self.inputs[0]) >= self.probe_size:
            self._kept -= self._count(self.inputs.popleft())
            self._others.popleft()

    def _count(self, x: Tensor) -> int:
        """Count the inputs in a tensor: of a head that begins with a Linear of its module, every token is one."""
        return x.shape[:-1].numel() if isinstance(entry_of(self.head), nn.Linear) else len(x)

    def _calls(self) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Yield what to call the head with, to see it on the inputs kept: as few calls as will do."""
        first = self.inputs[0]
        surplus = max(0, self._kept - self.probe_size) * len(first) // max(1, self._count(first))
        if all(others is None for others in self._others) and len({x.shape[1:] for x in self.inputs}) == 1:
            yield (torch.cat([first[surplus:], *list(self.inputs)[1:]]),), {}
            return
        for x, others in zip(self.inputs, self._others, strict=True):
            given = ((x,), {}) if others is None else others
            yield tree_map_only(Tensor, partial(_last_rows, rows=len(x), surplus=surplus), given)
            surplus = 0

    @property
    def has_inputs(self) -> bool:
        """Whether the head has been given an input in training since the last measurement."""
        return self._kept > 0

    def listen(self, listens: bool) -> None:
        """Keep the inputs seen from here on, or forget those kept and keep no more until told otherwise.

        Memory that is kept cannot be reused for the next batch, which then lies outside of the processor's cache. So
        keep only the inputs that the next measurement is made on, where it is known when that is due.
        """
        self._listens = listens
        if not listens:
            self._forget()

    def _forget(self) -> None:
        self.inputs.clear()
        self._others.clear()
        self._kept = 0

    def is_finite(self) -> bool:
        """Tell whether all numbers that decide the patterns are finite; NaN flips no bits and looks settled."""
        return all(bool(value.isfinite().all()) for value in self._tensors().values())

    def restart(self) -> None:
        """Take a new snapshot, and forget the inputs kept so far."""
        self.snapshot = self._copied()
        self._forget()
        self.seen = 0

    def resume(self, snapshot: Mapping[str, Tensor]) -> None:
        """Measure the next churn against another snapshot, which was taken of the same head before.

        Args:
            snapshot: the tensors of the structure at the last measurement, by their names in the head.

        Raises:
            ValueError: if names or shapes are not those of this head.
        """
        own = {name: tuple(value.shape) for name, value in self.snapshot.items()}
        given = {name: tuple(value.shape) for name, value in snapshot.items()}
        if own != given:
            raise UserValueError(f"Expected the snapshot of a head with tensors of shape {own}, but got {given}.")
        self.snapshot = {name: value.to(self.snapshot[name].device) for name, value in snapshot.items()}

    def measure(self, show: Callable[[list[Compared]], None] | None = None) -> tuple[Tensor, int]:
        """Compare the head with the snapshot on the inputs kept, and start again from here.

        Args:
            show: is called with what was compared: for each call of the head the patterns of the snapshot and its own.

        Returns:
            The number of pattern bits that differ (0-d int64 tensor on the inputs' device), and the number of bits
            compared. Counts, and not their ratio, so that several processes can add theirs up.

        Raises:
            ValueError: if the head was given no input in training since the last measurement.
        """
        if not self.has_inputs:
            raise UserValueError(
                "Expected the head to be called in training before churn is measured, but it saw no input."
            )
        assert self._layout is not None
        compared = [
            (patterns_of(self._layout, args, kwargs, self.snapshot), patterns_of(self._layout, args, kwargs))
            for args, kwargs in self._calls()
        ]
        if show is not None:
            show(compared)
        self.restart()
        counts = [count_flipped(before, after) for before, after in compared]
        return torch.stack([flipped for flipped, _ in counts]).sum(), sum(bits for _, bits in counts)

    def detach(self) -> None:
        """Stop watching, and keep what was seen."""
        self._detach()

    def close(self) -> None:
        """Stop watching, and forget what was seen."""
        self.detach()
        self._forget()


def _last_rows(value: Tensor, *, rows: int, surplus: int) -> Tensor:
    return value[surplus:] if surplus and value.ndim and len(value) == rows else value


class _UncompiledHook:
    """A hook that the compiler does not look into; a class, so that a module with it can be pickled."""

    def __init__(self, keep: Callable[[tuple[Any, ...], dict[str, Any]], None]) -> None:
        self._keep = keep

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._keep(args, kwargs)


def _watch_inputs(head: nn.Module, keep: Callable[[tuple[Any, ...], dict[str, Any]], None]) -> Callable[[], None]:
    """Have a function called with the arguments of each call of a module, until the function returned is called.

    What is compiled must not see the function: ``torch.compile`` would compile anew for each value of what it counts,
    up to a limit beyond which everything runs uncompiled. Where the module itself is compiled the function is called
    before what was compiled; where a module around it is, the graph breaks at the call.
    """
    compiled = head._compiled_call_impl
    if compiled is None:
        return head.register_forward_pre_hook(_UncompiledHook(keep), with_kwargs=True).remove

    def watched(*args: Any, **kwargs: Any) -> Any:
        keep(args, kwargs)
        return compiled(*args, **kwargs)

    def detach() -> None:
        if head._compiled_call_impl is watched:
            head._compiled_call_impl = compiled

    head._compiled_call_impl = watched
    return detach
