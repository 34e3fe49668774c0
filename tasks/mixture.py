"""Several families at given shares. Which family a place in the data order has depends on (seed, place) alone.

The places are dealt by the golden-ratio sequence frac(k·φ + offset): every stretch of the order, not only the whole,
holds each family at its share up to a few problems (its discrepancy over n places is O(log n / n)).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate

from offtrail.core.types import Problem
from offtrail.tasks.base import Task
from offtrail.tasks.config import MixtureConfig
from offtrail.tasks.split import stream

GOLDEN = 0x9E3779B97F4A7C15  # 2⁶⁴ / φ, odd: whole-number arithmetic keeps far places exact
WHOLE = 2**64


class MixtureTask:
    """Deals each place to one of ``families``, whose own data order is read at that same place."""

    def __init__(self, config: MixtureConfig, seed: int, families: Mapping[str, Task]) -> None:
        self.name, self.families = config.name, dict(families)
        total = sum(config.weights.values())
        self._ends = list(accumulate(share / total for share in config.weights.values()))
        self._names = list(config.weights)
        self._offset = stream("mixture", seed).randrange(WHOLE)

    def family(self, index: int, offset: int) -> str:
        """The family that place ``index`` is dealt to."""
        point = (index * GOLDEN + offset) % WHOLE / WHOLE
        return next((name for name, end in zip(self._names, self._ends, strict=True) if point < end), self._names[-1])

    def train(self, index: int) -> Problem:
        """See Task.train."""
        return self.families[self.family(index, self._offset)].train(index)

    def held_out(self, n: int) -> list[Problem]:
        """See Task.held_out: each family's held-out problems at its share, dealt by the same sequence."""
        names = [self.family(index, 0) for index in range(n)]
        problems = {name: iter(self.families[name].held_out(k)) for name, k in Counter(names).items()}
        return [replace(next(problems[name]), index=index) for index, name in enumerate(names)]

    def trace(self, problem: Problem, rng: random.Random) -> str:
        """See Task.trace."""
        return self.families[problem.task].trace(problem, rng)

    def verify(self, problem: Problem, answer_text: str) -> bool:
        """See Task.verify."""
        return self.families[problem.task].verify(problem, answer_text)

    def check_steps(self, problem: Problem, text: str) -> list[bool]:
        """See Task.check_steps."""
        return self.families[problem.task].check_steps(problem, text)
