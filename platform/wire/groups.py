"""Groups on the wire and in the ledger: one order of arrays, known to both sides.

Called by generators (submit), the broker (ledger payloads, batches) and the learner (batches). Invariant:
`unpack_group(pack_group(g))` and `group_from(*group_frames(g))` equal g bit for bit, and what they return has passed
Group.check; WireError otherwise.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from offtrail.core.types import Channel, Group
from offtrail.platform.wire.codec import Array, Frame, WireError, decode, encode
from offtrail.platform.wire.messages import GroupHeader, SubmitGroup

INT32, FLOAT32, FLOAT64, UINT8 = map(np.dtype, (np.int32, np.float32, np.float64, np.uint8))
FIXED = (
    ("prompt_tokens", INT32),
    ("lengths", INT32),
    ("tokens", INT32),
    ("logprobs", FLOAT32),
    ("versions", INT32),
    ("finish", UINT8),
    ("rewards", FLOAT32),
    ("times", FLOAT64),
    ("step_ends", INT32),
)
"""Arrays that every group has, in wire order; components and channels follow, in the header's order of names."""

_DTYPES = [dtype for _, dtype in FIXED]
_COUNT = struct.Struct("<I")
_SIZE = struct.Struct("<Q")


def group_frames(group: Group) -> tuple[GroupHeader, list[Array]]:
    """Header and arrays of a group: the FIXED ones, then components, then channels. Nothing is copied."""
    header = GroupHeader(
        group=group.group,
        slot=group.slot,
        attempt=group.attempt,
        problem=group.problem,
        generator=group.generator,
        temperature=group.temperature,
        component_names=list(group.components),
        channels=[(name, channel.axis) for name, channel in group.channels.items()],
        scored_by=group.scored_by,
        queued_version=group.queued_version,
        queued_at=group.queued_at,
        counts=group.counts,
    )
    fixed: list[Array] = [
        group.prompt_tokens, group.lengths, group.tokens, group.logprobs,
        group.versions, group.finish, group.rewards, group.times, group.step_ends,
    ]  # fmt: skip
    return header, [*fixed, *group.components.values(), *(channel.values for channel in group.channels.values())]


def arrays_per_group(header: GroupHeader) -> int:
    """How many arrays of a message belong to this header."""
    return len(FIXED) + len(header.component_names) + len(header.channels)


def group_from(header: GroupHeader, arrays: Sequence[Array], vocab_size: int | None = None) -> Group:
    """The checked group of a header and its arrays (views, not copies). ``vocab_size``: see Group.check.

    Raises WireError when the number of arrays, a dtype, a repeated name or Group.check is wrong.
    """
    if len(arrays) != arrays_per_group(header):
        raise WireError(f"group {header.group}: {len(arrays)} arrays, its header announces {arrays_per_group(header)}")
    names = header.component_names
    prompt, lengths, tokens, logprobs, versions, finish, rewards, times, step_ends, *named = arrays
    dtypes = [array.dtype for array in arrays[: len(FIXED) + len(names)]]
    if dtypes != [*_DTYPES, *[FLOAT32] * len(names)]:
        raise WireError(f"group {header.group}: {_wrong_dtype(names, dtypes)}")
    components = dict(zip(names, named[: len(names)], strict=True))
    channels = {}
    for (name, axis), values in zip(header.channels, named[len(names) :], strict=True):
        channels[name] = Channel(axis, values)
    if len(components) != len(names) or len(channels) != len(header.channels):
        raise WireError(f"group {header.group}: a component or channel name stands twice")
    group = Group(
        header.group, header.slot, header.attempt, header.problem, header.generator, header.temperature,
        prompt, lengths, tokens, logprobs, versions, finish, rewards, components, times, channels, step_ends,
        header.scored_by, header.queued_version, header.queued_at, header.counts,
    )  # fmt: skip
    try:
        group.check(vocab_size=vocab_size)
    except ValueError as error:
        raise WireError(str(error)) from None
    return group


def _wrong_dtype(components: Sequence[str], dtypes: Sequence[np.dtype[Any]]) -> str:
    expected = [*FIXED, *((f"component {name}", FLOAT32) for name in components)]
    return "; ".join(
        f"{name} is {found}, expected {dtype}"
        for (name, dtype), found in zip(expected, dtypes, strict=True)
        if found != dtype
    )


def pack_group(group: Group) -> bytes:
    """One group as one blob, for the ledger: number of frames (uint32), their sizes (uint64), the frames, the CRC-32 of
    it all (uint32).
    """
    header, arrays = group_frames(group)
    frames = encode(SubmitGroup(header=header), arrays)
    blob = b"".join((_COUNT.pack(len(frames)), *(_SIZE.pack(len(f)) for f in frames), *frames))
    return blob + _COUNT.pack(zlib.crc32(blob))


def unpack_group(blob: Frame, vocab_size: int | None = None) -> Group:
    """The checked group of a blob; its arrays are read-only, aligned copies. WireError when the blob is not whole."""
    view = memoryview(blob)
    if len(view) < 2 * _COUNT.size:
        raise WireError(f"a group's blob of {len(view)} bytes")
    view, (checksum,) = view[: -_COUNT.size], _COUNT.unpack(view[-_COUNT.size :])
    if zlib.crc32(view) != checksum:
        raise WireError(f"a group's blob of {len(view)} bytes that is damaged: its checksum is another one")
    (count,) = _COUNT.unpack_from(view)
    start = _COUNT.size + count * _SIZE.size
    if len(view) < start:
        raise WireError(f"a group's blob of {len(view)} bytes that announces {count} frames")
    frames: list[Frame] = []
    for i in range(count):
        (size,) = _SIZE.unpack_from(view, _COUNT.size + i * _SIZE.size)
        # A copy: in the blob, behind a head of any length, its array would not be aligned.
        frames.append(bytes(view[start : start + size]))
        start += size
    if start != len(view):
        raise WireError(f"a group's blob of {len(view)} bytes, its frames need {start}")
    message, group_arrays = decode(frames)
    if not isinstance(message, SubmitGroup):
        raise WireError(f"a group's blob that holds {type(message).__name__}")
    return group_from(message.header, group_arrays, vocab_size)
