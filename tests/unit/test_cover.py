"""The cover of combinations: nothing is left out, and every two values meet where `make test` runs."""

from __future__ import annotations

from itertools import combinations, product
from typing import Any

import pytest

from cover import cover, leave_a_cover


@pytest.mark.parametrize("axes", [("ab", "cd"), ("ab", "cde", "fgh"), ("abcd", "ef", "ghi", "jk")])
def test_every_two_values_meet_in_a_cover(axes: tuple[str, ...]) -> None:
    kept = cover(list(product(*axes)))
    for (i, one), (j, other) in combinations(enumerate(axes), 2):
        assert {(case[i], case[j]) for case in kept} == set(product(one, other))


def test_a_cover_is_small() -> None:
    """3 · 3 of 2 · 3 · 3: each case has one pair of the two long axes."""
    assert len(cover(list(product("ab", "cde", "fgh")))) == 9


@pytest.mark.pairs("one", "other", "third")
@pytest.mark.parametrize("one", "ab")
@pytest.mark.parametrize("other", "cd")
@pytest.mark.parametrize("third", "ef")
def test_what_is_beyond_the_cover_has_the_mark_prove(
    request: pytest.FixtureRequest, one: str, other: str, third: str
) -> None:
    """Of this test itself, whose cases come in the order of the product, the last name first: 4 of 8."""
    kept = cover([(one, other, third) for third, other, one in product("ef", "cd", "ab")])
    assert len(kept) == 4
    marked = request.node.get_closest_marker("prove") is not None
    assert marked == ((one, other, third) not in kept)


def test_what_has_no_such_mark_is_left_alone(request: pytest.FixtureRequest) -> None:
    items: list[Any] = [request.node]
    leave_a_cover(items)
    assert request.node.get_closest_marker("prove") is None


@pytest.mark.parametrize("names", [(), ("one",)])
def test_a_mark_that_names_no_pair_would_leave_nothing_and_is_refused(names: tuple[str, ...]) -> None:
    class Item:
        nodeid = "test_x[a]"

        def get_closest_marker(self, _: str) -> pytest.Mark:
            return pytest.mark.pairs(*names).mark

    items: list[Any] = [Item()]
    with pytest.raises(pytest.UsageError, match=r"test_x\[a\]: pairs\(.*names no pair"):
        leave_a_cover(items)
