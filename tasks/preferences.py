"""Labelled answers from a file or folder (reward_model.path; tasks/rows.py): pairs of a better and a worse answer, or
answers of which each is good or not.

    pairs    {prompt, chosen, rejected}, prompt a text or messages; or chosen and rejected as messages that differ in
             the last one, which is the assistant's; or, behind a prompt, as that one message each (TRL)
    judged   {prompt, answer, label}, label true, false, or the share of judges who call it good

The command reads them before anything starts, the learner when it begins: what is wrong with a row is said at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from offtrail.core.problem import Problem
from offtrail.tasks.base import TaskError
from offtrail.tasks.examples import messages_of, question_and_answer, text_of
from offtrail.tasks.jsonl import as_lines
from offtrail.tasks.lines import Row
from offtrail.tasks.rows import rows_in

Of = Literal["answer", "response"]
FIELDS = "reward_model.fields"


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one problem, whose ``task`` names the file and ``meta["place"]`` the row."""

    problem: Problem
    chosen: str
    rejected: str


@dataclass(frozen=True, slots=True)
class Judged:
    """An answer and how good it is, from 0 to 1."""

    problem: Problem
    answer: str
    label: float


def pairs_in(path: Path, fields: Mapping[str, str], key: str, of: Of) -> Iterator[Pair]:
    """The pairs of the file or folder that ``key`` names, one by one, but for those that say `tie: true`. ``fields``:
    our names → the file's; ``of``: what of an answer is read.

    Raises TaskError with file and row; for a pair whose texts are equal, and for an empty answer, too.
    """
    rows = (row for row in rows_in(path, key) if row.fields.get("tie") is not True)
    return (_pair(named(row, fields, f"{key}={path}", FIELDS), f"{key}={path}", of) for row in rows)


def judged_in(path: Path, fields: Mapping[str, str], key: str, of: Of) -> Iterator[Judged]:
    """The same of judged answers."""
    return (_judged(named(row, fields, f"{key}={path}", FIELDS), f"{key}={path}", of) for row in rows_in(path, key))


def named(row: Row, fields: Mapping[str, str], name: str, key: str) -> Row:
    """The row with its fields under our names; ``key`` says which these are. Raises TaskError where one is missing."""
    for ours, theirs in fields.items():
        if theirs not in row.fields:
            known = ", ".join(map(repr, row.fields)) or "none"
            raise TaskError(
                f"{name}, {row.place}: has no field {theirs!r} (fields: {known}), which {key}.{ours} names; mend the "
                "line, or the key"
            )
    return replace(row, fields=row.fields | {ours: row.fields[theirs] for ours, theirs in fields.items()})


def share_of(value: Any, where: str) -> float:
    """A label as a number. Raises TaskError, which opens with ``where`` and the label's name, where it is none."""
    if isinstance(value, bool | int | float | Decimal) and 0 <= value <= 1:
        return float(value)
    raise TaskError(f"{where} is {value!r}: must be true, false or a number from 0 to 1; mend the line")


def answer_part(text: str) -> str:
    """What stands behind the thought; nothing of one that was never closed."""
    _, closed, rest = text.rpartition("</think>")
    return "" if not closed and "<think>" in text else rest


def _pair(row: Row, name: str, of: Of) -> Pair:
    where = f"{name}, {row.place}"
    problem, chosen, rejected = _texts(row, name, where)
    for field, text in (("chosen", chosen), ("rejected", rejected)):
        _check_read(text, field, of, where)
    if chosen == rejected:
        raise TaskError(f"{where}: 'chosen' and 'rejected' are equal; a pair says which is better: delete the line")
    if of == "answer" and answer_part(chosen) == answer_part(rejected):
        raise TaskError(
            f"{where}: 'chosen' and 'rejected' are equal behind their thoughts; delete the line, or set "
            "reward_model.of=response"
        )
    return Pair(problem, chosen, rejected)


def _texts(row: Row, name: str, where: str) -> tuple[Problem, str, str]:
    chosen, rejected = row.fields.get("chosen"), row.fields.get("rejected")
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        problem, _ = question_and_answer(row, name, "prompt", "chosen", FIELDS)
        better, worse = (text_of(row.fields, field, FIELDS, where) for field in ("chosen", "rejected"))
        return problem, better, worse
    first, second = messages_of(chosen, where), messages_of(rejected, where)
    before, behind_prompt = first[:-1], len(first) == 1 and row.fields.get("prompt") is not None
    same = before == second[:-1] and {first[-1]["role"], second[-1]["role"]} == {"assistant"}
    if not same or not (before or behind_prompt):
        raise TaskError(
            f"{where}: the messages of 'chosen' and 'rejected' must be the same but for the last one, the assistant's; "
            "mend the line"
        )
    if behind_prompt:
        problem, _ = question_and_answer(row, name, "prompt", "chosen", FIELDS)
        return problem, first[-1]["content"], second[-1]["content"]
    problem = Problem(name, row.number, as_lines(before), "", {"place": row.place}, before)
    return problem, first[-1]["content"], second[-1]["content"]


def _judged(row: Row, name: str, of: Of) -> Judged:
    where = f"{name}, {row.place}"
    problem, answer = question_and_answer(row, name, "prompt", "answer", FIELDS)
    if "answer" in row.fields or answer is None:
        answer = text_of(row.fields, "answer", FIELDS, where)
    _check_read(answer, "answer", of, where)
    if "label" not in row.fields:
        known = ", ".join(map(repr, row.fields))
        raise TaskError(f"{where}: field 'label' is missing (fields: {known}); mend the line, or set {FIELDS}")
    return Judged(problem, answer, share_of(row.fields["label"], f"{where}: field 'label'"))


def _check_read(text: str, field: str, of: Of, where: str) -> None:
    if not (answer_part(text) if of == "answer" else text).strip():
        what = "has no answer behind its thought" if text.strip() else "is empty"
        raise TaskError(f"{where}: field {field!r} {what}; mend or delete the line")
