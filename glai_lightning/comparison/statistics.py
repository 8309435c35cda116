"""Statistics of paired runs: what a few seeds say about a ratio or a difference, and how surely."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from glai_lightning.checks import UserValueError


@dataclass(frozen=True)
class Interval:
    """A mean over seeds, and the interval in which it is expected.

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


def mean_interval(
    values: Sequence[float], *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Return the mean of values with its percentile bootstrap interval.

    The values are drawn anew with replacement; the interval holds the middle part of the means of such draws. With few
    values it is narrower than it should be: of five, about one in six misses the true mean instead of one in twenty.

    Args:
        values: one number for each seed, finite, at least one.
        confidence: part of the drawn means that the interval holds, in (0, 1).
        resamples: number of draws.
        seed: of the draws, so that the same values always have the same interval.

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
    given = np.asarray(values, dtype=float)
    if given.size == 0 or not np.isfinite(given).all():
        raise UserValueError(f"Expected `values` to hold finite numbers, at least one, but got {list(values)}.")
    mean = float(given.mean())
    if given.size == 1:
        return Interval(mean, None, None)
    draws = np.random.default_rng(seed).choice(given, size=(resamples, given.size)).mean(axis=1)
    outside = (1 - confidence) / 2
    low, high = np.quantile(draws, [outside, 1 - outside])
    return Interval(mean, float(low), float(high))


def ratio_interval(ratios: Sequence[float]) -> Interval:
    """Return the geometric mean of ratios with its bootstrap interval, as ``mean_interval`` does of their logarithms.

    Args:
        ratios: one ratio for each seed, above 0.

    Returns:
        The geometric mean and its interval.

    Raises:
        ValueError: if there is no ratio, or one is not a finite number above 0.

    Example:
        >>> ratio_interval([2.0, 8.0]).mean
        4.0
    """
    if not all(0 < ratio < math.inf for ratio in ratios):
        raise UserValueError(f"Expected `ratios` to hold finite numbers above 0, but got {list(ratios)}.")
    logarithms = mean_interval([math.log2(ratio) for ratio in ratios])
    low, high = (None if end is None else 2.0**end for end in (logarithms.low, logarithms.high))
    return Interval(2.0**logarithms.mean, low, high)


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
    # Half a second of imports that the tables alone need.
    from scipy.stats import wilcoxon  # type: ignore[import-untyped]

    if len(differences) < 2:
        return None
    if not any(differences):
        return 1.0
    return float(wilcoxon(differences).pvalue)
