"""The backbone in the loop: 12 epochs of an MLP head against freeze, solve, stop, and against one pass over the data.

A frozen convolutional network embeds Fashion-MNIST images anew in every step. It is trained first, on classes of the
images that the head is not asked about, so that its embeddings are worth something; that is not part of the clock.
All sides fit the same head with the same batches, seeds and AdamW at a constant rate, validate after every epoch, and
keep the weights of their best epoch. CPU seconds of the whole fit. The honest rival of one pass is the MLP on features
that are computed once, stopped early: the seconds of computing them count.

    python benchmarks/end_to_end.py --data folder/with/npz
    python benchmarks/end_to_end.py --backbone transformer --seeds 2

The second puts a transformer of MiniLM's size and random weights over generated token sequences before the head, and
adds the whole of a second fit, frozen and solved, on embeddings that the first fit left in a cache.
"""

import argparse
import copy
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping
from measuring import Seconds, comparison_rows, measure, quiet_trainer, save_results, use_one_thread
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from glai_lightning import SupervisedModule, mlp_head
from glai_lightning.callbacks import StructureFreezeCallback
from glai_lightning.comparison import compare, text_report
from glai_lightning.datamodules import FeaturesDataModule

MakeFit = Callable[[int], tuple[SupervisedModule, LightningDataModule, Trainer]]
EPOCHS, PRETRAINING_CLASSES, HEAD_CLASSES, HIDDEN = 12, 4, 6, 512
#: Of the generated sequences: how many to train and to validate or test on, tokens in each, and words there are.
TRAIN, HELD_OUT, LENGTH, WORDS = 512, 128, 24, 1000


def make_backbone() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(),
    )  # fmt: skip


def pretrain(images: torch.Tensor, labels: torch.Tensor) -> nn.Sequential:
    """Train the backbone for two epochs on the classes that the head will not see."""
    backbone, classifier = make_backbone(), nn.Linear(576, int(labels.max()) + 1)
    optimizer = torch.optim.AdamW([*backbone.parameters(), *classifier.parameters()], 1e-3)
    for _ in range(2):
        for rows in torch.randperm(len(images)).split(128):
            optimizer.zero_grad()
            F.cross_entropy(classifier(backbone(images[rows])), labels[rows]).backward()
            optimizer.step()
    return backbone


class Transformer(nn.Module):
    """An encoder of MiniLM's size with random weights: six layers, 384 wide; the mean over the tokens is returned."""

    def __init__(self, layers: int = 6) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 384)
        layer = nn.TransformerEncoderLayer(384, 12, 1536, 0.0, activation="gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embed tokens (batch, LENGTH) -> (batch, 384)."""
        return self.encoder(self.words(tokens)).mean(1)


def generated_sequences() -> TensorDataset:
    """Draw sequences of words; each class has words that it prefers, and half of a sequence is of any words."""
    rng = np.random.default_rng(0)
    labels = rng.integers(HEAD_CLASSES, size=TRAIN + 2 * HELD_OUT)
    own = rng.integers(WORDS, size=(HEAD_CLASSES, 60))
    tokens = own[labels[:, None], rng.integers(60, size=(len(labels), LENGTH))]
    noise = rng.random(tokens.shape) < 0.5
    tokens = np.where(noise, rng.integers(WORDS, size=tokens.shape), tokens)
    return TensorDataset(torch.from_numpy(tokens), torch.from_numpy(labels))


def main_transformer(seeds: int) -> None:
    """Run the sides in turn with the transformer before the head."""
    torch.manual_seed(0)
    backbone, sequences = Transformer(), generated_sequences()

    def make_fit(seed: int) -> tuple[SupervisedModule, LightningDataModule, Trainer]:
        order = np.random.default_rng(seed).permutation(len(sequences))
        parts = np.split(order, [TRAIN, TRAIN + HELD_OUT])
        data = LightningDataModule.from_datasets(
            *(TensorDataset(*sequences[torch.from_numpy(rows)]) for rows in parts), batch_size=64
        )
        module = SupervisedModule(
            mlp_head(384, HIDDEN, HEAD_CLASSES),
            copy.deepcopy(backbone),
            optimizer=lambda parameters: torch.optim.AdamW(parameters, 1e-3, fused=True),
        )
        return module, data, quiet_trainer(EPOCHS)

    sides = (all_epochs, one_pass, cached_features, warm_cache)
    save_results("end_to_end_transformer", [side(make_fit, seed) for seed in range(seeds) for side in sides])


def main() -> None:
    """Run all seeds, both sides in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("GLAI_DATA", "."), help="folder of .npz files")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--backbone", choices=["cnn", "transformer"], default="cnn")
    parser.add_argument("--to", type=Path, default=Path("runs") / "comparison" / "end_to_end")
    arguments = parser.parse_args()
    use_one_thread()
    if arguments.backbone == "transformer":
        main_transformer(arguments.seeds)
        return

    make_fit = fashion_mnist(Path(arguments.data))
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
    rows = comparison_rows(comparison)
    rows += [side(make_fit, seed) for seed in range(arguments.seeds) for side in (one_pass, cached_features)]
    columns = ("variant", "seed", "epochs", "finished_cpu_seconds", "finished_seconds", "best_val_score", "test_score")
    save_results("end_to_end", [{column: row[column] for column in columns} for row in rows])


def fashion_mnist(folder: Path) -> MakeFit:
    """Return the fits of a head on classes 4 to 9, after a backbone that is trained on classes 0 to 3."""
    with np.load(folder / "fashion_mnist.npz") as archive:
        images = {part: torch.from_numpy(archive[f"x_{part}"]).float().unsqueeze(1) / 255 for part in ("train", "test")}
        labels = {part: torch.from_numpy(archive[f"y_{part}"]).long() for part in ("train", "test")}
    asked = {part: labels[part] >= PRETRAINING_CLASSES for part in labels}
    torch.manual_seed(0)
    backbone = pretrain(images["train"][~asked["train"]], labels["train"][~asked["train"]])
    inputs = {part: images[part][asked[part]] for part in images}
    targets = {part: labels[part][asked[part]] - PRETRAINING_CLASSES for part in labels}
    return fits_on(backbone, inputs, targets)


def fits_on(backbone: nn.Module, inputs: dict[str, torch.Tensor], targets: dict[str, torch.Tensor]) -> MakeFit:
    """Return the fits of a head on images that a frozen backbone embeds in every step."""

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
            mlp_head(576, HIDDEN, int(targets["train"].max()) + 1),
            copy.deepcopy(backbone),
            optimizer=lambda parameters: torch.optim.AdamW(parameters, 1e-3, fused=True),
        )
        return module, data, Trainer(max_epochs=EPOCHS, accelerator="cpu", logger=False)

    return make_fit


def all_epochs(make_fit: MakeFit, seed: int) -> dict[str, object]:
    """Fit the MLP with the backbone in the loop in every epoch."""
    seed_everything(seed, verbose=False)
    module, data, _ = make_fit(seed)
    best = BestWeights()
    trainer = quiet_trainer(EPOCHS, best)
    seconds = measure(lambda: trainer.fit(module, data))
    module.load_state_dict(best.weights)
    return _row("mlp", seed, EPOCHS, seconds, trainer, module, data)


def warm_cache(make_fit: MakeFit, seed: int) -> dict[str, object]:
    """Fit a second time, frozen and solved, on embeddings that are there; finding them is part of the clock."""
    seed_everything(seed, verbose=False)
    module, data, _ = make_fit(seed)
    backbone, module.backbone = module.backbone, None
    freeze = StructureFreezeCallback(verbose=False)
    trainer = quiet_trainer(EPOCHS, freeze)
    with tempfile.TemporaryDirectory() as folder:
        embed = partial(FeaturesDataModule.from_backbone, data, backbone, cache_dir=folder, progress_bar=False)
        embed(batch_size=64)
        seconds = measure(lambda: trainer.fit(module, embed(batch_size=64)))
        return _row("second fit from a warm cache", seed, trainer.current_epoch, seconds, trainer, module, embed())


def one_pass(make_fit: MakeFit, seed: int) -> dict[str, object]:
    """Fit with the data read once."""
    seed_everything(seed, verbose=False)
    module, data, _ = make_fit(seed)
    freeze = StructureFreezeCallback(one_pass=True, verbose=False)
    trainer = quiet_trainer(EPOCHS, freeze)
    seconds = measure(lambda: trainer.fit(module, data))
    assert freeze.one_pass_record is not None
    return _row("one_pass", seed, 1 + freeze.one_pass_record.passes, seconds, trainer, module, data)


def cached_features(make_fit: MakeFit, seed: int) -> dict[str, object]:
    """Fit the MLP on features that are computed once, stopped early."""
    seed_everything(seed, verbose=False)
    module, data, _ = make_fit(seed)
    backbone, module.backbone = module.backbone, nn.Identity()
    stop = EarlyStopping("val/accuracy", mode="max", patience=3)
    best = BestWeights()
    trainer = quiet_trainer(EPOCHS, stop, best)

    @torch.no_grad()
    def features(loader: DataLoader) -> TensorDataset:
        batches = [(backbone.eval()(images), labels) for images, labels in loader]
        return TensorDataset(*(torch.cat(parts) for parts in zip(*batches, strict=True)))

    def fit() -> None:
        train, val = features(data.train_dataloader()), features(data.val_dataloader())
        trainer.fit(module, DataLoader(train, batch_size=128, shuffle=True), DataLoader(val, batch_size=128))
        module.load_state_dict(best.weights)

    seconds = measure(fit)
    module.backbone = backbone
    return _row("mlp on cached features, stopped early", seed, trainer.current_epoch, seconds, trainer, module, data)


class BestWeights(Callback):
    """Keeps the weights of the best validation, as the comparison does."""

    def __init__(self) -> None:
        self.score, self.weights = -1.0, {}

    def on_validation_end(self, trainer: Trainer, pl_module: SupervisedModule) -> None:
        """Keep a copy of better weights."""
        if (score := float(trainer.callback_metrics["val/accuracy"])) > self.score:
            self.score, self.weights = score, copy.deepcopy(pl_module.state_dict())


def _row(
    variant: str, seed: int, epochs: int, seconds: Seconds, trainer: Trainer, module: SupervisedModule, data: Any
) -> dict[str, object]:
    scores = [float(trainer.callback_metrics["val/accuracy"])]
    scores += [callback.score for callback in trainer.callbacks if isinstance(callback, BestWeights)]
    (tested,) = trainer.test(module, data, verbose=False)
    return {
        "variant": variant,
        "seed": seed,
        "epochs": epochs,
        "finished_cpu_seconds": round(seconds.cpu, 3),
        "finished_seconds": round(seconds.wall, 3),
        "best_val_score": round(max(scores), 6),
        "test_score": round(tested["test/accuracy"], 6),
    }


if __name__ == "__main__":
    main()
