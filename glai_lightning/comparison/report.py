"""The tables of a comparison, for the terminal and in Markdown."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from glai_lightning.comparison.runs import Run
from glai_lightning.comparison.statistics import Interval
from glai_lightning.comparison.variants import REFERENCE, find_variant
from glai_lightning.comparison.verdict import Comparison, Speedup, mean_of

_NONE = "-"


@dataclass(frozen=True)
class Table:
    """A table of cells in plain text.

    Args:
        title: what it is about.
        columns: headings, that of the variants included.
        rows: a row for each variant, as long as ``columns``.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]


def text_report(comparison: Comparison) -> str:
    """Write a comparison up in plain text.

    Args:
        comparison: the comparison.

    Returns:
        Lines: three tables, notes on what their words mean, and the verdict.
    """
    blocks = [_heading(comparison)]
    blocks += [_as_text(table) for table in _tables(comparison)]
    blocks += ["\n".join(_notes(comparison)), comparison.verdict.sentence]
    return "\n\n".join(blocks)


def markdown_report(comparison: Comparison, plots: Sequence[Path] = ()) -> str:
    """Write a comparison up in Markdown.

    Args:
        comparison: the comparison.
        plots: images in the folder that the text will be in.

    Returns:
        The text of ``comparison.md``.
    """
    blocks = ["# Comparison", f"**{comparison.verdict.sentence}**", _heading(comparison)]
    blocks += [_as_markdown(table) for table in _tables(comparison)]
    blocks.append("\n".join(f"- {note}" for note in _notes(comparison)))
    blocks += [f"![{plot.stem.replace('_', ' ')}]({plot.name})" for plot in plots]
    machine = ", ".join(f"{name} {value}" for name, value in comparison.machine.items())
    return "\n\n".join([*blocks, f"Machine: {machine}."]) + "\n"


def _heading(comparison: Comparison) -> str:
    seeds = comparison.seeds
    which = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
    seconds = "CPU seconds" if comparison.clock == "cpu_seconds" else "seconds"
    fits = f"{len(comparison.summary)} variants, {which}; {seconds} of whole fits"
    return f"{fits}; means, and 95 % bootstrap intervals over the seeds"


def _tables(comparison: Comparison) -> list[Table]:
    return [_time_table(comparison), _score_table(comparison), _cost_table(comparison)]


def _time_table(comparison: Comparison) -> Table:
    clock = comparison.clock
    rows = []
    for variant, summary in comparison.summary.items():
        runs = comparison.of(variant)
        cells = [
            _number(mean_of(runs, lambda run: run.epochs[-1].epoch + 1), ".1f"),
            _number(mean_of(runs, lambda run: run.evaluations), ".1f"),
            _number(mean_of(runs, lambda run: getattr(run, f"finished_{clock}")), ".3g"),
            _speedup(variant, summary.speedup_finished),
            _p(variant, summary.speedup_finished),
            _number(mean_of(runs, lambda run: getattr(run, f"best_{clock}")), ".3g"),
            _speedup(variant, summary.speedup_best),
            _p(variant, summary.speedup_best),
        ]
        rows.append([variant, *cells])
    columns = ["time", "epochs", "evaluations", "finished [s]", "speed-up", "p", "own best [s]", "speed-up", "p"]
    return Table("time", columns, rows)


def _score_table(comparison: Comparison) -> Table:
    rows = []
    for variant, summary in comparison.summary.items():
        runs = comparison.of(variant)
        cells = [
            _number(mean_of(runs, lambda run: run.best_val_score), ".4g"),
            _number(mean_of(runs, lambda run: run.test_score), ".4g"),
            _NONE if variant == REFERENCE else _interval(summary.test_difference, "+.2g"),
            _freeze(runs),
        ]
        rows.append([variant, *cells])
    test = comparison.test_score or "test (no data)"
    return Table("score", ["score", f"best {comparison.score}", test, "difference", "frozen from"], rows)


def _cost_table(comparison: Comparison) -> Table:
    measured: list[tuple[str, Callable[[Run], float | None], float, str]] = [
        ("parameters", lambda run: run.parameters.total, 1, ",.0f"),
        ("trainable", lambda run: run.parameters.trainable, 1, ",.0f"),
        ("optimizer state [B]", lambda run: run.parameters.optimizer_state_bytes, 1, ",.0f"),
        ("step [CPU ms]", lambda run: run.step_cpu_seconds, 1e3, ".3f"),
        ("training alone [s]", lambda run: getattr(run, f"training_{comparison.clock}"), 1, ".3g"),
        ("wall-clock [s]", lambda run: run.finished_seconds, 1, ".3g"),
        ("peak memory [MB]", lambda run: run.peak_memory_bytes, 1e-6, ",.0f"),
    ]
    rows = []
    for variant in comparison.summary:
        means = [(mean_of(comparison.of(variant), value), unit, form) for _, value, unit, form in measured]
        cells = [_number(None if mean is None else mean * unit, form) for mean, unit, form in means]
        rows.append([variant, *cells])
    return Table("cost", ["cost", *(name for name, *_ in measured)], rows)


def _freeze(runs: Sequence[Run]) -> str:
    if runs[0].variant == REFERENCE:
        return "never"
    frozen = [run.freeze_epoch for run in runs if run.frozen and run.freeze_epoch is not None]
    stayed = sum(not run.frozen for run in runs)
    when = f"epoch {statistics.fmean(frozen):.1f}" if frozen else ""
    if not stayed:
        return when or "the start"
    return f"{when}{', ' if when else ''}stayed an MLP in {stayed} of {len(runs)}"


def _notes(comparison: Comparison) -> list[str]:
    notes = [f"{name}: {find_variant(name).description}" for name in comparison.summary]
    better = "" if comparison.mode == "max" else ", although the smallest score is the best"
    notes.append(f"difference: to the MLP, seed by seed; positive is better{better}")
    notes.append("finished: when the fit had ended; own best: when its best validation score was reached")
    notes.append("evaluations: how often a validation score was looked at; the best of more of them is flattered more")
    notes.append("step: of the frozen epochs where there are any; optimizer state: at the end of the fit")
    return notes


def _number(value: float | None, form: str) -> str:
    return _NONE if value is None else format(value, form)


def _interval(interval: Interval | None, form: str) -> str:
    if interval is None:
        return _NONE
    if interval.low is None or interval.high is None:
        return format(interval.mean, form)
    return f"{interval.mean:{form}} ({interval.low:{form}} to {interval.high:{form}})"


def _speedup(variant: str, speedup: Speedup | None) -> str:
    return _NONE if speedup is None or variant == REFERENCE else _interval(speedup.interval, ".2f")


def _p(variant: str, speedup: Speedup | None) -> str:
    return _NONE if speedup is None or speedup.p is None or variant == REFERENCE else f"{speedup.p:.3f}"


def _as_text(table: Table) -> str:
    lines = [table.columns, *table.rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(table.columns))]
    first, *others = widths
    return "\n".join(
        "  ".join([line[0].ljust(first), *(cell.rjust(width) for cell, width in zip(line[1:], others, strict=True))])
        for line in lines
    )


def _as_markdown(table: Table) -> str:
    rule = ["---", *("---:" for _ in table.columns[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in [table.columns, rule, *table.rows])
