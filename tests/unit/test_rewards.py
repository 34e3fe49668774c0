"""The rule reward: the shape of an answer, what counts as accurate, and the tricks that must not pay."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offtrail.core.types import Problem
from offtrail.rewards.config import RewardConfig
from offtrail.rewards.format import TAGS, parse
from offtrail.rewards.rule import score, total

PROBLEM = Problem("chain", 0, "2;+2;%10=?", "4")


def verify(problem: Problem, answer: str) -> bool:
    return answer == problem.answer


def points(text: str, *, finished: bool = True) -> tuple[float, float]:
    """(accuracy, format)."""
    scores = score(PROBLEM, text, verify, finished=finished)
    return scores["accuracy"], scores["format"]


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

    assert score(PROBLEM, "<answer>4</answer>", never) == {"accuracy": 0.0, "format": 0.0}


def test_total_is_the_weighted_sum():
    assert total({"accuracy": 1.0, "format": 1.0}, RewardConfig()) == 1.1
    assert total({"accuracy": 0.0, "format": 1.0}, RewardConfig(format_weight=0.25)) == 0.25
    assert total({"accuracy": 1.0, "format": 0.0}, RewardConfig(accuracy_weight=2.0)) == 2.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"workers": 0}, "reward.workers=0: must be ≥ 1"),
        ({"deadline_seconds": 0.0}, "reward.deadline_seconds=0.0: must be > 0"),
        ({"memory_mb": 1}, "reward.memory_mb=1: must be ≥ 512"),
    ],
)
def test_settings_out_of_bounds(settings: dict[str, float], message: str):
    with pytest.raises(ValueError, match=message):
        RewardConfig(**settings)  # type: ignore[arg-type]
