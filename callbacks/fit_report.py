"""The callback that reports what the freeze did to a fit."""

import multiprocessing
import os
import textwrap
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, replace
from typing import Any, Literal

from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import Callback

from glai_lightning.callbacks.callback_state import check_state
from glai_lightning.callbacks.fit_plots import as_image, churn_figure, save_png, score_figure
from glai_lightning.callbacks.fit_table import fit_table
from glai_lightning.callbacks.structure_freeze import StructureFreezeCallback
from glai_lightning.checks import MissingLibraryError
from glai_lightning.fitting.fit_record import EpochRecord, FitRecord, SolveRecord
from glai_lightning.fitting.fit_recorder import FitRecorder
from glai_lightning.fitting.misconfiguration import UserMisconfigurationError
from glai_lightning.heads.joined import head_at
from glai_lightning.heads.layout import CannotBeCalledError
from glai_lightning.heads.patterns import layout_of
from glai_lightning.optional import import_optional

_STATE = {
    "epochs": list,
    "open": Mapping | None,
    "mlp_parameters": int | None,
    "freeze_step": int | None,
    "solve": Mapping | None,
}
_WIDER: dict[Any, Any] = {float: int | float, float | None: int | float | None}
_EPOCH: dict[str, Any] = {entry.name: _WIDER.get(entry.type, entry.type) for entry in fields(EpochRecord)}
_SOLVE: dict[str, Any] = {entry.name: _WIDER.get(entry.type, entry.type) for entry in fields(SolveRecord)}


class FitReport(FitRecorder, Callback):
    """Prints, at the end of a fit, what freezing the structure did to it, and draws two plots.

    The table says when the structure froze and why; trainable parameters, optimizer state and seconds per step before
    and after; and the best and last validation score. ``structure_churn.png`` (churn after each epoch, thresholds,
    freeze) and ``score_over_seconds.png`` (validation score against seconds) are written into the folder of the first
    logger, and as images into every logger that takes images, such as TensorBoard.

    List it first, so that it counts the seconds of the freeze and the solve. Steps are counted in batches. All figures
    are those of the first process.

    Args:
        score: name of the validation score; by default what the first ``ModelCheckpoint`` with a monitor monitors.
        mode: whether the best score is the largest or the smallest; without ``score`` the checkpoint's mode counts.

    Attributes:
        record: what the fit was like, with the scores of a test that the same trainer ran after it; ``None`` until a
            fit has ended.
        prints_at_fit_end: whether the table is printed at the end of the fit. ``glai fit`` leaves it until after the
            test, and calls ``print_table`` then.

    Raises:
        MisconfigurationException: if ``mode`` is neither; at the start of a fit, if the trainer does not have one
            ``StructureFreezeCallback``.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from glai_lightning.callbacks import FitReport, StructureFreezeCallback
        >>> callbacks = [FitReport("val/accuracy"), StructureFreezeCallback("head")]
        >>> trainer = Trainer(callbacks=callbacks, logger=False, accelerator="cpu")
    """

    def __init__(self, score: str | None = None, mode: Literal["min", "max"] = "max") -> None:
        if not isinstance(mode, str) or mode not in ("min", "max"):
            raise UserMisconfigurationError(f"Expected `mode` to be 'min' or 'max', but got {mode!r}.")
        super().__init__(score, mode)
        self.record: FitRecord | None = None
        self.prints_at_fit_end = True
        self._score_given = score is not None
        self._notes: list[str] = []
        self._is_first_process = True

    def print_table(self) -> None:
        """Print the table, in the first process only; nothing if no fit has ended in this process."""
        if self.record is None or not self._is_first_process:
            return
        notes = [line for note in self._notes for line in _wrapped(note)]
        print("\n".join(["", fit_table(self.record), *(f"  {line}" for line in notes)]), flush=True)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Find the freeze to report on and the score, and start the clock."""
        super().setup(trainer, pl_module, stage)
        self._is_first_process = trainer.is_global_zero
        if stage != "fit":
            return
        found = [callback for callback in trainer.callbacks if isinstance(callback, StructureFreezeCallback)]
        if len(found) != 1:
            raise UserMisconfigurationError(
                f"Expected the trainer to have one `StructureFreezeCallback` beside `FitReport`, but got {len(found)}."
            )
        self.freeze = found[0]
        monitoring = [callback for callback in trainer.checkpoint_callbacks if getattr(callback, "monitor", None)]
        if not self._score_given and monitoring:
            self.score, self.mode = monitoring[0].monitor, monitoring[0].mode

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Give the loggers what the fit is made of, for TensorBoard's table of hyper-parameters."""
        # Before Lightning's own, which follows: TensorBoard reads the first of a run.
        entries = {
            **(getattr(pl_module, "hparams_initial", None) or {}),
            **_hyperparameters(self.freeze, trainer, pl_module),
        }
        for logger in trainer.loggers:
            logger.log_hyperparams({name: value for name, value in entries.items() if not name.startswith("_")})

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin a record, or continue that of the fit that is resumed."""
        super().on_train_start(trainer, pl_module)
        self.record, self._notes = None, []

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Draw the plots and print the table."""
        record = self.record = self.finish(trainer, pl_module)
        if record.one_pass is not None:
            self._notes.append(str(record.one_pass))
        self._write_plots(trainer, record)
        _log_best(trainer, record)
        # A process that a spawning strategy made ends here, and its record with it.
        if self.prints_at_fit_end or multiprocessing.parent_process() is not None:
            self.print_table()

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        """Add the scores of a test after the fit to its record."""
        if self.record is None:
            return
        weights = os.path.basename(trainer.ckpt_path) if trainer.ckpt_path else "the weights at the end of the fit"
        scores = {name: float(score) for name, score in trainer.callback_metrics.items()}
        self.record = replace(self.record, tested=weights, test_scores=scores)
        _log_best(trainer, self.record)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state for the start of training.

        Raises:
            MisconfigurationException: if it is not the state of a report.
        """
        check_state(state_dict, _STATE, "`FitReport`")
        epochs, unfinished, solve = state_dict["epochs"], state_dict["open"], state_dict["solve"]
        for epoch in epochs if unfinished is None else [*epochs, unfinished]:
            check_state(epoch, _EPOCH, "an epoch of `FitReport`")
        if solve is not None:
            check_state(solve, _SOLVE, "the solve of `FitReport`")
        self._restored = {
            **state_dict,
            "epochs": [_only(_EPOCH, epoch) for epoch in epochs],
            "open": _only(_EPOCH, unfinished),
            "solve": _only(_SOLVE, solve),
        }

    def _write_plots(self, trainer: Any, record: FitRecord) -> None:
        # Asked for by all processes, for the first one broadcasts it.
        folder = trainer.log_dir if trainer.loggers else None
        if not trainer.is_global_zero:
            return
        try:
            import_optional("matplotlib", needed_for="the plots of `FitReport`", extra="report")
        except MissingLibraryError as error:
            # The fit is over, and its table needs no plots.
            self._notes.append(f"no plots were written. {error}")
            return
        figures = {"structure_churn": churn_figure(record)}
        if record.scored:
            figures["score_over_seconds"] = score_figure(record)
        for name, figure in figures.items():
            if folder is not None:
                files = get_filesystem(folder)
                files.makedirs(folder, exist_ok=True)
                path = os.path.join(folder, f"{name}.png")
                with files.open(path, "wb") as file:
                    save_png(figure, file)
                self._notes.append(f"plot: {path}")
            for logger in trainer.loggers:
                # By what it can do: loggers of either Lightning namespace, and of other people.
                if hasattr(logger.experiment, "add_image"):
                    logger.experiment.add_image(
                        f"fit_report/{name}", as_image(figure), trainer.global_step, dataformats="HWC"
                    )
        if folder is None:
            self._notes.append("no plots were written, because the trainer has no logger with a folder")


def _log_best(trainer: Any, record: FitRecord) -> None:
    """Log the best score as what TensorBoard's table shows beside the hyper-parameters; every run resets it to -1."""
    best = record.best
    for logger in trainer.loggers:
        if best is not None and hasattr(logger.experiment, "add_scalar"):
            logger.experiment.add_scalar("hp_metric", best.val_score, trainer.global_step)


def _hyperparameters(freeze: StructureFreezeCallback, trainer: Any, pl_module: Any) -> dict[str, Any]:
    """Return what a fit is made of: its rate, the widths of its heads, and when and how they are frozen."""
    entries: dict[str, Any] = {}
    for optimizer in trainer.optimizers[:1]:
        group = optimizer.param_groups[0]
        rate = next(group[name] for name in ("max_lr", "initial_lr", "lr") if name in group)
        entries |= {"optimizer": type(optimizer).__name__, "learning_rate": float(rate)}
    for name in freeze.heads:
        key = "widths" if len(freeze.heads) == 1 else f"widths/{name}"
        # A head that is read on the first batch has no widths yet.
        with suppress(CannotBeCalledError):
            entries[key] = "-".join(map(str, layout_of(head_at(pl_module, name)).widths))
    settings = ("paths", "churn_tolerance", "relative_tolerance", "patience", "min_epochs", "min_steps")
    entries |= {name: getattr(freeze, name) for name in (*settings, "freeze_at_epoch", "stop_after_solve")}
    return entries | {
        "solver": freeze.solver if isinstance(freeze.solver, str | None) else type(freeze.solver).__name__
    }


def _only(kinds: dict[str, Any], entries: dict[str, Any] | None) -> dict[str, Any] | None:
    return None if entries is None else {name: entries[name] for name in kinds}


def _wrapped(note: str) -> list[str]:
    return textwrap.wrap(note, 76, break_long_words=False, break_on_hyphens=False)
