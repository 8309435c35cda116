"""The callback that multiplies learning rates by the number of processes."""

from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_info

#: What optimizer groups hold of rates: torch's schedulers keep theirs there as well.
_GROUP_RATES = ("lr", "initial_lr", "max_lr", "min_lr")
_SCHEDULER_RATES = ("base_lrs", "max_lrs", "_last_lr")


class LearningRateScaling(Callback):
    """Multiplies the learning rates of a fit by the number of its processes, and says so.

    The linear scaling rule (Goyal et al. 2017, arXiv 1706.02677): "When the minibatch size is multiplied by k, multiply
    the learning rate by k." With W processes of ``batch_size`` each, a step is made on W times as many samples. The
    rule was found for SGD; adaptive optimizers may want less.

    All rates are multiplied at the start of a fit, those that a scheduler keeps too, OneCycleLR's ``max_lr`` for one. A
    resumed fit goes on with the rates of its checkpoint, which are scaled already, by the number of processes then.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from glai_lightning.callbacks import LearningRateScaling
        >>> trainer = Trainer(callbacks=[LearningRateScaling()], logger=False, accelerator="cpu")
    """

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Multiply the rates. What a checkpoint holds of optimizers and schedulers is restored after this."""
        factor = trainer.world_size
        if factor == 1:
            return
        for optimizer in trainer.optimizers:
            before = [group["lr"] for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                for name in _GROUP_RATES:
                    if name in group:
                        group[name] = group[name] * factor
            after = [group["lr"] for group in optimizer.param_groups]
            rank_zero_info(
                f"Multiplied the learning rate of `{type(optimizer).__name__}` by the {factor} processes: "
                f"{_listed(before)} before, {_listed(after)} now."
            )
        for config in trainer.lr_scheduler_configs:
            _scale_scheduler(config.scheduler, factor)


def _scale_scheduler(scheduler: Any, factor: int) -> None:
    for name in _SCHEDULER_RATES:
        if hasattr(scheduler, name):
            setattr(scheduler, name, [rate * factor for rate in getattr(scheduler, name)])
    # SequentialLR and ChainedScheduler.
    for inner in getattr(scheduler, "_schedulers", ()):
        _scale_scheduler(inner, factor)


def _listed(rates: list[Any]) -> str:
    return ", ".join(f"{float(rate):g}" for rate in rates)
