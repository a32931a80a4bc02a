"""What a handful of seeds says: interquartile means, bootstrap and Student intervals, profiles, probability of improvement.

Aggregates over seeds and tasks follow Agarwal et al. 2021, "Deep reinforcement learning at the edge of the statistical precipice".
A score matrix is (seeds, tasks). Values that are not finite are an error: a failed seed is to be reported, not averaged away.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """A value between the ends of its confidence interval, which are NaN where one value says nothing about its spread."""

    value: float
    low: float
    high: float


def mean_ci(values: Any, confidence: float = 0.95) -> Estimate:
    """The mean of independent values (n,) and its Student t interval."""
    values = _finite(values).reshape(-1)
    mean, n = float(values.mean()), len(values)
    if n == 1:
        return Estimate(mean, math.nan, math.nan)
    half = t_quantile(0.5 + confidence / 2, n - 1) * float(values.std(ddof=1)) / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half)


def mean_difference_ci(a: Any, b: Any, paired: bool = False, confidence: float = 0.95) -> Estimate:
    """mean(a) - mean(b) and its interval: Welch's for independent (n,) and (m,), or Student's of a - b where entries are pairs."""
    a, b = _finite(a).reshape(-1), _finite(b).reshape(-1)
    if paired:
        if len(a) != len(b):
            raise ValueError(f"pairs need equally many values, not {len(a)} and {len(b)}")
        return mean_ci(a - b, confidence)
    difference = float(a.mean() - b.mean())
    if min(len(a), len(b)) == 1:
        return Estimate(difference, math.nan, math.nan)
    parts = [float(x.var(ddof=1)) / len(x) for x in (a, b)]
    variance = sum(parts)
    if variance == 0:
        return Estimate(difference, difference, difference)
    df = variance**2 / sum(part**2 / (len(x) - 1) for part, x in zip(parts, (a, b)))
    half = t_quantile(0.5 + confidence / 2, df) * math.sqrt(variance)
    return Estimate(difference, difference - half, difference + half)


def iqm(values: Any) -> float:
    """Mean of what is left of all values together after a quarter of them, rounded down, is cut off at either end."""
    values = np.sort(_finite(values), axis=None)
    cut = len(values) // 4
    return float(values[cut : len(values) - cut].mean())


def bootstrap(
    values: Any,
    statistic: Callable[[np.ndarray], float],
    reps: int = 2000,
    seed: int = 0,
    stratified: bool = True,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval (low, high) of `statistic` of a (seeds, tasks) matrix, or of (n,) values, under resampling of seeds.

    `stratified` draws every task's seeds by themselves, as suits runs that are independent; otherwise whole rows are drawn.
    """
    values = _matrix(values)
    seeds, tasks = values.shape
    rng = np.random.default_rng(seed)
    draws = np.stack([rng.integers(0, seeds, (reps, seeds)) for _ in range(tasks if stratified else 1)], axis=-1)
    samples = np.array([statistic(values[rows, np.arange(tasks)]) for rows in draws])
    low, high = np.percentile(samples, [50 - 50 * confidence, 50 + 50 * confidence])
    return float(low), float(high)


def performance_profile(scores: Any, thresholds: Any) -> np.ndarray:
    """The share of runs that score above each of `thresholds` (k,), tasks weighing equally: (k,)."""
    return (_matrix(scores)[..., None] > np.asarray(thresholds, np.float64)).mean(axis=(0, 1))


def probability_of_improvement(x: Any, y: Any) -> float:
    """How often a run of x beats a run of y on the same task, ties counting half, averaged over tasks (Mann-Whitney's U / nm).

    x (n, tasks) and y (m, tasks), or (n,) and (m,).
    """
    x, y = _matrix(x), _matrix(y)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"x has {x.shape[1]} tasks, y has {y.shape[1]}")
    return float((np.sign(x[:, None] - y[None]) / 2 + 0.5).mean())


def t_quantile(p: float, df: float) -> float:
    """The t below which Student's distribution with `df` >= 1 degrees of freedom has probability `p`, 0.5 <= p < 1.

    With t = sqrt(df) tan(angle) the density is proportional to cos(angle)^(df - 1), which Gauss-Legendre nodes integrate.
    """
    if not (0.5 <= p < 1 and df >= 1):
        raise ValueError(f"t_quantile needs 0.5 <= p < 1 and df >= 1, not {p} and {df}")
    nodes, weights = np.polynomial.legendre.leggauss(128)
    target = (p - 0.5) * math.sqrt(math.pi) * math.exp(math.lgamma(df / 2) - math.lgamma((df + 1) / 2))
    low, high = 0.0, math.pi / 2
    for _ in range(64):
        angle = (low + high) / 2
        mass = angle / 2 * float(weights @ np.cos(angle / 2 * (nodes + 1)) ** (df - 1))
        low, high = (angle, high) if mass < target else (low, angle)
    return math.sqrt(df) * math.tan((low + high) / 2)


def _finite(values: Any) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.size == 0:
        raise ValueError("no values")
    if not np.isfinite(values).all():
        raise ValueError(f"{int((~np.isfinite(values)).sum())} of {values.size} values are not finite")
    return values


def _matrix(values: Any) -> np.ndarray:
    values = _finite(values)
    if values.ndim > 2:
        raise ValueError(f"scores are (seeds, tasks) or (seeds,), not {values.shape}")
    return values if values.ndim == 2 else values[:, None]
