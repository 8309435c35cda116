"""A SimCLR projection head on cached views, frozen by itself against never frozen.

H = 512, 128 outputs, BatchNorm: lightly's ``SimCLRProjectionHead`` and ``NTXentLoss``, AdamW at a constant rate, on the
features of a frozen backbone under four augmentations, two of them drawn for each sample in every epoch.

- the step, loss included: never frozen, frozen with output paths, and on cached path activations; process CPU seconds
  of steps that were timed in turn. Beside it the same steps with the same loss computed in a single product, to tell
  how much of a step is lightly's loss.
- whole fits by ``Trainer``, the same batches on both sides: kNN accuracy of the projections of test samples among those
  of training samples (features as they are beside it), validation loss and CPU seconds after every epoch; from these
  the seconds to the validation loss that all reach, and to a finished head (early stopping with patience 3). At this
  constant rate churn does not settle by itself within 40 epochs: the freeze is at an epoch that was fixed beforehand.

    python benchmarks/simclr_projection.py --data folder/with/npz
"""

import argparse
import logging
import os
import statistics
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightning.pytorch import Callback, Trainer, seed_everything
from measuring import interleave, median_cpu, median_ratio, quiet_trainer, save_results, use_one_thread
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

from glai_lightning import SimCLRModule, freeze_structure
from glai_lightning.callbacks import StructureFreezeCallback
from glai_lightning.datamodules import ViewsDataModule
from glai_lightning.heads.path_activations import output_layers

IN_FEATURES, HIDDEN, OUTPUTS, TEMPERATURE = 192, 512, 128, 0.5


class OneProductLoss(nn.Module):
    """NT-Xent of two views out of one product of all projections with each other."""

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        """Return the loss: projections (batch, C) of both views -> 0-d."""
        directions = F.normalize(torch.cat((one, other)), dim=1)
        similarities = (directions / TEMPERATURE) @ directions.T
        similarities.fill_diagonal_(-torch.inf)
        return F.cross_entropy(similarities, torch.arange(len(directions)).roll(len(one)))


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
    for loss in (NTXentLoss(TEMPERATURE), OneProductLoss()):
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
                    "loss_function": type(loss).__name__,
                    "cpu_ms": round(1000 * median_cpu(seconds) / len(inputs), 3),
                    "times_fewer": round(median_ratio(times["mlp"], seconds), 3),
                }
            )
    return rows


class Epochs(Callback):
    """Notes validation loss and CPU seconds after every epoch."""

    def __init__(self) -> None:
        self.losses, self.seconds = [], []

    def on_fit_start(self, trainer, pl_module) -> None:
        """Start the clock, or let it go on in a second fit."""
        self.started = time.process_time() - (self.seconds[-1] if self.seconds else 0.0)

    def on_validation_end(self, trainer, pl_module) -> None:
        """Note the loss."""
        self.losses.append(float(trainer.callback_metrics["val/loss"]))
        self.seconds.append(time.process_time() - self.started)

    def finished(self, patience: int = 3) -> tuple[float, float]:
        """Return when early stopping would have stopped, in CPU seconds, and the best loss by then."""
        best, since = 0, 0
        for epoch, loss in enumerate(self.losses):
            best, since = (epoch, 0) if loss < self.losses[best] or epoch == 0 else (best, since + 1)
            if since == patience:
                return self.seconds[epoch], self.losses[best]
        return self.seconds[-1], self.losses[best]

    def reached(self, loss: float) -> float:
        """Return the CPU seconds after which the validation loss was no larger, infinite if it never was."""
        times = [seconds for seconds, seen in zip(self.seconds, self.losses, strict=True) if seen <= loss]
        return times[0] if times else float("inf")


def fit(module: SimCLRModule, data: ViewsDataModule, epochs: int, *callbacks: Callback) -> Trainer:
    trainer = quiet_trainer(epochs, *callbacks)
    trainer.fit(module, data)
    return trainer


class StopOnceFrozen(Callback):
    """Ends a fit with the epoch after which the head is frozen."""

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        """Leave what is left of the epochs to the fit on path activations."""
        freeze = next(callback for callback in trainer.callbacks if isinstance(callback, StructureFreezeCallback))
        trainer.should_stop = freeze.frozen


def knn(bank: Tensor, labels: Tensor, queries: Tensor, query_labels: Tensor) -> float:
    """Return the accuracy of 20 nearest neighbours by cosine similarity."""
    classifier = KNeighborsClassifier(20, metric="cosine", weights="distance", algorithm="brute")
    return float(classifier.fit(bank.numpy(), labels.numpy()).score(queries.numpy(), query_labels.numpy()))


def fit_rows(path: Path, arguments: argparse.Namespace, seed: int) -> list[dict[str, object]]:
    """Fit one seed in all variants."""

    def module_of(head: nn.Module) -> SimCLRModule:
        def optimizer(parameters):
            return torch.optim.AdamW(parameters, lr=arguments.lr, fused=True)

        return SimCLRModule(head, temperature=TEMPERATURE, optimizer=optimizer)

    notes, heads, freeze_epochs = {}, {}, {}
    for variant in arguments.variants:
        data = ViewsDataModule(path, batch_size=arguments.batch_size, test_fraction=0.2, seed=seed)
        data.setup("fit")
        seed_everything(seed, verbose=False)
        module, epochs = module_of(SimCLRProjectionHead(IN_FEATURES, HIDDEN, OUTPUTS)), Epochs()
        freeze = [StructureFreezeCallback(freeze_at_epoch=arguments.freeze_at_epoch, verbose=False)]
        freeze = [] if variant == "never" else freeze
        if variant == "cached":
            fit(module, data, arguments.epochs, *freeze, StopOnceFrozen(), epochs)
            if not freeze[0].frozen:
                raise RuntimeError(f"Seed {seed} did not freeze within {arguments.epochs} epochs.")
            started = time.process_time()
            activations = data.path_activations(module.head)
            activations.setup("fit")
            epochs.seconds[-1] += time.process_time() - started
            rest = arguments.epochs - len(epochs.losses)
            fit(module_of(output_layers(module.head)), activations, rest, epochs)
        else:
            fit(module, data, arguments.epochs, *freeze, epochs)
        notes[variant], heads[variant] = epochs, module.head.eval()
        freeze_epochs[variant] = freeze[0].freeze_epoch if freeze else -1
    # The smallest loss that all variants reach.
    common = max(min(epochs.losses) for epochs in notes.values())
    train, test = data.splits["train"], data.splits["test"]
    rows = []
    for variant, epochs in notes.items():
        with torch.no_grad():
            bank, queries = (heads[variant](split.views[0]) for split in (train, test))
        finished, best = epochs.finished()
        rows.append(
            {
                "measure": "fit",
                "seed": seed,
                "variant": variant,
                "batch_size": arguments.batch_size,
                "freeze_epoch": freeze_epochs[variant],
                "epochs": len(epochs.losses),
                "cpu_seconds": round(epochs.seconds[-1], 3),
                "last_val_loss": round(epochs.losses[-1], 4),
                "best_val_loss": round(min(epochs.losses), 4),
                "seconds_to_common_loss": round(epochs.reached(common), 3),
                "finished_seconds": round(finished, 3),
                "finished_val_loss": round(best, 4),
                "knn_projections": knn(bank, train.labels, queries, test.labels),
                "knn_features": knn(train.views[0], train.labels, test.views[0], test.labels),
            }
        )
    return rows


def main() -> None:
    """Time the steps, and run all fits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("GLAI_DATA", "."), help="folder of .npz files")
    parser.add_argument("--variants", nargs="+", default=["never", "frozen", "cached"])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--freeze-at-epoch", type=int, default=10, help="-1 to let churn decide")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--step-batch-sizes", type=int, nargs="*", default=[64, 128, 256])
    parser.add_argument("--repeats", type=int, default=20, help="rounds of five steps of each kind, for each seed")
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    arguments.freeze_at_epoch = None if arguments.freeze_at_epoch < 0 else arguments.freeze_at_epoch
    use_one_thread()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    seeds = range(arguments.seeds)
    if arguments.step_batch_sizes:
        steps = [
            row
            for size in arguments.step_batch_sizes
            for seed in seeds
            for row in step_rows(size, seed, arguments.repeats)
        ]
        save_results("simclr_projection_step", steps)
    fits = []
    for seed in seeds:
        fits += fit_rows(Path(arguments.data) / "cifar10_resnet_views.npz", arguments, seed)
        print(*fits[-len(arguments.variants) :], sep="\n", flush=True)
    save_results("simclr_projection_fit", fits)
    for variant in arguments.variants:
        chosen = [row for row in fits if row["variant"] == variant]
        print(variant, {k: round(statistics.mean(row[k] for row in chosen), 4) for k in list(chosen[0])[4:]})


if __name__ == "__main__":
    main()
