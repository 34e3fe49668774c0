"""Countdown: `make 30 with 3 7 9?`: an expression over all given numbers, each once, with + − × and brackets.

Many answers are right: the verifier reads the expression with the small parser below (never eval) and computes it.
Numbers stand in rising order in a prompt, so that no reordering of a training prompt can be held out.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import lru_cache

from offtrail.core.problem import Problem
from offtrail.core.settings import setting
from offtrail.tasks.base import Draw, GeneratedTask
from offtrail.tasks.config import GeneratedConfig, check


@dataclass
class CountdownConfig(GeneratedConfig):
    """Combine all given numbers, each once, with + − × to reach the target. A noisy step takes another operation."""

    name: str = "countdown"
    numbers: int = setting(3, "[2, 5]")
    """Difficulty: how many numbers are given."""
    max_number: int = setting(15, "[1, 999]")
    """The largest given number."""
    max_target: int = setting(100, "[1, inf)")
    """The largest target."""

    def __post_init__(self) -> None:
        """Raise ValueError when a value is out of bounds."""
        super().__post_init__()
        low = self.numbers * self.max_number
        check(self.max_target >= low, "max_target", self.max_target, f"at least numbers × max_number = {low}")


STEP = re.compile(r"(-?\d{1,12})([-+*])(-?\d{1,12})=(-?\d{1,24})", re.ASCII)
TOKEN = re.compile(r"\s*(?:(\d{1,12})|([-+*()]))", re.ASCII)
LONGEST = 500
"""Characters of an answer that is read at all."""
PRECEDENCE = {"+": 1, "-": 1, "*": 2}


def apply(a: int, operation: str, b: int) -> int:
    """One operation."""
    return a + b if operation == "+" else a - b if operation == "-" else a * b


def evaluate(text: str) -> tuple[int, list[int]] | None:
    """Value and numbers, in order, of an expression over whole numbers with + - * and brackets; None if it is not one.

    Signs before a number, leading zeros, implied products and anything else are not expressions here. Operators and
    operands wait on two stacks (Dijkstra's shunting yard), so that deep brackets cost no recursion.
    """
    tokens = tokenize(text)
    if tokens is None:
        return None
    values: list[int] = []
    operators: list[str] = []
    operand_next = True
    for token in tokens:
        if token == "(" or token.isdigit():
            if not operand_next:
                return None
            operand_next = token == "("
            if token == "(":
                operators.append(token)
            else:
                values.append(int(token))
            continue
        if operand_next:
            return None
        while operators and operators[-1] != "(" and PRECEDENCE.get(token, 0) <= PRECEDENCE[operators[-1]]:
            reduce(values, operators)
        if token != ")":
            operators.append(token)
            operand_next = True
        elif operators:
            operators.pop()
        else:
            return None
    if operand_next:
        return None
    while operators and operators[-1] != "(":
        reduce(values, operators)
    if operators:
        return None
    return values[0], [int(token) for token in tokens if token.isdigit()]


def tokenize(text: str) -> list[str] | None:
    """Numbers, operators and brackets of a text; None where it holds anything else."""
    text, tokens, end = text.strip(), [], 0
    while end < len(text) <= LONGEST:
        match = TOKEN.match(text, end)
        if match is None or (match[1] and str(int(match[1])) != match[1]):
            return None
        tokens.append(match[1] or match[2])
        end = match.end()
    return tokens or None


def reduce(values: list[int], operators: list[str]) -> None:
    """Apply the operator on top to the two values on top."""
    right, left = values.pop(), values.pop()
    values.append(apply(left, operators.pop(), right))


@lru_cache(maxsize=65_536)
def reachable(numbers: tuple[int, ...], target: int) -> bool:
    """Whether some expression over all ``numbers`` (in rising order) gives ``target``; up to five, by trying all."""
    if len(numbers) == 1:
        return numbers[0] == target
    for i in range(len(numbers)):
        for j in range(i):
            rest = numbers[:j] + numbers[j + 1 : i] + numbers[i + 1 :]
            a, b = numbers[i], numbers[j]
            if any(reachable(tuple(sorted((*rest, value))), target) for value in {a + b, a - b, b - a, a * b}):
                return True
    return False


class CountdownTask(GeneratedTask[CountdownConfig]):
    """See the module's docstring. ``answer`` is one right expression; ``meta`` holds numbers, target and a plan.

    The plan lists steps [i, operation, j]: take the i-th and j-th of the numbers at hand, put the result at the end.
    """

    Config = CountdownConfig

    def draw(self, rng: random.Random) -> Draw:
        """Numbers uniform, then random operations, drawn again until the result is from 1 to ``config.max_target``."""
        config = self.config
        numbers = sorted(rng.randint(1, config.max_number) for _ in range(config.numbers))
        while True:
            plan = self._plan(numbers, rng)
            _, values, expression = follow(numbers, plan)
            if 1 <= values[-1] <= config.max_target:
                break
        prompt = f"make {values[-1]} with {' '.join(map(str, numbers))}?"
        return Draw(prompt, expression, prompt, {"numbers": numbers, "target": values[-1], "plan": plan})

    def work(self, problem: Problem, rng: random.Random) -> tuple[list[str], str]:
        """The plan's steps; a noisy one takes another operation: true arithmetic, wrong way."""
        plan = [
            [i, rng.choice([o for o in "+-*" if o != operation]) if rng.random() < self.config.noise else operation, j]
            for i, operation, j in problem.meta["plan"]
        ]
        steps, _, expression = follow(problem.meta["numbers"], plan)
        return steps, expression

    def verify(self, problem: Problem, answer_text: str) -> bool:
        """Any expression that uses each given number exactly once and equals the target."""
        result = evaluate(answer_text)
        if result is None:
            return False
        value, numbers = result
        return value == problem.meta["target"] and sorted(numbers) == sorted(problem.meta["numbers"])

    def check(self, problem: Problem, steps: list[str]) -> list[bool]:
        """A step must take numbers at hand, compute truly, and not be the one that puts the target out of reach."""
        hand, target = sorted(problem.meta["numbers"]), problem.meta["target"]
        verdicts = []
        for step in steps:
            match = STEP.fullmatch(step)
            taken = [int(match[1]), int(match[3])] if match else []
            rest = without(hand, taken)
            if match is None or rest is None:
                verdicts.append(False)
                continue
            result = int(match[4])
            after = sorted([*rest, result])
            lost = reachable(tuple(hand), target) and not reachable(tuple(after), target)
            verdicts.append(result == apply(taken[0], match[2], taken[1]) and not lost)
            hand = after
        return verdicts

    def _plan(self, numbers: list[int], rng: random.Random) -> list[list[int | str]]:
        hand, plan = list(numbers), list[list[int | str]]()
        while len(hand) > 1:
            i, j = rng.sample(range(len(hand)), 2)
            operation = rng.choice("+-*")
            if operation == "-" and hand[i] < hand[j]:
                i, j = j, i  # a worked answer never passes below 0
            plan.append([i, operation, j])
            result = apply(hand[i], operation, hand[j])
            hand = [number for k, number in enumerate(hand) if k not in (i, j)] + [result]
        return plan


def follow(numbers: list[int], plan: list[list[int | str]]) -> tuple[list[str], list[int], str]:
    """Carry a plan out: its steps as text, their results, and the whole as one expression with the fewest brackets."""
    hand = [(number, str(number), 3) for number in numbers]
    steps, results = [], []
    for i, operation, j in plan:
        assert isinstance(i, int)
        assert isinstance(j, int)
        assert isinstance(operation, str)
        (a, left, left_rank), (b, right, right_rank) = hand[i], hand[j]
        rank, result = PRECEDENCE[operation], apply(a, operation, b)
        left = f"({left})" if left_rank < rank else left
        right = f"({right})" if right_rank < rank or (operation == "-" and right_rank == rank) else right
        steps.append(f"{a}{operation}{b}={result}")
        results.append(result)
        hand = [item for k, item in enumerate(hand) if k not in (i, j)] + [(result, f"{left}{operation}{right}", rank)]
    return steps, results, hand[0][1]


def without(hand: list[int], taken: list[int]) -> list[int] | None:
    """``hand`` less the two numbers taken; None when they are not at hand."""
    rest = list(hand)
    for number in taken:
        if number not in rest:
            return None
        rest.remove(number)
    return rest if taken else None


TASK = CountdownTask
