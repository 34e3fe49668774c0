"""Several families at given shares. Which family a place in the data order has depends on (seed, place) alone.

The places are dealt by the golden-ratio sequence frac(k·φ + offset): every stretch of the order, not only the whole,
holds each family at its share up to a few problems (its discrepancy over n places is O(log n / n)).
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from itertools import accumulate
from typing import Any

from offtrail.core.plugins import is_plugin
from offtrail.core.problem import Problem
from offtrail.tasks.base import Task, TaskError
from offtrail.tasks.config import TaskConfig, check
from offtrail.tasks.registry import families, family_config, make_task
from offtrail.tasks.split import stream


@dataclass
class MixtureConfig(TaskConfig):
    """Several families at given shares."""

    name: str = "mixture"
    weights: dict[str, float] = field(default_factory=lambda: {"chain": 0.5, "addition": 0.5})
    """Family name → share, scaled to sum 1."""
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Family name → its keys that differ from its defaults, as {chain: {max_operations: 8}}."""

    def __post_init__(self) -> None:
        """Raise ValueError when a value is out of bounds or a family is unknown."""
        super().__post_init__()
        known = [name for name in families() if name != self.name]
        for key in (*self.weights, *self.settings):
            where = "weights" if key in self.weights else "settings"
            near = "; nearest: " + ", ".join(found) if (found := get_close_matches(key, known)) else ""
            check(key in known or is_plugin(key), where, key, f"one of {', '.join(known)}, or module:class{near}")
        for key in self.settings:
            check(key in self.weights, "settings", key, "a family that task.weights names")
        check(bool(self.weights), "weights", self.weights, "at least one family")
        check(all(w > 0 for w in self.weights.values()), "weights", self.weights, "shares above 0")


GOLDEN = 0x9E3779B97F4A7C15  # 2⁶⁴ / φ, odd: whole-number arithmetic keeps far places exact
WHOLE = 2**64


class MixtureTask:
    """Deals each place to one of its families, whose own data order is read at that same place."""

    Config = MixtureConfig

    def __init__(self, config: MixtureConfig, seed: int, *, load: bool = True) -> None:
        self.name, self.families = config.name, dict[str, Task]()
        for name in config.weights:
            settings = family_config(name, config.settings.get(name, {}), config.held_out_share)
            try:
                self.families[name] = make_task(settings, seed, load=load)
            except TaskError as error:
                raise TaskError(f"task.settings.{name}: {error}") from None
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

    def verify(self, problem: Problem, answer_text: str) -> float:
        """See Task.verify."""
        return self.families[problem.task].verify(problem, answer_text)

    def check_steps(self, problem: Problem, text: str) -> list[bool]:
        """See Task.check_steps."""
        return self.families[problem.task].check_steps(problem, text)


TASK = MixtureTask
