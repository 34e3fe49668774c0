"""reasoning-gym's generators as a task: `task=gym task.generator=chain_sum` (optional: `pip install offtrail[gym]`).

A problem is one item of a generator, whose number the stream of its place draws: run.seed chooses numbers. ``meta``
holds what rebuilds it, so that the verifier has the whole entry, whose metadata is not always JSON (rewards/gym.py).
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

from offtrail.core.problem import Problem
from offtrail.core.settings import setting
from offtrail.rewards.gym import ITEMS, LISTED, GymError, dataset, entry, raw_score
from offtrail.tasks.base import Draw, DrawnTask, TaskError, tagged
from offtrail.tasks.config import TaskConfig, check
from offtrail.tasks.templates import check_template, template_text

CHANGING = "gives other problems for the same numbers in another process"
SLOW = "takes a tenth of a second and more for a problem, and 512 held-out ones take ten times as many draws"
REFUSED = {
    **dict.fromkeys(
        ("codeio", "isomorphic_strings", "knight_swap", "list_functions", "polynomial_multiplication"), CHANGING
    ),
    **dict.fromkeys(("ransom_note", "word_ladder"), CHANGING),
    **dict.fromkeys(
        ("futoshiki", "intermediate_integration", "polynomial_equations", "puzzle24", "quantum_lock"), SLOW
    ),
    **dict.fromkeys(("sokoban", "sudoku", "zebra_puzzles"), SLOW),
    "acre": "makes all of its problems when it is created",
    "composite": "holds other generators: take task=mixture",
    "countdown": "is slow: take task=countdown",
    "figlet_font": "raises for some of its numbers",
}
"""Generators that cannot be a task, and why: 4 to 150 items each, made in two processes in two orders."""


@dataclass
class GymConfig(TaskConfig):
    """A generator of reasoning-gym, scored by its own verifier."""

    name: str = "gym"
    generator: str = "chain_sum"
    """The generator, one of about a hundred."""
    options: dict[str, Any] = setting({})
    """Its own settings, as {min_terms: 2, max_terms: 4}."""
    level: int = setting(0, "[0, 1000]")
    """Difficulty by the generator's curriculum, from 1 on; 0 = by its settings alone."""
    last_level: int = setting(0, "[0, 1000]")
    """The level that level_problems leads to, and held-out problems have; 0 = level."""
    level_problems: int = setting(0, "[0, inf)")
    """Problems (learner steps × batch.groups) after which the level rises by one, up to last_level; 0 = it stays."""
    template: str = "{prompt}"
    """How a problem is put to the model: r1_zero, boxed, tags, or a text with {prompt} in it (docs/sets.md)."""

    def __post_init__(self) -> None:
        """Raise ValueError when a value cannot work whatever the generator."""
        super().__post_init__()
        check_template(self.template)
        if reason := REFUSED.get(self.generator):
            raise ValueError(f"task.generator={self.generator}: is not a task, since it {reason}")
        rises = self.level_problems > 0
        check(not rises or 0 < self.level < self.last_level, "level", self.level, "from 1 to below task.last_level")
        check(rises or not self.last_level, "last_level", self.last_level, "0 unless task.level_problems is set")


class GymTask:
    """Each level is a family of its own; a place of the data order has the level of its turn."""

    Config = GymConfig

    def __init__(self, config: GymConfig, seed: int, *, load: bool = True) -> None:
        self.name, self.config, self.seed = config.name, config, seed
        self._levels = dict[int, Level]()
        for level in {
            config.level,
            config.last_level or config.level,
        }:  # a verifier imports it now, not at its first job
            try:
                dataset(config.generator, _key(config.options), level)
            except GymError as error:
                raise TaskError(str(error)) from None

    def train(self, index: int) -> Problem:
        """See Task.train."""
        config = self.config
        risen = index // config.level_problems if config.level_problems else 0
        return self._at(min(config.level + risen, config.last_level or config.level)).train(index)

    def held_out(self, n: int) -> list[Problem]:
        """See Task.held_out: of the last level."""
        return self._at(self.config.last_level or self.config.level).held_out(n)

    def trace(self, problem: Problem, rng: random.Random) -> str:
        """The answer alone; TaskError where the generator has none but a verifier."""
        if not problem.answer:
            raise TaskError(f"task.generator={self.config.generator} has a verifier and no worked answers")
        return tagged("", problem.answer)

    def verify(self, problem: Problem, answer_text: str) -> bool:
        """Whether the generator's own verifier gives the full score; partial credit is the component gym_score."""
        return raw_score(problem, answer_text) >= 1

    def check_steps(self, problem: Problem, text: str) -> list[bool]:
        """Free text has no exact step checker: always empty."""
        return []

    def _at(self, level: int) -> Level:
        if level not in self._levels:
            self._levels[level] = Level(self.config, self.seed, level)
        return self._levels[level]


class Level(DrawnTask[GymConfig]):
    """The problems of one level."""

    def __init__(self, config: GymConfig, seed: int, level: int) -> None:
        super().__init__(config, seed)
        self.level = level

    def draw(self, rng: random.Random) -> Draw:
        """An item by its number, uniform."""
        config, key = self.config, _key(self.config.options)
        item = rng.randrange(LISTED.get(config.generator, ITEMS))
        found = entry(config.generator, key, self.level, item)
        question, answer = found["question"], found["answer"]
        prompt = template_text(config.template).replace("{prompt}", question)
        meta = {"generator": config.generator, "options": key, "level": self.level, "item": item}
        return Draw(prompt, "" if answer is None else str(answer), question, meta)


def _key(options: dict[str, Any]) -> str:
    return json.dumps(options, sort_keys=True)


TASK = GymTask
