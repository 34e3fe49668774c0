"""What a task is: Task; DrawnTask, whose problems are drawn; GeneratedTask, the base of the families made by program.

The broker asks ``train(index)`` for leases, the evaluator ``held_out(n)``, the cold start ``trace``; verifier workers
ask ``verify``. Invariants
- Held out means held out: no prompt of ``train`` is ever one of ``held_out``; split.py decides by the prompt alone.
- ``train(index)`` depends on (settings, seed, index) alone, in any order; ``held_out(n)`` on the settings alone, so
  that runs with different seeds are evaluated on the same prompts.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from offtrail.core.problem import Problem
from offtrail.tasks.config import GeneratedConfig, TaskConfig
from offtrail.tasks.split import is_held_out, stream

T = TypeVar("T", bound=TaskConfig)
C = TypeVar("C", bound=GeneratedConfig)

MAX_REDRAWS = 10_000
"""Redraws of one training problem before the task is declared to hold nothing outside the held-out share."""


class TaskError(ValueError):
    """A task cannot give what was asked of it; one line that names the key or file, the value and the way out."""


class Task(Protocol):
    """Prompts in a fixed order, with an exact verifier and an exact step checker."""

    name: str

    def train(self, index: int) -> Problem:
        """The training problem at place ``index`` ≥ 0 of the data order; never a held-out prompt. Raises TaskError."""

    def held_out(self, n: int) -> list[Problem]:
        """``n`` held-out problems with distinct prompts; a prefix of ``held_out(n + 1)`` except in mixtures.

        Raises TaskError when there are fewer.
        """

    def trace(self, problem: Problem, rng: random.Random) -> str:
        """A cold-start answer, `<think>…</think><answer>…</answer>` without the stop token: worked or guessed. Of the
        families made by program `tagged_share` may leave the tags out.
        """

    def verify(self, problem: Problem, answer_text: str) -> float:
        """How right the text inside the answer tags is: a bool, or partial credit from 0 to 1. Exact: no false
        positives, no near misses.
        """

    def check_steps(self, problem: Problem, text: str) -> list[bool]:
        """One bool for each reasoning step that ``text`` (an answer or its beginning) holds, in order.

        A step is right when it follows from what was written before it, so that an error which is carried on is marked
        once, where it is made; the state after step i is right exactly when all of the first i + 1 are.
        """


@runtime_checkable
class Measured(Protocol):
    """What a task may have beside: measures of its own in job=eval, ratios of counts over all answers."""

    RATIOS: Mapping[str, tuple[str, str, float]]
    """Measure → (count above, count below, factor)."""

    def counts(self, problem: Problem, answer: str | None) -> dict[str, float]:
        """What an answer (None: there is none) adds to the counts."""


@dataclass(frozen=True, slots=True)
class Draw:
    """A problem before it has a place. ``identity``: prompts with equal identity count as one in the split."""

    prompt: str
    answer: str
    identity: str
    meta: dict[str, Any] = field(default_factory=dict)


class DrawnTask(ABC, Generic[T]):
    """A family whose problems are drawn: random access by redraws.

    A problem at (seed, index) is the first draw keyed (seed, index, 0), (seed, index, 1), … that is not held out.
    """

    name: str
    config: T

    def __init__(self, config: T, seed: int) -> None:
        self.config, self.seed, self.name = config, seed, config.name

    @abstractmethod
    def draw(self, rng: random.Random) -> Draw:
        """One problem of the family."""

    def train(self, index: int) -> Problem:
        """See Task.train."""
        for attempt in range(MAX_REDRAWS):
            draw = self.draw(stream("train", self.name, self.seed, index, attempt))
            if not is_held_out(self.name, draw.identity, self.config.held_out_share):
                return Problem(self.name, index, draw.prompt, draw.answer, draw.meta)
        raise TaskError(
            f"task.held_out_share={self.config.held_out_share}: {MAX_REDRAWS} draws of task={self.name} were all held"
            " out; lower the share or raise the task's difficulty"
        )

    def held_out(self, n: int) -> list[Problem]:
        """See Task.held_out. Gives up after as many draws without a new prompt as all but prove that none is left."""
        share, problems, seen, misses = self.config.held_out_share, list[Problem](), set[str](), 0
        for attempt in count():
            if len(problems) == n:
                return problems
            if share == 0 or misses > 20 * (len(seen) + 1) / share:
                break
            draw = self.draw(stream("held_out", self.name, attempt))
            if draw.identity in seen or not is_held_out(self.name, draw.identity, share):
                misses += 1
                continue
            seen.add(draw.identity)
            problems.append(Problem(self.name, len(problems), draw.prompt, draw.answer, draw.meta))
            misses = 0
        raise TaskError(
            f"{n} held-out prompts were asked of task={self.name}, which has {len(problems)} at"
            f" task.held_out_share={share}; lower eval.prompts, or raise the share or the task's difficulty"
        )


class GeneratedTask(DrawnTask[C]):
    """A family made by program: subclasses draw a problem, work it, check it. ``load`` means nothing where no data is
    read.
    """

    def __init__(self, config: C, seed: int, *, load: bool = True) -> None:
        super().__init__(config, seed)

    @abstractmethod
    def work(self, problem: Problem, rng: random.Random) -> tuple[list[str], str]:
        """Worked steps, each wrong with chance ``config.noise``, and the answer that they lead to."""

    @abstractmethod
    def check(self, problem: Problem, steps: list[str]) -> list[bool]:
        """``check_steps`` on the steps' texts."""

    def trace(self, problem: Problem, rng: random.Random) -> str:
        """See Task.trace: a worked answer with chance ``config.worked_share``, else the right answer at once; with
        chance 1 − ``config.tagged_share`` as plain text, the answer on a line of its own.
        """
        steps, answer = list[str](), problem.answer
        if rng.random() < self.config.worked_share:
            steps, answer = self.work(problem, rng)
        share = self.config.tagged_share
        if share < 1 and rng.random() >= share:
            return "\n".join(filter(None, (";".join(steps), answer)))
        return tagged(";".join(steps), answer)

    def verify(self, problem: Problem, answer_text: str) -> float:
        """See Task.verify: the very text of the answer, but for surrounding blanks."""
        return answer_text.strip() == problem.answer

    def check_steps(self, problem: Problem, text: str) -> list[bool]:
        """See Task.check_steps; steps stand between semicolons."""
        thought = thought_of(text)
        return self.check(problem, [step.strip() for step in thought.split(";")]) if thought else []


def tagged(thought: str, answer: str) -> str:
    """An answer in the shape that the format reward asks for."""
    return f"<think>{thought}</think><answer>{answer}</answer>"


def thought_of(text: str) -> str:
    """What stands inside the first think block of an answer or of its beginning, without a final separator."""
    return text.partition("</think>")[0].partition("<think>")[2].strip().removesuffix(";")
