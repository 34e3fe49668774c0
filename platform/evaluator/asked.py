"""What the answers to a set's questions are, as arrays: `asked_of`. report.py says what they come to.

Shapes: Q questions, n answers each. A question whose prompt left no room for an answer has a score of 0 with each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import numpy as np

from offtrail.core.types import FINISH_REASONS, Float32, Group, Problem
from offtrail.platform.config.schema import Config
from offtrail.platform.config.sets import LOGPROB, EvalSet
from offtrail.platform.evaluator.measures import Values
from offtrail.platform.model.scoring import scorings
from offtrail.platform.model.text import Text
from offtrail.rewards import behaviour
from offtrail.rewards.answer import find_answer
from offtrail.rewards.format import parse
from offtrail.rewards.grading.choice import letter
from offtrail.rewards.grading.latex import said
from offtrail.rewards.step_config import Aggregate
from offtrail.rewards.steps import aggregate
from offtrail.tasks.base import Measured
from offtrail.tasks.config import TaskConfig
from offtrail.tasks.registry import make_task

STOP = FINISH_REASONS.index("stop")
AGGREGATE_NAMES: tuple[Aggregate, ...] = get_args(Aggregate)


@dataclass(frozen=True)
class Ratio:
    """A measure that is a ratio of counts: Σ ``above`` / Σ ``below``, both [Q, n]."""

    above: Values
    below: Values


@dataclass(frozen=True)
class Marks:
    """What a model of scorer.models, which lies in ``folder``, says of each of the n answers in one number: ``values``
    [Q, n], NaN without a score, of its steps by an aggregate where it reads steps. ``own``: by the one that its entry
    names. ``weighs``: whether none is below 0, so that it can weigh votes. ``unscored``: answers that were given and
    have none; ``versions`` of the model that made them.
    """

    model: str
    folder: Path
    values: Values
    own: bool
    weighs: bool
    unscored: int
    versions: tuple[int, ...]


@dataclass(frozen=True)
class Asked:
    """The n answers to each of a set's Q questions: their [Q, n] scores of the main component, texts (None: no answer)
    by which they vote, weights of these votes, lengths in tokens, and whether they were cut at the longest length.
    ``room`` [Q]: whether the prompt left room for an answer. ``ratios``: further measures by name. ``shots`` and
    ``beside``: see EvalSet. ``marks`` by NAME, or NAME/AGGREGATE.
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
    marks: dict[str, Marks] = field(default_factory=dict)


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
    marks = marks_of(one.config, (Q, n), made)
    return Asked(one.label, scores, answers, lengths, cut, weights, room, ratios, one.shots, one.beside, marks)


def marks_of(config: Config, shape: tuple[int, int], made: Mapping[int, Group]) -> dict[str, Marks]:
    """Of each model that was asked, by each aggregate of its steps, where it reads steps. A product of what is no
    probability, and a vote that weighs less than 0, would say nothing: there is none.
    """
    found: dict[str, Marks] = {}
    for name, model in scorings(config).items():
        asked = {place: group for place, group in made.items() if name in group.components}
        if not asked:
            continue
        probable, steps = model.spec.squash == "sigmoid", model.spec.reads == "steps"
        unscored = sum(int(np.isnan(group.components[name]).sum()) for group in asked.values())
        versions = {group.scored_by[name].version for group in asked.values() if name in group.scored_by}
        for how in AGGREGATE_NAMES if steps else (model.aggregate,):
            if how == "product" and steps and not probable:
                continue
            values = np.full(shape, np.nan)
            for place, group in asked.items():
                values[place] = marks(group, name, how)
            found[f"{name}/{how}" if steps else name] = Marks(
                name, model.folder, values, how == model.aggregate, probable, unscored, tuple(sorted(versions))
            )
    return found


def marks(group: Group, name: str, how: Aggregate) -> Values:
    """[n]: an aggregate of the scores of each answer's steps; of one without steps, or a model that reads none, what
    its component says, NaN without a score.
    """
    component, channel = group.components[name].astype(np.float64), group.channels.get(name)
    if channel is None or channel.axis != "step":
        return component
    by_sample = [channel.values[group.step_samples == i] for i in range(group.size)]
    return np.array([aggregate(of, how) if of.size else component[i] for i, of in enumerate(by_sample)])


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
