"""Frames of the wire: one header frame, one frame that packs the small arrays, one raw frame for each large array.

Called by sockets.py for every message and by groups.py for the ledger's payloads. Layout:

    header   b"offt" · protocol (uint16, little-endian) · msgpack of [message, [[dtype, dim, dim, …], …]]
    packed   all arrays below LARGE_BYTES, one after another, each start aligned to 8 bytes (absent when there are none)
    raw …    each array of LARGE_BYTES or more, in order, sent from where it lies

Where an array lies follows from the dtypes and shapes alone, so no offset of the sender is ever trusted. Invariants:
`decode(encode(m, arrays))` is (m, arrays) bit for bit; `decode` of any other frames raises WireError and nothing else,
and allocates nothing in proportion to a size that the frames merely claim.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from offtrail.platform.wire.messages import PROTOCOL, Message, Reply, Request, VersionHint

Frame = bytes | memoryview
Array = npt.NDArray[Any]

DTYPES = {
    name: np.dtype(name) for name in ("<i4", "<f4", "<f8", "|u1", "<i8", "|i1", "<i2", "<f2", "<u2", "<u4", "<u8")
}
LARGE_BYTES = 32 * 1024
MAX_ARRAYS = 1_000_000
MAX_DIMS = 8
MAX_BYTES = 1 << 40

_MAGIC = b"offt"
_PREFIX = struct.Struct("<4sH")
_ALIGN = 8
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class WireError(ValueError):
    """Frames that are not a message of this protocol; one line that says what is wrong with them."""


class _Header(msgspec.Struct, frozen=True, array_like=True):
    message: Request | Reply | VersionHint
    arrays: list[list[Any]]


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Header)


def encode(message: Message, arrays: Sequence[Array] = ()) -> list[Frame]:
    """The frames of a message. Large contiguous arrays are not copied: leave them unchanged until they are sent.

    Raises WireError when an array's dtype is not in DTYPES.
    """
    specs: list[list[Any]] = []
    small: list[bytes] = []
    large: list[Frame] = []
    for array in arrays:
        name = _NAMES.get(array.dtype)
        if name is None:
            raise WireError(f"array {len(specs)} has dtype {array.dtype}; the wire carries {', '.join(DTYPES)}")
        specs.append([name, *array.shape])
        size = array.nbytes
        if size >= LARGE_BYTES:
            large.append(np.ascontiguousarray(array).data.cast("B"))
        else:
            small.append(array.tobytes())
            if pad := -size % _ALIGN:
                small.append(bytes(pad))
    header = _PREFIX.pack(_MAGIC, PROTOCOL) + _encoder.encode(_Header(message, specs))  # type: ignore[arg-type]
    return [header, b"".join(small), *large] if small else [header, *large]


def decode(frames: Sequence[Frame]) -> tuple[Message, list[Array]]:
    """The message and its arrays, as read-only views of the frames. Raises WireError, and nothing else."""
    if not frames:
        raise WireError("a message without frames")
    header = _read_header(frames[0])
    if len(header.arrays) > MAX_ARRAYS:
        raise WireError(f"{len(header.arrays)} arrays in one message; the limit is {MAX_ARRAYS}")
    layout = [_place(spec) for spec in header.arrays]
    return header.message, _views(layout, frames)


def _read_header(frame: Frame) -> _Header:
    """Check magic and protocol first, so that another version is named as such whatever its header looks like."""
    if len(frame) < _PREFIX.size:
        raise WireError(f"a header of {len(frame)} bytes")
    magic, protocol = _PREFIX.unpack_from(frame)
    if magic != _MAGIC:
        raise WireError(f"a header that starts with {bytes(magic)!r}: this peer does not speak offtrail's protocol")
    if protocol != PROTOCOL:
        raise WireError(
            f"protocol {protocol}, but this process speaks {PROTOCOL}: run one version of offtrail everywhere"
        )
    try:
        return _decoder.decode(memoryview(frame)[_PREFIX.size :])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, OverflowError, ValueError) as error:
        raise WireError(f"header: {' '.join(str(error).split())}") from None


def _place(spec: list[Any]) -> tuple[np.dtype[Any], list[int], int]:
    """(dtype, shape, bytes) of one array; Python integers, so that a product of huge dimensions cannot wrap round."""
    dtype = DTYPES.get(spec[0]) if spec and isinstance(spec[0], str) else None
    if dtype is None:
        raise WireError(f"dtype {spec[0] if spec else None!r:.40}; the wire carries {', '.join(DTYPES)}")
    shape = spec[1:]
    if len(shape) > MAX_DIMS:
        raise WireError(f"an array of {len(shape)} dimensions; the limit is {MAX_DIMS}")
    size = dtype.itemsize
    for dim in shape:
        if type(dim) is not int or not 0 <= dim <= MAX_BYTES:
            raise WireError(f"a shape with dimension {dim!r:.40}")
        size *= dim
    if size > MAX_BYTES:
        raise WireError(f"an array of {size} bytes; the limit is {MAX_BYTES}")
    return dtype, shape, size


def _views(layout: list[tuple[np.dtype[Any], list[int], int]], frames: Sequence[Frame]) -> list[Array]:
    packed = sum(size + -size % _ALIGN for _, _, size in layout if size < LARGE_BYTES)
    has_packed = any(size < LARGE_BYTES for _, _, size in layout)
    expected = [packed] * has_packed + [size for _, _, size in layout if size >= LARGE_BYTES]
    found = [len(frame) for frame in frames[1:]]
    if found != expected:
        raise WireError(f"array frames of {_few(found)} bytes, where the header announces {_few(expected)}")
    arrays: list[Array] = []
    raw = 1 + has_packed
    offset = 0
    for dtype, shape, size in layout:
        if size < LARGE_BYTES:
            array: Array = np.ndarray(shape, dtype, frames[1], offset)
            offset += size + -size % _ALIGN
        else:
            array = np.ndarray(shape, dtype, frames[raw])
            raw += 1
        array.flags.writeable = False
        arrays.append(array)
    return arrays


def _few(sizes: list[int]) -> str:
    return f"{sizes[:6]}{f' … ({len(sizes)} frames)' if len(sizes) > 6 else ''}"
