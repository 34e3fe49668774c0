"""Settings of the tasks. No torch here: `launch.py --help` imports this."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class TaskConfig:
    """What every task has."""

    name: str = "chain"
    held_out_share: float = 0.1
    """Share of all prompts, chosen by a hash of the prompt, that is never trained on."""


@dataclass
class ChainConfig(TaskConfig):
    """Arithmetic chain modulo 10: start value and a run of operations, one answer digit."""

    name: str = "chain"
    min_operations: int = 3
    max_operations: int = 6
    worked_share: float = 0.5
    """Cold start: share of answers that work the problem step by step; the others guess directly."""
    noise: float = 0.0
    """Cold start: chance that a worked step goes wrong (and its error is carried on)."""


@dataclass
class AdditionConfig(TaskConfig):
    """Addition of two numbers, digit by digit with carry."""

    name: str = "addition"
    min_digits: int = 3
    max_digits: int = 4
    worked_share: float = 0.5
    noise: float = 0.0


@dataclass
class CountdownConfig(TaskConfig):
    """Combine all given numbers with + − × to reach the target."""

    name: str = "countdown"
    numbers: int = 3
    max_number: int = 9


@dataclass
class MixtureConfig(TaskConfig):
    """Several families at given shares."""

    name: str = "mixture"
    weights: dict[str, float] = field(default_factory=lambda: {"chain": 0.5, "addition": 0.5})
    """Family name → share; each family runs at its defaults."""


@dataclass
class JsonlConfig(TaskConfig):
    """A local JSON-lines file, one problem a line: GSM8K's question/answer fields by default."""

    name: str = "jsonl"
    path: str = ""
    """Training problems."""
    eval_path: str = ""
    """Held-out problems; empty = held_out_share of `path`, by hash of the prompt."""
    prompt_field: str = "question"
    answer_field: str = "answer"
    answer_after: str = "####"
    """The gold answer is what follows this mark in the answer field; empty = the whole field."""
    template: str = "{prompt}"
    """How a prompt is put to the model; {prompt} is the problem's text."""
    chat: bool = False
    """Wrap the prompt with the tokenizer's chat template."""


TASKS: dict[str, type[TaskConfig]] = {
    "chain": ChainConfig,
    "addition": AdditionConfig,
    "countdown": CountdownConfig,
    "mixture": MixtureConfig,
    "jsonl": JsonlConfig,
}
