"""The sides of a comparison, and the fit of each: the MLP that is never frozen, and what is measured against it."""

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers.logger import DummyLogger
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from glai_lightning.callbacks.structure_freeze import StructureFreezeCallback
from glai_lightning.fitting.fit_record import Mode
from glai_lightning.fitting.heads_in_module import find_head
from glai_lightning.fitting.misconfiguration import UserMisconfigurationError
from glai_lightning.heads.chain import HiddenLayer
from glai_lightning.heads.layout import HeadLayout, read_head
from glai_lightning.heads.paths import count_path_weights, matched_hidden_features
from glai_lightning.heads.record import Paths

#: Makes, for a seed, a fresh module, its data module (or None) and a Trainer.
MakeFit = Callable[[int], tuple[Any, Any, Any]]

#: The side that all others are compared with.
REFERENCE = "mlp"
#: The largest rate of ``annealed``, as a multiple of the optimizer's own.
ANNEALED_RATE = 3.0

# By name, for a project may import them from the `pytorch_lightning` twin. What writes files or draws would be measured
# with the fit; early stopping is the protocol's own, and so is the freeze.
_FREEZING = ("StructureFreezeCallback", "FreezeByName")
_LEFT_OUT = ("Checkpoint", "ProgressBar", "ModelSummary", "EarlyStopping", "FitReport", *_FREEZING)


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
        linear: whether the head has no hidden layer.
        anneals: whether the rate follows one cycle over as many epochs as 'output+solve' took in time.
    """

    name: str
    description: str
    paths: Paths | None = None
    solves: bool = False
    freeze_at_epoch: int | None = None
    matched: bool = False
    linear: bool = False
    anneals: bool = False


#: The variant whose time ``annealed`` is given.
BUDGET = "output+solve"

#: Every variant, by its name.
VARIANTS = {
    variant.name: variant
    for variant in (
        Variant(REFERENCE, "the MLP, never frozen"),
        Variant("output", "output paths, trained on: freezing the inner layers", "output"),
        Variant("output+solve", "output paths, solved", "output", solves=True),
        Variant("tangent", "tangent paths, trained on", "tangent"),
        Variant("independent", "independent paths at matched width, trained on", "independent", matched=True),
        Variant("independent+solve", "independent paths at matched width, solved", "independent", True, None, True),
        Variant("random", "a random structure, frozen before the first step, solved after an epoch", "output", True, 0),
        Variant("linear", "no hidden layer, solved after an epoch", "output", True, 0, linear=True),
        Variant(
            "annealed",
            f"the MLP under one cycle of the rate, over as many epochs as {BUDGET} took in time",
            anneals=True,
        ),
    )
}

#: What is compared unless told otherwise.
DEFAULT_VARIANTS = ("mlp", "output", "output+solve", "tangent", "independent", "annealed", "linear", "random")


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
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise UserMisconfigurationError(f"Expected `variants` to be names of variants, but got {names!r}.")
    listed = [name.strip() for name in (names.split(",") if isinstance(names, str) else names)]
    known = ", ".join(map(repr, VARIANTS))
    for name in listed:
        if name not in VARIANTS:
            raise UserMisconfigurationError(f"Expected `variants` to be some of {known}, but got {name!r}.")
    if len(set(listed)) < len(listed):
        raise UserMisconfigurationError(f"Expected every variant to be named once, but got {','.join(listed)!r}.")
    if REFERENCE not in listed or len(listed) < 2:
        raise UserMisconfigurationError(
            f"Expected `variants` to hold '{REFERENCE}' and at least one to compare with it, of {known}, "
            f"but got {','.join(listed)!r}."
        )
    if "annealed" in listed and BUDGET not in listed:
        raise UserMisconfigurationError(
            f"Expected 'annealed' to stand beside '{BUDGET}', whose time it is given, but got {','.join(listed)!r}."
        )
    return [VARIANTS[name] for name in listed]


def find_variant(name: str) -> Variant:
    """Return the variant of a name."""
    return VARIANTS[name]


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


def prepare_fit(parts: tuple[Any, Any, Any], variant: Variant, rules: Rules, solver: Any, epochs: int = 1) -> Fit:
    """Make the fit of a variant out of the parts of a fit.

    Args:
        parts: module, data module and Trainer, fresh. The freeze rule is that of the Trainer's
            ``StructureFreezeCallback``, or its default. Loggers, checkpoints, progress bars, reports and early stopping
            are taken out; other callbacks stay.
        variant: the variant.
        rules: what holds for every fit.
        solver: what to solve with.
        epochs: of a variant that anneals.

    Raises:
        MisconfigurationException: if the Trainer uses several processes or has several such callbacks, or the head is
            not there; if it cannot be read, where another takes its place.
    """
    module, data, trainer = parts
    if trainer.world_size > 1:
        raise UserMisconfigurationError(
            f"Expected a comparison to run in one process, but got {trainer.world_size}: give `--trainer.devices=1`."
        )
    freeze = freeze_callback(variant, find_freeze(trainer, rules.head), solver)
    head = find_head(module, rules.head)
    if variant.matched or variant.linear:
        try:
            module.set_submodule(rules.head, matched_head(head) if variant.matched else linear_head(head))
        except ValueError as error:
            raise UserMisconfigurationError(f"The head at {rules.head!r} cannot be replaced. {error}") from error
    stopping = [EarlyStopping(rules.score, patience=rules.patience, mode=rules.mode)] if rules.patience else []
    if variant.anneals:
        stopping = []
        _anneal(module, trainer, epochs)
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


def _anneal(module: Any, trainer: Any, epochs: int) -> None:
    trainer.fit_loop.max_epochs = epochs
    trainer.fit_loop.min_epochs = trainer.fit_loop.epoch_loop.min_steps = None
    trainer.fit_loop.epoch_loop.max_steps = -1
    configure = module.configure_optimizers

    def one_cycle() -> Any:
        optimizer = _optimizer_of(configure())
        rates = [ANNEALED_RATE * group["lr"] for group in optimizer.param_groups]
        steps = int(trainer.estimated_stepping_batches)
        scheduler = OneCycleLR(optimizer, rates, total_steps=steps, cycle_momentum=False)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    module.configure_optimizers = one_cycle


def _optimizer_of(configured: Any) -> Any:
    """Return the optimizer in what ``configure_optimizers`` returns, in any of the forms that Lightning takes."""
    if isinstance(configured, Mapping):
        return configured["optimizer"]
    return _optimizer_of(configured[0]) if isinstance(configured, Sequence) else configured


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
        A head of the same layers: kinds, biases, BatchNorm, activations, and what stands before and after them.

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


def linear_head(head: nn.Module) -> nn.Sequential:
    """Return a fresh head without a hidden layer, with what stands before and after the layers of the one given.

    Before its Linear stand another that is the identity, and an activation that is one too: so it freezes as other
    heads do, and nothing before its last layer could be learned.

    Args:
        head: an MLP head that can be read; it is not changed.

    Raises:
        ValueError: if the head cannot be read.

    Example:
        >>> from glai_lightning import mlp_head
        >>> [type(module).__name__ for module in linear_head(mlp_head(64, 1024, 10))]
        ['Linear', 'LeakyReLU', 'Linear']
    """
    layout = read_head(head)
    inputs, *_, outputs = layout.widths
    same = nn.Linear(inputs, inputs, bias=False, dtype=layout.output.weight.dtype)
    nn.init.eye_(same.weight)
    modules = [same, nn.LeakyReLU(1.0), _linear(layout.output, inputs, outputs)]
    leading, trailing = (map(copy.deepcopy, around) for around in (layout.leading, layout.trailing))
    return nn.Sequential(*leading, *modules, *trailing)


def _hidden_modules(layer: HiddenLayer, before: int, width: int) -> list[nn.Module]:
    norm: Any = layer.norm
    norms = [] if norm is None else [type(norm)(width, eps=norm.eps, momentum=norm.momentum, affine=norm.affine)]
    return [_linear(layer.linear, before, width), *norms, copy.deepcopy(layer.activation)]


def _linear(like: Any, before: int, width: int) -> nn.Linear:
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
