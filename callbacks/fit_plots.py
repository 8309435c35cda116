"""The plots of a fit, drawn without pyplot and its global state."""

from itertools import accumulate
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from glai_lightning.fitting.fit_record import FitRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LINE = "#1f5fa8"
_BEST = "#c2410c"
_THRESHOLD = "#6b7280"
_FROZEN = "#c7dcf9"


def churn_figure(record: FitRecord) -> "Figure":
    """Draw churn at each check until the freeze, with the two thresholds.

    Args:
        record: what the fit was like.

    Returns:
        A figure; ``save_png`` and ``as_image`` turn it into pixels.

    Example:
        >>> as_image(churn_figure(FitRecord(epochs=[], churn_tolerance=0.1, relative_tolerance=0.25))).shape
        (450, 800, 3)
    """
    from matplotlib.ticker import MaxNLocator

    figure, axes = new_figure()
    measured = [(epoch.epoch + 1, epoch.churn) for epoch in record.epochs if epoch.churn is not None]
    finished = [number for number, _ in measured]
    churn = [100 * value for _, value in measured]
    axes.plot(finished, churn, "o-", color=_LINE, label="churn", zorder=3)
    end = max([*finished, record.freeze_epoch or 0 if record.frozen else record.num_epochs, 1]) + 0.5
    if record.churn_tolerance is not None and record.relative_tolerance is not None:
        label = f"churn_tolerance = {record.churn_tolerance:g}"
        axes.axhline(100 * record.churn_tolerance, color=_THRESHOLD, linestyle="--", label=label)
        relative = [record.relative_tolerance * largest for largest in accumulate(churn, max)]
        axes.step(
            [*finished, end],
            [*relative, *relative[-1:]] if relative else [float("nan")],
            where="post",
            color=_THRESHOLD,
            linestyle=":",
            label=f"relative_tolerance = {record.relative_tolerance:g}, of the largest so far",
        )
    # The part that matters: there is no churn after the freeze.
    axes.set_xlim(0, end)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if record.frozen:
        _mark_freeze(axes, record.freeze_epoch or 0, end)
    label_axes(axes, "Churn of the structure", "finished epochs", "pattern bits flipped since the last check [%]")
    return figure


def score_figure(record: FitRecord, *, never_frozen: FitRecord | None = None) -> "Figure":
    """Draw the validation score against the seconds of the fit, with freeze, solve and best validation marked.

    Args:
        record: what the fit was like.
        never_frozen: what the same fit was like without a freeze, to be drawn beside it.

    Returns:
        A figure.
    """
    figure, axes = new_figure()
    name = record.score_name or "score"
    last = max((epoch.seconds for epoch in record.epochs), default=1.0)
    end = frozen_until = 1.03 * last
    if never_frozen is not None:
        _draw_scores(axes, never_frozen, "never frozen", _THRESHOLD)
        end, frozen_until = max(end, 1.03 * never_frozen.epochs[-1].seconds), last
    _draw_scores(axes, record, name if never_frozen is None else "frozen", _LINE)
    axes.set_xlim(0, end)
    if record.frozen:
        frozen_at = _freeze_seconds(record)
        _mark_freeze(axes, frozen_at, frozen_until)
        if record.solve is not None:
            solved_at = frozen_at + record.solve.collecting_seconds + record.solve.seconds
            axes.axvline(solved_at, color=_BEST, linewidth=1, linestyle="--", label="solved", zorder=1)
    label_axes(axes, "Score against time", "seconds of the fit", name)
    return figure


def _draw_scores(axes: "Axes", record: FitRecord, label: str, color: str) -> None:
    seconds = [epoch.seconds for epoch in record.scored]
    axes.plot(
        seconds, [epoch.val_score or 0.0 for epoch in record.scored], "o-", markersize=4, color=color, label=label
    )
    best = record.best
    if best is not None and best.val_score is not None:
        label = f"best: {best.val_score:.4f} (epoch {best.epoch})"
        axes.plot(best.seconds, best.val_score, "*", markersize=14, color=_BEST, label=label)


def _freeze_seconds(record: FitRecord) -> float:
    """Return the seconds after which the structure froze, to the end of a row of training."""
    before = 0.0
    for epoch in record.epochs:
        if epoch.frozen:
            return before if epoch.trained_frozen else before + epoch.training_seconds
        before = epoch.seconds
    return before


def save_png(figure: "Figure", file: IO[bytes]) -> None:
    """Write a figure to an open file as PNG."""
    figure.savefig(file, format="png")


def as_image(figure: "Figure") -> np.ndarray:
    """Return the pixels of a figure, uint8 (height, width, 3)."""
    canvas: Any = figure.canvas
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def new_figure() -> "tuple[Figure, Axes]":
    """Return an empty figure with one set of axes, which no global state knows of."""
    # Half a second of imports that only the end of a fit needs.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def label_axes(axes: "Axes", title: str, x: str, y: str) -> None:
    """Give a plot its title, the names of its axes, a grid and a legend."""
    axes.set_title(title, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def _mark_freeze(axes: "Axes", at: float, end: float) -> None:
    axes.axvspan(at, end, color=_FROZEN, alpha=0.6, linewidth=0, label="structure frozen", zorder=0)
    axes.axvline(at, color=_LINE, linewidth=1, zorder=1)
