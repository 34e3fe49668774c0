"""Step and token scores: every form and baseline by hand, and where they enter the advantages."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from offtrail.algos.advantages import estimate
from offtrail.algos.config import GrpoConfig, PpoConfig, ProcessConfig
from offtrail.algos.correction_config import VcpoConfig
from offtrail.algos.pairs import incompatible
from offtrail.algos.process import StepScores, process_advantages, process_rewards

PAIR = torch.tensor([0, 0])
LENGTHS = torch.tensor([4, 2])
STEPS = StepScores(torch.tensor([1.0, 2.0, 0.0]), torch.tensor([2, 3, 6]))
"""Sample 0 has steps of tokens 0–1 (score 1) and 2 (score 2) and a token after them, sample 1 is one step (score 0)."""


def settings(**given: Any) -> ProcessConfig:
    return ProcessConfig(channel="prm", **given)


@pytest.mark.parametrize(
    ("given", "first", "second"),
    [
        ({"form": "sum"}, [1, 0.5, 0.25], [-1]),
        # min(r − 0.4, 0)
        ({"form": "clip", "threshold": 0.4}, [0, 0, -0.15], [-1.4]),
        # 1 − ½; then r_{K−1} = ½, then 0; a single step is the last one
        ({"form": "delta"}, [0.5, 0.5, 0], [0]),
        # clipped at ¾: 0, −¼, −½; its differences: 0 + ¼, −¼, 0
        ({"form": "clip_delta", "threshold": 0.75}, [0.25, -0.25, 0], [0]),
        # Φ = 1, ½, 0: 1 − 0, ½ − 1, 0 − ½
        ({"form": "shaping"}, [1, -0.5, -0.5], [0]),
        # ½·1 − 0, ½·½ − 1, 0 − ½
        ({"form": "shaping", "gamma": 0.5}, [0.5, -0.75, -0.5], [0]),
        # so cold that the least score alone counts
        ({"form": "min", "temperature": 1e-3}, [0, 0, 0.25], [-1]),
    ],
)
def test_what_scores_are_worth_as_rewards(given, first, second):
    got = process_rewards(settings(**given), torch.tensor([1.0, 0.5, 0.25, -1.0]), torch.tensor([3, 1]))
    torch.testing.assert_close(got, torch.tensor(first + second).double())


def test_the_minimum_is_soft_and_of_each_sample_alone():
    # T = 1/ln 2 makes weights 2^(−r): of (0, −1) they are 1 : 2, of (1, 2) 2 : 1
    process = settings(form="min", temperature=1 / math.log(2))
    got = process_rewards(process, torch.tensor([0.0, -1.0, 1.0, 2.0]), torch.tensor([2, 2]))
    torch.testing.assert_close(got, torch.tensor([0, -2 / 3, 2 / 3, 2 / 3]).double())


def test_the_minimum_of_large_scores_does_not_overflow():
    got = process_rewards(settings(form="min"), torch.tensor([-1e4, 1e4]), torch.tensor([2]))
    assert got.tolist() == [-1e4, 0.0]


def test_sums_to_come_of_shaping_are_minus_the_potential_before_the_step():
    # whatever the step itself scores: that is why the best policy stays
    for score in (0.0, 5.0):
        steps = StepScores(torch.tensor([0.25, score, 9.0]), torch.tensor([1, 2, 3]))
        process = settings(form="shaping", baseline="none")
        A = process_advantages(process, steps, torch.tensor([0]), torch.tensor([3]))
        assert A[:2].tolist() == [0.0, -0.25]


@pytest.mark.parametrize(
    ("given", "tokens"),
    [
        # 1 + 2, then 2, at each token of the step; the token after the last step is of none
        ({"baseline": "none"}, [3, 3, 2, 0, 0, 0]),
        ({"baseline": "none", "gamma": 0.5}, [2, 2, 2, 0, 0, 0]),
        # sample 0 is centred by 0, the mean of sample 1; that one by 3/2
        ({"baseline": "leave_one_out"}, [3, 3, 2, 0, -1.5, -1.5]),
        # the mean of (1, 2, 0) is 1: 0, 1 | −1
        ({"baseline": "group"}, [1, 1, 1, 0, -1, -1]),
        # their deviation is √((0 + 1 + 1)/2) = 1, and eps another 1
        ({"baseline": "group_std"}, [0.5, 0.5, 0.5, 0, -0.5, -0.5]),
    ],
)
def test_every_token_of_a_step_gets_what_the_step_and_those_after_it_earned(given, tokens):
    A = process_advantages(settings(**given), STEPS, PAIR, LENGTHS, eps=1.0)
    torch.testing.assert_close(A, torch.tensor(tokens).float())


def test_a_baseline_stays_in_its_group():
    alone = process_advantages(settings(baseline="group"), STEPS, torch.tensor([0, 1]), LENGTHS)
    # (1, 2) around 3/2: −½ + ½, ½; the other group has one step
    assert alone.tolist() == [0.0, 0.0, 0.5, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("baseline", ["leave_one_out", "group", "group_std"])
def test_equal_scores_give_exactly_nothing(baseline):
    steps = StepScores(torch.full((5,), 0.1), torch.tensor([1, 2, 3, 5, 6]))
    assert not process_advantages(settings(baseline=baseline), steps, PAIR, LENGTHS).any()


def test_token_scores_are_scores_of_steps_of_one_token():
    steps = StepScores(torch.tensor([1.0, 2, 3, 4, 5, 6]), torch.arange(1, 7))
    A = process_advantages(settings(baseline="none"), steps, PAIR, LENGTHS)
    assert A.tolist() == [10, 9, 7, 4, 11, 6]


def test_samples_without_steps_and_without_tokens_get_nothing():
    # sample 0 has no steps, sample 1 no tokens
    steps = StepScores(torch.tensor([1.0]), torch.tensor([3]))
    A = process_advantages(settings(baseline="none"), steps, torch.tensor([0, 0, 0]), torch.tensor([2, 0, 1]))
    assert A.tolist() == [0.0, 0.0, 1.0]
    none = StepScores(torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    assert process_advantages(settings(), none, PAIR, LENGTHS).tolist() == [0.0] * 6


# In the estimators


def test_scores_stand_beside_the_rewards_each_at_its_own_scale():
    # rewards (1, 0): ±½ without a deviation; the scores' part is twice [1, 1, 1, 0, −1, −1]
    algo = GrpoConfig(std="none", process=settings(baseline="group", weight=2.0))
    made = estimate(algo, torch.tensor([1.0, 0.0]), PAIR, LENGTHS, steps=STEPS)
    assert made.tokens.tolist() == [2.5, 2.5, 2.5, 0.5, -2.5, -2.5]
    assert made.process is not None
    assert made.process.tolist() == [2.0, 2.0, 2.0, 0.0, -2.0, -2.0]


@pytest.mark.parametrize("advantage", ["group", "rloo", "reinforce_pp", "reinforce_pp_baseline", "reward"])
def test_every_estimator_without_a_critic_takes_them(advantage):
    rewards = torch.tensor([1.0, 0.0])
    alone = estimate(GrpoConfig(advantage=advantage), rewards, PAIR, LENGTHS).tokens
    algo = GrpoConfig(advantage=advantage, process=settings(baseline="none"))
    both = estimate(algo, rewards, PAIR, LENGTHS, steps=STEPS).tokens
    torch.testing.assert_close(both - alone, torch.tensor([3.0, 3, 2, 0, 0, 0]))


def test_a_critic_learns_them_as_rewards_at_the_ends_of_steps():
    # token rewards 0 1 2 1 | 0 0 (the last 1 is the sample's own): returns 4 4 3 1 | 0 0, and V = 0
    algo = PpoConfig(std="none", process=settings(baseline="none"))
    made = estimate(algo, torch.tensor([1.0, 0.0]), PAIR, LENGTHS, values=torch.zeros(6), steps=STEPS)
    assert made.returns is not None
    assert made.returns.tolist() == [4.0, 4.0, 3.0, 1.0, 0.0, 0.0]
    torch.testing.assert_close(made.tokens, torch.tensor([2.0, 2, 1, -1, -2, -2]))  # whitening takes their mean, 2
    assert made.process is None


def test_scores_that_are_not_asked_for_change_nothing():
    rewards = torch.tensor([1.0, 0.0])
    assert estimate(GrpoConfig(), rewards, PAIR, LENGTHS, steps=STEPS).tokens.equal(
        estimate(GrpoConfig(), rewards, PAIR, LENGTHS).tokens
    )


def test_what_does_not_go_together_is_named():
    with pytest.raises(ValueError, match=r"algo.process.channel=prm: the advantages need its scores"):
        estimate(GrpoConfig(process=settings()), torch.zeros(2), PAIR, LENGTHS)
    with pytest.raises(ValueError, match=r"algo.process.baseline=group with algo=ppo: .* algo.process.baseline=none"):
        PpoConfig(process=settings(baseline="group"))
    line = incompatible(GrpoConfig(process=settings()), VcpoConfig(baseline="group"))
    assert line is not None
    assert "correction.baseline=group with algo.process.channel=prm" in line
