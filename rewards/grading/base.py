"""What a comparison gives."""

from __future__ import annotations

from typing import NamedTuple


class Grade(NamedTuple):
    """Whether an answer is right, and what decided it, in a few words."""

    right: bool
    why: str
