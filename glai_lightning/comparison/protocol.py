"""The protocol: which fits are run in which order, under which rules, and what is kept of them."""

import gc
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import seed_everything
from lightning.pytorch.utilities.seed import isolate_rng
from tqdm import tqdm  # type: ignore[import-untyped]

from glai_lightning.comparison.energy import EnergyMeter, find_meter
from glai_lightning.comparison.fitting import MakeFit, Rules, prepare_fit, record_fit, score_best
from glai_lightning.comparison.interrupts import interrupts_deferred
from glai_lightning.comparison.machine import describe_machine
from glai_lightning.comparison.plots import write_plots
from glai_lightning.comparison.recording import Mode, RunRecorder
from glai_lightning.comparison.rehearsal import Findings, rehearse
from glai_lightning.comparison.report import markdown_report
from glai_lightning.comparison.runs import Run, RunsFile
from glai_lightning.comparison.summary import Comparison, summarise
from glai_lightning.comparison.variants import DEFAULT_VARIANTS, Variant, find_variants
from glai_lightning.fitting.misconfiguration import UserMisconfigurationError
from glai_lightning.fitting.solving import Solver

RUNS_FILE = "runs.jsonl"


def compare(
    make_fit: MakeFit,
    *,
    score: str,
    mode: Mode,
    to: str | Path,
    head: str = "head",
    variants: str | Sequence[str] = DEFAULT_VARIANTS,
    seeds: int = 5,
    first_seed: int = 0,
    patience: int | None = 3,
    test_score: str | None = None,
    solver: Solver | None = None,
    config: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Comparison:
    """Compare freezing the structure of a head with never freezing it, on somebody's own fit.

    Seed by seed, every variant is fitted with the same data, batches, optimizer and schedule. A fit stops after
    ``patience`` validations without a better score, or right behind a solve; the weights of its best epoch are
    tested. The clock is that of the whole fit, without data preparation. Finished runs are kept in ``to``, where a
    comparison that was interrupted goes on.

    ``to`` then holds ``comparison.json``, ``comparison.md`` and the plots ``score_over_seconds.png``,
    ``finished_head.png`` and ``churn.png``.

    Args:
        make_fit: makes, for a seed, a fresh module, its data module (``None`` for a module with loaders of its own) and
            a ``Trainer``. The freeze rule, and a solver if there is one, are those of the Trainer's
            ``StructureFreezeCallback``. Loggers, checkpoints, progress bars and early stopping are taken out, other
            callbacks are kept.
        score: name under which the module logs the validation score.
        mode: whether the best score is the largest ('max') or the smallest ('min').
        to: folder for runs and results; made if it is not there.
        head: qualified name of the MLP head in the module.
        variants: what to compare, 'mlp' among them: names, or one string with commas.
        seeds: number of seeds, at least 1.
        first_seed: the first of them; the others follow it.
        patience: validations without a better score after which a fit stops, at least 1; ``None`` to let every fit that
            solves nothing run to its end, as under a schedule that decays to it.
        test_score: name under which the module logs the test score; by default that of the validation score with 'test'
            for 'val', or the same.
        solver: what to solve with; by default the solver of the Trainer's callback, or one for the module's loss.
        config: what says what is fitted, in what JSON can hold: runs of another configuration are not gone on with.
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
    chosen = find_variants(variants)
    _check(seeds=seeds, mode=mode, patience=patience)
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
    machine = describe_machine()
    file = RunsFile(Path(to) / RUNS_FILE, {"config": configuration, "machine": machine})
    order = [(variant, first_seed + turn) for turn in range(seeds) for variant in _rotated(chosen, turn % len(chosen))]
    pending = [(variant, seed) for variant, seed in order if (variant.name, seed) not in file.runs]
    with isolate_rng(), quiet():
        waiting = [variant for variant in chosen if any(variant is other for other, _ in pending)]
        findings = rehearse(make_fit, waiting, rules, seed=first_seed, test_score=test_score, solver=solver)
        meter = find_meter()
        with tqdm(total=len(order), initial=len(order) - len(pending), unit="run", disable=not progress) as bar:
            for variant, seed in pending:
                bar.set_description(f"{variant.name}, seed {seed}")

                def show(epochs: int) -> None:
                    bar.set_postfix_str(f"epoch {epochs}")

                file.append(_run(make_fit, variant, seed, rules, findings, meter, show))
                bar.update()
    comparison = summarise(
        (file.runs[variant.name, first_seed + turn] for turn in range(seeds) for variant in chosen),
        config=configuration,
        machine={**machine, "device": findings.device},
        score=score,
        mode=mode,
        test_score=findings.test_score,
        clock="cpu_seconds" if findings.device == "cpu" else "seconds",
    )
    _write(comparison, Path(to))
    return comparison


def _run(
    make_fit: MakeFit,
    variant: Variant,
    seed: int,
    rules: Rules,
    findings: Findings,
    meter: EnergyMeter,
    show: Callable[[int], object],
) -> Run:
    seed_everything(seed, workers=True, verbose=False)
    fit = prepare_fit(make_fit(seed), variant, rules, findings.solver)
    recorder = RunRecorder(rules.score, rules.mode, fit.freeze, meter, show)
    # What was left of the run before is collected now, and not on this run's clock.
    with interrupts_deferred():
        gc.collect()
    # Again, because a head of another width has drawn other numbers: the batches are to be the same.
    seed_everything(seed, workers=True, verbose=False)
    with warnings.catch_warnings():
        # The rehearsal has shown them.
        warnings.simplefilter("ignore")
        record_fit(fit, recorder)
        tested = None if findings.test_score is None else score_best(fit, recorder, findings.test_score)
    return recorder.run(variant.name, seed, tested)


def _rotated(variants: Sequence[Variant], by: int) -> list[Variant]:
    # Nobody always runs behind the same neighbour, or first.
    return [*variants[by:], *variants[:by]]


@contextmanager
def quiet() -> Iterator[None]:
    """Let Lightning say of the fits only what is wrong; what it says of each would be said dozens of times."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning")]
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


def _check(*, seeds: int, mode: str, patience: int | None) -> None:
    if not isinstance(seeds, int) or isinstance(seeds, bool) or seeds < 1:
        raise UserMisconfigurationError(f"Expected `seeds` to be an integer of at least 1, but got {seeds!r}.")
    if not isinstance(mode, str) or mode not in ("min", "max"):
        raise UserMisconfigurationError(f"Expected `mode` to be 'min' or 'max', but got {mode!r}.")
    if patience is not None and (not isinstance(patience, int) or isinstance(patience, bool) or patience < 1):
        raise UserMisconfigurationError(
            f"Expected `patience` to be an integer of at least 1 or None, but got {patience!r}."
        )


def _write(comparison: Comparison, folder: Path) -> None:
    text = json.dumps(comparison.as_dict(), indent=1, allow_nan=False)
    (folder / "comparison.json").write_text(f"{text}\n", encoding="utf-8")
    plots = write_plots(comparison, folder)
    (folder / "comparison.md").write_text(markdown_report(comparison, plots), encoding="utf-8")
