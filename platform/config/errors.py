"""The one kind of error a user's mistake becomes: key, value, what is allowed, nearest name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

LONGEST_ERROR = 1000
"""Characters of an error; of a longer one the middle is left out: front and end hold key and reason."""
LONGEST_VALUE = 200
"""Characters of a value in it."""
SELDOM_MEANT = ("prm.", "reward_model.")
"""Sections that repeat keys of others, which are more often forgotten."""


class ConfigError(Exception):
    """A user's mistake. ``str()`` is one line, without the ``offtrail: error:`` in front; exit code 2."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class FinalError(RuntimeError):
    """A failure of a role that another start of it would not cure; so is every ValueError."""


def refuse(key: str, value: object, why: str) -> ConfigError:
    """The error for `key=value`, in the form that every message has."""
    return ConfigError(f"{shortened(key)}={shortened(show(value))}: {why}")


def renamed(text: str, section: str, place: str) -> str:
    """An error whose keys are those of a section, such as `task.digits=3: …`, with the place where they stand for it;
    what looks alike in the path of a file stays.
    """
    return re.sub(rf"(?<![\w/.-]){section}\.(?=\w)", lambda _: f"{place}.", text)


def show(value: object) -> str:
    """A value as it is typed on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(show(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {show(item)}" for key, item in value.items()) + "}"
    return str(value)


def one_line(text: str) -> str:
    """The text with each run of white space made one space, no character that a terminal would obey, and an end: an
    error is always one line.
    """
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(text.split()))
    return shortened(plain, LONGEST_ERROR)


def shortened(text: str, longest: int = LONGEST_VALUE) -> str:
    """The text without its middle, where it is longer than `longest` characters."""
    if len(text) <= longest:
        return text
    return f"{text[: longest // 2]}…({len(text):,} characters)…{text[-longest // 2 :]}"


def nearest(name: str, names: Iterable[str]) -> list[str]:
    """Up to three of `names` that `name` may have meant, best first; a key also matches by its last part.

    ``steps`` → ``learner.steps, sft.steps``: people forget the section more often than they misspell it.
    """
    if len(name) > LONGEST_VALUE:
        return []
    known = sorted(set(names))
    whole = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    last = name.rpartition(".")[2]
    by_last = [key for key in known if "." in key and key.rpartition(".")[2] == last]
    by_last.sort(key=lambda key: key.startswith(SELDOM_MEANT))
    # The exact last part is the better evidence, unless the section is right and the last part is misspelt.
    ordered = by_last + whole if by_last else whole
    return list(dict.fromkeys(ordered))[:3]


def nearest_text(name: str, names: Iterable[str]) -> str:
    """`; nearest: a, b`, or nothing when no name is near."""
    near = nearest(name, names)
    return f"; nearest: {', '.join(near)}" if near else ""
