"""Measuring on a machine that others use too: interleaved repeats, process CPU seconds, medians."""

import csv
import os
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer

from glai_lightning.comparison import Comparison
from glai_lightning.comparison.machine import processor_name

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Seconds:
    """What a piece of work took: CPU seconds of this process, all its threads together, and wall-clock seconds."""

    cpu: float
    wall: float


def measure(work: Callable[[], object]) -> Seconds:
    """Time one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Seconds(time.process_time() - cpu, time.perf_counter() - wall)


def interleave(
    candidates: Mapping[str, Callable[[], object]], repeats: int, warmups: int = 3
) -> dict[str, list[Seconds]]:
    """Time candidates in turn, round after round, so that a disturbance meets all of them alike.

    Args:
        candidates: what to time, by name.
        repeats: rounds that count.
        warmups: rounds before these.

    Returns:
        The times of each candidate, one a round.
    """
    times: dict[str, list[Seconds]] = {name: [] for name in candidates}
    names = list(candidates)
    for turn in range(warmups + repeats):
        # In another order every time: what runs after a neighbour finds that neighbour's data in the caches.
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds = measure(candidates[name])
            if turn >= warmups:
                times[name].append(seconds)
    return times


def median_cpu(times: Sequence[Seconds]) -> float:
    """Return the median of the CPU seconds."""
    return statistics.median(seconds.cpu for seconds in times)


def median_wall(times: Sequence[Seconds]) -> float:
    """Return the median of the wall-clock seconds."""
    return statistics.median(seconds.wall for seconds in times)


def median_ratio(numerator: Sequence[Seconds], denominator: Sequence[Seconds]) -> float:
    """Return the median over rounds of the ratio of CPU seconds: both sides of each ratio ran side by side."""
    return statistics.median(above.cpu / below.cpu for above, below in zip(numerator, denominator, strict=True))


def machine() -> str:
    """Name the hardware for a file name: number and model of the processors."""
    return f"{os.cpu_count()}x{re.sub(r'[^A-Za-z0-9.]+', '-', processor_name()).strip('-')}"


def use_one_thread() -> None:
    """Let PyTorch compute on one thread: with several, CPU seconds count threads that wait, too."""
    torch.set_num_threads(1)


def quiet_trainer(epochs: int, *callbacks: Callback) -> Trainer:
    """Make a Trainer on the CPU that does nothing but fit and validate."""
    return Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


def save_results(benchmark: str, rows: Sequence[Mapping[str, object]], folder: Path = RESULTS) -> Path:
    """Print rows and write them as ``<benchmark>_<hardware>.csv``.

    Args:
        benchmark: name of the benchmark.
        rows: results, all with the same columns; PyTorch's version is added.
        folder: where to write.

    Returns:
        The file written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{benchmark}_{machine()}.csv"
    versioned = [{**row, "torch": torch.__version__} for row in rows]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(versioned[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(versioned)
    for row in rows:
        print("  ".join(f"{column}={value}" for column, value in row.items()))
    print(f"Written to {path}")
    return path


def comparison_rows(comparison: Comparison) -> list[dict[str, object]]:
    """Return the runs of a comparison as rows, without their epochs."""
    rows = []
    for run in comparison.runs:
        entries = run.as_dict()
        flat = {"variant": run.variant, "seed": run.seed, **entries["parameters"], "epochs": run.num_epochs}
        flat |= {name: value for name, value in entries.items() if isinstance(value, int | float)}
        flat |= {name: entries[name] for name in ("test_score", "best_val_score", "freeze_epoch")}
        rows.append({name: float(f"{v:.6g}") if isinstance(v, float) else v for name, v in flat.items()})
    columns = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in columns} for row in rows]
