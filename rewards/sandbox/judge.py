"""Judges a program by its problem's tests, which run here, in the trusted process: what they call is a proxy.

What a problem's ``meta`` holds (tasks/programs.py writes it):

    asserts    sources of tests, such as `assert f(2) == 4`; each fails by what it raises
    functions  names that they take from the program
    setup      source that is run before them, here (imports, helpers, HumanEval's `check`)
    cases      instead of asserts: [{"input": …, "output": …}], stdin and stdout of a whole program

Output is compared line by line, without blanks at the end of a line and empty lines at the end; nothing else is
forgiven. The tests are the set's, and trusted; whoever gives this process its deadline ends what loops in them.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from types import CodeType
from typing import Any

from offtrail.rewards.sandbox.box import Box
from offtrail.rewards.sandbox.runs import Dead, Functions

SHOWN = 120
REASONS = ("ok", "wrong", "raised", "syntax", "timeout", "memory", "died", "reply")


@dataclass(frozen=True)
class Judged:
    """``score``: from 0 to 1. ``reason``: `ok`, or of the first failure its kind (REASONS) and words."""

    score: float
    reason: str


def has_tests(meta: Mapping[str, Any]) -> bool:
    """Whether a problem is one that programs answer."""
    return bool(meta.get("asserts") or meta.get("cases"))


def judge(box: Box, program: str, meta: Mapping[str, Any], *, share: bool = False) -> Judged:
    """``share``: the share of tests that pass; else 1 where all do and 0 where not. The box's limits hold for all tests
    of a program together (its CPU seconds for each case).

    Raises what a problem's setup raises, and SandboxError.
    """
    if meta.get("asserts"):
        return _functions(box, program, meta, share)
    return _cases(box, program, meta["cases"], share)


def _functions(box: Box, program: str, meta: Mapping[str, Any], share: bool) -> Judged:
    try:
        run = box.functions(program)
    except Dead as death:
        return Judged(0.0, str(death))
    with run:
        space: dict[str, Any] = {"__name__": "tests"}
        exec(_compiled(meta.get("setup", "")), space)
        space |= {name: partial(run.call, name) for name in meta["functions"]}
        failures: list[str] = []
        tests = meta["asserts"]
        for done, test in enumerate(tests, 1):
            if failure := _failure(test, space, run):
                failures.append(failure)
            if run.dead is not None:
                failures += [""] * (len(tests) - done)  # all in one process: the rest fails with it
            if failures and (run.dead is not None or not share):
                break
    return _judged(failures, len(tests), share)


def _failure(test: str, space: dict[str, Any], run: Functions) -> str:
    """Why a test does not pass; empty where it does."""
    try:
        exec(_compiled(test), space)
    except Dead:
        pass
    except AssertionError:
        return f"wrong: {test.strip()[:SHOWN]}"
    except MemoryError:
        return "memory: MemoryError"
    except Exception as error:
        return f"raised: {type(error).__name__}: {error}"[:SHOWN]
    return "" if run.dead is None else str(run.dead)


def _cases(box: Box, program: str, cases: Sequence[Mapping[str, str]], share: bool) -> Judged:
    failures: list[str] = []
    end = time.monotonic() + box.limits.seconds
    for number, case in enumerate(cases, 1):
        try:
            output = box.program(program, case["input"].encode(), end - time.monotonic())
        except Dead as death:
            failures.append(str(death))
        else:
            if lines_of(output.decode("utf-8", "replace")) != lines_of(case["output"]):
                failures.append(f"wrong: output of test {number}")
        if failures and not share:
            break
    return _judged(failures, len(cases), share)


def _judged(failures: Sequence[str], tests: int, share: bool) -> Judged:
    if not failures:
        return Judged(1.0, "ok")
    return Judged(1 - len(failures) / tests if share else 0.0, failures[0])


def lines_of(text: str) -> list[str]:
    """What counts of an output."""
    return [line.rstrip() for line in text.rstrip().split("\n")]


@lru_cache(maxsize=256)
def _compiled(source: str) -> CodeType:
    """Trap: under `python -O` a plain compile would leave every assert out, and all programs would pass."""
    with warnings.catch_warnings(action="ignore"):
        return compile(source, "<tests>", "exec", dont_inherit=True, optimize=0)
