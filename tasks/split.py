"""Which prompts are held out, and keyed random streams: both depend on their keys alone, on any machine, in any order.

Trap: Python's hash() of a text differs from process to process; nothing here may use it.
"""

from __future__ import annotations

import random
from hashlib import blake2b


def stream(*key: str | int) -> random.Random:
    """A random stream of its own for each key; equal keys give equal streams."""
    return random.Random(blake2b(repr(key).encode(), digest_size=16).digest())


def place(family: str, identity: str) -> float:
    """A prompt's fixed place in [0, 1): uniform over prompts, the same in every run whatever its seed."""
    digest = blake2b(f"{family}\n{identity}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def is_held_out(family: str, identity: str, share: float) -> bool:
    """Whether a prompt belongs to the held-out ``share``. A larger share holds out a superset."""
    return place(family, identity) < share
