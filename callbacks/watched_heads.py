"""The heads that a callback watches: what is known of them, and freezing and unfreezing them by hand."""

import weakref
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_warn

from glai_lightning.callbacks.head_watch import FreezeSettings, HeadWatch
from glai_lightning.fitting.conversion import check_head, check_unfreezable
from glai_lightning.fitting.heads_in_module import HeadSlot, as_names, is_pattern, stands_alone
from glai_lightning.fitting.messages import say
from glai_lightning.fitting.misconfiguration import UserMisconfigurationError
from glai_lightning.heads.frozen import freeze_in_place, unfreeze_in_place
from glai_lightning.heads.record import Paths
from glai_lightning.solvers import SolveReport


@runtime_checkable
class FreezeJudge(Protocol):
    """A callback that has a say in the freezes of the ``StructureFreezeCallback`` beside it."""

    def allows_freeze(self, head_name: str) -> bool:
        """Tell whether a head may be frozen now."""

    def before_freeze(self, trainer: Any, slot: HeadSlot) -> None:
        """Take note of a head that is about to be frozen."""

    def is_judging(self, head_name: str) -> bool:
        """Tell whether the freeze of a head still has to prove itself."""


class WatchedHeads(Callback):
    """A callback with heads that it watches, see ``StructureFreezeCallback``.

    Args:
        head: names and patterns of heads.
        settings: when and how they are frozen.
        verbose: whether to say what happens to them.
    """

    paths: Paths

    def __init__(self, head: str | Sequence[str], settings: FreezeSettings, verbose: bool) -> None:
        super().__init__()
        self._names = as_names("head", head)
        self._settings = settings
        self.verbose = verbose
        #: By name; those that a pattern stands for from ``setup`` on.
        self.heads = {name: HeadWatch(name, settings) for name in self._names if not is_pattern(name)}
        self._module: weakref.ReferenceType[Any] | None = None
        self._fits = False
        self._told_of_moving = False

    @property
    def frozen(self) -> bool:
        """Whether all heads are frozen."""
        return bool(self.heads) and all(watch.frozen for watch in self.heads.values())

    @property
    def freeze_epoch(self) -> int | None:
        """First epoch that trained with all heads frozen; ``None`` if there is none, or it is not known."""
        epochs = [watch.freeze_epoch for watch in self.heads.values() if watch.frozen]
        known = [epoch for epoch in epochs if epoch is not None]
        return max(known) if self.frozen and len(known) == len(epochs) else None

    @property
    def freeze_reason(self) -> str | None:
        """Why the head was frozen, in a sentence; of several heads the reasons, once all are frozen."""
        if not self.frozen:
            return None
        if stands_alone(self._names):
            return self._first().freeze_reason
        return "; ".join(f"{name!r}: {watch.freeze_reason}" for name, watch in self.heads.items())

    @property
    def churn_history(self) -> list[float]:
        """Churn of the (first) head at each check until the freeze."""
        return self._first().churn_history

    @property
    def solve_report(self) -> SolveReport | None:
        """What the solve of the (first) head did, or ``None``."""
        return self._first().solve.report

    def _first(self) -> HeadWatch:
        # A pattern that was not looked up yet stands for nothing that was watched.
        return next(iter(self.heads.values()), HeadWatch(self._names[0], self._settings))

    def freeze(self, name: str | None = None) -> None:
        """Freeze the structure of a head now, between fits.

        Args:
            name: which of several heads; ``None`` for all that are not frozen.

        Raises:
            MisconfigurationException: if the callback has not been part of a fit, no such head is left to freeze, or a
                head cannot be read, or has too many independent paths. No head is changed then.
        """
        slots = self._choose(name, frozen=False)
        for slot in slots:
            check_head(slot, self.paths)
        for slot in slots:
            freeze_in_place(slot.module, paths=self.paths)
            self.heads[slot.name].now_frozen(None, "frozen by hand")

    def unfreeze(self, name: str | None = None) -> None:
        """Put the MLP back in the place of a head frozen with output paths, all of it trainable, between fits.

        The next fit trains and watches it anew, and may freeze it again.

        Args:
            name: which of several heads; ``None`` for all that are frozen.

        Raises:
            MisconfigurationException: if the callback has not been part of a fit, or no such head is frozen.
            ValueError: if a head is frozen with other than output paths, which no MLP equals once they are trained.
                No head is changed then.
        """
        slots = self._choose(name, frozen=True)
        for slot in slots:
            check_unfreezable(slot)
        for slot in slots:
            unfreeze_in_place(slot.module)
            self.heads[slot.name].start_over()

    def _choose(self, name: str | None, *, frozen: bool) -> list[HeadSlot]:
        pl_module = self._fitted_module()
        if name is not None and name not in self.heads:
            raise UserMisconfigurationError(f"Expected `name` to be one of {list(self.heads)}, but got {name!r}.")
        named = [HeadSlot(pl_module, one) for one in (self.heads if name is None else [name])]
        chosen = [slot for slot in named if slot.is_frozen is frozen]
        if not chosen:
            names = " and ".join(repr(slot.name) for slot in named)
            expected, got = ("frozen", "it is an MLP") if frozen else ("an MLP", "it is frozen already")
            raise UserMisconfigurationError(f"Expected the head at {names} to be {expected}, but {got}.")
        return chosen

    def _fitted_module(self) -> Any:
        pl_module = None if self._module is None else self._module()
        if self._fits:
            raise UserMisconfigurationError(
                "Expected no fit to be running, but `freeze` or `unfreeze` was called in one."
            )
        if pl_module is None:
            raise UserMisconfigurationError("Expected the callback to have been part of a fit, but it was in none yet.")
        return pl_module

    def _watched(self, pl_module: Any) -> Iterator[tuple[HeadWatch, HeadSlot]]:
        # A module that trains several heads may say which of them it has dropped.
        dropped = getattr(pl_module, "dropped_heads", ())
        return ((watch, HeadSlot(pl_module, name)) for name, watch in self.heads.items() if name not in dropped)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """See to it that a frozen structure stands still, whatever was done to ``requires_grad``."""
        moved = [slot.name for watch, slot in self._watched(pl_module) if watch.hold_still(slot)]
        if moved and not self._told_of_moving:
            self._told_of_moving = True
            rank_zero_warn(
                f"Parameters of the frozen structure of {moved} were set to require gradients. They stay frozen. Call "
                "`unfreeze` of the callback between two fits to train the MLP again."
            )

    def say(self, event: object) -> None:
        """Tell the user, once and not once a process, if the callback is verbose."""
        if self.verbose:
            say(event)

    def __getstate__(self) -> dict[str, Any]:
        # A weak reference does not pickle.
        return {**vars(self), "_module": None}
