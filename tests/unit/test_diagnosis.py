"""A run that does not move says so: once, after as many steps as are worth a word, with what to look at."""

from __future__ import annotations

from typing import Any

import pytest

from offtrail.platform.config.compose import compose
from offtrail.platform.config.schema import Config
from offtrail.platform.tracking.diagnosis import PATIENCE, Diagnosis

FINE: dict[str, Any] = {
    "reward/zero_variance_share": 0.9, "reward/mean": 0.3, "reward/accuracy": 0.2, "reward/format": 0.9,
    "length/truncated_share": 0.5, "length/beyond_tokenizer_share": 0.0, "policy/grad_norm": 0.1, "policy/lr": 1e-4,
    "policy/masked_fraction": 0.0, "offpolicy/rejected_fraction": 0.0,
}  # fmt: skip
ALIKE = {"reward/zero_variance_share": 1.0, "reward/mean": 1.1, "policy/grad_norm": 0.0}
CASES: dict[str, tuple[list[str], dict[str, float], str]] = {
    "all alike": ([], ALIKE, "in every group all rewards were equal (reward/mean 1.1): each advantage is 0"),
    "no format": ([], {"reward/format": 0.0}, "reward/format was 0 for every answer"),
    "cut": ([], {"length/truncated_share": 0.995}, "100% of the answers were cut at sampling.max_new_tokens=64"),
    "still": ([], {"policy/grad_norm": 0.0}, "policy/grad_norm was exactly 0: the policy does not move"),
    "all rejected": (
        ["correction=icepop"], {"policy/grad_norm": 0.0, "offpolicy/rejected_fraction": 1.0},
        "policy/grad_norm was exactly 0: the policy does not move (correction=icepop leaves every token out)",
    ),
    "no rate": ([], {"policy/lr": 0.0}, "policy/lr was 0 (learner.optim.lr): the policy does not move"),
    "no text": ([], {"length/beyond_tokenizer_share": 0.94}, "94.0% of the sampled tokens are beyond the tokenizer"),
    "sft": (["job=sft"], {"policy/lr": 0.0}, "policy/lr was 0 (sft.lr)"),
}  # fmt: skip


def rows(first: int, last: int, **changed: Any) -> list[dict[str, Any]]:
    return [{"step": step, **FINE, **changed} for step in range(first, last + 1)]


@pytest.mark.parametrize("name", CASES)
def test_what_does_not_move_is_said_once_and_after_patience(name: str) -> None:
    line, changed, words = CASES[name]
    diagnosis = Diagnosis(compose(line))
    said = [diagnosis.take(row) for row in [*rows(1, 3), *rows(4, 40, **changed)]]
    assert [i for i, new in enumerate(said) if new] == [3 + PATIENCE - 1]
    [one] = diagnosis.lines
    assert one.startswith(f"steps 4 to {3 + PATIENCE}: {words}")
    again = Diagnosis(compose(line), [*rows(1, 3), *rows(4, 40, **changed)])
    assert again.lines == diagnosis.lines


def test_problems_that_always_fail_are_counted_with_the_reason_of_the_last() -> None:
    """B = 16: after step 13 there are 16·13 = 208 trained groups, 4 that wait, and 12 refused, 10 as failed and 2 as
    unscored: 12 of 224 are above .05. A stale one is no failed one.
    """
    diagnosis = Diagnosis(compose([]), failure=lambda: "300 prompt tokens and 64 new ones are 364")
    for step in range(1, 4):
        assert diagnosis.take({"step": step, **FINE, "queue/refused": 30.0, "queue/refused_stale": 30.0}) == []
    few = {"queue/groups": 4.0, "queue/refused": 11.0, "queue/refused_failed": 11.0}
    assert [diagnosis.take({"step": 13, **FINE, **few}) for _ in range(PATIENCE)] == [[]] * PATIENCE
    many = {"queue/groups": 4.0, "queue/refused": 12.0, "queue/refused_failed": 10.0, "queue/refused_unscored": 2.0}
    [*_, [line]] = [diagnosis.take({"step": 13, **FINE, **many}) for _ in range(PATIENCE)]
    assert line.endswith(
        "12 of 224 groups so far were refused as failed or unscored, and nothing is learned from their problems; the "
        "last: 300 prompt tokens and 64 new ones are 364"
    )


def test_a_run_that_moves_now_and_then_is_well() -> None:
    diagnosis = Diagnosis(compose([]))
    for start in range(1, 200, PATIENCE):
        for row in [*rows(start, start + PATIENCE - 2, **ALIKE), *rows(start + PATIENCE - 1, start + PATIENCE - 1)]:
            assert diagnosis.take(row) == []


def test_a_shorter_run_has_less_patience() -> None:
    diagnosis = Diagnosis(compose(["learner.steps=3", "learner.checkpoint_every=3"]))
    assert [bool(diagnosis.take(row)) for row in rows(1, 3, **ALIKE)] == [False, False, True]


@pytest.mark.parametrize("line", [["algo=reinforce_pp"], ["algo=ppo"], ["algo.process.channel=prm"]])
def test_equal_rewards_in_groups_are_no_finding_where_others_measure(line: list[str]) -> None:
    diagnosis = Diagnosis(compose(line))
    for row in rows(1, 40, **(ALIKE | {"policy/grad_norm": 0.2})):
        diagnosis.take(row)
    assert diagnosis.lines == []


def test_a_penalty_that_nobody_earns_is_no_finding() -> None:
    diagnosis = Diagnosis(compose(["reward.weights={accuracy: 1, format: -0.1}"]))
    for row in rows(1, 40, **{"reward/format": 0.0}):
        diagnosis.take(row)
    assert diagnosis.lines == []


def test_a_row_that_lacks_a_number_shows_nothing_of_it() -> None:
    diagnosis = Diagnosis(compose([]))
    for step in range(1, 40):
        diagnosis.take({"step": step, "policy/grad_norm": None})
    assert diagnosis.lines == []


def test_held_out_prompts_without_room_are_said_once_with_the_first_version_that_shows_them() -> None:
    scores = {"eval/prompts": 16.0, "eval/prompts_without_room": 3.0}
    diagnosis = Diagnosis(Config())
    assert diagnosis.take_scores(0, {"eval/prompts_without_room": 0.0}) == []
    (line,) = diagnosis.take_scores(4, scores)
    assert line.startswith(
        "version 4: 3 of 16 held-out prompts leave no room for their answers in model.max_length=256"
    )
    assert diagnosis.take_scores(8, scores) == []
    assert (
        diagnosis.lines == Diagnosis(Config(), [{"step": 2.0}, {"step": 4.0, **scores}, {"step": 8.0, **scores}]).lines
    )
