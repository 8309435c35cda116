"""Seconds to the same regularised training loss: the logistic solver against scikit-learn's LogisticRegression(lbfgs).

Both fit the path activations of an MLP head frozen after three epochs (H = 512, Adam 1e-3, batch 128, float32), from
zero weights, with l2 = 1e-3 on the mean loss, on the same number of threads, until the loss is within 1e-4 of the
minimum: scikit-learn with the smallest ``max_iter`` that gets there, the solver with the smallest ``max_passes``. The
fits are timed in turns; medians are reported. The minimum is found by the solver in float64; for the first seed also by
scikit-learn run to convergence, and the two are to agree to 1e-6.
"""

import argparse
import csv
import os
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from measuring import RESULTS, machine
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, _logistic
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from glai_lightning.heads import freeze_structure, mlp_head
from glai_lightning.solvers import LogisticSolver
from glai_lightning.solvers.report import LinearSolution

DATASETS = ("clinc150_minilm", "cifar10_resnet_features", "fashion_mnist")
L2 = 1e-3
GAP = 1e-4


def path_activations(path: Path, *, seed: int, hidden_features: int, val_fraction: float) -> tuple[Tensor, Tensor]:
    with np.load(path) as arrays:
        inputs = torch.from_numpy(arrays["x_train"].astype(np.float32)).flatten(1)
        targets = torch.from_numpy(arrays["y_train"].astype(np.int64))
    torch.manual_seed(seed)
    kept = torch.randperm(len(inputs))[int(val_fraction * len(inputs)) :]
    inputs, targets = inputs[kept], targets[kept]
    deviation = inputs.std(0)
    inputs = (inputs - inputs.mean(0)) / torch.where(deviation > 1e-6, deviation, 1.0)
    head = mlp_head(inputs.shape[1], hidden_features, int(targets.max()) + 1)
    train(head, inputs, targets, epochs=3)
    with torch.no_grad():
        return freeze_structure(head).path_activations(inputs), targets


def train(head: nn.Module, inputs: Tensor, targets: Tensor, *, epochs: int) -> None:
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(inputs)).split(128):
            optimizer.zero_grad()
            F.cross_entropy(head(inputs[rows]), targets[rows]).backward()
            optimizer.step()


def objective(features: Tensor, targets: Tensor, weight: Tensor, bias: Tensor) -> float:
    logits = F.linear(features.double(), weight.double(), bias.double())
    return float(F.cross_entropy(logits, targets) + 0.5 * L2 * weight.double().square().sum())


def solve(features: Tensor, targets: Tensor, *, max_passes: int, tolerance: float = 0.0) -> LinearSolution:
    classes = int(targets.max()) + 1
    solver = LogisticSolver(l2=L2, max_passes=max_passes, tolerance=tolerance)
    weight, bias = features.new_zeros(classes, features.shape[1]), features.new_zeros(classes)
    return solver.solve_features(features, targets, weight=weight, bias=bias)


def fit_sklearn(features: Tensor, targets: Tensor, *, max_iter: int, tol: float = 1e-12) -> LogisticRegression:
    model = LogisticRegression(C=1.0 / (L2 * len(features)), solver="lbfgs", max_iter=max_iter, tol=tol)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(features.numpy(), targets.numpy())


def sklearn_objective(features: Tensor, targets: Tensor, model: LogisticRegression) -> float:
    weight, bias = torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_)
    return objective(features, targets, weight, bias)


def smallest_max_iter(features: Tensor, targets: Tensor, target: float, *, most: int) -> int:
    """Read off one long run, whose iterates are those of every shorter one, when the target is reached."""
    losses: list[float] = []
    minimize = _logistic.optimize.minimize

    def recorded(*args: Any, **kwargs: Any) -> Any:
        def record(intermediate_result: Any) -> None:
            losses.append(float(intermediate_result.fun))
            if losses[-1] <= target:
                raise StopIteration

        return minimize(*args, **(kwargs | {"callback": record}))

    with mock.patch.object(_logistic.optimize, "minimize", recorded):
        fit_sklearn(features, targets, max_iter=most)
    first = next((index for index, loss in enumerate(losses, start=1) if loss <= target), most)
    # The recorded loss is scikit-learn's own; rounding may put the one that is checked on the other side.
    while (
        first < most and sklearn_objective(features, targets, fit_sklearn(features, targets, max_iter=first)) > target
    ):
        first += 1
    return first


def smallest_max_passes(features: Tensor, targets: Tensor, target: float, *, most: int) -> int:
    def reaches(passes: int) -> bool:
        weight, bias, _ = solve(features, targets, max_passes=passes)
        assert bias is not None
        return objective(features, targets, weight, bias) <= target

    low, high = 2, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(middle) else (middle + 1, high)
    return low


def timed(function: Callable[[], Any]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return time.process_time() - cpu, time.perf_counter() - wall


def compare(dataset: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    features, targets = path_activations(
        Path(arguments.data) / f"{dataset}.npz", seed=seed, hidden_features=512, val_fraction=arguments.val_fraction
    )
    weight, bias, _ = solve(features.double(), targets, max_passes=3000, tolerance=1e-7)
    assert bias is not None
    minimum = objective(features, targets, weight, bias)
    row: dict[str, Any] = {"dataset": dataset, "seed": seed, "samples": len(features), "minimum": minimum}
    if seed == 0:
        converged = fit_sklearn(features.double(), targets, max_iter=20_000, tol=1e-8)
        row["sklearn_minimum_gap"] = sklearn_objective(features, targets, converged) / minimum - 1.0
    target = minimum * (1.0 + GAP)
    passes = smallest_max_passes(features, targets, target, most=400)
    iterations = smallest_max_iter(features, targets, target, most=5000)
    solver_times, sklearn_times = [], []
    for _ in range(arguments.repeats):
        solver_times.append(timed(lambda: solve(features, targets, max_passes=passes)))
        sklearn_times.append(timed(lambda: fit_sklearn(features, targets, max_iter=iterations)))
    for side, count, times in (("solver", passes, solver_times), ("sklearn", iterations, sklearn_times)):
        row[f"{side}_passes" if side == "solver" else "sklearn_max_iter"] = count
        row[f"{side}_cpu_seconds"] = statistics.median(cpu for cpu, _ in times)
        row[f"{side}_seconds"] = statistics.median(wall for _, wall in times)
    row["cpu_ratio"] = row["sklearn_cpu_seconds"] / row["solver_cpu_seconds"]
    row["ratio"] = row["sklearn_seconds"] / row["solver_seconds"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default=os.environ.get("GLAI_DATA"), help="folder of the .npz files (or GLAI_DATA)")
    parser.add_argument("--datasets", nargs="+", default=list(DATASETS), choices=DATASETS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--val-fraction", type=float, default=0.1)
    parser.add_argument("--output", type=Path, default=RESULTS / f"solver_vs_sklearn_{machine()}.csv")
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("name the data folder with --data or in GLAI_DATA")
    torch.set_num_threads(arguments.threads)
    rows = []
    with threadpool_limits(arguments.threads):
        for dataset in arguments.datasets:
            for seed in range(arguments.seeds):
                rows.append(compare(dataset, seed, arguments))
                print({key: round(v, 8) if isinstance(v, float) else v for key, v in rows[-1].items()}, flush=True)
            ratios = [row["cpu_ratio"] for row in rows if row["dataset"] == dataset]
            walls = [row["ratio"] for row in rows if row["dataset"] == dataset]
            print(f"{dataset}: {statistics.median(ratios):.1f}x CPU, {statistics.median(walls):.1f}x wall (medians)")
    with arguments.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), restval="")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
