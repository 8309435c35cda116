"""What Lightning adds: an epoch of FeaturesDataModule and SupervisedModule against the same loop in plain PyTorch.

Both train an MLP head (D = 512, H = 512, C = 10) on 50,000 random samples in batches of 256 with a fused AdamW, in a
new random order every epoch. Between any two epochs of the fit the plain loop runs one of its own, so that each pair
was timed side by side. Logging is on (a CSV file, the training loss once an epoch), the progress bar and validation are
off, and an epoch is timed from its first hook to the first hook of the next. At most 1.5 times the CPU seconds are
expected.
"""

import argparse
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from measuring import RESULTS, Seconds, measure, median_cpu, median_ratio, median_wall, save_results, use_one_thread

from glai_lightning import SupervisedModule, mlp_head
from glai_lightning.datamodules import FeaturesDataModule

FEATURES, HIDDEN, CLASSES, BATCH, SAMPLES = 512, 512, 10, 256, 50_000

fused_adamw = partial(torch.optim.AdamW, lr=1e-3, fused=True)


class PlainLoop:
    """The loop as one writes it without Lightning."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.x, self.y = x, y
        self.head = mlp_head(FEATURES, HIDDEN, CLASSES)
        self.optimizer = fused_adamw(self.head.parameters())

    def epoch(self) -> None:
        """Train for one epoch."""
        for rows in torch.randperm(len(self.x)).split(BATCH):
            x, y = self.x.index_select(0, rows), self.y.index_select(0, rows)
            self.optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(self.head(x), y).backward()
            self.optimizer.step()


class PairedEpochs(Callback):
    """Times every epoch of the fit but the first, and between two of them an epoch of the plain loop."""

    def __init__(self, loop: PlainLoop) -> None:
        self.loop = loop
        self.lightning: list[Seconds] = []
        self.plain: list[Seconds] = []
        self._start: Seconds | None = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the time of the epoch that ended, and run one of the plain loop."""
        now = Seconds(time.process_time(), time.perf_counter())
        plain = measure(self.loop.epoch)
        if self._start is not None and trainer.current_epoch > 1:
            self.lightning.append(Seconds(now.cpu - self._start.cpu, now.wall - self._start.wall))
            self.plain.append(plain)
        self._start = Seconds(time.process_time(), time.perf_counter())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=25, help="pairs of epochs, of which the medians are taken")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV")
    arguments = parser.parse_args()
    use_one_thread()
    warnings.filterwarnings("ignore", module="lightning")
    torch.manual_seed(0)
    x, y = torch.randn(SAMPLES, FEATURES), torch.randint(CLASSES, (SAMPLES,))
    arrays = {"x_train": x, "y_train": y} | {
        f"{letter}_{split}": values[:BATCH] for letter, values in (("x", x), ("y", y)) for split in ("val", "test")
    }
    data = FeaturesDataModule(arrays=arrays, batch_size=BATCH)
    pairs = PairedEpochs(PlainLoop(x, y))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_epochs=arguments.epochs + 2,
            accelerator="cpu",
            callbacks=[pairs],
            logger=CSVLogger(folder),
            limit_val_batches=0,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(SupervisedModule(mlp_head(FEATURES, HIDDEN, CLASSES), optimizer=fused_adamw), data)
    steps = -(-SAMPLES // BATCH)
    ratio = median_ratio(pairs.lightning, pairs.plain)
    rows = [
        {
            "loop": name,
            "cpu_seconds_per_epoch": round(median_cpu(times), 4),
            "wall_seconds_per_epoch": round(median_wall(times), 4),
            "cpu_ms_per_step": round(median_cpu(times) / steps * 1e3, 4),
            "over_plain": round(over_plain, 3),
        }
        for name, times, over_plain in (("plain", pairs.plain, 1.0), ("lightning", pairs.lightning, ratio))
    ]
    save_results("lightning_overhead", rows, arguments.results)


if __name__ == "__main__":
    main()
