"""When solves that are tried on the way gain no more: recording them epoch by epoch, and comparing rules on that.

One MLP a set and seed is trained as in ``one_line.py``, in a plain loop: AdamW at 1e-3, batch size 128, 512 units.
After epochs 1 to 8, and every second one up to 16, a frozen copy is solved along the path of penalties. Rules are then
compared on what was recorded: which epoch they freeze in, the time of the MLP under early stopping (patience 3) over
that of the frozen and solved head, trials included, and test points against the MLP.

    python benchmarks/solve_trials.py --data DATA --seeds 2
    python benchmarks/solve_trials.py --compare
"""

import argparse
import copy
import csv
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from measuring import RESULTS, machine
from one_line import HELD_OUT, HIDDEN, MADE, STORED, Arrays, split, stored
from torch import Tensor, nn

from glai_lightning import ChurnProbe, freeze_structure, mlp_head
from glai_lightning.solvers import LogisticSolver

EPOCHS, SOLVED_UP_TO, PATIENCE = 60, 16, 3
COLUMNS = ["epoch", "steps", "churn", "loss_start", "loss", "mlp_val", "mlp_test", "seconds"]
SOLVE_COLUMNS = ["solve_val", "solve_test", "solve_seconds"]
#: What a Trainer and its validation take for an epoch, and reading the data for a solve, as parts of the training of an
#: epoch in a plain loop: as measured on small tables, where they are largest.
_OVERHEAD, _READING = 2.0, 1.0

Row = dict[str, float]


def accuracy(head: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((head(x).argmax(1) == y).float().mean())


def record(arrays: Arrays, seed: int) -> list[Row]:
    """Train an MLP, solve copies of it on the way, and return what each epoch gave."""
    x, y = torch.tensor(arrays["x_train"]), torch.tensor(arrays["y_train"], dtype=torch.int64)
    x_test, y_test = torch.tensor(arrays["x_test"]), torch.tensor(arrays["y_test"], dtype=torch.int64)
    mean, std = x.mean(0), x.std(0).clamp_min(1e-6)
    x, x_test = (x - mean) / std, (x_test - mean) / std
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    held = min(max(2000, len(x) // 10), len(x) // 4)
    x_val, y_val, x, y = x[order[:held]], y[order[:held]], x[order[held:]], y[order[held:]]
    torch.manual_seed(seed)
    head = mlp_head(x.shape[1], HIDDEN, int(y.max()) + 1)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
    probe, rows, seconds, first = ChurnProbe(head, 1024), [], 0.0, []
    best, worse = -1.0, 0
    for epoch in range(1, EPOCHS + 1):
        began, losses = time.process_time(), []
        for batch in torch.randperm(len(x), generator=generator).split(128):
            loss = F.cross_entropy(head(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        flips, bits = probe.measure()
        seconds += time.process_time() - began
        first = first or losses[:10]
        numbers: Sequence[float] = (
            *(epoch, epoch * len(losses), float(flips) / bits, float(torch.stack(first).mean())),
            *(float(torch.stack(losses).mean()), accuracy(head, x_val, y_val), accuracy(head, x_test, y_test), seconds),
        )
        row = dict(zip(COLUMNS, numbers, strict=True))
        if epoch <= SOLVED_UP_TO and (epoch <= 8 or epoch % 2 == 0):
            frozen, began = freeze_structure(copy.deepcopy(head)), time.process_time()
            LogisticSolver().solve(frozen, x, y, validation=(x_val, y_val))
            row["solve_seconds"] = time.process_time() - began
            row["solve_val"], row["solve_test"] = accuracy(frozen, x_val, y_val), accuracy(frozen, x_test, y_test)
        rows.append(row)
        best, worse = (row["mlp_val"], 0) if row["mlp_val"] > best else (best, worse + 1)
        if worse >= PATIENCE and epoch >= SOLVED_UP_TO:
            break
    return rows


@dataclass(frozen=True)
class Rule:
    """When to freeze: by churn alone, once validation stands still as well, or by trials before that.

    Args:
        patience: validations without a rise after which a settled structure is frozen; 0 for churn alone.
        least_gain: accuracy that a trial must gain for training to go on; ``None`` for no trials.
        trials: epochs of the trials.
        pace: the part of its rise since the trial before by which the MLP must be behind at the last trial.
        far_ahead: lead over the MLP, in accuracy, from which a trial is enough that gains at most ``part`` of it.
        part: that part.
        half: the part of its errors by which a solved head must be ahead of the MLP for that, and for more trials.
        end: validations in a row that are not the best after which any quiet structure is frozen.
    """

    patience: int
    least_gain: float | None = None
    trials: tuple[int, ...] = (1, 2, 4)
    pace: float = 0.6
    far_ahead: float = 0.05
    part: float = 0.05
    half: float = 0.0
    end: float = math.inf

    def freezes(self, rows: Sequence[Row]) -> tuple[int, int]:
        """Return the epoch of the freeze, and how many trials were taken back by then."""
        trials, before, best, still, largest, top, without = 0, None, 0.0, 0, 0.0, 0.0, 0
        ends = False
        for row in rows:
            largest = max(largest, row["churn"])
            settled = row["churn"] <= min(0.1, 0.25 * largest) and still >= self.patience
            if settled or (row["churn"] <= 0.1 and without >= self.end):
                return int(row["epoch"]), trials
            learned = row["steps"] >= 50 and row["loss"] < 0.95 * row["loss_start"] and row["churn"] <= 0.1
            if self.least_gain is not None and learned and row["epoch"] in self.trials and not ends:
                lead, errors = row["solve_val"] - row["mlp_val"], 1.0 - row["solve_val"]
                if before is not None:
                    gain, rise = (row[name] - before[name] for name in ("solve_val", "mlp_val"))
                    is_last = row["epoch"] == self.trials[-1]
                    if is_last and gain <= self.least_gain and lead > self.pace * rise:
                        return int(row["epoch"]), trials
                    if lead >= max(self.far_ahead, self.half * errors) and gain <= self.part * lead:
                        return int(row["epoch"]), trials
                ends = lead < self.half * errors
                before, trials = row, trials + 1
            top, without = (row["mlp_val"], 0) if row["mlp_val"] > top else (top, without + 1)
            best, still = (row["mlp_val"], 0) if row["mlp_val"] > 1.005 * best else (best, still + 1)
        return len(rows), trials

    def outcome(self, rows: Sequence[Row]) -> tuple[int, float, float]:
        """Return the epoch of the freeze, the ratio of times and the difference of test points."""
        scores = [row["mlp_val"] for row in rows]
        end = next(
            (n for n in range(PATIENCE, len(rows)) if max(scores[: n - 2]) >= max(scores[: n + 1])), len(rows) - 1
        )
        mlp = max(rows[: end + 1], key=lambda row: row["mlp_val"])
        epoch, trials = self.freezes(rows)
        solved = max((row for row in rows[:epoch] if "solve_val" in row), key=lambda row: row["epoch"])
        overhead = _OVERHEAD * rows[0]["seconds"]
        solve = solved["solve_seconds"] + _READING * rows[0]["seconds"]
        taken = rows[epoch - 1]["seconds"] + overhead * epoch + (1 + trials) * solve
        ratio = (rows[end]["seconds"] + overhead * (end + 1)) / taken
        return epoch, ratio, 100.0 * (solved["solve_test"] - mlp["mlp_test"])


RULES = {
    "churn alone": Rule(0),
    "churn and standstill": Rule(2),
    "trials, whatever the lead": Rule(2, 0.006, far_ahead=-math.inf, part=math.inf),
    "trials after 2 and 4, at the last": Rule(2, 0.006, (2, 4), far_ahead=math.inf),
    "trials after 1, 2 and 4": Rule(2, 0.006),
    "half of the errors, a tenth": Rule(2, -math.inf, part=0.1, far_ahead=0.0, half=1.0, end=3),
}


def compare(records: dict[tuple[str, int], list[Row]]) -> None:
    """Print what rules make of what was recorded."""
    for name, rule in RULES.items():
        for title, chosen in (("chosen on", False), ("held out", True)):
            outcomes = {key: rule.outcome(rows) for key, rows in records.items() if (key[0] in HELD_OUT) is chosen}
            ratio = math.exp(np.mean([math.log(o[1]) for o in outcomes.values()]))
            points = [o[2] for o in outcomes.values()]
            print(f"{name:<36}{title:<10}{ratio:6.2f} times {np.mean(points):+6.2f} points, worst {min(points):+6.2f}")
            for (data, seed), (epoch, each, difference) in outcomes.items():
                print(f"    {data:<26}{seed} epoch {epoch:>2} {each:6.2f} times {difference:+6.2f} points")


def read(path: Path) -> dict[tuple[str, int], list[Row]]:
    records: dict[tuple[str, int], list[Row]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            key = line.pop("set"), int(line.pop("seed"))
            records.setdefault(key, []).append({name: float(value) for name, value in line.items() if value})
    return records


def main() -> None:
    """Record all sets and seeds, unless what was recorded is to be compared only."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder with the sets of the design, as .npz files")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--compare", action="store_true", help="compare rules on what was recorded")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / f"solve_trials_{machine()}.csv"
    if not arguments.compare:
        makers: dict[str, Callable[[], Arrays]] = {
            name: lambda make=make: split(*make()) for name, make in MADE.items()
        }
        if arguments.data is not None:
            makers |= {name: lambda name=name: stored(arguments.data / f"{name}.npz") for name in STORED}
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["set", "seed", *COLUMNS, *SOLVE_COLUMNS])
            writer.writeheader()
            for seed in range(arguments.seeds):
                for name, make in makers.items():
                    for row in record(make(), seed):
                        writer.writerow({"set": name, "seed": seed} | {k: f"{v:.6g}" for k, v in row.items()})
                    file.flush()
    compare(read(path))


if __name__ == "__main__":
    main()
