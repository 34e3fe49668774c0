"""From a problem to prompt tokens, and the registry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from offtrail.core.types import Problem
from offtrail.tasks.base import TaskError
from offtrail.tasks.config import TaskConfig
from offtrail.tasks.jsonl import JsonlConfig
from offtrail.tasks.registry import families, make_task
from offtrail.tasks.text import encode_prompt


class Letters:
    """a = 1, b = 2, …; anything else is unknown = 0; a begin token 99 where special tokens are asked for."""

    unk_token_id: int | None = 0

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        ids = [ord(c) - 96 if "a" <= c <= "z" else 0 for c in text]
        return [99, *ids] if add_special_tokens else ids

    def apply_chat_template(
        self, conversation: Sequence[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> Any:
        assert not tokenize
        body = "".join(f"u{turn['content']}e" for turn in conversation if turn["role"] == "user")
        return body + "a" * add_generation_prompt


def test_plain_and_chat_prompts():
    problem = Problem("jsonl", 0, "bc", "1")
    tokens = encode_prompt(Letters(), problem)
    assert tokens.dtype == np.int32
    assert tokens.tolist() == [2, 3]
    assert encode_prompt(Letters(), problem, chat=True).tolist() == [21, 2, 3, 5, 1]


def test_text_that_the_tokenizer_does_not_know_is_an_error():
    with pytest.raises(
        TaskError, match=r"task=jsonl, problem 7: the tokenizer does not know all of 'aBc'; choose a model.path"
    ):
        encode_prompt(Letters(), Problem("jsonl", 7, "aBc", "1"))
    knows_all = Letters()
    knows_all.unk_token_id = None
    assert encode_prompt(knows_all, Problem("jsonl", 7, "aBc", "1")).tolist() == [1, 0, 3]


def test_an_empty_prompt_is_an_error():
    with pytest.raises(TaskError, match=r"problem 3: the prompt is empty"):
        encode_prompt(Letters(), Problem("chain", 3, "", "1"))


def test_every_task_name_makes_a_task():
    for name, kind in families().items():
        assert make_task(kind.Config(), 0, load=False).name == name
    with pytest.raises(TaskError, match=r"task\.path is empty"):
        make_task(JsonlConfig(), 0)
    with pytest.raises(TaskError, match=r"task=chess: no such task; choose one of addition, chain"):
        make_task(TaskConfig(name="chess"), 0)
