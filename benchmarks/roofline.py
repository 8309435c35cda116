"""Achieved over possible: what training and solving make of this machine.

Two measures of the machine are taken in the same run, in turn with the work itself: multiply-adds a second of a large
square matrix product, and bytes a second of a copy too large for the caches. Work of so many multiply-adds that moves
so many bytes cannot be faster than the slower of the two allows: its roof. Counted are the products of the definition
alone (softmax, ReLU, the optimizer's arithmetic are not), and the bytes that are read or written at least once: rows,
weights, gradients, optimizer state, activations. What stays in a cache costs less than that, so that small work may
lie above the roof of memory.

- a step of the MLP, and of the same head frozen with output paths: forward, backward and fused AdamW, next batch;
- a pass of the solve: loss and gradient over path activations that are held, and the quasi-Newton step, as the
  difference between solves of six and of two passes; and the solve of six passes, preconditioner included;
- a check of churn on 1,024 inputs, as the callback makes it.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from measuring import RESULTS, interleave, median_cpu, save_results, use_one_thread
from step_cost import SIZES, make_steps

from glai_lightning import ChurnProbe, freeze_structure, mlp_head
from glai_lightning.solvers import LogisticSolver

PROBE_SIZE = 1024
SAMPLES = 8192
#: Edge of the machine's own product, and elements of the copy (256 MiB).
EDGE, COPIED = 2048, 2**26
BYTES = 4


@dataclass(frozen=True)
class Work:
    """Something to time, with the multiply-adds and the bytes that it takes."""

    run: Callable[[], object]
    multiply_adds: float
    bytes_moved: float


def machine_work() -> dict[str, Work]:
    """Return what the machine itself is measured by."""
    left, right = torch.randn(EDGE, EDGE), torch.randn(EDGE, EDGE)
    product = torch.empty(EDGE, EDGE)
    source, target = torch.zeros(COPIED), torch.zeros(COPIED)
    return {
        "matrix product": Work(lambda: torch.mm(left, right, out=product), EDGE**3, 3 * BYTES * EDGE**2),
        "copy": Work(lambda: target.copy_(source), 0, 2 * BYTES * COPIED),
    }


def head_work(size: tuple[int, int, int, int], steps: int) -> dict[str, Work]:
    """Return the work of training, watching and solving a head."""
    D, H, C, batch = size
    torch.manual_seed(0)
    batches = [(torch.randn(batch, D), torch.randint(C, (batch,))) for _ in range(4 * steps)]
    mlp = mlp_head(D, H, C)
    frozen = freeze_structure(mlp)
    inner, outer = D * H + H, H * C + C
    # Weights are read forward and backward, gradients written and read, both moments read and written.
    trained = 9 * BYTES
    rows = BYTES * batch * (D + 4 * H + 4 * C)

    probe = ChurnProbe(mlp, PROBE_SIZE)
    probed = [torch.randn(batch, D) for _ in range(-(-PROBE_SIZE // batch))]

    snapshot = dict(probe.snapshot)

    def check() -> None:
        for _ in range(steps):
            probe.resume(snapshot)
            for x in probed:
                probe._keep((x,), {})
            probe.measure()

    activations, labels = torch.randn(SAMPLES, H).relu_(), torch.randint(C, (SAMPLES,))
    weight, bias = torch.zeros(C, H), torch.zeros(C)

    def solve(passes: int) -> Callable[[], None]:
        def run() -> None:
            solver = LogisticSolver(l2=1e-3, tolerance=0.0, max_passes=passes)
            solution = solver.solve_features(activations, labels, weight=weight, bias=bias)
            assert solution.report.passes == passes

        return run

    # A covariance of a sample of 4 H rows or all, and its eigendecomposition, which takes the time of 13 products.
    sampled = min(SAMPLES, max(1024, 4 * H))
    preconditioner = sampled * H**2 + 13 * H**3
    one_pass = 2 * SAMPLES * H * C
    read = BYTES * SAMPLES * (H + 4 * C)
    return {
        "MLP step": Work(
            make_steps(mlp, batches, steps),
            steps * batch * (2 * D * H + 3 * H * C),
            steps * (rows + trained * (inner + outer)),
        ),
        "frozen step": Work(
            make_steps(frozen, batches, steps),
            steps * batch * (D * H + 2 * H * C),
            steps * (rows + BYTES * inner + trained * outer),
        ),
        "churn check": Work(
            check, steps * 2 * PROBE_SIZE * D * H, steps * BYTES * (PROBE_SIZE * (D + 2 * H) + 2 * inner)
        ),
        **{
            f"solve, {passes} passes": Work(
                solve(passes), passes * one_pass + preconditioner, passes * read + BYTES * (sampled * H + 4 * H**2)
            )
            for passes in (2, 6)
        },
    }


def measure_size(size: tuple[int, int, int, int], repeats: int, steps: int) -> list[dict[str, object]]:
    """Measure the machine and the work of one size in turn, and return a row for each piece of work."""
    work = {**machine_work(), **head_work(size, steps)}
    times = interleave({name: one.run for name, one in work.items()}, repeats, warmups=1)
    seconds = {name: median_cpu(times[name]) for name in work}
    possible = work["matrix product"].multiply_adds / seconds["matrix product"]
    bandwidth = work["copy"].bytes_moved / seconds["copy"]
    two, six = work.pop("solve, 2 passes"), work["solve, 6 passes"]
    seconds["pass of the solve"] = (seconds["solve, 6 passes"] - seconds["solve, 2 passes"]) / 4
    work["pass of the solve"] = Work(
        six.run, (six.multiply_adds - two.multiply_adds) / 4, (six.bytes_moved - two.bytes_moved) / 4
    )
    D, H, C, batch = size
    rows: list[dict[str, object]] = []
    for name, one in work.items():
        if name in ("matrix product", "copy"):
            continue
        repeated = 1 if "solve" in name else steps
        roof = min(possible, bandwidth * one.multiply_adds / one.bytes_moved)
        achieved = one.multiply_adds / seconds[name]
        rows.append(
            {
                "D": D,
                "H": H,
                "C": C,
                "batch": batch,
                "work": name,
                "cpu_ms": round(1e3 * seconds[name] / repeated, 3),
                "mega_multiply_adds": round(one.multiply_adds / repeated / 1e6, 1),
                "multiply_adds_per_byte": round(one.multiply_adds / one.bytes_moved, 1),
                "giga_multiply_adds_per_second": round(achieved / 1e9, 1),
                "machine_giga_multiply_adds_per_second": round(possible / 1e9, 1),
                "machine_gigabytes_per_second": round(bandwidth / 1e9, 1),
                "of_the_matrix_product": round(achieved / possible, 3),
                "of_the_roof": round(achieved / roof, 3),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="rounds, of which the medians are taken")
    parser.add_argument("--steps", type=int, default=10, help="steps timed together")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV")
    arguments = parser.parse_args()
    use_one_thread()
    rows = [row for size in SIZES for row in measure_size(size, arguments.repeats, arguments.steps)]
    save_results("roofline", rows, arguments.results)


if __name__ == "__main__":
    main()
