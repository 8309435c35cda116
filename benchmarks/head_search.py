"""A search over 16 heads in one fit, against the fit of one head on the same cached features.

Four widths, two rates, one and two hidden layers, under `StructureFreezeCallback("heads.*")`, with the worse half
dropped after each validation until two are left; and, with `--all`, with all heads to the end. The one head has 512
units. CPU seconds of the whole fit.

    python benchmarks/head_search.py --data folder/with/npz
"""

import argparse
import os
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import seed_everything
from measuring import measure, quiet_trainer, save_results, use_one_thread

from glai_lightning import HeadSearchModule, mlp_head
from glai_lightning.callbacks import StructureFreezeCallback
from glai_lightning.datamodules import FeaturesDataModule

ROWS, TEST_ROWS, EPOCHS = 3000, 2000, 20
WIDTHS, RATES = (64, 128, 256, 512), (1e-3, 3e-3)


def search(features: int, classes: int) -> tuple[dict[str, torch.nn.Module], dict[str, float]]:
    """Make the 16 heads, and their rates."""
    heads, rates = {}, {}
    for width in WIDTHS:
        for rate in RATES:
            for hidden in ([width], [width, width]):
                name = f"{len(hidden)}x{width}_{rate:g}".replace(".", "_")
                heads[name], rates[name] = mlp_head(features, hidden, classes), rate
    return heads, rates


def main() -> None:
    """Fit the one head and the searches in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("GLAI_DATA", "."), help="folder of .npz files")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--all", action="store_true", help="also with all heads to the end")
    arguments = parser.parse_args()
    use_one_thread()
    with np.load(Path(arguments.data) / "cifar10_resnet_features.npz") as archive:
        arrays = {name: archive[name][:ROWS] for name in ("x_train", "y_train")}
        arrays |= {name: archive[name][:TEST_ROWS] for name in ("x_test", "y_test")}
    features, classes = arrays["x_train"].shape[1], int(arrays["y_train"].max()) + 1
    rows: list[dict[str, object]] = []
    for seed in range(arguments.seeds):
        for heads, keep in ((1, None), (16, 2), (16, None))[: 3 if arguments.all else 2]:
            seed_everything(seed, verbose=False)
            made, rates = search(features, classes) if heads > 1 else ({"one": mlp_head(features, 512, classes)}, {})
            freeze = StructureFreezeCallback("heads.*", verbose=False)
            trainer = quiet_trainer(EPOCHS, freeze)
            data = FeaturesDataModule(arrays=arrays, batch_size=128, seed=seed)
            data.setup()
            with tempfile.TemporaryDirectory() as folder:
                optimizer = partial(torch.optim.AdamW, lr=1e-3, fused=True)
                file = str(Path(folder) / "best.ckpt")
                module = HeadSearchModule(made, rates=rates, keep=keep, optimizer=optimizer, to=file)
                seconds = measure(partial(trainer.fit, module, data))
            (tested,) = trainer.test(module, data, verbose=False)
            row = {"heads": heads, "keep": keep, "seed": seed, "epochs": trainer.current_epoch}
            row |= {"cpu_seconds": round(seconds.cpu, 3), "best": module.best}
            row |= {"val_score": round(max(module.scores.values()), 4), "test_score": round(tested["test/accuracy"], 4)}
            rows.append(row)
            print(row, flush=True)
    save_results("head_search", rows)


if __name__ == "__main__":
    main()
