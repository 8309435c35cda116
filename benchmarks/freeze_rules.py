"""When to freeze: compares rules for the moment of freezing on the curves that ``when_to_freeze.py`` recorded.

A rule reads checks one after the other and says when to freeze. The head is then solved, and the fit is over; a rule
that never says so leaves the MLP to its own end. Every rule is compared with that MLP: how many times sooner, and how
many points better or worse. The seconds of a rule are those of the steps until then, of validation and checks, and of
the solve; steps cost what they cost on average in that fit, so that both sides meet the same disturbances.

The settings of every kind of rule are chosen on four data sets by rows of their own ('choice'): the fastest of those
that lose no more points than the default does, and of those that lose at most 0.1. What is reported is test accuracy,
on these data sets and on two that took no part in any choice. Written are three tables and a plot:

- freeze_rules: the rules;
- freeze_moments: what the solve is worth at the default's moment, at the MLP's own best epoch, and at step 0;
- freeze_rates: the head frozen after so many epochs at one rate, against the MLP at its own best rate.

    python benchmarks/freeze_rules.py
"""

import argparse
import csv
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from measuring import RESULTS, machine, save_results

from glai_lightning import structure_settled

matplotlib.use("Agg")
from matplotlib import pyplot as plt

CHOOSING = ("clinc150_minilm", "cifar10_resnet_features", "cifar10_resnet_views", "digits")
HELD_OUT = ("fashion_mnist", "omniglot_small")
#: Points that a rule may lose on average over the data sets that it is chosen on.
MOST_LOSS = 0.1
#: Points gained in one place that may make up for losses elsewhere.
MOST_GAIN = 0.5
#: Points that a factor of e in time is worth, in hindsight.
PRICE = 1.0
SPLITS = ("val", "choice", "test")

Row = dict[str, float]
Key = tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """A finished head: CPU seconds until then, accuracy by split, and the step of the freeze (``None``: an MLP)."""

    seconds: float
    scores: Mapping[str, float]
    step: int | None


class Fit:
    """One recorded MLP.

    Args:
        key: data, hidden units, rate, schedule and seed.
        checks: its checks, of both series.
        solves: its solves.
    """

    def __init__(self, key: Key, checks: Sequence[dict[str, str]], solves: Sequence[dict[str, str]]) -> None:
        self.data, self.hidden, self.rate, self.schedule, self.seed = self.key = key
        self.series: dict[str, list[Row]] = {"epoch": [], "doubling": []}
        for row in checks:
            self.series[row["series"]].append(_numbers(row))
        self.solves = [_numbers(row) for row in solves]
        epochs = self.series["epoch"]
        last = epochs[-1]
        self.step_seconds = last["train_cpu"] / last["step"]
        self.val_seconds = last["val_cpu"] / last["epoch"]
        best = max(epochs, key=lambda row: row["mlp_val"])
        self.mlp = Outcome(last["train_cpu"] + last["val_cpu"], {split: best[f"mlp_{split}"] for split in SPLITS}, None)

    def frozen_at(self, step: float, check_seconds: float = 0.0) -> Outcome:
        """Return the head that is frozen at the first recorded moment not before a step."""
        solve = next(row for row in self.solves if row["step"] >= step)
        trained = solve["step"] * self.step_seconds
        validated = (max(solve["epoch"], 1.0)) * self.val_seconds
        return Outcome(
            trained + validated + check_seconds + solve["solve_cpu"],
            {split: solve[split] for split in SPLITS},
            int(solve["step"]),
        )


def _numbers(row: dict[str, str]) -> Row:
    return {name: float(value) for name, value in row.items() if name not in ("data", "schedule", "series")}


def read_fits(folder: Path) -> list[Fit]:
    """Read what was recorded."""
    tables: dict[str, dict[Key, list[dict[str, str]]]] = {}
    for table in ("checks", "solves"):
        tables[table] = defaultdict(list)
        for path in sorted(folder.glob(f"when_to_freeze_{table}_*.csv")):
            with path.open(newline="") as file:
                for row in csv.DictReader(file):
                    key = tuple(row[name] for name in ("data", "hidden", "rate", "schedule", "seed"))
                    tables[table][key].append(row)
    return [Fit(key, checks, tables["solves"][key]) for key, checks in tables["checks"].items()]


@dataclass(frozen=True)
class Rule:
    """A way to choose the moment, with its settings.

    Args:
        kind: what it goes by.
        series: the checks that it reads, 'epoch' or 'doubling'.
        settings: for the reader.
        decide: given the checks so far, whether to freeze; ``None`` for a rule without checks.
        at: step or epoch to freeze at, for a rule without checks.
    """

    kind: str
    series: str
    settings: str
    decide: Callable[[list[Row]], bool] | None = None
    at: int | None = None

    def apply(self, fit: Fit) -> Outcome:
        """Return the head that a fit ends with under this rule."""
        if self.decide is None:
            return self._fixed(fit)
        cost, seen = 0.0, []
        for row in fit.series[self.series]:
            seen.append(row)
            cost += row["subsample_cpu" if self.kind == "gain of a solve on few rows" else "check_cpu"]
            if self.decide(seen) and row["step"] <= fit.solves[-1]["step"]:
                return fit.frozen_at(row["step"], cost)
        return Outcome(fit.mlp.seconds + cost, fit.mlp.scores, None)

    def _fixed(self, fit: Fit) -> Outcome:
        assert self.at is not None
        if self.series == "doubling":
            return fit.frozen_at(self.at) if self.at <= fit.solves[-1]["step"] else fit.mlp
        epochs = fit.series["epoch"]
        return fit.frozen_at(epochs[self.at - 1]["step"]) if self.at <= len(epochs) else fit.mlp


def settled_by(
    measure: Callable[[Row], float], relative: float, tolerance: float, patience: int = 1
) -> Callable[[list[Row]], bool]:
    """Freeze once a measure is small, and small against the largest so far: the rule of ``structure_settled``."""

    def decide(checks: list[Row]) -> bool:
        return structure_settled(
            [measure(row) for row in checks],
            churn_tolerance=tolerance,
            relative_tolerance=relative,
            patience=patience,
        )

    return decide


def gains_little(
    measure: Callable[[Row], float], least: float, *, relative: bool = False
) -> Callable[[list[Row]], bool]:
    """Freeze once a score gained less than so much since the last check; ``relative``: of what it still lacks."""

    def decide(checks: list[Row]) -> bool:
        if len(checks) < 2:
            return False
        before, now = measure(checks[-2]), measure(checks[-1])
        return now - before < least * ((1.0 - before) if relative else 1.0)

    return decide


def has_moved(least: float) -> Callable[[list[Row]], bool]:
    """Freeze once the learning rates of all steps add up to so much: Adam moves weights by about its rate a step."""
    return lambda checks: sum(row["rate_sum"] for row in checks) >= least


#: What ``StructureFreezeCallback`` does by default.
DEFAULT = Rule(
    "churn", "epoch", "relative 0.25, tolerance 0.1, patience 1", settled_by(lambda row: row["churn"], 0.25, 0.10)
)

RELATIVES = (0.001, 0.003, 0.01, 0.03, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 0.85, 1.0)
TOLERANCES = {
    "churn": (0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 1.0),
    "churn weighted by margin": (1e-4, 3e-4, 1e-3, 2e-3, 4e-3, 7e-3, 0.01, 0.015, 0.02, 0.03, 0.05, 1.0),
    "churn weighted by its effect on the output": (1e-6, 1e-5, 3e-5, 1e-4, 2e-4, 3e-4, 5e-4, 1e-3, 3e-3, 1e-2, 1.0),
    "change of the activations": (3e-4, 1e-3, 3e-3, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.3, math.inf),
    "churn by learning rate": (math.inf,),
    "effect on the output by learning rate": (math.inf,),
}
MEASURES: dict[str, Callable[[Row], float]] = {
    "churn": lambda row: row["churn"],
    "churn weighted by margin": lambda row: row["margin_churn"],
    "churn weighted by its effect on the output": lambda row: row["output_churn"],
    "change of the activations": lambda row: row["activation_change"],
    "churn by learning rate": lambda row: row["churn"] / row["rate_sum"],
    "effect on the output by learning rate": lambda row: row["output_churn"] / row["rate_sum"] ** 2,
}


def candidates() -> list[Rule]:
    """Return all rules, with all settings that are tried."""
    rules = [DEFAULT]
    rules += [Rule("number of epochs", "epoch", f"{k}", at=k) for k in range(1, 11)]
    rules += [Rule("number of steps", "doubling", f"{s}", at=s) for s in (0, 50, 100, 200, 400, 800, 1600)]
    for series, (kind, measure) in itertools.product(("epoch", "doubling"), MEASURES.items()):
        for relative, tolerance, patience in itertools.product(RELATIVES, TOLERANCES[kind], (1, 2)):
            settings = f"relative {relative:g}, tolerance {tolerance:g}, patience {patience}"
            rules.append(Rule(kind, series, settings, settled_by(measure, relative, tolerance, patience)))
    for series in ("epoch", "doubling"):
        for least in (0.0, 0.002, 0.004, 0.006, 0.01, 0.015, 0.02, 0.03, 0.05):
            for name, column in (
                ("gain of the MLP's validation score", "mlp_val"),
                ("gain of a solve on few rows", "subsample_val"),
            ):
                decide = gains_little(lambda row, column=column: row[column], least)
                rules.append(Rule(name, series, f"below {100 * least:g} points", decide))
        for least in (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5):
            for name, column in (
                ("gain of the MLP's validation score", "mlp_val"),
                ("gain of a solve on few rows", "subsample_val"),
            ):
                decide = gains_little(lambda row, column=column: row[column], least, relative=True)
                rules.append(Rule(name, series, f"below {100 * least:g} % of the errors", decide))
        for factor in (0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1):
            decide = gains_little(lambda row: -math.log(max(row["train_loss"], 1e-9)), -math.log(factor))
            rules.append(Rule("fall of the training loss", series, f"above {factor:g} times the last", decide))
            decide = gains_little(lambda row: -row["train_loss"], (1 - factor) / 4)
            rules.append(Rule("fall of the training loss", series, f"by less than {(1 - factor) / 4:g}", decide))
        for least in (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.8):
            rules.append(Rule("sum of learning rates", series, f"at least {least:g}", has_moved(least)))
    return rules


@dataclass(frozen=True)
class Standing:
    """How a rule does on some fits: geometric mean of the speed, mean difference in points by split."""

    speed: float
    differences: Mapping[str, float]
    frozen: float


def stand(fits: Iterable[Fit], outcomes: Iterable[Outcome]) -> Standing:
    """Compare finished heads with the MLPs."""
    pairs = list(zip(fits, outcomes, strict=True))
    speeds = [math.log(fit.mlp.seconds / outcome.seconds) for fit, outcome in pairs]
    return Standing(
        math.exp(float(np.mean(speeds))),
        {
            split: 100 * float(np.mean([outcome.scores[split] - fit.mlp.scores[split] for fit, outcome in pairs]))
            for split in SPLITS
        },
        float(np.mean([outcome.step is not None for _, outcome in pairs])),
    )


def hindsight(fit: Fit, price: float) -> Outcome:
    """Return the best moment of a fit, where a factor of e in time is worth ``price`` points on 'choice'."""
    moments = [fit.frozen_at(solve["step"]) for solve in fit.solves]
    return max(moments, key=lambda moment: 100 * moment.scores["choice"] - price * math.log(moment.seconds))


class Comparison:
    """All rules on all fits, each applied once."""

    def __init__(self, fits: Sequence[Fit], rules: Sequence[Rule]) -> None:
        self.fits, self.rules = fits, rules
        self.outcomes = {rule: [rule.apply(fit) for fit in fits] for rule in rules}
        self.own_rate = best_rates(fits)
        self.losses = {rule: self.loss(rule) for rule in rules}

    def standing(
        self, rule: Rule, data: Sequence[str], schedule: str | None = None, *, own_rate: bool = False
    ) -> Standing:
        """Return how a rule does on some data sets; ``own_rate``: at the rate that is the MLP's best alone."""
        chosen = [
            (fit, outcome)
            for fit, outcome in zip(self.fits, self.outcomes[rule], strict=True)
            if fit.data in data and schedule in (None, fit.schedule) and (not own_rate or fit in self.own_rate)
        ]
        return stand(*zip(*chosen, strict=True))

    def loss(self, rule: Rule) -> float:
        """Return the points of 'choice' that a rule loses: at all rates, or at the MLPs' best, whichever are more.

        A gain counts up to ``MOST_GAIN`` in a cell of data set, rate and schedule: an MLP that stopped too soon in one
        place does not pay for losses elsewhere.
        """
        cells: dict[bool, dict[Key, list[float]]] = {False: defaultdict(list), True: defaultdict(list)}
        for fit, outcome in zip(self.fits, self.outcomes[rule], strict=True):
            if fit.data in CHOOSING:
                gain = 100 * (outcome.scores["choice"] - fit.mlp.scores["choice"])
                for own_rate in {False, fit in self.own_rate}:
                    cells[own_rate][fit.data, fit.rate, fit.schedule].append(gain)
        gains = [[min(float(np.mean(cell)), MOST_GAIN) for cell in of.values()] for of in cells.values()]
        return -min(float(np.mean(of)) for of in gains)

    def best(self, rules: Iterable[Rule], most_loss: float = MOST_LOSS) -> Rule | None:
        """Return the fastest rule that loses no more points than it may on the data sets to choose on."""
        allowed = [rule for rule in rules if self.losses[rule] <= most_loss]
        return max(allowed, key=lambda rule: self.standing(rule, CHOOSING).speed, default=None)

    def difference(self, rule: Rule, other: Rule, data: Sequence[str], draws: int = 2000) -> dict[str, object]:
        """Compare two rules: how many times faster, how many points better, with 95 % intervals over the fits."""
        pairs = [
            (math.log(theirs.seconds / ours.seconds), 100 * (ours.scores["test"] - theirs.scores["test"]))
            for fit, ours, theirs in zip(self.fits, self.outcomes[rule], self.outcomes[other], strict=True)
            if fit.data in data
        ]
        values = np.array(pairs)
        drawn = np.random.default_rng(0).integers(len(values), size=(draws, len(values)))
        low, high = np.quantile(values[drawn].mean(1), (0.025, 0.975), axis=0)
        speed, points = values.mean(0)
        return {
            "faster": f"{math.exp(speed):.2f} ({math.exp(low[0]):.2f} to {math.exp(high[0]):.2f})",
            "points": f"{points:+.2f} ({low[1]:+.2f} to {high[1]:+.2f})",
        }


def best_rates(fits: Sequence[Fit]) -> set[Fit]:
    """Return the fits at the rate at which the MLP does best on 'val', for each data set, width and schedule."""
    scores: dict[Key, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for fit in fits:
        scores[fit.data, fit.hidden, fit.schedule][fit.rate].append(fit.mlp.scores["val"])
    return {
        fit
        for fit in fits
        if fit.rate
        == max(
            scores[fit.data, fit.hidden, fit.schedule].items(),
            key=lambda item: float(np.mean(item[1])),
        )[0]
    }


def describe(comparison: Comparison, rule: Rule, role: str) -> dict[str, object]:
    """Return a row of the table of rules."""
    row: dict[str, object] = {"rule": rule.kind, "checks": rule.series, "settings": rule.settings, "role": role}
    row["choice_points_lost"] = round(comparison.losses[rule], 2)
    for name, data, schedule, own_rate in (
        ("chosen_on", CHOOSING, None, False),
        ("chosen_on_constant", CHOOSING, "constant", False),
        ("chosen_on_onecycle", CHOOSING, "onecycle", False),
        ("chosen_on_best_rate", CHOOSING, None, True),
        *((data, (data,), None, False) for data in HELD_OUT),
    ):
        standing = comparison.standing(rule, data, schedule, own_rate=own_rate)
        row[f"{name}_speed"] = round(standing.speed, 2)
        row[f"{name}_test"] = round(standing.differences["test"], 2)
        row[f"{name}_frozen"] = round(standing.frozen, 2)
    for name, data in (("chosen_on", CHOOSING), ("held_out", HELD_OUT)):
        row |= {f"{name}_{what}_than_default": v for what, v in comparison.difference(rule, DEFAULT, data).items()}
    return row


def table_of_rules(comparison: Comparison, kinds: Mapping[tuple[str, str], Sequence[Rule]]) -> list[dict[str, object]]:
    """Return the default, and the best settings of every kind of rule."""
    rows = [describe(comparison, DEFAULT, "the default")]
    for role, most_loss in (
        ("fastest that loses no more than the default", comparison.losses[DEFAULT]),
        (f"fastest that loses at most {MOST_LOSS:g}", MOST_LOSS),
    ):
        chosen = [rule for rules in kinds.values() if (rule := comparison.best(rules, most_loss)) is not None]
        chosen.sort(key=lambda rule: -comparison.standing(rule, CHOOSING).speed)
        rows += [describe(comparison, rule, role) for rule in chosen]
    return rows


def table_of_moments(comparison: Comparison) -> list[dict[str, object]]:
    """Return, for each data set, schedule and rate, what becomes of the head frozen at some moments."""
    rows = []
    groups: dict[Key, list[Fit]] = defaultdict(list)
    for fit in comparison.fits:
        groups[fit.data, fit.schedule, fit.rate].append(fit)
    for (data, schedule, rate), fits in groups.items():
        moments = {
            "random": [fit.frozen_at(0) for fit in fits],
            "default": [DEFAULT.apply(fit) for fit in fits],
            "hindsight": [hindsight(fit, PRICE) for fit in fits],
            "mlp_best": [
                fit.frozen_at(max(fit.series["epoch"], key=lambda row: row["mlp_val"])["step"]) for fit in fits
            ],
        }
        row: dict[str, object] = {"data": data, "schedule": schedule, "rate": rate, "fits": len(fits)}
        row["mlp_test"] = round(100 * float(np.mean([fit.mlp.scores["test"] for fit in fits])), 2)
        row["mlp_epochs"] = round(float(np.mean([fit.series["epoch"][-1]["epoch"] for fit in fits])), 1)
        for name, outcomes in moments.items():
            standing = stand(fits, outcomes)
            row[f"{name}_speed"] = round(standing.speed, 2)
            row[f"{name}_test"] = round(standing.differences["test"], 2)
            steps = [
                outcome.step / fit.series["epoch"][0]["step"]
                for fit, outcome in zip(fits, outcomes, strict=True)
                if outcome.step is not None
            ]
            row[f"{name}_epochs"] = round(float(np.mean(steps)), 1) if steps else ""
        rows.append(row)
    return rows


def table_of_rates(comparison: Comparison) -> list[dict[str, object]]:
    """Return what becomes of the head frozen at one rate, against the MLP at its own best rate, both constant."""
    rules = [*(Rule("number of epochs", "epoch", f"{epochs}", at=epochs) for epochs in (1, 2, 3, 4, 6)), DEFAULT]
    rows: list[dict[str, object]] = []
    by_key = {fit.key: fit for fit in comparison.fits}
    references = [fit for fit in comparison.fits if fit in comparison.own_rate and fit.schedule == "constant"]
    for rate, rule in itertools.product(("0.0003", "0.001", "0.003"), rules):
        row: dict[str, object] = {"rate": rate, "rule": rule.kind, "settings": rule.settings}
        for name, data in (
            ("chosen_on", CHOOSING),
            ("held_out", HELD_OUT),
            *((one, (one,)) for one in CHOOSING + HELD_OUT),
        ):
            fits = [fit for fit in references if fit.data in data]
            outcomes = [rule.apply(by_key[fit.data, fit.hidden, rate, "constant", fit.seed]) for fit in fits]
            standing = stand(fits, outcomes)
            row[f"{name}_speed"] = round(standing.speed, 2)
            row[f"{name}_test"] = round(standing.differences["test"], 2)
        rows.append(row)
    return rows


def plot(comparison: Comparison, kinds: Mapping[tuple[str, str], Sequence[Rule]], path: Path) -> None:
    """Draw what the moment is worth on each data set, and what the rules make of it."""
    figure, axes = plt.subplots(3, 3, figsize=(12, 9.5), layout="constrained")
    colors = dict(zip(("0.0003", "0.001", "0.003"), ("tab:blue", "tab:orange", "tab:red"), strict=True))
    for axis, data in zip(axes.flat, (*CHOOSING, *HELD_OUT), strict=False):
        for rate, color in colors.items():
            for schedule, style in (("constant", "-"), ("onecycle", ":")):
                fits = [f for f in comparison.fits if (f.data, f.rate, f.schedule) == (data, rate, schedule)]
                steps, gains = mean_curve(fits)
                axis.plot(steps, gains, style, color=color, label=f"{float(rate):g}, {schedule}")
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xscale("symlog", linthresh=25)
        axis.set(title=data, xlim=(0, None), ylim=(-6, 3))
        axis.set_xlabel("steps before the freeze")
    axes[0, 0].set_ylabel("solved, against the finished MLP (points)")
    axes[0, 0].legend(fontsize=7, title="rate, schedule", title_fontsize=7)
    panels = ((CHOOSING, "constant"), (CHOOSING, "onecycle"), (HELD_OUT, None))
    for axis, (data, schedule) in zip(axes[2], panels, strict=True):
        for (kind, series), rules in kinds.items():
            if series != "epoch":
                continue
            chosen = [comparison.best(rules, most_loss) for most_loss in (2.0, 1.0, 0.6, 0.4, 0.3, 0.2, 0.1, 0.0, -0.1)]
            standings = [comparison.standing(rule, data, schedule) for rule in dict.fromkeys(chosen) if rule]
            axis.plot(
                [standing.speed for standing in standings],
                [standing.differences["test"] for standing in standings],
                ".-",
                label=kind,
                linewidth=1,
            )
        shipped = comparison.standing(DEFAULT, data, schedule)
        axis.plot(shipped.speed, shipped.differences["test"], "k*", markersize=10, label="the default")
        axis.axhline(0, color="black", linewidth=0.8)
        name = "chosen on" if data == CHOOSING else "held out"
        axis.set(title=f"{name}, {schedule or 'both schedules'}", ylim=(-2, 1))
        axis.set_xlabel("times sooner than the MLP")
    axes[2, 0].set_ylabel("test, against the finished MLP (points)")
    axes[2, 2].legend(fontsize=6)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def mean_curve(fits: Sequence[Fit]) -> tuple[list[float], list[float]]:
    """Return the steps at which every one of some fits was solved, and the mean gain over the MLP there."""
    gains: dict[float, list[float]] = defaultdict(list)
    for fit in fits:
        for solve in fit.solves:
            gains[solve["step"]].append(100 * (solve["test"] - fit.mlp.scores["test"]))
    steps = sorted(step for step, values in gains.items() if len(values) == len(fits))
    return steps, [float(np.mean(gains[step])) for step in steps]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the recorded and the written CSVs")
    arguments = parser.parse_args()
    rules = candidates()
    comparison = Comparison(read_fits(arguments.results), rules)
    kinds: dict[tuple[str, str], list[Rule]] = defaultdict(list)
    for rule in rules:
        kinds[rule.kind, rule.series].append(rule)

    save_results("freeze_rules", table_of_rules(comparison, kinds), arguments.results)
    save_results("freeze_moments", table_of_moments(comparison), arguments.results)
    save_results("freeze_rates", table_of_rates(comparison), arguments.results)
    plot(comparison, kinds, arguments.results / f"when_to_freeze_{machine()}.png")


if __name__ == "__main__":
    main()
