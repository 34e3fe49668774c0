"""Public sets from local files (tasks/rows.py: of which forms), such as GSM8K: a question and a worked answer a row.

Invariants: a row that cannot be used stops the run with its file and number; a set of answers that `verify` cannot
read stops it too, and of one that has some, or that contradicts itself, the run says so before it starts (`remarks`);
data order is one permutation of the training problems per epoch, keyed by (seed, epoch); no prompt of the held-out side
is ever trained on, whether it comes from ``eval_path`` or from the hash split.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal

from offtrail.core.problem import Problem
from offtrail.core.settings import setting
from offtrail.rewards.grading import choice, grade, mathematics
from offtrail.rewards.grading.numeric import LONGEST_NUMBER, number
from offtrail.tasks.base import TaskError, tagged
from offtrail.tasks.choices import with_options, wrong_answers
from offtrail.tasks.config import TaskConfig, check
from offtrail.tasks.lines import Row, check_text
from offtrail.tasks.overlap import Item, Overlap, compare
from offtrail.tasks.rows import read_rows
from offtrail.tasks.split import is_held_out, place, stream
from offtrail.tasks.templates import check_template, template_text


@dataclass
class JsonlConfig(TaskConfig):
    """A local file or folder (JSON lines, an array, Parquet, Arrow), one problem a row: GSM8K's fields by default."""

    name: str = "jsonl"
    path: str = setting("", path="file")
    """Training problems; of a folder its train split."""
    eval_path: str = setting("", path="file")
    """Held-out problems, of a folder its test split; empty = held_out_share of `path`, by hash of the prompt."""
    prompt_field: str = "question"
    """Field of the problem's text."""
    answer_field: str = "answer"
    """Field of the worked answer."""
    wrong_fields: list[str] = setting([])
    """Fields of wrong answers, for multiple choice: the prompt shows all answers, and the letter is the gold one."""
    answer_after: str = "####"
    """The gold answer is what follows this mark in the answer field; empty = the whole field."""
    compare: Literal["value", "text", "choice", "math"] = "value"
    """How an answer is compared with the gold one. value: as a number where that is one (18 is $18.00), else as text;
    text: always the same text, up to blanks; choice: a letter, A to E; math: as mathematics (docs/rewards.md)."""
    compare_policy: Literal["strict", "lenient"] = "strict"
    """Of compare=choice and math. strict: an answer is worked out and stands alone; lenient: what can be read as the
    gold answer (docs/rewards.md, case by case)."""
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


def task_template(config: TaskConfig) -> str:
    """How a task writes its problems: its template, or each as it stands."""
    return template_text(getattr(config, "template", "{prompt}"))


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


class JsonlTask:
    """The two sides of the split, read and checked at once; ``load=False`` reads no file and can only verify."""

    Config = JsonlConfig

    def __init__(self, config: JsonlConfig, seed: int, *, load: bool = True) -> None:
        self.name, self.config, self.seed = config.name, config, seed
        self._train: list[Record] = []
        self._held_out: list[Record] = []
        self._files: dict[str, list[Record]] = {}
        """Key=path → all that it holds."""
        if config.compare == "math":
            self._require_mathematics(now=not load)
        if load:
            self._load()

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
        config = self.config
        if config.decontaminate == "off":
            return None
        held_out = f"task.eval_path={config.eval_path}" if config.eval_path else f"its held-out {config.held_out_share}"
        items = [Item(held_out, record.place, record.prompt) for record in self._held_out]
        for path in config.decontaminate_against:
            items += read_prompts(Path(path), config)
        training = [Item(f"task.path={config.path}", record.place, record.prompt) for record in self._train]
        return compare(training, items, config.decontaminate)

    @cached_property
    def _trained(self) -> list[Record]:
        """The training side, without what decontamination takes out."""
        if self.overlap is None or self.config.decontaminate != "drop":
            return self._train
        out = set(self.overlap.places)
        kept = [record for record in self._train if record.place not in out]
        if not kept:
            raise TaskError("task.decontaminate=drop: leaves no problem for training; name another task.path")
        return kept

    def train(self, index: int) -> Problem:
        """See Task.train."""
        epoch, step = divmod(index, len(self._trained))
        return self._problem(self._trained[permutation(len(self._trained), self.seed, epoch)[step]], index)

    def training(self) -> list[Problem]:
        """Every training problem once, in the order of the file; each has its line for a place."""
        return [self._problem(record, record.number) for record in self._trained]

    def held_out(self, n: int) -> list[Problem]:
        """See Task.held_out: in the order of the prompts' hashes, so that n prompts are a fair sample of the file."""
        if n > len(self._held_out):
            source = self.config.eval_path or f"the held-out share {self.config.held_out_share} of {self.config.path}"
            raise TaskError(
                f"{n} held-out prompts were asked of {source}, which holds {len(self._held_out)}; lower eval.prompts,"
                " raise task.held_out_share, or name a larger task.eval_path"
            )
        return [self._problem(record, index) for index, record in enumerate(self._held_out[:n])]

    def trace(self, problem: Problem, rng: random.Random) -> str:
        """The file's own worked solution, without calculator marks such as <<3*4=12>>."""
        return tagged(CALCULATOR.sub("", problem.meta["solution"]), problem.answer)

    def verify(self, problem: Problem, answer_text: str) -> bool:
        """As task.compare says."""
        config = self.config
        return grade(problem.answer, answer_text, config.compare, lenient=config.compare_policy == "lenient").right

    def check_steps(self, problem: Problem, text: str) -> list[bool]:
        """Free text has no exact step checker: always empty."""
        return []

    @staticmethod
    def _require_mathematics(*, now: bool) -> None:
        """Raise TaskError where it is not installed; imported ``now``, or at the first answer that needs it."""
        if not mathematics.available():
            raise TaskError(mathematics.MISSING)
        if now:
            mathematics.warm_up()

    def _load(self) -> None:
        config = self.config
        if not config.path:
            raise TaskError("task.path is empty: task=jsonl needs task.path=FILE with one problem a row")
        records = self._read("task.path", config.path)
        if config.eval_path:
            held_out = self._read("task.eval_path", config.eval_path)
        else:
            held_out = [r for r in records if is_held_out(self.name, r.prompt, config.held_out_share)]
        prompts = {record.prompt: record for record in held_out}
        self._held_out = sorted(prompts.values(), key=lambda record: place(self.name, record.prompt))
        outside = {identity(record) for record in held_out}
        self._train = [record for record in records if identity(record) not in outside]
        if not self._train:
            raise TaskError(
                f"task.path={config.path}: none of its {len(records)} problems is left for training once the held-out"
                " ones are taken out; lower task.held_out_share, or name another task.eval_path"
            )

    def _read(self, key: str, path: str) -> list[Record]:
        records = self._files[f"{key}={path}"] = read(Path(path), key, self.config)
        if self.config.compare == "value":
            refuse_unreadable(records, f"{key}={path}")
        elif self.config.compare == "choice":
            refuse_other_than_letters(records, f"{key}={path}")
        return records

    def _remark_on_both(self) -> list[str]:
        """Of training problems that are held-out ones too."""
        config = self.config
        if not config.eval_path:
            return []
        records, outside = self._files[f"task.path={config.path}"], {identity(record) for record in self._held_out}
        if not (both := [record for record in records if identity(record) in outside]):
            return []
        return [
            f"task.path={config.path}: {len(both):,} of its {len(records):,} problems stand in "
            f"task.eval_path={config.eval_path} too, first {both[0].place}; they are left out of training"
        ]

    def _problem(self, record: Record, index: int) -> Problem:
        template, meta = template_text(self.config.template), {"solution": record.solution}
        if record.messages:
            *before, last = record.messages
            messages = (*before, last | {"content": template.replace("{prompt}", last["content"])})
            return Problem(self.name, index, as_lines(messages), record.answer, meta, messages)
        return Problem(self.name, index, template.replace("{prompt}", record.prompt), record.answer, meta)


def read(path: Path, key: str, config: JsonlConfig) -> list[Record]:
    """The rows of a file or folder. Raises TaskError with file and row."""
    return [record_of(row, f"{key}={path}, {row.place}", config) for row in read_rows(path, key)]


PROMPT_FIELDS = ("problem", "question", "prompt", "Question", "Problem", "text")


def read_prompts(path: Path, config: JsonlConfig) -> list[Item]:
    """The prompts of a set that is only compared with, in the first field there is of the task's own and the usual
    ones. Raises TaskError.
    """
    key, items = "task.decontaminate_against", list[Item]()
    for row in read_rows(path, key):
        where = f"{key}={path}, {row.place}"
        if isinstance(row.fields.get(config.messages_field), list):
            text = as_lines(message_list(row.fields, config.messages_field, where))
        else:
            names = (config.prompt_field, *PROMPT_FIELDS)
            text = field_text(row.fields, next((n for n in names if n in row.fields), names[0]), "prompt_field", where)
        items.append(Item(f"{key}={path}", row.place, text))
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


def identity(record: Record) -> str:
    """Records with equal ones are the same problem, also where blanks differ."""
    return " ".join(record.prompt.split())


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


def as_lines(messages: tuple[dict[str, str], ...]) -> str:
    """Messages as people read them."""
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def field_text(row: dict[str, object], name: str, key: str, where: str) -> str:
    """A field as text, numbers included. Raises TaskError when it is missing, empty or something else."""
    value = row.get(name)
    what = "no answer" if key == "answer_field" else "no prompt"
    if value is None and name in row:
        raise TaskError(f"{where}: {what}: field {name!r} is null; fill it, delete the line, or set task.{key}")
    if value is None:
        known = ", ".join(map(repr, row)) or "none"
        raise TaskError(f"{where}: {what}: no field {name!r} (fields: {known}); add it, or set task.{key}")
    if isinstance(value, bool) or not isinstance(value, str | int | Decimal):
        raise TaskError(
            f"{where}: field {name!r} is {type(value).__name__}, not text; mend the line, or set task.{key}"
        )
    if isinstance(value, Decimal) and not value.is_finite():
        raise TaskError(f"{where}: field {name!r} is {value}, no number; mend the line, or delete it")
    if isinstance(value, Decimal) and abs(value.adjusted()) >= LONGEST_NUMBER:
        raise TaskError(f"{where}: field {name!r} is a number of more than {LONGEST_NUMBER} digits; mend the line")
    text = format(value, "f") if isinstance(value, Decimal) else str(value)  # 1e-05 as 0.00001
    check_text(text, f"{where}: field {name!r}")
    if not text.strip():
        raise TaskError(f"{where}: {what}: field {name!r} is empty; fill it, or delete the line")
    return text


@lru_cache(maxsize=4)
def permutation(n: int, seed: int, epoch: int) -> list[int]:
    """The order of n problems in one epoch."""
    order = list(range(n))
    stream("jsonl", seed, epoch).shuffle(order)
    return order


TASK = JsonlTask
