"""Answers with labelled steps from a file or folder (prm.path; tasks/rows.py), in the forms that there are of them:

    own            {prompt, steps: [text, …], labels: [true | false | share | null, …]}, prompt a text or messages; TRL
                   calls the steps completions
    an answer      {prompt, answer, labels}: one label a step, as prm.cut cuts the answer
    an outcome     {prompt, answer, label}: enough for prm.objective=implicit
    Math-Shepherd  {input, label}: one text with ки behind each step, and the same text with + or - (arXiv:2312.08935)
    PRM800K        {question: {problem}, label: {steps: [{completions: [{text, rating}], …}]}}: the chosen completion of
                   each step, the last one may be the error; 0, which is neutral, counts as good (arXiv:2305.20050)
    ProcessBench   {problem, steps, label}: the place of the first wrong step, -1 for none (arXiv:2412.06559); steps
                   behind it have no label

The command reads them before anything starts, the learner when it begins: what is wrong with a row is said at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from offtrail.core.problem import Problem
from offtrail.rewards.steps import Steps
from offtrail.tasks.base import TaskError
from offtrail.tasks.examples import question_and_answer, text_of
from offtrail.tasks.lines import Row, check_text
from offtrail.tasks.preferences import named, share_of
from offtrail.tasks.rows import rows_in

FIELDS = "prm.fields"
MARK, SIGNS = "ки", {"+": 1.0, "-": 0.0}
"""Math-Shepherd's."""
NO_LABEL = math.nan


@dataclass(frozen=True, slots=True)
class LabelledAnswer:
    """An answer to a problem, whose ``task`` names the file and ``meta["place"]`` the row.

    ``labels`` [S] from 0 (wrong) to 1, NaN of a step without one; ``ends`` [S]: where steps end, exclusive offsets in
    the text's characters, or None where the answer is to be cut (prm.cut). ``outcome``: of the whole answer, NaN where
    that is not known.
    """

    problem: Problem
    text: str
    labels: tuple[float, ...]
    ends: tuple[int, ...] | None
    outcome: float


def labelled_in(path: Path, fields: Mapping[str, str], key: str, cut: Steps) -> Iterator[LabelledAnswer]:
    """The answers of the file or folder that ``key`` names, one by one. ``fields``: our names → the file's.

    Raises TaskError with file and row, also where labels are not one a step.
    """
    return (_labelled(named(row, fields, f"{key}={path}", FIELDS), f"{key}={path}", cut) for row in rows_in(path, key))


def _labelled(row: Row, name: str, cut: Steps) -> LabelledAnswer:
    where, fields = f"{name}, {row.place}", row.fields
    for form, fits in FORMS:
        if fits(fields):
            return form(row, name, cut, where)
    known = ", ".join(map(repr, fields)) or "none"
    raise TaskError(
        f"{where}: neither 'steps' and 'labels', nor 'answer' and 'labels' or 'label', nor a row of Math-Shepherd, "
        f"PRM800K or ProcessBench (fields: {known}); mend the line, or set {FIELDS}"
    )


# --- the forms


def steps_in(fields: Mapping[str, Any]) -> Any:
    """A list of steps; None where a row has none, or a table's column says nothing of this one."""
    steps = fields.get("steps")
    return fields.get("completions") if steps is None else steps


def _own(row: Row, name: str, cut: Steps, where: str) -> LabelledAnswer:
    steps = steps_in(row.fields)
    problem, _ = question_and_answer(row, name, "prompt", "answer", FIELDS)
    labels = _labels(row.fields["labels"], where)
    return _of_steps(problem, steps, labels, _outcome(row, labels, where), cut, where)


def _answer(row: Row, name: str, cut: Steps, where: str) -> LabelledAnswer:
    problem, answer = question_and_answer(row, name, "prompt", "answer", FIELDS)
    answer = text_of(row.fields, "answer", FIELDS, where) if "answer" in row.fields or answer is None else answer
    given = row.fields.get("labels")
    labels = () if given is None else _labels(given, where)
    if labels and cut.by != "tokens":
        check_count(len(labels), len(cut.cut(answer)), cut, where)
    return LabelledAnswer(problem, answer, labels, None, _outcome(row, labels, where))


def _math_shepherd(row: Row, name: str, cut: Steps, where: str) -> LabelledAnswer:
    *parts, rest = row.fields["input"].split(MARK)
    told, at, labels = row.fields["label"], 0, []
    for number, part in enumerate(parts, start=1):
        at += len(part)
        if told[at - len(part) : at] != part or told[at : at + 1] not in SIGNS:
            raise TaskError(
                f"{where}: 'label' is not the text of 'input' with + or - for each {MARK} (step {number}); mend or "
                "delete the line"
            )
        labels.append(SIGNS[told[at]])
        at += 1
    if rest.strip() or told[at:].strip():
        raise TaskError(f"{where}: text stands behind the last {MARK}, in no step; mend or delete the line")
    begin = parts[0].find("Step 1:")
    if begin < 0 or not parts[0][:begin].strip():
        raise TaskError(f"{where}: 'input' is not a question and steps from 'Step 1:' on; mend or delete the line")
    problem = Problem(name, row.number, parts[0][:begin].strip(), "", {"place": row.place})
    steps = [parts[0][begin:], *parts[1:]]
    return _of_steps(problem, steps, tuple(labels), _all_good(labels), cut, where)


def _prm800k(row: Row, name: str, cut: Steps, where: str) -> LabelledAnswer:
    problem, told = row.fields["question"].get("problem"), row.fields["label"].get("steps")
    if not isinstance(problem, str) or not isinstance(told, list):
        raise TaskError(f"{where}: lacks question.problem or label.steps, as PRM800K has them; mend the line")
    steps, labels = [], []
    for number, step in enumerate(told, start=1):
        try:
            chosen, written = step.get("chosen_completion"), step.get("human_completion")
            if chosen is None and written:
                text, rating = written["text"], 1
            else:
                one = step["completions"][chosen or 0]
                text, rating = one["text"], one.get("rating")
            labels.append(NO_LABEL if rating is None else {1: 1.0, 0: 1.0, -1: 0.0}[int(rating)])
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            what = f"{type(error).__name__}: {error}"
            raise TaskError(f"{where}: step {number} is none of PRM800K ({what}); mend or delete the line") from None
        steps.append(text)
        if chosen is None and not written:  # where the labelling of this answer stopped
            break
    asked = Problem(name, row.number, problem, "", {"place": row.place})
    return _of_steps(asked, steps, tuple(labels), _all_good(labels), cut, where)


def _process_bench(row: Row, name: str, cut: Steps, where: str) -> LabelledAnswer:
    steps, first = row.fields["steps"], row.fields["label"]
    if not isinstance(first, int) or isinstance(first, bool) or not -1 <= first < len(steps):
        raise TaskError(f"{where}: field 'label' is {first!r}, no place of the {len(steps)} steps, nor -1; mend it")
    labels = [1.0] * len(steps) if first < 0 else [1.0] * first + [0.0] + [NO_LABEL] * (len(steps) - first - 1)
    problem = Problem(name, row.number, text_of(row.fields, "problem", FIELDS, where), "", {"place": row.place})
    right = row.fields.get("final_answer_correct")
    return _of_steps(problem, steps, tuple(labels), _all_good(labels) if right is None else float(right), cut, where)


def _is_outcome(fields: Mapping[str, Any]) -> bool:
    return ("answer" in fields or "messages" in fields) and ("labels" in fields or "label" in fields)


Form = Callable[[Row, str, Steps, str], LabelledAnswer]
FORMS: tuple[tuple[Form, Callable[[Mapping[str, Any]], bool]], ...] = (
    (_own, lambda f: steps_in(f) is not None and isinstance(f.get("labels"), list)),
    (_process_bench, lambda f: "problem" in f and isinstance(f.get("steps"), list) and "label" in f),
    (_prm800k, lambda f: isinstance(f.get("question"), dict) and isinstance(f.get("label"), dict)),
    (_math_shepherd, lambda f: isinstance(f.get("label"), str) and MARK in str(f.get("input"))),
    (_answer, _is_outcome),
)  # fmt: skip
"""How a row is read, and by which fields it is known."""


# --- what they share


def check_count(labels: int, steps: int, cut: Steps, where: str) -> None:
    """Raise TaskError where the labels of an answer are not one a step."""
    if labels != steps:
        raise TaskError(
            f"{where}: has {labels} labels, and its answer {steps} steps by prm.cut.by={cut.by}; mend the line, or set "
            "prm.cut"
        )


def _of_steps(
    problem: Problem, steps: Any, labels: tuple[float, ...], outcome: float, cut: Steps, where: str
) -> LabelledAnswer:
    """Steps laid end to end, each with the mark of ``cut`` behind it."""
    if (
        not isinstance(steps, Sequence)
        or isinstance(steps, str)
        or not all(isinstance(step, str) and step.strip() for step in steps)
    ):
        raise TaskError(f"{where}: its steps must be a list of texts with something in them; mend the line")
    if not labels or len(labels) != len(steps):
        raise TaskError(f"{where}: has {len(labels)} labels and {len(steps)} steps; give each step one, null for none")
    if cut.by == "tokens":
        raise TaskError(f"{where}: a list of steps has no prm.cut.by=tokens; give an answer, or cut otherwise")
    if cut.within == "thought":
        raise TaskError(f"{where}: a list of steps has no prm.cut.within=thought; give an answer, or leave it out")
    for number, step in enumerate(steps, start=1):
        check_text(step, f"{where}: step {number}")
    text, ends = cut.joined(steps)
    return LabelledAnswer(problem, text, labels, tuple(ends), outcome)


def _labels(given: Any, where: str) -> tuple[float, ...]:
    if not isinstance(given, list) or not given:
        raise TaskError(f"{where}: field 'labels' must be a list with one label a step; mend the line, or set {FIELDS}")
    return tuple(
        NO_LABEL if label is None else share_of(label, f"{where}: label {number}")
        for number, label in enumerate(given, start=1)
    )


def _outcome(row: Row, labels: Sequence[float], where: str) -> float:
    if (label := row.fields.get("label")) is not None:
        return share_of(label, f"{where}: field 'label'")
    return _all_good(labels)


def _all_good(labels: Sequence[float]) -> float:
    """Of an answer whose steps are labelled: 1 where none is wrong, NaN where none has a label."""
    return NO_LABEL if all(map(math.isnan, labels)) else float(not any(label < 0.5 for label in labels))


def hard(answer: LabelledAnswer) -> LabelledAnswer:
    """With labels of 0 and 1 alone."""
    labels = tuple(label if math.isnan(label) else float(label >= 0.5) for label in answer.labels)
    return replace(answer, labels=labels)
