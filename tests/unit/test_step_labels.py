"""job=label without a model: which beginnings are asked, what their rollouts say, and which rows cannot be labelled."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offtrail.rewards.score_metrics import auc
from offtrail.tasks.base import TaskError
from offtrail.tasks.chain import ChainConfig
from offtrail.tasks.countdown import CountdownConfig
from offtrail.tasks.data_config import LabelConfig
from offtrail.tasks.registry import make_task
from offtrail.tasks.step_labels import (
    Labels,
    Method,
    Stepped,
    answers_in,
    by_rollouts,
    by_search,
    checked,
    most_asks,
    noised,
    require_steps,
)

Share = Callable[[int, int], float]


def labelled(method: Method, share: Share) -> tuple[list[Labels], list[int]]:
    """The labels, and how many beginnings were asked in each phase."""
    phases = []
    try:
        asks = next(method)
        while True:
            phases.append(len(asks))
            asks = method.send([share(*one) for one in asks])
    except StopIteration as end:
        return end.value, phases


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 39), st.booleans()), min_size=1, max_size=8))
def test_a_search_finds_the_planted_first_error_in_as_many_rounds_as_the_steps_have_bits(
    planted: list[tuple[int, int, bool]],
) -> None:
    first = [error % steps + 1 for steps, error, _ in planted]
    answers = [Stepped(steps, right=False, ends=ends) for steps, _, ends in planted]
    labels, phases = labelled(by_search(answers), lambda place, kept: 0.25 if kept < first[place] else 0.0)
    for one, error, own in zip(answers, first, labels, strict=True):
        assert own == [True] * (error - 1) + [False] + [None] * (one.steps - error)
    assert len(phases) <= max(one.asked.bit_length() for one in answers)
    assert sum(phases) <= most_asks(LabelConfig(method="search"), answers)


def test_a_search_asks_nothing_of_right_answers_and_may_find_no_error() -> None:
    answers = [
        Stepped(3, right=True, ends=True),
        Stepped(3, right=False, ends=False),
        Stepped(1, right=False, ends=True),
    ]
    labels, phases = labelled(by_search(answers), lambda place, kept: 1.0)
    assert labels == [[True] * 3, [True] * 3, [False]]
    assert phases == [1, 1]
    assert labelled(by_search(answers[:1]), lambda *_: math.nan) == ([[True] * 3], [])


def test_a_step_is_labelled_by_the_share_of_right_rollouts_and_the_last_by_the_answer_itself() -> None:
    answers = [
        Stepped(3, right=False, ends=True),
        Stepped(2, right=True, ends=False),
        Stepped(1, right=True, ends=True),
    ]
    shares = {(0, 1): 0.5, (0, 2): 0.0, (1, 1): 1.0, (1, 2): math.nan}
    soft, phases = labelled(by_rollouts(answers, hard=False), lambda *ask: shares[ask])
    assert (soft, phases) == ([[0.5, 0.0, 0.0], [1.0, None], [1.0]], [4])
    hard, _ = labelled(by_rollouts(answers, hard=True), lambda *ask: shares[ask])
    assert hard == [[True, False, False], [True, None], [True]]


def test_rollouts_agree_with_the_exact_verdicts_above_chance_and_the_more_the_better() -> None:
    """A scripted model: from a right beginning .6 of its answers are right, from a wrong one .2 by luck."""
    rng = random.Random(0)
    first = [rng.randint(1, 7) for _ in range(300)]  # of 6 steps; 7: none is wrong
    answers = [Stepped(6, right=False, ends=False) for _ in first]
    exact = [kept < error for error in first for kept in range(1, 7)]

    def agreement(rollouts: int) -> float:
        def share(place: int, kept: int) -> float:
            chance = 0.6 if kept < first[place] else 0.2
            return sum(rng.random() < chance for _ in range(rollouts)) / rollouts

        labels, _ = labelled(by_rollouts(answers, hard=False), share)
        return auc(np.array([label for own in labels for label in own]), np.array(exact, float))

    once, four, often = map(agreement, (1, 4, 16))
    assert 0.65 < once < four < often
    assert often > 0.95


@given(st.lists(st.sampled_from([None, True, False, 0.25, 1.0])), st.floats(0, 1), st.integers(0, 9))
def test_noise_turns_known_labels_alone_and_says_which(labels: Labels, noise: float, place: int) -> None:
    made, turned = noised(labels, noise, 3, place)
    assert (made, turned) == noised(labels, noise, 3, place)
    for step, (was, now) in enumerate(zip(labels, made, strict=True)):
        assert now == (1 - was if step in turned and was is not None else was)
        assert type(now) is type(was)
        assert was is not None or step not in turned
    assert noised(labels, 0.0, 3, place)[1] == []


def test_noise_is_as_large_as_it_is_said_to_be() -> None:
    turned = [len(noised([True] * 10, 0.2, 0, place)[1]) for place in range(400)]
    assert 0.18 < sum(turned) / 4000 < 0.22
    assert noised([True] * 10, 1.0, 0, 0) == ([False] * 10, list(range(10)))


CHAIN = make_task(ChainConfig(), 0)
CUT = {"by": "separator", "separator": ";", "within": "thought"}


def rows(tmp_path: Path, *given: dict[str, Any]) -> list[str]:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in given))
    return [str(file)]


def test_a_row_is_judged_and_checked_as_the_training_problem_that_its_index_names(tmp_path: Path) -> None:
    problem = CHAIN.train(5)
    answer = CHAIN.trace(problem, random.Random(1))
    row = {"prompt": problem.prompt, "answer": answer, "gold": problem.answer, "index": 5}
    paths = rows(tmp_path, row, row | {"index": 6}, row | {"finish": "length", "gold": 7})
    one, other, cut = answers_in(LabelConfig(paths=paths), CHAIN, ChainConfig())
    assert checked(one, CHAIN) == CHAIN.check_steps(problem, answer)
    assert (one.gold, one.finished, one.reward) == (problem.answer, True, None)
    assert (cut.gold, cut.finished) == ("7", False)
    with pytest.raises(
        TaskError, match=r"rows.jsonl, line 2: the checker of task=chain asks for its problem's 'modulus'"
    ):
        checked(other, CHAIN)


@pytest.mark.parametrize(
    ("row", "given", "words"),
    [
        (
            {"prompt": "1", "answer": "2"},
            {},
            "line 1: has no gold answer in field 'gold' .*, by which job=label judges",
        ),
        (
            {"prompt": "1", "gold": "2"},
            {},
            "line 1: field 'answer' is missing; mend the line, or set label.answer_field",
        ),
        ({"prompt": "1", "gold": "2", "answer": 3}, {}, "line 1: field 'answer' is not text"),
        (
            {"prompt": "1", "gold": "2", "answer": "<think></think>"},
            {"cut": CUT},
            "^label.cut=.*: none of 1 answers has a step",
        ),
        (
            {"prompt": CHAIN.train(0).prompt, "index": 0, "gold": "2", "answer": "<think>1+1=2;2+2=4</think>"},
            {"method": "exact"},
            "^label.method=exact: none of 1 answers has the steps that the checker of task=chain sees .* by label.cut",
        ),
    ],
)
def test_what_cannot_be_labelled_is_one_line(
    row: dict[str, Any], given: dict[str, Any], words: str, tmp_path: Path
) -> None:
    config = LabelConfig(paths=rows(tmp_path, row), **given)
    with pytest.raises(TaskError, match=words) as told:
        require_steps(config, CHAIN, ChainConfig())
    assert "\n" not in str(told.value)


def test_a_task_that_asks_more_than_a_gold_answer_needs_its_own_problem(tmp_path: Path) -> None:
    kind = CountdownConfig()
    task = make_task(kind, 0)
    problem = task.train(3)
    row = {"prompt": problem.prompt, "answer": "1\n2", "gold": problem.answer, "index": 3}
    [one] = answers_in(LabelConfig(paths=rows(tmp_path, row)), task, kind)
    assert problem.meta.items() <= one.problem.meta.items()
    with pytest.raises(
        TaskError, match="line 1: task=countdown is judged by more than a gold answer, and the row is none"
    ):
        list(answers_in(LabelConfig(paths=rows(tmp_path, row | {"index": 4})), task, kind))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"cut": {"by": "word"}}, "label.cut.by=word: must be one of"),
        ({"cut": {"by": "tokens"}, "method": "exact"}, "label.cut.by=tokens: label.method=exact reads the text alone"),
        ({"labels": "hard", "method": "search"}, "label.labels=hard: label.method=search has no others"),
        ({"paths": [""]}, "label.paths=.*: an empty path names no file"),
        ({"rollouts": 0}, "label.rollouts=0"),
    ],
)
def test_settings_that_cannot_be(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LabelConfig(**given)
