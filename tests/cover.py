"""Which combinations of options `make test` tries: a few, in which every two values meet; `make prove` has the rest."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product
from typing import Any

import pytest

Case = tuple[Any, ...]


def pairs(*axes: Sequence[Any]) -> list[Any]:
    """Every combination of the axes' values (two axes at least), as pytest.mark.parametrize takes them. Those beyond a
    cover of all pairs of two axes' values, chosen greedily in the order of the product, have the mark `prove`.
    """
    cases = list(product(*(range(len(axis)) for axis in axes)))
    unmet = {pair for case in cases for pair in pairs_of(case)}
    cover = set[Case]()
    while unmet:
        best = max(cases, key=lambda case: len(unmet & pairs_of(case)))  # the first of several
        cover.add(best)
        unmet -= pairs_of(best)
    marks = {True: (), False: pytest.mark.prove}
    return [
        pytest.param(*(axis[i] for axis, i in zip(axes, case, strict=True)), marks=marks[case in cover])
        for case in cases
    ]


def pairs_of(case: Case) -> set[Case]:
    """((axis, value), (another axis, its value)), by number."""
    return set(combinations(enumerate(case), 2))
