"""What the runs of a comparison say: intervals for each variant, and the verdict by non-inferiority."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

from glai_lightning.comparison.heads import HEADS
from glai_lightning.comparison.runs import Run
from glai_lightning.comparison.statistics import Interval, Speedup, speedup, student_interval
from glai_lightning.comparison.variants import REFERENCE, solved_name
from glai_lightning.fitting.fit_record import Mode

Outcome = Literal["faster", "no difference", "slower", "worse"]
Clock = Literal["cpu_seconds", "seconds"]
#: What a run says, ``None`` where it does not.
Value = Callable[[Run], float | None]


@dataclass(frozen=True)
class VariantSummary:
    """What the runs of a variant say beside those of the MLP, seed by seed.

    Args:
        speedup_finished: speed-up of the time to a finished head, by the comparison's clock.
        speedup_best: speed-up of the time to the own best validation score, likewise; ``None`` where a run has none.
        speedup_finished_wall: of the time to a finished head in wall-clock seconds, whatever the clock.
        test_difference: difference in test score with its Student-t interval, positive where the variant is better,
            whatever the mode; ``None`` without test data.
        val_difference: the same of the best validation scores; ``None`` where a run has none.
        mlp_reached_seconds: seconds after which the MLP reached the variant's best validation score, the mean over the
            seeds in which it did; ``None`` if it never did.
        mlp_reached_runs: how many those are.
        frozen_runs: how many runs ended frozen.
        num_runs: how many there are.
    """

    speedup_finished: Speedup
    speedup_best: Speedup | None
    speedup_finished_wall: Speedup
    test_difference: Interval | None
    val_difference: Interval | None
    mlp_reached_seconds: float | None
    mlp_reached_runs: int
    frozen_runs: int
    num_runs: int


@dataclass(frozen=True)
class HeadSummary:
    """What freezing and solving a head does beside never freezing it, seed by seed.

    Args:
        parameters: numbers in its parameters, fixed ones included.
        speedup_finished: speed-up of the time to a finished head, by the comparison's clock.
        difference: difference in test score, or in the best validation score without test data; positive is better.
    """

    parameters: int
    speedup_finished: Speedup
    difference: Interval | None


@dataclass(frozen=True)
class Verdict:
    """One plain sentence.

    Args:
        outcome: whether the variant is faster at a score that is not worse, slower, worse, or none of these.
        variant: the variant that is judged.
        margin: the difference in score up to which a variant is not worse.
        sentence: the sentence.
    """

    outcome: Outcome
    variant: str
    margin: float
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
        heads: for each head that was run on both sides, what freezing and solving it does.
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
    heads: dict[str, HeadSummary] = field(default_factory=dict)

    @property
    def seeds(self) -> list[int]:
        """The seeds, in order."""
        return sorted({run.seed for run in self.runs})

    def of(self, variant: str) -> list[Run]:
        """Return the runs of a variant, by seed."""
        return sorted((run for run in self.runs if run.variant == variant), key=lambda run: run.seed)

    def beside(self, variant: str, other: str) -> tuple[Speedup | None, Interval | None]:
        """Return how many times as fast as another a variant finished, and its difference in score, seed by seed."""
        pairs = list(zip(self.of(other), self.of(variant), strict=True))
        return _speedup(pairs, self.finished), _difference(pairs, self.score_of, self.mode)

    def finished(self, run: Run) -> float:
        """Return the seconds of a run to its finished head, by the clock of the comparison."""
        seconds: float = getattr(run, f"finished_{self.clock}")
        return seconds

    def score_of(self, run: Run) -> float | None:
        """Return the test score of a run, or its best validation score where nothing was tested."""
        return run.test_score if self.test_score else run.best_val_score

    def as_dict(self) -> dict[str, Any]:
        """Return the comparison as ``comparison.json`` holds it."""
        return {**asdict(self), "runs": [run.as_dict() for run in self.runs]}


def summarise(runs: Iterable[Run], *, margin: float, **described: Any) -> Comparison:
    """Sum up the runs of a comparison.

    Args:
        runs: the runs.
        margin: the difference in score up to which a variant is not worse.
        **described: ``config``, ``machine``, ``score``, ``mode``, ``test_score`` and ``clock`` of the ``Comparison``.
    """
    listed = list(runs)
    mode, clock = described["mode"], described["clock"]
    variants = list(dict.fromkeys(run.variant for run in listed))
    summary = {variant: _summarise_variant(listed, variant, mode, clock) for variant in variants}
    verdict = judge(summary, clock=clock, test_score=described["test_score"], score=described["score"], margin=margin)
    comparison = Comparison(runs=listed, summary=summary, verdict=verdict, **described)
    for head in HEADS:
        solved = solved_name(head)
        if head in summary and solved in summary:
            faster, difference = comparison.beside(solved, head)
            assert faster is not None
            comparison.heads[head] = HeadSummary(comparison.of(head)[0].head_parameters, faster, difference)
    return comparison


def _summarise_variant(runs: Sequence[Run], variant: str, mode: Mode, clock: Clock) -> VariantSummary:
    by_seed = {run.seed: run for run in runs if run.variant == variant}
    pairs = [(run, by_seed[run.seed]) for run in runs if run.variant == REFERENCE]
    finished = _speedup(pairs, lambda run: getattr(run, f"finished_{clock}"))
    wall = _speedup(pairs, lambda run: run.finished_seconds)
    assert finished is not None
    assert wall is not None
    reached = [_reached(mlp, other.best_val_score, mode, clock) for mlp, other in pairs]
    known = [seconds for seconds in reached if seconds is not None]
    return VariantSummary(
        speedup_finished=finished,
        speedup_best=_speedup(pairs, lambda run: getattr(run, f"best_{clock}")),
        speedup_finished_wall=wall,
        test_difference=_difference(pairs, lambda run: run.test_score, mode),
        val_difference=_difference(pairs, lambda run: run.best_val_score, mode),
        mlp_reached_seconds=sum(known) / len(known) if known else None,
        mlp_reached_runs=len(known),
        frozen_runs=sum(run.frozen for run in by_seed.values()),
        num_runs=len(by_seed),
    )


def _speedup(pairs: Sequence[tuple[Run, Run]], seconds: Value) -> Speedup | None:
    ratios = [(seconds(one), seconds(other)) for one, other in pairs]
    known = [above / below for above, below in ratios if above is not None and below]
    return speedup(known) if len(known) == len(pairs) else None


def _difference(pairs: Sequence[tuple[Run, Run]], value: Value, mode: Mode) -> Interval | None:
    sign = 1 if mode == "max" else -1
    values = [(value(one), value(other)) for one, other in pairs]
    known = [sign * (b - a) for a, b in values if a is not None and b is not None]
    return student_interval(known) if len(known) == len(pairs) else None


def _reached(mlp: Run, score: float | None, mode: Mode, clock: Clock) -> float | None:
    sign = 1 if mode == "max" else -1
    seconds = (
        float(getattr(epoch, clock))
        for epoch in mlp.epochs
        if score is not None and epoch.val_score is not None and sign * epoch.val_score >= sign * score
    )
    return next(seconds, None)


def judge(
    summary: dict[str, VariantSummary], *, clock: Clock, score: str, test_score: str | None, margin: float
) -> Verdict:
    """Judge 'output+solve', or the first variant beside the MLP where that was not run.

    Faster: the interval of the speed-up to a finished head lies above 1, and that of the difference in score above
    ``-margin``. Slower: the interval of the speed-up lies below 1. Worse: that of the score lies below 0, and not above
    ``-margin``. Otherwise no difference is shown.

    Args:
        summary: for each variant what its runs say.
        clock: whose seconds the speed-ups are ratios of.
        score: name of the validation score.
        test_score: name of the test score; ``None`` to judge by the validation score.
        margin: the difference in score up to which a variant is not worse.
    """
    variant = "output+solve" if "output+solve" in summary else next(name for name in summary if name != REFERENCE)
    side = summary[variant]
    difference = side.test_difference if test_score is not None else side.val_difference
    not_worse = difference is not None and difference.lies_above(-margin)
    outcome: Outcome = "no difference"
    if side.speedup_finished.lies_below(1):
        outcome = "slower"
    elif difference is not None and difference.lies_below(0) and not not_worse:
        outcome = "worse"
    elif side.speedup_finished.lies_above(1) and not_worse:
        outcome = "faster"
    write = partial(signed, margin=margin)
    name = test_score or f"{score} (there is no test data)"
    facts = (
        f"{variant} finished {times(side.speedup_finished)} as fast as the MLP "
        f"({'CPU seconds' if clock == 'cpu_seconds' else 'seconds'}, {side.num_runs} "
        f"{'seed' if side.num_runs == 1 else 'seeds'}, p {_p(side.speedup_finished)}); {name} {write(difference)}, "
        f"margin {margin:g}"
    )
    if side.frozen_runs < side.num_runs:
        stayed = side.num_runs - side.frozen_runs
        facts += f"; it never settled and stayed an MLP in {stayed} of {side.num_runs} runs"
    return Verdict(outcome, variant, margin, f"{_title(outcome, side, not_worse=not_worse)}: {facts}.")


def _title(outcome: Outcome, side: VariantSummary, *, not_worse: bool) -> str:
    if side.num_runs == 1:
        return "No difference shown, because a single seed says nothing of chance"
    if outcome == "no difference" and side.speedup_finished.lies_above(1):
        return "Faster, but the score may be worse by more than the margin"
    titles: dict[Outcome, str] = {
        "faster": "Faster, and not worse",
        "slower": "Slower",
        "worse": "Worse",
        "no difference": "No difference shown" if not_worse else "No difference shown, neither in time nor in score",
    }
    return titles[outcome]


def times(interval: Interval) -> str:
    """Write a speed-up: '1.56 times (1.40 to 1.72)'."""
    ends = "" if interval.low is None else f" ({interval.low:.2f} to {interval.high:.2f})"
    return f"{interval.mean:.2f} times{ends}"


def signed(interval: Interval | None, *, margin: float) -> str:
    """Write a difference in score, to a digit that the margin can be compared with."""
    if interval is None:
        return "unknown"
    # A margin of 0.003 is written to 0.0001.
    form = f"+.{max(0, 1 - _exponent(margin))}f"
    ends = "" if interval.low is None else f" ({interval.low:{form}} to {interval.high:{form}})"
    return f"{interval.mean:{form}}{ends}"


def _exponent(value: float) -> int:
    return int(f"{value:e}".partition("e")[2]) if value > 0 else -2


def _p(side: Speedup) -> str:
    return "unknown" if side.p is None else f"{side.p:.3f}"
