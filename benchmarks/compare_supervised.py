"""The supervised settings: every configuration in ``configs/``, compared as ``glai compare`` does.

Three data sets of cached features or pixels, each under a constant rate with early stopping, under one-cycle to the
end of its schedule, and at a high constant rate that suits the structure. Runs that are finished are kept in ``--to``,
where the same command goes on after an interruption. Writes every run and every summary to ``results/``.

    GLAI_DATA=folder/with/npz python benchmarks/compare_supervised.py
"""

import argparse
import dataclasses
import json
import os
import statistics
from pathlib import Path

from measuring import RESULTS, comparison_rows, machine, save_results, use_one_thread

from glai_lightning.cli.compare import compare_configuration
from glai_lightning.comparison import Comparison

CONFIGS = Path(__file__).parent / "configs"


def compare_all(names: list[str], data: Path, to: Path, more: list[str]) -> dict[str, Comparison]:
    """Compare the configurations of these names."""
    comparisons = {}
    for name in names:
        data_set = name.rsplit("_", 1)[0]
        files = ["--config", str(CONFIGS / f"{name}.yaml"), "--data.path", str(data / f"{data_set}.npz")]
        print(f"\n{name}\n", flush=True)
        comparisons[name] = compare_configuration([*files, "--to", str(to / name), *more])
    return comparisons


def summary_of(comparison: Comparison) -> dict[str, object]:
    """Return what a comparison says, without its runs."""
    summary = {variant: dataclasses.asdict(side) for variant, side in comparison.summary.items()}
    heads = {head: dataclasses.asdict(side) for head, side in comparison.heads.items()}
    return {"verdict": comparison.verdict.sentence, "machine": comparison.machine, "summary": summary, "heads": heads}


def print_geometric_means(comparisons: dict[str, Comparison], schedule: str) -> None:
    """Print, for each variant, the means over the data sets under one schedule."""
    chosen = [comparison for name, comparison in comparisons.items() if name.endswith(schedule)]
    for variant in chosen[0].summary if chosen else ():
        sides = [comparison.summary[variant] for comparison in chosen]
        finished = statistics.geometric_mean(side.speedup_finished.mean for side in sides)
        best = statistics.geometric_mean(side.speedup_best.mean for side in sides)
        difference = statistics.fmean(100 * side.test_difference.mean for side in sides)
        print(f"{schedule}, {variant}: finished {finished:.2f}x, own best {best:.2f}x, {difference:+.2f} points")


def main() -> None:
    names = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("GLAI_DATA", "."), help="folder of .npz files")
    parser.add_argument("--configs", nargs="+", choices=names, default=names)
    parser.add_argument("--to", type=Path, default=Path("runs") / "comparison", help="folder for the runs")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--name", default="compare_supervised", help="of the files of results")
    arguments, more = parser.parse_known_args()
    use_one_thread()
    comparisons = compare_all(arguments.configs, Path(arguments.data), arguments.to, more)
    rows = [
        {"configuration": name, **row}
        for name, comparison in comparisons.items()
        for row in comparison_rows(comparison)
    ]
    save_results(arguments.name, rows, arguments.results)
    summaries = {name: summary_of(comparison) for name, comparison in comparisons.items()}
    path = arguments.results / f"{arguments.name}_{machine()}.json"
    path.write_text(json.dumps(summaries, indent=1) + "\n")
    print(f"Written to {path}")
    for schedule in ("constant", "onecycle", "highrate"):
        print_geometric_means(comparisons, schedule)


if __name__ == "__main__":
    main()
