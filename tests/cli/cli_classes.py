"""Classes that are named on the command line."""

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
