"""The problems of a run, from the broker's own task: nobody else says what a group was asked.

scheduler ── lease ──► problem(index) ──► the generator ── the group's problem ──► same(index, problem)?
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache

import msgspec

from offtrail.core.types import Problem

KEPT = 4096
"""Problems that are remembered between their lease and their arrival."""


class ProblemError(ValueError):
    """The task has no such problem, or one that neither a lease nor the archive can carry; one line."""


class Problems:
    """A place of the data order → its problem, checked. ``make`` is the task's, and depends on the place alone."""

    def __init__(self, make: Callable[[int], Problem]) -> None:
        self._make = make
        self._known = lru_cache(KEPT)(self._checked)

    def __call__(self, index: int) -> Problem:
        """Raises ProblemError."""
        return self._known(index)[0]

    def same(self, index: int, problem: Problem) -> bool:
        """Whether a problem that came over the wire is this one, to the byte."""
        return msgspec.msgpack.encode(problem) == self._known(index)[1]

    def _checked(self, index: int) -> tuple[Problem, bytes]:
        try:
            problem = self._make(index)
            told = problem.task, problem.prompt, problem.answer, dict(problem.meta), [dict(m) for m in problem.messages]
            json.dumps(told, ensure_ascii=False, allow_nan=False).encode()
            encoded = msgspec.msgpack.encode(problem)
            msgspec.msgpack.decode(encoded, type=Problem)  # as the generator will, where a failure would end the run
            return problem, encoded
        except Exception as error:  # the task may be anybody's code
            raise ProblemError(
                f"problem {index} of the task cannot be leased ({type(error).__name__}: {error}); it must hold plain "
                "JSON values"
            ) from error
