"""Multiple choice: one letter from A to E."""

from __future__ import annotations

import re

from offtrail.rewards.grading.base import Grade
from offtrail.rewards.grading.latex import one_box, plain

LETTER = re.compile(r"\(?([A-E])\)?[.:]?")
SAID = re.compile(
    r"(?:(?:the )?(?:correct |right )?(?:answer|option|choice)(?: is)?:? )?\(?([a-e])(?:\)|[.:](?= |$)|(?=$))(?: .*)?",
    re.IGNORECASE | re.DOTALL,
)
LONGEST_CHOICE = 2000


def letter(text: str, *, lenient: bool = False) -> str | None:
    """`B` of `B`, `(B)`, `B.`, `B)` or one box of it; lenient: of `b`, `B. Paris` or `The answer is (B)`, too."""
    boxed = one_box(text) if len(text) <= LONGEST_CHOICE else None
    if boxed is None:
        return None
    match = (SAID if lenient else LETTER).fullmatch(plain(boxed))
    return match[1].upper() if match else None


def grade(gold: str, answer: str, *, lenient: bool = False) -> Grade:
    """The same letter."""
    given = letter(answer, lenient=lenient)
    return Grade(given is not None and given == letter(gold), "letter" if given else "no single letter")
