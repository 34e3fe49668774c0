"""Aggregation: each mode's number by hand, and the same number however the update is cut."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offtrail.algos.aggregation import sample_weights

# Three samples: losses 2 | 1 1 1 | −4 −4 (one value a sample); the first two are one group's.
LENGTHS = torch.tensor([1, 3, 2])
GROUP_OF = torch.tensor([5, 5, 2])
PER_TOKEN = torch.tensor([2.0, 1, 1, 1, -4, -4])
BY_HAND = {
    "token_mean": -3 / 6,
    "seq_mean_token_mean": (2 + 1 - 4) / 3,
    "seq_mean_token_sum_norm": (2 + 3 - 8) / (3 * 10),
    "prompt_mean": (5 / 4 - 8 / 2) / 2,
}
CUTS = [[[0, 1, 2]], [[0], [1, 2]], [[2], [0], [1]], [[1], [2, 0]]]


def tokens_of(samples: list[int], lengths: torch.Tensor) -> torch.Tensor:
    start = lengths.cumsum(0) - lengths
    return torch.cat([torch.arange(start[i], start[i] + lengths[i]) for i in samples])


@pytest.mark.parametrize("mode", BY_HAND)
@pytest.mark.parametrize("cut", CUTS)
def test_by_hand_under_every_cut(mode, cut):
    weight = sample_weights(mode, LENGTHS, GROUP_OF, max_length=10).repeat_interleave(LENGTHS)
    parts = [tokens_of(samples, LENGTHS) for samples in cut]
    total = sum((weight[p] * PER_TOKEN[p]).sum() for p in parts)
    assert total == pytest.approx(BY_HAND[mode], abs=1e-6)


def test_the_mean_of_means_is_another_number():
    naive = torch.stack([PER_TOKEN[:1].mean(), PER_TOKEN[1:].mean()]).mean()
    assert naive == pytest.approx(0.5)
    assert BY_HAND["token_mean"] == -0.5


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 7), min_size=1, max_size=9).filter(any),
    mode=st.sampled_from(sorted(BY_HAND)),
)
def test_weights_of_a_mode_sum_to_what_it_says(lengths, mode):
    L = torch.tensor(lengths)
    group_of = torch.arange(len(lengths)) // 2
    total = float((sample_weights(mode, L, group_of, max_length=10) * L).sum())
    groups_with_tokens = len({i // 2 for i, n in enumerate(lengths) if n})
    expected = {
        "token_mean": 1.0,
        "seq_mean_token_mean": sum(n > 0 for n in lengths) / len(lengths),
        "seq_mean_token_sum_norm": sum(lengths) / (10 * len(lengths)),
        "prompt_mean": groups_with_tokens / len(set(group_of.tolist())),
    }
    assert total == pytest.approx(expected[mode], rel=1e-5)


def test_an_update_without_tokens_weighs_nothing():
    for mode in BY_HAND:
        assert sample_weights(mode, torch.tensor([0, 0]), torch.tensor([0, 1]), max_length=1).tolist() == [0, 0]


def test_refuses():
    with pytest.raises(ValueError, match="allowed are token_mean"):
        sample_weights("mean", LENGTHS, GROUP_OF, max_length=10)
    with pytest.raises(ValueError, match=r"must both be \[S\]"):
        sample_weights("token_mean", LENGTHS, GROUP_OF[:2], max_length=10)
    with pytest.raises(ValueError, match="max_length=0"):
        sample_weights("token_mean", LENGTHS, GROUP_OF, max_length=0)
