"""What `one_pass` adds to the first epoch, what it holds, and how fast cached features are read.

The first epoch of a fit with what the head is given kept and without, between its second batch and its last: CPU
seconds, in turn, with a frozen backbone of 118 times the multiply-adds. Memory of the process at the last batch,
in a process of its own for each: in memory, and spilled to a file (of which mapped pages can be given back at any time,
and do not count). Cached features are read as in an epoch, memory-mapped.

    python benchmarks/one_pass_cost.py
"""

import argparse
import re
import statistics
import tempfile
import time
from multiprocessing import get_context
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, seed_everything
from measuring import quiet_trainer, save_results, use_one_thread
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from glai_lightning import SupervisedModule, mlp_head
from glai_lightning.callbacks import StructureFreezeCallback
from glai_lightning.datamodules import FeaturesDataModule
from glai_lightning.fitting import head_data, kept_inputs

FEATURES, CLASSES = 512, 10


class Clock(Callback):
    """Notes CPU seconds, and bytes that the process holds for itself, at the start of each batch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.held = 0

    def on_train_batch_start(self, *_: Any) -> None:
        """Take note."""
        self.seconds.append(time.process_time())
        status = Path("/proc/self/status").read_text()
        self.held = 1024 * int(re.search(r"RssAnon:\s+(\d+)", status).group(1))  # type: ignore[union-attr]


def first_epoch(rows: int, layers: int, *, one_pass: bool, limit: int = 2**30) -> Clock:
    """Train one epoch of which what the head is given is kept, or not."""
    head_data.INPUTS_IN_MEMORY = kept_inputs.INPUTS_IN_MEMORY = limit
    seed_everything(0, verbose=False)
    wide = [nn.Linear(FEATURES, FEATURES) for _ in range(layers)]
    module = SupervisedModule(mlp_head(FEATURES, 128, CLASSES), nn.Sequential(nn.Linear(16, FEATURES), *wide))
    clock, options = Clock(), {"one_pass": True} if one_pass else {"solver": None}
    trainer = quiet_trainer(1, clock, StructureFreezeCallback(**options, freeze_at_epoch=1, verbose=False))
    trainer.fit(module, DataLoader(TensorDataset(torch.randn(rows, 16), torch.arange(rows) % CLASSES), 128))
    return clock


def held(rows: int, options: dict[str, Any], to: "Queue[int]") -> None:
    """Put what a process holds at the last batch of the first epoch into a queue."""
    use_one_thread()
    to.put(first_epoch(rows, 0, **options).held)


def memory(rows: int) -> list[dict[str, object]]:
    """Compare what processes hold."""
    context, bytes_held = get_context("spawn"), []
    sides = ({"one_pass": False}, {"one_pass": True}, {"one_pass": True, "limit": 2**20})
    for options in sides:
        queue: Queue[int] = context.Queue()
        process = context.Process(target=held, args=(rows, options, queue))
        process.start()
        bytes_held.append(queue.get())
        process.join()
    kept = rows * (FEATURES * 4 + 8)
    names = ("kept in memory", "kept in a file")
    return [
        {"measured": name, "value": round((more - bytes_held[0]) / 1e6, 1), "unit": "MB", "limit": limit}
        for name, more, limit in zip(names, bytes_held[1:], (round(kept / 1e6 + 10, 1), 256), strict=True)
    ]


def added(rows: int, rounds: int) -> dict[str, object]:
    """Compare seconds of the first epoch, in turn."""
    ratios = []
    for _ in range(rounds):
        without, with_it = (first_epoch(rows, 30, one_pass=one_pass).seconds for one_pass in (False, True))
        ratios.append((with_it[-1] - with_it[1]) / (without[-1] - without[1]))
    more = round(100 * (statistics.median(ratios) - 1), 1)
    return {"measured": "added to the first epoch", "value": more, "unit": "%", "limit": 2}


def reading(rows: int) -> dict[str, object]:
    """Read memory-mapped features batch by batch."""
    with tempfile.TemporaryDirectory() as folder:
        for split, count in (("train", rows), ("val", 256), ("test", 256)):
            np.save(Path(folder) / f"x_{split}.npy", np.random.default_rng(0).random((count, FEATURES), np.float32))
            np.save(Path(folder) / f"y_{split}.npy", np.arange(count) % CLASSES)
        data = FeaturesDataModule(folder, batch_size=256, standardise=False)
        loader = data.train_dataloader()
        list(loader)
        started = time.process_time()
        read = sum(inputs.nbytes for inputs, _ in loader)
        rate = read / (time.process_time() - started) / 1e9
    return {"measured": "cached features read", "value": round(rate, 2), "unit": "GB a CPU second", "limit": 1}


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    use_one_thread()
    save_results("one_pass_cost", [added(1536, 5), *memory(30_000), reading(400_000)])
