"""The tables of a comparison, for the terminal and in Markdown."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from glai_lightning.checks import UserTypeError
from glai_lightning.comparison.runs import Run
from glai_lightning.comparison.statistics import Speedup
from glai_lightning.comparison.variants import REFERENCE, find_variant, solved_name
from glai_lightning.comparison.verdict import Comparison, Value, VariantSummary, signed, times

_NONE = "-"


#: A heading and a row for each variant, as many cells in each; the first one names what it is about.
Table = list[list[str]]


def text_report(comparison: Comparison) -> str:
    """Write a comparison up in plain text.

    Args:
        comparison: the comparison.

    Returns:
        Lines: the verdict, three tables, and notes on what their words mean.
    """
    _check_comparison(comparison)
    blocks = [comparison.verdict.sentence, *_rivals(comparison), _heading(comparison)]
    return "\n\n".join([*blocks, *map(_as_text, _tables(comparison)), "\n".join(_notes(comparison))])


def markdown_report(comparison: Comparison, plots: Sequence[Path] = ()) -> str:
    """Write a comparison up in Markdown.

    Args:
        comparison: the comparison.
        plots: images in the folder that the text will be in.

    Returns:
        The text of ``comparison.md``.
    """
    _check_comparison(comparison)
    blocks = ["# Comparison", f"**{comparison.verdict.sentence}**", *_rivals(comparison), _heading(comparison)]
    blocks += map(_as_markdown, _tables(comparison))
    blocks.append("\n".join(f"- {note}" for note in _notes(comparison)))
    blocks += [f"![{plot.stem.replace('_', ' ')}]({plot.name})" for plot in plots]
    machine = ", ".join(f"{name} {value}" for name, value in comparison.machine.items())
    return "\n\n".join([*blocks, f"Machine: {machine}."]) + "\n"


def _check_comparison(comparison: object) -> None:
    if not isinstance(comparison, Comparison):
        raise UserTypeError(f"Expected `comparison` to be a `Comparison`, but got `{type(comparison).__name__}`.")


def _rivals(comparison: Comparison) -> list[str]:
    """Write when the MLP was as good as the variant that is judged, and how that does beside simple baselines."""
    variant, margin = comparison.verdict.variant, comparison.verdict.margin
    lines = [_overtaking(comparison)]
    for rival in ("annealed", "linear+solve", "random+solve"):
        if rival in comparison.summary and rival != variant:
            faster, difference = comparison.beside(variant, rival)
            assert faster is not None
            score = comparison.test_score or comparison.score
            lines.append(f"Beside {rival}: {times(faster)} as fast; {score} {signed(difference, margin=margin)}.")
    return ["\n".join(lines)]


def _overtaking(comparison: Comparison) -> str:
    variant = comparison.verdict.variant
    summary, runs = comparison.summary[variant], comparison.of(variant)
    finished = _number(_mean(runs, comparison.finished), ".3g")
    ends = f"{variant} had finished after {finished} s."
    if summary.mlp_reached_seconds is None:
        return f"The MLP never reached the best {comparison.score} of {variant}; {ends}"
    seeds = (
        ""
        if summary.mlp_reached_runs == summary.num_runs
        else (f", in {summary.mlp_reached_runs} of {summary.num_runs} seeds")
    )
    return (
        f"The MLP reached the best {comparison.score} of {variant} after {summary.mlp_reached_seconds:.3g} s{seeds}; "
        f"{ends}"
    )


def _heading(comparison: Comparison) -> str:
    seeds = comparison.seeds
    which = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
    seconds = "CPU seconds" if comparison.clock == "cpu_seconds" else "seconds"
    return (
        f"{len(comparison.summary)} variants, {which}; {seconds} of whole fits; means over the seeds, 95 % intervals "
        "by bootstrap (times) and Student's t (scores)"
    )


def _tables(comparison: Comparison) -> list[Table]:
    heads = [_head_table(comparison)] if len(comparison.heads) > 1 else []
    return [_time_table(comparison), _score_table(comparison), _cost_table(comparison), *heads]


def _time_table(comparison: Comparison) -> Table:
    clock = comparison.clock
    rows = [["time", "epochs", "evaluations", "finished [s]", "speed-up", "p", "own best [s]", "speed-up", "p"]]
    rows[0].append("MLP as good after [s]")
    for variant, summary in comparison.summary.items():
        runs = comparison.of(variant)
        cells = [
            _number(_mean(runs, lambda run: run.num_epochs), ".1f"),
            _number(_mean(runs, lambda run: run.evaluations), ".1f"),
            _number(_mean(runs, comparison.finished), ".3g"),
            *_speedup(variant, summary.speedup_finished),
            _number(_mean(runs, lambda run: getattr(run, f"best_{clock}")), ".3g"),
            *_speedup(variant, summary.speedup_best),
            _NONE if variant == REFERENCE else _mlp_reached(summary),
        ]
        rows.append([variant, *cells])
    return rows


def _mlp_reached(summary: VariantSummary) -> str:
    if summary.mlp_reached_seconds is None:
        return "never"
    partly = f" ({summary.mlp_reached_runs} of {summary.num_runs})"
    return f"{summary.mlp_reached_seconds:.3g}{partly if summary.mlp_reached_runs < summary.num_runs else ''}"


def _score_table(comparison: Comparison) -> Table:
    test = comparison.test_score or "test (no data)"
    rows = [["score", f"best {comparison.score}", test, "difference", "frozen from"]]
    for variant, summary in comparison.summary.items():
        runs = comparison.of(variant)
        cells = [
            _number(_mean(runs, lambda run: run.best_val_score), ".4g"),
            _number(_mean(runs, lambda run: run.test_score), ".4g"),
            _NONE
            if variant == REFERENCE or summary.test_difference is None
            else signed(summary.test_difference, margin=comparison.verdict.margin),
            _freeze(runs),
        ]
        rows.append([variant, *cells])
    return rows


def _cost_table(comparison: Comparison) -> Table:
    measured: list[tuple[str, Value, float, str]] = [
        ("parameters", lambda run: run.parameters.total, 1, ",.0f"),
        ("trainable", lambda run: run.parameters.trainable, 1, ",.0f"),
        ("optimizer state [B]", lambda run: run.parameters.optimizer_state_bytes, 1, ",.0f"),
        ("step [CPU ms]", lambda run: run.step_cpu_seconds, 1e3, ".3f"),
        ("training alone [s]", lambda run: getattr(run, f"training_{comparison.clock}"), 1, ".3g"),
        ("wall-clock [s]", lambda run: run.finished_seconds, 1, ".3g"),
        ("peak memory [MB]", lambda run: run.peak_memory_bytes, 1e-6, ",.0f"),
    ]
    rows = [["cost", *(name for name, *_ in measured)]]
    for variant in comparison.summary:
        means = [(_mean(comparison.of(variant), value), unit, form) for _, value, unit, form in measured]
        rows.append([variant, *(_number(None if mean is None else mean * unit, form) for mean, unit, form in means)])
    return rows


def _head_table(comparison: Comparison) -> Table:
    name = comparison.test_score or comparison.score
    rows = [
        [
            "head",
            "parameters",
            *(f"{side}{what}" for what in (" [s]", f": {name}") for side in ("never frozen", "solved")),
        ]
    ]
    rows[0] += ["times as fast", "difference"]
    for head, side in comparison.heads.items():
        runs = [comparison.of(head), comparison.of(solved_name(head))]
        rows.append(
            [
                head,
                f"{side.parameters:,}",
                *(_number(_mean(of_side, comparison.finished), ".3g") for of_side in runs),
                *(_number(_mean(of_side, comparison.score_of), ".4g") for of_side in runs),
                times(side.speedup_finished).replace(" times", ""),
                signed(side.difference, margin=comparison.verdict.margin),
            ]
        )
    return rows


def _freeze(runs: Sequence[Run]) -> str:
    if find_variant(runs[0].variant).paths is None:
        return "never"
    frozen = [run.freeze_epoch for run in runs if run.frozen and run.freeze_epoch is not None]
    stayed = sum(not run.frozen for run in runs)
    when = f"epoch {statistics.fmean(frozen):.1f}" if frozen else ""
    if not stayed:
        return when or "the start"
    return f"{when}{', ' if when else ''}stayed an MLP in {stayed} of {len(runs)}"


def _notes(comparison: Comparison) -> list[str]:
    better = "" if comparison.mode == "max" else ", although the smallest score is the best"
    notes = [f"{name}: {find_variant(name).description}" for name in comparison.summary]
    notes += [
        f"difference: to the MLP, seed by seed; positive is better{better}",
        "finished: when the fit had ended; own best: when its best validation score was reached",
        "MLP as good after: when the MLP reached that best validation score; never, where it did not",
        "evaluations: how often a validation score was looked at; the best of more of them is flattered more",
        "step: of the frozen epochs where there are any; optimizer state: at the end of the fit",
        "peak memory: the most that the process had held by then, whichever fit held it; on a GPU that of the fit",
    ]
    if len(comparison.heads) > 1:
        notes.append("head: times as fast and difference are to the same head never frozen, not to the MLP")
    if comparison.clock == "cpu_seconds":
        notes.append(
            f"clock: CPU seconds of this process, threads: {comparison.machine['threads']}; other work on the machine "
            "slows them by shared caches and memory, and wall-clock seconds by as much as it takes"
        )
    return notes


def _mean(runs: Sequence[Run], value: Value) -> float | None:
    known = [one for one in map(value, runs) if one is not None]
    return statistics.fmean(known) if known and len(known) == len(runs) else None


def _number(value: float | None, form: str) -> str:
    return _NONE if value is None else format(value, form)


def _speedup(variant: str, speedup: Speedup | None) -> list[str]:
    if speedup is None or variant == REFERENCE:
        return [_NONE, _NONE]
    return [times(speedup).replace(" times", ""), _number(speedup.p, ".3f")]


def _as_text(table: Table) -> str:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    padded = [
        [name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))]
        for name, *cells in table
    ]
    return "\n".join("  ".join(line) for line in padded)


def _as_markdown(table: Table) -> str:
    rule = ["---", *("---:" for _ in table[0][1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in [table[0], rule, *table[1:]])
