"""What the runs of a comparison say: intervals for each variant, and the verdict."""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from glai_lightning.comparison.runs import Run
from glai_lightning.comparison.statistics import Interval, mean_interval, ratio_interval, signed_rank_p
from glai_lightning.comparison.variants import REFERENCE
from glai_lightning.fitting.fit_record import Mode

Outcome = Literal["faster", "no difference", "slower"]
Clock = Literal["cpu_seconds", "seconds"]


@dataclass(frozen=True)
class Speedup:
    """How many times as fast as the MLP: the geometric mean over seeds of ratios of seconds.

    Args:
        mean: the geometric mean.
        low: lower end of its 95 % bootstrap interval; ``None`` for a single seed.
        high: upper end.
        p: of Wilcoxon's signed-rank test over the seeds that the ratio is 1; ``None`` for a single seed.
    """

    mean: float
    low: float | None
    high: float | None
    p: float | None

    @property
    def interval(self) -> Interval:
        """The mean and its interval."""
        return Interval(self.mean, self.low, self.high)


@dataclass(frozen=True)
class VariantSummary:
    """What the runs of a variant say beside those of the MLP, seed by seed.

    Args:
        speedup_finished: speed-up of the time to a finished head, by the comparison's clock.
        speedup_best: speed-up of the time to the own best validation score, likewise; ``None`` where a run has none.
        speedup_finished_wall: of the time to a finished head in wall-clock seconds, whatever the clock.
        test_difference: difference in test score, positive where the variant is better, whatever the mode; ``None``
            without test data.
        val_difference: the same of the best validation scores; ``None`` where a run has none.
        frozen_runs: how many runs ended frozen.
        num_runs: how many there are.
    """

    speedup_finished: Speedup
    speedup_best: Speedup | None
    speedup_finished_wall: Speedup
    test_difference: Interval | None
    val_difference: Interval | None
    frozen_runs: int
    num_runs: int


@dataclass(frozen=True)
class Verdict:
    """One plain sentence.

    Args:
        outcome: whether the variant is faster at a score that is not worse, slower, or neither.
        variant: the variant that is judged.
        sentence: the sentence.
    """

    outcome: Outcome
    variant: str
    sentence: str


@dataclass(frozen=True)
class Comparison:
    """The runs of a comparison, and what they say.

    Args:
        config: what was run.
        machine: what it was run on.
        score: name of the validation score.
        mode: whether the best score is the largest or the smallest.
        test_score: name of the test score; ``None`` without test data.
        clock: whose seconds the speed-ups are ratios of: 'cpu_seconds' on CPUs, 'seconds' on accelerators.
        runs: the runs, seed by seed.
        summary: for each variant what its runs say.
        verdict: the verdict.
    """

    config: dict[str, Any]
    machine: dict[str, Any]
    score: str
    mode: Mode
    test_score: str | None
    clock: Clock
    runs: list[Run]
    summary: dict[str, VariantSummary]
    verdict: Verdict

    @property
    def seeds(self) -> list[int]:
        """The seeds, in order."""
        return sorted({run.seed for run in self.runs})

    def of(self, variant: str) -> list[Run]:
        """Return the runs of a variant, by seed."""
        return sorted((run for run in self.runs if run.variant == variant), key=lambda run: run.seed)

    def as_dict(self) -> dict[str, Any]:
        """Return the comparison as ``comparison.json`` holds it."""
        entries = asdict(self)
        return {**entries, "runs": [run.as_dict() for run in self.runs]}


def summarise(
    runs: Iterable[Run],
    *,
    config: dict[str, Any],
    machine: dict[str, Any],
    score: str,
    mode: Mode,
    test_score: str | None,
    clock: Clock,
) -> Comparison:
    """Sum up the runs of a comparison; the arguments are those of ``Comparison``."""
    listed = list(runs)
    variants = list(dict.fromkeys(run.variant for run in listed))
    summary = {variant: _summarise_variant(listed, variant, mode, clock) for variant in variants}
    verdict = judge(summary, clock=clock, tested=test_score is not None)
    return Comparison(config, machine, score, mode, test_score, clock, listed, summary, verdict)


def _summarise_variant(runs: Sequence[Run], variant: str, mode: Mode, clock: Clock) -> VariantSummary:
    by_seed = {run.seed: run for run in runs if run.variant == variant}
    pairs = [(run, by_seed[run.seed]) for run in runs if run.variant == REFERENCE]
    sign = 1 if mode == "max" else -1

    def speedup(seconds: Callable[[Run], float | None]) -> Speedup | None:
        ratios = [(seconds(mlp), seconds(other)) for mlp, other in pairs]
        known = [above / below for above, below in ratios if above is not None and below]
        return _speedup(known) if len(known) == len(pairs) else None

    def difference(value: Callable[[Run], float | None]) -> Interval | None:
        values = [(value(mlp), value(other)) for mlp, other in pairs]
        known = [sign * (other - mlp) for mlp, other in values if mlp is not None and other is not None]
        return mean_interval(known) if len(known) == len(pairs) else None

    finished = speedup(lambda run: getattr(run, f"finished_{clock}"))
    wall = speedup(lambda run: run.finished_seconds)
    assert finished is not None
    assert wall is not None
    return VariantSummary(
        speedup_finished=finished,
        speedup_best=speedup(lambda run: getattr(run, f"best_{clock}")),
        speedup_finished_wall=wall,
        test_difference=difference(lambda run: run.test_score),
        val_difference=difference(lambda run: run.best_val_score),
        frozen_runs=sum(run.frozen for run in by_seed.values()),
        num_runs=len(by_seed),
    )


def _speedup(ratios: Sequence[float]) -> Speedup:
    interval = ratio_interval(ratios)
    # The test is about differences, and those of logarithms are what the geometric mean is the mean of.
    return Speedup(interval.mean, interval.low, interval.high, signed_rank_p([math.log(ratio) for ratio in ratios]))


def judge(summary: dict[str, VariantSummary], *, clock: Clock, tested: bool) -> Verdict:
    """Judge 'output+solve', or the first variant beside the MLP where that was not run.

    Faster: the interval of the speed-up to a finished head lies above 1, and that of the difference in score does not
    lie below 0. Slower: the interval of the speed-up lies below 1. Otherwise there is no difference to speak of.
    """
    variant = "output+solve" if "output+solve" in summary else next(name for name in summary if name != REFERENCE)
    side = summary[variant]
    score = side.test_difference if tested else side.val_difference
    speed = side.speedup_finished.interval
    worse = score is not None and score.lies_below(0)
    outcome: Outcome = "no difference"
    if speed.lies_below(1):
        outcome = "slower"
    elif speed.lies_above(1) and score is not None and not worse:
        outcome = "faster"
    return Verdict(outcome, variant, _sentence(outcome, variant, side, clock, score, tested=tested))


def _sentence(
    outcome: Outcome, variant: str, side: VariantSummary, clock: Clock, score: Interval | None, *, tested: bool
) -> str:
    speed = side.speedup_finished
    seconds = "CPU seconds" if clock == "cpu_seconds" else "seconds"
    which = "test score" if tested else "validation score (there is no test data)"
    means = "no score to compare" if score is None else f"a {which} {_better_or_worse(score)}"
    if speed.low is None or speed.high is None:
        return (
            f"No difference shown on this task: a single seed says nothing of chance ({variant} was {speed.mean:.2f} "
            f"times as fast to a finished head as the MLP, {seconds}, with {means})."
        )
    facts = (
        f"{variant} was {speed.mean:.2f} times as fast to a finished head as the MLP "
        f"({speed.low:.2f} to {speed.high:.2f}, {seconds}, {side.num_runs} seeds), with {means}"
    )
    stayed = side.num_runs - side.frozen_runs
    if stayed:
        facts += f"; it never settled and stayed an MLP in {stayed} of {side.num_runs} runs"
    titles = {"faster": "Faster on this task", "slower": "Slower on this task", "no difference": "No difference"}
    title = titles[outcome]
    if outcome == "no difference":
        faster = side.speedup_finished.interval.lies_above(1)
        title = "Faster on this task, but not at equal score" if faster else "No difference shown on this task"
    return f"{title}: {facts}."


def _better_or_worse(score: Interval) -> str:
    ends = "" if score.low is None else f" ({score.low:+.2g} to {score.high:+.2g})"
    if score.mean == 0:
        return f"that is the same{ends}"
    return f"that is {'better' if score.mean > 0 else 'worse'} by {abs(score.mean):.2g}{ends}"


def mean_of(runs: Iterable[Run], value: Callable[[Run], float | None]) -> float | None:
    """Return the mean over runs of a value; ``None`` where a run does not have it."""
    values = [value(run) for run in runs]
    known = [one for one in values if one is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None
