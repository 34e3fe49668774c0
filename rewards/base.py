"""What a reward component is given, and what it gives back.

A component is a function `score(answered, *, setting=default, …)`, or a class whose instances are called like one and
whose `__init__` takes the settings by keyword. It runs in a verifier process, so that it may be slow, loop or die.

    number   any finite number; the weighted sum of them is the sample's reward
    None     "does not apply to this answer": counted neither in the sum nor in the component's mean

With `@whole_group` it is given all G answers of a prompt at once and gives G numbers back: pairwise judges need that.
An instance with ``reasons``, a dict of counts, says there how often it had which reason for its scores: each becomes a
metric.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeVar

from offtrail.core.types import Problem
from offtrail.rewards.format import Parts

T = TypeVar("T")

Verify = Callable[[Problem, str], float]
"""A task's verifier: (problem, the answer) → from 0 to 1; a bool is fine."""


class RewardError(ValueError):
    """A component that cannot be made or gives what is no score; one line that names it."""


@dataclass(frozen=True)
class Answered:
    """One answer. ``text`` is without its stop token and with what the prompt opened; ``finished``: a stop token ended
    it; ``parts``: its blocks, None where it is malformed; ``answer``: what is compared, found as reward.answer says,
    None where there is none.
    """

    problem: Problem
    text: str
    finished: bool
    parts: Parts | None
    answer: str | None
    verify: Verify

    @cached_property
    def accuracy(self) -> float:
        """What the task's verifier says of ``answer``, from 0 to 1, asked once; 0 where there is none.

        Raises RewardError when the verifier gives anything else.
        """
        if self.answer is None:
            return 0.0
        given: Any = self.verify(self.problem, self.answer)
        try:
            value = float(given)
        except (TypeError, ValueError):
            value = -1.0
        if not 0.0 <= value <= 1.0:
            raise RewardError(
                f"verify of task={self.problem.task} gave {given!r}: must be a bool, or a number from 0 to 1"
            )
        return value


class Component(Protocol):
    """Scores one answer at a time."""

    def __call__(self, answered: Answered, /) -> float | None:
        """A finite number, or None where the component does not apply."""


class GroupComponent(Protocol):
    """Scores all answers of a prompt together; marked by ``whole_group``."""

    def __call__(self, answered: Sequence[Answered], /) -> Sequence[float | None]:
        """As many as there are answers, in their order."""


def whole_group(component: T) -> T:
    """Mark a function or class as a GroupComponent."""
    component.whole_group = True  # type: ignore[attr-defined]
    return component
