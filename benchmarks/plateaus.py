"""Fits that begin on a plateau, or whose patterns are quiet for another reason: the bare line against never frozen.

The cases are those in which a freeze by churn alone once ruined fits: the classifiers of torchvision's alexnet and
vgg11 on random frozen features of scikit-learn's digits, with dropout 0.5; an MLP whose rate rises from 0; epochs of
one batch; clusters whose features must be learned; a module whose backbone is trained along. Both sides train for the
same most epochs, from the same seed, on the same batches. What counts is the test accuracy of the weights at the end.

    python benchmarks/plateaus.py --seeds 5
"""

import argparse
import csv
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, seed_everything
from measuring import RESULTS, machine, quiet_trainer
from sklearn.datasets import load_digits, make_classification
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from glai_lightning.callbacks import StructureFreezeCallback

Rows = tuple[Tensor, Tensor]


class Classifier(LightningModule):
    """A classifier as somebody would write it, with or without layers before the head."""

    def __init__(self, head: nn.Module, body: nn.Module | None = None, warm_up: int = 0) -> None:
        super().__init__()
        self.body = nn.Identity() if body is None else body
        self.head = head
        self.warm_up = warm_up

    def loss(self, batch: Any, stage: str) -> Tensor:
        logits = self.head(self.body(batch[0]))
        self.log(f"{stage}/accuracy", (logits.argmax(1) == batch[1]).float().mean(), on_step=False, on_epoch=True)
        return F.cross_entropy(logits, batch[1])

    def training_step(self, batch: Any) -> Tensor:
        return self.loss(batch, "train")

    def validation_step(self, batch: Any) -> None:
        self.loss(batch, "val")

    def test_step(self, batch: Any) -> None:
        self.loss(batch, "test")

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-3)
        if not self.warm_up:
            return optimizer
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / self.warm_up))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def digits() -> Rows:
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x, dtype=torch.float32) / 16.0, torch.tensor(y)


def random_features(name: str, rows: int) -> Rows:
    """Return what the layers of a network of random weights before its classifier make of digits."""
    from torchvision import models

    x, y = digits()
    torch.manual_seed(0)
    network = getattr(models, name)().eval()
    images = F.interpolate(x[:rows].reshape(-1, 1, 8, 8), size=(64, 64)).expand(-1, 3, -1, -1)
    with torch.no_grad():
        features = [network.avgpool(network.features(part)).flatten(1) for part in images.split(64)]
    return torch.cat(features), y[:rows]


def classifier_of(name: str) -> nn.Module:
    from torchvision import models

    classifier: nn.Module = getattr(models, name)().classifier
    classifier[6] = nn.Linear(classifier[6].in_features, 10)
    return classifier


def mlp(inputs: int, hidden: int, classes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, classes))


def clusters() -> Rows:
    x, y = make_classification(
        20_000, 50, n_informative=30, n_redundant=10, n_classes=7, n_clusters_per_class=4, random_state=0
    )
    return torch.tensor(x, dtype=torch.float32), torch.tensor(y)


@dataclass(frozen=True)
class Case:
    """Data, a module, and for how long it is trained."""

    data: Callable[[], Rows]
    module: Callable[[], LightningModule]
    epochs: int
    batch_size: int


def body() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU())


CASES = {
    "warm-up from 0": Case(digits, lambda: Classifier(mlp(64, 256, 10), warm_up=500), 40, 32),
    "epochs of one batch": Case(digits, lambda: Classifier(mlp(64, 256, 10)), 200, 2000),
    "clusters of 7 classes": Case(clusters, lambda: Classifier(mlp(50, 512, 7)), 25, 256),
    "a backbone that is trained": Case(digits, lambda: Classifier(mlp(64, 256, 10), body()), 40, 32),
    "alexnet's classifier": Case(
        lambda: random_features("alexnet", 900), lambda: Classifier(classifier_of("alexnet")), 12, 64
    ),
    "vgg11's classifier": Case(
        lambda: random_features("vgg11", 900), lambda: Classifier(classifier_of("vgg11")), 12, 64
    ),
}


def fit(case: Case, rows: Rows, seed: int, *, freezes: bool) -> tuple[float, float, int]:
    """Return the test accuracy at the end of a fit, its CPU seconds, and the epoch of the freeze or -1."""
    parts = random_split(TensorDataset(*rows), [0.7, 0.1, 0.2], torch.Generator().manual_seed(seed))
    training, validation, test = (DataLoader(part, case.batch_size, shuffle=n == 0) for n, part in enumerate(parts))
    seed_everything(seed, verbose=False)
    module = case.module()
    freeze = StructureFreezeCallback("head", verbose=False)
    trainer = quiet_trainer(case.epochs, *([freeze] if freezes else []))
    began = time.process_time()
    trainer.fit(module, training, validation)
    seconds = time.process_time() - began
    (scores,) = trainer.test(module, test, verbose=False)
    return scores["test/accuracy"], seconds, -1 if freeze.freeze_epoch is None else freeze.freeze_epoch


def main() -> None:
    """Fit both sides of the cases in turn, and write a CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    worse = total = 0
    with (RESULTS / f"plateaus_{machine()}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["case", "seed", "side", "frozen_at", "cpu_seconds", "test"])
        for name in arguments.cases:
            case, differences, ratios = CASES[name], [], []
            rows = case.data()
            for seed in range(arguments.seeds):
                sides = {freezes: fit(case, rows, seed, freezes=freezes) for freezes in (seed % 2 == 0, seed % 2 != 0)}
                for freezes, (score, seconds, epoch) in sides.items():
                    side = "bare line" if freezes else "never frozen"
                    writer.writerow([name, seed, side, epoch, f"{seconds:.6g}", f"{score:.6g}"])
                file.flush()
                differences.append(100.0 * (sides[True][0] - sides[False][0]))
                ratios.append(sides[False][1] / sides[True][1])
            worse, total = worse + sum(points < -1.0 for points in differences), total + len(differences)
            points = ", ".join(f"{points:+.2f}" for points in differences)
            print(f"{name:<28}points {points}; times as fast {', '.join(f'{r:.2f}' for r in ratios)}", flush=True)
    print(f"{worse} of {total} fits end more than a point below never frozen")


if __name__ == "__main__":
    main()
