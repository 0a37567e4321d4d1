"""Statistics of a few seeds: a mean, and the difference of two means."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

ROUNDING = 1e-14  # relative: some tens of float64's last digits


@dataclass(frozen=True)
class Summary:
    """Summary statistics of a sample, in the sample's own unit.

    Attributes:
      n: sample size.
      mean: arithmetic mean; nan when `n` is 0.
      std: sample standard deviation (`n - 1` in the denominator); nan when `n` < 2.
      median: nan when `n` is 0.
      low: lower end of the confidence interval of the mean; nan when `n` < 2 or the values do not
        differ (`has_spread`).
      high: its upper end.
    """

    n: int
    mean: float
    std: float
    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Anova:
    """One-way analysis of variance: `statistic` is F with (`between`, `within`) degrees."""

    statistic: float
    p: float
    between: int
    within: int


def has_spread(values: ArrayLike) -> bool:
    """Whether the values of a sample differ by more than float64 rounds.

    The rounding matters: `np.std([0.1, 0.1, 0.1])` is not 0.

    >>> has_spread([0.1, 0.1, 0.1]), has_spread([0.5]), has_spread([0.1, 0.2])
    (False, False, True)
    """
    x = np.asarray(values, float)
    return bool(len(x) > 1 and np.ptp(x) > ROUNDING * np.abs(x).max())


def summarize(values: Sequence[float], confidence: float = 0.95) -> Summary:
    """Mean, spread and Student-t interval of a sample.

    The interval is `mean ± t * std / sqrt(n)` with `t` the quantile of `n - 1` degrees of freedom
    (Student, "The probable error of a mean", Biometrika 6, 1908). It assumes roughly normal,
    independent values, and describes the mean, not the next run.

    >>> s = summarize([0.80, 0.82, 0.84])
    >>> f"{s.mean:.2f} ± {s.std:.2f} [{s.low:.3f}, {s.high:.3f}]"
    '0.82 ± 0.02 [0.770, 0.870]'
    """
    x = np.asarray(values, float)
    n = len(x)
    mean, median = (float(x.mean()), float(np.median(x))) if n else (math.nan, math.nan)
    if n < 2:
        return Summary(n, mean, math.nan, median, math.nan, math.nan)
    if not has_spread(x):
        return Summary(n, mean, 0.0, median, math.nan, math.nan)
    std = float(x.std(ddof=1))
    half = _quantile(confidence, n - 1) * std / math.sqrt(n)
    return Summary(n, mean, std, median, mean - half, mean + half)


def welch_interval(
    a: Sequence[float], b: Sequence[float], confidence: float = 0.95
) -> tuple[float, float]:
    """Confidence interval of `mean(a) - mean(b)`, the variances not assumed equal.

    Degrees of freedom after Welch and Satterthwaite (Welch, "The generalization of 'Student's'
    problem when several different population variances are involved", Biometrika 34, 1947).

    Returns:
      (low, high); nan where either sample has fewer than two values, or neither has any spread:
      without spread a difference cannot be distinguished from chance.
    """
    if min(len(a), len(b)) < 2 or not (has_spread(a) or has_spread(b)):
        return math.nan, math.nan
    difference = float(np.mean(a) - np.mean(b))
    variances = [float(np.var(x, ddof=1)) / len(x) if has_spread(x) else 0.0 for x in (a, b)]
    largest = max(variances)
    if largest == 0.0:  # underflow
        return math.nan, math.nan
    # Ratios, because squares of tiny variances underflow.
    u, v = (variance / largest for variance in variances)
    degrees = (u + v) ** 2 / (u**2 / (len(a) - 1) + v**2 / (len(b) - 1))
    half = _quantile(confidence, degrees) * math.sqrt(sum(variances))
    return difference - half, difference + half


def anova(groups: Sequence[Sequence[float]]) -> Anova | None:
    """Whether the means of several groups differ by more than the spread inside them.

    Fisher's one-way test (Fisher, "Statistical Methods for Research Workers", 1925), by
    `scipy.stats.f_oneway`; it assumes independent groups of like variance.

    Returns:
      None with fewer than two groups of at least two values, or with no spread at all.
    """
    usable = [np.asarray(g, float) for g in groups if len(g) > 1]
    if len(usable) < 2 or not any(map(has_spread, usable)):
        return None
    statistic, p = stats.f_oneway(*usable)
    within = sum(map(len, usable)) - len(usable)
    return Anova(float(statistic), float(p), len(usable) - 1, within)


def _quantile(confidence: float, degrees: float) -> float:
    return float(stats.t.ppf(0.5 + confidence / 2, degrees))
