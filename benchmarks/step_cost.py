"""What a training step costs, with frozen structure and without.

A step is forward, cross-entropy, backward and a fused AdamW step, on a batch that was not seen before. Ratios are of
process CPU seconds, of steps that were timed in turn:

- output paths: the MLP's step over the step of the same MLP with its structure frozen (at least 1.6; 1.5 at C = 100),
- tangent paths: the step with tangent paths over the MLP's step (reported; about 1.5 expected),
- independent paths: the step of a head of ``matched_hidden_features`` units over that of the MLP which has as many
  parameters (at most 1.25). Beside it, the largest tensor of the step, in elements: (batch, H, D) is never stored.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measuring import RESULTS, interleave, median_cpu, median_ratio, median_wall, save_results, use_one_thread
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from glai_lightning import freeze_structure, matched_hidden_features, mlp_head

#: Inputs D, hidden units H, outputs C, batch.
SIZES = ((512, 512, 10, 256), (2048, 512, 10, 256), (384, 1024, 4, 1024), (512, 512, 100, 256))


def endless(batches: list[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from batches


def make_steps(head: nn.Module, batches: list[tuple[Tensor, Tensor]], steps: int) -> Callable[[], None]:
    """Return a function that trains the head for a number of steps, each on the next batch."""
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-4, fused=True)
    upcoming = endless(batches)

    def train() -> None:
        for _ in range(steps):
            x, y = next(upcoming)
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(head(x), y).backward()
            optimizer.step()

    return train


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        returned = func(*args, **(kwargs or {}))
        for value in returned if isinstance(returned, tuple | list) else (returned,):
            # A view by broadcasting has elements that are stored nowhere.
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.untyped_storage().nbytes() // value.element_size())
        return returned


def largest_tensor(head: nn.Module, x: Tensor, y: Tensor) -> int:
    """Return the number of elements of the largest tensor in forward and backward, gradients included."""
    with LargestTensor() as largest:
        F.cross_entropy(head(x), y).backward()
    head.zero_grad()
    return largest.elements


def measure_size(size: tuple[int, int, int, int], repeats: int, steps: int) -> list[dict[str, object]]:
    """Measure every parametrisation at one size and return a row for each."""
    in_features, hidden_features, out_features, batch = size
    torch.manual_seed(0)
    batches = [(torch.randn(batch, in_features), torch.randint(out_features, (batch,))) for _ in range(4 * steps)]
    mlp = mlp_head(in_features, hidden_features, out_features)
    matched = matched_hidden_features(in_features, hidden_features, out_features)
    heads = {
        "mlp": mlp,
        "output": freeze_structure(mlp, paths="output"),
        "tangent": freeze_structure(mlp, paths="tangent"),
        "independent": freeze_structure(mlp_head(in_features, matched, out_features), paths="independent"),
    }
    times = interleave({name: make_steps(head, batches, steps) for name, head in heads.items()}, repeats)
    rows: list[dict[str, object]] = []
    for name, head in heads.items():
        width = matched if name == "independent" else hidden_features
        trained = sum(parameter.numel() for parameter in head.parameters() if parameter.requires_grad)
        rows.append(
            {
                "D": in_features,
                "H": width,
                "C": out_features,
                "batch": batch,
                "paths": name,
                "trained_parameters": trained,
                "cpu_ms_per_step": round(median_cpu(times[name]) / steps * 1e3, 3),
                "wall_ms_per_step": round(median_wall(times[name]) / steps * 1e3, 3),
                "mlp_over_this": round(median_ratio(times["mlp"], times[name]), 3),
                "this_over_mlp": round(median_ratio(times[name], times["mlp"]), 3),
                "largest_tensor_elements": largest_tensor(head, *batches[0]),
                "batch_x_H_x_D": batch * width * in_features,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=41, help="rounds, of which the medians are taken")
    parser.add_argument("--steps", type=int, default=10, help="steps timed together")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV")
    arguments = parser.parse_args()
    use_one_thread()
    rows = [row for size in SIZES for row in measure_size(size, arguments.repeats, arguments.steps)]
    save_results("step_cost", rows, arguments.results)


if __name__ == "__main__":
    main()
