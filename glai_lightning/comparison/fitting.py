"""One fit of one variant: what is made of the parts that somebody's own fit has."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers.logger import DummyLogger

from glai_lightning.callbacks.structure_freeze import StructureFreezeCallback
from glai_lightning.comparison.recording import Mode, RunRecorder
from glai_lightning.comparison.variants import Variant, freeze_callback, matched_head
from glai_lightning.fitting.heads_in_module import find_head
from glai_lightning.fitting.misconfiguration import UserMisconfigurationError
from glai_lightning.fitting.solving import Solver

#: Makes, for a seed, a fresh module, its data module (or None) and a Trainer.
MakeFit = Callable[[int], tuple[Any, Any, Any]]

# By name, for a project may import them from the `pytorch_lightning` twin. What writes files or draws would be measured
# with the fit; early stopping is the protocol's own, and so is the freeze.
_LEFT_OUT = ("Checkpoint", "ProgressBar", "ModelSummary", "EarlyStopping", "FitReport", "StructureFreezeCallback")


@dataclass(frozen=True)
class Rules:
    """What holds for every fit of a comparison.

    Args:
        score: name of the validation score.
        mode: whether the best score is the largest or the smallest.
        head: qualified name of the MLP head in the module.
        patience: validations without a better score after which a fit stops; ``None`` to train to the end.
    """

    score: str
    mode: Mode
    head: str
    patience: int | None


@dataclass
class Fit:
    """Everything that a fit of a variant needs.

    Args:
        module: the LightningModule.
        data: its data module, or ``None``.
        trainer: the Trainer, with the callbacks of the variant.
        freeze: the callback that freezes the head; ``None`` for the MLP.
    """

    module: Any
    data: Any
    trainer: Any
    freeze: StructureFreezeCallback | None


def prepare_fit(parts: tuple[Any, Any, Any], variant: Variant, rules: Rules, solver: Solver | None) -> Fit:
    """Make the fit of a variant out of the parts of a fit.

    Args:
        parts: module, data module and Trainer, fresh. The freeze rule is that of the Trainer's
            ``StructureFreezeCallback``, or its default. Loggers, checkpoints, progress bars, reports and early stopping
            are taken out; other callbacks stay.
        variant: the variant.
        rules: what holds for every fit.
        solver: what to solve with.

    Raises:
        MisconfigurationException: if the Trainer uses several processes or has several such callbacks, or the head is
            not there; if its width cannot be matched.
    """
    module, data, trainer = parts
    if trainer.world_size > 1:
        raise UserMisconfigurationError(
            f"Expected a comparison to run in one process, but got {trainer.world_size}: give `--trainer.devices=1`."
        )
    given = find_freeze(trainer, rules.head)
    head = find_head(module, rules.head)
    freeze = freeze_callback(variant, given, solver)
    if variant.matched:
        try:
            module.set_submodule(rules.head, matched_head(head))
        except ValueError as error:
            raise UserMisconfigurationError(f"The head at {rules.head!r} cannot be matched. {error}") from error
    stopping = [] if rules.patience is None else [EarlyStopping(rules.score, patience=rules.patience, mode=rules.mode)]
    kept = [callback for callback in trainer.callbacks if not is_left_out(callback)]
    trainer.callbacks = [*kept, *([] if freeze is None else [freeze]), *stopping]
    # User code may log by hand, and some callbacks want a logger: this one takes everything and does nothing.
    trainer.loggers = [DummyLogger()] if trainer.loggers else []
    trainer.num_sanity_val_steps = 0
    return Fit(module, data, trainer, freeze)


def find_freeze(trainer: Any, head: str) -> StructureFreezeCallback:
    """Return the callback of a Trainer by whose rule to freeze; with the default rule where it has none.

    Raises:
        MisconfigurationException: if there are several.
    """
    found = [callback for callback in trainer.callbacks if isinstance(callback, StructureFreezeCallback)]
    if len(found) > 1:
        raise UserMisconfigurationError(
            f"Expected one `StructureFreezeCallback` at most, by whose rule to freeze, but got {len(found)}."
        )
    callback = found[0] if found else StructureFreezeCallback(head)
    callback.head = head
    return callback


def is_left_out(callback: object) -> bool:
    """Tell whether a callback has no place in a measured fit."""
    return any(kind.__name__ in _LEFT_OUT for kind in type(callback).__mro__)


def record_fit(fit: Fit, recorder: RunRecorder) -> None:
    """Run a fit under a recorder."""
    fit.trainer.callbacks.insert(0, recorder)
    fit.trainer.fit(fit.module, datamodule=fit.data)


def score_best(fit: Fit, recorder: RunRecorder, name: str) -> float:
    """Return the test score of the best weights of a recorded fit.

    Args:
        fit: the fit, which has ended.
        recorder: its recorder.
        name: name of the test score.
    """
    if recorder.best_weights is not None:
        fit.module.load_state_dict(recorder.best_weights)
    fit.trainer.test(fit.module, datamodule=fit.data, verbose=False)
    return float(fit.trainer.callback_metrics[name])
