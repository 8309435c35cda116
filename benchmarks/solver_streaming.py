"""Memory of a logistic solve over features that are generated batch by batch and never held.

Prints, and writes to a CSV, the peak resident memory of the whole process, imports included.
"""

import argparse
import csv
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from measuring import RESULTS, machine
from torch import Tensor

from glai_lightning.solvers import LogisticSolver


class GeneratedFeatures:
    """Batches of features (n, F) like the activations of a ReLU layer, and labels (n,), the same in every pass."""

    def __init__(self, samples: int, num_features: int, classes: int, batch_size: int, seed: int) -> None:
        self.samples = samples
        self.batch_size = batch_size
        self.seed = seed
        generator = torch.Generator().manual_seed(seed)
        self.mixing = torch.randn(64, num_features, generator=generator) / 8.0
        self.centers = torch.randn(classes, 64, generator=generator)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed + 1)
        for start in range(0, self.samples, self.batch_size):
            size = min(self.batch_size, self.samples - start)
            labels = torch.randint(len(self.centers), (size,), generator=generator)
            latent = self.centers[labels] + 2.0 * torch.randn(size, 64, generator=generator)
            yield (latent @ self.mixing).relu_(), labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--max-passes", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS / f"solver_streaming_{machine()}.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    batches = GeneratedFeatures(
        arguments.samples, arguments.features, arguments.classes, arguments.batch_size, arguments.seed
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cpu_seconds = time.process_time()
    weight, bias = torch.zeros(arguments.classes, arguments.features), torch.zeros(arguments.classes)
    solver = LogisticSolver(l2=1e-3, max_passes=arguments.max_passes)
    report = solver.solve_features(batches, weight=weight, bias=bias).report
    row = {
        "samples": arguments.samples,
        "features": arguments.features,
        "classes": arguments.classes,
        "batch_size": arguments.batch_size,
        "passes": report.passes,
        "reason": report.reason,
        "start_loss": round(report.start_loss, 5),
        "loss": round(report.loss, 5),
        "gradient_norm": f"{report.gradient_norm:.3e}",
        "seconds": round(report.seconds, 1),
        "cpu_seconds": round(time.process_time() - cpu_seconds, 1),
        "memory_before_mb": before // 1024,
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "cpus": os.cpu_count(),
    }
    with arguments.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(row))
        writer.writeheader()
        writer.writerow(row)
    print("\n".join(f"{key}: {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
