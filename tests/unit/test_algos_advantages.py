"""Advantages of GRPO: numbers by hand, and exactly nothing where nothing differs."""

import math

import pytest
import torch

from offtrail.algos.advantages import grpo_advantages


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
