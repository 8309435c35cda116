"""The sides of a comparison, and the fit of each: the MLP that is never frozen, and what is measured against it."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers.logger import DummyLogger
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from glai_lightning.callbacks.structure_freeze import StructureFreezeCallback
from glai_lightning.comparison.heads import HEADS, head_in_place, matched_head
from glai_lightning.fitting.fit_record import Mode
from glai_lightning.fitting.heads_in_module import find_head
from glai_lightning.fitting.misconfiguration import UserMisconfigurationError
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
        replace: makes the head that takes the place of the configured MLP; ``None`` for that MLP.
        anneals: whether the rate follows one cycle over as many epochs as 'output+solve' took in time.
    """

    name: str
    description: str
    paths: Paths | None = None
    solves: bool = False
    freeze_at_epoch: int | None = None
    replace: Callable[[nn.Module], nn.Module] | None = None
    anneals: bool = False


#: The MLP frozen and solved, whose time ``annealed`` is given.
BUDGET = "output+solve"


def solved_name(head: str) -> str:
    """Return the name of the variant that freezes and solves a head of ``HEADS``; its own is that never frozen."""
    return BUDGET if head == REFERENCE else f"{head}+solve"


def _sides(head: str) -> tuple[Variant, Variant]:
    kind = HEADS[head]
    replace = None if head == REFERENCE else partial(head_in_place, name=head)
    how = "frozen and solved" if kind.learns else "solved after an epoch"
    solved = f"{kind.description}, {how}"
    return (
        Variant(head, f"{kind.description}, never frozen", replace=replace),
        Variant(solved_name(head), solved, "output", True, None if kind.learns else 0, replace),
    )


#: Every variant, by its name.
VARIANTS = {
    variant.name: variant
    for variant in (
        *_sides(REFERENCE),
        Variant("output", "output paths, trained on: freezing the inner layers", "output"),
        Variant("tangent", "tangent paths, trained on", "tangent"),
        Variant("independent", "independent paths at matched width, trained on", "independent", replace=matched_head),
        Variant(
            "independent+solve", "independent paths at matched width, solved", "independent", True, replace=matched_head
        ),
        Variant(
            "annealed",
            f"the MLP under one cycle of the rate, over as many epochs as {BUDGET} took in time",
            anneals=True,
        ),
        *(variant for head in HEADS if head != REFERENCE for variant in _sides(head)),
    )
}

#: What is compared unless told otherwise.
DEFAULT_VARIANTS = (
    "mlp",
    "output",
    "output+solve",
    "tangent",
    "independent",
    "annealed",
    "linear+solve",
    "random+solve",
)


def find_variants(names: str | Sequence[str] | None = None, heads: str | Sequence[str] = ()) -> list[Variant]:
    """Return the variants of these names, and then those of these heads, in their order.

    Args:
        names: names, or one string of names with commas between them; by default ``DEFAULT_VARIANTS``, or those of the
            heads alone.
        heads: names of heads, likewise: each never frozen, and frozen and solved, and the MLP before them.

    Raises:
        MisconfigurationException: if a name is unknown or given twice, or the MLP or a side to it is missing.

    Example:
        >>> [variant.name for variant in find_variants("mlp,output+solve")]
        ['mlp', 'output+solve']
        >>> [variant.name for variant in find_variants(heads="glu")]
        ['mlp', 'output+solve', 'glu', 'glu+solve']
    """
    chosen = _listed("heads", heads, HEADS)
    if names is None:
        names = () if chosen else DEFAULT_VARIANTS
    listed = _listed("variants", names, VARIANTS)
    if chosen:
        sides = [side for head in dict.fromkeys((REFERENCE, *chosen)) for side in (head, solved_name(head))]
        listed = list(dict.fromkeys((*listed, *sides)))
    if REFERENCE not in listed or len(listed) < 2:
        raise UserMisconfigurationError(
            f"Expected `variants` to hold '{REFERENCE}' and at least one to compare with it, of "
            f"{', '.join(map(repr, VARIANTS))}, but got {','.join(listed)!r}."
        )
    if "annealed" in listed and BUDGET not in listed:
        raise UserMisconfigurationError(
            f"Expected 'annealed' to stand beside '{BUDGET}', whose time it is given, but got {','.join(listed)!r}."
        )
    return [VARIANTS[name] for name in listed]


def _listed(argument: str, names: str | Sequence[str], known: Mapping[str, object]) -> list[str]:
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise UserMisconfigurationError(f"Expected `{argument}` to be names of {argument}, but got {names!r}.")
    listed = [name.strip() for name in (names.split(",") if isinstance(names, str) else names)]
    for name in listed:
        if name not in known:
            raise UserMisconfigurationError(
                f"Expected `{argument}` to be some of {', '.join(map(repr, known))}, but got {name!r}."
            )
    if len(set(listed)) < len(listed):
        raise UserMisconfigurationError(
            f"Expected every name in `{argument}` to be given once, but got {','.join(listed)!r}."
        )
    return listed


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
    if variant.replace is not None:
        if "+" in rules.head:
            raise UserMisconfigurationError(
                f"Expected `head` to name one module, whose place another head can take, but got {rules.head!r}. "
                "Variants that keep the head can be compared: 'mlp', 'output', 'output+solve' and 'annealed'."
            )
        try:
            module.set_submodule(rules.head, variant.replace(head))
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
