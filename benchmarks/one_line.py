"""The bare line on supervised sets: ``StructureFreezeCallback("head")`` against early stopping, in ``Trainer.fit``.

All sides have the same module, data, batches, seeds and optimizer (AdamW, rate 1e-3, batch size 128, 512 hidden
units). The MLP trains under early stopping (validation accuracy, patience 3), and its best epoch is kept. Another side
gets the bare callback, with its defaults, and the third ``one_pass=True`` as well. Time is CPU seconds of the whole
fit, validation included. The sets are those of a folder (``--data``), and sets that scikit-learn makes or ships.

    python benchmarks/one_line.py --data DATA --seeds 5
"""

import argparse
import csv
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from measuring import RESULTS, machine
from scipy import stats
from sklearn import datasets
from torch.optim import AdamW

from glai_lightning import SupervisedModule, mlp_head
from glai_lightning.callbacks import StructureFreezeCallback
from glai_lightning.comparison.heads import head_in_place
from glai_lightning.datamodules import FeaturesDataModule

HIDDEN, MAX_EPOCHS = 512, 60
Arrays = dict[str, np.ndarray]


def split(x: np.ndarray, y: np.ndarray) -> Arrays:
    """Return a fifth of the rows as the test split, chosen at random once and for all."""
    order = np.random.RandomState(0).permutation(len(x))
    train, test = np.split(order, [len(x) * 4 // 5])
    x, y = x.astype(np.float32), y.astype(np.int64)
    return {"x_train": x[train], "y_train": y[train], "x_test": x[test], "y_test": y[test]}


def stored(path: Path) -> Arrays:
    """Return the arrays of a file, images as rows."""
    with np.load(path) as file:
        arrays = {key: file[key] for key in ("x_train", "y_train", "x_test", "y_test")}
    rows = {key: arrays[key].reshape(len(arrays[key]), -1).astype(np.float32) for key in ("x_train", "x_test")}
    return {**arrays, **rows}


def hastie() -> tuple[np.ndarray, np.ndarray]:
    """Return the two classes of Hastie et al. 2009, example 10.2."""
    x, y = datasets.make_hastie_10_2(12_000, random_state=4)
    return x, y > 0


def teacher() -> tuple[np.ndarray, np.ndarray]:
    """Return the six classes of a random network of 24 units, with noise."""
    random = np.random.RandomState(5)
    x, hidden, last = random.randn(20_000, 30), random.randn(30, 24) / np.sqrt(30), random.randn(24, 6)
    logits = np.maximum(x @ hidden, 0) @ last
    logits = (logits - logits.mean(0)) / logits.std(0)
    return x, (logits + 0.3 * random.randn(*logits.shape)).argmax(1)


def by_quantile(x: np.ndarray, y: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return classes of equal size in place of numbers."""
    return x, np.searchsorted(np.quantile(y, np.linspace(0, 1, classes + 1)[1:-1]), y)


def parity() -> tuple[np.ndarray, np.ndarray]:
    """Return the parity of the signs of three of twelve columns, one label in twenty turned around."""
    random = np.random.RandomState(6)
    x = random.randn(16_000, 12)
    y = (x[:, :3] > 0).sum(1) % 2
    return x, np.where(random.rand(len(y)) < 0.05, 1 - y, y)


def swiss_roll() -> tuple[np.ndarray, np.ndarray]:
    """Return eight stretches of a Swiss roll, with nine columns of noise."""
    x, along = datasets.make_swiss_roll(16_000, noise=0.8, random_state=7)
    return by_quantile(np.hstack([x, np.random.RandomState(7).randn(len(x), 9)]), along, 8)


MADE: dict[str, Callable[[], tuple[np.ndarray, np.ndarray]]] = {
    "clusters of 7 classes": lambda: datasets.make_classification(
        40_000, 50, n_informative=30, n_redundant=10, n_classes=7, n_clusters_per_class=4, random_state=0
    ),
    "clusters of 2 classes": lambda: datasets.make_classification(
        20_000, 20, n_informative=10, n_classes=2, n_clusters_per_class=8, flip_y=0.05, random_state=1
    ),
    "clusters of 20 classes": lambda: datasets.make_classification(
        15_000, 40, n_informative=20, n_classes=20, n_clusters_per_class=2, random_state=2
    ),
    "shells of 5 classes": lambda: datasets.make_gaussian_quantiles(
        n_samples=15_000, n_features=10, n_classes=5, random_state=3
    ),
    "hastie": hastie,
    "digits": lambda: datasets.load_digits(return_X_y=True),
    "network of 24 units": teacher,
    "friedman": lambda: by_quantile(*datasets.make_friedman1(15_000, 12, noise=1.0, random_state=8), 6),
    "parity of 3 columns": parity,
    "swiss roll": swiss_roll,
}
#: No rule was chosen on these.
HELD_OUT = ("parity of 3 columns", "swiss roll")
STORED = ("clinc150_minilm", "cifar10_resnet_features", "fashion_mnist", "letter")


def makers_of(data: Path | None) -> dict[str, Callable[[], Arrays]]:
    """Return what makes each set, those of a folder included if there is one."""
    makers: dict[str, Callable[[], Arrays]] = {name: lambda make=make: split(*make()) for name, make in MADE.items()}
    if data is not None:
        makers |= {name: lambda name=name: stored(data / f"{name}.npz") for name in STORED}
    return makers


#: Arguments of the callback on each side; ``None`` for early stopping in its place.
SIDES: dict[str, dict[str, Any] | None] = {
    "early stopping": None,
    "freeze and solve": {},
    "in one pass": {"one_pass": True},
}


def fit(
    arrays: Arrays, seed: int, arguments: dict[str, Any] | None, *, rate: float = 1e-3, head: str = "mlp"
) -> dict[str, float | int]:
    """Fit with the callback and its arguments, or early stopping, and return the test accuracy and what it took."""
    seed_everything(seed, verbose=False)
    data: LightningDataModule = FeaturesDataModule(arrays=arrays, batch_size=128, seed=seed, standardise=True)
    data.setup("fit")
    classes = int(arrays["y_train"].max()) + 1
    mlp = mlp_head(arrays["x_train"].shape[1], HIDDEN, classes)
    module = SupervisedModule(mlp if head == "mlp" else head_in_place(mlp, head), optimizer=partial(AdamW, lr=rate))
    with tempfile.TemporaryDirectory() as folder:
        best = ModelCheckpoint(folder, monitor="val/accuracy", mode="max")
        freeze = StructureFreezeCallback("head", verbose=False, **(arguments or {}))
        stop = EarlyStopping("val/accuracy", mode="max", patience=3)
        trainer = Trainer(
            max_epochs=MAX_EPOCHS,
            callbacks=[best, stop if arguments is None else freeze],
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        began, began_cpu = time.perf_counter(), time.process_time()
        trainer.fit(module, datamodule=data)
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - began_cpu
        (scores,) = trainer.test(module, datamodule=data, ckpt_path=best.best_model_path, verbose=False)
    return {
        "epochs": trainer.current_epoch,
        "frozen_at": -1 if freeze.freeze_epoch is None else freeze.freeze_epoch,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "val": float(best.best_model_score or 0.0),
        "test": scores["test/accuracy"],
    }


def main() -> None:
    """Run all sets and seeds, both sides in turn, and write a CSV."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder with the sets of the design, as .npz files")
    parser.add_argument("--sets", nargs="+", help="names of sets; by default all")
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    makers = makers_of(arguments.data)
    chosen = arguments.sets or list(makers)
    path = RESULTS / f"one_line_{machine()}.csv"
    everything: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["set", "seed", "side", "epochs", "frozen_at", "seconds", "cpu_seconds", "val", "test"])
        for name in chosen:
            arrays = makers[name]()
            runs: dict[str, list[dict[str, float | int]]] = {side: [] for side in SIDES}
            for seed in range(arguments.seeds):
                for turn in range(len(SIDES)):
                    side = list(SIDES)[(seed + turn) % len(SIDES)]
                    runs[side].append(fit(arrays, seed, SIDES[side]))
                    writer.writerow([name, seed, side, *(f"{v:.6g}" for v in runs[side][-1].values())])
                file.flush()
            for side in list(SIDES)[1:]:
                pairs = list(zip(runs["early stopping"], runs[side], strict=True))
                ratio = float(np.exp(np.mean([np.log(mlp["cpu_seconds"] / own["cpu_seconds"]) for mlp, own in pairs])))
                points = np.array([100.0 * (own["test"] - mlp["test"]) for mlp, own in pairs])
                half = stats.t.ppf(0.975, len(points) - 1) * stats.sem(points) if len(points) > 1 else np.nan
                everything[side].append((ratio, float(points.mean())))
                print(f"{name:<26}{side:<18}{ratio:6.2f} times {points.mean():+7.2f} points ± {half:.2f}", flush=True)
    for side, pairs in everything.items():
        if pairs:
            ratio, points = np.exp(np.mean([np.log(pair[0]) for pair in pairs])), np.mean([pair[1] for pair in pairs])
            print(f"{'all':<26}{side:<18}{ratio:6.2f} times {points:+7.2f} points")


if __name__ == "__main__":
    main()
