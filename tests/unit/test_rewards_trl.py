"""Functions of TRL's signature as components, TRL's own among them."""

from __future__ import annotations

import sys

import pytest

from offtrail.core.plugins import PluginError, check_settings
from offtrail.core.types import Problem
from offtrail.rewards.base import RewardError
from offtrail.rewards.config import RewardConfig
from offtrail.rewards.registry import make_reward

ASKED: dict[str, object] = {}


def right(completions, answer, **kwargs):
    ASKED.clear()
    ASKED.update(kwargs)
    return [float(text == gold) for text, gold in zip(completions, answer, strict=True)]


def short(prompts, completions, longest=2):
    return [None if text == "?" else float(len(text) <= longest) for text in completions]


async def waited_for(completions, completion_ids):
    return [0.5 if completion_ids is None else 0.0 for _ in completions]


def needs(completions, difficulty):
    return difficulty


def contents(prompts, completions):
    return [
        float(p[-1]["role"] == "user" and c[0]["content"] == "4") for p, c in zip(prompts, completions, strict=True)
    ]


def component(name: str) -> str:
    return f"these_functions:{name}"


@pytest.fixture(autouse=True)
def this_module(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "these_functions", sys.modules[__name__])


def judge(name: str, *texts: str, problem: Problem | None = None, **settings: object) -> list[float | None]:
    config = RewardConfig(weights={component(name): 1.0, "format": 0.1}, settings={component(name): settings})
    reward = make_reward(config, lambda problem, answer: False)
    given = problem or Problem("chain", 0, "2+2=?", "4", {"level": 3})
    return reward.judge(given, texts, [True] * len(texts))[component(name)]


def test_columns_come_by_keyword_and_as_many_as_answers():
    assert judge("right", "4", "5") == [1.0, 0.0]
    assert ASKED == {"level": [3, 3], "prompts": ["2+2=?"] * 2, "completion_ids": None, "trainer_state": None}


def test_only_what_the_signature_takes_and_none_does_not_apply():
    assert judge("short", "4", "444", "?") == [1.0, 0.0, None]
    assert judge("short", "4", "444", "?", longest=3) == [1.0, 1.0, None]


def test_an_async_function_is_waited_for():
    assert judge("waited_for", "4", "5") == [0.5, 0.5]


def test_messages_for_problems_of_messages():
    messages = ({"role": "system", "content": "s"}, {"role": "user", "content": "2+2=?"})
    assert judge("contents", "4", "5", problem=Problem("jsonl", 0, "p", "4", {}, messages)) == [1.0, 0.0]


def test_trls_own():
    config = RewardConfig(weights={"trl.rewards:think_format_reward": 1.0})
    messages = ({"role": "user", "content": "2+2=?"},)
    texts = ["<think>2+2</think>4", "4"]
    scores = make_reward(config, lambda problem, answer: False).judge(
        Problem("jsonl", 0, "p", "4", {}, messages), texts, [True, True]
    )
    assert scores == {"trl.rewards:think_format_reward": [1.0, 0.0]}


def test_mistakes_are_one_line():
    with pytest.raises(
        PluginError, match=r"short\.longer=3: no such setting; .*short takes prompts, completions, longest"
    ):
        judge("short", "4", longer=3)
    with pytest.raises(RewardError, match=r"needs difficulty, which the problem lacks; it has level, answer, prompts"):
        judge("needs", "4")


def test_the_check_before_the_start_leaves_them_their_columns():
    check_settings(component("needs"), {}, what="reward.settings.x", unless="completions")
    with pytest.raises(PluginError, match="is needed by"):
        check_settings(component("needs"), {}, what="reward.settings.x")
