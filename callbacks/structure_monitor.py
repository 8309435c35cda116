"""The callback that watches the structure of heads, and changes nothing."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from lightning.pytorch import Callback

from glai_lightning.callbacks.churn_watch import measure_churn
from glai_lightning.callbacks.structure_freeze import StructureFreezeCallback
from glai_lightning.callbacks.structure_pictures import picture_writers, write_pictures
from glai_lightning.checks import expect_integer
from glai_lightning.fitting.heads_in_module import (
    HeadSlot,
    as_names,
    match_heads,
    name_heads,
    stands_alone,
    why_no_head,
)
from glai_lightning.fitting.misconfiguration import UserMisconfigurationError, as_misconfiguration
from glai_lightning.heads.churn import ChurnProbe
from glai_lightning.heads.joined import head_at


class StructureMonitor(Callback):
    """Logs the churn of any number of MLP blocks, once an epoch, and leaves them as they are.

    It logs ``structure/churn/<name>`` for every module watched (``structure/churn`` for a single one that was named
    without a wildcard, unless there is a ``StructureFreezeCallback``), except for those whose churn that callback logs
    under the same key. A module that saw no input in an epoch is left out in it.

    Where the Trainer has a TensorBoard logger, that logger alone is also given, for every module and check: the shares
    ``structure/dead_units`` and ``structure/always_on_units`` of units that fire for none or for all of the inputs; a
    histogram ``structure/unit_churn`` of churn over the units of each layer; and an image ``structure/patterns`` of
    units (rows) by inputs (columns), blue where a unit fires, orange where it fires since the last check, yellow where
    it no longer does. They show the inputs of the first process.

    Args:
        modules: qualified name of an MLP block, or a pattern such as ``encoder.layers.*.ffn`` that stands for all MLP
            blocks that it matches, or several of either.
        probe_size: number of inputs on which churn is measured, for each module.

    Raises:
        MisconfigurationException: if ``probe_size`` is below 1; at the start of a fit, if a pattern matches no MLP
            block, if in a module that is named none can be read, or if one lies inside another.

    Example:
        >>> from glai_lightning.callbacks import StructureMonitor
        >>> monitor = StructureMonitor("encoder.layers.*.ffn")
    """

    def __init__(self, modules: str | Sequence[str] = "head", probe_size: int = 1024) -> None:
        super().__init__()
        with as_misconfiguration():
            expect_integer("probe_size", probe_size, least=1)
        self.modules = as_names("modules", modules)
        self.probe_size = probe_size
        self.churn_history: dict[str, list[float]] = {}
        self._probes: dict[str, ChurnProbe] = {}

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Find the modules to watch."""
        for name in match_heads(pl_module, self.modules, "modules"):
            self._check_module(pl_module, name)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start to watch."""
        self._close()
        for name in match_heads(pl_module, self.modules, "modules"):
            self._probes[name] = ChurnProbe(head_at(pl_module, name), self.probe_size)
            self.churn_history.setdefault(name, [])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Measure churn after the last batch of an epoch."""
        if not trainer.is_last_batch:
            return
        writers = picture_writers(trainer)
        for name, probe in self._probes.items():
            suffix = self._key(trainer, name).removeprefix("structure/churn")
            show = partial(write_pictures, writers, suffix=suffix, step=trainer.global_step) if writers else None
            # What another callback froze no longer moves.
            churn = 0.0 if HeadSlot(pl_module, name).is_frozen else measure_churn(trainer, probe, show)
            if churn is not None:
                self.churn_history[name].append(churn)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the churn of every module watched."""
        logged = {other.log_key("churn", name) for other in _freezing(trainer) for name in other.heads}
        for name in self._probes:
            key = self._key(trainer, name)
            if self.churn_history[name] and key not in logged:
                pl_module.log(key, self.churn_history[name][-1])

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Stop watching."""
        self._close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Stop watching."""
        self._close()

    def _key(self, trainer: Any, name: str) -> str:
        alone = stands_alone(self.modules) and not _freezing(trainer)
        return "structure/churn" if alone else f"structure/churn/{name}"

    def _check_module(self, pl_module: Any, name: str) -> None:
        named = dict(pl_module.named_modules())
        if not all(part in named for part in name.split("+")):
            raise UserMisconfigurationError(
                f"Expected `modules` to name a module of `{type(pl_module).__name__}`, but got {name!r}. "
                f"{name_heads(pl_module)}"
            )
        with as_misconfiguration():
            reason = why_no_head(head_at(pl_module, name))
        if reason is not None:
            raise UserMisconfigurationError(f"The structure of {name!r} cannot be watched. {reason}")

    def _close(self) -> None:
        for probe in self._probes.values():
            probe.close()
        self._probes = {}


def _freezing(trainer: Any) -> list[StructureFreezeCallback]:
    return [callback for callback in trainer.callbacks if isinstance(callback, StructureFreezeCallback)]
