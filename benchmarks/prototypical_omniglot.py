"""Does freezing cost accuracy in few-shot learning? Omniglot, 20-way 1-shot and 5-shot, frozen against never frozen.

    python benchmarks/prototypical_omniglot.py --data omniglot_small.npz

A Conv-4 backbone of 32 channels is trained from scratch along with a head of one hidden layer, on 20-way 1-shot
episodes of five alphabets; no image of the other three is seen in training. All sides have the same initial weights,
episodes, optimizer and one-cycle schedule, and are run in turn; they freeze the structure of the head by the default
rule, or never (or, with --variants, early). The weights at the end of the fit are tested on 600 episodes of two other
alphabets, with one shot and with five, the same for all: accuracy, and its 95 % interval over the episodes.
"""

import argparse
import logging
import time
import warnings
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

# First: it lets torchvision, where it is installed, be imported beside a CPU-only torch.
# isort: split
import torch
from lightning.pytorch import Trainer, seed_everything
from measuring import save_results, use_one_thread
from torch import nn

from glai_lightning import PrototypicalModule, mlp_head
from glai_lightning.backbones import conv_backbone
from glai_lightning.callbacks import StructureFreezeCallback
from glai_lightning.datamodules import EpisodesDataModule
from glai_lightning.datamodules.tasksets import NumberedEpisodes

ALPHABETS = {
    "train": ["Early_Aramaic", "Greek", "Japanese_(katakana)", "Korean", "Sanskrit"],
    "val": ["Balinese"],
    "test": ["Latin", "Tagalog"],
}
CHANNELS, HIDDEN, EMBEDDING = 32, 128, 64
WAYS, TRAIN_QUERIES, TEST_QUERIES, TEST_EPISODES = 20, 5, 15, 600
TEST_SHOTS = (1, 5)
NEVER = "never frozen"
VARIANTS: dict[str, dict[str, int]] = {"frozen": {}, "frozen at epoch 2": {"freeze_at_epoch": 2}, NEVER: {}}


def make_data(path: Path, shots: int, queries: int, episodes: int, seed: int) -> EpisodesDataModule:
    return EpisodesDataModule(
        path,
        ways=WAYS,
        shots=shots,
        queries=queries,
        train_episodes=episodes,
        eval_episodes=TEST_EPISODES,
        groups="alphabet",
        classes=ALPHABETS,
        seed=seed,
    )


def test_scores(module: PrototypicalModule, path: Path, shots: int) -> dict[str, float]:
    """Test on episodes of embeddings: each test image is embedded once, which in eval mode makes no difference."""
    # The test episodes do not depend on the seed of the fit.
    images = make_data(path, shots, TEST_QUERIES, 1, seed=0).episodes["test"]
    assert isinstance(images, NumberedEpisodes)
    rows = torch.from_numpy(images._rows).sort().values
    samples = (images.inputs[rows].float() - images.mean) / images.scale
    with torch.no_grad():
        embeddings = torch.cat([module.eval()(chunk) for chunk in samples.split(256)])
    sizes = {"ways": WAYS, "shots": shots, "queries": TEST_QUERIES, "episodes": TEST_EPISODES}
    episodes = NumberedEpisodes(embeddings, images.labels[rows], torch.arange(len(rows)), seeds=images.seeds, **sizes)
    tester = PrototypicalModule(nn.Identity())
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    loader = torch.utils.data.DataLoader(episodes, batch_size=None, sampler=range(TEST_EPISODES))
    (scores,) = trainer.test(tester, loader, verbose=False)
    return scores


def fit(path: Path, seed: int, variant: str, epochs: int, episodes: int) -> list[dict[str, Any]]:
    """Fit once, test with one shot and with five, and return a row of results for each."""
    seed_everything(seed, verbose=False)
    module = PrototypicalModule(
        mlp_head(CHANNELS, HIDDEN, EMBEDDING),
        conv_backbone(channels=CHANNELS),
        freeze_backbone=False,
        optimizer=partial(torch.optim.AdamW, lr=1e-3),
        lr_scheduler=partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=3e-3, total_steps=epochs * episodes),
    )
    freeze = StructureFreezeCallback(verbose=False, **VARIANTS[variant])
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        limit_val_batches=0,
        callbacks=[] if variant == NEVER else [freeze],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    start = time.process_time()
    trainer.fit(module, make_data(path, 1, TRAIN_QUERIES, episodes, seed))
    seconds = time.process_time() - start
    of_fit = {
        "variant": variant,
        "seed": seed,
        "freeze_epoch": freeze.freeze_epoch if freeze.frozen else "",
        "epochs": epochs,
        "episodes_per_epoch": episodes,
        "fit_cpu_seconds": f"{seconds:.1f}",
    }
    rows = []
    for shots in TEST_SHOTS:
        scores = test_scores(module, path, shots)
        accuracy, interval = (f"{scores[f'test/accuracy{suffix}']:.4f}" for suffix in ("", "_interval"))
        rows.append(
            {"ways": WAYS, "shots": shots, **of_fit, "test_accuracy": accuracy, "test_accuracy_interval": interval}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--episodes", type=int, default=30, help="training episodes of an epoch")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["frozen", NEVER])
    options = parser.parse_args()
    use_one_thread()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    rows = []
    for seed in range(options.seeds):
        for variant in options.variants:
            for row in fit(options.data, seed, variant, options.epochs, options.episodes):
                rows.append(row)
                print(*row.values(), sep="\t", flush=True)
    save_results("prototypical_omniglot", rows)
    summarise(rows)


def summarise(rows: list[dict[str, Any]]) -> None:
    """Print mean accuracies, and differences to the fits never frozen with their 95 % interval over the seeds."""
    for shots in TEST_SHOTS:
        accuracies: dict[str, list[float]] = {}
        for row in rows:
            if row["shots"] == shots:
                accuracies.setdefault(row["variant"], []).append(100 * float(row["test_accuracy"]))
        for variant, of_seeds in accuracies.items():
            line = f"{WAYS}-way {shots}-shot, {variant}: {mean(of_seeds):.2f} %"
            if variant != NEVER and NEVER in accuracies and len(of_seeds) > 1:
                differences = [one - other for one, other in zip(of_seeds, accuracies[NEVER], strict=True)]
                half = 1.96 * stdev(differences) / len(differences) ** 0.5
                line += f", difference {mean(differences):+.2f} ± {half:.2f} points"
            print(line)


if __name__ == "__main__":
    main()
