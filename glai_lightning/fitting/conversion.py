"""Finding a head in a LightningModule, and converting it while a Trainer is fitting."""

import itertools
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from glai_lightning.fitting.misconfiguration import UserMisconfigurationError
from glai_lightning.heads.frozen import GLAIHead, freeze_in_place, unfreeze_in_place
from glai_lightning.heads.layout import read_head
from glai_lightning.heads.optimizers import replace_parameters, restore_parameters, trains_any
from glai_lightning.heads.patterns import layout_of
from glai_lightning.heads.record import Paths
from glai_lightning.heads.restoring import HeadRestorer

# Compared by name: a project may import the `pytorch_lightning` twin of `lightning.pytorch`, whose classes are others.
_WORKING_STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy")
#: Parts of the names of strategies that derive from those, and shard what they hold or compile what they run.
_OTHER_STRATEGIES = ("DeepSpeed", "FSDP", "XLA", "HPU", "Bagua", "ColossalAI")
_COPYING_CALLBACKS = ("WeightAveraging", "StochasticWeightAveraging")
_NAMING_CALLBACKS = ("BaseFinetuning",)


def find_head(pl_module: nn.Module, head_name: str) -> nn.Module:
    """Return the module at a qualified name, which must be there under that name only.

    Args:
        pl_module: the LightningModule.
        head_name: qualified name of the head.

    Raises:
        MisconfigurationException: if there is no such module (the message lists those that look like heads), if it is
            wrapped by ``torch.compile``, or if the module or a layer of it is registered under a second name.
    """
    named: dict[str, nn.Module] = dict(pl_module.named_modules(remove_duplicate=False))
    head = named.get(head_name)
    if head is None or not head_name:
        raise UserMisconfigurationError(
            f"Expected `head` to name a module of `{type(pl_module).__name__}`, but got {head_name!r}. "
            f"Modules that look like heads: {list_heads(pl_module) or 'none'}."
        )
    if hasattr(head, "_orig_mod"):
        raise UserMisconfigurationError(
            f"Expected the head at {head_name!r} to be a plain module, but got one wrapped by `torch.compile(head)`. "
            f"Call `head.compile()` instead, which compiles in place."
        )
    inside = {
        id(child): f"{head_name}.{name}" if name else head_name
        for name, child in head.named_modules()
        if any(True for _ in child.parameters())
    }
    for name, child in named.items():
        if id(child) in inside and name != head_name and not name.startswith(f"{head_name}."):
            raise UserMisconfigurationError(
                f"Expected the head to be registered under one name, but got {inside[id(child)]!r} "
                f"under {name!r} as well: one of the two would keep the unconverted layers."
            )
    return head


def list_heads(pl_module: nn.Module) -> list[str]:
    """List the qualified names of the modules in which an MLP head can be read, outermost only."""
    heads: list[str] = []
    for name, module in pl_module.named_modules():
        if not name or any(name.startswith(f"{head}.") for head in heads):
            continue
        try:
            read_head(module)
        except ValueError:
            continue
        heads.append(name)
    return heads


def check_trainer(trainer: Any, pl_module: Any) -> None:
    """Refuse what a conversion in the middle of a fit cannot work with.

    Raises:
        MisconfigurationException: for manual optimization, for a strategy that shards parameters or restores them after
            wrapping, and for callbacks that keep a copy of the weights.
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
            f"but got `{strategy[0]}`, under which a head cannot be replaced in the middle of a fit."
        )
    if getattr(trainer.strategy, "_model_averaging_period", None) is not None:
        raise UserMisconfigurationError(
            "Expected a strategy that gives all processes the same weights in every step, but got one with "
            f"`model_averaging_period={trainer.strategy._model_averaging_period}`."
        )
    for callback in trainer.callbacks:
        copying = [name for name in _class_names(callback) if name in _COPYING_CALLBACKS]
        if copying:
            raise UserMisconfigurationError(
                f"Expected no callback that averages weights beside the structure freeze, but got "
                f"`{type(callback).__name__}`: its copy of the head would keep the old structure."
            )


def check_order(trainer: Any, callback: object, paths: str) -> None:
    """Refuse an order of callbacks in which a fit could not be resumed.

    ``BaseFinetuning`` keeps the names of the parameters in the optimizer's groups, and looks them up when a fit is
    resumed, before or after the head is frozen again. Independent paths have other names than the MLP.

    Raises:
        MisconfigurationException: for a finetuning callback behind this one, with independent paths.
    """
    behind = list(itertools.dropwhile(lambda other: other is not callback, trainer.callbacks))
    naming = [other for other in behind if any(name in _class_names(other) for name in _NAMING_CALLBACKS)]
    if naming and paths == "independent":
        raise UserMisconfigurationError(
            f"Expected `{type(naming[0]).__name__}` to stand before the structure freeze in the list of callbacks with "
            "`paths='independent'`, but got it behind: a resumed fit would not find the parameters by their names."
        )


def check_launcher(trainer: Any, pl_module: nn.Module, head_name: str, paths: str) -> None:
    """Refuse a fit whose result its caller could not load.

    ``ddp_spawn``, ``ddp_fork`` and notebooks fit a copy of the module in other processes, and load its weights into the
    module of the caller, which no callback has seen. Output paths load into the MLP; other paths need a module that
    converts its head by itself, as a ``HeadModule`` does.

    Raises:
        MisconfigurationException: for other than output paths in a module that does not.
    """
    launched = "MultiProcessing" in type(trainer.strategy.launcher).__name__
    if launched and paths != "output" and not HeadRestorer.is_registered(pl_module, head_name):
        raise UserMisconfigurationError(
            f"Expected `paths` to be 'output' under a strategy that starts processes by itself, but got {paths!r}: the "
            f"module of the main process would be left with the MLP. Use strategy 'ddp', or a `HeadModule`."
        )


def check_optimizers(trainer: Any, head: nn.Module, head_name: str) -> None:
    """Check that an optimizer trains what goes on being trained once the head is frozen.

    Raises:
        MisconfigurationException: if none holds a parameter of its last Linear, or of the paths in the place of it, or
            if one shares its state out among processes.
    """
    for optimizer in trainer.optimizers:
        if "ZeroRedundancyOptimizer" in _class_names(optimizer):
            raise UserMisconfigurationError(
                "Expected optimizers that hold the state of all parameters in every process, but got "
                f"`{type(optimizer).__name__}`, which cannot follow a head that is replaced in the middle of a fit."
            )
    output = layout_of(head).output
    if not any(trains_any(optimizer, output) for optimizer in trainer.optimizers):
        raise UserMisconfigurationError(
            f"Expected the optimizer to hold the parameters of the last Linear of the head at {head_name!r}, "
            "but it holds none of them."
        )


def freeze_head_in_fit(
    trainer: Any, pl_module: nn.Module, head_name: str, *, paths: Paths, freeze_epoch: int | None
) -> GLAIHead:
    """Convert the head at a name into one with frozen structure, and let optimizer and strategy follow.

    Returns:
        The frozen head, in its place in the module.
    """
    head = freeze_in_place(pl_module.get_submodule(head_name), paths=paths, freeze_epoch=freeze_epoch)
    follow_in_fit(trainer, head)
    return head


def follow_in_fit(trainer: Any, head: GLAIHead) -> None:
    """Let the optimizers and the strategy of a fit follow a head that was just converted."""
    for optimizer in trainer.optimizers:
        replace_parameters(optimizer, head)
    rewrap(trainer)


def thaw_head_in_fit(
    trainer: Any,
    pl_module: nn.Module,
    head_name: str,
    weights: Mapping[str, Tensor],
    optimizer_state: Mapping[str, dict[str, Any]],
) -> None:
    """Put back the MLP that a frozen head was, and let optimizer and strategy follow.

    Args:
        trainer: the Trainer of the fit.
        pl_module: its module.
        head_name: qualified name of the frozen head.
        weights: state dict of the MLP to go back to.
        optimizer_state: what ``copy_state`` copied of it.
    """
    head = pl_module.get_submodule(head_name)
    assert isinstance(head, GLAIHead)
    for optimizer in trainer.optimizers:
        restore_parameters(optimizer, head, partial(unfreeze_in_place, head, weights), optimizer_state)
    rewrap(trainer)


def rewrap(trainer: Any) -> None:
    """Build the DistributedDataParallel wrapper again, if there is one.

    DDP reduces the gradients of the parameters that it found when it was built, and waits for all of them
    (pytorch#12603): without this, new parameters diverge between ranks in silence.
    """
    strategy = trainer.strategy
    if hasattr(strategy, "configure_ddp"):
        strategy.model = strategy.lightning_module
        strategy.configure_ddp()


def _class_names(value: object) -> list[str]:
    return [kind.__name__ for kind in type(value).__mro__]
