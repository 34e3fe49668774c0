"""Public sets from local files (tasks/rows.py: of which forms), such as GSM8K: a question and a worked answer a row.

Invariants: those of tasks/files.py; a set of answers that `verify` cannot read stops the run, and of one that has some,
or that contradicts itself, the run says so before it starts (`remarks`).
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from offtrail.core.problem import Problem
from offtrail.core.settings import setting
from offtrail.rewards.grading import choice, grade, mathematics
from offtrail.rewards.grading.numeric import number
from offtrail.tasks.base import TaskError, tagged
from offtrail.tasks.choices import with_options, wrong_answers
from offtrail.tasks.config import check
from offtrail.tasks.files import FileConfig, FileTask, field_text, identity
from offtrail.tasks.lines import Row, check_text
from offtrail.tasks.overlap import Item, Overlap, compare
from offtrail.tasks.rows import read_rows, rows_in
from offtrail.tasks.templates import check_template, template_text, templates_of, without_template


@dataclass
class JsonlConfig(FileConfig):
    """A local file or folder (JSON lines, an array, Parquet, Arrow), one problem a row: GSM8K's fields by default."""

    name: str = "jsonl"
    prompt_field: str = "question"
    """Field of the problem's text."""
    answer_field: str = "answer"
    """Field of the worked answer."""
    wrong_fields: list[str] = setting([])
    """Fields of wrong answers, for multiple choice: the prompt shows all answers, and the letter is the gold one."""
    answer_after: str = "####"
    """The gold answer is what follows this mark in the answer field; empty = the whole field."""
    compare: Literal["value", "text", "choice", "math"] = "value"
    """How an answer is compared with the gold one. value: as a number where that is one (18 is **$18**), else as text;
    text: always the same text, up to blanks; choice: a letter, A to E; math: as mathematics (docs/rewards.md)."""
    compare_policy: Literal["strict", "lenient"] = "strict"
    """Of all but compare=text. strict: an answer is worked out and stands alone; lenient: what can be read as the gold
    answer (docs/rewards.md, case by case)."""
    template: str = "{prompt}"
    """How a prompt is put to the model: r1_zero, boxed, tags, or a text in which {prompt} is the problem's text, or its
    last message's (docs/sets.md)."""
    decontaminate: Literal["off", "report", "drop"] = "off"
    """Training problems that share 10 words in a row with held-out ones: said before the run and in its directory;
    drop: left out of training, too."""
    decontaminate_against: list[str] = setting([], path="file")
    """Further sets that training problems are compared with, by their prompts alone."""
    messages_field: str = ""
    """Field of a list of messages, {role, content} each and the user's last, instead of prompt_field; empty = none."""

    def __post_init__(self) -> None:
        """Raise ValueError when a value cannot work whatever the file holds."""
        super().__post_init__()
        given = self.decontaminate_against
        check(
            not given or self.decontaminate != "off",
            "decontaminate_against",
            given,
            "empty with task.decontaminate=off",
        )
        check_template(self.template)
        check(not (self.wrong_fields and self.messages_field), "wrong_fields", self.wrong_fields, "empty with messages")


MEANT_BY_VALUE = re.compile(r"[\d\\]")
"""An answer with a digit or LaTeX in it means a value that can be written in other ways, too."""
CALCULATOR = re.compile(r"<<[^<>]*>>")


@dataclass(frozen=True, slots=True)
class Record:
    """One usable line: the question as it stands, the worked solution before the mark, the gold answer after it.

    With ``messages`` (the user's last) ``prompt`` is all of them, a line each: what the split and people go by.
    """

    prompt: str
    solution: str
    answer: str
    messages: tuple[dict[str, str], ...] = ()
    number: int = 0
    place: str = ""
    """The row, by number and as it is named in what is said of it."""

    @property
    def question(self) -> str:
        """What is compared with other sets."""
        return said_in(self.messages) if self.messages else self.prompt


class JsonlTask(FileTask[JsonlConfig, Record]):
    """Answers that are compared with the gold one."""

    Config = JsonlConfig
    KIND = "task=jsonl"

    def __init__(self, config: JsonlConfig, seed: int, *, load: bool = True) -> None:
        self._files: dict[str, list[Record]] = {}
        """Key=path → all that it holds."""
        if config.compare == "math":
            self._require_mathematics(now=not load)
        super().__init__(config, seed, load=load)

    @property
    def remarks(self) -> list[str]:
        """What is to be said of the files before a run; computed anew each time, for one process to ask for once."""
        compare, found = self.config.compare, list[str]()
        for where, records in self._files.items():
            found += [remark_on(records, where)] if compare == "value" else []
            found.append(remark_on_contradictions(records, where, compare))
        found += [] if self.overlap is None else [self.overlap.remark()]
        return [*filter(None, found), *self._remark_on_both()]

    @cached_property
    def overlap(self) -> Overlap | None:
        """What the training side shares with evaluation sets (task.decontaminate)."""
        source = f"task.path={self.config.path}"
        return self.compared([Item(source, record.place, record.question) for record in self._train])

    def compared(self, items: Sequence[Item]) -> Overlap | None:
        """What problems that are trained on share with evaluation sets; None where that is not asked."""
        config = self.config
        if config.decontaminate == "off":
            return None
        held_out = f"task.eval_path={config.eval_path}" if config.eval_path else f"its held-out {config.held_out_share}"
        evaluation = [Item(held_out, record.place, record.question) for record in self._held_out]
        for path in config.decontaminate_against:
            evaluation += read_prompts(Path(path), config)
        return compare(items, evaluation, config.decontaminate)

    def trained(self) -> list[Record]:
        """See FileTask.trained: without what decontamination takes out."""
        return self._kept

    @cached_property
    def _kept(self) -> list[Record]:
        if self.overlap is None or self.config.decontaminate != "drop":
            return self._train
        out = set(self.overlap.places)
        kept = [record for record in self._train if record.place not in out]
        if self._train and not kept:
            raise TaskError("task.decontaminate=drop: leaves no problem for training; name another task.path")
        return kept

    def trace(self, problem: Problem, rng: random.Random) -> str:
        """The file's own worked solution, without calculator marks such as <<3*4=12>>."""
        return tagged(CALCULATOR.sub("", problem.meta["solution"]), problem.answer)

    def verify(self, problem: Problem, answer_text: str) -> bool:
        """As task.compare says."""
        config = self.config
        return grade(problem.answer, answer_text, config.compare, lenient=config.compare_policy == "lenient").right

    @staticmethod
    def _require_mathematics(*, now: bool) -> None:
        """Raise TaskError where it is not installed; imported ``now``, or at the first answer that needs it."""
        if not mathematics.available():
            raise TaskError(mathematics.MISSING)
        if now:
            mathematics.warm_up()

    def read(self, key: str, path: str) -> list[Record]:
        """See FileTask.read."""
        where = f"{key}={path}"
        records = [record_of(row, f"{where}, {row.place}", self.config) for row in read_rows(Path(path), key)]
        self._files[where] = records
        if self.config.compare == "value":
            refuse_unreadable(records, where)
        elif self.config.compare == "choice":
            refuse_other_than_letters(records, where)
        return records

    def _remark_on_both(self) -> list[str]:
        """Of training problems that are held-out ones too."""
        config = self.config
        if not (config.path and config.eval_path):
            return []
        records, outside = self._files[f"task.path={config.path}"], {identity(record) for record in self._held_out}
        if not (both := [record for record in records if identity(record) in outside]):
            return []
        return [
            f"task.path={config.path}: {len(both):,} of its {len(records):,} problems stand in "
            f"task.eval_path={config.eval_path} too, first {both[0].place}; they are left out of training"
        ]

    def problem(self, record: Record, index: int) -> Problem:
        """See FileTask.problem: within the template, or its last message within it."""
        template, meta = template_text(self.config.template), {"solution": record.solution}
        if record.messages:
            *before, last = record.messages
            messages = (*before, last | {"content": template.replace("{prompt}", last["content"])})
            return Problem(self.name, index, as_lines(messages), record.answer, meta, messages)
        return Problem(self.name, index, template.replace("{prompt}", record.prompt), record.answer, meta)


PROMPT_FIELDS = ("problem", "question", "prompt", "Question", "Problem", "text")


def read_prompts(path: Path, config: JsonlConfig, key: str = "task.decontaminate_against") -> list[Item]:
    """The questions of a set that is only compared with, named by ``key``, in the first field there is of the task's
    own and the usual ones, without the template of the task or one that has a name. Raises TaskError.
    """
    items, templates = list[Item](), templates_of([config])
    for row in rows_in(path, key):
        where = f"{key}={path}, {row.place}"
        if isinstance(row.fields.get(config.messages_field), list):
            text = said_in(message_list(row.fields, config.messages_field, where))
        else:
            names = (config.prompt_field, *PROMPT_FIELDS)
            text = field_text(row.fields, next((n for n in names if n in row.fields), names[0]), "prompt_field", where)
        items.append(Item(f"{key}={path}", row.place, without_template(text, templates)))
    return items


def refuse_unreadable(records: list[Record], where: str) -> None:
    """Raise TaskError where most answers mean a value, and `verify` can read none as one."""
    if any(number(record.answer) is not None for record in records):
        return
    others = [record for record in records if MEANT_BY_VALUE.search(record.answer)]
    if 2 * len(others) > len(records):
        raise TaskError(
            f"{where}: none of its {len(records):,} answers can be read as a number, {_example(others)}; {PLAIN}"
        )


def refuse_other_than_letters(records: list[Record], where: str) -> None:
    """Raise TaskError at the first answer that is no letter from A to E."""
    for record in records:
        if choice.letter(record.answer) is None:
            raise TaskError(
                f"{where}, {record.place}: the answer {record.answer[:60]!r} is no letter from A to E, which "
                "task.compare=choice needs; mend it, or set task.compare"
            )


def remark_on(records: list[Record], where: str) -> str:
    """What to say of answers that `verify` can only compare as text though they mean a value, such as `18%`; empty
    where there are none.
    """
    unread = [record for record in records if number(record.answer) is None]
    others = [record for record in unread if MEANT_BY_VALUE.search(record.answer)]
    if not others:
        return ""
    numbers = len(records) - len(unread)
    return (
        f"{where}: of {len(records):,} answers {numbers:,} can be read as numbers; {len(others):,} others with digits "
        f"or LaTeX, {_example(others)}, count as right only where the very same text is answered; {PLAIN}"
    )


PLAIN = "write plain numbers, or say task.compare=math or text, or take a task of your own (docs/extending/tasks.md)"


def _example(others: list[Record]) -> str:
    return f"such as {others[0].answer[:60]!r} in {others[0].place}"


def remark_on_contradictions(records: list[Record], where: str, compare: str) -> str:
    """What to say of problems that stand in a file with answers of which `verify` takes one and not the other; empty
    where there are none.
    """
    first: dict[str, Record] = {}
    found: dict[str, tuple[Record, Record]] = {}
    for record in records:
        problem = identity(record)
        before = first.setdefault(problem, record)
        if record.answer != before.answer and not grade(before.answer, record.answer, compare).right:
            found.setdefault(problem, (before, record))
    if not found:
        return ""
    one, other = next(iter(found.values()))
    return (
        f"{where}: {len(found):,} of its {len(first):,} problems stand there again with another answer, the first in "
        f"{one.place} and {other.place} ({one.answer[:60]!r}, {other.answer[:60]!r}); each line counts as it "
        "stands: delete those that are wrong"
    )


def record_of(row: Row, where: str, config: JsonlConfig) -> Record:
    """Check and cut one row. Raises TaskError that opens with ``where``."""
    fields = row.fields
    messages = message_list(fields, config.messages_field, where) if config.messages_field else ()
    prompt = as_lines(messages) if messages else field_text(fields, config.prompt_field, "prompt_field", where)
    answer = field_text(fields, config.answer_field, "answer_field", where)
    solution, mark, gold = answer.rpartition(config.answer_after) if config.answer_after else ("", "", answer)
    if config.answer_after and not mark:
        raise TaskError(
            f"{where}: no answer: {config.answer_field!r} lacks the mark {config.answer_after!r}; add it, set"
            " task.answer_after (empty = the whole field), or delete the line"
        )
    if not gold.strip():
        raise TaskError(f"{where}: no answer after {config.answer_after!r}; add it, or delete the line")
    if config.wrong_fields:
        wrong = wrong_answers(fields, config.wrong_fields, where)
        prompt, gold = with_options(prompt, gold, wrong, where)
    return Record(prompt, solution.strip(), gold.strip(), messages, row.number, row.place)


def message_list(row: dict[str, object], name: str, where: str) -> tuple[dict[str, str], ...]:
    """A field that holds messages of a role and a text, the user's last. Raises TaskError when it holds anything
    else.
    """
    given = row.get(name)
    messages = given if isinstance(given, list) else []
    if not messages or not all(
        isinstance(m, dict) and m.keys() == {"role", "content"} and all(isinstance(v, str) for v in m.values())
        for m in messages
    ):
        raise TaskError(
            f'{where}: field {name!r} must be a list of {{"role": …, "content": …}}, both texts; mend the line, or set'
            " task.messages_field"
        )
    if messages[-1]["role"] == "assistant":
        raise TaskError(f"{where}: field {name!r} ends with the assistant's message; leave that to the answer")
    for text in (text for message in messages for text in message.values()):
        check_text(text, f"{where}: a message of field {name!r}")
    return tuple(messages)


def as_lines(messages: Sequence[Mapping[str, str]]) -> str:
    """Messages as people read them."""
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def said_in(messages: Sequence[Mapping[str, str]]) -> str:
    """What is asked in messages: what they say, without the system's, which stands before every question."""
    return "\n".join(message["content"] for message in messages if message["role"] != "system")


TASK = JsonlTask
