"""Advantage estimators: numbers by hand, and exactly nothing where nothing differs."""

import math

import numpy as np
import pytest
import torch

from offtrail.algos.advantages import (
    adaptive_lambda,
    estimate,
    gae,
    optimal_baseline,
    overlong_penalty,
    reinforce_pp_advantages,
    terminal_rewards,
    whiten,
)
from offtrail.algos.config import DppoConfig, GrpoConfig, PpoConfig
from offtrail.algos.filtering import filtered
from offtrail.algos.group import grpo_advantages, rloo_advantages
from offtrail.algos.process import step_leave_one_out


def groups(G: int, count: int = 1) -> torch.Tensor:
    return torch.arange(count).repeat_interleave(G)


@pytest.mark.parametrize(
    ("std", "first", "others"),
    [("sample", 1.5, -0.5), ("population", math.sqrt(3), -1 / math.sqrt(3)), ("none", 0.75, -0.25)],
)
def test_one_of_four_right(std, first, others):
    # mean 1/4; sum of squares 9/16 + 3/16 = 3/4; n−1: √(1/4), n: √3/4
    A = grpo_advantages(torch.tensor([1.0, 0, 0, 0]), groups(4), std=std, eps=0.0)
    torch.testing.assert_close(A, torch.tensor([first, others, others, others]))


def test_eps_is_added_to_the_deviation():
    A = grpo_advantages(torch.tensor([1.0, 0, 0, 0]), groups(4), eps=0.5)
    torch.testing.assert_close(A, torch.tensor([0.75, -0.25, -0.25, -0.25]))


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 0.7, 1 / 3])
@pytest.mark.parametrize("G", [3, 8, 16])
@pytest.mark.parametrize("std", ["sample", "population", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_give_exactly_nothing(reward, G, std, dtype):
    rewards = torch.cat([torch.full((G,), reward, dtype=dtype), torch.tensor([1.0] + [0.0] * (G - 1), dtype=dtype)])
    A = grpo_advantages(rewards, groups(G, 2), std=std)
    assert A[:G].tolist() == [0.0] * G
    assert A[G] > 0


def test_the_plain_formula_in_float32_does_not():
    # what the exact zero guards against: an ulp between equal rewards and their float32 mean, divided by eps
    naive = []
    for reward in (0.1, 0.7, 1 / 3):
        for G in (3, 8, 16):
            R = torch.full((G,), reward)
            naive.append(float(((R - R.sum() / G) / (R.std() + 1e-6)).abs().max()))
    assert max(naive) > 1e-3


def test_a_group_of_one_gives_nothing():
    assert grpo_advantages(torch.tensor([0.3, 1.0, 0.0]), torch.tensor([7, 9, 9])).tolist()[0] == 0.0


def test_groups_are_told_by_their_ids_in_any_order():
    rewards = torch.tensor([1.0, 5.0, 0.0, 7.0])
    A = grpo_advantages(rewards, torch.tensor([-3, 400, -3, 400]), std="none")
    assert A.tolist() == [0.5, -1.0, -0.5, 1.0]


def test_undivided_is_leave_one_out_times_its_share():
    R = torch.tensor([1.0, 0.0, 0.25, 1.0, 0.5])
    leave_one_out = R - (R.sum() - R) / 4
    torch.testing.assert_close(grpo_advantages(R, groups(5), std="none"), leave_one_out * 4 / 5)


def test_shift_and_scale_of_rewards_do_not_matter():
    R = torch.rand(4, 8, generator=torch.Generator().manual_seed(0)).double()
    plain = grpo_advantages(R.flatten(), groups(8, 4), eps=0.0)
    torch.testing.assert_close(plain, grpo_advantages((R * 3 + 5).flatten(), groups(8, 4), eps=0.0))


def test_nothing_in_nothing_out():
    assert grpo_advantages(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize(
    ("rewards", "group_of", "std", "match"),
    [
        (torch.zeros(3), torch.zeros(2, dtype=torch.int64), "sample", r"must both be \[N\]"),
        (torch.tensor([0.0, math.nan]), torch.zeros(2, dtype=torch.int64), "sample", "not finite"),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int64), "mad", "allowed are sample, population, none"),
    ],
)
def test_refuses(rewards, group_of, std, match):
    with pytest.raises(ValueError, match=match):
        grpo_advantages(rewards, group_of, std=std)


# RLOO


def test_leave_one_out_by_hand():
    # others' means 1/3, 2/3 …: 1 − 1/3 and 0 − 2/3
    A = rloo_advantages(torch.tensor([1.0, 0, 1, 0]), groups(4))
    torch.testing.assert_close(A, torch.tensor([2 / 3, -2 / 3, 2 / 3, -2 / 3]))


def test_dr_grpo_is_rloo_times_its_share():
    R = torch.rand(24, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(grpo_advantages(R, groups(8, 3), std="none"), rloo_advantages(R, groups(8, 3)) * 7 / 8)


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 0.7, 1 / 3])
@pytest.mark.parametrize("G", [3, 8, 16])
def test_equal_rewards_give_exactly_nothing_in_every_group_relative_estimator(reward, G):
    rewards = torch.cat([torch.full((G,), reward), torch.tensor([1.0] + [0.0] * (G - 1))])
    lengths = torch.arange(2 * G) % 3 + 1
    first = int(lengths[:G].sum())
    for advantage in ("group", "rloo", "reinforce_pp_baseline"):
        A = estimate(GrpoConfig(advantage=advantage), rewards, groups(G, 2), lengths).tokens
        assert A[:first].tolist() == [0.0] * first
        assert A[first] > 0
    steps = step_leave_one_out(rewards.repeat_interleave(lengths), torch.arange(2 * G).repeat_interleave(lengths),
                               groups(G, 2))  # fmt: skip
    assert steps[:first].tolist() == [0.0] * first
    assert steps[first] > 0
    share = torch.rand(2 * G, generator=torch.Generator().manual_seed(1))
    R = rewards.float()
    assert (R - optimal_baseline(R, share, share, groups(G, 2)))[:G].tolist() == [0.0] * G
    # whitened over the whole batch: nothing where the whole batch is equal
    alike = torch.full((2 * G,), reward)
    whole = estimate(GrpoConfig(advantage="reinforce_pp"), alike, groups(G, 2), lengths).tokens
    assert not whole.any()


# REINFORCE++


def test_returns_to_go_are_whitened_over_the_tokens_of_the_batch():
    # lengths 1 and 3, rewards 1 and 0: returns 1 | 0 0 0, mean ¼, deviation (n) √3/4
    A = reinforce_pp_advantages(torch.tensor([1.0, 0.0]), groups(2), torch.tensor([1, 3]), std="population", eps=0.0)
    torch.testing.assert_close(A, torch.tensor([math.sqrt(3), *[-1 / math.sqrt(3)] * 3]))


def test_the_penalty_of_a_token_counts_against_all_before_it():
    # rewards 0, 0, 1 minus .5, .25, 0: returns .25, .75, 1
    penalty = torch.tensor([0.5, 0.25, 0.0])
    R, lengths = torch.tensor([1.0]), torch.tensor([3])
    A = reinforce_pp_advantages(R, groups(1), lengths, penalty=penalty, std="none")
    torch.testing.assert_close(A, torch.tensor([0.25, 0.75, 1.0]) - 2 / 3)


def test_with_a_baseline_whitening_only_divides():
    # group of 2: ±½ over lengths 1 and 3; Σx² = 4·¼, so the scale is ½ and A = ±1; the equal group stays 0
    rewards, lengths = torch.tensor([1.0, 0.0, 0.3, 0.3]), torch.tensor([1, 3, 0, 0])
    A = reinforce_pp_advantages(rewards, groups(2, 2), lengths, baseline=True, eps=0.0)
    assert A.tolist() == [1.0, -1.0, -1.0, -1.0]


def test_whitening_has_mean_zero_and_deviation_one():
    x = torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 7 + 3
    for std in ("sample", "population"):
        y = whiten(x, std=std, eps=0.0).double()
        assert y.mean().item() == pytest.approx(0, abs=1e-6)
        assert y.std(correction=1 if std == "sample" else 0).item() == pytest.approx(1, abs=1e-6)
    assert whiten(torch.full((7,), 0.1)).tolist() == [0.0] * 7
    assert whiten(torch.zeros(0)).shape == (0,)


# GAE


V = torch.tensor([0.5, 0.25, 0.75, -1.0, 2.0])
LENGTHS = torch.tensor([3, 2])
REWARDS = torch.tensor([1.0, 0.0])


def test_gamma_and_lambda_one_is_return_minus_value():
    A = gae(terminal_rewards(REWARDS, LENGTHS), V, LENGTHS, gamma=1.0, lam=1.0)
    assert A.tolist() == pytest.approx([0.5, 0.75, 0.25, 1.0, -2.0])


def test_without_values_lambda_one_is_the_reward():
    A = gae(terminal_rewards(REWARDS, LENGTHS), torch.zeros(5), LENGTHS, gamma=1.0, lam=1.0)
    assert A.tolist() == [1.0, 1.0, 1.0, 0.0, 0.0]


def test_lambda_zero_is_the_one_step_error():
    # γ = ½: ½·.25 − .5, ½·.75 − .25, 1 − .75 | ½·2 + 1, 0 − 2
    A = gae(terminal_rewards(REWARDS, LENGTHS), V, LENGTHS, gamma=0.5, lam=0.0)
    assert A.tolist() == pytest.approx([-0.375, 0.125, 0.25, 2.0, -2.0])


def test_gae_in_between():
    # γ = 1, λ = ½: δ = −.25, .5, .25 → .25, .5 + .125, −.25 + .3125; second: δ = 3, −2 → −2, 2
    A = gae(terminal_rewards(REWARDS, LENGTHS), V, LENGTHS, gamma=1.0, lam=0.5)
    assert A.tolist() == pytest.approx([0.0625, 0.625, 0.25, 2.0, -2.0])


def test_length_adaptive_lambda():
    # 1 − 1/(α·l): α = .05, l = 200 → .9; l = 20 → 0, and never below
    assert adaptive_lambda(torch.tensor([200, 20, 1]), 0.05).tolist() == pytest.approx([0.9, 0.0, 0.0])
    one = PpoConfig(gae_alpha=0.5, std="none", value_lambda=1.0)
    got = estimate(one, REWARDS, groups(2), LENGTHS, values=V)
    by_sample = gae(terminal_rewards(REWARDS, LENGTHS), V, LENGTHS, gamma=1.0, lam=torch.tensor([1 / 3, 0.0]))
    torch.testing.assert_close(got.tokens, whiten(by_sample, std="none"))


def test_returns_are_made_before_whitening():
    got = estimate(PpoConfig(), REWARDS, groups(2), LENGTHS, values=V)
    assert got.returns.tolist() == pytest.approx([1, 1, 1, 0, 0])
    assert got.tokens.mean().item() == pytest.approx(0, abs=1e-6)


def test_kl_in_the_reward_of_ppo():
    # penalties .5·(.2, .4, 0 | 0, −.2): rewards −.1, −.2, 1 | 0, .1; λ = 1 returns .7, .8, 1 | .1, .1
    kl = torch.tensor([0.2, 0.4, 0.0, 0.0, -0.2])
    algo = PpoConfig(kl="k1", kl_coef=0.5, kl_in="reward")
    got = estimate(algo, REWARDS, groups(2), LENGTHS, kl=kl, values=V)
    assert got.returns.tolist() == pytest.approx([0.7, 0.8, 1.0, 0.1, 0.1])


def test_kl_in_the_reward_of_a_whole_sample():
    # 1 − .3 and 0 + .1: the leave-one-out differences are ±.6
    kl = torch.tensor([0.2, 0.4, 0.0, 0.0, -0.2])
    algo = GrpoConfig(advantage="rloo", kl="k1", kl_coef=0.5, kl_in="reward")
    A = estimate(algo, REWARDS, groups(2), LENGTHS, kl=kl).tokens
    assert A.tolist() == pytest.approx([0.6] * 3 + [-0.6] * 2)


def test_dppo_centres_as_prime_rl_does():
    # R − R̄ = ±½, where group's default, divided by √½, would be ±.71
    A = estimate(DppoConfig(), REWARDS, groups(2), LENGTHS).tokens
    assert A.tolist() == [0.5] * 3 + [-0.5] * 2


def test_the_plain_reward():
    A = estimate(GrpoConfig(advantage="reward"), REWARDS, groups(2), LENGTHS).tokens
    assert A.tolist() == [1.0, 1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("advantage", ["group", "rloo", "reinforce_pp", "reinforce_pp_baseline", "reward", "gae"])
def test_a_sample_without_tokens_counts_in_its_group_only(advantage):
    algo = PpoConfig() if advantage == "gae" else GrpoConfig(advantage=advantage)
    got = estimate(algo, torch.tensor([1.0, 0, 1]), groups(3), torch.tensor([2, 0, 1]), values=torch.zeros(3))
    assert got.tokens.shape == (3,)
    assert bool(torch.isfinite(got.tokens).all())


def test_missing_parts_are_named():
    with pytest.raises(ValueError, match="critic's values"):
        estimate(PpoConfig(), REWARDS, groups(2), LENGTHS)
    with pytest.raises(ValueError, match="KL estimate"):
        estimate(GrpoConfig(kl="k1", kl_coef=0.1, kl_in="reward"), REWARDS, groups(2), LENGTHS)


# Steps


def test_leave_one_out_over_steps():
    # samples (1, 0) and (½): means ½ and ½. Sample 0: (1 − ½) + (0 − ½) = 0, then −½; sample 1: ½ − ½
    steps, owner = torch.tensor([1.0, 0.0, 0.5]), torch.tensor([0, 0, 1])
    assert step_leave_one_out(steps, owner, groups(2)).tolist() == [0.0, -0.5, 0.0]
    assert step_leave_one_out(steps, owner, groups(2), gamma=0.5).tolist() == [0.25, -0.5, 0.0]


def test_a_sample_is_not_its_own_baseline():
    # means 1, 0, ½: others' means ¼, ¾, ½
    steps = step_leave_one_out(torch.tensor([1.0, 0.0, 0.5]), torch.tensor([0, 1, 2]), groups(3))
    assert steps.tolist() == [0.75, -0.75, 0.0]


@pytest.mark.parametrize("reward", [0.1, 0.7, 1 / 3])
def test_equal_steps_give_exactly_nothing_whatever_the_rounding_of_their_mean(reward):
    counts = torch.tensor([7, 3, 11])
    steps = torch.full((21,), reward, dtype=torch.float64)
    naive = torch.stack([part.sum() / len(part) for part in steps.split(counts.tolist())]) - reward
    assert naive.abs().max() > 0
    assert not step_leave_one_out(steps, torch.arange(3).repeat_interleave(counts), groups(3)).any()


def test_steps_without_others_give_nothing():
    assert step_leave_one_out(torch.tensor([1.0, 0.0]), torch.tensor([0, 0]), groups(1)).tolist() == [0.0, 0.0]
    # the other sample of the group has no steps
    assert step_leave_one_out(torch.tensor([1.0, 0.0]), torch.tensor([0, 0]), groups(2)).tolist() == [0.0, 0.0]


def test_optimal_baseline_by_hand():
    # w²‖g‖² = 4·1, 1·4, 1·2: (4·1 + 4·0 + 2·½)/10
    b = optimal_baseline(torch.tensor([1, 0, 0.5]), torch.tensor([2.0, 1, 1]), torch.tensor([1.0, 4, 2]), groups(3))
    torch.testing.assert_close(b, torch.full((3,), 0.5))


# DAPO's shaping and sampling


def test_overlong_penalty():
    # Lmax 20,480, Lc 4,096: 0 up to 16,384, half way −½, −1 at the end and beyond
    lengths = torch.tensor([1, 16384, 18432, 20480, 30000])
    got = overlong_penalty(lengths, max_length=20480, buffer=4096)
    assert got.tolist() == [0.0, 0.0, -0.5, -1.0, -1.0]
    assert overlong_penalty(lengths, max_length=20480, buffer=0).tolist() == [0.0, 0.0, 0.0, 0.0, -1.0]


@pytest.mark.parametrize(
    ("rule", "rewards", "accuracy", "expected"),
    [
        ("none", [1, 1], [1, 1], False),
        ("accuracy", [1, 0.5], [1, 1], True),
        ("accuracy", [0.1, 0.0], [0, 0], True),
        ("accuracy", [1, 0], [1, 0], False),
        ("variance", [1 / 3, 1 / 3, 1 / 3], [0, 0, 0], True),
        ("variance", [0.1, 0.0], [0, 0], False),
    ],
)
def test_groups_without_signal(rule, rewards, accuracy, expected):
    assert filtered(rule, np.array(rewards, np.float32), np.array(accuracy, np.float32)) is expected


def test_an_unknown_filter_is_refused():
    with pytest.raises(ValueError, match=r"algo\.filter_groups=zero"):
        filtered("zero", np.zeros(2), np.zeros(2))
