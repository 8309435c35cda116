"""The protocol: which fits are run in which order, under which rules, and what is kept of them."""

import json
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.utilities.seed import isolate_rng
from tqdm import tqdm  # type: ignore[import-untyped]

from glai_lightning.checks import UserTypeError, expect_choice, expect_integer, expect_number
from glai_lightning.comparison.machine import describe_machine
from glai_lightning.comparison.plots import write_plots
from glai_lightning.comparison.report import markdown_report
from glai_lightning.comparison.runs import RunsFile, named_file, run_fit
from glai_lightning.comparison.variants import (
    BUDGET,
    REFERENCE,
    Fit,
    MakeFit,
    Rules,
    Variant,
    find_freeze,
    find_variant,
    find_variants,
    prepare_fit,
)
from glai_lightning.comparison.verdict import Clock, Comparison, summarise
from glai_lightning.fitting.fit_record import Mode
from glai_lightning.fitting.loss_reading import LossNotReadError
from glai_lightning.fitting.misconfiguration import UserMisconfigurationError, as_misconfiguration
from glai_lightning.fitting.solving import Solver
from glai_lightning.fitting.step_reading import StepReader, isolated_step
from glai_lightning.modules.head_module import has_test
from glai_lightning.optional import import_optional
from glai_lightning.solvers import LogisticSolver, RidgeSolver

RUNS_FILE = "runs.jsonl"


def compare(
    make_fit: MakeFit,
    *,
    score: str,
    mode: Mode,
    to: str | Path,
    head: str = "head",
    variants: str | Sequence[str] | None = None,
    heads: str | Sequence[str] = (),
    seeds: int = 5,
    first_seed: int = 0,
    patience: int | None = 3,
    test_score: str | None = None,
    solver: Solver | None = None,
    margin: float = 0.003,
    threads: int | None = 1,
    config: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Comparison:
    """Compare freezing the structure of a head with never freezing it, on your own fit.

    Seed by seed, every variant is fitted with the same data, batches, optimizer and schedule. A fit stops after
    ``patience`` validations without a better score, or right after a solve; the weights of its best epoch are tested.
    The clock is that of the whole fit, without data preparation. Finished runs are kept in ``to``, where a comparison
    that was interrupted continues.

    ``to`` then holds ``comparison.json``, ``comparison.md`` and the plots ``score_over_seconds.png``,
    ``finished_head.png`` and ``churn.png``, which are also a TensorBoard log in the folder ``tensorboard``.

    Args:
        make_fit: makes, for a seed, a fresh module, its data module (``None`` for a module with loaders of its own) and
            a ``Trainer``. The freeze rule, and a solver if there is one, are those of the Trainer's
            ``StructureFreezeCallback``. Loggers, checkpoints, progress bars and early stopping are taken out, other
            callbacks are kept.
        score: name under which the module logs the validation score.
        mode: whether the best score is the largest ('max') or the smallest ('min').
        to: folder for runs and results; made if it is not there.
        head: qualified name of the MLP head in the module.
        variants: what to compare, 'mlp' among them: names, or one string with commas; by default the MLP's own, or
            nothing beside ``heads``.
        heads: heads to compare with the MLP at its number of parameters, likewise: each never frozen, and frozen and
            solved. 'gelu', 'silu', 'tanh', 'glu', 'polyglu', 'eugen', 'random' and 'linear' are there.
        seeds: number of seeds, at least 1.
        first_seed: the first of them; the others follow it.
        patience: validations without a better score after which a fit stops, at least 1; ``None`` to let every fit that
            solves nothing run to its end, as under a schedule that decays to it.
        test_score: name under which the module logs the test score; by default that of the validation score with 'test'
            for 'val', or the same.
        solver: what to solve with; by default the solver of the Trainer's callback, or one for the module's loss.
        margin: the difference in score up to which a variant is not worse, in units of the score: by default 0.3 points
            of an accuracy.
        threads: on how many threads PyTorch computes on the CPU meanwhile; with several, CPU seconds count threads that
            wait, too. ``None`` to leave that as it is.
        config: what is fitted, in what JSON can hold: runs of another configuration are refused.
        progress: whether to show a progress bar.

    Returns:
        The runs, and what they say.

    Raises:
        MisconfigurationException: if an argument is out of range; if the folder holds runs of another configuration; if
            the module has no such head, a score is not logged, or a variant cannot be made of this fit. All of that is
            found out on a few batches, before anything is measured.

    Example:
        >>> import tempfile
        >>> from lightning.pytorch import Trainer
        >>> from glai_lightning import SupervisedModule, mlp_head
        >>> from glai_lightning.comparison import compare
        >>> from glai_lightning.datamodules import DigitsDataModule
        >>> def make_fit(seed):
        ...     trainer = Trainer(max_epochs=3, accelerator="cpu")
        ...     return SupervisedModule(mlp_head(64, 16, 10)), DigitsDataModule(seed=seed), trainer
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     comparison = compare(
        ...         make_fit, score="val/accuracy", mode="max", to=folder, variants="mlp,output+solve", seeds=1,
        ...         progress=False,
        ...     )
        >>> [(run.variant, run.seed) for run in comparison.runs]
        [('mlp', 0), ('output+solve', 0)]
    """
    for library in ("matplotlib", "scipy"):
        import_optional(library, needed_for="`glai compare`", extra="compare")
    chosen = find_variants(variants, heads)
    with as_misconfiguration():
        if not callable(make_fit):
            raise UserTypeError(f"Expected `make_fit` to be a function of a seed, but got {make_fit!r}.")
        if not isinstance(to, str | PathLike) or not str(to) or "\0" in str(to):
            raise UserTypeError(f"Expected `to` to be the path of a folder, but got {to!r}.")
        for name, text in (("score", score), ("head", head)):
            if not isinstance(text, str):
                raise UserTypeError(f"Expected `{name}` to be a string, but got {text!r}.")
        expect_integer("seeds", seeds, least=1)
        expect_choice("mode", mode, ("min", "max"))
        expect_number("margin", margin, low=0.0)
        for name, value in (("patience", patience), ("threads", threads)):
            if value is not None:
                expect_integer(name, value, least=1)
    rules = Rules(score, mode, head, patience)
    settings: dict[str, Any] = {
        "score": score,
        "mode": mode,
        "head": head,
        "patience": patience,
        "test_score": test_score,
    }
    settings["solver"] = None if solver is None else repr(solver)
    configuration = {"fit": dict(config or {}), "comparison": settings}
    seconds: Clock = "seconds"
    with isolate_rng(), quiet(), _threads(threads):
        machine = describe_machine()
        file = RunsFile(Path(to) / RUNS_FILE, {"config": configuration, "machine": machine})
        order = [(variant, first_seed + turn) for turn in range(seeds) for variant in _in_turn(chosen, turn)]
        pending = [(variant, seed) for variant, seed in order if (variant.name, seed) not in file.runs]
        waiting = [variant for variant in chosen if any(variant is other for other, _ in pending)]
        found = dry_run(make_fit, waiting, rules, seed=first_seed, test_score=test_score, solver=solver)
        if found.device == "cpu":
            seconds = "cpu_seconds"
        with tqdm(total=len(order), initial=len(order) - len(pending), unit="run", disable=not progress) as bar:
            for variant, seed in pending:
                bar.set_description(f"{variant.name}, seed {seed}")
                seed_everything(seed, workers=True, verbose=False)
                epochs = _equal_budget(file, seed, seconds) if variant.anneals else 1
                fit = prepare_fit(make_fit(seed), variant, rules, found.solver, epochs)
                with warnings.catch_warnings():
                    # The dry run has shown them.
                    warnings.simplefilter("ignore")
                    run = run_fit(fit, seed, found.test_score, lambda epochs: bar.set_postfix_str(f"epoch {epochs}"))
                file.append(run)
                bar.update()
    comparison = summarise(
        (file.runs[variant.name, first_seed + turn] for turn in range(seeds) for variant in chosen),
        config=configuration,
        machine={**machine, "device": found.device},
        score=score,
        mode=mode,
        test_score=found.test_score,
        clock=seconds,
        margin=margin,
    )
    _write(comparison, Path(to))
    return comparison


def _in_turn(variants: Sequence[Variant], turn: int) -> list[Variant]:
    """Return the variants in an order in which none always runs after the same neighbour, or first."""
    by = turn % len(variants)
    # What is given the time of others runs after them.
    return sorted([*variants[by:], *variants[:by]], key=lambda variant: variant.anneals)


def _equal_budget(file: RunsFile, seed: int, seconds: Clock) -> int:
    """Return in how many epochs the MLP takes the time that the frozen and solved fit of this seed took."""
    mlp, solved = file.runs[REFERENCE, seed], file.runs[BUDGET, seed]
    of_an_epoch: float = getattr(mlp, f"finished_{seconds}") / mlp.num_epochs
    taken: float = getattr(solved, f"finished_{seconds}")
    return max(1, round(taken / of_an_epoch))


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def quiet() -> Iterator[None]:
    """Let Lightning say of the fits only what is wrong; what it says of each would be said dozens of times."""
    loggers = [
        logging.getLogger(name)
        for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "glai_lightning")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for ignored in (FutureWarning, DeprecationWarning, PossibleUserWarning):
                warnings.filterwarnings("ignore", category=ignored)
            # What a fit warns of, the rehearsal of every variant would.
            warnings.filterwarnings("once", category=UserWarning, append=True)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _write(comparison: Comparison, folder: Path) -> None:
    text = json.dumps(comparison.as_dict(), indent=1, allow_nan=False)
    with named_file(folder):
        (folder / "comparison.json").write_text(f"{text}\n", encoding="utf-8")
        plots = write_plots(comparison, folder)
        (folder / "comparison.md").write_text(markdown_report(comparison, plots), encoding="utf-8")


@dataclass(frozen=True)
class DryRunResult:
    """What a dry run found out.

    Args:
        test_score: name of the test score; ``None`` without test data.
        solver: what variants that solve solve with.
        device: where the fits run, such as 'cpu' or 'cuda'.
    """

    test_score: str | None
    solver: Solver
    device: str


def dry_run(
    make_fit: MakeFit,
    variants: Iterable[Variant],
    rules: Rules,
    *,
    seed: int,
    test_score: str | None,
    solver: Solver | None,
) -> DryRunResult:
    """Fit, validate and test a few batches of each variant, the MLP always, so that what cannot work fails at once.

    Args:
        make_fit: makes the parts of a fit.
        variants: what is to be measured.
        rules: what holds for every fit.
        seed: a seed of the comparison.
        test_score: name of the test score; by default that of the validation score, with 'test' for 'val'.
        solver: what to solve with; by default the solver of the Trainer's callback, or one for the module's loss.

    Returns:
        What every run needs to know.

    Raises:
        MisconfigurationException: if the validation score or the test score is not logged, or a variant cannot be made
            of this fit.
    """
    # Early stopping would fail on a score that is not logged, in words of its own.
    rules = replace(rules, patience=None)
    with isolate_rng():
        parts = make_fit(seed)
        given = solver or find_freeze(parts[2], rules.head).solver
        # 'auto' would solve nothing where inputs are not fixed, and a variant that solves is to solve.
        given = None if given == "auto" else given
        fit = prepare_fit(parts, find_variant(REFERENCE), rules, None)
        loss = _LossKind(rules.head)
        _run_few_batches(fit, loss)
        metrics = fit.trainer.callback_metrics
        if rules.score not in metrics:
            raise UserMisconfigurationError(
                f"Expected the validation score {rules.score!r} to be logged by the module, but it logs "
                f"{_listed(metrics)}. Name one of them with `--score` and `--mode`."
            )
        found = DryRunResult(
            _find_test_score(fit, rules.score, test_score),
            given or (RidgeSolver() if loss.kind == "mse" else LogisticSolver()),
            fit.trainer.strategy.root_device.type,
        )
        for variant in variants:
            if variant.name != REFERENCE:
                _run_few_batches(prepare_fit(make_fit(seed), variant, rules, found.solver))
    return found


def _find_test_score(fit: Fit, score: str, given: str | None) -> str | None:
    if not has_test(fit.module, fit.data) or fit.trainer.limit_test_batches == 0:
        return None
    fit.trainer.limit_test_batches = 1
    fit.trainer.test(fit.module, datamodule=fit.data, verbose=False)
    metrics = fit.trainer.callback_metrics
    names = [given] if given is not None else [score.replace("val", "test", 1), score]
    for name in names:
        if name in metrics:
            return name
    raise UserMisconfigurationError(
        f"Expected the test score {names[0]!r} to be logged by the module, but it logs {_listed(metrics)}. Name one of "
        "them with `--test_score`."
    )


def _run_few_batches(fit: Fit, *callbacks: Callback) -> None:
    trainer = fit.trainer
    trainer.callbacks += [*callbacks, _StopEarly()]
    trainer.limit_val_batches = min(1, trainer.limit_val_batches)
    if trainer.check_val_every_n_epoch is not None:
        trainer.check_val_every_n_epoch = 1
    trainer.fit_loop.min_epochs = trainer.fit_loop.epoch_loop.min_steps = None
    trainer.fit(fit.module, datamodule=fit.data)


class _StopEarly(Callback):
    """Stops a fit after two batches, by a validation as always."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx >= 1 or trainer.is_last_batch:
            trainer.should_stop = True


class _LossKind(Callback):
    """Sees, on the first batch, which loss the module minimises on the outputs of its head."""

    def __init__(self, head: str) -> None:
        self.head = head
        self.kind: str | None = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        reader = StepReader(trainer, pl_module, self.head)
        with isolated_step(pl_module), suppress(LossNotReadError):
            reader.read(batch, batch_idx, "training")
        self.kind = self.kind or reader.kind


def _listed(metrics: Iterable[str]) -> str:
    return ", ".join(map(repr, sorted(metrics))) or "none"
