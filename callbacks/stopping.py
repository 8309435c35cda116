"""Stopping a fit after a solve, and not before the solved head was validated."""

from typing import Any


class StopAfterSolve:
    """Stops a fit at most once.

    Attributes:
        wanted: whether the fit is to be stopped still.
    """

    def __init__(self) -> None:
        self.wanted = False
        self._val_every: int | None = None

    def stop(self, trainer: Any) -> None:
        """Let the fit end with this epoch and its validation."""
        self.wanted = False
        trainer.should_stop = True
        # Lightning validates before it stops, unless the epoch is one of those without validation.
        if trainer.check_val_every_n_epoch is not None:
            self._val_every, trainer.check_val_every_n_epoch = trainer.check_val_every_n_epoch, 1

    def restore(self, trainer: Any) -> None:
        """Let checkpoints, which go by how often there is validation, find the user's own setting."""
        if self._val_every is not None:
            trainer.check_val_every_n_epoch, self._val_every = self._val_every, None
