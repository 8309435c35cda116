"""Statistics of paired runs: what a few seeds say about a ratio or a difference, and how surely."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from glai_lightning.checks import UserValueError

_CONFIDENCE = 0.95
_RESAMPLES = 10_000


@dataclass(frozen=True)
class Interval:
    """A mean over seeds, and the 95 % interval in which it is expected.

    Args:
        mean: the mean.
        low: lower end of the interval; ``None`` where a single value says nothing of its spread.
        high: upper end of the interval, likewise.
    """

    mean: float
    low: float | None
    high: float | None

    def lies_above(self, value: float) -> bool:
        """Tell whether the whole interval lies above a value; not without an interval."""
        return self.low is not None and self.low > value

    def lies_below(self, value: float) -> bool:
        """Tell whether the whole interval lies below a value; not without an interval."""
        return self.high is not None and self.high < value


@dataclass(frozen=True)
class Speedup(Interval):
    """How many times as fast as the MLP: the geometric mean over seeds of ratios of seconds, and its interval.

    Args:
        p: of Wilcoxon's signed-rank test over the seeds that the ratio is 1; ``None`` for a single seed.
    """

    p: float | None


def mean_interval(values: Sequence[float]) -> Interval:
    """Return the mean of values with its percentile bootstrap interval.

    The values are drawn anew with replacement; the interval holds the middle 95 % of the means of such draws, which are
    the same ones every time. With few values it is narrower than it should be: of five, about one in six misses the
    true mean instead of one in twenty.

    Args:
        values: one number for each seed, finite, at least one.

    Returns:
        The mean and its interval; without ends for a single value.

    Raises:
        ValueError: if there is no value, or one is not finite.

    Example:
        >>> mean_interval([1.0, 1.0, 1.0])
        Interval(mean=1.0, low=1.0, high=1.0)
        >>> mean_interval([2.0])
        Interval(mean=2.0, low=None, high=None)
    """
    given = _checked(values)
    if given.size == 1:
        return Interval(float(given.mean()), None, None)
    draws = np.random.default_rng(0).choice(given, size=(_RESAMPLES, given.size)).mean(axis=1)
    low, high = np.quantile(draws, [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2])
    return Interval(float(given.mean()), float(low), float(high))


def student_interval(differences: Sequence[float]) -> Interval:
    """Return the mean of paired differences with its interval by Student's t distribution.

    Args:
        differences: one for each seed, finite, at least one.

    Returns:
        The mean and its interval, of no width where all are the same; without ends for a single difference.

    Raises:
        ValueError: if there is no difference, or one is not finite.

    Example:
        >>> interval = student_interval([0.01, 0.02, 0.03])
        >>> round(interval.low, 4), round(interval.high, 4)
        (-0.0048, 0.0448)
    """
    # Half a second of imports that the tables alone need.
    from scipy.stats import t  # type: ignore[import-untyped]

    given = _checked(differences)
    mean = float(given.mean())
    if given.size == 1:
        return Interval(mean, None, None)
    half = float(t.ppf((1 + _CONFIDENCE) / 2, given.size - 1) * given.std(ddof=1) / math.sqrt(given.size))
    return Interval(mean, mean - half, mean + half)


def speedup(ratios: Sequence[float]) -> Speedup:
    """Return the geometric mean of ratios with its bootstrap interval, as ``mean_interval`` does of their logarithms.

    Args:
        ratios: one ratio for each seed, above 0.

    Raises:
        ValueError: if there is no ratio, or one is not a finite number above 0.

    Example:
        >>> speedup([2.0, 8.0]).mean
        4.0
    """
    if not all(0 < ratio < math.inf for ratio in ratios):
        raise UserValueError(f"Expected `ratios` to hold finite numbers above 0, but got {list(ratios)}.")
    logarithms = [math.log2(ratio) for ratio in ratios]
    interval = mean_interval(logarithms)
    low, high = (None if end is None else 2.0**end for end in (interval.low, interval.high))
    # The test is about differences, and those of logarithms are what the geometric mean is the mean of.
    return Speedup(2.0**interval.mean, low, high, signed_rank_p(logarithms))


def signed_rank_p(differences: Sequence[float]) -> float | None:
    """Return the two-sided p of Wilcoxon's signed-rank test that differences are symmetric about 0.

    Five seeds that all point the same way have a p of 0.0625, which is the least that five can have.

    Args:
        differences: one difference for each seed.

    Returns:
        The p; 1 where all differences are 0, ``None`` for a single one, of which the test says nothing.

    Example:
        >>> signed_rank_p([0.3, 0.2, 0.4, 0.1, 0.5])
        0.0625
    """
    from scipy.stats import wilcoxon

    if len(differences) < 2:
        return None
    if not any(differences):
        return 1.0
    return float(wilcoxon(differences).pvalue)


def _checked(values: Sequence[float]) -> np.ndarray:
    given = np.asarray(values, dtype=float)
    if given.size == 0 or not np.isfinite(given).all():
        raise UserValueError(f"Expected `values` to hold finite numbers, at least one, but got {list(values)}.")
    return given
