"""The two plain comparisons: `task.compare=text` and `value`."""

from __future__ import annotations

from offtrail.rewards.grading.base import Grade
from offtrail.rewards.grading.numeric import number


def text(gold: str, answer: str) -> Grade:
    """The same words, however they are spaced."""
    return Grade(answer.split() == gold.split(), "text")


def value(gold: str, answer: str) -> Grade:
    """The same number where ``gold`` is one, else the same words."""
    expected = number(gold)
    return text(gold, answer) if expected is None else Grade(number(answer) == expected, "number")
