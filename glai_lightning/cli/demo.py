"""``glai demo``: the same head twice, never frozen, and then frozen and solved, on a table that is installed."""

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping
from tqdm import tqdm  # type: ignore[import-untyped]

from glai_lightning.callbacks.fit_plots import save_png, score_figure
from glai_lightning.callbacks.structure_freeze import StructureFreezeCallback
from glai_lightning.checks import UserValueError, expect_writable
from glai_lightning.comparison.protocol import quiet
from glai_lightning.comparison.runs import Run, run_fit
from glai_lightning.comparison.variants import BUDGET, REFERENCE, Fit, Rules, find_variant
from glai_lightning.datamodules.features import FeaturesDataModule
from glai_lightning.datamodules.letter import LetterDataModule
from glai_lightning.fitting.fit_record import SolveRecord
from glai_lightning.heads.mlp import mlp_head
from glai_lightning.modules.supervised import SupervisedModule
from glai_lightning.optional import import_optional

_NAMES = {REFERENCE: "never frozen", BUDGET: "frozen and solved"}
_RULES = Rules("val/accuracy", "max", "head", patience=3)
_LETTERS = 26
_SEED, _HIDDEN, _BATCH_SIZE = 0, 512, 128
_WIDTH = 80


def run_demo(folder: Path) -> None:
    """Run ``glai demo``: demonstrate on the letters, on one thread.

    Args:
        folder: where the plot is written.

    Raises:
        ValueError: if the structure of the head does not settle.
        ModuleNotFoundError: if matplotlib is not installed.
    """
    # CPU seconds of several threads would count those that wait.
    torch.set_num_threads(1)
    demonstrate(lambda: LetterDataModule(batch_size=_BATCH_SIZE, seed=_SEED), folder)


def demonstrate(make_data: Callable[[], FeaturesDataModule], folder: Path, max_epochs: int = 100) -> Path:
    """Fit a head twice, print how both went, and draw their validation accuracy against seconds.

    Args:
        make_data: makes the data of a fit, the same every time.
        folder: where the plot is written; made if it is not there.
        max_epochs: epochs after which a fit ends in any case.

    Returns:
        The plot.

    Raises:
        ValueError: if the structure of the head does not settle within ``max_epochs``.
        ModuleNotFoundError: if matplotlib is not installed.
    """
    import_optional("matplotlib", needed_for="the plot of `glai demo`", extra="report")
    folder.mkdir(parents=True, exist_ok=True)
    path = expect_writable("--to", folder / "score_over_seconds.png")
    stopping = EarlyStopping(_RULES.score, mode=_RULES.mode, patience=_RULES.patience or 0)
    freeze = StructureFreezeCallback(_RULES.head)
    with quiet():
        never_frozen = _run(REFERENCE, make_data(), stopping, max_epochs)
        frozen = _run(BUDGET, make_data(), freeze, max_epochs)
    if frozen.solve is None:
        raise UserValueError(
            f"Expected the head to be frozen and solved within {max_epochs} epochs, but its structure did not settle."
        )
    print("\n".join(["", *_table(never_frozen, frozen), "", *_sentence(never_frozen, frozen, frozen.solve)]))
    with path.open("wb") as file:
        save_png(score_figure(frozen, never_frozen=never_frozen), file)
    print(f"\nplot: {path}")
    return path


def _run(variant: str, data: FeaturesDataModule, callback: Callback, max_epochs: int) -> Run:
    seed_everything(_SEED, workers=True, verbose=False)
    module = SupervisedModule(mlp_head(data.num_features, _HIDDEN, _LETTERS))
    trainer: Any = Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    # And none that the environment adds.
    trainer.callbacks = [callback]
    freeze: Any = callback if isinstance(callback, StructureFreezeCallback) else None
    fit = Fit(find_variant(variant), _RULES, module, data, trainer, freeze)
    with tqdm(bar_format=f"{_NAMES[variant]}: {{n}} epochs in {{elapsed}} minutes") as bar:
        return run_fit(fit, _SEED, "test/accuracy", lambda _: bar.update())


def _table(never_frozen: Run, frozen: Run) -> list[str]:
    """Write both fits below one another; accuracies are those of the weights that validated best."""
    rows = [["", "seconds", "CPU seconds", "epochs", "validation", "test"]]
    for run in (never_frozen, frozen):
        seconds = [f"{run.finished_seconds:.1f}", f"{run.finished_cpu_seconds:.1f}"]
        accuracies = [_percent(run.best_val_score), _percent(run.test_score)]
        rows.append([_NAMES[run.variant], *seconds, f"{run.num_epochs}", *accuracies])
    faster = (
        never_frozen.finished_seconds / frozen.finished_seconds,
        never_frozen.finished_cpu_seconds / frozen.finished_cpu_seconds,
    )
    gained = (
        _points(frozen.best_val_score, never_frozen.best_val_score),
        _points(frozen.test_score, never_frozen.test_score),
    )
    rows.append(["difference", *(f"{x:.1f}x faster" for x in faster), "", *(f"{x:+.2f} points" for x in gained)])
    return ["{:<17}{:>13}{:>13}{:>8}{:>14}{:>14}".format(*row) for row in rows]


def _sentence(never_frozen: Run, frozen: Run, solve: SolveRecord) -> list[str]:
    """Say what a newcomer sees, and which part of it the solve brought."""
    text = (
        f"The structure settled after {frozen.num_epochs} epochs, and one solve of the last layer took validation "
        f"accuracy from {_percent(solve.start_score)} to {_percent(solve.score)} in "
        f"{solve.seconds + solve.collecting_seconds:.1f} seconds ({_points(solve.score, solve.start_score):+.2f} "
        f"points), while the head that was never frozen was trained for {never_frozen.num_epochs} epochs to "
        f"{_percent(never_frozen.best_val_score)}. This is one seed on one table: `glai compare` measures your own fit."
    )
    return textwrap.wrap(text, _WIDTH)


def _points(score: float | None, other: float | None) -> float:
    return 100 * ((score or 0.0) - (other or 0.0))


def _percent(score: float | None) -> str:
    return f"{100 * (score or 0.0):.2f} %"
