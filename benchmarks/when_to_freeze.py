"""When to freeze: records the curves that rules for the moment of freezing are compared on.

An MLP head is trained to its end, in a plain PyTorch loop: under a constant rate until three validations in a row were
not better (its best epoch counts), or through one cycle of ten epochs (of 400 steps, where ten epochs are fewer).
Along the way copies of it are frozen, at 0 (a random structure), 50, 100, 200, 400, ... steps and at the ends of
epochs, and solved as at the end of a fit. Every check notes what a rule could go by, from the inputs of the last steps
before it. Nothing here decides when to freeze: ``freeze_rules.py`` does, on these curves, in seconds.

Rows to validate on are in two parts: 'val' is what a fit may see (early stopping, the solve), 'choice' is what rules
are compared by. Nothing is chosen by 'test'.

    python benchmarks/when_to_freeze.py --data folder/with/npz --sets clinc150_minilm
"""

import argparse
import csv
import itertools
import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from measuring import RESULTS, machine, use_one_thread
from sklearn.datasets import load_digits
from torch import Tensor, nn

from glai_lightning import freeze_structure, mlp_head
from glai_lightning.datamodules.base import Splits
from glai_lightning.datamodules.features import make_splits
from glai_lightning.heads.churn import count_flipped
from glai_lightning.heads.layout import read_head
from glai_lightning.heads.patterns import HiddenUnits, hidden_units
from glai_lightning.solvers import LogisticSolver, SolveReport

SETS = (
    "clinc150_minilm",
    "cifar10_resnet_features",
    "cifar10_resnet_views",
    "digits",
    "fashion_mnist",
    "omniglot_small",
)
PATIENCE = 3
MOST_EPOCHS = 60
PROBE_SIZE = 1024
SUBSAMPLE = 2048
#: Part of the training rows in 'val', and in 'choice'.
VAL_FRACTION, CHOICE_FRACTION = 0.2, 0.1

Rows = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Data:
    """Standardised rows (N, D) and labels (N,) of the four splits."""

    train: Rows
    val: Rows
    choice: Rows
    test: Rows
    classes: int


def load(name: str, folder: Path, seed: int) -> Data:
    """Read a data set and split it: rows of the same picture, or drawings in equal numbers, stay together."""
    # A stream that nobody else is likely to draw: rows may lie in the order of `default_rng(0).permutation`.
    generator = np.random.default_rng([seed, 2026])
    test: dict[str, np.ndarray] | None = None
    if name == "digits":
        inputs, labels = load_digits(return_X_y=True)
        groups = np.arange(len(labels))
    else:
        arrays = np.load(folder / f"{name}.npz")
        if name == "omniglot_small":
            inputs, labels = arrays["x"], arrays["y"]
            # The 20 drawings of a character, in an order of their own: the group is a drawing's place in it.
            groups = np.concatenate([generator.permutation(20) for _ in range(labels.max() + 1)])
        elif name == "cifar10_resnet_views":
            inputs, labels = np.concatenate(arrays["views"]), np.tile(arrays["y"], len(arrays["views"]))
            groups = np.tile(np.arange(len(arrays["y"])), len(arrays["views"]))
        else:
            inputs, labels = arrays["x_train"], arrays["y_train"]
            groups = np.arange(len(labels))
            test = {"x_test": arrays["x_test"], "y_test": arrays["y_test"]}
    if test is None:
        # The test rows are the same for every seed.
        places = (
            groups
            if name == "omniglot_small"
            else np.random.default_rng([0, 2025]).permutation(groups.max() + 1)[groups]
        )
        tested = places >= round(0.8 * (groups.max() + 1))
        test = {"x_test": inputs[tested], "y_test": labels[tested]}
        inputs, labels, groups = inputs[~tested], labels[~tested], groups[~tested]
    kinds = np.unique(groups)
    order = np.empty(groups.max() + 1, dtype=int)
    order[kinds] = generator.permutation(len(kinds))
    place = order[groups] / len(kinds)
    held_out = place < VAL_FRACTION + CHOICE_FRACTION
    splits: Splits = make_splits(
        {
            "x_train": inputs[~held_out],
            "y_train": labels[~held_out],
            "x_val": inputs[held_out],
            "y_val": labels[held_out],
            **test,
        },
        val_fraction=VAL_FRACTION,
        seed=seed,
    )
    seen = torch.from_numpy(place[held_out] < VAL_FRACTION)
    x, y = splits.val
    return Data(splits.train, (x[seen], y[seen]), (x[~seen], y[~seen]), splits.test, splits.num_classes or 0)


@torch.no_grad()
def accuracy(head: nn.Module, rows: Rows) -> float:
    """Return the fraction of rows that a head classifies rightly."""
    return float((head(rows[0]).argmax(1) == rows[1]).double().mean())


class Clock:
    """Adds up process CPU seconds of what it is told to run."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def time(self, work: Callable[[], object]) -> object:
        """Run a piece of work and add its time."""
        start = time.process_time()
        result = work()
        self.seconds += time.process_time() - start
        return result


@torch.no_grad()
def movement(before: HiddenUnits, head: nn.Sequential, inputs: Tensor) -> dict[str, float]:
    """Compare the hidden units of a head with those at the last check, on the same inputs (n, D)."""
    units = hidden_units(read_head(head))[-1]
    output = head[-1]
    old, new = before.preactivations(inputs), units.preactivations(inputs)
    flips = (old > 0) ^ (new > 0)
    flipped, bits = count_flipped([old > 0], [new > 0])
    # What the logits would lose if the flipped units still did what they did at the last check.
    by_flips = F.linear(((new > 0).to(new.dtype) - (old > 0).to(new.dtype)) * new, output.weight)
    logits = output(new.relu())
    hidden = new.relu()
    return {
        "churn": float(flipped) / bits,
        "margin_churn": float((new.abs() * flips).sum() / new.abs().sum()),
        "output_churn": float(_centered(by_flips).square().mean() / _spread(logits)),
        "activation_change": float((hidden - old.relu()).square().mean() / (hidden - hidden.mean(0)).square().mean()),
    }


def _centered(logits: Tensor) -> Tensor:
    # A shift of all logits of a sample changes no probability.
    return logits - logits.mean(1, keepdim=True)


def _spread(logits: Tensor) -> Tensor:
    centered = _centered(logits)
    return (centered - centered.mean(0)).square().mean()


class Watch:
    """One series of checks of a head: each compares with the one before."""

    def __init__(self, head: nn.Sequential) -> None:
        self.head = head
        self.restart()

    def restart(self) -> None:
        """Take the head as it is for what the next check compares with."""
        self.before = hidden_units(read_head(self.head))[-1].snapshot()
        self.rate_sum, self.loss_sum, self.steps = 0.0, torch.zeros(()), 0

    def stepped(self, rate: float, loss: Tensor) -> None:
        """Note a step."""
        self.rate_sum += rate
        self.loss_sum += loss.detach()
        self.steps += 1

    def check(self, inputs: Tensor) -> dict[str, float]:
        """Compare and start again."""
        moved = movement(self.before, self.head, inputs)
        moved |= {"rate_sum": self.rate_sum, "train_loss": float(self.loss_sum) / self.steps}
        self.restart()
        return moved


def is_doubling(step: int) -> bool:
    """Tell whether a number of steps is 25, 50, 100, 200, ..."""
    return step >= 25 and step % 25 == 0 and (step // 25).bit_count() == 1


def is_solved_epoch(epoch: int) -> bool:
    """Tell whether the structure is frozen and solved after so many epochs: all first ones, fewer later."""
    return epoch <= 8 or (epoch <= 16 and epoch % 2 == 0) or epoch % 8 == 0


class Recording:
    """One MLP trained to its end, with the checks and the solves along the way.

    Args:
        data: the rows.
        hidden: hidden units.
        rate: the constant rate, or the highest of the cycle.
        schedule: 'constant' or 'onecycle'.
        seed: of weights and batches.
        solver: what copies are solved by.
        batch_size: rows in a batch.
    """

    def __init__(
        self,
        data: Data,
        hidden: int,
        rate: float,
        schedule: str,
        seed: int,
        solver: LogisticSolver,
        batch_size: int = 128,
    ) -> None:
        torch.manual_seed(seed)
        self.data, self.solver, self.schedule, self.batch_size = data, solver, schedule, batch_size
        self.head = mlp_head(data.train[0].shape[1], hidden, data.classes)
        self.optimizer = torch.optim.AdamW(self.head.parameters(), lr=rate, fused=True)
        self.steps_per_epoch = -(-len(data.train[0]) // batch_size)
        self.most_epochs = MOST_EPOCHS if schedule == "constant" else max(10, -(-400 // self.steps_per_epoch))
        self.scheduler = (
            None
            if schedule == "constant"
            else torch.optim.lr_scheduler.OneCycleLR(
                self.optimizer, rate, total_steps=self.most_epochs * self.steps_per_epoch
            )
        )
        self.subsample = torch.randperm(len(data.train[0]))[:SUBSAMPLE]
        self.train_clock, self.val_clock = Clock(), Clock()
        self.watches = {"epoch": Watch(self.head), "doubling": Watch(self.head)}
        self.checks: list[dict[str, object]] = []
        self.solves: list[dict[str, object]] = []
        self.step = 0

    def run(self) -> None:
        """Train to the end."""
        self.solve(epoch=0)
        best, best_epoch = -1.0, 0
        for epoch in range(1, self.most_epochs + 1):
            for batches in self.upcoming_batches():
                self.train_clock.time(lambda batches=batches: self.train(batches))
                if is_doubling(self.step):
                    self.check("doubling", epoch, batches)
                    if self.step >= 50:
                        self.solve(epoch)
            val = self.val_clock.time(lambda: accuracy(self.head, self.data.val))
            if val > best:
                best, best_epoch = val, epoch
            ended = epoch == self.most_epochs
            ended |= self.schedule == "constant" and epoch - best_epoch >= PATIENCE
            self.check("epoch", epoch, batches)
            if is_solved_epoch(epoch) or ended:
                self.solve(epoch)
            if ended:
                return

    def upcoming_batches(self) -> Iterator[list[Tensor]]:
        """Yield the rows of one epoch's batches, in lists that end at doublings and at the end of the epoch."""
        batches = torch.randperm(len(self.data.train[0])).split(self.batch_size)
        start = 0
        for end in range(1, len(batches) + 1):
            if end == len(batches) or is_doubling(self.step + end - start):
                yield list(batches[start:end])
                start = end

    def train(self, batches: list[Tensor]) -> None:
        """Train on some batches."""
        x, y = self.data.train
        for rows in batches:
            self.optimizer.zero_grad(set_to_none=True)
            loss = F.cross_entropy(self.head(x[rows]), y[rows])
            loss.backward()
            for watch in self.watches.values():
                watch.stepped(self.optimizer.param_groups[0]["lr"], loss)
            self.optimizer.step()
            if self.scheduler is not None:
                self.scheduler.step()
            self.step += 1

    def check(self, series: str, epoch: int, batches: list[Tensor]) -> None:
        """Note what a rule could go by."""
        # Fewer rows where the list is short, as in an epoch of a small data set.
        inputs = self.data.train[0][torch.cat(batches)[-PROBE_SIZE:]]
        check_clock, solve_clock = Clock(), Clock()
        moved = check_clock.time(lambda: self.watches[series].check(inputs))
        subsample_val = solve_clock.time(self.score_of_structure)
        self.checks.append(
            {
                "series": series,
                "step": self.step,
                "epoch": epoch,
                **moved,
                "subsample_val": subsample_val,
                **{f"mlp_{split}": accuracy(self.head, getattr(self.data, split)) for split in ("val", "choice")},
                "mlp_test": accuracy(self.head, self.data.test),
                "train_cpu": self.train_clock.seconds,
                "val_cpu": self.val_clock.seconds,
                "check_cpu": check_clock.seconds,
                "subsample_cpu": solve_clock.seconds,
            }
        )

    def solve(self, epoch: int) -> None:
        """Freeze a copy as it is now, solve it, and note what became of it."""
        if self.solves and self.solves[-1]["step"] == self.step:
            return
        clock = Clock()
        head, report = clock.time(lambda: self.solved(self.data.train))
        self.solves.append(
            {
                "step": self.step,
                "epoch": epoch,
                "passes": report.passes,
                "best_step": report.best_step,
                **{split: accuracy(head, getattr(self.data, split)) for split in ("train", "val", "choice", "test")},
                "solve_cpu": clock.seconds,
                "train_cpu": self.train_clock.seconds,
            }
        )

    def solved(self, rows: Rows) -> tuple[nn.Module, SolveReport]:
        """Return a frozen and solved copy, and the report of the solve."""
        head = freeze_structure(self.head)
        return head, self.solver.solve(head, *rows, validation=self.data.val)

    def score_of_structure(self) -> float:
        """Return what a solve on few rows scores on 'val', from zero, so that it tells of the structure alone."""
        head = freeze_structure(self.head)
        for parameter in (head[-1].weight, head[-1].bias):
            nn.init.zeros_(parameter)
        x, y = self.data.train
        solver = replace(self.solver, max_passes=5)
        return solver.solve(head, x[self.subsample], y[self.subsample], validation=self.data.val).score or 0.0


def rounded(value: object) -> object:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def append(path: Path, rows: list[dict[str, object]]) -> None:
    """Add rows to a CSV, with a header where it is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows({key: rounded(value) for key, value in row.items()} for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("GLAI_DATA", "."), help="folder of .npz files")
    parser.add_argument("--sets", nargs="+", default=SETS, choices=SETS)
    parser.add_argument("--hidden", nargs="+", type=int, default=[128, 512])
    parser.add_argument("--rates", nargs="+", type=float, default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--schedules", nargs="+", default=["constant", "onecycle"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--l2", type=float, help="strength of the penalty; by default chosen along a path")
    parser.add_argument("--max-passes", type=int, default=9)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSVs, which are added to")
    arguments = parser.parse_args()
    use_one_thread()
    warnings.filterwarnings("ignore")
    solver = LogisticSolver(l2=arguments.l2, max_passes=arguments.max_passes)
    for name, seed in itertools.product(arguments.sets, arguments.seeds):
        data = load(name, Path(arguments.data), seed)
        for hidden, rate, schedule in itertools.product(arguments.hidden, arguments.rates, arguments.schedules):
            began = time.process_time()
            recording = Recording(data, hidden, rate, schedule, seed, solver)
            recording.run()
            run = {"data": name, "hidden": hidden, "rate": rate, "schedule": schedule, "seed": seed}
            for table in ("checks", "solves"):
                rows = [{**run, **row} for row in getattr(recording, table)]
                append(arguments.results / f"when_to_freeze_{table}_{machine()}.csv", rows)
            print(*run.values(), f"{recording.step} steps, {time.process_time() - began:.1f} CPU s", flush=True)


if __name__ == "__main__":
    main()
