"""The sides of a comparison, and the fit of each: the MLP that is never frozen, and what is measured against it."""

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers.logger import DummyLogger
from torch import nn

from glai_lightning.callbacks.structure_freeze import StructureFreezeCallback
from glai_lightning.fitting.fit_record import Mode
from glai_lightning.fitting.heads_in_module import find_head
from glai_lightning.fitting.misconfiguration import UserMisconfigurationError
from glai_lightning.heads.frozen import Paths
from glai_lightning.heads.layout import HeadLayout, HiddenLayer, read_head
from glai_lightning.heads.paths import count_path_weights, matched_hidden_features

#: Makes, for a seed, a fresh module, its data module (or None) and a Trainer.
MakeFit = Callable[[int], tuple[Any, Any, Any]]

#: The side that all others are compared with.
REFERENCE = "mlp"

# By name, for a project may import them from the `pytorch_lightning` twin. What writes files or draws would be measured
# with the fit; early stopping is the protocol's own, and so is the freeze.
_LEFT_OUT = ("Checkpoint", "ProgressBar", "ModelSummary", "EarlyStopping", "FitReport", "StructureFreezeCallback")


@dataclass(frozen=True)
class Variant:
    """One side of a comparison.

    Args:
        name: what it is called on the command line and in files.
        description: what it is, in plain words.
        paths: what stays trainable once the head is frozen; ``None`` for a head that never is.
        solves: whether the path weights are solved for at the freeze, after which the fit stops.
        freeze_at_epoch: epoch (0-based) at whose start the structure is frozen, whatever the churn.
        matched: whether the head is narrowed until its independent paths have as many weights as the MLP.
    """

    name: str
    description: str
    paths: Paths | None = None
    solves: bool = False
    freeze_at_epoch: int | None = None
    matched: bool = False


_VARIANTS = {
    variant.name: variant
    for variant in (
        Variant(REFERENCE, "the MLP, never frozen"),
        Variant("output", "output paths, trained on: freezing the inner layers", "output"),
        Variant("output+solve", "output paths, solved", "output", solves=True),
        Variant("tangent", "tangent paths, trained on", "tangent"),
        Variant("independent", "independent paths at matched width, trained on", "independent", matched=True),
        Variant("independent+solve", "independent paths at matched width, solved", "independent", True, None, True),
        Variant("random", "a random structure, frozen before the first step, solved after an epoch", "output", True, 0),
    )
}

#: What is compared unless told otherwise.
DEFAULT_VARIANTS = ("mlp", "output", "output+solve", "tangent", "independent", "random")


def find_variants(names: str | Sequence[str]) -> list[Variant]:
    """Return the variants of these names, in their order.

    Args:
        names: names, or one string of names with commas between them.

    Raises:
        MisconfigurationException: if a name is unknown or given twice, or the MLP or a side to it is missing.

    Example:
        >>> [variant.name for variant in find_variants("mlp,output+solve")]
        ['mlp', 'output+solve']
    """
    listed = [name.strip() for name in (names.split(",") if isinstance(names, str) else names)]
    known = ", ".join(map(repr, _VARIANTS))
    for name in listed:
        if name not in _VARIANTS:
            raise UserMisconfigurationError(f"Expected `variants` to be some of {known}, but got {name!r}.")
    if len(set(listed)) < len(listed):
        raise UserMisconfigurationError(f"Expected every variant to be named once, but got {','.join(listed)!r}.")
    if REFERENCE not in listed or len(listed) < 2:
        raise UserMisconfigurationError(
            f"Expected `variants` to hold '{REFERENCE}' and at least one to compare with it, of {known}, "
            f"but got {','.join(listed)!r}."
        )
    return [_VARIANTS[name] for name in listed]


def find_variant(name: str) -> Variant:
    """Return the variant of a name."""
    return _VARIANTS[name]


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
        variant: the variant.
        rules: what holds for every fit.
        module: the LightningModule.
        data: its data module, or ``None``.
        trainer: the Trainer, with the callbacks of the variant.
        freeze: the callback that freezes the head; ``None`` for the MLP.
    """

    variant: Variant
    rules: Rules
    module: Any
    data: Any
    trainer: Any
    freeze: StructureFreezeCallback | None


def prepare_fit(parts: tuple[Any, Any, Any], variant: Variant, rules: Rules, solver: Any) -> Fit:
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
    freeze = freeze_callback(variant, find_freeze(trainer, rules.head), solver)
    head = find_head(module, rules.head)
    if variant.matched:
        try:
            module.set_submodule(rules.head, matched_head(head))
        except ValueError as error:
            raise UserMisconfigurationError(f"The head at {rules.head!r} cannot be matched. {error}") from error
    stopping = [] if rules.patience is None else [EarlyStopping(rules.score, patience=rules.patience, mode=rules.mode)]
    kept = [one for one in trainer.callbacks if not any(kind.__name__ in _LEFT_OUT for kind in type(one).__mro__)]
    trainer.callbacks = [*kept, *([] if freeze is None else [freeze]), *stopping]
    # User code may log by hand, and some callbacks want a logger: this one takes everything and does nothing.
    trainer.loggers = [DummyLogger()] if trainer.loggers else []
    trainer.num_sanity_val_steps = 0
    return Fit(variant, rules, module, data, trainer, freeze)


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


def freeze_callback(variant: Variant, given: StructureFreezeCallback, solver: Any) -> StructureFreezeCallback | None:
    """Return the callback that makes a variant of a fit, by the freeze rule of the one given.

    Args:
        variant: the variant.
        given: the callback whose class and settings are taken over, but for what the variant decides.
        solver: what a variant that solves solves with.

    Returns:
        A new callback; ``None`` for the MLP.
    """
    if variant.paths is None:
        return None
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(type(given)).parameters.values()
    names = [p.name for p in parameters if p.kind not in kinds and hasattr(given, p.name)]
    settings = {name: getattr(given, name) for name in names}
    settings |= {"paths": variant.paths, "verbose": False}
    settings |= {"solver": solver if variant.solves else None, "stop_after_solve": variant.solves}
    if variant.freeze_at_epoch is not None:
        settings["freeze_at_epoch"] = variant.freeze_at_epoch
    return type(given)(**settings)


def matched_head(head: nn.Module) -> nn.Sequential:
    """Return a fresh head like the one given, so narrow that its independent paths have as many weights as that MLP.

    One hidden layer has the width of ``matched_hidden_features``; several are narrowed in proportion, to the widest
    that have no more path weights than the MLP has weights.

    Args:
        head: an MLP head that can be read; it is not changed.

    Returns:
        A head of the same layers: kinds, biases, BatchNorm, activations, and what stands before and behind them.

    Raises:
        ValueError: if the head cannot be read.

    Example:
        >>> from glai_lightning import mlp_head
        >>> matched_head(mlp_head(64, 1024, 10))
        Sequential(
          (0): Linear(in_features=64, out_features=118, bias=True)
          (1): ReLU()
          (2): Linear(in_features=118, out_features=10, bias=True)
        )
    """
    layout = read_head(head)
    widths = _matched_widths(layout)
    modules: list[nn.Module] = [copy.deepcopy(module) for module in layout.leading]
    for layer, before, width in zip(layout.hidden, widths, widths[1:], strict=False):
        modules += _hidden_modules(layer, before, width)
    modules.append(_linear(layout.output, widths[-2], widths[-1]))
    return nn.Sequential(*modules, *(copy.deepcopy(module) for module in layout.trailing))


def _hidden_modules(layer: HiddenLayer, before: int, width: int) -> list[nn.Module]:
    norm = layer.norm
    if norm is None:
        return [_linear(layer.linear, before, width), copy.deepcopy(layer.activation)]
    assert norm.momentum is not None
    narrowed = type(norm)(width, eps=norm.eps, momentum=norm.momentum, affine=norm.affine)
    return [_linear(layer.linear, before, width), narrowed, copy.deepcopy(layer.activation)]


def _linear(like: nn.Linear, before: int, width: int) -> nn.Linear:
    return nn.Linear(before, width, bias=like.bias is not None, dtype=like.weight.dtype)


def _matched_widths(layout: HeadLayout) -> tuple[int, ...]:
    inputs, *hidden, outputs = layout.widths
    if len(hidden) == 1:
        return inputs, matched_hidden_features(inputs, hidden[0], outputs), outputs
    hidden_bias = [layer.linear.bias is not None or layer.norm is not None for layer in layout.hidden]
    output_bias = layout.output.bias is not None
    linears = [*(layer.linear for layer in layout.hidden), layout.output]
    weights = sum(parameter.numel() for linear in linears for parameter in linear.parameters())

    def narrowed(first: int) -> tuple[int, ...]:
        scaled = (max(1, round(width * first / hidden[0])) for width in hidden[1:])
        return (inputs, first, *scaled, outputs)

    fitting = (
        narrowed(first)
        for first in range(hidden[0], 0, -1)
        if count_path_weights(narrowed(first), hidden_bias, output_bias) <= weights
    )
    return next(fitting, narrowed(1))
