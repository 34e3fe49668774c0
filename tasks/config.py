"""Settings of the tasks. No torch here: `launch.py --help` imports this.

Each family has its difficulty dial: `max_operations` (chain), `max_digits` (addition), `numbers` (countdown).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from offtrail.core.settings import check_limits, setting


def _check(allowed: bool, key: str, value: object, rule: str) -> None:
    """Raise ValueError in the words of the command line unless ``allowed``."""
    if not allowed:
        raise ValueError(f"task.{key}={value}: must be {rule}")


@dataclass
class TaskConfig:
    """What every task has."""

    name: str = "chain"
    """The family."""
    held_out_share: float = setting(0.1, "[0, 1)")
    """Share of all prompts, chosen by a hash of the prompt, that is never trained on."""

    def __post_init__(self) -> None:
        """Raise ValueError when a value is out of bounds."""
        check_limits(self, "task")


@dataclass
class GeneratedConfig(TaskConfig):
    """What every family made by program has."""

    worked_share: float = setting(0.5, "[0, 1]")
    """Cold start: share of answers that work the problem step by step; the others guess directly."""
    noise: float = setting(0.0, "[0, 1]")
    """Cold start: chance that a worked step goes wrong (and its error is carried on)."""


@dataclass
class ChainConfig(GeneratedConfig):
    """Arithmetic chain: start value, a run of operations from left to right, the result modulo `modulus`."""

    name: str = "chain"
    min_operations: int = setting(3, "[1, inf)")
    """The shortest chain."""
    max_operations: int = setting(6, "[1, inf)")
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

    def __post_init__(self) -> None:
        """Raise ValueError when a value is out of bounds."""
        super().__post_init__()
        low, high = self.min_operations, self.max_operations
        _check(1 <= low <= high, "min_operations", low, f"from 1 to task.max_operations={high}")


@dataclass
class AdditionConfig(GeneratedConfig):
    """Addition of two numbers, digit by digit with carry."""

    name: str = "addition"
    min_digits: int = setting(3, "[1, inf)")
    """The shortest operand."""
    max_digits: int = setting(4, "[1, inf)")
    """Difficulty: the longest operand. A worked digit takes at most 9 tokens."""

    def __post_init__(self) -> None:
        """Raise ValueError when a value is out of bounds."""
        super().__post_init__()
        low, high = self.min_digits, self.max_digits
        _check(1 <= low <= high, "min_digits", low, f"from 1 to task.max_digits={high}")


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
        _check(self.max_target >= low, "max_target", self.max_target, f"at least numbers × max_number = {low}")


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
        families = sorted(set(TASKS) - {"mixture"})
        for key in (*self.weights, *self.settings):
            _check(
                key in families, "weights" if key in self.weights else "settings", key, f"one of {', '.join(families)}"
            )
        for key in self.settings:
            _check(key in self.weights, "settings", key, "a family that task.weights names")
        _check(bool(self.weights), "weights", self.weights, "at least one family")
        _check(all(w > 0 for w in self.weights.values()), "weights", self.weights, "shares above 0")


@dataclass
class JsonlConfig(TaskConfig):
    """A local JSON-lines file, one problem a line: GSM8K's question/answer fields by default."""

    name: str = "jsonl"
    path: str = setting("", path="file")
    """Training problems."""
    eval_path: str = setting("", path="file")
    """Held-out problems; empty = held_out_share of `path`, by hash of the prompt."""
    prompt_field: str = "question"
    """Field of the problem's text."""
    answer_field: str = "answer"
    """Field of the worked answer."""
    answer_after: str = "####"
    """The gold answer is what follows this mark in the answer field; empty = the whole field."""
    template: str = "{prompt}"
    """How a prompt is put to the model; {prompt} is the problem's text."""
    chat: bool = False
    """Wrap the prompt with the tokenizer's chat template."""

    def __post_init__(self) -> None:
        """Raise ValueError when a value cannot work whatever the file holds."""
        super().__post_init__()
        _check("{prompt}" in self.template, "template", repr(self.template), "a text that contains {prompt}")


TASKS: dict[str, type[TaskConfig]] = {
    "chain": ChainConfig,
    "addition": AdditionConfig,
    "countdown": CountdownConfig,
    "mixture": MixtureConfig,
    "jsonl": JsonlConfig,
}
