"""What a comparison adds to the fits that it measures: the same fits with and without its recorder, in turn.

The recorder reads clocks at every validation and at the ends of an epoch, adds up losses, and copies the weights of
the best epoch; while it takes notes its clock stands still, but a fit that is watched takes longer all the same.
Batches are small here, which is the worst case.

    python benchmarks/comparison_overhead.py
"""

import argparse
import logging
import statistics
import warnings

from lightning.pytorch import seed_everything
from measuring import interleave, median_cpu, median_ratio, quiet_trainer, save_results, use_one_thread

from glai_lightning import SupervisedModule, mlp_head
from glai_lightning.comparison.runs import Recorder
from glai_lightning.comparison.statistics import speedup
from glai_lightning.datamodules import DigitsDataModule


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=1024)
    arguments = parser.parse_args()
    use_one_thread()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    data = DigitsDataModule(batch_size=32)
    data.setup("fit")
    counted: list[tuple[float, float]] = []

    def fit(*callbacks: Recorder) -> None:
        seed_everything(0, verbose=False)
        trainer = quiet_trainer(arguments.epochs, *callbacks)
        trainer.fit(SupervisedModule(mlp_head(64, arguments.hidden, 10)), data)

    def recorded() -> None:
        recorder = Recorder("val/accuracy", "max")
        fit(recorder)
        record = recorder.fit_record
        counted.append((record.finished_cpu_seconds, record.bookkeeping_cpu_seconds))

    times = interleave({"plain": fit, "recorded": recorded}, arguments.repeats, warmups=1)
    counted = counted[1:]
    pairs = zip(times["recorded"], times["plain"], strict=True)
    overhead = speedup([recorded.cpu / plain.cpu for recorded, plain in pairs])
    on_the_clock = statistics.median(
        finished / plain.cpu for (finished, _), plain in zip(counted, times["plain"], strict=True)
    )
    rows = [
        {
            "epochs": arguments.epochs,
            "hidden": arguments.hidden,
            "plain_cpu_seconds": round(median_cpu(times["plain"]), 4),
            "recorded_cpu_seconds": round(median_cpu(times["recorded"]), 4),
            "overhead_median": round(median_ratio(times["recorded"], times["plain"]) - 1, 4),
            "overhead_low": round(overhead.low - 1, 4),
            "overhead_high": round(overhead.high - 1, 4),
            "clock_against_plain": round(on_the_clock - 1, 4),
            "bookkeeping": round(statistics.median(notes / finished for finished, notes in counted), 4),
        }
    ]
    save_results("comparison_overhead", rows)


if __name__ == "__main__":
    main()
