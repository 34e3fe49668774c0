"""Addition with carry: `347+5821=?`, worked from the last digit: `7+1=8;4+2=6;3+8=11;0+5+1=6`.

A column shows its two digits (0 where a number has ended), `+1` when the column before it carried, and its sum.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from offtrail.core.problem import Problem
from offtrail.core.settings import setting
from offtrail.tasks.base import Draw, GeneratedTask
from offtrail.tasks.config import GeneratedConfig, check


@dataclass
class AdditionConfig(GeneratedConfig):
    """Addition of two numbers, digit by digit with carry."""

    name: str = "addition"
    min_digits: int = setting(3, "[1, 1000]")
    """The shortest operand."""
    max_digits: int = setting(4, "[1, 1000]")
    """Difficulty: the longest operand. A worked digit takes at most 9 tokens."""

    def __post_init__(self) -> None:
        """Raise ValueError when a value is out of bounds."""
        super().__post_init__()
        low, high = self.min_digits, self.max_digits
        check(1 <= low <= high, "min_digits", low, f"from 1 to task.max_digits={high}")


STEP = re.compile(r"(?P<a>\d)\+(?P<b>\d)(?P<carry>\+1)?=(?P<sum>\d{1,2})", re.ASCII)


def columns(numbers: list[int]) -> list[tuple[int, int]]:
    """Digit pairs of two numbers from the last digit on, the shorter one filled with 0."""
    a, b = (str(number) for number in numbers)
    width = max(len(a), len(b))
    return [(int(x), int(y)) for x, y in zip(reversed(a.zfill(width)), reversed(b.zfill(width)), strict=True)]


class AdditionTask(GeneratedTask[AdditionConfig]):
    """See the module's docstring; ``meta`` holds the two numbers. a+b and b+a fall on the same side of the split."""

    Config = AdditionConfig

    def draw(self, rng: random.Random) -> Draw:
        """The digits of each number, then the number, uniform."""
        a, b = self._number(rng), self._number(rng)
        return Draw(f"{a}+{b}=?", str(a + b), f"{min(a, b)}+{max(a, b)}", {"numbers": [a, b]})

    def work(self, problem: Problem, rng: random.Random) -> tuple[list[str], str]:
        """One step a column; a slip makes its sum another one that such a column can have."""
        steps, digits, carry = [], "", 0
        for a, b in columns(problem.meta["numbers"]):
            total = a + b + carry
            if rng.random() < self.config.noise:
                total = (total + rng.randrange(1, 20)) % 20
            steps.append(f"{a}+{b}{'+1' if carry else ''}={total}")
            carry, digit = divmod(total, 10)
            digits = f"{digit}{digits}"
        return steps, str(int(f"{carry}{digits}"))

    def check(self, problem: Problem, steps: list[str]) -> list[bool]:
        """Step i must add column i and the carry that step i − 1 wrote."""
        pairs, carry, verdicts = columns(problem.meta["numbers"]), 0, []
        for i, step in enumerate(steps):
            match = STEP.fullmatch(step)
            if match is None:
                verdicts.append(False)
                continue
            a, b, total = int(match["a"]), int(match["b"]), match["sum"]
            known = i < len(pairs) and (a, b) == pairs[i] and bool(match["carry"]) == bool(carry)
            verdicts.append(known and total == str(a + b + carry))
            carry = int(total) // 10
        return verdicts

    def _number(self, rng: random.Random) -> int:
        digits = rng.randint(self.config.min_digits, self.config.max_digits)
        return rng.randrange(10 ** (digits - 1), 10**digits)


TASK = AdditionTask
