"""What is counted in answers, each number worked out by hand, and its way into a run's metrics."""

from __future__ import annotations

import math

import numpy as np
import pytest

from offtrail.core.types import Batch, Group, Problem
from offtrail.platform.learner.report import batch_metrics
from offtrail.rewards.behaviour import REFLECTION, added, counted, metrics, of_answer
from offtrail.rewards.config import RewardConfig
from offtrail.rewards.total import reason_shares

TEXT = "<think>Wait, 3 + 4 is 7. But wait: let me check it, however odd.</think><answer>7</answer>"


def test_words_of_reflection_are_whole_words_in_any_case() -> None:
    """Wait, is, But, wait, let, me, check, it, however, odd: numbers and tags are no words."""
    counts = of_answer(TEXT, finished=True)
    assert (counts["words"], counts["reflection"], counts["reflecting"]) == (10, 5, 1)
    assert {word: counts[word] for word in REFLECTION if counts[word]} == {
        "wait": 2,
        "but": 1,
        "however": 1,
        "check": 1,
    }
    none = of_answer("She checks the waiting butter; verified errors.", finished=True)
    assert (none["words"], none["reflection"], none["reflecting"]) == (7, 0, 0)
    assert of_answer("Don't re-check: it’s 12 km", finished=True)["words"] == 5  # Don't, re, check, it’s, km


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        (TEXT, "well_formed", 1),
        (TEXT + " more", "well_formed", 0),
        ("a b c a b c", "repeated", 0.5),
        ("a b c d", "repeated", 0),
        ("the answer is 七", "foreign", 1 / 4),
        ("the answer is `七`", "foreign", 0),
        ("答案 is seven", "words", 4),
        ("", "words", 0),
    ],
)
def test_other_counts_of_one_answer(text: str, name: str, expected: float) -> None:
    assert of_answer(text, finished=True)[name] == pytest.approx(expected)


def test_an_answer_that_was_cut_off_is_not_well_formed_and_a_target_language_is_told() -> None:
    assert of_answer(TEXT, finished=False)["well_formed"] == 0
    assert of_answer("the answer", finished=True, target="zh")["foreign"] == 1
    assert of_answer("答案", finished=True, target="zh")["foreign"] == 0


def test_metrics_are_ratios_of_sums_and_not_means_of_ratios() -> None:
    """Two words with one of reflection, eight without: 1 of 10 words, 1 of 2 answers."""
    counts = counted(["but seven", "one two three four five six seven eight"], [True, True], "en")
    found = metrics(counts, "behaviour")
    assert found["behaviour/reflection_per_1000_words"] == found["behaviour/but_per_1000_words"] == 100
    assert found["behaviour/wait_per_1000_words"] == 0
    assert (found["behaviour/reflection_share"], found["behaviour/words_mean"]) == (0.5, 5)
    assert metrics(added([counts, counts]), "behaviour") == found
    assert metrics({}, "behaviour") == {}
    numbers = metrics(counted(["12"], [True], "en"), "behaviour")
    assert "behaviour/reflection_per_1000_words" not in numbers  # no words to divide by
    assert numbers["behaviour/reflection_share"] == 0


def group(counts: dict[str, float]) -> Group:
    ones = np.ones(1, np.float32)
    return Group(
        0, 0, 1, Problem("chain", 0, "p", "a"), "generator-0", 1.0, np.zeros(2, np.int32), np.ones(1, np.int32),
        np.zeros(1, np.int32), -ones, np.zeros(1, np.int32), np.zeros(1, np.uint8), ones, {"accuracy": ones},
        np.zeros((1, 3)), counts=counts,
    )  # fmt: skip


def test_a_batch_tells_for_which_reasons_a_component_gave_its_scores() -> None:
    """Also for those that no answer of this batch has, so that a curve of them comes down again."""
    batch = Batch(0, (group({"answers": 2, "code/ok": 1, "code/wrong": 1, "code/died": 0}), group({"code/ok": 2})))
    told = batch_metrics(batch, RewardConfig(), 10)
    shares = {name: value for name, value in told.items() if name.startswith("reward/code")}
    assert shares == {"reward/code_ok_share": 0.75, "reward/code_wrong_share": 0.25, "reward/code_died_share": 0}
    assert reason_shares("eval", {"answers": 2.0, "code/ok": 0.0}) == {}  # nothing was judged


def test_a_batch_tells_what_its_groups_counted() -> None:
    """A group whose verifier was killed has counted nothing, and is left out."""
    batch = Batch(0, (group({"answers": 2, "reflecting": 1}), group({}), group({"answers": 2})))
    told = batch_metrics(batch, RewardConfig(), 10)
    assert told["behaviour/reflection_share"] == 0.25
    assert not any(name.startswith("behaviour/") for name in batch_metrics(Batch(0, (group({}),)), RewardConfig(), 10))
    with pytest.raises(ValueError, match="group 0: a count is not finite"):
        group({"words": math.nan}).check()
