"""Frames of the wire: a head that holds the message and the small arrays, then one raw frame for each large array.

Called by sockets.py for every message and by groups.py for the ledger's payloads. Layout of the head:

    b"offt" · protocol (uint16) · 0 (uint16) · bytes of msgpack (uint32)     little-endian
    msgpack of [message, kinds, dims]        a byte for each array: 16 · dimensions + index into DTYPES
    each array below LARGE_BYTES             each part starts at a multiple of 8, zeros between

An array of LARGE_BYTES or more is a frame of its own, sent from where it lies. Where an array lies follows from the
dtypes and shapes alone, so no offset of the sender is ever trusted. Invariants: `decode(encode(m, arrays))` is
(m, arrays) bit for bit; `decode` of any other frames raises WireError and nothing else, and allocates nothing in
proportion to a size that the frames merely claim.
"""

from __future__ import annotations

import math
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
MAX_BYTES = 1 << 40
MAX_DIMS = 8

_MAGIC = b"offt"
_PREFIX = struct.Struct("<4sHHI")
_PADS = tuple(bytes(-size % 8) for size in range(8))
_CODES = {dtype: code for code, dtype in enumerate(DTYPES)}
_KINDS = tuple(
    (DTYPES[kind & 15], DTYPES[kind & 15].itemsize, kind >> 4)
    if kind & 15 < len(DTYPES) and kind >> 4 <= MAX_DIMS
    else None
    for kind in range(256)
)
"""(dtype, bytes of an element, dimensions) by kind; None where there is no such kind."""

Dim = Annotated[int, msgspec.Meta(ge=0, le=MAX_BYTES)]


class WireError(ValueError):
    """Frames that are not a message of this protocol; one line that says what is wrong with them."""


class _Header(msgspec.Struct, frozen=True, array_like=True, gc=False):
    message: RequestMessage | ReplyMessage | VersionHint
    kinds: bytes
    dims: list[Dim]


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Header)


def encode(message: Message, arrays: Sequence[Array] = ()) -> list[Frame]:
    """The frames of a message. Large contiguous arrays are not copied: leave them unchanged until they are sent.

    Raises WireError when an array's dtype is not in DTYPES or it has more than MAX_DIMS dimensions.
    """
    kinds = bytearray()
    dims: list[int] = []
    small: list[Frame] = []
    frames: list[Frame] = [b""]
    for array in arrays:
        code = _CODES.get(array.dtype)
        if code is None or array.ndim > MAX_DIMS:
            what = f"dtype {array.dtype}" if code is None else f"{array.ndim} dimensions"
            raise WireError(f"array {len(kinds)} has {what}; the wire carries {_allowed()}")
        kinds.append(16 * array.ndim + code)
        dims += array.shape
        data = array if array.flags.c_contiguous else np.ascontiguousarray(array)
        size = array.nbytes
        if size >= LARGE_BYTES:
            frames.append(data.data.cast("B"))
        else:
            small.append(data)
            if size % 8:
                small.append(_PADS[size % 8])
    header = _encoder.encode((message, bytes(kinds), dims))
    prefix = _PREFIX.pack(_MAGIC, PROTOCOL, 0, len(header))
    frames[0] = b"".join((prefix, header, _PADS[(len(prefix) + len(header)) % 8], *small))
    return frames


def decode(frames: Sequence[Frame]) -> tuple[Message, list[Array]]:
    """The message and its arrays, as read-only views of the frames. Raises WireError, and nothing else."""
    if not frames:
        raise WireError("a message without frames")
    header, start = _read_header(frames[0])
    try:
        return header.message, _views(header, frames, start)
    except WireError:
        raise
    except ValueError as error:
        raise WireError(f"arrays: {error}") from None


def _read_header(head: Frame) -> tuple[_Header, int]:
    """Check magic and protocol first, so that another version is named as such whatever its header looks like."""
    if len(head) < _PREFIX.size:
        raise WireError(f"a header of {len(head)} bytes")
    magic, protocol, _, size = _PREFIX.unpack_from(head)
    if magic != _MAGIC:
        raise WireError(f"a header that starts with {magic!r}: this peer does not speak offtrail's protocol")
    if protocol != PROTOCOL:
        raise WireError(
            f"protocol {protocol}, but this process speaks {PROTOCOL}: run one version of offtrail everywhere"
        )
    end = _PREFIX.size + size
    if end > len(head):
        raise WireError(f"a head of {len(head)} bytes whose header needs {end}")
    try:
        return _decoder.decode(memoryview(head)[_PREFIX.size : end]), end + -end % 8
    except (msgspec.MsgspecError, RecursionError, ValueError, OverflowError) as error:
        raise WireError(f"header: {' '.join(str(error).split())}") from None


def _views(header: _Header, frames: Sequence[Frame], start: int) -> list[Array]:
    """The arrays; ``start``: where those in the head begin. ValueError unless header and frames fit to the byte.

    Sizes are Python integers: a product of huge dimensions cannot wrap round. np.frombuffer checks every end.
    """
    head = memoryview(frames[0]).toreadonly()
    dims, at, raw = header.dims, 0, 1
    arrays: list[Array] = []
    for kind in header.kinds:
        dtype, item, ndim = _KINDS[kind] or _unknown(kind)
        count = dims[at] if ndim == 1 and at < len(dims) else math.prod(dims[at : at + ndim])
        size = count * item
        if size < LARGE_BYTES:
            array = np.frombuffer(head, dtype, count, start)
            start += size + -size % 8
        else:
            if raw == len(frames) or len(frames[raw]) != size:
                found = "no frame" if raw == len(frames) else f"a frame of {len(frames[raw])} bytes"
                raise WireError(f"array {len(arrays)} needs {size} bytes and has {found}")
            array = np.frombuffer(memoryview(frames[raw]).toreadonly(), dtype)
            raw += 1
        arrays.append(array if ndim == 1 else array.reshape(dims[at : at + ndim]))
        at += ndim
    if at != len(dims):
        raise WireError(f"{len(dims)} dimensions, where the arrays have {at}")
    if start != len(head) or raw != len(frames):
        raise WireError(f"{len(head) - start} bytes and {len(frames) - raw} frames more than the header announces")
    return arrays


def _unknown(kind: int) -> tuple[np.dtype[Any], int, int]:
    raise WireError(f"an array of dtype number {kind & 15} and {kind >> 4} dimensions; the wire carries {_allowed()}")


def _allowed() -> str:
    return f"{', '.join(dtype.str for dtype in DTYPES)} of up to {MAX_DIMS} dimensions"
