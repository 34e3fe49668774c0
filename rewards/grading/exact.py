"""The two plain comparisons: `task.compare=text` and `value`."""

from __future__ import annotations

from offtrail.rewards.grading.base import Grade
from offtrail.rewards.grading.latex import Quantity, said, same
from offtrail.rewards.grading.numeric import number


def text(gold: str, answer: str) -> Grade:
    """The same words, however they are spaced."""
    return Grade(answer.split() == gold.split(), "text")


def value(gold: str, answer: str, *, lenient: bool = False) -> Grade:
    """The same number where ``gold`` is a plain one, however the answer is dressed, else the same words."""
    if (expected := number(gold)) is None:
        return text(gold, answer)
    given = said(answer, lenient=lenient)
    if given is None:
        return Grade(False, "no plain number")
    return Grade(same(Quantity(expected), given, lenient=lenient), "number")
