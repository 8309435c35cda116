"""Draws the picture of README from what ``when_to_freeze.py`` measured: churn over epochs, accuracy over seconds.

One seed, H = 512, AdamW at a constant 1e-3, batches of 128. Each ring is a copy of the head that was frozen after that
epoch and solved; the filled one is the epoch at which the default rule of churn freezes. The solver was that of the
measurement, see ``benchmarks/README.md``.

    python benchmarks/draw_picture.py
"""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from measuring import RESULTS

from glai_lightning import structure_settled

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

PICTURE = Path(__file__).parent.parent / "docs" / "churn_and_accuracy.png"
NAMES = {
    "clinc150_minilm": "CLINC150",
    "cifar10_resnet_features": "CIFAR-10 features",
    "fashion_mnist": "Fashion-MNIST",
    "omniglot_small": "Omniglot",
}
#: The first is one of the sets on which the rule loses, the second took no part in choosing it.
SHOWN = ("clinc150_minilm", "fashion_mnist")
FIT = {"hidden": "512", "rate": "0.001", "schedule": "constant", "seed": "0"}
EPOCHS = 9
TOLERANCE = 0.10


def rows_of(kind: str, data: str, results: Path) -> list[dict[str, str]]:
    """Return what was measured at the ends of epochs in the fit that is drawn."""
    (path,) = results.glob(f"when_to_freeze_{kind}_*.csv")
    wanted = {**FIT, "data": data, **({"series": "epoch"} if kind == "checks" else {})}
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if all(row[name] == value for name, value in wanted.items())]


def freeze_epoch(churn: Sequence[float]) -> int | None:
    """Return the number of epochs after which the default rule of churn freezes."""
    return next((n for n in range(1, len(churn) + 1) if structure_settled(churn[:n])), None)


def draw_churn(axes: Axes, results: Path) -> None:
    """Draw churn after each epoch."""
    for data, name in NAMES.items():
        churn = [float(row["churn"]) for row in rows_of("checks", data, results)]
        axes.plot(range(1, len(churn[:EPOCHS]) + 1), churn[:EPOCHS], marker=".", label=name)
    axes.axhline(TOLERANCE, color="grey", linestyle=":", linewidth=1, label="threshold")
    axes.set(yscale="log", xlabel="epoch", title="Churn: bits of the patterns that flipped")
    axes.legend(frameon=False, fontsize=8)


def draw_accuracy(axes: Axes, data: str, results: Path) -> None:
    """Draw the test accuracy of the MLP, and of the solved heads, over CPU seconds."""
    checks = rows_of("checks", data, results)
    ends = {row["step"]: row for row in checks}
    seconds = [float(row["train_cpu"]) + float(row["val_cpu"]) for row in checks]
    axes.plot(seconds, [100 * float(row["mlp_test"]) for row in checks], color="C0", marker=".", label="the MLP")
    solved = [row for row in rows_of("solves", data, results) if row["step"] in ends]
    x = [float(row["solve_cpu"]) + seconds[checks.index(ends[row["step"]])] for row in solved]
    y = [100 * float(row["test"]) for row in solved]
    axes.plot(x, y, "o", color="C1", markerfacecolor="none", label="frozen after 1, 2, ... epochs, solved")
    epoch = freeze_epoch([float(row["churn"]) for row in checks])
    for row, *point in zip(solved, x, y, strict=True):
        if int(row["epoch"]) == epoch:
            axes.plot(*point, "o", color="C1", label=f"where the rule freezes (epoch {epoch})")
    axes.set(xlabel="CPU seconds", title=f"{NAMES[data]}: test accuracy, %")
    axes.legend(frameon=False, fontsize=8, loc="lower right")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    parser.add_argument("--to", type=Path, default=PICTURE)
    arguments = parser.parse_args()
    plt.rcParams.update({"font.size": 9, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, (churn, *accuracies) = plt.subplots(1, 1 + len(SHOWN), figsize=(9.4, 2.9), layout="constrained")
    draw_churn(churn, arguments.results)
    for axes, data in zip(accuracies, SHOWN, strict=True):
        draw_accuracy(axes, data, arguments.results)
    figure.savefig(arguments.to, dpi=80, pil_kwargs={"optimize": True})
    print(f"Written to {arguments.to}")


if __name__ == "__main__":
    main()
