"""How a cell of a table is written, and how the files of ``results/`` are read."""

import csv
import math
import statistics
from functools import cache
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
Rows = list[dict[str, str]]
Table = list[list[str]]
#: How many times as fast, and the points of difference, seed by seed.
Gain = tuple[float, list[float]]

#: The three supervised sets, by their files.
SETS = {"clinc150_minilm": "clinc150", "cifar10_resnet_features": "cifar10 features", "fashion_mnist": "fashion_mnist"}


@cache
def read(name: str) -> Rows:
    """Return the rows of one file of results."""
    (path,) = RESULTS.glob(f"{name}_[0-9]*.csv")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def mean(rows: Rows, column: str) -> float:
    return statistics.fmean(float(row[column]) for row in rows)


def where(rows: Rows, **values: str) -> Rows:
    return [row for row in rows if all(row[column] == value for column, value in values.items())]


def times(ratio: float) -> str:
    """Write a factor; one below 1 is bold."""
    return f"{nudged(ratio):.2f}" if ratio >= 0.995 else f"**{nudged(ratio):.2f}**"


def nudged(value: float) -> float:
    """Return a value that is rounded away from 0 where it is half of a last digit, whatever its last bits."""
    return value + math.copysign(1e-6, value)


def points(difference: float) -> str:
    """Write a difference of percentages; one below 0 is bold."""
    text = f"{nudged(difference):+.2f}".replace("-0.00", "+0.00")
    return f"**{text}**" if text[0] == "-" else text


def with_interval(differences: list[float]) -> str:
    """Write the mean of paired differences of five seeds, with its Student-t interval."""
    half = half_width(differences)
    middle = statistics.fmean(differences)
    return f"{points(middle)} ({middle - half:+.2f} to {middle + half:+.2f})"


def half_width(values: list[float]) -> float:
    """Return half of the 95 % interval of the mean of five values, by Student's t of four degrees of freedom."""
    assert len(values) == 5, len(values)
    return 2.7764 * statistics.stdev(values) / math.sqrt(5)


def paired(side: Rows, other: Rows, column: str) -> list[tuple[float, float]]:
    """Return the values of both sides in one column, seed by seed."""
    return [(float(row[column]), float(where(other, seed=row["seed"])[0][column])) for row in side]


def gain(side: Rows, other: Rows, seconds: str = "finished_cpu_seconds", score: str = "test_score") -> Gain:
    """Return how many times as fast a side is as the other, and its points against it, from these columns."""
    ratio = statistics.geometric_mean(of_other / own for own, of_other in paired(side, other, seconds))
    return ratio, [100 * (own - of_other) for own, of_other in paired(side, other, score)]


def mean_gain(gains: list[Gain]) -> tuple[str, str]:
    """Write the mean over several sets: times as fast, and points."""
    ratio = statistics.geometric_mean(ratio for ratio, _ in gains)
    return times(ratio), points(statistics.fmean(statistics.fmean(by_seed) for _, by_seed in gains))


def as_markdown(table: Table) -> str:
    """Write a table as Markdown."""
    header, *rows = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join([header, "|" + "---|" * len(table[0]), *rows])
