"""What crosses between the judge and a program: plain builtin values, as tagged JSON.

Trap: the fork server imports this module, so nothing of a test may ever stand in it.
"""

from __future__ import annotations

import builtins
from typing import Any

DEEPEST = 60
LONGEST_ITERATOR = 100_000
EXACT = 2**53
"""Whole numbers below it are JSON numbers."""


def pack(value: Any, depth: int = 0) -> Any:
    """None, bool, number, text, bytes, list, tuple, set, dict, builtin class as JSON; an iterator as the list of its
    items, an object of a subclass as its base. Raises TypeError for anything else.
    """
    if depth > DEEPEST:
        raise TypeError(f"nested deeper than {DEEPEST}: it cannot cross the sandbox's wall")
    if name := _builtin_class(value):
        return {"y": name}
    match value:
        case None | True | False:
            return value
        case int():
            value = int(value)
            return value if -EXACT < value < EXACT else {"i": hex(value)}
        case float():
            return {"f": float(value).hex()}
        case str():
            return str.__str__(value)
        case complex():
            return {"c": [float(value.real).hex(), float(value.imag).hex()]}
        case bytes() | bytearray():
            return {"b": bytes(value).hex()}
        case list() | tuple() | set() | frozenset():
            tag = "l" if isinstance(value, list) else "t" if isinstance(value, tuple) else "s"
            return {tag: [pack(item, depth + 1) for item in value]}
        case dict():
            return {"d": [[pack(key, depth + 1), pack(item, depth + 1)] for key, item in value.items()]}
    if hasattr(value, "__next__"):
        return {"l": _items(value, depth)}
    raise TypeError(f"a {type(value).__name__} cannot cross the sandbox's wall")


def _builtin_class(value: object) -> str:
    """Its name; empty for anything else."""
    name = value.__name__ if isinstance(value, type) else ""
    return name if name and getattr(builtins, name, None) is value else ""


def _items(iterator: Any, depth: int) -> list[Any]:
    items: list[Any] = []
    for item in iterator:
        if len(items) == LONGEST_ITERATOR:
            raise TypeError(f"an iterator of more than {LONGEST_ITERATOR:,} items cannot cross the sandbox's wall")
        items.append(pack(item, depth + 1))
    return items


def unpack(given: Any) -> Any:
    """What ``pack`` was given. Of what somebody else wrote: a builtin value, or any Exception."""
    if not isinstance(given, dict):
        if isinstance(given, list):
            raise ValueError("a bare list")
        return given
    ((tag, body),) = given.items()
    match tag:
        case "i":
            return int(body, 16)
        case "f":
            return float.fromhex(body)
        case "c":
            return complex(*map(float.fromhex, body))
        case "b":
            return bytes.fromhex(body)
        case "l":
            return [unpack(item) for item in body]
        case "t":
            return tuple(unpack(item) for item in body)
        case "s":
            return {unpack(item) for item in body}
        case "d":
            return {unpack(key): unpack(item) for key, item in body}
        case "y" if isinstance(found := getattr(builtins, body, None), type):
            return found
    raise ValueError(f"no value: {tag!r}"[:80])
