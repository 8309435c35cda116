"""How time grows with samples, hidden units, classes and processes, and how counted multiply-adds do.

Timed in turn, on generated data: a training step of the MLP, the step of the same head frozen with output paths, and
the solve from zero for one strength in six passes, by the method that the solver chooses. Each size grows alone, the
others stay at N = 20,000, D = 256, H = 512, C = 10:

- samples N from 1,000 to 1,000,000, streamed: an epoch of steps, and the solve over batches of inputs, whose path
  activations are computed anew in every pass. The rows are those of one block, again and again, so that neither
  memory nor a generator is what is measured;
- hidden units H from 64 to 4,096 and classes C from 2 to 1,000: a step, and the solve over inputs that are held;
- processes (1, 2, 4, gloo): the steps under DistributedDataParallel (256 rows altogether) and the solve over the group,
  of the same samples altogether: the CPU seconds of the process that takes most, and wall-clock seconds, for which
  processes share the cores.

Counted are the products of the definitions alone: D H N for inner layers and H C N for the last one, forward; twice
as much for a layer's gradient of weights and activations (no activations for the first); and for quasi-Newton steps
the covariance of a sample, its factor and its inverse.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
import torch.distributed as dist
import torch.nn.functional as F
from measuring import (
    RESULTS,
    Seconds,
    interleave,
    machine,
    measure,
    median_cpu,
    median_wall,
    save_results,
    use_one_thread,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from glai_lightning import freeze_structure, mlp_head
from glai_lightning.solvers import LogisticSolver
from glai_lightning.solvers.feature_batches import Batches

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SAMPLES, INPUTS, HIDDEN, CLASSES = 20_000, 256, 512, 10
SWEEPS: dict[str, tuple[int, ...]] = {
    "N": (1_000, 10_000, 100_000, 1_000_000),
    "H": (64, 128, 256, 512, 1024, 2048, 4096),
    "C": (2, 10, 32, 100, 320, 1000),
}
PROCESSES = (1, 2, 4)
COLORS = ("tab:blue", "tab:orange", "tab:green")
BATCH = 256
SOLVER = LogisticSolver(l2=1e-3, max_passes=6, tolerance=0.0)
BLOCK = 8192

Work = Callable[[], None]


@dataclass(frozen=True)
class Size:
    """Samples, inputs, hidden units and classes."""

    N: int = SAMPLES
    D: int = INPUTS
    H: int = HIDDEN
    C: int = CLASSES

    def counted(self) -> dict[str, float]:
        """Return the multiply-adds of an epoch of steps, and of the solves over path activations."""
        inner, outer = self.D * self.H, self.H * self.C
        sampled = min(self.N, max(1024, 4 * self.H))
        return {
            "MLP": self.N * (2 * inner + 3 * outer),
            "frozen": self.N * (inner + 2 * outer),
            "solve": SOLVER.max_passes * 2 * self.N * outer + sampled * self.H**2 + self.H**3,
        }


class RepeatedRows:
    """Batches of so many rows altogether, cut from one block again and again."""

    def __init__(self, x: Tensor, y: Tensor, samples: int, rows: int) -> None:
        self.x, self.y, self.samples, self.rows = x, y, samples, rows

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        left = self.samples
        while left > 0:
            for x, y in zip(self.x.split(self.rows), self.y.split(self.rows), strict=True):
                yield x[:left], y[:left]
                left -= len(x)
                if left <= 0:
                    return


def rows_of(size: Size, samples: int) -> tuple[Tensor, Tensor]:
    """Return inputs and labels of clusters that overlap."""
    y = torch.arange(samples) % size.C
    centers = torch.randn(size.C, size.D)
    return centers[y] + 4.0 * torch.randn(samples, size.D), y


def train(head: nn.Module, batches: RepeatedRows) -> Work:
    """Return a function that trains a head for one epoch."""
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-5, fused=True)

    def epoch() -> None:
        for x, y in batches:
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(head(x), y).backward()
            optimizer.step()

    return epoch


def solve(mlp: nn.Module, data: tuple[Batches | Tensor, Tensor | None], **group: object) -> Work:
    """Return a function that solves a frozen copy of a head from zero."""
    head = freeze_structure(mlp)

    def run() -> None:
        nn.init.zeros_(head[-1].weight)
        nn.init.zeros_(head[-1].bias)
        SOLVER.solve(head, *data, **group)

    return run


def titled(work: str) -> str:
    return work if work == "solve" else f"{work} epoch"


def measure_size(sweep: str, size: Size, repeats: int) -> list[dict[str, object]]:
    """Time an epoch of steps and the solve at one size."""
    torch.manual_seed(0)
    streamed = sweep == "N"
    x, y = rows_of(size, BLOCK if streamed else size.N)
    # Steps that are all alike: no more of them than it takes to time one.
    stepped = size.N if streamed else min(size.N, 10 * BATCH)
    mlp = mlp_head(size.D, size.H, size.C)
    steps = RepeatedRows(x, y, stepped, BATCH)
    work = {"MLP": train(mlp, steps), "frozen": train(freeze_structure(mlp), steps)}
    work["solve"] = solve(mlp, (RepeatedRows(x, y, size.N, 1024), None) if streamed else (x, y))
    times = interleave(work, repeats, warmups=int(repeats > 1))
    counted = size.counted()
    # Activations are computed once for rows that are held, and in every pass for rows that are streamed.
    counted["solve"] += (SOLVER.max_passes if streamed else 1) * size.N * size.D * size.H
    rows: list[dict[str, object]] = []
    for name, taken in times.items():
        part = 1.0 if name == "solve" else size.N / stepped
        seconds = part * median_cpu(taken)
        rows.append(
            {
                "sweep": sweep,
                "N": size.N,
                "D": size.D,
                "H": size.H,
                "C": size.C,
                "processes": 1,
                "work": titled(name),
                "cpu_seconds": round(seconds, 5),
                "wall_seconds": round(part * median_wall(taken), 5),
                "giga_multiply_adds": round(counted[name] / 1e9, 4),
                "giga_multiply_adds_per_second": round(counted[name] / seconds / 1e9, 2),
            }
        )
    return rows


def work_in_process(rank: int, world: int, meeting: str, repeats: int, times: object) -> None:
    """Do this process's share of each piece of work; the first reports what it takes the slowest."""
    use_one_thread()
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    torch.manual_seed(0)
    size = Size()
    x, y = (rows[rank::world].clone() for rows in rows_of(size, size.N))
    mlp = mlp_head(size.D, size.H, size.C)
    batches = RepeatedRows(x, y, len(x), BATCH // world)
    work = {
        "MLP": train(DistributedDataParallel(mlp), batches),
        "frozen": train(DistributedDataParallel(freeze_structure(mlp)), batches),
        "solve": solve(mlp, (x, y), group=dist.group.WORLD),
    }
    for name, run in work.items():
        taken = []
        for _ in range(repeats + 1):
            dist.barrier()
            seconds = measure(run)
            slowest = torch.tensor([seconds.cpu, seconds.wall])
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            taken.append(Seconds(*slowest.tolist()))
        if rank == 0:
            times.put((name, median_cpu(taken[1:]), median_wall(taken[1:])))
    dist.destroy_process_group()


def measure_processes(repeats: int) -> list[dict[str, object]]:
    """Time work that is shared by several processes."""
    # Forked, for an interpreter that imports everything anew takes longer than what is measured.
    context = torch.multiprocessing.get_context("fork")
    size = Size()
    counted = size.counted()
    counted["solve"] += size.N * size.D * size.H
    rows: list[dict[str, object]] = []
    for world in PROCESSES:
        times = context.Queue()
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.start_processes(
                work_in_process,
                (world, str(Path(folder) / "meeting"), repeats, times),
                nprocs=world,
                start_method="fork",
            )
        for _ in counted:
            name, cpu, wall = times.get()
            rows.append(
                {
                    "sweep": "processes",
                    "N": size.N,
                    "D": size.D,
                    "H": size.H,
                    "C": size.C,
                    "processes": world,
                    "work": titled(name),
                    "cpu_seconds": round(cpu, 5),
                    "wall_seconds": round(wall, 5),
                    # A share of the samples; the covariance of quasi-Newton steps is shared, its factor is not.
                    "giga_multiply_adds": round(counted[name] / world / 1e9, 4),
                    "giga_multiply_adds_per_second": round(counted[name] / world / cpu / 1e9, 2),
                }
            )
    return rows


def plot(rows: list[dict[str, object]], path: Path) -> None:
    """Draw seconds, and counted multiply-adds at the best speed of the sweep, against each of the four."""
    titles = {"N": "samples (streamed)", "H": "hidden units", "C": "classes", "processes": "processes (of each)"}
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.4), layout="constrained")
    for axis, (sweep, title) in zip(axes, titles.items(), strict=True):
        for color, work in zip(COLORS, map(titled, ("MLP", "frozen", "solve")), strict=True):
            chosen = [row for row in rows if row["sweep"] == sweep and row["work"] == work]
            at = [row[sweep] for row in chosen]
            axis.plot(at, [row["cpu_seconds"] for row in chosen], "o-", color=color, label=work, markersize=4)
            fastest = max(row["giga_multiply_adds_per_second"] for row in chosen)
            axis.plot(at, [row["giga_multiply_adds"] / fastest for row in chosen], ":", color=color)
        axis.set(xscale="log", yscale="log", xlabel=title)
        axis.grid(alpha=0.3)
    axes[3].set_xticks(PROCESSES, PROCESSES)
    axes[3].minorticks_off()
    axes[0].set_ylabel("CPU seconds (dotted: as counted)")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="rounds, of which the medians are taken")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV and the plot")
    arguments = parser.parse_args()
    use_one_thread()
    rows: list[dict[str, object]] = []
    for sweep, values in SWEEPS.items():
        for value in values:
            size = Size(**{sweep: value})
            # One round is enough where it takes many seconds.
            repeats = 1 if sum(size.counted().values()) > 3e11 else arguments.repeats
            rows += measure_size(sweep, size, repeats)
    rows += measure_processes(arguments.repeats)
    save_results("scaling", rows, arguments.results)
    plot(rows, arguments.results / f"scaling_{machine()}.png")


if __name__ == "__main__":
    main()
