"""Draws the picture of README and of the site: which units fire on the letters, how flips die out, and the race.

The head and the data are those of ``glai demo`` (16-512-26, AdamW 1e-3, batches of 128, one seed, one thread). The head
is fitted as in the demo, never frozen and then by ``StructureFreezeCallback``; the patterns are those of the first fit.
What the lower half is drawn from is written to ``results/``.

    python benchmarks/which_units_fire.py
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping
from matplotlib.colors import ListedColormap
from measuring import RESULTS, quiet_trainer, save_results, use_one_thread

from glai_lightning import SupervisedModule, activation_patterns, mlp_head
from glai_lightning.callbacks import StructureFreezeCallback
from glai_lightning.datamodules import LetterDataModule

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PICTURE = Path(__file__).parent.parent / "docs" / "which_units_fire.png"
#: Colours, and where the last score stands beside its point.
SIDES = {"never frozen": ("C0", (0, -14)), "frozen and solved": ("C1", (24, -3))}
#: Epochs whose patterns are drawn, and of how many letters and units.
SHOWN, LETTERS, UNITS = (1, 2, 5, 15), 40, 110
PROBED = 1024


class Recorder(Callback):
    """Keeps accuracy and CPU seconds after each epoch, and the patterns of some validation rows."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.patterns: list[torch.Tensor] = []
        self._start = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the patterns before the first step, and start the clock."""
        self._look(trainer, pl_module)
        self._start = time.process_time()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the state after an epoch; looking does not count."""
        seconds = time.process_time() - self._start
        self._look(trainer, pl_module)
        churn = (self.patterns[-1] != self.patterns[-2]).float().mean().item()
        accuracy = trainer.callback_metrics["val/accuracy"].item()
        row = {"epoch": len(self.rows) + 1, "cpu_seconds": f"{seconds:.3f}", "val_accuracy": f"{accuracy:.4f}"}
        self.rows.append({**row, "churn": f"{churn:.4f}"})
        self._start = time.process_time() - seconds

    def _look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        inputs = torch.cat([batch[0] for batch in trainer.datamodule.val_dataloader()])[:PROBED]  # type: ignore[attr-defined]
        self.patterns.append(activation_patterns(pl_module.head, inputs)[0])  # type: ignore[arg-type]


def fit(side: str, callback: Callback, max_epochs: int) -> tuple[list[dict[str, Any]], list[torch.Tensor]]:
    """Fit the demo's head, and return what was noted after each epoch."""
    seed_everything(0, workers=True, verbose=False)
    data, recorder = LetterDataModule(batch_size=128, seed=0), Recorder()
    trainer = quiet_trainer(max_epochs, callback, recorder)
    trainer.fit(SupervisedModule(mlp_head(16, 512, 26)), data)
    return [{"side": side, **row} for row in recorder.rows], recorder.patterns


def draw(patterns: Sequence[torch.Tensor], rows: list[dict[str, str]], to: Path) -> None:
    """Draw patterns after some epochs, with the bits that flipped in them; churn; and accuracy over seconds."""
    plt.rcParams.update({"font.size": 9, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure = plt.figure(figsize=(9.6, 5.0), layout="constrained")
    grid = figure.add_gridspec(2, 4, height_ratios=(1, 1.05))
    colours = ListedColormap(["#f1f3f4", "#b9cbb9", "#d1242f"])
    order = np.argsort(-patterns[-1][:LETTERS].float().mean(0).numpy())[:: patterns[-1].shape[1] // UNITS][:UNITS]
    for column, epoch in enumerate(SHOWN):
        axes = figure.add_subplot(grid[0, column])
        now, before = (patterns[n][:LETTERS].numpy()[:, order] for n in (epoch, epoch - 1))
        axes.imshow(
            np.where(now != before, 2, now), cmap=colours, vmin=0, vmax=2, aspect="auto", interpolation="nearest"
        )
        flipped = (patterns[epoch] != patterns[epoch - 1]).float().mean().item()
        axes.set(
            xticks=[], yticks=[], title=f"epoch {epoch}: {100 * flipped:.1f} % flipped", xlabel=f"{UNITS} of 512 units"
        )
        if column == 0:
            axes.set_ylabel(f"{LETTERS} letters")
    churn, race = figure.add_subplot(grid[1, :2]), figure.add_subplot(grid[1, 2:])
    never = [row for row in rows if row["side"] == "never frozen"]
    churn.plot([int(row["epoch"]) for row in never], [100 * float(row["churn"]) for row in never], marker=".")
    churn.set(xlabel="epoch", ylim=(0, None), title="Churn: pattern bits that flipped in the epoch, %")
    for side, (colour, offset) in SIDES.items():
        points = [(float(row["cpu_seconds"]), 100 * float(row["val_accuracy"])) for row in rows if row["side"] == side]
        race.plot(*zip(*points, strict=True), marker=".", color=colour, label=side)
        race.annotate(f"{points[-1][1]:.1f} %", points[-1], textcoords="offset points", xytext=offset, ha="center")
    race.set(xlabel="CPU seconds", title="The race of `glai demo`: validation accuracy, %")
    race.legend(frameon=False, loc="lower right")
    figure.savefig(to, dpi=110, pil_kwargs={"optimize": True})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV file")
    parser.add_argument("--max-epochs", type=int, default=100)
    parser.add_argument("--to", type=Path, default=PICTURE)
    arguments = parser.parse_args()
    use_one_thread()
    stopping = EarlyStopping("val/accuracy", mode="max", patience=3)
    rows, patterns = fit("never frozen", stopping, arguments.max_epochs)
    rows += fit("frozen and solved", StructureFreezeCallback("head"), arguments.max_epochs)[0]
    save_results("demo_race", rows, arguments.results)
    draw(patterns, rows, arguments.to)
    print(f"Written to {arguments.to}")


if __name__ == "__main__":
    main()
