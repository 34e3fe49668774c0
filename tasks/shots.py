"""Worked examples put before a question (few-shot prompting): for evaluation, and for jobs that sample.

    task, k, seed       ─► of_task ┐
    file, k, seed       ─► of_file ┴─► [Shot] ─► before(problem, shots, chats) ─► the problem as it is asked

Invariants: shots of a task are training problems, never held-out ones; which ones they are depends on (task, seed)
alone, and k of them begin as k + 1 do; a problem keeps its task, place, answer and meta, so that it is judged as
without them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from offtrail.core.problem import Problem
from offtrail.rewards.config import RewardConfig
from offtrail.rewards.format import parse
from offtrail.tasks.base import Task, TaskError
from offtrail.tasks.examples import read_examples
from offtrail.tasks.jsonl import as_lines
from offtrail.tasks.split import stream

PLACES = 1 << 20
"""Of the data order, from which shots are drawn."""
DRAWS = 64
"""Of one problem's worked answers until one is right, and of problems for each shot until one is new."""
OPENED = re.compile(r"<think>\s*\Z")


@dataclass(frozen=True, slots=True)
class Shot:
    """A question, as it is put to the model, and its answer as the model is to write it."""

    prompt: str
    answer: str
    messages: tuple[Mapping[str, str], ...] = ()


def of_task(task: Task, k: int, seed: int, reward: RewardConfig) -> list[Shot]:
    """``k`` training problems that ask different questions, drawn by ``seed``, each with a worked answer that is right
    and written as ``reward.answer`` looks for it. Raises TaskError where the task has fewer.
    """
    found: dict[str, Shot] = {}
    for attempt in range(DRAWS * k):
        if len(found) == k:
            break
        problem = task.train(stream("shots", task.name, seed, attempt).randrange(PLACES))
        if (question := asked_by(problem.prompt)) not in found:
            found[question] = Shot(problem.prompt, _worked(task, problem, reward), problem.messages)
    if len(found) < k:
        raise TaskError(f"{k} examples were asked of the training problems of task={task.name}, which has {len(found)}")
    return list(found.values())


def of_file(path: Path, k: int, seed: int, fields: tuple[str, str], key: str) -> list[Shot]:
    """``k`` rows of a file of examples (tasks/examples.py) that ``key`` names, drawn by ``seed``, each with a question
    of its own, their answers as they stand in the two ``fields``. Raises TaskError where it has fewer, or a row that
    cannot be used.
    """
    rows = read_examples(path, *fields, key)
    order = list(range(len(rows)))
    stream("shots of a file", seed).shuffle(order)
    found: dict[str, Shot] = {}
    for row in (rows[place] for place in order):
        found.setdefault(asked_by(row.prompt), Shot(row.prompt, row.answer, row.messages))
    if len(found) < k:
        raise TaskError(f"{key}={path}: {k} examples were asked, and it holds {len(found)} questions; lower the number")
    return list(found.values())[:k]


def asked_by(prompt: str) -> str:
    """Prompts with equal ones ask the same question."""
    return " ".join(prompt.split())


def others(given: Sequence[Shot], problem: Problem, k: int, key: str) -> list[Shot]:
    """The first ``k`` that do not ask the problem's own question, up to blanks. Raises TaskError, which opens with
    ``key``, where there are fewer: how many stand before a question must not differ from one to another.
    """
    found = [shot for shot in given if asked_by(shot.prompt) != asked_by(problem.prompt)][:k]
    if len(found) < k:
        raise TaskError(
            f"{key}: {k} examples are to stand before {problem.prompt[:60]!r}, and of {len(given)} that were drawn "
            f"{len(given) - len(found)} ask the same; ask for fewer, or keep held-out questions out of the examples"
        )
    return found


def before(problem: Problem, shots: Sequence[Shot], *, chats: bool) -> Problem:
    """The problem with the shots before its question: as turns of a chat where prompts go through a chat template
    (``chats``), else as text, an empty line between two. Raises TaskError where a shot is messages and there is no
    chat.
    """
    if not shots:
        return problem
    if not chats:
        if any(shot.messages for shot in shots):
            raise TaskError("examples of messages need a chat template, which the model does not have; give them texts")
        told = "".join(f"{_as_text(shot)}\n\n" for shot in shots)
        return replace(problem, prompt=told + problem.prompt)
    own = problem.messages or ({"role": "user", "content": problem.prompt},)
    system = own[:1] if own[0]["role"] == "system" else ()
    turns = [turn for shot in shots for turn in _as_turns(shot)]
    messages = tuple(dict(message) for message in (*system, *turns, *own[len(system) :]))
    return replace(problem, prompt=as_lines(messages), messages=messages)


def _worked(task: Task, problem: Problem, reward: RewardConfig) -> str:
    """A right answer with its work, if the task can work it: traces may be guesses, or go wrong on purpose."""
    chosen, best = "", -1
    for attempt in range(DRAWS):
        try:
            text = task.trace(problem, stream("shots", task.name, problem.prompt, attempt))
        except TaskError as error:
            raise TaskError(f"{error}; name a file of examples: eval.few_shot_path, sample.shots_path") from None
        parts = parse(text)
        right = parts is not None and task.verify(problem, parts.answer) >= 1 and all(task.check_steps(problem, text))
        worth = 2 * right + (right and bool(parts and parts.thought))
        if worth > best:
            chosen, best = text, worth
        if best == 3:
            break
    return _written(chosen, reward)


def _written(text: str, reward: RewardConfig) -> str:
    """A tagged answer in the form in which answers are looked for."""
    parts = parse(text)
    if reward.answer == "tags" or parts is None:
        return text
    lines = [parts.thought] if parts.thought else []
    match reward.answer:
        case "boxed":
            lines.append(f"\\boxed{{{parts.answer}}}")
        case "mark":
            lines.append(f"{reward.answer_mark} {parts.answer}")
        case _:
            lines.append(parts.answer)
    return "\n".join(lines)


def _as_text(shot: Shot) -> str:
    """A question and its answer, which goes on with a tag that the question has opened."""
    answer = re.sub(r"\A\s*<think>", "", shot.answer) if OPENED.search(shot.prompt) else shot.answer
    apart = "" if shot.prompt[-1:].isspace() or answer is not shot.answer or answer.startswith("<") else "\n"
    return f"{shot.prompt}{apart}{answer}"


def _as_turns(shot: Shot) -> tuple[Mapping[str, str], ...]:
    """Its question without a system prompt, which is the problem's own matter, and its answer."""
    asked = [m for m in shot.messages if m["role"] != "system"] or [{"role": "user", "content": shot.prompt}]
    return (*asked, {"role": "assistant", "content": shot.answer})
