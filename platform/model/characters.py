"""What the small model's own tokenizer knows, and how many tokens a text takes in it: without the tokenizer, which is
slow to import. tiny.py builds it.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

from offtrail.core.problem import Problem
from offtrail.platform.model.refusals import empty_prompt, unknown_text, without_chat

SPECIALS = ("<pad>", "<eos>", "<unk>")
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
ALPHABET = string.digits + string.ascii_lowercase + " \n" + "+-*/%=()?.,:;<>#"

_TOKEN = re.compile("|".join(map(re.escape, (*SPECIALS, *TAGS))) + r"|[\s\S]")


def count(problems: Sequence[Problem]) -> list[int | str]:
    """Of each problem the tokens of its prompt, or why it has none, as text.py says it."""
    return [_count(problem) for problem in problems]


def _count(problem: Problem) -> int | str:
    if problem.messages:
        return str(without_chat(problem))
    if not (tokens := _TOKEN.findall(problem.prompt)):
        return str(empty_prompt(problem))
    if not all(len(token) > 1 or token in ALPHABET for token in tokens):
        return str(unknown_text(problem, problem.prompt))
    return len(tokens)
