"""The backbone in the loop: 12 epochs of an MLP head against freeze, solve, stop, nothing cached.

A frozen convolutional network embeds Fashion-MNIST images anew in every step. It is trained first, on classes of the
images that the head is not asked about, so that its embeddings are worth something; that is not part of the clock.
Both sides fit the same head with the same batches, seeds and AdamW at a constant rate, validate after every epoch, and
keep the weights of their best epoch. CPU seconds of the whole fit.

    python benchmarks/end_to_end.py --data folder/with/npz
"""

import argparse
import copy
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, Trainer
from measuring import comparison_rows, save_results, use_one_thread
from torch import nn
from torch.utils.data import TensorDataset

from glai_lightning import SupervisedModule, mlp_head
from glai_lightning.comparison import compare, text_report

EPOCHS, PRETRAINING_CLASSES, HEAD_CLASSES, HIDDEN = 12, 4, 6, 512


def make_backbone() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(),
    )  # fmt: skip


def pretrain(images: torch.Tensor, labels: torch.Tensor) -> nn.Sequential:
    """Train the backbone for two epochs on the classes that the head will not see."""
    backbone, classifier = make_backbone(), nn.Linear(576, PRETRAINING_CLASSES)
    optimizer = torch.optim.AdamW([*backbone.parameters(), *classifier.parameters()], 1e-3)
    for _ in range(2):
        for rows in torch.randperm(len(images)).split(128):
            optimizer.zero_grad()
            F.cross_entropy(classifier(backbone(images[rows])), labels[rows]).backward()
            optimizer.step()
    return backbone


def main() -> None:
    """Run all seeds, both sides in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("GLAI_DATA", "."), help="folder of .npz files")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--to", type=Path, default=Path("runs") / "comparison" / "end_to_end")
    arguments = parser.parse_args()
    use_one_thread()

    with np.load(Path(arguments.data) / "fashion_mnist.npz") as archive:
        images = {part: torch.from_numpy(archive[f"x_{part}"]).float().unsqueeze(1) / 255 for part in ("train", "test")}
        labels = {part: torch.from_numpy(archive[f"y_{part}"]).long() for part in ("train", "test")}
    asked = {part: labels[part] >= PRETRAINING_CLASSES for part in labels}
    torch.manual_seed(0)
    backbone = pretrain(images["train"][~asked["train"]], labels["train"][~asked["train"]])
    inputs = {part: images[part][asked[part]] for part in images}
    targets = {part: labels[part][asked[part]] - PRETRAINING_CLASSES for part in labels}

    def make_fit(seed: int) -> tuple[SupervisedModule, LightningDataModule, Trainer]:
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(inputs["train"])))
        train, val = order[len(order) // 5 :], order[: len(order) // 5]
        data = LightningDataModule.from_datasets(
            TensorDataset(inputs["train"][train], targets["train"][train]),
            TensorDataset(inputs["train"][val], targets["train"][val]),
            TensorDataset(inputs["test"], targets["test"]),
            batch_size=128,
        )
        module = SupervisedModule(
            mlp_head(576, HIDDEN, HEAD_CLASSES),
            copy.deepcopy(backbone),
            optimizer=lambda parameters: torch.optim.AdamW(parameters, 1e-3, fused=True),
        )
        return module, data, Trainer(max_epochs=EPOCHS, accelerator="cpu", logger=False)

    comparison = compare(
        make_fit,
        score="val/accuracy",
        mode="max",
        to=arguments.to,
        variants="mlp,output+solve",
        seeds=arguments.seeds,
        patience=None,
    )
    print(text_report(comparison))
    save_results("end_to_end", comparison_rows(comparison))


if __name__ == "__main__":
    main()
