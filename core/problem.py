"""Problem, apart from types.py: a task needs no array, and the command that lists all tasks need not import numpy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Problem:
    """One prompt and what its verifier needs. Plain JSON values only, so that it travels in a lease.

    ``index`` is its place in the data order of its split; ``meta`` is the family's own (start value, operations, …).
    ``messages``, where there are any, are put to the model instead of ``prompt`` ({"role": …, "content": …}, the
    user's last); ``prompt`` is then for people to read.
    """

    task: str
    index: int
    prompt: str
    answer: str
    meta: Mapping[str, Any] = field(default_factory=dict)
    messages: tuple[Mapping[str, str], ...] = ()
