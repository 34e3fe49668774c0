"""From a problem to prompt tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from offtrail.core.types import Int32, Problem
from offtrail.tasks.base import TaskError


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    @property
    def unk_token_id(self) -> int | None:
        """Id of the unknown token, where there is one."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text."""

    def apply_chat_template(
        self, conversation: Sequence[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> Any:
        """The conversation as the model's chat format writes it."""


def encode_prompt(tokenizer: Tokenizer, problem: Problem, chat: bool = False) -> Int32:
    """Prompt tokens [P] int32: the prompt as it stands, or as one user turn of the model's chat format.

    Special tokens are never added: a base model's prompt has none, and a chat format writes its own.
    Raises TaskError when the prompt is empty or holds text that the tokenizer does not know.
    """
    text = problem.prompt
    if chat:
        turn = [{"role": "user", "content": text}]
        text = str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
    tokens = tokenizer.encode(text, add_special_tokens=False)
    if not tokens:
        raise TaskError(
            f"task={problem.task}, problem {problem.index}: the prompt is empty; mend the data or task.template"
        )
    check_known(tokenizer, problem, text, tokens)
    return np.array(tokens, np.int32)


def check_known(tokenizer: Tokenizer, problem: Problem, text: str, tokens: Sequence[int]) -> None:
    """Raise TaskError when ``tokens`` of the problem's ``text`` hold the unknown token: what is trained on must be the
    text itself.
    """
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in tokens:
        raise TaskError(
            f"task={problem.task}, problem {problem.index}: the tokenizer does not know all of {text[:60]!r}; choose a"
            " model.path whose tokenizer covers the task's text"
        )
