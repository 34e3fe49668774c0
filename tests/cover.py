"""Which combinations of options `make test` tries: a few, in which every two values meet; `make prove` has the rest.

    @pytest.mark.pairs("engine", "kind", "mode")

says so of a test whose parameters (fixtures' too) have these names.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

import pytest

Case = tuple[Any, ...]


def leave_a_cover(items: Iterable[pytest.Item]) -> None:
    """Mark as `prove` what is beyond the cover of each test with the mark `pairs`."""
    tests = defaultdict[str, list[tuple[pytest.Item, Case]]](list)
    for item in items:
        if (mark := item.get_closest_marker("pairs")) is not None:
            if len(mark.args) < 2:
                raise pytest.UsageError(f"{item.nodeid}: pairs{mark.args} names no pair; nothing would be kept")
            case = tuple(item.callspec.params[name] for name in mark.args)  # type: ignore[attr-defined]
            tests[item.nodeid.partition("[")[0]].append((item, case))
    for found in tests.values():
        kept = cover([case for _, case in found])
        for item, case in found:
            if case not in kept:
                item.add_marker(pytest.mark.prove)


def cover(cases: Sequence[Case]) -> set[Case]:
    """Some of the cases, chosen greedily, in which every two values meet that meet in any."""
    unmet = {pair for case in cases for pair in pairs_of(case)}
    kept = set[Case]()
    while unmet:
        best = max(cases, key=lambda case: len(unmet & pairs_of(case)))  # the first of several
        kept.add(best)
        unmet -= pairs_of(best)
    return kept


def pairs_of(case: Case) -> set[Case]:
    """((place, value), (another place, its value))."""
    return set(combinations(enumerate(case), 2))
