"""Whether `one_pass` may be decided by count: fits with it and without, with more and less work before the head.

Frozen networks of random weights stand before the same kind of head: convolutions and residual blocks over
Fashion-MNIST images, a transformer over generated tokens, one Linear layer of several widths, and nothing. Both sides
have the same data, seeds, optimizer and `StructureFreezeCallback`; CPU seconds of the whole fit. `work` is what
"auto" goes by: multiply-adds before the head over those of the head.

    python benchmarks/one_pass_auto.py --data folder/with/npz
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from end_to_end import Transformer, make_backbone
from lightning.pytorch import LightningDataModule, seed_everything
from measuring import measure, quiet_trainer, save_results, use_one_thread
from torch import nn
from torch.utils.data import TensorDataset

from glai_lightning import SupervisedModule, mlp_head
from glai_lightning.callbacks import StructureFreezeCallback
from glai_lightning.callbacks.one_pass import WORTH_ONE_PASS

ROWS = {"train": 1536, "val": 512, "test": 1000}


class Block(nn.Module):
    """Two convolutions and a sum, as in a residual network."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Transform images (batch, channels, height, width)."""
        return torch.relu(x + self.layers(x))


def residual() -> nn.Sequential:
    stem = nn.Conv2d(1, 32, 5, stride=2, padding=2)
    return nn.Sequential(stem, Block(32), nn.MaxPool2d(2), Block(32), nn.AdaptiveAvgPool2d(3), nn.Flatten())


def linear(width: int) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, width), nn.Tanh())


#: What stands before the head, how many features it returns, and whether it takes tokens.
SIDES: dict[str, tuple[Callable[[], nn.Module], int, bool]] = {
    "convolutions": (make_backbone, 576, False),
    "residual blocks": (residual, 288, False),
    "transformer": (lambda: Transformer(layers=1), 384, True),
    "Linear of 64": (linear(64), 64, False),
    "Linear of 128": (linear(128), 128, False),
    "Linear of 384": (linear(384), 384, False),
    "nothing": (nn.Flatten, 784, False),
}


def tokens(rng: np.random.Generator, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw sequences of eight words, half of them of those that their class prefers."""
    labels = rng.integers(10, size=rows)
    preferred = np.random.default_rng(0).integers(1000, size=(10, 60))[
        labels[:, None], rng.integers(60, size=(rows, 8))
    ]
    drawn = np.where(rng.random((rows, 8)) < 0.5, rng.integers(1000, size=(rows, 8)), preferred)
    return torch.from_numpy(drawn), torch.from_numpy(labels)


def main() -> None:
    """Run all sides, with one pass and without in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("GLAI_DATA", "."), help="folder of .npz files")
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    use_one_thread()
    with np.load(Path(arguments.data) / "fashion_mnist.npz") as archive:
        images = torch.from_numpy(archive["x_train"]).float().unsqueeze(1) / 255
        labels = torch.from_numpy(archive["y_train"]).long()
    rows = []
    for seed in range(arguments.seeds):
        order = np.random.default_rng(seed).permutation(len(images))[: sum(ROWS.values())]
        pictures = images[order], labels[order]
        sequences = tokens(np.random.default_rng(seed + 1), len(order))
        for name in SIDES:
            data = sequences if SIDES[name][2] else pictures
            rows += [fit(name, data, seed, one_pass=one_pass) for one_pass in (False, True, "auto")]
    save_results("one_pass_auto", rows)


def fit(name: str, data: tuple[torch.Tensor, torch.Tensor], seed: int, *, one_pass: bool | str) -> dict[str, object]:
    """Fit and test once."""
    torch.manual_seed(0)
    make, features, _ = SIDES[name]
    backbone = make()
    seed_everything(seed, verbose=False)
    parts = zip(*(part.split(list(ROWS.values())) for part in data), strict=True)
    loaders = LightningDataModule.from_datasets(*(TensorDataset(*part) for part in parts), batch_size=64)
    head = mlp_head(features, 128, 10)
    module = SupervisedModule(head, backbone, optimizer=lambda p: torch.optim.AdamW(p, 1e-3, fused=True))
    freeze = StructureFreezeCallback(one_pass=one_pass, verbose=False)
    trainer = quiet_trainer(12, freeze)
    seconds = measure(lambda: trainer.fit(module, loaders))
    val_score = float(trainer.callback_metrics["val/accuracy"])
    (tested,) = trainer.test(module, loaders, verbose=False)
    record = freeze.one_pass_record
    work = freeze.heads["head"].solve.work_before_head
    return {
        "before_head": name,
        "seed": seed,
        "one_pass": one_pass,
        "work": round(work, 1) if one_pass == "auto" else "",
        "read_once": record is not None,
        "expected": work >= WORTH_ONE_PASS if one_pass == "auto" else "",
        "epochs": trainer.current_epoch if record is None else 1 + record.passes,
        "cpu_seconds": round(seconds.cpu, 3),
        "val_score": round(val_score, 4),
        "test_score": round(tested["test/accuracy"], 4),
    }


if __name__ == "__main__":
    main()
