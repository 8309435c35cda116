"""The tables of the comparisons of heads, of the six settings and of the language model."""

import statistics
from collections.abc import Iterator

from table_cells import (
    SETS,
    Gain,
    Rows,
    Table,
    gain,
    mean,
    mean_gain,
    nudged,
    read,
    times,
    where,
    with_interval,
)

HEADS = ("mlp", "gelu", "silu", "tanh", "glu", "polyglu", "eugen", "random", "linear")

#: The runs of the side that is never frozen, and those of the one that is measured against it.
Sides = tuple[Rows, Rows]


def _both_sides(head: str) -> Iterator[Sides]:
    """Yield, set by set, the runs of a head never frozen and solved."""
    rows = read("compare_heads")
    solved = "output+solve" if head == "mlp" else f"{head}+solve"
    for name in SETS:
        own = where(rows, configuration=f"{name}_constant")
        yield where(own, variant=head), where(own, variant=solved)


def heads() -> Table:
    """Heads at equal parameters, frozen and solved: how many times as fast as never frozen, and the difference."""
    rows = [["head", *SETS.values(), "mean"]]
    for head in HEADS:
        rows.append([head, *_by_set([gain(solved, never) for never, solved in _both_sides(head)])])
    return rows


def _by_set(gains: list[Gain]) -> list[str]:
    """Write a gain for each set, and their mean."""
    return [*(f"{times(ratio)}, {with_interval(by_seed)}" for ratio, by_seed in gains), ", ".join(mean_gain(gains))]


def head_scores() -> Table:
    """The same heads: parameters, and test accuracy never frozen and solved."""
    rows = [["parameters; test accuracy never frozen, solved", *SETS.values()]]
    for head in HEADS:
        cells = []
        for sides in _both_sides(head):
            cells.append(f"{int(sides[0][0]['head_parameters']):,}; {_scores(sides)}")
        rows.append([head, *cells])
    return rows


def _scores(sides: Sides) -> str:
    never, frozen = (100 * mean(side, "test_score") for side in sides)
    return f"{nudged(never):.2f} %, {nudged(frozen):.2f} %"


def _settings(*kinds: str) -> Iterator[tuple[list[str], Rows]]:
    """Yield the kind, the data and the schedule of each setting, and its runs."""
    rows = [row for row in read("six_settings") if row["kind"] in kinds]
    for setting in dict.fromkeys((row["kind"], row["data"], row["schedule"]) for row in rows):
        yield list(setting), [row for row in rows if (row["kind"], row["data"], row["schedule"]) == setting]


def _by_default(runs: Rows) -> Sides:
    return where(runs, variant="mlp"), where(runs, variant="output+solve") or where(runs, variant="output")


_KINDS = ("supervised", "projection", "few-shot")


def six_settings() -> Table:
    """The six settings under both schedules: the MLP, and the callback with its defaults."""
    columns = ["CPU seconds", "times as fast", "epochs", "frozen", "test score", "points"]
    rows, ratios = [["setting", "schedule", *columns]], []
    for (kind, name, schedule), runs in _settings(*_KINDS):
        mlp, frozen = sides = _by_default(runs)
        ratio, gained = gain(frozen, mlp)
        ratios.append(ratio)
        seconds, epochs = ([mean(side, column) for side in sides] for column in ("finished_cpu_seconds", "epochs"))
        rows.append(
            [
                f"{kind}, {name}",
                schedule,
                f"{nudged(seconds[0]):.2f}, {nudged(seconds[1]):.2f}",
                times(ratio),
                f"{nudged(epochs[0]):.1f}, {nudged(epochs[1]):.1f}",
                f"{sum(row['freeze_epoch'] != '' for row in frozen)} of {len(frozen)}",
                _scores(sides),
                with_interval(gained),
            ]
        )
    rows.append(["geometric mean of the twelve", "", "", times(statistics.geometric_mean(ratios)), "", "", "", ""])
    return rows


def frozen_at_epoch_3() -> Table:
    """What cannot be solved, frozen at epoch 3 whatever the rule says."""
    rows = [["", "constant rate: times as fast, points", "one-cycle: times as fast, points"]]
    for (kind, name, schedule), runs in _settings("projection", "few-shot"):
        ratio, gained = gain(where(runs, variant="output@3"), where(runs, variant="mlp"))
        cell = f"{times(ratio)}, {with_interval(gained)}"
        if schedule == "constant":
            rows.append([f"{kind}, {name}", cell])
        else:
            next(row for row in rows if row[0] == f"{kind}, {name}").append(cell)
    return rows


def end_to_end_pairs() -> Table:
    """A frozen CNN in the loop for 12 epochs, against one pass."""
    rows = [["", "CPU seconds: MLP, one pass", "times as fast", "test accuracy: MLP, one pass", "points"]]
    for (_, name, _), runs in _settings("end to end"):
        mlp, frozen = sides = _by_default(runs)
        ratio, gained = gain(frozen, mlp)
        seconds = ", ".join(f"{nudged(mean(side, 'finished_cpu_seconds')):.1f}" for side in sides)
        rows.append([name, seconds, times(ratio), _scores(sides), with_interval(gained)])
    return rows


def _at_high_rate(rows: Rows, side: str) -> Gain:
    return gain(where(rows, side=side), where(rows, side="early stopping"), "cpu_seconds", "test")


def heads_at_high_rate() -> Table:
    """Heads at three times the rate, frozen after two epochs and solved, against early stopping at the usual rate."""
    rows = [["frozen after two epochs", *SETS.values(), "mean"]]
    results = read("heads_at_high_rate")
    for head in dict.fromkeys(row["head"] for row in results):
        for side, name in (("after two epochs", head), ("after two epochs, in one pass", f"{head}, in one pass")):
            gains = [_at_high_rate(where(results, head=head, set=data), side) for data in SETS]
            rows.append([name, *_by_set(gains)])
    return rows


def sets_at_high_rate() -> Table:
    """The MLP at three times the rate on all sets, against early stopping at the usual rate."""
    sides = {
        "early stopping, high rate": "early stopping at 3e-3",
        "by the rule": "frozen by the rule",
        "by the rule, in one pass": "by the rule, in one pass",
        "after two epochs, in one pass": "after two epochs, in one pass",
    }
    rows, results = [["", *sides.values()]], read("sets_at_high_rate")
    gains: dict[str, list[Gain]] = {side: [] for side in sides}
    for name in dict.fromkeys(row["set"] for row in results):
        for side, so_far in gains.items():
            so_far.append(_at_high_rate(where(results, set=name), side))
        rows.append([name, *(", ".join(mean_gain(of_side[-1:])) for of_side in gains.values())])
    return [*rows, ["mean", *(", ".join(mean_gain(of_side)) for of_side in gains.values())]]


def transformer_ffn() -> Table:
    """FFN blocks of a small language model, frozen while it trains: means over the seeds."""
    columns = ["loss", "CPU seconds", "loss at equal seconds", "optimizer state, gradients"]
    rows = [["FFNs frozen", "from steps", *columns]]
    results = read("transformer_ffn")
    for activation, side in dict.fromkeys((row["activation"], row["side"]) for row in results):
        runs = where(results, activation=activation, side=side)
        memory = ", ".join(f"{mean(runs, of) / 1e6:.2f} MB" for of in ("optimizer_bytes", "gradient_bytes"))
        losses = [f"{nudged(mean(runs, of)):.3f}" for of in ("val_loss", "val_loss_at_equal_seconds")]
        steps = dict.fromkeys(
            "never" if set(of.split()) == {"never"} else of for of in (run["frozen_from_step"] for run in runs)
        )
        name = side.removeprefix("frozen ").replace("never frozen", "never")
        seconds = f"{nudged(mean(runs, 'cpu_seconds')):.1f}"
        rows.append([f"{activation}, {name}", "; ".join(steps), losses[0], seconds, losses[1], memory])
    return rows
