"""Problems that are answered by a program, from local files: HumanEval, MBPP, and sets of one's own.

An answer is judged by running it against the problem's tests: by the component `code` of the reward, in its sandbox
(docs/sandbox.md), to which ``meta`` brings them. `verify` runs nothing, in any process: right is for it what has the
reference solution's syntax tree, which is never a false positive and misses every other right program.

Invariants: those of tasks/files.py.
"""

from __future__ import annotations

import ast
import builtins
import random
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from offtrail.core.problem import Problem
from offtrail.core.settings import setting
from offtrail.tasks.base import TaskError, tagged
from offtrail.tasks.config import check
from offtrail.tasks.files import FileConfig, FileTask, field_text
from offtrail.tasks.lines import Row
from offtrail.tasks.rows import read_rows
from offtrail.tasks.templates import check_template, template_text


@dataclass
class ProgramsConfig(FileConfig):
    """Problems that are answered by a program, one a row of a local file: fields for a set of one's own."""

    name: str = "programs"
    prompt_field: str = "prompt"
    """Field of the problem's text."""
    solution_field: str = ""
    """Field of a right program; empty = the set has none. It tells which names tests take from a program."""
    tests_field: str = "tests"
    """Field of the tests, of the kind that `tests` names."""
    tests: Literal["asserts", "check", "cases"] = "asserts"
    """asserts: a list of Python sources such as `assert f(2) == 4`; check: one source that defines check(candidate);
    cases: stdin and stdout of a whole program, [{input, output}] or {inputs, outputs}."""
    setup_field: str = ""
    """asserts: field of source that is run before them; empty = none."""
    entry_field: str = "entry_point"
    """check: field of the name of the function that is the candidate."""
    completes: bool = False
    """check: the problem's text is the beginning of the program, which an answer may also simply go on with."""
    shown_tests: int = setting(0, "[0, 1000]")
    """So many asserts are shown below the problem's text: where else is the function's name? MBPP shows 3."""
    template: str = "{prompt}"
    """How a prompt is put to the model: r1_zero, boxed, tags, or a text in which {prompt} is the problem's text and the
    tests that are shown (docs/sets.md)."""

    def __post_init__(self) -> None:
        """Raise ValueError when a value cannot work whatever the file holds."""
        super().__post_init__()
        check_template(self.template)
        check(not self.completes or self.tests == "check", "completes", self.completes, "false unless task.tests=check")
        check(not self.shown_tests or self.tests == "asserts", "shown_tests", self.shown_tests, "0 unless asserts")


SHOWN = "\n\nYour program must pass these tests:\n\n"


@dataclass(frozen=True, slots=True)
class Exercise:
    """One usable row. ``meta``: what rewards/sandbox/judge.py reads, and the reference ``solution``."""

    prompt: str
    meta: dict[str, Any]
    number: int


class ProgramsTask(FileTask[ProgramsConfig, Exercise]):
    """Answers that are run."""

    Config = ProgramsConfig
    KIND = "a set of programs"

    def __init__(self, config: ProgramsConfig, seed: int, *, load: bool = True) -> None:
        self.remarks: list[str] = []
        """What is to be said of the files before a run."""
        super().__init__(config, seed, load=load)

    def trace(self, problem: Problem, rng: random.Random) -> str:
        """The reference solution in a fence, with no thought before it. Raises TaskError where the set has none."""
        if not problem.answer:
            raise TaskError("task.solution_field=: names no field of solutions, so that there are no worked answers")
        return tagged("", f"\n```python\n{problem.answer}\n```\n")

    def verify(self, problem: Problem, answer_text: str) -> bool:
        """Whether it is the reference solution up to blanks, comments and quotes; nothing is run."""
        tree = _syntax(answer_text.strip().removeprefix("```python").removesuffix("```").strip("\n"))
        return tree is not None and bool(problem.answer) and tree == _syntax(problem.answer)

    def read(self, key: str, path: str) -> list[Exercise]:
        """See FileTask.read: those whose tests need a program's own classes are left out, and said."""
        rows = read_rows(Path(path), key)
        read = [(row, exercise_of(row, f"{key}={path}, {row.place}", self.config)) for row in rows]
        if left_out := [row for row, exercise in read if exercise is None]:
            self.remarks.append(
                f"{key}={path}: {len(left_out):,} of its {len(rows):,} problems are left out, {left_out[0].place} first"
                ": their tests hand over objects of the program's own classes, and those do not leave the sandbox"
            )
        return [exercise for _, exercise in read if exercise is not None]

    def problem(self, record: Exercise, index: int) -> Problem:
        """See FileTask.problem."""
        prompt = template_text(self.config.template).replace("{prompt}", record.prompt)
        return Problem(self.name, index, prompt, record.meta.get("solution", ""), record.meta)


def exercise_of(row: Row, where: str, config: ProgramsConfig) -> Exercise | None:
    """Check and cut one row; None where its tests need a program's own classes. Raises TaskError that opens with
    ``where``.
    """
    fields = row.fields
    prompt = field_text(fields, config.prompt_field, "prompt_field", where)
    solution = field_text(fields, config.solution_field, "solution_field", where) if config.solution_field else ""
    match config.tests:
        case "cases":
            meta: dict[str, Any] = {"cases": _cases(fields.get(config.tests_field), where, config.tests_field)}
        case "check":
            entry = field_text(fields, config.entry_field, "entry_field", where)
            source = field_text(fields, config.tests_field, "tests_field", where)
            meta = {"asserts": [f"check({entry})"], "functions": [entry], "setup": source}
            if config.completes:
                meta |= {"prefix": prompt, "setup": f"{prompt}\n\n{source}"}
                solution = solution and prompt + solution
        case _:
            setup = str(fields.get(config.setup_field) or "") if config.setup_field else ""
            asserts = _texts(fields.get(config.tests_field), where, config.tests_field)
            if (names := _names(asserts, setup, solution, where)) is None:
                return None
            meta = {"asserts": asserts} | names
    shown = meta["asserts"][: config.shown_tests] if config.shown_tests else []
    if shown:
        prompt += SHOWN + "\n".join(shown)
    return Exercise(prompt, meta | ({"solution": solution} if solution else {}), row.number)


def _names(asserts: list[str], setup: str, solution: str, where: str) -> dict[str, Any] | None:
    """Which names tests take from a program, and the setup: what they import through the solution is imported there.
    None where they take a class, or the setup, which is run without the program, takes anything.

    Trap: a program may never say which, or it could take the place of `set` or `len` in its own tests.
    """
    try:
        tests, before, reference = (_parsed(text) for text in ("\n".join(asserts), setup, solution))
    except (SyntaxError, ValueError) as error:
        raise TaskError(f"{where}: its tests, their setup or the solution are no Python ({error}); mend them") from None
    loaded, known = _loaded(tests), _bound(tests) | _bound(before)
    classes = {n.name for n in reference.body if isinstance(n, ast.ClassDef)}
    defined = {n.name for n in reference.body if isinstance(n, ast.FunctionDef)} - known
    imports = [n for n in reference.body if isinstance(n, ast.Import | ast.ImportFrom)]
    needed = [ast.unparse(n) for n in imports if _bound(n) & (loaded | _loaded(before)) - defined]
    imported = set().union(*(_bound(n) for n in imports))
    elsewhere = known | imported | set(dir(builtins))
    if loaded & classes - known or _loaded(before) - elsewhere:
        return None
    functions = {n for n in loaded if n in defined or n not in elsewhere}
    if not functions:
        raise TaskError(f"{where}: its tests call no function of a program; mend them, or delete the row")
    return {"functions": sorted(functions), "setup": "\n".join([*needed, setup])}


def _parsed(source: str) -> ast.Module:
    with warnings.catch_warnings(action="ignore"):  # of escapes such as "\\w"
        return ast.parse(source)


def _loaded(tree: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}


def _bound(tree: ast.AST) -> set[str]:
    """Names that source binds anywhere."""
    names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
    names |= {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)}
    names |= {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    return names | {(n.asname or n.name).partition(".")[0] for n in ast.walk(tree) if isinstance(n, ast.alias)}


def _texts(given: Any, where: str, field: str) -> list[str]:
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
        raise TaskError(f"{where}: field {field!r} must be a list of tests, each a text; mend it, or task.tests_field")
    return texts


def _cases(given: Any, where: str, field: str) -> list[dict[str, str]]:
    if isinstance(given, Mapping) and isinstance(given.get("inputs"), list) and isinstance(given.get("outputs"), list):
        pairs = zip(given["inputs"], given["outputs"], strict=False)
        even = len(given["inputs"]) == len(given["outputs"])
        given = [{"input": one, "output": other} for one, other in pairs] if even else None
    if not isinstance(given, list) or not given or not all(isinstance(c, Mapping) for c in given):
        raise TaskError(
            f"{where}: field {field!r} must be [{{input, output}}] or {{inputs, outputs}}, as many; mend it"
        )
    cases = [{"input": c.get("input"), "output": c.get("output")} for c in given]
    if not all(isinstance(text, str) for case in cases for text in case.values()):
        raise TaskError(f"{where}: field {field!r} holds a test whose input or output is no text; mend it")
    return cases


@lru_cache(maxsize=256)
def _syntax(program: str) -> str | None:
    try:
        return ast.dump(_parsed(program))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


TASK = ProgramsTask
