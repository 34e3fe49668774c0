"""Labels of the steps of answers (job=label): which beginnings of an answer are gone on with, and what that says.

    rows ─► answers_in ─► Candidate ─► Stepped ─┬─► by_rollouts, by_search: asks ⇄ shares of right rollouts ─┐
                                                └─► checked: the task's own checker ────────────────────────┴─► Labels

Pure: no model is asked here. A method is a generator that gives asks, is sent what came of them, and returns the labels
of each answer, so that a later ask may follow from the results of those before. A label is 1 where a step is good, 0
where it is not, None where that was not asked.

Invariant: labels are a function of the answers, the shares and the settings alone.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from offtrail.core.problem import Problem
from offtrail.rewards.steps import Steps
from offtrail.tasks.base import Task, TaskError
from offtrail.tasks.candidates import family_of, gold_of, text_of_answer
from offtrail.tasks.config import JUDGED_BY_MORE, TaskConfig
from offtrail.tasks.data_config import LabelConfig
from offtrail.tasks.examples import question_and_answer
from offtrail.tasks.programs import ProgramsConfig
from offtrail.tasks.rejection import Candidate
from offtrail.tasks.rows import rows_in
from offtrail.tasks.split import stream

Label = float | bool | None
Labels = list[Label]
Asks = list[tuple[int, int]]
"""(place of an answer, how many of its steps are kept) of each beginning that is gone on with."""
Method = Generator[Asks, Sequence[float], list[Labels]]
"""Sent: of each ask the share of right rollouts, NaN where there was no room for one."""
NOT_ITS_OWN = (
    "and the row is none of the task's training problems by its `index`; give the task's settings and the run.seed "
    "that it was sampled with"
)


@dataclass(frozen=True, slots=True)
class Stepped:
    """An answer by its steps: how many ``steps`` it has, whether the whole is ``right``, and whether its last step
    ``ends`` it, so that the whole's verdict is the last step's.
    """

    steps: int
    right: bool
    ends: bool

    @property
    def asked(self) -> int:
        """The steps from whose end there is something to go on with: all, or all but the last."""
        return self.steps - self.ends


def by_rollouts(answers: Sequence[Stepped], *, hard: bool) -> Method:
    """A step's label is the share of right rollouts from its end, or whether any is right (Math-Shepherd's soft and
    hard estimates, arXiv:2312.08935).
    """
    asks = [(place, steps) for place, one in enumerate(answers) for steps in range(1, one.asked + 1)]
    shares = yield asks
    labels: list[Labels] = [[] for _ in answers]
    for (place, _), share in zip(asks, shares, strict=True):
        labels[place].append(None if math.isnan(share) else share)
    for one, own in zip(answers, labels, strict=True):
        own += [float(one.right)] * one.ends
    return [[label if label is None else label > 0 for label in own] for own in labels] if hard else labels


def by_search(answers: Sequence[Stepped]) -> Method:
    """Of each wrong answer the first step from whose end no rollout is right, by bisection (OmegaPRM, arXiv:2406.06592,
    §3.2): steps before it are good, it is not, those behind it have no label. All steps of a right answer are good.

    It takes for granted that nothing right comes from behind such a step: ⌈log2 S⌉ rounds in place of S asks.
    """
    good = [one.steps if one.right else 0 for one in answers]
    bad = [one.steps + 1 if one.right or not one.ends else one.steps for one in answers]
    while asks := [(i, (a + b) // 2) for i, (a, b) in enumerate(zip(good, bad, strict=True)) if b - a > 1]:
        shares = yield asks
        for (i, steps), share in zip(asks, shares, strict=True):
            (good if share > 0 else bad)[i] = steps
    return [
        [True] * (first - 1) + [False] * (first <= one.steps) + [None] * (one.steps - first)
        for one, first in zip(answers, bad, strict=True)
    ]


def most_asks(config: LabelConfig, answers: Sequence[Stepped]) -> int:
    """How many beginnings will be gone on with, at most."""
    if config.method == "rollouts":
        return sum(one.asked for one in answers)
    return sum(one.asked.bit_length() for one in answers if not one.right)


def noised(labels: Labels, noise: float, seed: int, place: int) -> tuple[Labels, list[int]]:
    """Labels of the answer at a place of which each known one, x, is 1 − x with chance ``noise``; and which are, by
    their steps from 0.
    """
    known = [step for step, label in enumerate(labels) if label is not None]
    turned = [step for step in known if stream("label", seed, place, step).random() < noise]
    return [_turned(label) if step in turned else label for step, label in enumerate(labels)], turned


def _turned(label: Label) -> Label:
    return not label if isinstance(label, bool) else None if label is None else 1 - label


def answers_in(config: LabelConfig, task: Task, kind: TaskConfig) -> Iterator[Candidate]:
    """The rows of every file, each with the gold answer by which it is judged as a problem of ``task``, whose settings
    are ``kind``. What more a checker or verifier asks of a problem comes from the task, where the row's `index` is its
    place among the training problems.

    Raises TaskError with file and row where one cannot be read or judged.
    """
    for path in config.paths:
        name = f"label.paths={path}"
        for row in rows_in(Path(path), "label.paths"):
            problem, answer = question_and_answer(row, name, config.prompt_field, config.answer_field)
            where = f"{name}, {row.place}"
            answer = text_of_answer(answer, config.answer_field, where, "label")
            gold = gold_of(row.fields, config.gold_field, where, "label")
            family = family_of(row.fields, kind, where, "label")
            finished = row.fields.get("finish") in (None, "stop")
            known = _meta(row.fields.get("index"), problem, task)
            if not known and ((family or kind.name) in JUDGED_BY_MORE or isinstance(kind, ProgramsConfig)):
                raise TaskError(
                    f"{where}: task={family or kind.name} is judged by more than a gold answer, {NOT_ITS_OWN}"
                )
            problem = replace(problem, answer=answer, meta={**known, **problem.meta})
            yield Candidate(problem, name, None, finished, row.fields, gold, family)


def _meta(index: Any, problem: Problem, task: Task) -> Mapping[str, Any]:
    """What a task says of its training problem at a place, if that is what the row asks."""
    if isinstance(index, bool) or not isinstance(index, int) or index < 0:
        return {}
    try:
        drawn = task.train(index)
    except TaskError:
        return {}
    same = drawn.prompt == problem.prompt and [*map(dict, drawn.messages)] == [*map(dict, problem.messages)]
    return drawn.meta if same else {}


def judged_as(one: Candidate, task: str) -> Problem:
    """The problem that an answer is judged by."""
    return replace(one.problem, task=one.family or task, answer=one.gold)


def checked(one: Candidate, task: Task) -> list[bool]:
    """What the task's checker says of each step; empty where it has none. Raises TaskError where it lacks something of
    the problem.
    """
    try:
        return task.check_steps(judged_as(one, task.name), one.problem.answer)
    except KeyError as error:
        raise TaskError(
            f"{one.source}, {one.problem.meta['place']}: the checker of task={task.name} asks for its problem's "
            f"{error}, {NOT_ITS_OWN}"
        ) from None


def require_steps(config: LabelConfig, task: Task, kind: TaskConfig) -> None:
    """Raise TaskError for a row that cannot be labelled, or where no answer has steps."""
    cut, rows, stepped = Steps.of(config.cut, "label.cut"), 0, 0
    for one in answers_in(config, task, kind):
        rows += 1
        steps = len(one.problem.answer if cut.by == "tokens" else cut.cut(one.problem.answer))
        stepped += steps > 0 and (config.method != "exact" or steps == len(checked(one, task)))
    if not stepped:
        raise TaskError(without_steps(config, task.name, rows))


def without_steps(config: LabelConfig, task: str, rows: int) -> str:
    """Why none of so many answers can be labelled."""
    given = config.cut or {"by": "newline"}
    if config.method == "exact":
        return (
            f"label.method=exact: none of {rows:,} answers has the steps that the checker of task={task} sees (free "
            f"text has no checker) by label.cut={given}; set label.cut, or take label.method=rollouts"
        )
    return f"label.cut={given}: none of {rows:,} answers has a step; cut them by what they hold"
