"""What the settings of every task have; a family's own stand with it. No torch: `launch.py --help` imports this."""

from __future__ import annotations

from dataclasses import dataclass

from offtrail.core.settings import check_limits, setting


def check(allowed: bool, key: str, value: object, rule: str) -> None:
    """Raise ValueError in the words of the command line unless ``allowed``."""
    if not allowed:
        raise ValueError(f"task.{key}={value}: must be {rule}")


JUDGED_BY_MORE = ("programs", "gym", "countdown", "ifeval", "xstest")
"""Tasks whose verifier asks more of a problem than its gold answer."""


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
    tagged_share: float = setting(1.0, "[0, 1]")
    """Share of worked answers that carry the think and answer tags; the others are plain text, as in the documents that
    a base model has read."""
