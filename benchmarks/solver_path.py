"""What a path of strengths costs and is worth: against the single best strength, and LogisticRegressionCV.

All fit the path activations of an MLP head frozen after one epoch (H = 512, Adam 1e-3, batch 128, float32), start from
the head as it is, and choose by the same validation rows. The single strength is the one that the path chose; the
solver is then told of it beforehand, with everything else at its defaults. scikit-learn's LogisticRegressionCV (lbfgs,
warm starts along the path, one split, no refit) gets the strengths that the path tried, and the same rows. Everything
runs in turns on one thread; medians of CPU seconds are reported, and accuracies on test rows that nothing was chosen
by. Features are standardised.

The defaults were chosen on these sets and others, by validation, but not on fashion_mnist and omniglot ('held out').
"""

import argparse
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from measuring import RESULTS, interleave, median_cpu, median_ratio, save_results, use_one_thread
from sklearn.datasets import make_classification
from sklearn.linear_model import LogisticRegressionCV
from sklearn.model_selection import PredefinedSplit
from torch import Tensor

from glai_lightning import freeze_structure, mlp_head
from glai_lightning.solvers import LogisticSolver
from glai_lightning.solvers.report import LinearSolution

Rows = tuple[Tensor, Tensor]
GENERATED = {
    "generated_2": {"n_samples": 10_000, "n_features": 20, "n_informative": 10, "n_classes": 2, "flip_y": 0.1},
    "generated_7": {"n_samples": 40_000, "n_features": 50, "n_informative": 30, "n_redundant": 10, "n_classes": 7},
    "generated_77": {"n_samples": 16_000, "n_features": 60, "n_informative": 40, "n_classes": 77},
}
CLUSTERS = {"generated_2": 3, "generated_7": 4, "generated_77": 1}
FILES = {
    "cifar10_resnet_features": 10,
    "letter": 26,
    "clinc150_minilm": 150,
}
HELD_OUT = ("fashion_mnist", "omniglot")


def rows_of(name: str, folder: Path) -> tuple[Rows, Rows]:
    """Return training and test rows of a set."""
    if name in GENERATED:
        arrays = make_classification(**GENERATED[name], n_clusters_per_class=CLUSTERS[name], random_state=0)
    elif name == "omniglot":
        with np.load(folder / "omniglot_small.npz") as file:
            images = F.avg_pool2d(torch.from_numpy(file["x"].astype(np.float32)).unsqueeze(1), 2)
            arrays = images.flatten(1).numpy(), file["y"]
    else:
        with np.load(folder / f"{name}.npz") as file:
            training, test = ((file[f"x_{part}"], file[f"y_{part}"]) for part in ("train", "test"))
        return tensors(*training), tensors(*test)
    x, y = tensors(*arrays)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    test, training = order[: len(x) // 5], order[len(x) // 5 :]
    return (x[training], y[training]), (x[test], y[test])


def tensors(x: np.ndarray, y: np.ndarray) -> Rows:
    """Return rows (N, D) and labels (N,)."""
    return torch.from_numpy(x.astype(np.float32)).flatten(1), torch.from_numpy(y.astype(np.int64))


class Activations:
    """Path activations of training, validation and test rows, and the last layer of the head that made them."""

    def __init__(self, name: str, folder: Path, seed: int) -> None:
        (x, y), (x_test, y_test) = rows_of(name, folder)
        torch.manual_seed(seed)
        order = torch.randperm(len(x))
        kept, validation = order[len(x) // 10 :], order[: len(x) // 10]
        mean, deviation = x[kept].mean(0), x[kept].std(0)
        deviation = torch.where(deviation > 1e-6, deviation, 1.0)
        parts = [((part - mean) / deviation) for part in (x[kept], x[validation], x_test)]
        head = mlp_head(x.shape[1], 512, int(y.max()) + 1)
        optimizer = torch.optim.Adam(head.parameters(), lr=1e-3)
        for rows in torch.randperm(len(kept)).split(128):
            optimizer.zero_grad()
            F.cross_entropy(head(parts[0][rows]), y[kept][rows]).backward()
            optimizer.step()
        frozen = freeze_structure(head)
        with torch.no_grad():
            activations = [frozen.path_activations(part) for part in parts]
        self.training, self.validation, self.test = zip(activations, (y[kept], y[validation], y_test), strict=True)
        self.weight, self.bias = frozen[-1].weight.detach().clone(), frozen[-1].bias.detach().clone()

    def solve(self, solver: LogisticSolver) -> LinearSolution:
        """Solve from the head as it is."""
        return solver.solve_features(*self.training, weight=self.weight, bias=self.bias, validation=self.validation)

    def accuracy(self, weight: Tensor, bias: Tensor | None) -> float:
        """Return the accuracy on test rows, in per cent."""
        return 100.0 * float((F.linear(self.test[0], weight, bias).argmax(1) == self.test[1]).double().mean())

    def fit_sklearn(self, strengths: list[float]) -> LogisticRegressionCV:
        """Fit scikit-learn's path over the same strengths, with the same validation rows."""
        x, y = (torch.cat(pair).numpy() for pair in zip(self.training, self.validation, strict=True))
        fold = np.repeat([-1, 0], [len(self.training[1]), len(self.validation[1])])
        inverse = [1.0 / (l2 * len(self.training[1])) for l2 in strengths]
        model = LogisticRegressionCV(
            Cs=inverse, cv=PredefinedSplit(fold), refit=False, scoring="accuracy", use_legacy_attributes=False
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return model.fit(x, y)


def measure(name: str, folder: Path, seed: int, repeats: int, with_sklearn: bool) -> dict[str, object]:
    """Measure one set with one seed."""
    data = Activations(name, folder, seed)
    path = data.solve(LogisticSolver())
    strengths = [float(l2) for l2, _ in path.report.tried]
    single = LogisticSolver(l2=path.report.l2)
    work: dict[str, Callable[[], object]] = {
        "path": lambda: data.solve(LogisticSolver()),
        "single": lambda: data.solve(single),
    }
    times = interleave(work, repeats, warmups=1)
    alone = data.solve(single)
    row: dict[str, object] = {
        "set": name,
        "held_out": name in HELD_OUT,
        "seed": seed,
        "samples": len(data.training[0]),
        "classes": len(data.weight),
        "strengths_tried": len(strengths),
        "passes": path.report.passes,
        "single_passes": alone.report.passes,
        "cpu_seconds": round(median_cpu(times["path"]), 4),
        "single_cpu_seconds": round(median_cpu(times["single"]), 4),
        "path_over_single": round(median_ratio(times["path"], times["single"]), 2),
        "head_accuracy": round(data.accuracy(data.weight, data.bias), 2),
        "accuracy": round(data.accuracy(path.weight, path.bias), 2),
        "single_accuracy": round(data.accuracy(alone.weight, alone.bias), 2),
        "sklearn_cpu_seconds": "",
        "sklearn_over_path": "",
        "sklearn_accuracy": "",
    }
    if with_sklearn:
        models: list[LogisticRegressionCV] = []
        taken = interleave({"sklearn": lambda: models.append(data.fit_sklearn(strengths))}, 1, warmups=0)
        weight, bias = (torch.from_numpy(np.asarray(part)).float() for part in (models[0].coef_, models[0].intercept_))
        if len(weight) == 1:
            weight, bias = torch.cat([-weight, weight]), torch.cat([-bias, bias])
        row["sklearn_cpu_seconds"] = round(median_cpu(taken["sklearn"]), 3)
        row["sklearn_over_path"] = round(median_cpu(taken["sklearn"]) / median_cpu(times["path"]), 1)
        row["sklearn_accuracy"] = round(data.accuracy(weight, bias), 2)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("GLAI_DATA"), help="folder of the .npz files")
    parser.add_argument("--sets", nargs="+", default=[*GENERATED, *FILES, *HELD_OUT])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sklearn-seeds", type=int, default=1, help="seeds that scikit-learn is run with, too")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV")
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("name the data folder with --data or in GLAI_DATA")
    use_one_thread()
    rows = []
    for name in arguments.sets:
        for seed in range(arguments.seeds):
            rows.append(measure(name, arguments.data, seed, arguments.repeats, seed < arguments.sklearn_seeds))
            print(rows[-1], flush=True)
    save_results("solver_path", rows, arguments.results)


if __name__ == "__main__":
    main()
