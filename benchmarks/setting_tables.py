"""The tables of the comparisons of heads, of the six settings and of the language model."""

import statistics
from collections.abc import Iterator

from table_cells import SETS, Rows, Table, mean, nudged, points, read, times, where, with_interval

HEADS = ("mlp", "gelu", "silu", "tanh", "glu", "polyglu", "eugen", "random", "linear")


Pairs = list[tuple[dict[str, str], dict[str, str]]]


def _both_sides(head: str) -> Iterator[Pairs]:
    """Yield, set by set, the runs of a head never frozen and solved, seed by seed."""
    rows = read("compare_heads")
    solved = "output+solve" if head == "mlp" else f"{head}+solve"
    for name in SETS:
        own = where(rows, configuration=f"{name}_constant")
        yield [(run, where(own, variant=solved, seed=run["seed"])[0]) for run in where(own, variant=head)]


def heads() -> Table:
    """Heads at equal parameters, frozen and solved: how many times as fast as never frozen, and the difference."""
    rows = [["head", *SETS.values(), "mean"]]
    for head in HEADS:
        compared = [_compared(pairs) for pairs in _both_sides(head)]
        cells = [f"{times(ratio)}, {with_interval(gained)}" for ratio, gained in compared]
        ratio = statistics.geometric_mean(ratio for ratio, _ in compared)
        gained = statistics.fmean(statistics.fmean(gained) for _, gained in compared)
        rows.append([head, *cells, f"{times(ratio)}, {points(gained)}"])
    return rows


def head_scores() -> Table:
    """The same heads: parameters, and test accuracy never frozen and solved."""
    rows = [["parameters; test accuracy never frozen, solved", *SETS.values()]]
    for head in HEADS:
        cells = []
        for pairs in _both_sides(head):
            never, solved = (100 * mean([pair[side] for pair in pairs], "test_score") for side in (0, 1))
            cells.append(f"{int(pairs[0][0]['head_parameters']):,}; {nudged(never):.2f} %, {nudged(solved):.2f} %")
        rows.append([head, *cells])
    return rows


def _compared(pairs: Pairs) -> tuple[float, list[float]]:
    """Return how many times as fast the second side is, and its points against the first, seed by seed."""
    ratios = [float(a["finished_cpu_seconds"]) / float(b["finished_cpu_seconds"]) for a, b in pairs]
    return statistics.geometric_mean(ratios), [
        100 * (float(b["test_score"]) - float(a["test_score"])) for a, b in pairs
    ]


def _settings(*kinds: str) -> Iterator[tuple[list[str], Rows]]:
    """Yield the kind, the data and the schedule of each setting, and its runs."""
    rows = [row for row in read("six_settings") if row["kind"] in kinds]
    for setting in dict.fromkeys((row["kind"], row["data"], row["schedule"]) for row in rows):
        yield list(setting), [row for row in rows if (row["kind"], row["data"], row["schedule"]) == setting]


def _against_mlp(runs: Rows, variant: str) -> Pairs:
    return [(run, where(runs, variant=variant, seed=run["seed"])[0]) for run in where(runs, variant="mlp")]


def _by_default(runs: Rows) -> Pairs:
    solved = where(runs, variant="output+solve")
    return _against_mlp(runs, "output+solve" if solved else "output")


_KINDS = ("supervised", "projection", "few-shot")


def six_settings() -> Table:
    """The six settings under both schedules: the MLP, and the callback with its defaults."""
    columns = ["CPU seconds", "times as fast", "epochs", "frozen", "test score", "points"]
    rows, ratios = [["setting", "schedule", *columns]], []
    for (kind, name, schedule), runs in _settings(*_KINDS):
        pairs = _by_default(runs)
        ratio, gained = _compared(pairs)
        ratios.append(ratio)
        sides = [[pair[side] for pair in pairs] for side in (0, 1)]
        seconds, epochs, scores = (
            [mean(side, column) for side in sides] for column in ("finished_cpu_seconds", "epochs", "test_score")
        )
        frozen = sum(row["freeze_epoch"] != "" for row in sides[1])
        rows.append(
            [
                f"{kind}, {name}",
                schedule,
                f"{nudged(seconds[0]):.2f}, {nudged(seconds[1]):.2f}",
                times(ratio),
                f"{nudged(epochs[0]):.1f}, {nudged(epochs[1]):.1f}",
                f"{frozen} of {len(pairs)}",
                f"{nudged(100 * scores[0]):.2f} %, {nudged(100 * scores[1]):.2f} %",
                with_interval(gained),
            ]
        )
    rows.append(["geometric mean of the twelve", "", "", times(statistics.geometric_mean(ratios)), "", "", "", ""])
    return rows


def frozen_at_epoch_3() -> Table:
    """What cannot be solved, frozen at epoch 3 whatever the rule says."""
    rows = [["", "constant rate: times as fast, points", "one-cycle: times as fast, points"]]
    for (kind, name, schedule), runs in _settings("projection", "few-shot"):
        ratio, gained = _compared(_against_mlp(runs, "output@3"))
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
        pairs = _by_default(runs)
        ratio, gained = _compared(pairs)
        seconds, scores = (
            [mean([pair[side] for pair in pairs], column) for side in (0, 1)]
            for column in ("finished_cpu_seconds", "test_score")
        )
        cells = [
            f"{nudged(seconds[0]):.1f}, {nudged(seconds[1]):.1f}",
            times(ratio),
            f"{nudged(100 * scores[0]):.2f} %, {nudged(100 * scores[1]):.2f} %",
        ]
        rows.append([name, *cells, with_interval(gained)])
    return rows


def _at_high_rate(rows: Rows, side: str) -> tuple[float, list[float]]:
    """Return how many times as fast a side is as early stopping at the usual rate, and its points, seed by seed."""
    pairs = [(run, where(rows, side=side, seed=run["seed"])[0]) for run in where(rows, side="early stopping")]
    ratios = [float(a["cpu_seconds"]) / float(b["cpu_seconds"]) for a, b in pairs]
    return statistics.geometric_mean(ratios), [100 * (float(b["test"]) - float(a["test"])) for a, b in pairs]


def heads_at_high_rate() -> Table:
    """Heads at three times the rate, frozen after two epochs and solved, against early stopping at the usual rate."""
    rows = [["frozen after two epochs", *SETS.values(), "mean"]]
    results = read("heads_at_high_rate")
    for head in dict.fromkeys(row["head"] for row in results):
        for side, name in (("after two epochs", head), ("after two epochs, in one pass", f"{head}, in one pass")):
            compared = [_at_high_rate(where(results, head=head, set=data), side) for data in SETS]
            ratio = statistics.geometric_mean(ratio for ratio, _ in compared)
            gained = statistics.fmean(statistics.fmean(gained) for _, gained in compared)
            cells = [f"{times(ratio)}, {with_interval(gained)}" for ratio, gained in compared]
            rows.append([name, *cells, f"{times(ratio)}, {points(gained)}"])
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
    everything: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    for name in dict.fromkeys(row["set"] for row in results):
        of_set = where(results, set=name)
        for side, so_far in everything.items():
            ratio, gained = _at_high_rate(of_set, side)
            so_far.append((ratio, statistics.fmean(gained)))
        rows.append([name, *(f"{times(pairs[-1][0])}, {points(pairs[-1][1])}" for pairs in everything.values())])
    means = [
        f"{times(statistics.geometric_mean(ratio for ratio, _ in pairs))}, "
        f"{points(statistics.fmean(gained for _, gained in pairs))}"
        for pairs in everything.values()
    ]
    return [*rows, ["mean", *means]]


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
