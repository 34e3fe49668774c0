"""Frames of the wire: a head that holds the message and the small arrays, then one raw frame for each large array.

Called by sockets.py for every message and by groups.py for the ledger's payloads. Layout of the head:

    b"offt" · protocol (uint16) · 0 (uint16)        little-endian
    msgpack of [message, dtypes, parts, shapes]
        dtypes      a byte for each array, an index into DTYPES
        parts       its bytes, or nil where a raw frame has them
        shapes      index → shape of each array that has not one dimension

An array of LARGE_BYTES or more is a frame of its own, sent from where it lies. How long an array is follows from the
bytes that are there, so no size or offset of the sender is ever trusted. Invariants: `decode(encode(m, arrays))` is
(m, arrays) bit for bit; `decode` of any other frames raises WireError and nothing else, and allocates nothing in
proportion to a size that the frames merely claim.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt

from offtrail.platform.wire.messages import PROTOCOL, Message, ReplyMessage, RequestMessage, VersionHint

Frame = Any
"""Anything with the buffer protocol and a length in bytes: bytes, memoryview of bytes, zmq.Frame."""
Array = npt.NDArray[Any]

DTYPES = tuple(map(np.dtype, ("<i4", "<f4", "<f8", "|u1", "<i8", "|i1", "<i2", "<f2", "<u2", "<u4", "<u8")))
LARGE_BYTES = 32 * 1024
"""Below it a copy into the head costs less than a frame."""
MAX_DIMS, MAX_ARRAYS, MAX_SHAPES = 8, 1 << 20, 1 << 16

_MAGIC = b"offt"
_PREFIX = struct.Struct("<4sHH")
_HEAD_PREFIX = _PREFIX.pack(_MAGIC, PROTOCOL, 0)
_CODES = {dtype: code for code, dtype in enumerate(DTYPES)}
_DTYPES = dict(enumerate(DTYPES))

Dim = Annotated[int, msgspec.Meta(ge=0, lt=1 << 40)]
Shape = Annotated[list[Dim], msgspec.Meta(max_length=MAX_DIMS)]


class WireError(ValueError):
    """Frames that are not a message of this protocol; one line that says what is wrong with them."""


class _Head(msgspec.Struct, frozen=True, array_like=True, gc=False):
    message: RequestMessage | ReplyMessage | VersionHint
    dtypes: bytes
    parts: Annotated[list[bytes | None], msgspec.Meta(max_length=MAX_ARRAYS)]
    shapes: Annotated[dict[Dim, Shape], msgspec.Meta(max_length=MAX_SHAPES)]


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Head)


def encode(message: Message, arrays: Sequence[Array] = ()) -> list[Frame]:
    """The frames of a message. Large contiguous arrays are not copied: leave them unchanged until they are sent.

    Raises WireError when an array's dtype is not in DTYPES or it has more than MAX_DIMS dimensions.
    """
    codes = bytearray()
    parts: list[bytes | None] = []
    shapes: dict[int, tuple[int, ...]] = {}
    frames: list[Frame] = [b""]
    for array in arrays:
        if array.ndim != 1:
            shapes[len(codes)] = array.shape
            if array.ndim > MAX_DIMS:
                raise WireError(f"array {len(codes)} has {array.ndim} dimensions; the wire carries {_allowed()}")
        try:
            codes.append(_CODES[array.dtype])
        except KeyError:
            raise WireError(f"array {len(codes)} has dtype {array.dtype}; the wire carries {_allowed()}") from None
        if array.nbytes < LARGE_BYTES:
            parts.append(array.tobytes())
        else:
            parts.append(None)
            frames.append(np.ascontiguousarray(array).data.cast("B"))
    frames[0] = _HEAD_PREFIX + _encoder.encode((message, bytes(codes), parts, shapes))
    return frames


def decode(frames: Sequence[Frame]) -> tuple[Message, list[Array]]:
    """The message and its arrays, read-only: copies of small ones, views of raw frames. Raises WireError, and nothing
    else.
    """
    if not frames:
        raise WireError("a message without frames")
    head = _read_head(frames[0])
    return head.message, _arrays(head, frames[1:])


def _read_head(frame: Frame) -> _Head:
    """Check magic and protocol first, so that another version is named as such whatever its header looks like."""
    if len(frame) < _PREFIX.size:
        raise WireError(f"a header of {len(frame)} bytes")
    magic, protocol, _ = _PREFIX.unpack_from(frame)
    if magic != _MAGIC:
        raise WireError(f"a header that starts with {magic!r}: this peer does not speak offtrail's protocol")
    if protocol != PROTOCOL:
        raise WireError(
            f"protocol {protocol}, but this process speaks {PROTOCOL}: run one version of offtrail everywhere"
        )
    try:
        return _decoder.decode(memoryview(frame)[_PREFIX.size :])
    except (msgspec.MsgspecError, RecursionError, ValueError, OverflowError) as error:
        raise WireError(f"header: {' '.join(str(error).split())}") from None


def _arrays(head: _Head, raw: Sequence[Frame]) -> list[Array]:
    """The arrays, of the head's parts and of all raw frames in turn. WireError unless they fit to the byte."""
    parts: list[Any] = head.parts
    if len(parts) != len(head.dtypes) or parts.count(None) != len(raw):
        found = f"{len(parts)} parts, {parts.count(None)} of them raw, and {len(raw)} raw frames"
        raise WireError(f"{len(head.dtypes)} arrays of {found}")
    if raw:
        frames = iter(raw)
        parts = [memoryview(next(frames)).toreadonly() if part is None else part for part in parts]
    try:
        arrays = [*map(np.frombuffer, parts, map(_DTYPES.__getitem__, head.dtypes))]
        for index, shape in head.shapes.items():
            arrays[index] = arrays[index].reshape(shape)
    except KeyError as error:
        raise WireError(f"an array of dtype number {error}; the wire carries {_allowed()}") from None
    except (ValueError, IndexError) as error:
        raise WireError(f"arrays: {error}") from None
    return arrays


def _allowed() -> str:
    return f"{', '.join(dtype.str for dtype in DTYPES)} of up to {MAX_DIMS} dimensions"
