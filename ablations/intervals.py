"""Intervals and tests of a study of few seeds. Which keeps its promise was found by simulation, and the tests of this
file (tests/unit/test_ablations_intervals.py) simulate it again.

    two_way     other seeds *and* other questions: the interval of a verdict
    over_seeds  other seeds, these questions: where only each seed's mean is known
    sign_flip   the exact p beside either, which assumes no distribution

A percentile bootstrap over 8 seeds covers .89 where it says .95, a binomial over pooled questions far less where seeds
differ: neither is here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True, slots=True)
class Interval:
    """``low`` … ``high`` around ``mean``, in the unit of what was given."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} ({self.low:.3f}–{self.high:.3f})"


def two_way(outcomes: ArrayLike, level: float = 0.95) -> Interval:
    """Of the mean over [n, Q] outcomes of n seeds on the same Q questions, or of their paired differences between arms.

    Both are drawn from more: Var = S²_seed/n + S²_question/Q − S²_residual/(n·Q), not below S²_seed/n, with n − 1
    degrees of freedom. S² are of row means, of column means and of what these two leave. Raises ValueError on fewer
    than two seeds or questions.
    """
    cells = np.asarray(outcomes, np.float64)
    if cells.ndim != 2 or min(cells.shape) < 2:
        raise ValueError(f"two_way: needs [seeds, questions] with at least two of each, not {list(cells.shape)}")
    n, Q = cells.shape
    seeds, questions, mean = cells.mean(1), cells.mean(0), cells.mean()
    rest = cells - seeds[:, None] - questions + mean
    of_seeds = seeds.var(ddof=1) / n
    variance = of_seeds + questions.var(ddof=1) / Q - np.square(rest).sum() / ((n - 1) * (Q - 1)) / (n * Q)
    return _around(mean, max(variance, of_seeds), n - 1, level)


def over_seeds(values: ArrayLike, level: float = 0.95) -> Interval:
    """Student's t over n seeds' means, or over their paired differences. Raises ValueError on fewer than two."""
    seeds = np.asarray(values, np.float64)
    if seeds.ndim != 1 or len(seeds) < 2:
        raise ValueError(f"over_seeds: needs the values of at least two seeds, not {list(seeds.shape)}")
    return _around(seeds.mean(), seeds.var(ddof=1) / len(seeds), len(seeds) - 1, level)


def sign_flip(differences: ArrayLike) -> float:
    """Two-sided exact p of n paired differences' mean: the share of their 2ⁿ changes of sign that are as far from 0.

    It cannot fall below 2^(1 − n): 5 seeds never reach .05. Raises ValueError on none, or more than 20.
    """
    values = np.asarray(differences, np.float64)
    n = len(values)
    if not 1 <= n <= 20:
        raise ValueError(f"sign_flip: needs 1 to 20 differences, not {n}")
    signs = 1 - 2 * (np.arange(2**n)[:, None] >> np.arange(n) & 1)
    far = np.abs(signs @ values)
    # The observed one must count itself, whatever the order of its sum.
    return float((far >= abs(values.sum()) - 1e-12 * np.abs(values).sum()).mean())


def t_quantile(share: float, df: int) -> float:
    """The t with P(|T| ≤ t) = ``share`` for Student's T with ``df`` degrees of freedom (2.365 for .95 and 7)."""
    high = 1.0
    while _t_central(high, df) < share:
        high *= 2
    low = 0.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_central(middle, df) < share else (low, middle)
    return high


def _t_central(t: float, df: int) -> float:
    """P(|T| ≤ t), a finite sum for whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle, odd = math.atan(t / math.sqrt(df)), df % 2
    term, total = math.cos(angle) ** odd, 0.0
    for k in range(df // 2):
        total += term
        term *= math.cos(angle) ** 2 * (2 * k + 1 + odd) / (2 * k + 2 + odd)
    inner = math.sin(angle) * total
    return 2 / math.pi * (angle + inner) if odd else inner


def _around(mean: float, variance: float, df: int, level: float) -> Interval:
    half = t_quantile(level, df) * math.sqrt(variance)
    return Interval(float(mean), float(mean) - half, float(mean) + half)
