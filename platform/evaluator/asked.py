"""What the answers to a set's questions are, as arrays: `asked_of`. report.py says what they come to.

Shapes: Q questions, n answers each. A question whose prompt left no room for an answer has a score of 0 with each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from offtrail.core.types import FINISH_REASONS, Float32, Group, Problem
from offtrail.platform.config.sets import LOGPROB, EvalSet
from offtrail.platform.evaluator.measures import Values
from offtrail.platform.model.text import Text
from offtrail.rewards import behaviour
from offtrail.rewards.answer import find_answer
from offtrail.rewards.format import parse
from offtrail.rewards.grading.choice import letter
from offtrail.rewards.grading.latex import said
from offtrail.tasks.base import Measured
from offtrail.tasks.config import TaskConfig
from offtrail.tasks.registry import make_task

STOP = FINISH_REASONS.index("stop")


@dataclass(frozen=True)
class Ratio:
    """A measure that is a ratio of counts: Σ ``above`` / Σ ``below``, both [Q, n]."""

    above: Values
    below: Values


@dataclass(frozen=True)
class Asked:
    """The n answers to each of a set's Q questions: their [Q, n] scores of the main component, texts (None: no answer)
    by which they vote, weights of these votes, lengths in tokens, and whether they were cut at the longest length.
    ``room`` [Q]: whether the prompt left room for an answer. ``ratios``: further measures by name. ``shots`` and
    ``beside``: see EvalSet.
    """

    name: str
    scores: Values
    answers: list[list[str | None]]
    lengths: Values
    cut: Values
    weights: Values | None = None
    room: Values | None = None
    ratios: dict[str, Ratio] = field(default_factory=dict)
    shots: int = 0
    beside: str = ""


def asked_of(one: EvalSet, problems: Sequence[Problem], made: Mapping[int, Group], text: Text) -> Asked:
    """``made``: the groups by the place of their question. Raises ValueError where eval.vote_weight cannot be had."""
    Q, n, reward = len(problems), one.samples, one.config.reward
    scores, lengths, cut, weights = (np.zeros((Q, n)) for _ in range(4))
    answers: list[list[str | None]] = [[None] * n for _ in problems]
    counts: dict[str, Values] = {}
    task = make_task(one.config.task, one.config.run.seed, load=False)
    target = reward.settings.get("language", {}).get("target", "en")
    for place, problem in enumerate(problems):
        group, found = made.get(place), list[str | None]([None] * n)
        if group is not None:
            scores[place] = np.nan_to_num(group.components[reward.main].astype(np.float64))
            lengths[place], cut[place] = group.lengths, group.finish != STOP
            weights[place] = vote_weights(group, one.config.eval.vote_weight)
            told = [text.answer_text(group.problem, sample.tokens) for sample in group.samples()]
            ended = (group.finish == STOP).tolist()
            found = [find_answer(words, parse(words), end, reward) for words, end in zip(told, ended, strict=True)]
            answers[place] = [None if answer is None else ballot(answer, one.config.task) for answer in found]
            for i, (words, end) in enumerate(zip(told, ended, strict=True)):
                _note(counts, (Q, n), (place, i), "behaviour/", behaviour.of_answer(words, finished=end, target=target))
        if isinstance(task, Measured):
            for i, answer in enumerate(found):
                _note(counts, (Q, n), (place, i), "", task.counts(problem, answer))
    room = np.array([place in made for place in range(Q)], np.float64)
    ratios = _ratios(counts, task.RATIOS if isinstance(task, Measured) else {})
    return Asked(one.label, scores, answers, lengths, cut, weights, room, ratios, one.shots, one.beside)


def vote_weights(group: Group, name: str) -> Float32:
    """What each of a group's n answers weighs in a vote [n], at least 0. Raises ValueError where there is no such
    score, or one is below 0.

    `logprob`: the exponential of the mean log-probability of its tokens, at the sampling temperature (Wang et al. 2023,
    arXiv:2203.11171, eq. 1): answers that are long weigh no less for it.
    """
    if name == LOGPROB:
        means = [float(sample.logprobs.mean()) if len(sample.logprobs) else -np.inf for sample in group.samples()]
        return np.asarray(np.exp(means), np.float32)
    channel = group.channels.get(name)
    if channel is not None and channel.axis == "sample":
        scores = channel.values.astype(np.float32)
    elif name in group.components:
        scores = np.nan_to_num(group.components[name])
    else:
        known = ", ".join((LOGPROB, *group.components, *(k for k, c in group.channels.items() if c.axis == "sample")))
        raise ValueError(f"eval.vote_weight={name}: the answers have no such score, but {known}")
    if (scores < 0).any():
        raise ValueError(f"eval.vote_weight={name}: a vote cannot weigh less than 0, and one weighs {scores.min():.3g}")
    return np.asarray(scores, np.float32)


def ballot(answer: str, config: TaskConfig) -> str:
    """The text by which an answer votes: equal numbers, or letters, vote together where the task compares such."""
    compare, lenient = getattr(config, "compare", ""), getattr(config, "compare_policy", "") == "lenient"
    if compare == "choice":
        return letter(answer, lenient=lenient) or answer
    number = said(answer, lenient=lenient) if compare == "value" else None
    try:
        return answer if number is None else str(number.value * number.factor)
    except ValueError:  # of more digits than Python writes
        return answer


def _note(
    counts: dict[str, Values], shape: tuple[int, int], at: tuple[int, int], prefix: str, found: Mapping[str, float]
) -> None:
    for name, value in found.items():
        counts.setdefault(f"{prefix}{name}", np.zeros(shape))[at] = value


def _ratios(counts: Mapping[str, Values], of_task: Mapping[str, tuple[str, str, float]]) -> dict[str, Ratio]:
    """The task's, then behaviour's, as far as there is anything to divide by."""
    named = {name: (above, below, factor) for name, (above, below, factor) in of_task.items()}
    named |= {
        f"behaviour/{name}": (f"behaviour/{above}", f"behaviour/{below}", factor)
        for name, (above, below, factor) in behaviour.RATIOS.items()
    }
    found = {}
    for name, (above, below, factor) in named.items():
        if below in counts and counts[below].any():
            found[name] = Ratio(factor * counts.get(above, np.zeros_like(counts[below])), counts[below])
    return found
