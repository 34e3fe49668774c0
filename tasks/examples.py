"""Examples to imitate from a file or folder (sft.path; tasks/rows.py): each row a prompt, or messages, and an answer.
Other keys name such files too: sample.shots_path, reject.paths, reject.mix.

The command reads them before anything starts, the learner when it begins: what is wrong with a row is said at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from offtrail.core.problem import Problem
from offtrail.tasks.base import TaskError
from offtrail.tasks.jsonl import as_lines
from offtrail.tasks.lines import Row, check_text
from offtrail.tasks.rows import rows_in

ROLES = ("system", "user", "assistant", "tool")


def read_examples(path: Path, prompt_field: str, answer_field: str, key: str = "sft.path") -> list[Problem]:
    """All of ``examples_in``."""
    return list(examples_in(path, prompt_field, answer_field, key))


def examples_in(path: Path, prompt_field: str, answer_field: str, key: str) -> Iterator[Problem]:
    """The rows of the file or folder that ``key`` names, one by one. Raises TaskError with file and row.

    A row has a prompt (a text or a list of messages) and an answer; or ``messages`` alone, whose last is the
    assistant's answer. Each becomes a Problem, ``task`` naming the file, ``index`` and ``meta["place"]`` the row.
    """
    return (_example(row, f"{key}={path}", prompt_field, answer_field) for row in rows_in(path, key))


def too_long(examples: Sequence[Problem], tokens: Sequence[int], max_length: int, *, drop: bool) -> list[int]:
    """Places of the examples that take more than ``max_length`` ``tokens``, prompt and answer. Raises TaskError where
    there are some and they are not to be dropped, or where there are no others.
    """
    long = [place for place, n in enumerate(tokens) if n > max_length]
    if long and not drop:
        first = examples[long[0]]
        raise TaskError(
            f"{first.task}, {first.meta['place']}: prompt and answer take {tokens[long[0]]} tokens, more than "
            f"model.max_length={max_length} ({len(long)} of {len(examples)} lines do); raise it, or set sft.long=drop"
        )
    if len(long) == len(examples):
        raise TaskError(
            f"{examples[0].task}: all {len(long)} examples are longer than model.max_length={max_length}; raise it"
        )
    return long


def left_out(examples: Sequence[Problem], long: Sequence[int], max_length: int) -> str:
    """What is to be said of those that are dropped."""
    return (
        f"{examples[0].task}: {len(long)} of {len(examples)} examples are left out: they are longer than "
        f"model.max_length={max_length} (sft.long=drop)"
    )


def remark_on_held_out(examples: Sequence[Problem], held_out: Sequence[Problem]) -> str:
    """What to say of examples whose prompts are held-out ones, up to blanks; empty where none is."""
    asked = {" ".join(problem.prompt.split()) for problem in held_out}
    both = [example for example in examples if " ".join(example.prompt.split()) in asked]
    if not both:
        return ""
    return (
        f"{both[0].task}: {len(both):,} of {len(examples):,} examples answer held-out prompts, first "
        f"{both[0].meta['place']}; what is evaluated was trained on: take them out, or name another held-out set"
    )


def _example(row: Row, name: str, prompt_field: str, answer_field: str) -> Problem:
    problem, answer = question_and_answer(row, name, prompt_field, answer_field)
    if answer_field in row.fields or answer is None:
        answer = text_of(row.fields, answer_field, f"{_group(name)}answer_field", f"{name}, {row.place}")
    return replace(problem, answer=answer)


def question_and_answer(
    row: Row, name: str, prompt_field: str, answer_field: str, key: str = ""
) -> tuple[Problem, Any]:
    """What a row of the file ``name`` (key=path) asks, as a Problem without its answer; and what stands for the answer,
    None where nothing does. Raises TaskError, which names ``key`` (else the key beside the path's), where the question
    is not to be read.
    """
    fields, meta, where = row.fields, {"place": row.place}, f"{name}, {row.place}"
    given = fields.get(prompt_field, fields.get("messages"))
    if not isinstance(given, list):
        prompt = text_of(fields, prompt_field, key or f"{_group(name)}prompt_field", where)
        return Problem(name, row.number, prompt, "", meta), fields.get(answer_field)
    messages = messages_of(given, where)
    if answer_field not in fields and len(messages) > 1 and messages[-1]["role"] == "assistant":
        *before, last = messages
        return Problem(name, row.number, as_lines(tuple(before)), "", meta, tuple(before)), last["content"]
    return Problem(name, row.number, as_lines(messages), "", meta, messages), fields.get(answer_field)


def _group(name: str) -> str:
    """What the keys of the fields begin with, beside the key in key=path."""
    return name.partition("=")[0].removesuffix("s").removesuffix("path")


def messages_of(value: list[Any], where: str) -> tuple[dict[str, str], ...]:
    """Messages as a row holds them. Raises TaskError that opens with ``where`` for what is none."""
    if not value or not all(
        isinstance(m, dict) and m.get("role") in ROLES and isinstance(m.get("content"), str) for m in value
    ):
        raise TaskError(
            f'{where}: messages must be a list of {{"role": {" | ".join(ROLES)}, "content": text}}; mend the line'
        )
    for message in value:
        check_text(message["content"], f"{where}: a message's content")
    return tuple({"role": m["role"], "content": m["content"]} for m in value)


def text_of(row: dict[str, Any], name: str, key: str, where: str) -> str:
    """A field that is to be a text with something in it. Raises TaskError that opens with ``where`` and names ``key``,
    which says what the field is called.
    """
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        known = ", ".join(map(repr, row)) or "none"
        what = "is empty" if isinstance(value, str) else "is not text"
        if value is None:
            what = "is null" if name in row else "is missing"
        raise TaskError(f"{where}: field {name!r} {what} (fields: {known}); mend the line, or set {key}")
    check_text(value, f"{where}: field {name!r}")
    return value
