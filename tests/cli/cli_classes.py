"""Classes that are named on the command line."""

import errno
import os
import urllib.error

import torch
from fits import SomebodysModule, make_loader
from lightning.pytorch import Callback


class WithItsOwnData(SomebodysModule):
    """Needs no data module."""

    def train_dataloader(self):
        return make_loader()

    def val_dataloader(self):
        return make_loader(64)


class SaysOptimizer(Callback):
    """Prints the optimizer, its first learning rate and, if there is a scheduler, when that is stepped."""

    def on_train_start(self, trainer, pl_module):
        (optimizer,) = trainer.optimizers
        intervals = [config.interval for config in trainer.lr_scheduler_configs]
        print("trained with", type(optimizer).__name__, optimizer.param_groups[0]["lr"], *intervals)


class Fails(Callback):
    """Fails as somebody's code may."""

    def on_train_start(self, trainer, pl_module):
        raise ValueError("Expected something else.")


class SaysTrainingClasses(Callback):
    """Prints the classes of the training episodes."""

    def on_train_start(self, trainer, pl_module):
        episodes = trainer.datamodule.episodes["train"]
        print("trained on classes", *sorted({int(y) for n in range(40) for y in episodes[n]["query_labels"]}))


class ScoredByEpoch(WithItsOwnData):
    """Is best after its second epoch, and tells in a test after how many epochs its weights were saved."""

    def __init__(self):
        super().__init__()
        self.register_buffer("epochs", torch.zeros(()))

    def on_train_epoch_start(self):
        self.epochs += 1

    def on_validation_epoch_end(self):
        self.log("val/given", [0.1, 0.9, 0.3, 0.2, 0.5][self.current_epoch])

    def test_step(self, batch, batch_idx):
        self.log("test/epochs", self.epochs)

    def test_dataloader(self):
        return make_loader(64)


class FillsTheDisk(Callback):
    """Fails as a write to a full disk does."""

    def on_train_start(self, trainer, pl_module):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class CannotDownload(Callback):
    """Fails as a library does that cannot reach a server."""

    def on_train_start(self, trainer, pl_module):
        raise urllib.error.URLError("Name or service not known")
