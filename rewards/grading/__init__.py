"""How an answer is compared with the gold one: `task.compare`. Nothing here knows a clock: verifiers are killable.

    text     the same text, up to blanks
    value    the same number where the gold answer is one, however it is dressed, else the same text
    choice   the same letter
    math     the same mathematics: the same text, else the same number, else what math-verify says

Each gives a Grade: right or not, and why. docs/rewards.md decides case by case what `strict` and `lenient` take.
"""

from __future__ import annotations

from offtrail.rewards.grading import choice, exact, mathematics
from offtrail.rewards.grading.base import Grade

COMPARISONS = ("value", "text", "choice", "math")


def grade(gold: str, answer: str, compare: str, *, lenient: bool = False) -> Grade:
    """How ``answer`` compares with ``gold``; ``compare`` is one of COMPARISONS. text knows no leniency."""
    match compare:
        case "text":
            return exact.text(gold, answer)
        case "value":
            return exact.value(gold, answer, lenient=lenient)
        case "choice":
            return choice.grade(gold, answer, lenient=lenient)
    return mathematics.grade(gold, answer, lenient=lenient)
