"""The tables of the documents, out of the files in ``results/``: pages of the site show them, tests compare them.

A table is a list of rows of cells, the header first. What got worse is bold.

    python benchmarks/tables.py        # prints all of them
"""

import itertools
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from setting_tables import (
    end_to_end_pairs,
    frozen_at_epoch_3,
    head_scores,
    heads,
    heads_at_high_rate,
    sets_at_high_rate,
    six_settings,
    transformer_ffn,
)
from table_cells import (
    RESULTS,
    SETS,
    Gain,
    Rows,
    Table,
    as_markdown,
    gain,
    half_width,
    mean,
    mean_gain,
    nudged,
    paired,
    points,
    read,
    times,
    where,
    with_interval,
)

_VARIANTS = {
    "output+solve": "output+solve",
    "output": "output, trained on (freezing the inner layers)",
    "tangent": "tangent, trained on",
    "independent": "independent, matched width (the paper's)",
    "random": "random structure, solved",
}


@dataclass(frozen=True)
class Side:
    """A variant of the supervised comparison on one data set: its speed, and its points against the MLP by seed."""

    speed: dict[str, float]
    points: list[float]

    def cells(self) -> tuple[str, str]:
        """Write both figures."""
        return times(self.speed["mean"]), points(statistics.fmean(self.points))

    def cells_with_intervals(self) -> tuple[str, str]:
        """Write both figures, and the interval of each."""
        low, high = self.speed["low"], self.speed["high"]
        return f"{times(self.speed['mean'])} ({low:.2f} to {high:.2f})", with_interval(self.points)


def _sides(schedule: str, variant: str) -> list[Side]:
    (path,) = RESULTS.glob("compare_supervised_*.json")
    summaries, rows, sides = json.loads(path.read_text()), read("compare_supervised"), []
    for name in SETS:
        runs = where(rows, configuration=f"{name}_{schedule}")
        scores = paired(where(runs, variant=variant), where(runs, variant="mlp"), "test_score")
        speed = summaries[f"{name}_{schedule}"]["summary"][variant]["speedup_finished"]
        sides.append(Side(speed, [100 * (score - other) for score, other in scores]))
    return sides


def _mean_of_sets(sides: list[Side]) -> tuple[str, str]:
    speed = statistics.geometric_mean(side.speed["mean"] for side in sides)
    return times(speed), points(statistics.fmean(statistics.fmean(side.points) for side in sides))


_BARE, _ONE_PASS = "freeze and solve", "in one pass"


def _bare_line(name: str, side: str) -> Gain:
    """Return how many times as fast a side of the bare line is on a set, and its points against the MLP by seed."""
    rows = where(read("one_line"), set=name)
    return gain(where(rows, side=side), where(rows, side="early stopping"), "cpu_seconds", "test")


def _sets_of_the_bare_line() -> list[str]:
    return list(dict.fromkeys(row["set"] for row in read("one_line")))


def _mean_of_the_bare_line(side: str) -> tuple[str, str]:
    return mean_gain([_bare_line(name, side) for name in _sets_of_the_bare_line()])


def bare_line() -> Table:
    """``StructureFreezeCallback("head")`` as it is, and with ``one_pass=True``, five seeds."""
    header = ["", "CPU seconds, epochs of the MLP", "the bare line: times as fast", "points"]
    table = [[*header, "`one_pass=True`: times as fast", "points"]]
    for name in _sets_of_the_bare_line():
        mlp = where(read("one_line"), set=name, side="early stopping")
        cells = [f"{mean(mlp, 'cpu_seconds'):.2f}, {mean(mlp, 'epochs'):.0f}"]
        for side in (_BARE, _ONE_PASS):
            ratio, by_seed = _bare_line(name, side)
            cells += [times(ratio), with_interval(by_seed)]
        table.append([name, *cells])
    return [*table, ["mean", "", *_mean_of_the_bare_line(_BARE), *_mean_of_the_bare_line(_ONE_PASS)]]


def constant_rate() -> Table:
    """Time to a finished head at a constant rate, for each variant."""
    table = [["constant rate 1e-3, early stopping", *SETS.values(), "mean"]]
    for variant, title in _VARIANTS.items():
        sides = _sides("constant", variant)
        cells = [side.cells_with_intervals() if variant == "output+solve" else side.cells() for side in sides]
        table.append([title, *(", ".join(cell) for cell in [*cells, _mean_of_sets(sides)])])
    return table


def other_schedules() -> Table:
    """The same under one-cycle to its end, and at a high constant rate."""
    decaying, high = _sides("onecycle", "output+solve"), _sides("highrate", "output+solve")
    cells = [f"{side.cells()[0]}, {side.cells_with_intervals()[1]}" for side in decaying]
    return [
        ["output+solve under other schedules", *SETS.values(), "mean"],
        ["one-cycle to 3e-3 over ten epochs, both sides", *cells, ", ".join(_mean_of_sets(decaying))],
        [
            "constant 3e-3, frozen after two epochs, against the MLP at 3e-3",
            *(", ".join(side.cells()) for side in high),
            ", ".join(_mean_of_sets(high)),
        ],
    ]


def backbone_in_the_loop() -> Table:
    """A frozen CNN before the head."""
    rows = read("end_to_end")
    mlp = where(rows, variant="mlp")
    table = [
        ["", "CPU seconds of the whole fit", "test accuracy"],
        ["the MLP, 12 epochs", f"{mean(mlp, 'finished_cpu_seconds'):.1f}", f"{100 * mean(mlp, 'test_score'):.1f} %"],
    ]
    cached = "mlp on cached features, stopped early"
    titles = {
        "output+solve": "freeze, solve, stop (2 epochs), nothing kept",
        cached: "the MLP on features that are computed once, stopped early (9 to 11 epochs)",
        "one_pass": "`one_pass=True` (2 epochs' worth of steps)",
    }
    for variant, title in titles.items():
        side = where(rows, variant=variant)
        ratio, low, high = _speed_end_to_end(side)
        seconds = f"{mean(side, 'finished_cpu_seconds'):.1f}: {ratio:.1f} times ({low:.1f} to {high:.1f})"
        difference = 100 * (mean(side, "test_score") - mean(mlp, "test_score"))
        table.append([title, seconds, f"{points(difference)} points"])
    return table


def _speed_end_to_end(side: Rows) -> tuple[float, float, float]:
    mlp = where(read("end_to_end"), variant="mlp")
    ratios = [other / seconds for seconds, other in paired(side, mlp, "finished_cpu_seconds")]
    return mean(mlp, "finished_cpu_seconds") / mean(side, "finished_cpu_seconds"), min(ratios), max(ratios)


def few_shot() -> Table:
    """Prototypes on Omniglot: the loss cannot be solved."""
    rows = read("prototypical_omniglot")
    table = [["", "frozen at epoch 6 or 7 of 8", "never frozen", "difference"]]
    for shots in ("1", "5"):
        frozen, never = (where(rows, shots=shots, variant=variant) for variant in ("frozen", "never frozen"))
        cells = [f"{100 * mean(side, 'test_accuracy'):.2f} %" for side in (frozen, never)]
        differences = [100 * (a - b) for a, b in paired(frozen, never, "test_accuracy")]
        difference = f"{points(statistics.fmean(differences))} ± {half_width(differences):.2f}"
        table.append([f"{shots}-shot", *cells, difference])
    seconds = [mean(where(rows, shots="1", variant=v), "fit_cpu_seconds") for v in ("frozen", "never frozen")]
    return [*table, ["CPU seconds of a fit", *(f"{s:.1f}" for s in seconds), f"{times(seconds[1] / seconds[0])} times"]]


def contrastive() -> Table:
    """SimCLR on digits, the backbone trained along."""
    rows = read("simclr_digits")
    frozen, never = where(rows, variant="frozen"), where(rows, variant="never")
    table = [["mean of five seeds", "frozen at epoch 5 or 6 of 20", "never frozen", "difference"]]
    for column in ("embeddings", "projections"):
        cells = [f"{100 * mean(side, f'test/knn_{column}'):.1f} %" for side in (frozen, never)]
        differences = [100 * (a - b) for a, b in paired(frozen, never, f"test/knn_{column}")]
        table.append([f"nearest neighbours, {column}", *cells, with_interval(differences)])
    seconds = [mean(side, "cpu_seconds") for side in (frozen, never)]
    ratios = [other / own for own, other in paired(frozen, never, "cpu_seconds")]
    # The bootstrap over five seeds, all of its draws.
    draws = sorted(statistics.fmean(draw) for draw in itertools.product(map(math.log, ratios), repeat=5))
    low, high = (math.exp(draws[round(part * (len(draws) - 1))]) for part in (0.025, 0.975))
    speed = f"{times(statistics.geometric_mean(ratios))} times ({low:.2f} to {high:.2f})"
    return [*table, ["CPU seconds of a fit", *(f"{s:.1f}" for s in seconds), speed]]


def training_step() -> Table:
    """CPU milliseconds of a step of the head."""
    rows = read("step_cost")
    table = [
        ["(D, H, C, batch)", "MLP, CPU ms", "output: MLP / this", "independent: this / MLP", "tangent: this / MLP"]
    ]
    for mlp in where(rows, paths="mlp"):
        same = {column: mlp[column] for column in ("D", "C", "batch")}
        output, independent, tangent = (where(rows, paths=p, **same)[0] for p in ("output", "independent", "tangent"))
        ratios = [float(side["this_over_mlp"]) for side in (independent, tangent)]
        cells = [times(float(output["mlp_over_this"])), *(f"{nudged(ratio):.2f}" for ratio in ratios)]
        size = f"({mlp['D']}, {mlp['H']}, {mlp['C']}, {mlp['batch']})"
        table.append([size, f"{float(mlp['cpu_ms_per_step']):.3g}", *cells])
    return table


def headline() -> Table:
    """The table of README and of the start page: losses beside wins."""
    bare = {
        '**`StructureFreezeCallback("head")` as it is now:** letter, 26 classes': "letter",
        "shells of 5 classes, generated": "shells of 5 classes",
        "Hastie's example 10.2, generated": "hastie",
        "CIFAR-10, cached embeddings": "cifar10_resnet_features",
        "Fashion-MNIST, pixels": "fashion_mnist",
        "CLINC150, cached embeddings": "clinc150_minilm",
        "clusters of 20 classes, generated": "clusters of 20 classes",
        "parity of 3 columns, generated": "parity of 3 columns",
    }
    header = [
        "against an early-stopped MLP where nothing else is said",
        "times as fast",
        "test accuracy, points",
        "seeds",
    ]
    table = [header]
    for title, name in bare.items():
        ratio, by_seed = _bare_line(name, _BARE)
        table.append([title, times(ratio), with_interval(by_seed), "5"])
    table.append(["all fourteen sets, mean", *_mean_of_the_bare_line(_BARE), "5"])
    table.append(["all fourteen sets, mean, `one_pass=True`", *_mean_of_the_bare_line(_ONE_PASS), "5"])
    titles = [
        "**earlier settings:** CLINC150, cached embeddings",
        "CIFAR-10, cached embeddings",
        "Fashion-MNIST, pixels",
    ]
    for title, side in zip(titles, _sides("constant", "output+solve"), strict=True):
        table.append([title, *side.cells_with_intervals(), "5"])
    one_cycle = _mean_of_sets(_sides("onecycle", "output+solve"))
    table.append(["the three, mean, both sides under one-cycle to its end", *one_cycle, "5"])
    table.append(["the three, mean, frozen but not solved", *_mean_of_sets(_sides("constant", "output")), "5"])
    title = "**a frozen CNN in the loop, `one_pass=True`**, against 12 epochs of the MLP"
    (_, _, speed, _, gained) = next(row for row in end_to_end_pairs() if row[0] == "fashion_mnist")
    table.append([title, speed, gained, "5"])
    for title, table_of_setting, score in (
        ("few-shot on Omniglot, CNN trained along, not solved", few_shot(), "1-shot"),
        ("SimCLR on digits, CNN trained along, not solved", contrastive(), "neighbours"),
    ):
        speed = table_of_setting[-1][-1].replace(" times", "")
        table.append([title, speed, f"{table_of_setting[1][-1].split()[0]} ({score})", "5"])
    return table


def race() -> Table:
    """What ``glai demo`` runs."""
    table = [["`glai demo`", "epochs", "CPU seconds", "best validation accuracy"]]
    rows = read("demo_race")
    for side in ("never frozen", "frozen and solved"):
        epochs = where(rows, side=side)
        best = max(float(row["val_accuracy"]) for row in epochs)
        table.append([side, str(len(epochs)), f"{float(epochs[-1]['cpu_seconds']):.1f}", f"{100 * best:.1f} %"])
    return table


def freeze_rates() -> Table:
    """What rate and moment of the freeze are worth."""
    names = {"chosen_on": "the four chosen on"}
    for name in ("clinc150_minilm", "cifar10_resnet_features", "cifar10_resnet_views", "digits"):
        names[name] = name.replace("_minilm", "").replace("_resnet_", " ")
    names |= {name: name for name in ("fashion_mnist", "omniglot_small")}
    rows = [["rate of the structure, epochs", *names.values()]]
    for row in read("freeze_rates"):
        moment = "the rule" if row["rule"] == "churn" else row["settings"]
        rows.append([f"{row['rate']}, {moment}", *(_speed_and_points(row, name, 1) for name in names)])
    # Too early to be worth a line.
    return [row for row in rows if row[0] not in ("0.0003, 2", "0.0003, 3") and not row[0].endswith(", 1")]


def freeze_rules() -> Table:
    """The fastest setting of each rule that loses no more than the default."""
    names = {"chosen_on": "chosen on", "chosen_on_best_rate": "at the MLPs' best rates"}
    names |= {name: name for name in ("fashion_mnist", "omniglot_small")}
    rows = [["rule, checked once an epoch", "settings", *names.values()]]
    for row in where(read("freeze_rules"), checks="epoch"):
        if "at most" not in row["role"]:
            rule = "the default: churn" if row["role"] == "the default" else row["rule"]
            settings = row["settings"].replace("tolerance inf", "no tolerance")
            rows.append([rule, settings, *(_speed_and_points(row, name, 2) for name in names)])
    return rows


def _speed_and_points(row: dict[str, str], name: str, digits: int) -> str:
    return f"{float(row[f'{name}_speed']):.{digits}f}x, {float(row[f'{name}_test']):+.2f}"


#: Every table, by the name that a page gives for it.
TABLES: dict[str, Callable[[], Table]] = {
    "headline": headline,
    "bare_line": bare_line,
    "constant_rate": constant_rate,
    "other_schedules": other_schedules,
    "backbone_in_the_loop": backbone_in_the_loop,
    "few_shot": few_shot,
    "contrastive": contrastive,
    "training_step": training_step,
    "heads": heads,
    "head_scores": head_scores,
    "heads_at_high_rate": heads_at_high_rate,
    "sets_at_high_rate": sets_at_high_rate,
    "six_settings": six_settings,
    "frozen_at_epoch_3": frozen_at_epoch_3,
    "end_to_end_pairs": end_to_end_pairs,
    "transformer_ffn": transformer_ffn,
    "race": race,
    "freeze_rates": freeze_rates,
    "freeze_rules": freeze_rules,
}


if __name__ == "__main__":
    for name, table in TABLES.items():
        print(f"\n{name}\n\n{as_markdown(table())}")
