"""Sets from local files as tasks: what jsonl.py and programs.py share, whatever a row holds and however it is judged.

    task.path, task.eval_path ─► read: a record a row ─► held out, and the rest for training ─► problem: Problem

Invariants: a row that cannot be used stops the run with its file and number; data order is one permutation of the
training problems per epoch, keyed by (seed, epoch); no prompt of the held-out side is ever trained on, whether it comes
from ``eval_path`` or from the hash split.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from typing import ClassVar, Generic, Protocol, TypeVar

from offtrail.core.problem import Problem
from offtrail.core.settings import setting
from offtrail.rewards.grading.numeric import LONGEST_NUMBER
from offtrail.tasks.base import TaskError
from offtrail.tasks.config import TaskConfig
from offtrail.tasks.lines import check_text
from offtrail.tasks.split import is_held_out, place, stream


@dataclass
class FileConfig(TaskConfig):
    """Where the problems stand."""

    path: str = setting("", path="file")
    """Training problems; of a folder its train split. Evaluation alone does without where there is an eval_path."""
    eval_path: str = setting("", path="file")
    """Held-out problems, of a folder its test split; empty = held_out_share of `path`, by hash of the prompt."""


class Asked(Protocol):
    """One usable row."""

    @property
    def prompt(self) -> str:
        """What the split goes by."""

    @property
    def number(self) -> int:
        """The row's, from 1."""


C = TypeVar("C", bound=FileConfig)
R = TypeVar("R", bound=Asked)


class FileTask(ABC, Generic[C, R]):
    """The two sides of the split, read and checked at once; ``load=False`` reads no file and can only verify."""

    KIND: ClassVar[str]
    """What needs task.path, in the error that says so."""

    def __init__(self, config: C, seed: int, *, load: bool = True) -> None:
        self.name, self.config, self.seed = config.name, config, seed
        self._train: list[R] = []
        self._held_out: list[R] = []
        if load:
            self._load()

    @abstractmethod
    def read(self, key: str, path: str) -> list[R]:
        """All usable rows of a file or folder that ``key`` names. Raises TaskError."""

    @abstractmethod
    def problem(self, record: R, index: int) -> Problem:
        """A row as it is put to the model, at a place."""

    def trained(self) -> list[R]:
        """The training side; the same at each call."""
        return self._train

    def train(self, index: int) -> Problem:
        """See Task.train."""
        if not (records := self.trained()):
            raise TaskError(f"task.path is empty: task.eval_path={self.config.eval_path} alone is for evaluation only")
        epoch, step = divmod(index, len(records))
        return self.problem(records[permutation(len(records), self.seed, epoch)[step]], index)

    def training(self) -> list[Problem]:
        """Every training problem once, in the order of the file; each has its row for a place."""
        return [self.problem(record, record.number) for record in self.trained()]

    def held_out(self, n: int) -> list[Problem]:
        """See Task.held_out: in the order of the prompts' hashes, so that n prompts are a fair sample of the file."""
        if n > len(self._held_out):
            source = self.config.eval_path or f"the held-out share {self.config.held_out_share} of {self.config.path}"
            raise TaskError(
                f"{n} held-out prompts were asked of {source}, which holds {len(self._held_out)}; lower eval.prompts,"
                " raise task.held_out_share, or name a larger task.eval_path"
            )
        return [self.problem(record, index) for index, record in enumerate(self._held_out[:n])]

    def check_steps(self, problem: Problem, text: str) -> list[bool]:
        """Free text has no exact step checker: always empty."""
        return []

    def _load(self) -> None:
        config = self.config
        if not config.path and not config.eval_path:
            raise TaskError(f"task.path is empty: {self.KIND} needs task.path=FILE with one problem a row")
        records = self.read("task.path", config.path) if config.path else []
        if config.eval_path:
            held_out = self.read("task.eval_path", config.eval_path)
        else:
            held_out = [r for r in records if is_held_out(self.name, r.prompt, config.held_out_share)]
        prompts = {record.prompt: record for record in held_out}
        self._held_out = sorted(prompts.values(), key=lambda record: place(self.name, record.prompt))
        outside = {identity(record) for record in held_out}
        self._train = [record for record in records if identity(record) not in outside]
        if records and not self._train:
            raise TaskError(
                f"task.path={config.path}: none of its {len(records)} problems is left for training once the held-out"
                " ones are taken out; lower task.held_out_share, or name another task.eval_path"
            )


def identity(record: Asked) -> str:
    """Records with equal ones are the same problem, also where blanks differ."""
    return " ".join(record.prompt.split())


def field_text(row: dict[str, object], name: str, key: str, where: str) -> str:
    """A field as text, numbers included. Raises TaskError when it is missing, empty or something else."""
    value = row.get(name)
    if value is None and name in row:
        raise TaskError(f"{where}: field {name!r} is null; fill it, delete the line, or set task.{key}")
    if value is None:
        known = ", ".join(map(repr, row)) or "none"
        raise TaskError(f"{where}: no field {name!r} (fields: {known}); add it, or set task.{key}")
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
        raise TaskError(f"{where}: field {name!r} is empty; fill it, or delete the line")
    return text


@lru_cache(maxsize=4)
def permutation(n: int, seed: int, epoch: int) -> list[int]:
    """The order of n problems in one epoch."""
    order = list(range(n))
    stream("jsonl", seed, epoch).shuffle(order)
    return order
