"""The callback that reports what the freeze did to a fit."""

import multiprocessing
import os
import time
from dataclasses import asdict, replace
from typing import Any, Literal

import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import Callback

from glai_lightning.callbacks.callback_state import check_state
from glai_lightning.callbacks.fit_plots import as_image, churn_figure, save_png, score_figure
from glai_lightning.callbacks.fit_table import fit_table
from glai_lightning.callbacks.structure_freeze import StructureFreezeCallback
from glai_lightning.fitting.fit_record import EpochRecord, FitRecord
from glai_lightning.fitting.misconfiguration import UserMisconfigurationError
from glai_lightning.fitting.sizes import count_bytes, count_trainable

_STATE = {"epochs": list, "mlp_parameters": int | None}
_EPOCH = {
    "epoch": int,
    "seconds": int | float,
    "steps": int,
    "frozen": bool,
    "churn": int | float | None,
    "score": int | float | None,
    "trainable_parameters": int,
    "optimizer_state_bytes": int,
}


class FitReport(Callback):
    """Prints, at the end of a fit, what freezing the structure did to it, and draws two plots.

    The table says when the structure froze and why; trainable parameters, optimizer state and seconds per step before
    and after; and the best and last validation score. ``structure_churn.png`` (churn after each epoch, thresholds,
    freeze) and ``score_over_seconds.png`` (validation score against training seconds) are written into the folder of
    the first logger, and as images into every logger that takes images, such as TensorBoard.

    Training seconds are wall-clock seconds from the start of an epoch to its end without validation. What callbacks
    further down the list do at the start of an epoch counts too: listed before the ``StructureFreezeCallback``, the
    report counts the conversion. Steps are counted in batches. All figures are those of the first process.

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
        super().__init__()
        if not isinstance(mode, str) or mode not in ("min", "max"):
            raise UserMisconfigurationError(f"Expected `mode` to be 'min' or 'max', but got {mode!r}.")
        self.score = score
        self.mode = mode
        self.record: FitRecord | None = None
        self.prints_at_fit_end = True
        self._epochs: dict[int, EpochRecord] = {}
        self._mlp_parameters: int | None = None
        self._restored: dict[str, Any] | None = None
        self._notes: list[str] = []
        self._is_first_process = True
        self._clock_started: float | None = None
        self._checks_before: dict[str, int] = {}

    def print_table(self) -> None:
        """Print the table, in the first process only; nothing if no fit has ended in this process."""
        if self.record is None or not self._is_first_process:
            return
        print("\n".join(["", fit_table(self.record), *(f"  {note}" for note in self._notes)]), flush=True)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check that there is a freeze to report on."""
        self._is_first_process = trainer.is_global_zero
        self._restored = None
        if stage == "fit":
            self._freeze_callback(trainer)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin a record, or go on with that of the fit that is resumed."""
        # A checkpoint's state is read for a mere test as well, which must not touch the record: hence only here.
        if self._restored is not None:
            epochs = [EpochRecord(**{name: epoch[name] for name in _EPOCH}) for epoch in self._restored["epochs"]]
            self._epochs = {epoch.epoch: epoch for epoch in epochs}
            self._mlp_parameters = self._restored["mlp_parameters"]
            self._restored = None
        else:
            self._epochs = {number: epoch for number, epoch in self._epochs.items() if number < trainer.current_epoch}
        callback = self._freeze_callback(trainer)
        self.record, self._notes = None, []
        self._clock_started = None
        self._checks_before = _count_checks(callback)
        if not callback.frozen:
            self._mlp_parameters = count_trainable(pl_module)
        elif not self._epochs:
            self._mlp_parameters = None

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the clock."""
        self._checks_before = _count_checks(self._freeze_callback(trainer))
        self._clock_started = time.perf_counter()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Start the clock again, after a validation inside the epoch."""
        if self._clock_started is None:
            self._clock_started = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the batch."""
        self._epoch(trainer).steps += 1

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Stop the clock. A checkpoint may be saved at the end of the validation, so the epoch is summed up here."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._sum_up(trainer, pl_module)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Note the score."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        name, _ = self._monitored(trainer)
        if name in trainer.callback_metrics:
            self._epoch(trainer).score = float(trainer.callback_metrics[name])

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Stop the clock and sum up the epoch."""
        self._sum_up(trainer, pl_module)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Draw the plots and print the table."""
        callback = self._freeze_callback(trainer)
        name, mode = self._monitored(trainer)
        self.record = FitRecord(
            epochs=[self._epochs[number] for number in sorted(self._epochs)],
            frozen=callback.frozen,
            freeze_epoch=callback.freeze_epoch,
            freeze_reason=callback.freeze_reason,
            churn_tolerance=callback.churn_tolerance,
            relative_tolerance=callback.relative_tolerance,
            score_name=name,
            mode=mode,
            mlp_parameters=self._mlp_parameters,
        )
        self._write_plots(trainer, self.record)
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

    def state_dict(self) -> dict[str, Any]:
        """Return the record so far, in primitives."""
        return {"epochs": [asdict(epoch) for epoch in self._epochs.values()], "mlp_parameters": self._mlp_parameters}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state for the start of training.

        Raises:
            MisconfigurationException: if it is not the state of a report.
        """
        check_state(state_dict, _STATE, "`FitReport`")
        for epoch in state_dict["epochs"]:
            check_state(epoch, _EPOCH, "an epoch of `FitReport`")
        self._restored = state_dict

    def _freeze_callback(self, trainer: Any) -> StructureFreezeCallback:
        found = [callback for callback in trainer.callbacks if isinstance(callback, StructureFreezeCallback)]
        if len(found) != 1:
            raise UserMisconfigurationError(
                f"Expected the trainer to have one `StructureFreezeCallback` beside `FitReport`, but got {len(found)}."
            )
        return found[0]

    def _monitored(self, trainer: Any) -> tuple[str | None, Literal["min", "max"]]:
        if self.score is not None:
            return self.score, self.mode
        for checkpoint in trainer.checkpoint_callbacks:
            if getattr(checkpoint, "monitor", None) is not None:
                return checkpoint.monitor, checkpoint.mode
        return None, self.mode

    def _epoch(self, trainer: Any) -> EpochRecord:
        # By number: the hook at the start of an epoch is not called where a fit resumes in the middle of one.
        return self._epochs.setdefault(trainer.current_epoch, EpochRecord(trainer.current_epoch))

    def _sum_up(self, trainer: Any, pl_module: Any) -> None:
        epoch = self._epoch(trainer)
        if self._clock_started is not None:
            if pl_module.device.type == "cuda":
                torch.cuda.synchronize(pl_module.device)
            epoch.seconds += time.perf_counter() - self._clock_started
            self._clock_started = None
        callback = self._freeze_callback(trainer)
        epoch.frozen = callback.frozen
        checks = _count_checks(callback)
        checked = [name for name, count in checks.items() if count > self._checks_before.get(name, 0)]
        if checked:
            epoch.churn = max(callback.heads[name].churn_history[-1] for name in checked)
        epoch.trainable_parameters = count_trainable(pl_module)
        epoch.optimizer_state_bytes = sum(count_bytes(dict(optimizer.state)) for optimizer in trainer.optimizers)

    def _write_plots(self, trainer: Any, record: FitRecord) -> None:
        # Asked for by all processes, for the first one broadcasts it.
        folder = trainer.log_dir if trainer.loggers else None
        if not trainer.is_global_zero:
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


def _count_checks(callback: StructureFreezeCallback) -> dict[str, int]:
    return {name: len(head.churn_history) for name, head in callback.heads.items()}
