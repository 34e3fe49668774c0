"""How good the scores of a reward model are, against labels: order, calibration, and where errors are found.

Pure functions of numpy arrays. ``p`` are probabilities [N] that something is good, ``good`` labels [N], bools or
shares in [0, 1]; every function gives NaN where there is nothing to measure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating]
BINS = 15
"""Of equal width, as in Guo et al. 2017."""
DEEPEST = 8
"""Steps of this depth and deeper count together."""


@dataclass(frozen=True)
class Reliability:
    """Of each bin of probabilities [B]: the mean one, the share of good ones, and how many there are; NaN in an empty
    bin.
    """

    predicted: Array
    good: Array
    count: npt.NDArray[np.int64]

    @property
    def error(self) -> float:
        """The expected calibration error: Σ count/N · |good − predicted|."""
        total = self.count.sum()
        if not total:
            return math.nan
        return float(np.nansum(self.count * np.abs(self.good - self.predicted)) / total)


def sigmoid(numbers: npt.ArrayLike) -> Array:
    """Of any size without overflow."""
    found: Array = np.exp(-np.logaddexp(0.0, -np.asarray(numbers, np.float64)))
    return found


def reliability(p: npt.ArrayLike, good: npt.ArrayLike, bins: int = BINS) -> Reliability:
    """Bins of equal width over [0, 1] (Guo et al. 2017, arXiv:1706.04599); the last one holds 1."""
    chance, label = _both(p, good)
    place = np.minimum((chance * bins).astype(np.int64), bins - 1)
    count = np.bincount(place, minlength=bins)
    whole = np.where(count > 0, count, np.nan)
    predicted, share = (np.bincount(place, weights=of, minlength=bins) / whole for of in (chance, label))
    return Reliability(predicted, share, count)


def calibration_error(p: npt.ArrayLike, good: npt.ArrayLike, bins: int = BINS) -> float:
    """Expected calibration error (Naeini et al. 2015; arXiv:1706.04599, eq. 3)."""
    return reliability(p, good, bins).error


def brier(p: npt.ArrayLike, good: npt.ArrayLike) -> float:
    """Mean (p − good)² (Brier 1950)."""
    chance, label = _both(p, good)
    return float(np.mean((chance - label) ** 2)) if chance.size else math.nan


def accuracy(p: npt.ArrayLike, good: npt.ArrayLike) -> float:
    """Share of those on the right side of ½."""
    chance, label = _both(p, good)
    return float(np.mean((chance >= 0.5) == (label >= 0.5))) if chance.size else math.nan


def pair_accuracy(better: npt.ArrayLike, worse: npt.ArrayLike) -> float:
    """Share of pairs whose better answer has the higher score; equal scores count half, as in an AUC: a head that
    begins at 0 orders nothing, and is at chance.
    """
    _, right = pair_confidence(better, worse)
    return float(np.mean(right)) if right.size else math.nan


def pair_confidence(better: npt.ArrayLike, worse: npt.ArrayLike) -> tuple[Array, Array]:
    """How sure a Bradley–Terry model is of its own order of each pair, σ|margin|, and whether that order is right: 1,
    0, or ½ of a tie.
    """
    margin = np.asarray(better, np.float64) - np.asarray(worse, np.float64)
    return sigmoid(np.abs(margin)), (np.sign(margin) + 1) / 2


def auc(scores: npt.ArrayLike, good: npt.ArrayLike) -> float:
    """Area under the ROC curve: the share of (good, bad) pairs in which the good one has the higher score, equal ones
    counting half (Mann & Whitney 1947). Labels of ½ and more are good. NaN without both kinds.
    """
    values, label = _both(scores, good)
    is_good = label >= 0.5
    goods, bads = int(is_good.sum()), int((~is_good).sum())
    if not goods or not bads:
        return math.nan
    rank = _ranks(values)
    return float((rank[is_good].sum() - goods * (goods + 1) / 2) / (goods * bads))


def auc_by_depth(scores: npt.ArrayLike, good: npt.ArrayLike, depth: npt.ArrayLike) -> dict[int, float]:
    """Depth → AUC among the steps of that depth (0 is an answer's first step); DEEPEST holds the deeper ones too.
    Depths with one kind of label alone are left out.
    """
    values, label = _both(scores, good)
    place = np.minimum(np.asarray(depth, np.int64), DEEPEST)
    found = {int(d): auc(values[place == d], label[place == d]) for d in np.unique(place)}
    return {d: area for d, area in found.items() if not math.isnan(area)}


def rank_correlation(scores: npt.ArrayLike, truth: npt.ArrayLike) -> float:
    """Spearman's: Pearson's of the ranks, equal values sharing their mean rank. NaN where either is all equal."""
    first, second = (_ranks(values) - (values.size + 1) / 2 for values in _both(scores, truth))
    spread = math.sqrt(float(first @ first) * float(second @ second))
    return float(first @ second) / spread if spread else math.nan


@dataclass(frozen=True)
class FirstErrors:
    """Share of wrong answers whose first wrong step was found, and of right ones in which none was."""

    wrong: float
    right: float

    @property
    def f1(self) -> float:
        """Their harmonic mean; NaN where there are no answers of one kind."""
        both = self.wrong + self.right
        return 2 * self.wrong * self.right / both if both else 0.0 if both == 0 else math.nan


def first_errors(p: Sequence[npt.ArrayLike], good: Sequence[npt.ArrayLike], threshold: float = 0.5) -> FirstErrors:
    """ProcessBench's measure (arXiv:2412.06559, §3.4). ``p`` and ``good``: of each answer those of its steps, in order;
    a label may be NaN behind the first wrong step. A step with p below ``threshold`` is called wrong. Answers without a
    label are left out.
    """
    found: dict[bool, list[bool]] = {True: [], False: []}
    for chances, labels in zip(p, good, strict=True):
        label = np.asarray(labels, np.float64)
        if np.isnan(label).all():
            continue
        true, told = _first(label < 0.5), _first(np.asarray(chances, np.float64) < threshold)
        found[true < 0].append(told == true)
    shares = {kind: float(np.mean(hits)) if hits else math.nan for kind, hits in found.items()}
    return FirstErrors(wrong=shares[False], right=shares[True])


def _first(wrong: npt.NDArray[np.bool_]) -> int:
    """The place of the first wrong step, −1 where there is none."""
    return int(np.argmax(wrong)) if wrong.any() else -1


def _ranks(values: Array) -> Array:
    """From 1; equal values share their mean rank."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    found: Array = (np.cumsum(count) - (count - 1) / 2)[place]
    return found


def _both(p: npt.ArrayLike, good: npt.ArrayLike) -> tuple[Array, Array]:
    first, second = np.asarray(p, np.float64), np.asarray(good, np.float64)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"scores {first.shape} and labels {second.shape} must be of one length")
    return first, second
