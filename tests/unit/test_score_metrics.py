"""Measures of scores against labels, by hand and against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offtrail.rewards.score_metrics import (
    FirstErrors,
    accuracy,
    auc,
    auc_by_depth,
    brier,
    calibration_error,
    first_errors,
    pair_accuracy,
    pair_confidence,
    reliability,
    sigmoid,
)


def test_calibration_and_brier_by_hand() -> None:
    """Two bins: .1 and .3 (one of two good), .6, .8 and 1 (two of three)."""
    p, good = [0.1, 0.3, 0.6, 0.8, 1.0], [0, 1, 1, 0, 1]
    bins = reliability(p, good, bins=2)
    assert bins.predicted == pytest.approx([0.2, 0.8])
    assert bins.good == pytest.approx([0.5, 2 / 3])
    assert bins.count.tolist() == [2, 3]
    assert calibration_error(p, good, bins=2) == pytest.approx(0.4 * 0.3 + 0.6 * (0.8 - 2 / 3))
    assert brier(p, good) == pytest.approx((0.01 + 0.49 + 0.16 + 0.64 + 0) / 5)
    assert accuracy(p, good) == pytest.approx(3 / 5)


def test_an_empty_bin_adds_nothing_and_soft_labels_are_shares() -> None:
    bins = reliability([0.95, 0.95], [0.9, 1.0], bins=10)
    assert bins.count.tolist() == [0] * 9 + [2]
    assert np.isnan(bins.predicted[:9]).all()
    assert bins.error == pytest.approx(0.0, abs=1e-12)
    assert brier([0.5], [0.25]) == pytest.approx(0.0625)


def test_pairs_by_hand() -> None:
    better, worse = [2.0, 1.0, 0.0, 3.0], [1.0, 1.0, 1.0, -1.0]
    assert pair_accuracy(better, worse) == 0.625  # (1 + ½ + 0 + 1) / 4: a tie counts half
    sure, right = pair_confidence(better, worse)
    assert sure == pytest.approx([1 / (1 + math.exp(-1)), 0.5, 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-4))])
    assert right.tolist() == [1, 0.5, 0, 1]
    zeros = [0.0] * 4
    assert (pair_accuracy(zeros, zeros), calibration_error(*pair_confidence(zeros, zeros))) == (0.5, 0.0)


scored = st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=30)


@given(scored)
def test_auc_is_the_share_of_pairs_in_order(rows: list[tuple[int, bool]]) -> None:
    goods, bads = [s for s, good in rows if good], [s for s, good in rows if not good]
    found = auc([s for s, _ in rows], [good for _, good in rows])
    if not goods or not bads:
        assert math.isnan(found)
        return
    won = sum((g > b) + 0.5 * (g == b) for g in goods for b in bads)
    assert found == pytest.approx(won / (len(goods) * len(bads)))
    assert auc([-s for s, _ in rows], [good for _, good in rows]) == pytest.approx(1 - found)


def test_auc_by_depth_pools_what_is_deep_and_leaves_out_depths_of_one_kind() -> None:
    depth = [0, 0, 1, 1, 8, 12, 30]
    scores, good = [0.9, 0.1, 0.2, 0.3, 0.4, 0.6, 0.5], [1, 0, 1, 1, 0, 1, 0]
    assert auc_by_depth(scores, good, depth) == {0: 1.0, 8: 1.0}


def test_first_errors_as_processbench_counts_them() -> None:
    """Wrong at step 1: found, found too early, not found; right: clean, and one false alarm."""
    nan = math.nan
    good = [[1, 0, nan], [1, 0], [1, 0, nan], [1, 1], [1, 1, 1]]
    p = [[0.9, 0.2, 0.1], [0.4, 0.1], [0.9, 0.9, 0.9], [0.8, 0.5], [0.9, 0.49, 0.9]]
    found = first_errors(p, good)
    assert found == FirstErrors(wrong=pytest.approx(1 / 3), right=0.5)
    assert found.f1 == pytest.approx(2 * (1 / 3) * 0.5 / (1 / 3 + 0.5))
    assert first_errors(p, good, threshold=0.3) == FirstErrors(wrong=pytest.approx(2 / 3), right=1.0)
    assert FirstErrors(0.0, 0.0).f1 == 0
    assert math.isnan(first_errors([[0.9]], [[1]]).f1)
    nothing = first_errors([*p, [0.9, 0.9], []], [*good, [math.nan, math.nan], []])
    assert nothing == found  # answers without a label are neither right nor wrong


def test_nothing_to_measure_is_nan_and_lengths_must_agree() -> None:
    for measure in (accuracy, brier, calibration_error, auc):
        assert math.isnan(measure([], []))
        with pytest.raises(ValueError, match=r"scores \(2,\) and labels \(1,\) must be of one length"):
            measure([0.1, 0.2], [1])
    assert math.isnan(pair_accuracy([], []))


def test_sigmoid_does_not_overflow() -> None:
    assert sigmoid([-1e4, 0.0, 1e4]).tolist() == [0.0, 0.5, 1.0]
