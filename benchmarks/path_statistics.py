"""Worked examples of statistics that add up: portions, sites, a forgotten class, and what the features are worth.

Classes come in steps, and the test rows of all classes seen so far are classified after each. The structure of 512
units is trained by one epoch of Adam (rate 1e-3, batches of 128): on the first step's rows alone, or on all rows, and
frozen. Random features are relu(x W) with W normal, RanPAC's way (McDonnell et al. 2023). Penalties are chosen by
statistics of validation rows of the classes seen so far. Beside them: an MLP of 512 units that is trained anew on all
rows so far (``--epochs`` of Adam under a one-cycle schedule to 3e-3), and one that goes on with Adam on the new rows
alone. Inputs are standardised. One thread, CPU seconds.
"""

import argparse
import copy
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from measuring import RESULTS, interleave, measure, median_cpu, save_results, use_one_thread
from torch import Tensor, nn

from glai_lightning import freeze_structure, mlp_head
from glai_lightning.solvers import LogisticSolver, PathStatistics, set_last_layer

Rows = tuple[Tensor, Tensor]
Data = tuple[Rows, Rows, Rows]
Model = tuple[Tensor, Tensor, object]
Row = dict[str, object]
STEPS = {"clinc150_minilm": 10, "cifar10_resnet_features": 5}
#: Random features beyond which the eigendecomposition takes too long: one penalty, that of fewer features.
MOST_DECOMPOSED = 4096
#: Features up to which there is a solve after every step.
EVERY_STEP = 1024


def read(path: Path) -> Data:
    """Return standardised training, validation and test rows."""
    with np.load(path) as file:
        (x, y), test = (
            (torch.from_numpy(file[f"x_{part}"]).float(), torch.from_numpy(file[f"y_{part}"]).long())
            for part in ("train", "test")
        )
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    kept, held_out = order[len(x) // 10 :], order[: len(x) // 10]
    mean, deviation = x[kept].mean(0), x[kept].std(0).clamp(min=1e-6)
    scaled = [((rows - mean) / deviation, labels) for rows, labels in ((x[kept], y[kept]), (x[held_out], y[held_out]))]
    return scaled[0], scaled[1], ((test[0] - mean) / deviation, test[1])


def of_classes(rows: Rows, classes: Tensor) -> Rows:
    """Return the rows of some classes."""
    chosen = torch.isin(rows[1], classes)
    return rows[0][chosen], rows[1][chosen]


def train(head: nn.Module, rows: Rows, epochs: int, *, one_cycle: bool = False) -> nn.Module:
    """Train a head with Adam."""
    batches = -(-len(rows[0]) // 128)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, epochs * batches) if one_cycle else None
    for _ in range(epochs):
        for chosen in torch.randperm(len(rows[0])).split(128):
            optimizer.zero_grad()
            F.cross_entropy(head(rows[0][chosen]), rows[1][chosen]).backward()
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
    return head


class Features:
    """A feature map, and the features of the test rows.

    Args:
        feature_map: a frozen head, or a module that returns features.
        test: rows of all classes.
    """

    def __init__(self, feature_map: nn.Module, test: Rows) -> None:
        self.feature_map = feature_map
        computed = getattr(feature_map, "path_activations", feature_map)
        with torch.no_grad():
            self.of_test = torch.cat([computed(part) for part in test[0].split(2048)])
        self.labels = test[1]
        self.num_classes = int(test[1].max()) + 1

    def statistics(self, *rows: Rows) -> PathStatistics:
        """Return the statistics of some rows."""
        statistics = PathStatistics(self.feature_map, range(self.num_classes))
        for part in rows:
            statistics.update(*part)
        return statistics

    def accuracy(self, model: Model, classes: Tensor | None = None) -> float:
        """Return the accuracy on test rows of some classes, in per cent."""
        chosen = torch.ones_like(self.labels, dtype=torch.bool) if classes is None else torch.isin(self.labels, classes)
        logits = F.linear(self.of_test[chosen].double(), model[0], model[1])
        return 100.0 * float((logits.argmax(1) == self.labels[chosen]).double().mean())


def solve(statistics: PathStatistics, validation: PathStatistics, relative: float | None) -> Model:
    """Return weight, bias, and the penalty relative to the mean variance of the features.

    A given penalty is solved for by Cholesky: the eigendecomposition of 10,000 features would take minutes.
    """
    if relative is None:
        solution = statistics.solve(validation=validation)
        spread = float(statistics.covariances().features.diagonal().mean())
        return solution.weight, solution.bias, solution.report.l2 / spread
    covariances = statistics.covariances()
    covariances.features.diagonal().add_(relative * float(covariances.features.diagonal().mean()))
    weight = torch.cholesky_solve(covariances.cross, torch.linalg.cholesky(covariances.features)).t()
    return weight, covariances.targets_mean - weight @ covariances.features_mean, relative


def in_steps(features: Features, data: Data, steps: list[Tensor], relative: float | None) -> tuple[Row, float]:
    """Add the classes step by step, and compare with a solve of all rows at once, where that takes no minutes."""
    statistics, validation = features.statistics(), features.statistics()
    few = features.of_test.shape[1] <= EVERY_STEP
    accuracies, seconds, model = [], 0.0, None
    for step, classes in enumerate(steps):
        validation.update(*of_classes(data[1], classes))
        portion = of_classes(data[0], classes)
        seconds = measure(lambda portion=portion: statistics.update(*portion)).cpu
        if few or step == len(steps) - 1:
            solved: list[Model] = []
            seconds += measure(lambda to=solved: to.append(solve(statistics, validation, relative))).cpu
            model = solved[0]
            accuracies.append(features.accuracy(model, torch.cat(steps[: step + 1])))
    assert model is not None
    row: Row = {"accuracy": round(accuracies[-1], 2), "bytes": statistics.nbytes, "cpu_seconds": round(seconds, 3)}
    if few:
        row["mean_over_steps"] = round(float(np.mean(accuracies)), 2)
    if relative is None:
        row["joint_accuracy"] = round(features.accuracy(solve(features.statistics(data[0]), validation, None)), 2)
    return row, model[2]


def by_gradients(data: Data, steps: list[Tensor], hidden: int, epochs: int) -> dict[str, Row]:
    """Train an MLP on the new rows of step after step, and one anew on all rows at the end."""
    torch.manual_seed(0)
    going_on = mlp_head(data[0][0].shape[1], hidden, int(data[2][1].max()) + 1)
    anew = copy.deepcopy(going_on)
    seconds = 0.0
    for classes in steps:
        portion = of_classes(data[0], classes)
        seconds = measure(lambda portion=portion: train(going_on, portion, epochs)).cpu
    results = {}
    of_anew = measure(lambda: train(anew, data[0], epochs, one_cycle=True)).cpu
    for name, head, cpu in (("Adam on the new rows", going_on, seconds), ("MLP trained anew", anew, of_anew)):
        with torch.no_grad():
            right = 100.0 * float((head(data[2][0]).argmax(1) == data[2][1]).double().mean())
        results[name] = {"accuracy": round(right, 2), "cpu_seconds": round(cpu, 3)}
    return results


def over_sites(features: Features, data: Data, count: int = 8, alpha: float = 0.1) -> Row:
    """Share the rows out among sites, Dirichlet over classes, merge their statistics, and compare with all rows."""
    generator = np.random.default_rng(0)
    shares = generator.dirichlet([alpha] * count, features.num_classes)
    site = torch.tensor([generator.choice(count, p=shares[label]) for label in data[0][1].tolist()])
    present = [number for number in range(count) if bool((site == number).any())]
    parts = [features.statistics((data[0][0][site == number], data[0][1][site == number])) for number in present]
    merged, whole = sum(parts[1:], parts[0]), features.statistics(data[0])
    l2 = merged.solve(validation=features.statistics(data[1])).report.l2
    models = [statistics.solve(l2) for statistics in (merged, whole, *parts)]
    return {
        "accuracy": round(features.accuracy(models[0]), 2),
        "joint_accuracy": round(features.accuracy(models[1]), 2),
        "each_alone": round(float(np.mean([features.accuracy(model) for model in models[2:]])), 2),
        "relative_difference": f"{apart(models[0], models[1]):.0e}",
    }


def without_a_class(features: Features, data: Data) -> Row:
    """Forget a class, and compare with a solve that never saw it."""
    gone = data[0][1] == 0
    statistics = features.statistics(data[0])
    seconds = measure(lambda: statistics.forget(data[0][0][gone], data[0][1][gone])).cpu
    never = features.statistics((data[0][0][~gone], data[0][1][~gone]))
    models = [one.solve(never.solve(validation=never).report.l2) for one in (statistics, never)]
    return {
        "accuracy": round(features.accuracy(models[0], torch.arange(1, features.num_classes)), 2),
        "joint_accuracy": round(features.accuracy(models[1], torch.arange(1, features.num_classes)), 2),
        "relative_difference": f"{apart(*models):.0e}",
        "cpu_seconds": round(seconds, 3),
    }


def with_cross_entropy(features: Features, data: Data) -> list[Row]:
    """Solve from statistics, and go on from there by cross-entropy, which needs the rows."""
    set_last_layer(features.feature_map, features.statistics(data[0]).solve(validation=features.statistics(data[1])))
    rows: list[Row] = []
    for name, work in (
        ("ridge", lambda: None),
        (
            "ridge, then cross-entropy",
            lambda: LogisticSolver().solve(features.feature_map, *data[0], validation=data[1]),
        ),
    ):
        seconds = measure(work).cpu
        with torch.no_grad():
            right = 100.0 * float((features.feature_map(data[2][0]).argmax(1) == data[2][1]).double().mean())
        rows.append(
            {"example": "finish", "features": name, "accuracy": round(right, 2), "cpu_seconds": round(seconds, 3)}
        )
    return rows


class OnTop(nn.Module):
    """Features on top of those of a frozen head: random ones (RanPAC's way), or the inputs beside them.

    Args:
        head: a frozen head.
        random: number of random features; 0 for the inputs.
    """

    def __init__(self, head: nn.Module, random: int) -> None:
        super().__init__()
        # Without anything to train it is features, and not taken for a head.
        self.head = copy.deepcopy(head).requires_grad_(False)
        self.register_buffer("weight", torch.randn(head[-1].in_features, random))

    def forward(self, inputs: Tensor) -> Tensor:
        features = self.head.path_activations(inputs)
        return (features @ self.weight).relu() if self.weight.shape[1] else torch.cat([features, inputs], 1)


def of_structures(data: Data, hidden: int, epochs: int, random: int) -> list[Row]:
    """Look for what a trained structure lacks beside many random features: training, scale, width, or the inputs."""
    num_classes, width = int(data[2][1].max()) + 1, data[0][0].shape[1]
    rows: list[Row] = []

    def solved(name: str, features: Features, **options: object) -> None:
        solution = features.statistics(data[0]).solve(validation=features.statistics(data[1]), **options)
        row = {"accuracy": round(features.accuracy((solution.weight, solution.bias, 0.0)), 2)}
        rows.append({"example": "structure", "features": name} | row)

    for length in (1, epochs):
        torch.manual_seed(0)
        head = freeze_structure(train(mlp_head(width, hidden, num_classes), data[0], length))
        features, name = Features(head, data[2]), f"{hidden}, {length} epochs"
        spread = float(features.statistics(data[0]).covariances().features.diagonal().mean())
        solved(name, features)
        solved(f"{name}, 41 penalties", features, l2=[spread * 10.0 ** (n / 4 - 8) for n in range(41)])
        solved(f"{name}, balanced", features, class_weights="balanced")
        solved(f"{name}, lda", features, head="lda")
        solved(f"{name}, and the inputs", Features(OnTop(head, 0), data[2]))
        if random:
            solved(f"{random} random on {name}", Features(OnTop(head, random), data[2]))
    return rows


def apart(found: Model, expected: Model) -> float:
    """Return how far weights are from others, relative to their norm."""
    return float((found[0] - expected[0]).norm() / expected[0].norm())


def speeds(sizes: tuple[int, ...] = (512, 2048), rows: int = 4096) -> list[Row]:
    """Measure the rate of updates against that of a float64 matrix product, and what 100 penalties cost."""
    results: list[Row] = []
    for size, dtype in ((size, dtype) for size in sizes for dtype in (torch.float32, torch.float64)):
        x, y = torch.randn(rows, size, dtype=dtype), torch.arange(rows) % 10
        wide, statistics = x.double(), PathStatistics(nn.Identity(), range(10)).update(x, y)
        work = {
            "product": lambda wide=wide: wide.t() @ wide,
            "update": lambda x=x, y=y, to=statistics: to.update(x, y),
        }
        if size <= EVERY_STEP:
            work["one"] = lambda of=statistics: of.solve(0.1, of)
            work["hundred"] = lambda of=statistics: of.solve([0.01 * n for n in range(1, 101)], of)
        seconds = {name: median_cpu(taken) for name, taken in interleave(work, repeats=5, warmups=1).items()}
        row: Row = {"example": "speed", "features": f"{size}, {str(dtype).removeprefix('torch.')}"}
        row["update_rate"] = round(seconds["product"] / seconds["update"], 2)
        if "one" in seconds:
            row["hundred_strengths"] = round(seconds["hundred"] / seconds["one"], 2)
        results.append(row)
    return results


def run(data: Data, num_steps: int, hidden: int, random: list[int], epochs: int) -> list[Row]:
    """Run all examples on one data set."""
    num_classes, width = int(data[2][1].max()) + 1, data[0][0].shape[1]
    steps = list(torch.randperm(num_classes, generator=torch.Generator().manual_seed(0)).tensor_split(num_steps))
    rows: list[Row] = []
    first = None
    for name, trained_on in (("first step", of_classes(data[0], steps[0])), ("all rows", data[0])):
        torch.manual_seed(0)
        features = Features(freeze_structure(train(mlp_head(width, hidden, num_classes), trained_on, 1)), data[2])
        first = first or features
        rows.append(
            {"example": "steps", "features": f"{hidden}, trained on {name}"} | in_steps(features, data, steps, None)[0]
        )
    relative = None
    for size in random:
        torch.manual_seed(0)
        linear = nn.Linear(width, size, bias=False)
        nn.init.normal_(linear.weight)
        features = Features(nn.Sequential(linear, nn.ReLU()), data[2])
        found, chosen = in_steps(features, data, steps, relative if size > MOST_DECOMPOSED else None)
        relative = chosen
        rows.append({"example": "steps", "features": f"{size}, random"} | found)
    for name, found in by_gradients(data, steps, hidden, epochs).items():
        rows.append({"example": "steps", "features": name} | found)
    assert first is not None
    rows.append({"example": "sites", "features": f"{hidden}, trained on first step"} | over_sites(first, data))
    rows.append({"example": "forgotten", "features": f"{hidden}, trained on first step"} | without_a_class(first, data))
    rows += with_cross_entropy(first, data)
    return rows + of_structures(
        data, hidden, epochs, max([size for size in random if size <= MOST_DECOMPOSED], default=0)
    )


COLUMNS = ("data", "example", "features", "accuracy", "joint_accuracy", "mean_over_steps", "each_alone", "bytes")
COLUMNS += ("cpu_seconds", "relative_difference", "update_rate", "hundred_strengths")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("GLAI_DATA"), help="folder of the .npz files")
    parser.add_argument("--sets", nargs="+", default=list(STEPS))
    parser.add_argument("--hidden", type=int, default=512, help="units of the trained structure")
    parser.add_argument("--random", type=int, nargs="*", default=[512, 2048, 10_000], help="numbers of random features")
    parser.add_argument("--epochs", type=int, default=10, help="of the MLPs beside them")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV")
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("name the data folder with --data or in GLAI_DATA")
    use_one_thread()
    rows = [{"data": "normal"} | row for row in speeds()]
    for name in arguments.sets:
        data = read(arguments.data / f"{name}.npz")
        found = run(data, STEPS[name], arguments.hidden, arguments.random, arguments.epochs)
        rows += [{"data": name} | row for row in found]
        print(name, "done", flush=True)
    save_results("path_statistics", [{name: row.get(name, "") for name in COLUMNS} for row in rows], arguments.results)


if __name__ == "__main__":
    main()
