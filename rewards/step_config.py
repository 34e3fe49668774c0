"""Settings of steps: how an answer is cut. No numpy here: `launch.py --help` imports this."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Self, get_args

By = Literal["newline", "sentence", "separator", "tag", "tokens"]
Within = Literal["response", "thought"]
Rest = Literal["step", "none"]
Aggregate = Literal["min", "mean", "product", "last", "sum"]
"""What makes one score of those of an answer's steps."""

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What decoders write for bytes that are no character, or none yet."""


@dataclass(frozen=True)
class StepSettings:
    """How an answer is cut into steps.

    ``by``: newline; sentence (a full stop, a question or exclamation mark with a blank behind it, 。！？, or a new
    line); ``separator``, any string; ``tag``, whose closing tag ends a step; a fixed number of ``tokens``. ``within``:
    of the whole response, or of the thought alone, up to its last ``</think>``. ``rest``: whether what follows the last
    mark is a step.
    """

    by: By = "newline"
    separator: str = "\n\n"
    tag: str = "step"
    tokens: int = 32
    within: Within = "response"
    rest: Rest = "step"

    @classmethod
    def of(cls, given: Mapping[str, Any], key: str = "steps") -> Self:
        """From settings. ValueError, one line that names ``key``, where they cannot be."""
        allowed = {"by": By, "within": Within, "rest": Rest}
        names = [field.name for field in fields(cls)]
        for name, value in given.items():
            if name not in names:
                raise ValueError(f"{key}.{name}={value}: unknown; must be one of {', '.join(names)}")
            if name in allowed and value not in get_args(allowed[name]):
                raise ValueError(f"{key}.{name}={value}: must be one of {', '.join(get_args(allowed[name]))}")
            if name == "tokens" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{key}.{name}={value}: must be a whole number ≥ 1")
            if name in ("separator", "tag") and (not isinstance(value, str) or not value or UNFINISHED in value):
                like = getattr(cls(), name)
                raise ValueError(f"{key}.{name}={value!r}: must be a text that answers hold, such as {like!r}")
        made = cls(**given)
        for name in ("separator", "tag", "tokens"):
            if name in given and made.by != name:
                raise ValueError(f"{key}.{name}={given[name]!r}: is read with {key}.by={name}, not by={made.by}")
        return made
