"""Instructions that a program can check, from local files in google/IFEval's format (arXiv:2311.07911).

A row has `prompt`, `instruction_id_list` (names) and `kwargs` (as many mappings of arguments, null for what a name does
not take). An answer is right when it follows all instructions, strictly; how many it follows, and how many it follows
by a looser reading, the component `instructions` and job=eval say. A row with an instruction that has no checker is
left out, and the run says which and how many.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from offtrail.core.problem import Problem
from offtrail.rewards.instructions import CHECKERS, complaint, followed, followed_loosely
from offtrail.tasks.base import TaskError
from offtrail.tasks.files import FileConfig, FileTask, field_text
from offtrail.tasks.lines import Row
from offtrail.tasks.rows import read_rows
from offtrail.tasks.templates import check_template, template_text

RATIOS: Mapping[str, tuple[str, str, float]] = {
    "prompt_level_strict_acc": ("prompt_strict", "prompts", 1.0),
    "inst_level_strict_acc": ("strict", "instructions", 1.0),
    "prompt_level_loose_acc": ("prompt_loose", "prompts", 1.0),
    "inst_level_loose_acc": ("loose", "instructions", 1.0),
}
"""Measure, by the name that lm-evaluation-harness has for it → (count above, count below, factor)."""


@dataclass
class IfevalConfig(FileConfig):
    """Instructions that a program checks, in google/IFEval's row format; take reward.answer=text with it."""

    name: str = "ifeval"
    prompt_field: str = "prompt"
    """Field of the prompt, which holds the instructions as text."""
    names_field: str = "instruction_id_list"
    """Field of the list of their names."""
    arguments_field: str = "kwargs"
    """Field of the list of their arguments, a mapping each."""
    template: str = "{prompt}"
    """How a prompt is put to the model; {prompt} is its text (docs/sets.md)."""

    def __post_init__(self) -> None:
        """Raise ValueError when a value cannot work whatever the file holds."""
        super().__post_init__()
        check_template(self.template)


@dataclass(frozen=True, slots=True)
class Instructed:
    """One usable row; ``instructions``: {name, arguments} each."""

    prompt: str
    instructions: list[dict[str, Any]]
    number: int


class IfevalTask(FileTask[IfevalConfig, Instructed]):
    """Answers that are checked, not compared: there is no gold answer, and none to imitate."""

    Config = IfevalConfig
    KIND = "task=ifeval"
    RATIOS = RATIOS

    def __init__(self, config: IfevalConfig, seed: int, *, load: bool = True) -> None:
        self.remarks: list[str] = []
        """What is to be said of the files before a run."""
        super().__init__(config, seed, load=load)

    def read(self, key: str, path: str) -> list[Instructed]:
        """See FileTask.read."""
        rows, kept, without = read_rows(Path(path), key), list[Instructed](), Counter[str]()
        for row in rows:
            names = instruction_names(row, f"{key}={path}, {row.place}", self.config)
            if unknown := {name for name in names if name not in CHECKERS}:
                without.update(unknown)
                continue
            kept.append(instructed(row, names, f"{key}={path}, {row.place}", self.config))
        told = ", ".join(f"{name} ({count})" for name, count in sorted(without.items()))
        if without:
            self.remarks.append(
                f"{key}={path}: {len(rows) - len(kept):,} of its {len(rows):,} rows are left out: no checker for {told}"
            )
        if not kept:
            raise TaskError(f"{key}={path}: no checker for any of its rows ({told}); see docs/evaluation.md")
        return kept

    def problem(self, record: Instructed, index: int) -> Problem:
        """See FileTask.problem."""
        prompt = template_text(self.config.template).replace("{prompt}", record.prompt)
        return Problem(self.name, index, prompt, "", {"instructions": record.instructions})

    def trace(self, problem: Problem, rng: random.Random) -> str:
        """Raises TaskError: there is none."""
        raise TaskError("task=ifeval has no worked answers")

    def verify(self, problem: Problem, answer_text: str) -> bool:
        """Whether all instructions are followed, strictly."""
        return all(followed(answer_text, one["name"], one["arguments"]) for one in problem.meta["instructions"])

    def counts(self, problem: Problem, answer: str | None) -> dict[str, float]:
        """What an answer (None: there is none) adds to the counts of RATIOS."""
        asked = problem.meta["instructions"]
        strict, loose = (
            [answer is not None and follows(answer, one["name"], one["arguments"]) for one in asked]
            for follows in (followed, followed_loosely)
        )
        return {
            "prompts": 1.0, "instructions": float(len(asked)),
            "prompt_strict": float(all(strict)), "strict": float(sum(strict)),
            "prompt_loose": float(all(loose)), "loose": float(sum(loose)),
        }  # fmt: skip


def instruction_names(row: Row, where: str, config: IfevalConfig) -> list[str]:
    """The names of a row's instructions. Raises TaskError that opens with ``where``."""
    names = row.fields.get(config.names_field)
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        known = ", ".join(map(repr, row.fields)) or "none"
        raise TaskError(
            f"{where}: field {config.names_field!r} must be a list of instructions' names (fields: {known}); mend the "
            "row, or set task.names_field"
        )
    return names


def instructed(row: Row, names: list[str], where: str, config: IfevalConfig) -> Instructed:
    """Check a row whose names all have a checker. Raises TaskError that opens with ``where``."""
    prompt = field_text(row.fields, config.prompt_field, "prompt_field", where)
    given = row.fields.get(config.arguments_field)
    if (
        not isinstance(given, list)
        or len(given) != len(names)
        or not all(isinstance(one, Mapping | None) for one in given)
    ):
        raise TaskError(
            f"{where}: field {config.arguments_field!r} must be a list of {len(names)} mappings, one an instruction; "
            "mend the row, or set task.arguments_field"
        )
    instructions = []
    for name, one in zip(names, given, strict=True):
        arguments = {key: _whole(value) for key, value in (one or {}).items() if value is not None}
        if why := complaint(name, arguments):
            raise TaskError(f"{where}: {why}; mend the row, or delete it")
        instructions.append({"name": name, "arguments": arguments})
    return Instructed(prompt, instructions, row.number)


def _whole(value: Any) -> Any:
    """Numbers that tables hold as fractions, such as 3.0."""
    return int(value) if isinstance(value, Decimal) and value == value.to_integral_value() else value


TASK = IfevalTask
