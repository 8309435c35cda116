"""The plots of a comparison."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from glai_lightning.callbacks.fit_plots import as_image, label_axes, new_figure, save_png
from glai_lightning.comparison.runs import Run
from glai_lightning.comparison.statistics import mean_interval
from glai_lightning.comparison.verdict import Comparison

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLORS = ("#374151", "#1f5fa8", "#c2410c", "#15803d", "#7e22ce", "#0891b2", "#be185d", "#a16207", "#0f766e")


def write_plots(comparison: Comparison, folder: Path) -> list[Path]:
    """Draw a comparison, and write the plots into a folder, and for TensorBoard into ``tensorboard`` in it.

    Returns:
        The files: score against seconds, time to a finished head and, where it was measured, churn.
    """
    figures = {"score_over_seconds": score_figure(comparison), "finished_head": finished_figure(comparison)}
    if any(epoch.churn is not None for run in comparison.runs for epoch in run.epochs):
        figures["churn"] = churn_figure(comparison)
    paths = []
    for name, figure in figures.items():
        path = folder / f"{name}.png"
        with path.open("wb") as file:
            save_png(figure, file)
        paths.append(path)
    _write_to_tensorboard(figures, folder / "tensorboard")
    return paths


def _write_to_tensorboard(figures: "dict[str, Figure]", folder: Path) -> None:
    # Half a second of imports that only the end of a comparison needs.
    from torch.utils.tensorboard import SummaryWriter

    # A comparison that is continued replaces its plots here too.
    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    with SummaryWriter(folder) as writer:
        for name, figure in figures.items():
            writer.add_image(f"comparison/{name}", as_image(figure), dataformats="HWC")


def score_figure(comparison: Comparison) -> "Figure":
    """Draw the best validation score so far against seconds: the mean over seeds in a band from worst to best seed."""
    figure, axes = new_figure()
    end = 1.05 * max(map(comparison.finished, comparison.runs))
    for color, variant in zip(_COLORS, comparison.summary, strict=False):
        runs = [run for run in comparison.of(variant) if run.best_val_score is not None]
        if not runs:
            continue
        curves = [_best_so_far(run, comparison) for run in runs]
        # From where every seed has a score.
        at = np.unique([*(second for seconds, _ in curves for second in seconds), end])
        at = at[at >= max(seconds[0] for seconds, _ in curves)]
        scores = np.array([scores[np.searchsorted(seconds, at, side="right") - 1] for seconds, scores in curves])
        axes.plot(at, scores.mean(0), color=color, label=variant, drawstyle="steps-post")
        axes.fill_between(at, scores.min(0), scores.max(0), color=color, alpha=0.12, linewidth=0, step="post")
    axes.set_xlim(0, end)
    label_axes(axes, "The best score so far", _seconds(comparison), comparison.score)
    return figure


def finished_figure(comparison: Comparison) -> "Figure":
    """Draw the time to a finished head: mean, interval and every seed."""
    figure, axes = new_figure()
    names = list(comparison.summary)
    for row, (color, variant) in enumerate(zip(_COLORS, names, strict=False)):
        seconds = list(map(comparison.finished, comparison.of(variant)))
        interval = mean_interval(seconds)
        axes.barh(row, interval.mean, color=color, alpha=0.35, height=0.6)
        axes.plot(seconds, [row] * len(seconds), "o", color=color, markersize=3, label="a seed" if row == 0 else None)
        if interval.low is not None and interval.high is not None:
            ends = [[interval.mean - interval.low], [interval.high - interval.mean]]
            label = "mean, 95 % interval" if row == 0 else None
            axes.errorbar(interval.mean, row, xerr=ends, color=color, capsize=4, label=label)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    label_axes(axes, "Time to a finished head", _seconds(comparison), "")
    return figure


def churn_figure(comparison: Comparison) -> "Figure":
    """Draw churn after each epoch until the freeze: the mean over seeds in a band from the least to the most."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = new_figure()
    for color, variant in zip(_COLORS, comparison.summary, strict=False):
        by_epoch: dict[int, list[float]] = {}
        for run in comparison.of(variant):
            for epoch in run.epochs:
                if epoch.churn is not None:
                    by_epoch.setdefault(epoch.epoch + 1, []).append(100 * epoch.churn)
        if not by_epoch:
            continue
        finished = sorted(by_epoch)
        churn = [by_epoch[number] for number in finished]
        axes.plot(finished, [np.mean(values) for values in churn], "o-", markersize=4, color=color, label=variant)
        least, most = [min(values) for values in churn], [max(values) for values in churn]
        axes.fill_between(finished, least, most, color=color, alpha=0.12, linewidth=0)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    label_axes(axes, "Churn until the freeze", "finished epochs", "pattern bits flipped in the epoch [%]")
    return figure


def _best_so_far(run: Run, comparison: Comparison) -> tuple[np.ndarray, np.ndarray]:
    scored = [epoch for epoch in run.epochs if epoch.val_score is not None]
    accumulate = np.maximum.accumulate if comparison.mode == "max" else np.minimum.accumulate
    scores = accumulate(np.array([epoch.val_score for epoch in scored], dtype=float))
    return np.array([getattr(epoch, comparison.clock) for epoch in scored]), scores


def _seconds(comparison: Comparison) -> str:
    return "CPU seconds of the fit" if comparison.clock == "cpu_seconds" else "seconds of the fit"
