"""The SimCLR recipe on scikit-learn's digits, frozen by itself against never frozen.

python benchmarks/simclr_digits.py
"""

import logging
import time
import warnings

import torch
from lightly.models.modules import SimCLRProjectionHead
from lightning.pytorch import seed_everything
from measuring import quiet_trainer, save_results, use_one_thread

from glai_lightning import SimCLRModule
from glai_lightning.backbones import conv_backbone
from glai_lightning.callbacks import StructureFreezeCallback
from glai_lightning.datamodules import DigitViewsDataModule


def fit(seed: int, frozen: bool) -> dict[str, object]:
    """Fit once, as recipes/simclr.yaml says, and test the weights at the end."""
    seed_everything(seed, verbose=False)
    data = DigitViewsDataModule(batch_size=128, seed=seed)
    module = SimCLRModule(
        SimCLRProjectionHead(128, 512, 64),
        conv_backbone(channels=32, blocks=2),
        freeze_backbone=False,
        knn_neighbors=20,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=2e-3),
    )
    callbacks = [StructureFreezeCallback(verbose=False)] if frozen else []
    trainer = quiet_trainer(20, *callbacks)
    started = time.process_time()
    trainer.fit(module, data)
    seconds = time.process_time() - started
    (tested,) = trainer.test(module, data, verbose=False)
    return {
        "variant": "frozen" if frozen else "never",
        "seed": seed,
        "freeze_epoch": callbacks[0].freeze_epoch if frozen else -1,
        "cpu_seconds": round(seconds, 2),
        **{name: round(score, 4) for name, score in tested.items()},
    }


def main() -> None:
    """Run five seeds, both sides in turn."""
    use_one_thread()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rows = [fit(seed, frozen) for seed in range(5) for frozen in ((True, False) if seed % 2 else (False, True))]
    save_results("simclr_digits", rows)


if __name__ == "__main__":
    main()
