"""Which answers are put side by side, and what a judge's two replies come to."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offtrail.platform.launcher.judge import Shown, worded
from offtrail.tasks.data_config import COMPARISON, JudgeConfig, PreferConfig
from offtrail.tasks.pairs import Answer, Verdict, drawn, said


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("[[A]]", "A"), ("I first thought [[A]], but no: [[B]].", "B"), ("Neither. [[C]]", "C"), ("A", "A"),
        (" B.\n", "B"),
        ("**C**", "C"), ("", ""), ("A is better", ""), ("[[D]]", ""), ("[A]", "A"), ("[[a]]", ""), ("AB", ""),
        ("<think>[[A]]</think>\n[[B]]", "B"), ("<think>it is [[A]]", ""), ("reasons</think> [[C]]", "C"),
    ],
)  # fmt: skip
def test_a_reply_says_one_of_three_or_nothing(reply: str, verdict: str) -> None:
    assert said(reply) == verdict


@pytest.mark.parametrize(
    ("straight", "turned", "preferred", "by_place"),
    [
        ("A", "B", 0, False), ("B", "A", 1, False),
        ("A", "A", -1, True), ("B", "B", -1, True),  # a place has won, no answer
        ("C", "C", -1, False), ("A", "C", -1, False), ("C", "B", -1, False),
        ("A", "so", None, False), ("", "B", None, False), ("", "", None, False),
    ],
)  # fmt: skip
def test_only_what_holds_in_both_orders_is_a_preference(
    straight: str, turned: str, preferred: int | None, by_place: bool
) -> None:
    verdict = Verdict(straight, turned)
    assert (verdict.preferred, verdict.by_place) == (preferred, by_place)


ANSWERS = st.lists(st.tuples(st.sampled_from([0.0, 0.25, 1.0]), st.sampled_from([b"x", b"y", b"z"])), max_size=6)


@given(ANSWERS, st.sampled_from(["reward", "verify", "judge"]), st.integers(0, 4), st.sampled_from([0.0, 0.5]))
def test_the_pairs_of_a_question(held: list[tuple[float, bytes]], by: str, most: int, margin: float) -> None:
    answers = [Answer(place, reward, read) for place, (reward, read) in enumerate(held)]
    judge = JudgeConfig(url="http://here" if by == "judge" else "")
    margin = 0.0 if by == "judge" else margin
    config = PreferConfig(by=by, most=most, margin=margin, judge=judge)  # type: ignore[arg-type]
    pairs, why = drawn(answers, config, seed=3)
    fit = {
        (one, other)
        for one, other in combinations(answers, 2)
        if one.read != other.read and (by == "judge" or abs(one.reward - other.reward) > margin)
    }
    assert set(map(tuple, pairs)) <= fit
    assert len(pairs) == len(set(pairs)) == (min(most, len(fit)) if most else len(fit))
    assert bool(why) == (not pairs)
    assert drawn(answers, config, seed=3) == (pairs, why)


def test_a_seed_draws_other_pairs() -> None:
    answers = [Answer(place, float(place), bytes([place])) for place in range(8)]
    assert len({tuple(drawn(answers, PreferConfig(most=2), seed)[0]) for seed in range(20)}) > 10


def test_what_is_compared_never_fills_a_place_of_the_prompt() -> None:
    shown = Shown("is {a} a set?", "{b}, or {question}", "yes {a}")
    assert worded("{b} < {a} ? {question}", shown) == "yes {a} < {b}, or {question} ? is {a} a set?"
    assert worded(COMPARISON, shown).count("{b}, or {question}") == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"by": "judge"}, r"prefer\.judge\.url=: prefer\.by=judge needs an endpoint"),
        ({"judge": JudgeConfig(url="http://x")}, r"prefer\.judge\.url=http://x: prefer\.by=reward asks nobody"),
        ({"paths": [""]}, r"prefer\.paths=\[''\]: an empty path"),
        ({"margin": -1.0}, r"prefer\.margin=-1\.0: must be in"),
        ({"ties": "drop"}, r"prefer\.ties=drop: prefer\.by=reward makes no ties"),
        (
            {"by": "judge", "margin": 0.5, "judge": JudgeConfig(url="http://x")},
            r"prefer\.margin=0\.5: prefer\.by=judge",
        ),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PreferConfig(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": "{a} or {b}"}, r"must contain \{question\} once"),
        ({"prompt": "{question} {a} {a} {b}"}, r"must contain \{a\} once"),
        ({"url": "here:80"}, r"prefer\.judge\.url=here:80: must be as http"),
        ({"tries": 0}, r"prefer\.judge\.tries=0: must be"),
    ],
)
def test_a_judge_that_cannot_be(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        JudgeConfig(**settings)  # type: ignore[arg-type]
