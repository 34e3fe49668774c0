"""Instructions on a made-up word: `reverse: mola=?` is answered by `alom`. There is nothing to reason about: they stand
for the general prompts beside the reasoning ones of a recipe whose model is small, and a program can tell whether one
was followed.

Worked, the letters are spelt first, each with its place: `1m;2o;3l;4a`.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from dataclasses import dataclass

from offtrail.core.problem import Problem
from offtrail.core.settings import setting
from offtrail.tasks.base import Draw, GeneratedTask
from offtrail.tasks.config import GeneratedConfig, check

KINDS: dict[str, Callable[[str], str]] = {
    "copy": lambda word: word,
    "reverse": lambda word: word[::-1],
    "first": lambda word: word[0],
    "last": lambda word: word[-1],
    "double": lambda word: word + word,
    "count": lambda word: str(len(word)),
}
"""Instruction → what it makes of a word."""


@dataclass
class WordsConfig(GeneratedConfig):
    """Short instructions on a made-up word: copy, reverse, first, last, double, count."""

    name: str = "words"
    min_letters: int = setting(3, "[1, 9]")
    """The shortest word."""
    max_letters: int = setting(5, "[1, 9]")
    """Difficulty: the longest word. A letter takes 3 tokens where it is spelt."""

    def __post_init__(self) -> None:
        """Raise ValueError when a value is out of bounds."""
        super().__post_init__()
        low, high = self.min_letters, self.max_letters
        check(low <= high, "min_letters", low, f"from 1 to task.max_letters={high}")


class WordsTask(GeneratedTask[WordsConfig]):
    """See the module's docstring; ``meta`` holds the instruction and the word."""

    Config = WordsConfig

    def draw(self, rng: random.Random) -> Draw:
        """Instruction, length and letters, all uniform."""
        kind = rng.choice(list(KINDS))
        length = rng.randint(self.config.min_letters, self.config.max_letters)
        word = "".join(rng.choice(string.ascii_lowercase) for _ in range(length))
        prompt = f"{kind}: {word}=?"
        return Draw(prompt, KINDS[kind](word), prompt, {"kind": kind, "word": word})

    def work(self, problem: Problem, rng: random.Random) -> tuple[list[str], str]:
        """One step a letter; a slip writes another one, and the answer is made of what was written."""
        letters = [
            rng.choice(string.ascii_lowercase.replace(letter, "")) if rng.random() < self.config.noise else letter
            for letter in problem.meta["word"]
        ]
        steps = [f"{place}{letter}" for place, letter in enumerate(letters, 1)]
        return steps, KINDS[problem.meta["kind"]]("".join(letters))

    def check(self, problem: Problem, steps: list[str]) -> list[bool]:
        """Step i must be letter i with its place."""
        word = problem.meta["word"]
        return [
            step == f"{place}{word[place - 1 : place]}" and place <= len(word) for place, step in enumerate(steps, 1)
        ]


TASK = WordsTask
