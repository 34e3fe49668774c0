"""The cover of combinations: nothing is left out, and every two values meet where `make test` runs."""

from __future__ import annotations

from itertools import combinations, product
from typing import Any

import pytest

from cover import pairs


@pytest.mark.parametrize("axes", [("ab", "cd"), ("ab", "cde", "fgh"), ("abcd", "ef", "ghi", "jk")])
def test_every_two_values_meet_in_make_test_and_every_combination_in_one_of_both(axes: tuple[str, ...]) -> None:
    found = pairs(*axes)
    assert [case.values for case in found] == list(product(*axes))
    kept: list[Any] = [case.values for case in found if not case.marks]
    for (i, one), (j, other) in combinations(enumerate(axes), 2):
        assert {(case[i], case[j]) for case in kept} == set(product(one, other))
    assert all([mark.name for mark in case.marks] == ["prove"] for case in found if case.values not in kept)


def test_a_cover_is_small() -> None:
    """3 · 3 of 2 · 3 · 3: each case has one pair of the two long axes."""
    assert sum(not case.marks for case in pairs("ab", "cde", "fgh")) == 9
