"""Which strategies, optimizers and companions a freeze in the middle of a fit works with: all others are refused."""

import itertools
from typing import Any

from glai_lightning.fitting.heads_in_module import HeadSlot
from glai_lightning.fitting.misconfiguration import UserMisconfigurationError
from glai_lightning.heads.optimizers import trains_any
from glai_lightning.heads.patterns import layout_of
from glai_lightning.heads.restoring import HeadRestorer

# Compared by name: a project may import the `pytorch_lightning` twin of `lightning.pytorch`, whose classes are others.
_WORKING_STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy")
#: Parts of the names of strategies that derive from those, and shard what they hold or compile what they run.
_OTHER_STRATEGIES = ("DeepSpeed", "FSDP", "XLA", "HPU", "Bagua", "ColossalAI")
_COPYING_CALLBACKS = ("WeightAveraging", "StochasticWeightAveraging")
_NAMING_CALLBACKS = ("BaseFinetuning",)
_MASKING_CALLBACKS = ("ModelPruning",)
_MATRIX_OPTIMIZERS = ("Muon",)


def check_trainer(trainer: Any, pl_module: Any) -> None:
    """Refuse what a freeze in the middle of a fit cannot work with.

    Raises:
        MisconfigurationException: for manual optimization, for a strategy that shards parameters or restores them after
            wrapping, and for callbacks that keep a copy of the weights or put masks on them.
    """
    if not pl_module.automatic_optimization:
        raise UserMisconfigurationError(
            "Expected a module with automatic optimization, but got `automatic_optimization=False`: "
            "freezing the structure under manual optimization is not supported."
        )
    strategy = _class_names(trainer.strategy)
    works = any(name in strategy for name in _WORKING_STRATEGIES)
    if not works or any(other in name for name in strategy for other in _OTHER_STRATEGIES):
        raise UserMisconfigurationError(
            "Expected the strategy to be a single device or one of 'ddp', 'ddp_spawn', 'ddp_fork' and 'ddp_notebook', "
            f"but got `{strategy[0]}`, under which a head cannot be frozen in the middle of a fit."
        )
    if getattr(trainer.strategy, "_model_averaging_period", None) is not None:
        raise UserMisconfigurationError(
            "Expected a strategy that gives all processes the same weights in every step, but got one with "
            f"`model_averaging_period={trainer.strategy._model_averaging_period}`."
        )
    for callback in trainer.callbacks:
        if any(name in _COPYING_CALLBACKS for name in _class_names(callback)):
            raise UserMisconfigurationError(
                f"Expected no callback that averages weights beside the structure freeze, but got "
                f"`{type(callback).__name__}`: its copy of the head would keep the old structure."
            )
        if any(name in _MASKING_CALLBACKS for name in _class_names(callback)):
            raise UserMisconfigurationError(
                "Expected no callback that prunes weights beside the structure freeze, but got "
                f"`{type(callback).__name__}`: a masked weight is computed from others, and cannot be frozen."
            )


def check_order(trainer: Any, callback: object, paths: str) -> None:
    """Refuse an order of callbacks in which a fit could not be resumed.

    ``BaseFinetuning`` keeps the names of the parameters in the optimizer's groups, and looks them up when a fit is
    resumed, before or after the head is frozen again. Independent paths have other names than the MLP.

    Raises:
        MisconfigurationException: for a finetuning callback after this one, with independent paths.
    """
    after = list(itertools.dropwhile(lambda other: other is not callback, trainer.callbacks))
    naming = [other for other in after if any(name in _class_names(other) for name in _NAMING_CALLBACKS)]
    if naming and paths == "independent":
        raise UserMisconfigurationError(
            f"Expected `{type(naming[0]).__name__}` to stand before the structure freeze in the list of callbacks with "
            "`paths='independent'`, but it stands after it: a resumed fit would not find the parameters by their names."
        )


def check_launcher(trainer: Any, slot: HeadSlot, paths: str) -> None:
    """Refuse a fit whose result its caller could not load.

    ``ddp_spawn``, ``ddp_fork`` and notebooks fit a copy of the module in other processes, and load its weights into the
    module of the caller, which no callback has seen. Output paths load into the MLP; other paths need a module that
    converts its head by itself, as a ``HeadModule`` does.

    Raises:
        MisconfigurationException: for other than output paths in a module that does not.
    """
    launched = "MultiProcessing" in type(trainer.strategy.launcher).__name__
    if launched and paths != "output" and not HeadRestorer.is_registered(slot.pl_module, slot.name):
        raise UserMisconfigurationError(
            f"Expected `paths` to be 'output' under a strategy that starts processes by itself, but got {paths!r}: the "
            f"module of the main process would be left with the MLP. Use strategy 'ddp', or a `HeadModule`."
        )


def check_optimizers(trainer: Any, slot: HeadSlot, paths: str) -> None:
    """Check that an optimizer trains what goes on being trained once the head is frozen.

    Raises:
        MisconfigurationException: if none holds a parameter of its last Linear, or of the paths in the place of it, if
            one shares its state out among processes, or cannot train path weights.
    """
    for optimizer in trainer.optimizers:
        if "ZeroRedundancyOptimizer" in _class_names(optimizer):
            raise UserMisconfigurationError(
                "Expected optimizers that hold the state of all parameters in every process, but got "
                f"`{type(optimizer).__name__}`, which cannot follow a head that is frozen in the middle of a fit."
            )
        if paths == "independent" and any(name in _MATRIX_OPTIMIZERS for name in _class_names(optimizer)):
            raise UserMisconfigurationError(
                "Expected optimizers for parameters of any shape with `paths='independent'`, but got "
                f"`{type(optimizer).__name__}`, which is for matrices, and path weights have three dimensions."
            )
    output = layout_of(slot.module).output
    if not any(trains_any(optimizer, output) for optimizer in trainer.optimizers):
        raise UserMisconfigurationError(
            f"Expected the optimizer to hold the parameters of the last Linear of the head at {slot.name!r}, "
            "but it holds none of them."
        )


def _class_names(value: object) -> list[str]:
    return [kind.__name__ for kind in type(value).__mro__]
