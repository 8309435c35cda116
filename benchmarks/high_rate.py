"""Heads trained at three times the rate at which an MLP does best, then frozen and solved.

The noise of a high rate stays in the numbers, which are solved, and less in the structure. The reference trains at 1e-3
under early stopping, as in ``one_line.py``, where the sets are described; it is also run at 3e-3. The others train at
3e-3: by the callback's rule, frozen after two epochs whatever the rule says, and the latter in one pass. All sides of a
seed are run in turn.

    python benchmarks/high_rate.py --data DATA --heads mlp gelu silu tanh glu
"""

import argparse
import itertools
from pathlib import Path
from typing import Any

from measuring import RESULTS, save_results, use_one_thread
from one_line import HELD_OUT, fit, makers_of

from glai_lightning.comparison.heads import HEADS

HIGH = 3e-3
#: The rate of each side, and the arguments of its callback; ``None`` for early stopping.
SIDES: dict[str, tuple[float, dict[str, Any] | None]] = {
    "early stopping": (1e-3, None),
    "early stopping, high rate": (HIGH, None),
    "by the rule": (HIGH, {}),
    "by the rule, in one pass": (HIGH, {"one_pass": True}),
    "after two epochs": (HIGH, {"freeze_at_epoch": 2}),
    "after two epochs, in one pass": (HIGH, {"freeze_at_epoch": 2, "one_pass": True}),
}


def main() -> None:
    """Run all sides in turn, and write a CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the sets of the design, as .npz files")
    parser.add_argument("--sets", nargs="+", help="names of sets; by default all")
    parser.add_argument("--heads", nargs="+", default=["mlp"], choices=HEADS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--name", default="high_rate", help="of the file of results")
    arguments = parser.parse_args()
    use_one_thread()
    makers, rows = makers_of(arguments.data), []
    for name in arguments.sets or list(makers):
        arrays = makers[name]()
        for head, seed in itertools.product(arguments.heads, range(arguments.seeds)):
            for turn in range(len(SIDES)):
                side = list(SIDES)[(seed + turn) % len(SIDES)]
                rate, of_callback = SIDES[side]
                run = fit(arrays, seed, of_callback, rate=rate, head=head)
                written = {key: f"{value:.6g}" for key, value in run.items()}
                rows.append(
                    {"set": name, "held_out": name in HELD_OUT, "head": head, "seed": seed, "side": side, **written}
                )
        save_results(arguments.name, rows, arguments.results)


if __name__ == "__main__":
    main()
