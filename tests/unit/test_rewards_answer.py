"""Where an answer is looked for, in texts that try to be read twice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offtrail.core.types import Problem
from offtrail.rewards.answer import find_answer
from offtrail.rewards.config import RewardConfig
from offtrail.rewards.format import parse
from offtrail.rewards.registry import make_reward


def found(text: str, how: str, *, finished: bool = True, mark: str = "Answer:") -> str | None:
    config = RewardConfig(answer=how, answer_mark=mark)  # type: ignore[arg-type]
    return find_answer(text, parse(text), finished, config)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{4}.", "4"),
        (r"\boxed{3} no, \boxed{ 4 } it is", "4"),
        (r"\fbox{3} and \boxed{4}", "4"),
        (r"\boxed{3} and \fbox{4}", "4"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\boxed{4}}", "4"),
        (r"<think>\boxed{3}</think> \boxed{4}", "4"),
        (r"<think>\boxed{3}</think> 4", None),  # said in the thought only
        (r"a</think>\boxed{4}", "4"),  # the template opened the thought
        (r"<think>\boxed{4}", None),  # a thought that never ended
        (r"\boxed{4} or \boxed{5", None),  # cut off in the last box: no choice between two readings
        (r"\boxed{4\}", None),
        (r"\boxed{}", None),
        (r"\boxed 4", None),
        ("4", None),
        ("", None),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_boxed(text: str, answer: str | None, finished: bool):
    assert found(text, "boxed", finished=finished) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("2 + 2\nAnswer: 4", "4"),
        ("Answer: 4\nthat was it", "4"),
        ("Answer:\n\n4\n", "4"),
        ("Answer: 3\nAnswer: 4", "4"),
        ("<think>Answer: 3</think>4", None),
        ("Answer:", None),
        ("answer: 4", None),
        ("", None),
    ],
)
def test_mark(text: str, answer: str | None):
    assert found(text, "mark") == answer
    assert found(text, "mark", finished=False) is None
    assert found(text.replace("Answer:", "####"), "mark", mark="####") == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("2 + 2 = 4.", "4"),
        ("it is $1,800.50, I think", "1,800.50"),
        ("1 or 2, 3", "3"),
        ("(1,2,3)", "3"),
        ("1,234,5678", "5678"),
        ("x = -3/4", "-3/4"),
        ("x = −7", "-7"),
        ("10-5", "5"),  # a difference, not a sign
        ("it loses -$18", "-$18"),
        ("it loses −$18.", "-$18"),
        (r"it loses $-18$", "-18"),
        (r"it loses -\$1,800", r"-\$1,800"),
        ("$20-$18", "18"),
        ("x = .5", ".5"),
        ("1.2.3", "3"),
        # separators
        ("so 1{,}800 of them", "1{,}800"),
        (r"so 1,\!800 of them", r"1,\!800"),
        (r"so 1\,800\,000", r"1\,800\,000"),
        ("in 2024 800 came", "800"),
        ("box 1 800", "800"),  # a blank lies between numbers, too
        # exponents
        ("an area of 36 cm^2", "36"),
        ("an area of 36 cm^{2}.", "36"),
        ("an area of 36 m2", "36"),
        (r"$36\text{ m}^2$", "36"),
        ("9 m/s^2", "9"),
        ("x^2 = 9", "9"),
        ("x^{-1}", None),
        (r"about 3 \times 10^5 of them", r"3 \times 10^5"),
        (r"\boxed{3 \times 10^{-5}}", r"3 \times 10^{-5}"),
        ("10^{5}", "10^{5}"),
        ("2^10", "2^10"),  # not worked out: neither 2 nor 10
        ("2 x 9", "9"),
        (r"\frac{3}{4} of it", r"\frac{3}{4}"),
        (r"$-1\frac{3}{4}$", r"-1\frac{3}{4}"),
        # words
        ("some 2 million people", "2 million"),
        (r"\boxed{2 \text{ million}}", r"2 \text{ million}"),
        (r"\boxed{2 million}", "2 million"),
        ("2 millions", "2 millions"),
        ("2 millionaires", "2"),
        ("2 people", "2"),
        # times of day
        ("at 18:00.", "18:00"),
        ("at 9:05:30", "9:05:30"),
        ("18: 7", "7"),
        ("1:800", "800"),
        ("(2)-3", "3"),
        ("1e-05", "1e-05"),
        ("50%", "50"),
        ("v2 of 3", "3"),
        ("<think>3</think>four", None),
        ("four", None),
        ("7 " * 500 + "1/2 of all", "1/2"),
        ("", None),
    ],
)
def test_last_number(text: str, answer: str | None):
    assert found(text, "last_number") == answer
    assert found(text, "last_number", finished=False) is None


@given(st.text(st.sampled_from("\\boxed{}fbox<think>/Answer:12,.-e$^×x million\n\0"), max_size=60), st.booleans())
def test_any_text_is_read_and_an_answer_is_a_part_of_it(text: str, finished: bool):
    for how in ("tags", "boxed", "mark", "last_number"):
        answer = found(text, how, finished=finished)
        assert answer is None or (answer and answer == answer.strip() and answer in text)


@pytest.mark.parametrize(
    "piece",
    [
        "\\boxed{",
        "{",
        "}",
        "1",
        "1,",
        "1,111",
        "-",
        " ",
        "\n",
        "Answer:",
        "<think>",
        "1e",
        "^",
        "1^{",
        "1:11",
        "\\frac{1}{",
    ],
)
@pytest.mark.parametrize("how", ["boxed", "mark", "last_number"])
def test_long_texts_are_read_in_one_pass(piece: str, how: str):
    """Far from done within the suite's timeout if any of them were quadratic."""
    found(piece * (400_000 // len(piece)), how)
    found("\\boxed{Answer: 1" + piece * (400_000 // len(piece)), how)


def test_the_components_see_the_answer_that_the_setting_names():
    verify = lambda problem, answer: answer == problem.answer  # noqa: E731
    texts = ["so \\boxed{4}", "<think></think><answer>4</answer>", "<think></think><answer>\\boxed{4}</answer>"]
    judged = make_reward(RewardConfig(answer="boxed"), verify).judge(Problem("chain", 0, "p", "4"), texts, [True] * 3)
    assert judged == {"accuracy": [1.0, 0.0, 1.0], "format": [0.0, 1.0, 1.0]}


def test_an_empty_mark_is_refused():
    with pytest.raises(ValueError, match=r"reward\.answer_mark=' ': must be a text"):
        RewardConfig(answer="mark", answer_mark=" ")
