"""What the small model's own tokenizer knows, and how many tokens a text takes in it: without the tokenizer, which is
slow to import. tiny.py builds it.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

from offtrail.core.problem import Problem
from offtrail.platform.model.refusals import empty_prompt, unknown_text, without_chat
from offtrail.platform.model.text import opened_by, rest_of

SPECIALS = ("<pad>", "<eos>", "<unk>")
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
ALPHABET = string.digits + string.ascii_lowercase + " \n" + "+-*/%=()?.,:;<>#"

_TOKEN = re.compile("|".join(map(re.escape, (*SPECIALS, *TAGS))) + r"|[\s\S]")


def count(problems: Sequence[Problem], answered: bool, more: str = "") -> list[int | str]:
    """Of each problem the tokens of its prompt, with ``answered`` and of its answer as it is imitated; or why it has
    none, as text.py says it. ``more``: model.characters.
    """
    known = {*ALPHABET, *more}
    return [_count(problem, answered, known) for problem in problems]


def _count(problem: Problem, answered: bool, known: set[str]) -> int | str:
    prompt = problem.prompt
    if problem.messages:
        return str(without_chat(problem))
    if not prompt:
        return str(empty_prompt(problem))
    texts = [prompt, rest_of(opened_by(prompt), problem.answer)] if answered else [prompt]
    split = [_TOKEN.findall(text) for text in texts]
    for text, tokens in zip(texts, split, strict=True):
        if not all(len(token) > 1 or token in known for token in tokens):
            return str(unknown_text(problem, text))
    return sum(map(len, split)) + answered  # and the stop token
