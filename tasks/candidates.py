"""What job=reject reads: the rows of its files as candidates, evaluation sets to compare with, and further data.

Invariants: a row whose question, answer or reward is not what the settings say stops the job with its file and number,
before data are handed on; what can only be judged is left to rejection.py. Rows come one by one and are not held.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from offtrail.core.problem import Problem
from offtrail.tasks.base import TaskError
from offtrail.tasks.config import TaskConfig
from offtrail.tasks.data_config import RejectConfig
from offtrail.tasks.examples import examples_in, question_and_answer
from offtrail.tasks.jsonl import JsonlConfig, read_prompts
from offtrail.tasks.mixture import MixtureConfig
from offtrail.tasks.overlap import Held, Index, Item, question_of
from offtrail.tasks.registry import family_config
from offtrail.tasks.rejection import Candidate
from offtrail.tasks.rows import rows_in
from offtrail.tasks.templates import templates_of, without_template


def candidates_in(config: RejectConfig, main: str, task: TaskConfig) -> Iterator[Candidate]:
    """The rows of every file; ``main`` is the reward component that they are judged by, ``task`` what judges those that
    are to be verified. Raises TaskError with file and row where a question cannot be read, or a reward is missing that
    there should be, or what it would be verified by.
    """
    for path in config.paths:
        name = f"reject.paths={path}"
        for row in rows_in(Path(path), "reject.paths"):
            problem, answer = question_and_answer(row, name, config.prompt_field, config.answer_field)
            where = f"{name}, {row.place}"
            if answer is not None and not isinstance(answer, str):
                raise TaskError(
                    f"{where}: field {config.answer_field!r} is not text; mend the line, or set reject.answer_field"
                )
            reward = reward_of(row.fields, main, where)
            gold = family = ""
            if reward is None and config.unscored == "refuse":
                raise TaskError(
                    f"{where}: has no reward ({main!r} in `rewards`, or `reward`), which reject.min_reward asks for; "
                    "sample with a reward, or say reject.unscored=verify, keep or drop"
                )
            if reward is None and config.unscored == "verify":
                gold = gold_of(row.fields, config.gold_field, where, "reject")
                family = family_of(row.fields, task, where, "reject")
            finished, problem = row.fields.get("finish") in (None, "stop"), replace(problem, answer=answer or "")
            yield Candidate(problem, name, reward, finished, row.fields, gold, family)


def reward_of(fields: Mapping[str, Any], main: str, where: str) -> float | None:
    """A row's reward: of the main component, where it tells them apart, else its `reward`; None where it has none, or
    NaN, which a table may hold. TaskError where that is no number.
    """
    rewards = fields.get("rewards")
    given = rewards.get(main) if isinstance(rewards, dict) else fields.get("reward")
    if given is None:
        return None
    if isinstance(given, bool) or not isinstance(given, int | float | Decimal):
        raise TaskError(f"{where}: its reward is {given!r}, no number; mend the line")
    return None if math.isnan(given) else float(given)


JUDGES = {
    "reject": ("neither a reward nor a", "reject.unscored=verify"),
    "label": ("no", "job=label"),
    "prefer": ("no", "prefer.by=verify"),
}
"""Section of the settings → what a row lacks without a gold answer, and what judges by it."""


def text_of_answer(answer: Any, field: str, where: str, section: str) -> str:
    """A row's answer. Raises TaskError, which names ``section``'s key, where there is none, or it is no text."""
    if isinstance(answer, str):
        return answer
    what = "is missing" if answer is None else "is not text"
    raise TaskError(f"{where}: field {field!r} {what}; mend the line, or set {section}.answer_field")


def gold_of(fields: Mapping[str, Any], name: str, where: str, section: str) -> str:
    """A row's gold answer as text. Raises TaskError where there is none."""
    given = fields.get(name)
    if isinstance(given, bool) or not isinstance(given, str | int | Decimal) or not str(given).strip():
        known, (lacks, judge) = ", ".join(map(repr, fields)) or "none", JUDGES[section]
        raise TaskError(
            f"{where}: has {lacks} gold answer in field {name!r} (fields: {known}), by which {judge} judges; add one, "
            f"or set {section}.gold_field"
        )
    return format(given, "f") if isinstance(given, Decimal) else str(given)


def family_of(fields: Mapping[str, Any], task: TaskConfig, where: str, section: str) -> str:
    """The family of a mixture by whose verifier a row is judged; empty where the task is none. Raises TaskError where
    the row names none of the families.
    """
    if not isinstance(task, MixtureConfig):
        return ""
    named = fields.get("task")
    if isinstance(named, str) and named in task.weights:
        return named
    what = f"field 'task' is {named!r}, none of" if "task" in fields else "has no field 'task' that names one of"
    raise TaskError(
        f"{where}: {what} the families {', '.join(task.weights)}, by whose verifiers {JUDGES[section][1]} judges; "
        "add it, or take each family's rows by themselves, with task=FAMILY"
    )


def held_index(config: RejectConfig, task: TaskConfig, held_out: Sequence[Problem]) -> Held | None:
    """What candidates are compared with: sets of files, whose fields may be those of ``task``, and its ``held_out``
    problems; None where there are none. Raises TaskError.
    """
    mixed = task.settings if isinstance(task, MixtureConfig) else {}
    within = [family_config(name, given, task.held_out_share) for name, given in mixed.items()]
    templates = templates_of([task, *within])
    items = [Item(f"task={one.task}", f"held-out problem {one.index}", question_of(one, templates)) for one in held_out]
    fields = task if isinstance(task, JsonlConfig) else JsonlConfig()
    for path in config.decontaminate_against:
        read = read_prompts(Path(path), fields, "reject.decontaminate_against")
        items += (replace(item, text=without_template(item.text, templates)) for item in read)
    return Held(Index(items), templates) if items else None


def examples_of_mix(name: str, entry: Mapping[str, Any]) -> Iterator[Problem]:
    """The rows of one further file. Raises TaskError."""
    fields = entry.get("prompt_field", "prompt"), entry.get("answer_field", "answer")
    return examples_in(Path(entry["path"]), *fields, f"reject.mix.{name}.path")
