"""The shape of an answer: exactly one think block, then exactly one answer block, then the end.

`<think>…</think><answer>…</answer>`; only blanks may stand before, between and after the blocks. The think block may be
empty (a direct guess), the answer may not. No tag may occur anywhere else: an answer hidden in the thought, a second
answer or a nested tag makes the whole malformed, so that no reading of it can be chosen after the fact.
"""

from __future__ import annotations

import re
from typing import NamedTuple

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
SHAPE = re.compile(r"\s*<think>(.*)</think>\s*<answer>(.*)</answer>\s*", re.DOTALL)


class Parts(NamedTuple):
    """The two blocks of a well-formed answer, without blanks around them."""

    thought: str
    answer: str


def parse(text: str) -> Parts | None:
    """The blocks of a well-formed answer, else None. Linear in the length of ``text``."""
    if any(text.count(tag) != 1 for tag in TAGS):
        return None
    match = SHAPE.fullmatch(text)
    if match is None or not match[2].strip():
        return None
    return Parts(match[1].strip(), match[2].strip())
