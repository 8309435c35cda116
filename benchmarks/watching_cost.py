"""What StructureFreezeCallback costs while it watches, in CPU seconds of an epoch and in memory.

A plain LightningModule is fitted to Fashion-MNIST pixels (12,000 samples, D = 784, H = 512, C = 10, batch 128, AdamW),
with the callback in every second epoch, with tolerances that never settle, and without it in the others. An epoch is
timed from its start to the start of the next, logging to a CSV file included, without validation; once with
FeaturesDataModule's loader, which cuts whole batches out of memory, and once with PyTorch's own DataLoader of a
TensorDataset. At most 4 % more CPU seconds are expected; the check of churn, and the two matrix products that are the
least it can take, are timed by themselves, too.

Memory: what a ``ChurnProbe`` holds on to beyond the head itself, counted over the storages of its tensors (at most
H * D * 4 + (probe_size + batch) * D * 4 bytes plus 2 MB), what the process grows by to hold it, and what a check takes
for a moment.
"""

import argparse
import gc
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from measuring import (
    RESULTS,
    Seconds,
    measure,
    median_cpu,
    median_ratio,
    median_wall,
    save_results,
    use_one_thread,
)
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from glai_lightning import ChurnProbe, mlp_head
from glai_lightning.callbacks import StructureFreezeCallback
from glai_lightning.datamodules import FeaturesDataModule

FEATURES, HIDDEN, CLASSES, BATCH, PROBE = 784, 512, 10, 128, 1024


class PixelClassifier(LightningModule):
    """A module as anybody writes it, which knows nothing of structure."""

    def __init__(self) -> None:
        super().__init__()
        self.head = mlp_head(FEATURES, HIDDEN, CLASSES)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy of a batch."""
        x, y = batch
        return F.cross_entropy(self.head(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW with its defaults."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class AlternateEpochs(Callback):
    """Lets a callback take part in every second epoch of a fit, and times all of them.

    Neighbouring epochs of one process meet the same disturbances, which epochs of different fits do not. The order of
    the two changes from pair to pair, so that neither side always comes first.
    """

    def __init__(self, watching: StructureFreezeCallback) -> None:
        self.watching = watching
        self.times: dict[bool, list[Seconds]] = {False: [], True: []}
        self._start: Seconds | None = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the time of the epoch that ended, and let the callback in or out for the next."""
        now = Seconds(time.process_time(), time.perf_counter())
        epoch = trainer.current_epoch
        # The first four warm up.
        if self._start is not None and epoch > 4:
            self.times[watches_in(epoch - 1)].append(Seconds(now.cpu - self._start.cpu, now.wall - self._start.wall))
        self.watching.teardown(trainer, pl_module, "fit")
        trainer.callbacks[:] = [self]
        if watches_in(epoch):
            trainer.callbacks.append(self.watching)
            self.watching.on_train_start(trainer, pl_module)
        self._start = Seconds(time.process_time(), time.perf_counter())


def watches_in(epoch: int) -> bool:
    return epoch % 4 in (0, 3)


def watching_rows(
    loader_name: str, train_dataloader: Callable[[], Iterable[list[Tensor]]], pairs: int
) -> list[dict[str, object]]:
    """Fit once and compare the epochs with the callback and those without, pair by pair."""
    seed_everything(0, verbose=False)
    # The structure never settles before its least number of epochs, and churn of 0 is not to be had.
    never = StructureFreezeCallback(
        "head", churn_tolerance=0.0, min_epochs=2 * pairs + 10, probe_size=PROBE, verbose=False
    )
    alternate = AlternateEpochs(never)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_epochs=2 * pairs + 5,
            accelerator="cpu",
            callbacks=[alternate, never],
            logger=CSVLogger(folder),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(PixelClassifier(), train_dataloader())
    watched, plain = alternate.times[True], alternate.times[False]
    return [
        row(f"{loader_name}: epoch without the callback", median_cpu(plain), "CPU s"),
        row(f"{loader_name}: epoch with the callback", median_cpu(watched), "CPU s"),
        row(f"{loader_name}: epoch without the callback, wall-clock", median_wall(plain), "s"),
        row(f"{loader_name}: epoch with the callback, wall-clock", median_wall(watched), "s"),
        row(f"{loader_name}: the callback, of an epoch", median_ratio(watched, plain) - 1, "", "at most 0.04"),
        row(f"{loader_name}: the callback, of an epoch (means)", mean_cpu(watched) / mean_cpu(plain) - 1, ""),
    ]


def mean_cpu(times: list[Seconds]) -> float:
    return statistics.fmean(seconds.cpu for seconds in times)


def row(quantity: str, value: float, unit: str, expected: str = "") -> dict[str, object]:
    return {"quantity": quantity, "value": round(value, 5), "unit": unit, "expected": expected}


def filled_probe(x: Tensor) -> ChurnProbe:
    """Return a probe of a head that moved, right before a check: as full as it gets."""
    head = mlp_head(FEATURES, HIDDEN, CLASSES)
    probe = ChurnProbe(head, PROBE)
    feed(probe, x)
    return probe


def feed(probe: ChurnProbe, x: Tensor) -> None:
    """Train the probe's head as far as the probe can see: other weights, and batches in training mode."""
    with torch.no_grad():
        probe.head[0].weight.add_(torch.randn_like(probe.head[0].weight), alpha=1e-3)
    # Copies, as batches cut out by index are; a last batch that leaves the oldest one needed in part.
    for rows in (*x[: PROBE + BATCH - 2].split(BATCH), x[:1]):
        probe.head(rows.clone())


def check_rows(x: Tensor, repeats: int) -> list[dict[str, object]]:
    probe = filled_probe(x)
    head, optimizer = probe.head, torch.optim.AdamW(probe.head.parameters(), lr=1e-3)
    y = torch.zeros(BATCH, dtype=torch.int64)
    checks: list[Seconds] = []

    def step() -> None:
        F.cross_entropy(head(x[:BATCH]), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    def two_products() -> None:
        with torch.no_grad():
            for layer in (head[0], head[0]):
                layer(x[:PROBE])

    products: list[Seconds] = []
    steps: list[Seconds] = []
    for _ in range(repeats):
        feed(probe, x)
        checks.append(measure(probe.measure))
        head.eval()
        products.append(measure(two_products))
        steps += [measure(step) for _ in range(10)]
        head.train()
    probe.close()
    batches = -(-len(x) // BATCH)
    return [
        row("a check of churn", median_cpu(checks) * 1e3, "CPU ms"),
        row("its two matrix products alone", median_cpu(products) * 1e3, "CPU ms"),
        row("a plain PyTorch step", median_cpu(steps) * 1e3, "CPU ms"),
        row("a check, of an epoch of plain PyTorch steps", median_cpu(checks) / (median_cpu(steps) * batches), ""),
    ]


def held_bytes(probe: ChurnProbe) -> int:
    """Count the bytes of the storages that a probe keeps alive and the head does not."""
    held = [*probe.snapshot.values(), *probe.inputs]
    of_head = {tensor.untyped_storage().data_ptr() for tensor in probe.head.state_dict().values()}
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}
    return sum(size for pointer, size in storages.items() if pointer not in of_head)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def memory_rows(x: Tensor) -> list[dict[str, object]]:
    step_like = mlp_head(FEATURES, HIDDEN, CLASSES)
    step_like(x[:BATCH].clone())
    del step_like
    gc.collect()
    before = resident_bytes()
    probes = [filled_probe(x) for _ in range(16)]
    heads = sum(p.untyped_storage().nbytes() for probe in probes for p in probe.head.parameters())
    grown = (resident_bytes() - before - heads) / len(probes)
    probe = probes[-1]
    held = held_bytes(probe)
    allowed = HIDDEN * FEATURES * 4 + (PROBE + BATCH) * FEATURES * 4 + 2 * 2**20
    return [
        row("held by the probe", held / 2**20, "MiB", f"at most {allowed / 2**20:.3f}"),
        row("resident memory for it", grown / 2**20, "MiB", f"at most {allowed / 2**20:.3f}"),
        row("a check's own peak, allocated", peak_of_check(probe) / 2**20, "MiB"),
    ]


def peak_of_check(probe: ChurnProbe) -> int:
    """Return the most bytes that a check has allocated at once, net of what it frees before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        probe.measure()
    return max(running_totals(profiler))


def running_totals(profiler: torch.profiler.profile) -> Iterator[int]:
    """Yield the bytes allocated since the start after every allocation and release."""
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    memory = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = 0
    for event in sorted(memory, key=lambda event: event.start_ns()):
        total += event.nbytes()
        yield total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=os.environ.get("GLAI_DATA"), help="fashion_mnist.npz; by default $GLAI_DATA"
    )
    parser.add_argument("--pairs", type=int, default=60, help="pairs of epochs with and without the callback")
    parser.add_argument("--repeats", type=int, default=101, help="checks timed by themselves")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV")
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("the data is needed: --data fashion_mnist.npz, or its path in GLAI_DATA")
    use_one_thread()
    warnings.filterwarnings("ignore", module="lightning")
    with np.load(arguments.data) as archive:
        arrays = {key: archive[key] for key in ("x_train", "y_train", "x_test", "y_test")}
    arrays |= {"x_val": arrays["x_test"], "y_val": arrays["y_test"]}
    data = FeaturesDataModule(arrays=arrays, batch_size=BATCH)
    x, _ = data.splits.train
    rows = memory_rows(x) + check_rows(x, arguments.repeats)
    rows += watching_rows("FeaturesDataModule", data.train_dataloader, arguments.pairs)
    samples = TensorDataset(*data.splits.train)
    rows += watching_rows("DataLoader", lambda: DataLoader(samples, BATCH, shuffle=True), arguments.pairs)
    save_results("watching_cost", rows, arguments.results)


if __name__ == "__main__":
    main()
