"""A few batches of every variant before any of them is measured, so that what cannot work fails at once."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.utilities.seed import isolate_rng

from glai_lightning.comparison.fitting import Fit, MakeFit, Rules, find_freeze, prepare_fit
from glai_lightning.comparison.variants import REFERENCE, Variant, find_variant
from glai_lightning.fitting.collection import watch_next_step
from glai_lightning.fitting.loss_watching import LossCall
from glai_lightning.fitting.misconfiguration import UserMisconfigurationError
from glai_lightning.fitting.solving import Solver
from glai_lightning.modules.head_module import has_test
from glai_lightning.solvers import LogisticSolver, RidgeSolver

#: What solves for a cross-entropy, where the configuration names no solver.
DEFAULT_SOLVER = LogisticSolver()

_BATCHES = 2


@dataclass(frozen=True)
class Findings:
    """What a rehearsal found out.

    Args:
        test_score: name of the test score; ``None`` without test data.
        solver: what variants that solve solve with.
        device: where the fits run, such as 'cpu' or 'cuda'.
    """

    test_score: str | None
    solver: Solver
    device: str


def rehearse(
    make_fit: MakeFit,
    variants: Iterable[Variant],
    rules: Rules,
    *,
    seed: int,
    test_score: str | None,
    solver: Solver | None,
) -> Findings:
    """Fit, validate and test a few batches of each variant, the MLP always.

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
        findings = _rehearse_mlp(prepare_fit(parts, find_variant(REFERENCE), rules, None), rules, test_score, given)
        for variant in variants:
            if variant.paths is not None:
                _run(prepare_fit(make_fit(seed), variant, rules, findings.solver))
    return findings


def _rehearse_mlp(fit: Fit, rules: Rules, test_score: str | None, solver: Solver | None) -> Findings:
    watcher = _LossKind(rules.head)
    _run(fit, watcher)
    metrics = fit.trainer.callback_metrics
    if rules.score not in metrics:
        raise UserMisconfigurationError(
            f"Expected the validation score {rules.score!r} to be logged by the module, but it logs "
            f"{_listed(metrics)}. Name one of them with `--score` and `--mode`."
        )
    solver = solver or (RidgeSolver() if watcher.kind == "mse" else DEFAULT_SOLVER)
    return Findings(_find_test_score(fit, rules.score, test_score), solver, fit.trainer.strategy.root_device.type)


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


def _run(fit: Fit, *callbacks: Callback) -> None:
    trainer = fit.trainer
    trainer.callbacks += [*callbacks, _StopEarly()]
    trainer.limit_val_batches = min(1, trainer.limit_val_batches)
    if trainer.check_val_every_n_epoch is not None:
        trainer.check_val_every_n_epoch = 1
    trainer.fit_loop.min_epochs = trainer.fit_loop.epoch_loop.min_steps = None
    trainer.fit(fit.module, datamodule=fit.data)


class _StopEarly(Callback):
    """Stops a fit after a few batches, by a validation as ever."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx + 1 >= _BATCHES or trainer.is_last_batch:
            trainer.should_stop = True


class _LossKind(Callback):
    """Sees, on the first batch, which loss the module minimises on the outputs of its head."""

    def __init__(self, head: str) -> None:
        self.head = head
        self.kind: str | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        watch_next_step(pl_module, pl_module.get_submodule(self.head), self._see)

    def _see(self, calls: list[LossCall]) -> None:
        self.kind = calls[0].kind if calls else None


def _listed(metrics: Iterable[str]) -> str:
    return ", ".join(map(repr, sorted(metrics))) or "none"
