"""Packing: nothing lost, nothing over budget, the same on every rank, and layouts worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offtrail.platform.model.packing import SampleTable, balance, lay_out, microbatches, minibatches, pack


def rows(
    prompts: list[list[int]], outputs: list[list[list[int]]], temperatures: list[float] | None = None
) -> SampleTable:
    """Samples of B prompts, each with its outputs."""
    flat = [np.array(o, np.int32) for group in outputs for o in group]
    return SampleTable(
        prompts=tuple(np.array(p, np.int32) for p in prompts),
        group_of=np.repeat(np.arange(len(prompts)), [len(group) for group in outputs]),
        starts=np.concatenate([[0], np.cumsum([len(o) for o in flat])]),
        tokens=np.concatenate(flat),
        temperatures=np.array(temperatures or [1.0] * len(prompts), np.float32),
        ids=np.arange(len(prompts)),
    )


def test_best_fit_decreasing_by_hand() -> None:
    # 7 → bin 0 (1 left), 5 → bin 1 (3 left), 4 → bin 2 (4 left), 3 → bin 1, the fullest that takes it, 1 → bin 0
    assert pack([0, 1, 2, 3, 4], [7, 5, 4, 3, 1], budget=8) == [[0, 4], [1, 3], [2]]


def test_an_item_above_the_budget_stands_alone() -> None:
    assert pack([0, 1, 2], [9, 2, 2], budget=4) == [[0], [1, 2]]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(1, 50))
def test_every_item_is_in_one_bin_within_budget(costs: list[int], budget: int) -> None:
    bins = pack(range(len(costs)), costs, budget)
    assert sorted(i for b in bins for i in b) == list(range(len(costs)))
    assert all(len(b) == 1 or sum(costs[i] for i in b) <= budget for b in bins)


def test_bins_of_long_tailed_lengths_are_full() -> None:
    lengths = np.minimum(np.random.default_rng(0).lognormal(8, 1, 4096), 32_768).astype(int).tolist()
    assert sum(lengths) / (len(pack(range(4096), lengths, 32_768)) * 32_768) > 0.99


def test_balance_by_hand() -> None:
    # 5 → rank 0, 4 → rank 1, 3 → rank 1 (4 < 5), 3 → rank 0; the 0 is nobody's
    assert balance([3, 5, 0, 4, 3], 2) == [[1, 4], [0, 3]]


def test_ranks_are_balanced_by_attention_too() -> None:
    # 6, 3, 3, 2 tokens through the model: L alone gives 6 + 2 against 3 + 3; L + L² is 42 against 12 + 12 + 6
    r = rows([[1]], [[[4] * 6, [4] * 3, [4] * 3, [4] * 2]])
    assert microbatches(r, range(1), 2, 100) == [[[0, 3]], [[1, 2]]]
    assert microbatches(r, range(1), 2, 100, quadratic=1.0) == [[[0]], [[1, 2, 3]]]


def test_ranks_meet_their_heaviest_microbatches_together() -> None:
    # LPT: 6, 3, 2 to rank 0 and 5, 4 to rank 1; in order of first item rank 0 would begin with 2 + 3
    r = rows([[1]], [[[4] * n for n in (2, 3, 6, 5, 4)]])
    assert microbatches(r, range(1), 2, 6) == [[[2], [0, 1]], [[3], [4]]]


@settings(max_examples=40)
@given(st.lists(st.integers(0, 12), min_size=4, max_size=24), st.integers(1, 4), st.integers(6, 60))
def test_a_plan_holds_each_sample_once_and_as_many_microbatches_on_each_rank(
    lengths: list[int], ranks: int, budget: int
) -> None:
    r = rows([[1, 2], [3]], [[[4] * n for n in lengths[::2]], [[5] * n for n in lengths[1::2]]])
    parts = microbatches(r, range(2), ranks, budget)
    assert len({len(p) for p in parts}) == 1
    held = sorted(i for rank in parts for micro in rank for i in micro)
    assert held == [i for i in range(r.size) if r.lengths[i] > 0]


def test_minibatches_are_whole_groups_in_order() -> None:
    assert minibatches(6, 3) == [range(0, 2), range(2, 4), range(4, 6)]
    with pytest.raises(ValueError, match=r"learner\.minibatches=4: must divide batch\.groups=6"):
        minibatches(6, 4)


@pytest.mark.parametrize("share", [0, 100])
def test_a_shared_prompt_is_laid_out_once(share: int) -> None:
    r = rows([[50, 51], [60]], [[[1, 2, 3], [4]], [[5, 6]]])
    packed = lay_out(r, [0, 1, 2], share_up_to=share)
    # prompt 50 51, then 1 2 (3 predicts nothing), nothing of the second sample, then prompt 60 and 5
    assert packed.input_ids.tolist() == [[50, 51, 1, 2, 60, 5]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 0, 1]]
    assert packed.predict.tolist() == [1, 2, 3, 1, 4, 5]
    assert packed.targets.tolist() == [1, 2, 3, 4, 5, 6]
    assert packed.tokens.tolist() == [0, 1, 2, 3, 4, 5]
    assert packed.samples.tolist() == [0, 0, 0, 1, 2, 2]
    assert packed.shared == bool(share)


def test_shared_layout_sees_prompt_and_own_answer_only() -> None:
    r = rows([[50, 51, 52], [60]], [[[1, 2, 3], [4, 5]], [[6, 7]]])
    prompts, answers = lay_out(r, [0, 1, 2], share_up_to=100).buckets
    # flat: 50 51 52 at 0-2, 1 2 at 3-4, 4 at 5, 60 at 6, 6 at 7
    assert prompts.queries.tolist() == [[0, 1, 2], [6, 0, 0]]
    assert answers.queries.tolist() == [[3, 4], [5, 0], [7, 0]]
    assert answers.keys.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 5, 0], [0, 0, 6, 7, 0]]
    assert answers.bias is not None
    assert np.isneginf(answers.bias.numpy()).tolist() == [[False] * 5, [False] * 5, [True, True, False, False, False]]


@pytest.mark.parametrize("share", [0, 100])
def test_final_tokens_are_fed_where_they_are_read(share: int) -> None:
    r = rows([[50, 51], [60]], [[[1, 2, 3], [4]], [[5, 6]]])
    packed = lay_out(r, [0, 1, 2], share_up_to=share, feed_last=True)
    # prompt 50 51 at 0-1, then 1 2 3 at 2-4, 4 at 5, prompt 60 at 6, 5 6 at 7-8
    assert packed.input_ids.tolist() == [[50, 51, 1, 2, 3, 4, 60, 5, 6]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 4, 2, 0, 1, 2]]
    assert packed.predict.tolist() == [1, 2, 3, 1, 6, 7]  # as without
    assert packed.own is not None
    assert packed.own.tolist() == [2, 3, 4, 5, 7, 8]
    assert packed.ends.tolist() == [2, 3, 5]
    assert lay_out(r, [0, 1, 2], share_up_to=share).own is None
    # samples of 5, 3 and 3 tokens through the model; without their last 4, 2 and 2
    assert r.inputs(feed_last=True).tolist() == [5, 3, 3]
    assert r.inputs().tolist() == [4, 2, 2]


def test_a_fed_final_token_sees_its_own_answer_and_prompt_only() -> None:
    r = rows([[50, 51]], [[[1, 2], [4]]])
    prompts, own = lay_out(r, [0, 1], share_up_to=100, feed_last=True).buckets
    assert prompts.queries.tolist() == [[0, 1]]
    assert own.queries.tolist() == [[2, 3], [4, 0]]
    assert own.keys.tolist() == [[0, 1, 2, 3], [0, 1, 4, 0]]


def test_groups_stay_whole_by_hand() -> None:
    # one prompt token and T answer tokens, all fed: groups of (2+3, 4+2, 2+2, 5+5) = 5, 6, 4, 10 tokens
    r = rows([[1]] * 4, [[[4], [4] * 2], [[4] * 3, [4]], [[4], [4]], [[4] * 4, [4] * 4]])
    kept: Any = {"feed_last": True, "together": "group"}
    # budget 10: 10 alone, 6 + 4, 5
    assert microbatches(r, range(4), 1, 10, **kept) == [[[0, 1], [2, 3, 4, 5], [6, 7]]]
    # ranks: 10 to rank 0; 6, 5 and 4 to rank 1 until it has more
    assert microbatches(r, range(4), 2, 11, **kept) == [[[6, 7], [4, 5]], [[0, 1, 2, 3], []]]
    # a group above the budget stands alone, whole
    assert microbatches(r, range(4), 1, 9, **kept)[0].count([6, 7]) == 1


@settings(max_examples=40)
@given(st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=5), min_size=1, max_size=12), st.integers(1, 4),
       st.integers(6, 60), st.booleans())  # fmt: skip
def test_no_cut_parts_a_group(lengths: list[list[int]], ranks: int, budget: int, fed: bool) -> None:
    r = rows([[1, 2]] * len(lengths), [[[4] * n for n in group] for group in lengths])
    parts = microbatches(r, range(len(lengths)), ranks, budget, feed_last=fed, together="group")
    assert len({len(p) for p in parts}) == 1
    held = [micro for rank in parts for micro in rank]
    assert sorted(i for micro in held for i in micro) == [i for i in range(r.size) if r.lengths[i] > 0]
    places = [{int(r.group_of[i]) for i in micro} for micro in held]
    assert sum(len(p) for p in places) == len(set().union(*places))
    tokens = r.inputs(feed_last=fed)
    assert all(len(p) <= 1 or sum(tokens[i] for i in micro) <= budget for p, micro in zip(places, held, strict=True))


def test_temperatures_come_with_each_token() -> None:
    packed = lay_out(rows([[1], [2]], [[[3, 4]], [[5]]], [0.5, 2.0]), [0, 1])
    assert packed.inverse_temperature is not None
    assert packed.inverse_temperature.flatten().tolist() == [2.0, 2.0, 0.5]


def test_an_empty_microbatch_predicts_nothing() -> None:
    packed = lay_out(rows([[1]], [[[2]]]), [], share_up_to=100)
    assert packed.input_ids.shape == (1, 1)
    assert packed.predict.numel() == packed.targets.numel() == packed.tokens.numel() == 0
