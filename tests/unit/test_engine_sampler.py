"""The sampler: known answers of Philox, keys that alone decide, draws from the right distribution, edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from offtrail.platform.engines.sampler import draw, keep, log_probabilities, philox, uniforms


def words(*values: int) -> tuple[np.ndarray, ...]:
    return tuple(np.array([value], np.uint64) for value in values)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the known-answer tests published with Random123 for philox4x32, 10 rounds
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    assert tuple(int(w[0]) for w in philox(words(*counter), words(*key))) == expected


def test_uniforms_are_the_words_of_their_counter():
    seed, request, sample = words(0x299F31D0_A4093822, 0x85A308D3_243F6A88, 0x13198A2E)
    first = np.array([2 * 0x03707344], np.uint64)
    high, low = 0xD16CFE09_94FDCCEB >> 11, 0x5001E420_24126EA1 >> 11
    assert uniforms(seed, request, sample, first, 2).tolist() == [[high / 2**53, low / 2**53]]


def test_uniforms_depend_on_their_keys_alone():
    rng = np.random.default_rng(0)
    seed, request, sample = (rng.integers(0, 5, 32).astype(np.uint64) for _ in range(3))
    first = 2 * rng.integers(0, 50, 32).astype(np.uint64)
    together = uniforms(seed, request, sample, first, 64)
    for i in range(32):
        one = slice(i, i + 1)
        assert (uniforms(seed[one], request[one], sample[one], first[one], 64) == together[one]).all()
        later = uniforms(seed[one], request[one], sample[one], first[one] + np.uint64(10), 54)
        assert (later == together[one, 10:]).all()


def test_each_key_changes_the_uniforms():
    base = words(1, 2, 3, 4)
    reference = uniforms(*base, 2)
    for place in range(4):
        changed = list(base)
        changed[place] = changed[place] + np.uint64(2)
        assert (uniforms(*changed, 2) != reference).all()


def test_uniforms_are_uniform_and_in_range():
    n = 4096
    sample, zero = np.arange(n, dtype=np.uint64), np.zeros(n, np.uint64)
    u = uniforms(zero, zero + np.uint64(7), sample, zero, 64)
    assert u.min() >= 0
    assert u.max() < 1
    counts = np.histogram(u, 64, (0, 1))[0]
    expected = u.size / 64
    assert ((counts - expected) ** 2 / expected).sum() < 103.4  # chi-square, 63 degrees of freedom, p = .001
    centred = u - 0.5
    assert abs((centred[:, 1:] * centred[:, :-1]).mean() * 12) < 4 / np.sqrt(u.size)  # neighbours in position
    assert abs((centred[1:] * centred[:-1]).mean() * 12) < 4 / np.sqrt(u.size)  # neighbours in sample


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_draws_follow_the_distribution(temperature):
    n, V = 20_000, 12
    logits = torch.randn(V, generator=torch.Generator().manual_seed(1)).expand(n, V)
    logprobs = log_probabilities(logits, torch.full((n, 1), temperature))
    zero = np.zeros(n, np.uint64)
    u = torch.from_numpy(uniforms(zero + np.uint64(5), zero, np.arange(n, dtype=np.uint64), zero, 2)[:, :1].copy())
    counts = np.bincount(draw(logprobs, u)[:, 0].numpy(), minlength=V)
    weights = np.exp(logits[0].double().numpy() / temperature)
    expected = n * weights / weights.sum()
    assert ((counts - expected) ** 2 / expected).sum() < 31.26  # chi-square, 11 degrees of freedom, p = .001


def test_draw_at_the_edges_of_the_unit_interval():
    # masses 0, 1/2, 0, 1/2, 0: u just below 1 is the last token with mass, u = 0 the first, u = 1/2 the second
    logprobs = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0]).log().expand(4, 5)
    u = torch.tensor([[0.0], [0.5 - 2**-53], [0.5], [1 - 2**-53]], dtype=torch.float64)
    assert draw(logprobs, u)[:, 0].tolist() == [1, 1, 3, 3]


def test_the_largest_uniform_never_passes_the_vocabulary():
    logits = torch.randn(2000, 97, generator=torch.Generator().manual_seed(0)) * 30
    logits[:, 60:] = -torch.inf
    tokens = draw(torch.log_softmax(logits, -1), torch.full((2000, 1), 1 - 2**-53, dtype=torch.float64))
    assert int(tokens.max()) < 60
    assert bool((torch.log_softmax(logits, -1).exp().gather(1, tokens) > 0).all())


def test_top_p_and_top_k_keep_the_likeliest():
    logprobs = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log().expand(7, 4)
    top_p = torch.tensor([[1.0], [0.39], [0.41], [0.75], [1.0], [0.01], [0.75]], dtype=torch.float64)
    top_k = torch.tensor([[0], [0], [0], [0], [3], [0], [2]])
    expected = [[0, 1, 2, 3], [1], [1, 3], [1, 2, 3], [1, 2, 3], [1], [1, 3]]
    kept = keep(logprobs, top_p, top_k)
    assert [row.nonzero()[:, 0].tolist() for row in kept] == expected
    drawn = draw(logprobs[2:3].expand(50, 4), torch.linspace(0, 1 - 1e-9, 50, dtype=torch.float64)[:, None], kept[2:3])
    assert set(drawn[:, 0].tolist()) == {1, 3}


def test_ties_of_top_k_go_to_the_lower_id():
    assert keep(torch.zeros(1, 5), torch.ones(1, 1), torch.full((1, 1), 2))[0].tolist() == [
        True,
        True,
        False,
        False,
        False,
    ]
