"""Time to a finished head: an MLP under early stopping against freeze, solve, stop; whole fits on cached features.

Both sides run through ``Trainer.fit`` with ``SupervisedModule`` and ``FeaturesDataModule``: the same features, batches,
seeds, optimizer and schedule. The clock is that of the whole fit, validation, structure checks, conversion, collection
and solve included; reading and standardising the data is not. Under a constant rate the MLP stops after three
validations without a better score, under one-cycle it runs the schedule to its end; the weights of its best epoch are
kept either way.

    python benchmarks/finished_head.py --data folder/with/npz --schedule constant
"""

import argparse
import copy
import logging
import math
import os
import statistics
import time
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping
from measuring import save_results, use_one_thread

import glai_lightning  # noqa: F401  (before lightning)
from glai_lightning import SupervisedModule, mlp_head
from glai_lightning.callbacks import StructureFreezeCallback
from glai_lightning.datamodules import FeaturesDataModule
from glai_lightning.solvers import LogisticSolver

DATA_SETS = ("clinc150_minilm", "cifar10_resnet_features", "fashion_mnist")


class BestWeights(Callback):
    """Keeps the weights of the best validation score in memory, and notes when it was reached."""

    def __init__(self) -> None:
        self.score, self.weights, self.cpu_seconds, self.evaluations = -math.inf, {}, 0.0, 0

    def on_fit_start(self, trainer, pl_module) -> None:
        """Start the clock."""
        self.started = time.process_time()

    def on_validation_end(self, trainer, pl_module) -> None:
        """Keep the weights if they are the best so far."""
        if trainer.sanity_checking:
            return
        self.evaluations += 1
        score = float(trainer.callback_metrics["val/accuracy"])
        if score > self.score:
            self.score, self.cpu_seconds = score, time.process_time() - self.started
            self.weights = copy.deepcopy(pl_module.state_dict())


def make_module(data: FeaturesDataModule, arguments: argparse.Namespace, seed: int) -> SupervisedModule:
    seed_everything(seed, verbose=False)
    schedule = None
    if arguments.schedule == "onecycle":
        steps = len(data.train_dataloader()) * arguments.epochs

        def schedule(optimizer):
            return torch.optim.lr_scheduler.OneCycleLR(optimizer, arguments.lr, total_steps=steps)

    return SupervisedModule(
        mlp_head(data.num_features, arguments.hidden, data.num_classes),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=arguments.lr, fused=True),
        lr_scheduler=schedule,
    )


def quiet_trainer(epochs: int, callbacks: list[Callback]) -> Trainer:
    """Make a Trainer that does nothing but fit and validate."""
    return Trainer(
        max_epochs=epochs,
        callbacks=callbacks,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


def run(data: FeaturesDataModule, variant: str, seed: int, arguments: argparse.Namespace) -> dict[str, object]:
    """Fit one head, and return what it took and what it scores."""
    module, best = make_module(data, arguments, seed), BestWeights()
    freeze = None
    if variant == "mlp":
        stopping = [EarlyStopping("val/accuracy", patience=3, mode="max")] if arguments.schedule == "constant" else []
    else:
        solver = LogisticSolver(l2=arguments.l2, center=arguments.center, max_passes=arguments.max_passes)
        freeze = StructureFreezeCallback(
            solver=solver, stop_after_solve=True, relative_tolerance=arguments.relative_tolerance, verbose=False
        )
        stopping = [freeze]
    trainer = quiet_trainer(arguments.epochs, [*stopping, best])
    wall, cpu = time.perf_counter(), time.process_time()
    trainer.fit(module, data)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    epochs = trainer.current_epoch
    module.load_state_dict(best.weights)
    (tested,) = trainer.test(module, data, verbose=False)
    return {
        "variant": variant,
        "seed": seed,
        "epochs": epochs,
        "finished_cpu_seconds": round(cpu, 4),
        "finished_seconds": round(wall, 4),
        "best_cpu_seconds": round(best.cpu_seconds, 4),
        "evaluations": best.evaluations,
        "best_val_score": round(best.score, 5),
        "test_score": round(tested["test/accuracy"], 5),
        "passes": 0 if freeze is None or freeze.solve_report is None else freeze.solve_report.passes,
    }


def main() -> None:
    """Run all data sets and seeds, both sides in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("GLAI_DATA", "."), help="folder of .npz files")
    parser.add_argument("--sets", nargs="+", default=DATA_SETS)
    parser.add_argument("--schedule", choices=("constant", "onecycle"), default="constant")
    parser.add_argument("--epochs", type=int, help="most epochs; by default 60, or 10 under one-cycle")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--l2", type=float, default=1e-3)
    parser.add_argument("--center", default="zero")
    parser.add_argument("--max-passes", type=int, default=9)
    parser.add_argument("--relative-tolerance", type=float, default=0.25)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    arguments.epochs = arguments.epochs or (60 if arguments.schedule == "constant" else 10)
    use_one_thread()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    rows, ratios, differences = [], [], []
    for name in arguments.sets:
        results: dict[str, list[dict[str, object]]] = {"mlp": [], "output+solve": []}
        for seed in range(arguments.seeds):
            data = FeaturesDataModule(Path(arguments.data) / f"{name}.npz", batch_size=arguments.batch_size, seed=seed)
            data.setup("fit")
            for variant in sorted(results, reverse=bool(seed % 2)):
                results[variant].append(run(data, variant, seed, arguments))
        pairs = list(zip(results["mlp"], results["output+solve"], strict=True))
        speedup = statistics.geometric_mean(m["finished_cpu_seconds"] / g["finished_cpu_seconds"] for m, g in pairs)
        to_best = statistics.geometric_mean(m["best_cpu_seconds"] / g["best_cpu_seconds"] for m, g in pairs)
        difference = statistics.mean(100 * (g["test_score"] - m["test_score"]) for m, g in pairs)
        ratios.append(speedup)
        differences.append(difference)
        print(
            f"{name}: {speedup:.2f} times to a finished head, {to_best:.2f} to the own best, {difference:+.2f} points"
        )
        for runs in results.values():
            rows += [{"data": name, "schedule": arguments.schedule, "lr": arguments.lr, **one} for one in runs]
    print(
        f"geometric mean {statistics.geometric_mean(ratios):.2f} times, mean {statistics.mean(differences):+.2f} points"
    )
    save_results(f"finished_head_{arguments.schedule}_{arguments.lr:g}_batch{arguments.batch_size}", rows)


if __name__ == "__main__":
    main()
