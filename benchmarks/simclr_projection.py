"""A step of SimCLR's projection head: never frozen, frozen, and on cached path activations, with two ways to the loss.

H = 512, 128 outputs, BatchNorm: lightly's ``SimCLRProjectionHead`` on 192 features, AdamW. NT-Xent by lightly, in four
products, and by this package, in one. Process CPU seconds of steps that were timed in turn, loss included. Whole fits
are in ``six_settings.py``.

    python benchmarks/simclr_projection.py
"""

import argparse

import torch
from lightly.loss import NTXentLoss as LightlyLoss
from lightly.models.modules import SimCLRProjectionHead
from measuring import interleave, median_cpu, median_ratio, save_results, use_one_thread
from torch import Tensor, nn

from glai_lightning import freeze_structure
from glai_lightning.heads.path_activations import output_layers
from glai_lightning.modules import NTXentLoss

IN_FEATURES, HIDDEN, OUTPUTS, TEMPERATURE = 192, 512, 128, 0.5


def make_step(head: nn.Module, inputs: Tensor, loss: nn.Module):
    """Return a function that trains a head for five steps: inputs (steps, 2, batch, D)."""
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-4, fused=True)

    def train() -> None:
        for views in inputs:
            optimizer.zero_grad(set_to_none=True)
            projections = head(views.flatten(0, 1))
            loss(*projections.unflatten(0, views.shape[:2])).backward()
            optimizer.step()

    return train


def step_rows(batch_size: int, seed: int, repeats: int) -> list[dict[str, object]]:
    """Time the steps of all kinds of heads, with both ways to compute the loss."""
    rows = []
    for name, loss in {"lightly": LightlyLoss(TEMPERATURE), "one product": NTXentLoss(TEMPERATURE)}.items():
        torch.manual_seed(seed)
        inputs = torch.randn(5, 2, batch_size, IN_FEATURES)
        mlp = SimCLRProjectionHead(IN_FEATURES, HIDDEN, OUTPUTS)
        frozen, cached = freeze_structure(mlp), freeze_structure(mlp)
        activations = cached.path_activations(inputs).detach()
        times = interleave(
            {
                "mlp": make_step(mlp, inputs, loss),
                "frozen": make_step(frozen, inputs, loss),
                "cached": make_step(output_layers(cached), activations, loss),
            },
            repeats,
        )
        for kind, seconds in times.items():
            rows.append(
                {
                    "measure": "step",
                    "seed": seed,
                    "variant": kind,
                    "batch_size": batch_size,
                    "loss_function": name,
                    "cpu_ms": round(1000 * median_cpu(seconds) / len(inputs), 3),
                    "times_fewer": round(median_ratio(times["mlp"], seconds), 3),
                }
            )
    return rows


def main() -> None:
    """Time the steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--repeats", type=int, default=20, help="rounds of five steps of each kind, for each seed")
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    use_one_thread()
    rows = [
        row
        for size in arguments.batch_sizes
        for seed in range(arguments.seeds)
        for row in step_rows(size, seed, arguments.repeats)
    ]
    save_results("simclr_projection_step", rows)


if __name__ == "__main__":
    main()
