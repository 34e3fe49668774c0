"""Arithmetic chain: `7;+5;*3;-2;%10=?` starts at 7, adds 5, … and asks the result modulo 10.

Reduction may come after any step (addition, subtraction and multiplication commute with it), so a worked step is one
operation on one digit: `7+5=2;2*3=6;6-2=4`. With `words` each step begins with a word, English or Chinese, so that a
language can be mixed and asked for: `so 7+5=2;故2*3=6`.
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
class ChainConfig(GeneratedConfig):
    """Arithmetic chain: start value, a run of operations from left to right, the result modulo `modulus`."""

    name: str = "chain"
    min_operations: int = setting(3, "[1, 10000]")
    """The shortest chain."""
    max_operations: int = setting(6, "[1, 10000]")
    """Difficulty: the longest chain. A worked step takes 5 tokens (9 at most with styles=3)."""
    modulus: int = setting(10, "[2, 100]")
    """Results are taken modulo this."""
    max_operand: int = setting(5, "[1, 99]")
    """Difficulty too, the largest operand: 3 × modulus × max_operand facts to learn (9 needs twice the cold start)."""
    styles: int = setting(1, "[1, 3]")
    """Cold start: ways to write worked steps, mixed evenly (1…3): `7*5=5;5-2=3`, `7*5=5;-2=3`, `7*5=35>5;5-2=3`."""
    worked_share: float = 0.55
    """Cold start: share of answers that work the problem step by step; the others guess directly."""
    noise: float = 0.02
    """Cold start: chance that a worked step goes wrong (and its error is carried on)."""
    words: bool = False
    """Cold start: begin each worked step with a word, as in `so 7+5=2`; 3 tokens a step."""
    chinese: float = setting(0.0, "[0, 1]")
    """Cold start, with words: chance that the word of a step is Chinese, as in `故7+5=2`; the made model knows it with
    model.characters=故."""

    def __post_init__(self) -> None:
        """Raise ValueError when a value is out of bounds."""
        super().__post_init__()
        low, high = self.min_operations, self.max_operations
        check(1 <= low <= high, "min_operations", low, f"from 1 to task.max_operations={high}")


WORD = re.compile(r"so |故")
"""What a step may begin with: "therefore"."""
STEP = re.compile(r"(?P<left>\d*)(?P<operation>[-+*]\d+)=(?P<raw>-?\d+)(?:>(?P<reduced>\d+))?", re.ASCII)


def apply(value: int, operation: str) -> int:
    """One operation such as ``*3``, unreduced."""
    operand = int(operation[1:])
    match operation[0]:
        case "+":
            return value + operand
        case "-":
            return value - operand
        case _:
            return value * operand


class ChainTask(GeneratedTask[ChainConfig]):
    """See the module's docstring; ``meta`` holds start, operations and modulus."""

    Config = ChainConfig

    def draw(self, rng: random.Random) -> Draw:
        """Length, start, operations and operands, all uniform."""
        config = self.config
        start = rng.randrange(config.modulus)
        length = rng.randint(config.min_operations, config.max_operations)
        operations = [f"{rng.choice('+-*')}{rng.randint(1, config.max_operand)}" for _ in range(length)]
        value = start
        for operation in operations:
            value = apply(value, operation) % config.modulus
        prompt = ";".join([str(start), *operations, f"%{config.modulus}=?"])
        meta = {"start": start, "operations": operations, "modulus": config.modulus}
        return Draw(prompt, str(value), prompt, meta)

    def work(self, problem: Problem, rng: random.Random) -> tuple[list[str], str]:
        """One step an operation, in one of ``config.styles`` styles; a slip is off by 1…modulus−1."""
        modulus, value = problem.meta["modulus"], problem.meta["start"]
        style = rng.randrange(self.config.styles)
        steps = []
        for i, operation in enumerate(problem.meta["operations"]):
            raw = apply(value, operation)
            if rng.random() < self.config.noise:
                raw += rng.randrange(1, modulus)
            left = "" if style == 1 and i else str(value)
            value = raw % modulus
            right = f"{raw}>{value}" if style == 2 and raw != value else str(value)
            steps.append(f"{self._word(rng)}{left}{operation}={right}")
        return steps, str(value)

    def check(self, problem: Problem, steps: list[str]) -> list[bool]:
        """Step i must apply operation i to the value written last (which it may leave out) and reduce it."""
        modulus, operations, value = problem.meta["modulus"], problem.meta["operations"], str(problem.meta["start"])
        verdicts = []
        for i, step in enumerate(steps):
            word = WORD.match(step) if self.config.words else None
            match = STEP.fullmatch(step, word.end() if word else 0)
            if match is None:
                verdicts.append(False)
                continue
            known = i < len(operations) and match["operation"] == operations[i]
            left = match["left"] == value or (match["left"] == "" and i > 0)
            raw = apply(int(value), match["operation"])
            result = str(raw % modulus)
            shown = (
                match["raw"] == result
                if match["reduced"] is None
                else match.group("raw", "reduced") == (str(raw), result)
            )
            verdicts.append(known and left and shown)
            value = match["reduced"] or str(int(match["raw"]) % modulus)
        return verdicts

    def _word(self, rng: random.Random) -> str:
        if not self.config.words:
            return ""
        return "故" if rng.random() < self.config.chinese else "so "


TASK = ChainTask
