"""The reward: the shape of an answer, what counts as accurate, tricks that must not pay, components and their sum."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offtrail.core.plugins import PluginError
from offtrail.core.types import Problem
from offtrail.rewards.base import Answered, RewardError, whole_group
from offtrail.rewards.config import RewardConfig
from offtrail.rewards.format import TAGS, parse
from offtrail.rewards.registry import make_reward
from offtrail.rewards.total import columns, means, nothing_earned, total

PROBLEM = Problem("chain", 0, "2;+2;%10=?", "4")


def verify(problem: Problem, answer: str) -> bool:
    return answer == problem.answer


def points(text: str, *, finished: bool = True) -> tuple[float, float]:
    """(accuracy, format)."""
    [accuracy], [shape] = make_reward(RewardConfig(), verify).judge(PROBLEM, [text], [finished]).values()
    assert accuracy is not None
    assert shape is not None
    return accuracy, shape


@pytest.mark.parametrize(
    "text",
    [
        "<think>2+2=4</think><answer>4</answer>",
        "<think></think><answer>4</answer>",
        "<think>\n2+2=4\n</think>\n\n<answer> 4 </answer>\n",
        "<think>a < b > c </ think> <thin></think><answer>4</answer>",
    ],
)
def test_well_formed_and_right(text: str):
    assert points(text) == (1.0, 1.0)


def test_well_formed_and_wrong():
    assert points("<think>2+2=5</think><answer>5</answer>") == (0.0, 1.0)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "4",
        "<answer>4</answer>",  # no think block
        "<think>2+2=4</think>4",  # no answer block
        "<think>2+2=4</think><answer></answer>",  # an empty answer
        "<think>2+2=4</think><answer> \n</answer>",
        "<think>2+2=4</think><answer>4</answer>.",  # text after
        "so <think>2+2=4</think><answer>4</answer>",  # text before
        "<think>2+2=4</think> so <answer>4</answer>",  # text between
        "<think>2+2=4</think><answer>4</answer><answer>5</answer>",  # two answers
        "<think>2+2=4</think><answer>5</answer><answer>4</answer>",
        "<think>a</think><think>b</think><answer>4</answer>",  # two thoughts
        "<think><answer>4</answer></think>",  # the answer inside the thought
        "<think><answer>4</answer></think><answer>5</answer>",
        "<think><answer>4</answer></think><answer>4</answer>",
        "<think><think>a</think></think><answer>4</answer>",  # nested
        "<think>a</think><answer><answer>4</answer></answer>",
        "<think>a<answer>4</think></answer>",  # crossed
        "<answer>4</answer><think>a</think>",  # the wrong order
        "<think>a</think><answer>4",  # not closed
        "<think>a<answer>4</answer>",
        "a</think><answer>4</answer>",
        "<think>a</think><answer>4</answer></answer>",
        "<think>a</think><answer>4</think></answer>",
        "<THINK>a</THINK><ANSWER>4</ANSWER>",
        "<think>a</think><answer >4</answer>",
        "<think>a</think><answer>4</answer><eos>",  # the stop token is not part of the text
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_malformed_earns_nothing(text: str, finished: bool):
    assert points(text, finished=finished) == (0.0, 0.0)


def test_cut_off():
    assert points("<think>2+2=4</think><answer>4", finished=False) == (0.0, 0.0)
    assert points("<think>2+2=4</think><answer>4</answer>", finished=False) == (1.0, 0.0)  # it closed before the cut
    assert points("<think>2+2=4</think><answer>5</answer>", finished=False) == (0.0, 0.0)


@pytest.mark.parametrize("answer", ["4 or 5", "4 5", "0 1 2 3 4 5 6 7 8 9", "4\n5", "=4"])
def test_several_answers_in_one_block_are_wrong(answer: str):
    assert points(f"<think></think><answer>{answer}</answer>") == (0.0, 1.0)


@given(st.lists(st.sampled_from([*TAGS, "4", " ", "x"]), max_size=9).map("".join))
def test_format_is_one_think_block_then_one_answer_block(text: str):
    """Against a reading by hand-written steps instead of a pattern."""
    rest, good = text.strip(), True
    for opening, closing, may_be_empty in (("<think>", "</think>", True), ("<answer>", "</answer>", False)):
        good = good and rest.startswith(opening) and closing in rest
        inside, _, rest = rest.removeprefix(opening).partition(closing)
        good = good and not any(tag in inside for tag in TAGS) and (may_be_empty or bool(inside.strip()))
        rest = rest.strip()
    assert (parse(text) is not None) == (good and rest == "")


def test_a_long_answer_is_read_in_one_pass():
    blanks = " " * 200_000
    assert points(f"<think>{blanks}</think>{blanks}<answer>4</answer>{blanks}") == (1.0, 1.0)
    assert points(f"<think>{blanks}</think>{blanks}x{blanks}<answer>4</answer>") == (0.0, 0.0)


def test_the_verifier_is_asked_only_about_well_formed_answers():
    def never(problem: Problem, answer: str) -> bool:
        raise AssertionError(answer)

    judged = make_reward(RewardConfig(), never).judge(PROBLEM, ["<answer>4</answer>"], [True])
    assert judged == {"accuracy": [0.0], "format": [0.0]}


RIGHT, WRONG, BROKEN = ("<think></think><answer>4</answer>", "<think></think><answer>5</answer>", "4")
NAN = float("nan")


def f32(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


# Components of these tests, under names that a setting can spell.


def length(answered: Answered, *, longest: int, per: float = 1.0) -> float | None:
    """None for a malformed answer."""
    return None if answered.parts is None else min(len(answered.text), longest) / per


def fails(answered: Answered) -> float:
    raise KeyError("no such rule")


def says(answered: Answered, what: object) -> object:
    return what


@whole_group
def rank(answers: list[Answered], start: int = 0) -> list[float]:
    """Place by length, the shortest first."""
    order = sorted(range(len(answers)), key=lambda i: len(answers[i].text))
    return [float(start + order.index(i)) for i in range(len(answers))]


@whole_group
def too_few(answers: list[Answered]) -> list[float]:
    return [1.0]


class Counts:
    """Holds state from one group to the next."""

    def __init__(self, start: int) -> None:
        self.count = start

    def __call__(self, answered: Answered) -> float:
        self.count += 1
        return self.count


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> str:
    """A name under which the module of these tests can be imported."""
    monkeypatch.setitem(sys.modules, "these_rewards", sys.modules[__name__])
    return "these_rewards"


def judged(name: str, *texts: str, **settings: object) -> list[float | None]:
    config = RewardConfig(weights={name: 1.0}, settings={name: settings})
    return make_reward(config, verify).judge(PROBLEM, texts, [True] * len(texts))[name]


def test_a_component_gets_its_settings_and_may_not_apply(here: str):
    assert judged(f"{here}:length", RIGHT, longest=30, per=10.0) == [3.0]
    config = RewardConfig(weights={f"{here}:length": 1.0, "format": 1.0}, settings={f"{here}:length": {"longest": 30}})
    scores = make_reward(config, verify).judge(PROBLEM, [RIGHT, BROKEN], [True, True])
    assert scores == {f"{here}:length": [30.0, None], "format": [1.0, 0.0]}


def test_a_group_component_sees_all_answers_and_a_class_keeps_what_it_knows(here: str):
    assert judged(f"{here}:rank", "abc", "a", "ab", start=10) == [12.0, 10.0, 11.0]
    config = RewardConfig(weights={f"{here}:Counts": 1.0}, settings={f"{here}:Counts": {"start": 5}})
    reward = make_reward(config, verify)
    assert [reward.judge(PROBLEM, ["a", "b"], [True, True])[f"{here}:Counts"] for _ in range(2)] == [[6, 7], [8, 9]]


@pytest.mark.parametrize(
    ("name", "settings", "line"),
    [
        ("length", {}, "reward.settings.these_rewards:length.longest: is needed by these_rewards:length"),
        ("length", {"longst": 3}, "longst=3: no such setting; these_rewards:length takes longest, per; nearest: long"),
        ("fails", {}, "reward component these_rewards:fails raised KeyError: 'no such rule'"),
        ("says", {"what": "much"}, "these_rewards:says gave 'much': must be a finite number, or None"),
        ("says", {"what": math.inf}, "these_rewards:says gave inf: must be a finite number"),
        ("says", {"what": None}, "task=chain: no component of reward.weights applies to an answer"),
        ("too_few", {}, "these_rewards:too_few gave 1 scores for the 2 answers"),
        ("PROBLEM", {}, "reward.weights=these_rewards:PROBLEM: is Problem"),
    ],
)
def test_a_component_that_is_wrong_is_named(here: str, name: str, settings: dict[str, object], line: str):
    with pytest.raises((PluginError, RewardError)) as error:
        judged(f"{here}:{name}", RIGHT, WRONG, **settings)
    assert line in str(error.value)


def test_a_verifier_may_give_partial_credit_and_nothing_else():
    """.25 from the task is .25 of accuracy; what is no share is refused."""
    for credit, accuracy in ((0.25, 0.25), (True, 1.0), (np.float32(0.5), 0.5)):
        reward = make_reward(RewardConfig(), lambda problem, answer, credit=credit: credit)
        assert reward.judge(PROBLEM, [RIGHT], [True])["accuracy"] == [accuracy]
    for credit in (1.5, -0.1, NAN, None, "yes"):
        with pytest.raises(RewardError, match=r"verify of task=chain gave .*: must be a bool, or a number from 0 to 1"):
            make_reward(RewardConfig(), lambda problem, answer, credit=credit: credit).judge(PROBLEM, [RIGHT], [True])


def test_total_is_the_weighted_sum():
    """1·1 + .1·1, 1·0 + .1·1, 1·1 + .1·0; and a penalty takes away."""
    scores = {"accuracy": f32(1, 0, 1), "format": f32(1, 1, 0)}
    assert total(RewardConfig(), scores, task="chain", step=0).tolist() == pytest.approx([1.1, 0.1, 1.0])
    penalty = RewardConfig(weights={"accuracy": 2.0, "format": -0.5})
    assert total(penalty, scores, task="chain", step=0).tolist() == [1.5, -0.5, 2.0]


def test_what_does_not_apply_is_left_out_of_sum_and_mean_with_its_weight():
    config = RewardConfig(weights={"accuracy": 2.0, "format": 1.0})
    scores = {"accuracy": f32(1, NAN, NAN), "format": f32(0.5, 0.5, NAN)}
    assert total(config, scores, task="chain", step=0).tolist() == [2.5, 0.5, 0.0]
    assert means(config, "reward", scores) == {"reward/accuracy": 1.0, "reward/format": 0.5}
    assert means(config, "eval", {"accuracy": f32(NAN), "format": f32(1)}) == {"eval/format": 1.0}


def test_a_component_counts_in_its_steps_and_is_asked_in_its_tasks():
    """R1's last stage: the preference reward in its last 400 of 1700 steps, and not for problems with a verifier."""
    config = RewardConfig(
        weights={"accuracy": 1.0, "format": 0.5},
        only={"format": {"from_step": 1300, "to_step": 1700}, "accuracy": {"tasks": ["chain"]}},
    )
    scores = {"accuracy": f32(1), "format": f32(1)}
    rewards = [total(config, scores, task="chain", step=step).item() for step in (0, 1299, 1300, 1699, 1700)]
    assert rewards == [1.0, 1.0, 1.5, 1.5, 1.0]
    other = replace(PROBLEM, task="addition")
    assert make_reward(config, verify).judge(other, [RIGHT], [True]) == {"accuracy": [None], "format": [1.0]}
    assert total(config, scores, task="addition", step=1300).item() == 0.5


def test_nothing_earned_is_0_where_it_applies():
    config = RewardConfig(only={"accuracy": {"tasks": ["chain"]}})
    assert nothing_earned(config, "chain", 2)["accuracy"].tolist() == [0, 0]
    assert np.isnan(nothing_earned(config, "addition", 2)["accuracy"]).all()
    assert nothing_earned(config, "addition", 2)["format"].tolist() == [0, 0]


def test_none_travels_as_nan():
    column = columns({"a": [1.0, None]})["a"]
    assert column.dtype == np.float32
    assert column.tolist()[0] == 1.0
    assert np.isnan(column[1])


def test_the_main_component_is_accuracy_or_the_first():
    assert RewardConfig(weights={"format": 1.0, "accuracy": 0.0}).main == "accuracy"
    mine = RewardConfig(weights={"my_code:exact": 1.0, "format": 0.1})
    assert mine.main == "my_code:exact"
    scores = {"my_code:exact": f32(1, 0), "format": f32(1, 1)}
    assert means(mine, "eval", scores) == {"eval/my_code:exact": 0.5, "eval/format": 1.0, "eval/accuracy": 0.5}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"workers": 0}, "reward.workers=0: must be in [1, 1024]"),
        ({"deadline_seconds": 0.0}, "reward.deadline_seconds=0.0: must be in (0, 1e9]"),
        ({"memory_mb": 1}, "reward.memory_mb=1: must be in [512, 16777216]"),
    ],
)
def test_settings_out_of_bounds(settings: dict[str, float], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        RewardConfig(**settings)  # type: ignore[arg-type]
