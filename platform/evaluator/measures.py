"""What n answers to each of Q questions say of a model: avg@n, pass@k, cons@k, and how sure that is. Pure numpy.

    scores [Q, n] ──► average, pass_at ─────────────────┐
    answers, scores ──► consensus ──────────────────────┼──► one value a question ──► over_questions
    marks, scores ──► best_of, and answers ──► weighted ┘
    counts above and below [Q, n] ──────────────────────────────────────────────────► ratio

Every measure gives one value a question, its expectation over the draw of the answers, so that an interval can be taken
over questions: the answers to one question are no independent observations (Miller 2024, arXiv:2411.00640).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offtrail.ablations.intervals import t_quantile

Values = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over questions with its standard error and 95 % interval; both NaN of a single question."""

    mean: float
    error: float
    low: float
    high: float


def average(scores: Values) -> Values:
    """avg@n, R1's pass@1 (arXiv:2501.12948, sec. 3): [Q] mean of each question's [Q, n] scores."""
    means: Values = scores.mean(axis=1)
    return means


def pass_at(scores: Values, k: int) -> Values:
    """pass@k: [Q] chance that one of k answers, drawn without return from the n, is right (a score of 1).

    Unbiased: 1 − C(n−c, k)/C(n, k) with c right ones (Chen et al. 2021, arXiv:2107.03374, eq. 1). ValueError unless
    1 ≤ k ≤ n.
    """
    n = scores.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k}: needs 1 ≤ k ≤ n = {n} answers a question")
    wrong = n - (scores >= 1.0).sum(axis=1)
    return np.array([1.0 - math.comb(int(w), k) / math.comb(n, k) for w in wrong])


def consensus(answers: Sequence[Sequence[str | None]], scores: Values, k: int, weights: Values | None = None) -> Values:
    """cons@k, a vote of k answers (Wang et al. 2023, arXiv:2203.11171): [Q] chance that the answer with the most votes
    is right.

    The n answers are cut into ⌊n/k⌋ votes of k, whose mean is taken. Equal texts vote together; None, no answer, does
    not vote, and a vote without any is lost. Of several with as many votes one is drawn at random: their mean counts.
    ``weights`` [Q, n] ≥ 0 count in place of 1. ValueError unless 1 ≤ k ≤ n.
    """
    weighed = np.ones(scores.shape) if weights is None else weights
    return _in_parts(
        lambda q, part: _vote(answers[q][part], scores[q, part], weighed[q, part]), scores.shape, k, f"cons@{k}"
    )


def weighted_vote(answers: Sequence[Sequence[str | None]], marks: Values, scores: Values, k: int) -> Values:
    """cons@k with votes that weigh ``marks`` [Q, n] ≥ 0, such as a process reward model's (Li et al. 2023,
    arXiv:2206.02336): [Q]. An answer without a mark (NaN) does not vote.
    """
    voting = [
        [None if np.isnan(mark) else answer for answer, mark in zip(row, of_row, strict=True)]
        for row, of_row in zip(answers, marks, strict=True)
    ]
    return consensus(voting, scores, k, np.nan_to_num(marks))


def best_of(marks: Values, scores: Values, k: int) -> Values:
    """Best of k by ``marks`` [Q, n], such as a reward model's (Cobbe et al. 2021, arXiv:2110.14168, section 4.2): [Q]
    chance that the one with the highest mark is right.

    Cut and drawn as `consensus` does it: ⌊n/k⌋ choices of k, whose mean is taken, and of several with the highest mark
    the mean counts. An answer without a mark (NaN) is never taken; a choice in which none has one is lost. ValueError
    unless 1 ≤ k ≤ n.
    """

    def choose(q: int, part: slice) -> float:
        of_part = marks[q, part]
        known = of_part[~np.isnan(of_part)]
        return float(scores[q, part][of_part == known.max()].mean()) if known.size else 0.0

    return _in_parts(choose, scores.shape, k, f"best of {k}")


def _in_parts(value: Callable[[int, slice], float], shape: tuple[int, ...], k: int, what: str) -> Values:
    """[Q]: of each question the mean value of its ⌊n/k⌋ parts of k answers."""
    Q, n = shape
    if not 1 <= k <= n:
        raise ValueError(f"{what}: needs 1 ≤ k ≤ n = {n} answers a question")
    parts = [slice(at, at + k) for at in range(0, n - k + 1, k)]
    return np.array([np.mean([value(q, part) for part in parts]) for q in range(Q)])


def _vote(answers: Sequence[str | None], scores: Values, weights: Values) -> float:
    votes: dict[str, float] = {}
    right: dict[str, list[float]] = {}
    for answer, score, weight in zip(answers, scores, weights, strict=True):
        if answer is not None:
            votes[answer] = votes.get(answer, 0.0) + float(weight)
            right.setdefault(answer, []).append(float(score))
    if not votes:
        return 0.0
    most = max(votes.values())
    # Sums of weights that are equal but for rounding are a tie.
    return float(np.mean([np.mean(right[answer]) for answer, sum_ in votes.items() if math.isclose(sum_, most)]))


def ratio(above: Values, below: Values) -> Estimate:
    """Σ above / Σ below over [Q, n] answers, such as words of reflection by words, with Student's t over questions.

    The error is the linearised one of a ratio of sums that are clustered by question (Cochran 1977, Sampling
    Techniques, section 6.3); where below is the same for all questions it is that of `over_questions`. Questions with
    nothing below are left out; all NaN where there is no other.
    """
    tops, bases = above.sum(axis=1), below.sum(axis=1)
    tops, bases = tops[bases > 0], bases[bases > 0]
    Q = len(bases)
    if not Q:
        return Estimate(math.nan, math.nan, math.nan, math.nan)
    mean = float(tops.sum() / bases.sum())
    if Q < 2:
        return Estimate(mean, math.nan, math.nan, math.nan)
    error = float(math.sqrt(Q / (Q - 1) * ((tops - mean * bases) ** 2).sum()) / bases.sum())
    half = t_quantile(0.95, Q - 1) * error
    return Estimate(mean, error, mean - half, mean + half)


def over_questions(values: Values) -> Estimate:
    """The mean of [Q] questions' values, with Student's t over them: for other questions and other answers."""
    Q, mean = len(values), float(values.mean())
    if Q < 2:
        return Estimate(mean, math.nan, math.nan, math.nan)
    error = float(values.std(ddof=1) / math.sqrt(Q))
    half = t_quantile(0.95, Q - 1) * error
    return Estimate(mean, error, mean - half, mean + half)


def sizes_up_to(n: int) -> list[int]:
    """1, 2, 4, … below n, and n: the k of a curve."""
    return [*(1 << i for i in range((n - 1).bit_length())), n]
