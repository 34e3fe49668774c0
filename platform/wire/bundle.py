"""Bundles: one message of the socket that carries one letter or several, each a message of the wire under its ticket.

    frame 0     number of letters (uint64) · for each its ticket (uint64), bytes of its head (uint32), raw frames
                (uint32) · the heads, one behind the other                                        little-endian
    frames 1…   the raw frames of all letters, in turn

Called by sockets.py. What a frame costs, many small letters share. Invariant: `unbundle` of any frames gives letters
that are made of them without a byte left over, or raises WireError.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from offtrail.platform.wire.codec import Frame, WireError

Letter = tuple[int, list[Frame]]
"""Ticket, and the frames of one message: codec.encode made them, or codec.decode reads them."""

NO_TICKET = 0
"""The ticket of the one letter that answers a message whose letters could not be read."""

_COUNT = struct.Struct("<Q")
_ENTRY = struct.Struct("<QII")


def bytes_alone(head: Frame) -> int:
    """Of the first frame, where the letter with this head has it for itself."""
    return _COUNT.size + _ENTRY.size + len(head)


def bundle(letters: Sequence[Letter]) -> list[Frame]:
    """The frames of one message of the socket. Raw frames are not copied."""
    parts: list[Frame] = [_COUNT.pack(len(letters))]
    parts += [_ENTRY.pack(ticket, len(frames[0]), len(frames) - 1) for ticket, frames in letters]
    parts += [frames[0] for _, frames in letters]
    return [b"".join(parts), *(frame for _, frames in letters for frame in frames[1:])]


def unbundle(frames: Sequence[Frame]) -> list[Letter]:
    """The letters, as views of the frames. Raises WireError."""
    if not frames or len(frames[0]) < _COUNT.size:
        raise WireError(f"a message of {len(frames)} frames without a table of letters")
    first = memoryview(frames[0])
    (count,) = _COUNT.unpack_from(first)
    start = _COUNT.size + count * _ENTRY.size
    if start > len(first):
        raise WireError(f"a table of {count} letters in a frame of {len(first)} bytes")
    letters: list[Letter] = []
    at = 1
    for ticket, size, raw in _ENTRY.iter_unpack(first[_COUNT.size : start]):
        letters.append((ticket, [first[start : start + size], *frames[at : at + raw]]))
        start, at = start + size, at + raw
    if start != len(first) or at != len(frames):
        raise WireError(
            f"{count} letters of {start} bytes and {at} frames in a message of {len(first)} and {len(frames)}"
        )
    return letters
