"""Does freezing cost accuracy? Five seeds of the supervised recipe, frozen by its own rule, against never frozen.

    python benchmarks/digits_frozen_vs_never.py

Both sides have the same configuration (recipes/supervised.yaml), initial weights, split and batches; they are run in
turn. The test accuracy is that of the checkpoint with the best validation accuracy, as after `glai fit`. Seeds change
the weights, the order of the batches and the validation rows; the 360 test rows are the same for all.
"""

import argparse
import copy
import csv
import logging
import os
import platform
import tempfile
import time
import warnings
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import yaml
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningCLI

from glai_lightning.callbacks import StructureFreezeCallback

REPOSITORY = Path(__file__).resolve().parent.parent
RECIPE = REPOSITORY / "recipes" / "supervised.yaml"
FREEZE = "glai_lightning.callbacks.StructureFreezeCallback"
REPORT = "glai_lightning.callbacks.FitReport"


def hardware_name() -> str:
    """Return cores and processor, such as '2xAMD-EPYC'."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.split(":", 1)[1] for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = models[0] if models else name
    return f"{os.cpu_count()}x{'-'.join(name.split()[:2])}"


def configuration(seed: int, frozen: bool, folder: str) -> dict[str, Any]:
    """Return the recipe's configuration, without loggers, and without the freeze if it is not wanted."""
    config = copy.deepcopy(yaml.safe_load(RECIPE.read_text()))
    config["seed_everything"] = seed
    config["data"]["init_args"]["seed"] = seed
    unwanted = {REPORT} if frozen else {REPORT, FREEZE}
    callbacks = [callback for callback in config["trainer"]["callbacks"] if callback["class_path"] not in unwanted]
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    config["trainer"] |= {"callbacks": callbacks, "accelerator": "cpu", "default_root_dir": folder, **quiet}
    return config


def fit(seed: int, frozen: bool) -> dict[str, Any]:
    """Fit once, test the best checkpoint, and return a row of results."""
    with tempfile.TemporaryDirectory() as folder:
        cli = LightningCLI(
            LightningModule,
            subclass_mode_model=True,
            save_config_callback=None,
            run=False,
            args=configuration(seed, frozen, folder),
        )
        start = time.process_time()
        cli.trainer.fit(cli.model, cli.datamodule)
        seconds = time.process_time() - start
        checkpoint = cli.trainer.checkpoint_callback
        (scores,) = cli.trainer.test(cli.model, cli.datamodule, ckpt_path=checkpoint.best_model_path, verbose=False)
        freezes = [callback for callback in cli.trainer.callbacks if isinstance(callback, StructureFreezeCallback)]
    return {
        "variant": "frozen" if frozen else "never frozen",
        "seed": seed,
        "freeze_epoch": freezes[0].freeze_epoch if freezes else "",
        "epochs": cli.trainer.max_epochs,
        "val_accuracy": f"{float(checkpoint.best_model_score):.4f}",
        "test_accuracy": f"{scores['test/accuracy']:.4f}",
        "fit_cpu_seconds": f"{seconds:.2f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--to", type=Path, default=REPOSITORY / "benchmarks" / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    rows = []
    for seed in range(options.seeds):
        for frozen in (True, False):
            rows.append(fit(seed, frozen))
            print(*rows[-1].values(), sep="\t", flush=True)

    options.to.mkdir(parents=True, exist_ok=True)
    path = options.to / f"digits_frozen_vs_never_{hardware_name()}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)

    for score in ("val_accuracy", "test_accuracy"):
        means = {
            variant: 100 * mean(float(row[score]) for row in rows if row["variant"] == variant)
            for variant in ("frozen", "never frozen")
        }
        print(
            f"{score}: frozen {means['frozen']:.2f} %, never frozen {means['never frozen']:.2f} %, "
            f"difference {means['frozen'] - means['never frozen']:+.2f} points"
        )
    print(f"Written to {path}")


if __name__ == "__main__":
    main()
