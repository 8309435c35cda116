"""The backbone in the loop: 12 epochs of an MLP head against freeze, solve, stop, nothing cached.

A frozen convolutional network embeds Fashion-MNIST images anew in every step. It is trained first, on classes of the
images that the head is not asked about, so that its embeddings are worth something; that is not part of the clock.
Both sides fit the same head with the same batches, seeds and AdamW at a constant rate, validate after every epoch, and
keep the weights of their best epoch. CPU seconds of the whole fit.

    python benchmarks/end_to_end.py --data folder/with/npz
"""

import argparse
import logging
import os
import statistics
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from finished_head import BestWeights, quiet_trainer
from lightning.pytorch import seed_everything
from measuring import save_results, use_one_thread
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import glai_lightning  # noqa: F401  (before lightning)
from glai_lightning import SupervisedModule, mlp_head
from glai_lightning.callbacks import StructureFreezeCallback
from glai_lightning.solvers import LogisticSolver

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


def run(variant: str, backbone: nn.Module, loaders: dict[str, DataLoader], seed: int) -> dict[str, object]:
    """Fit one head, and return what it took and what it scores."""
    seed_everything(seed, verbose=False)
    module = SupervisedModule(
        mlp_head(576, HIDDEN, HEAD_CLASSES),
        backbone,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, 1e-3, fused=True),
    )
    best, callbacks = BestWeights(), []
    if variant == "output+solve":
        solver = LogisticSolver(center="zero", max_passes=9)
        callbacks = [StructureFreezeCallback(solver=solver, stop_after_solve=True, verbose=False)]
    trainer = quiet_trainer(EPOCHS, [*callbacks, best])
    wall, cpu = time.perf_counter(), time.process_time()
    trainer.fit(module, loaders["train"], loaders["val"])
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    epochs = trainer.current_epoch
    module.load_state_dict(best.weights)
    (tested,) = trainer.test(module, loaders["test"], verbose=False)
    return {
        "variant": variant,
        "seed": seed,
        "epochs": epochs,
        "finished_cpu_seconds": round(cpu, 3),
        "finished_seconds": round(wall, 3),
        "best_val_score": round(best.score, 5),
        "test_score": round(tested["test/accuracy"], 5),
    }


def main() -> None:
    """Run all seeds, both sides in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("GLAI_DATA", "."), help="folder of .npz files")
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    use_one_thread()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    with np.load(Path(arguments.data) / "fashion_mnist.npz") as archive:
        images = {part: torch.from_numpy(archive[f"x_{part}"]).float().unsqueeze(1) / 255 for part in ("train", "test")}
        labels = {part: torch.from_numpy(archive[f"y_{part}"]).long() for part in ("train", "test")}
    asked = {part: labels[part] >= PRETRAINING_CLASSES for part in labels}
    torch.manual_seed(0)
    backbone = pretrain(images["train"][~asked["train"]], labels["train"][~asked["train"]])
    inputs = {part: images[part][asked[part]] for part in images}
    targets = {part: labels[part][asked[part]] - PRETRAINING_CLASSES for part in labels}

    rows: list[dict[str, object]] = []
    for seed in range(arguments.seeds):
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(inputs["train"])))
        train, val = order[len(order) // 5 :], order[: len(order) // 5]
        loaders = {
            "train": DataLoader(
                TensorDataset(inputs["train"][train], targets["train"][train]), batch_size=128, shuffle=True
            ),
            "val": DataLoader(TensorDataset(inputs["train"][val], targets["train"][val]), batch_size=256),
            "test": DataLoader(TensorDataset(inputs["test"], targets["test"]), batch_size=256),
        }
        for variant in sorted(("mlp", "output+solve"), reverse=bool(seed % 2)):
            rows.append(run(variant, backbone, loaders, seed))
    pairs = [
        (mlp, solved)
        for mlp in rows
        for solved in rows
        if (mlp["variant"], solved["variant"]) == ("mlp", "output+solve") and mlp["seed"] == solved["seed"]
    ]
    ratio = statistics.median(mlp["finished_cpu_seconds"] / solved["finished_cpu_seconds"] for mlp, solved in pairs)
    difference = statistics.mean(100 * (solved["test_score"] - mlp["test_score"]) for mlp, solved in pairs)
    print(f"{ratio:.2f} times fewer CPU seconds (median), {difference:+.2f} points (mean)")
    save_results("end_to_end", rows)


if __name__ == "__main__":
    main()
