"""The codec: exact round trips, and nothing but WireError out of bytes that are no message."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from offtrail.core.types import Problem
from offtrail.platform.wire.codec import DTYPES, LARGE_BYTES, MAX_ARRAYS, MAX_SHAPES, WireError, decode, encode
from offtrail.platform.wire.messages import (
    PROTOCOL,
    Acknowledged,
    Checkpointed,
    Commit,
    EvalResult,
    FailGroup,
    Failure,
    GroupHeader,
    Heartbeat,
    Hello,
    LeaseRequest,
    Message,
    NextBatch,
    ReturnLeases,
    StopRun,
    SubmitGroup,
    VersionHint,
)

ARRAYS = st.lists(
    st.sampled_from(DTYPES).flatmap(
        lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=6))
    ),
    max_size=6,
)
MESSAGES = st.one_of(
    st.builds(LeaseRequest, room=st.integers(0, 1000)),
    st.builds(Commit, step=st.integers(-1, 99), version=st.integers(0, 99), checksum=st.text(),
              metrics=st.dictionaries(st.text(), st.floats(allow_nan=False))),
    st.builds(VersionHint, version=st.integers(0, 99)),
    st.just(Acknowledged()),
)  # fmt: skip
HEAD = struct.Struct("<4sHH")


def head(payload: bytes, protocol: int = PROTOCOL) -> bytes:
    return HEAD.pack(b"offt", protocol, 0) + payload


def announcing(dtypes: bytes, parts: list[bytes | None], shapes: dict[object, object] | None = None) -> bytes:
    """A head that announces arrays by dtype number, bytes (None: a raw frame) and index → shape."""
    return head(msgspec.msgpack.encode((Acknowledged(), dtypes, parts, shapes or {})))


def same(left: list[np.ndarray], right: list[np.ndarray]) -> bool:
    return len(left) == len(right) and all(
        a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
        for a, b in zip(left, right, strict=True)
    )


@given(MESSAGES, ARRAYS)
def test_round_trip_is_exact(message, arrays):
    found, views = decode([bytes(frame) for frame in encode(message, arrays)])
    assert found == message
    assert same(views, arrays)


@pytest.mark.parametrize("size", [LARGE_BYTES - 1, LARGE_BYTES, LARGE_BYTES + 1])
def test_small_arrays_share_the_head_and_large_ones_have_a_frame(size):
    arrays = [np.arange(3), np.arange(size, dtype=np.uint32).astype(np.uint8), np.ones((2, 2))]
    frames = encode(Acknowledged(), arrays)
    assert len(frames) == (1 if size < LARGE_BYTES else 2)
    assert same(decode([bytes(frame) for frame in frames])[1], arrays)


def test_large_arrays_are_neither_copied_on_encode_nor_on_decode():
    array = np.zeros(LARGE_BYTES, np.uint8)
    frames = encode(Acknowledged(), [array])
    (view,) = decode(frames)[1]
    array[5] = 77
    assert view[5] == 77


def test_arrays_that_are_not_contiguous_arrive_by_value():
    array = np.arange(40_000, dtype=np.float64).reshape(200, 200).T
    small = array[::7, ::9]
    assert same(
        decode(encode(Acknowledged(), [array, small]))[1], [np.ascontiguousarray(array), np.ascontiguousarray(small)]
    )


def test_decoded_arrays_are_read_only():
    frames = [bytearray(frame) for frame in encode(Acknowledged(), [np.arange(3), np.zeros(LARGE_BYTES)])]
    for array in decode(frames)[1]:
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


@pytest.mark.parametrize("odd", range(9))
def test_small_arrays_are_aligned_behind_odd_ones(odd):
    arrays = decode(encode(LeaseRequest(room=10**odd), [np.zeros(odd, np.uint8), np.ones(2)]))[1]
    assert arrays[1].ctypes.data % 8 == 0


def test_small_arrays_do_not_keep_the_frame_they_came_in():
    (frame,) = (bytearray(frame) for frame in encode(Acknowledged(), [np.arange(3)]))
    (array,) = decode([memoryview(frame)])[1]
    frame[:] = bytes(len(frame))
    assert array.tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", [object, np.complex64, ">i4", "U3", bool])
def test_encode_names_a_dtype_that_the_wire_does_not_carry(dtype):
    with pytest.raises(WireError, match="array 1 has dtype"):
        encode(Acknowledged(), [np.zeros(1), np.zeros(2, dtype)])


@pytest.mark.parametrize("protocol", [0, PROTOCOL + 1, 65535])
def test_another_protocol_is_named_whatever_follows(protocol):
    with pytest.raises(WireError, match=f"protocol {protocol}, but this process speaks {PROTOCOL}"):
        decode([head(b"\xc1 not msgpack", protocol=protocol)])


@pytest.mark.parametrize(
    ("frames", "says"),
    [
        ([], "without frames"),
        ([b""], "0 bytes"),
        ([b"GET / HTTP/1.1\r\n\r\n"], "does not speak"),
        ([head(b"\xc1")], "header: "),
        ([HEAD.pack(b"offt", PROTOCOL, 0)], "header: Input data was truncated"),
        ([head(msgspec.msgpack.encode(({"type": "Launch"}, b"", [], {})))], "Launch"),
        ([head(msgspec.msgpack.encode(({"type": "Acknowledged"},)))], "header: "),
        ([head(msgspec.msgpack.encode(({"type": "LeaseRequest", "room": "9", "version": 0}, b"", [], {})))], "room"),
        ([head(msgspec.msgpack.encode((Acknowledged(), b"", [], {})) + b"x")], "trailing"),
        ([head(msgspec.msgpack.encode((Acknowledged(), [1], [b""], {})))], "header: "),
        ([announcing(b"\x0b", [b"1234"])], "dtype number 11"),
        ([announcing(b"\x00", [])], "1 arrays of 0 parts"),
        ([announcing(b"", [b""])], "0 arrays of 1 parts"),
        ([announcing(b"\x00", [b"12345"])], "multiple of element size"),
        ([announcing(b"\x00", ["1234"])], "header: "),
        ([announcing(b"\x00", [b"1234"], {1: [1]})], "out of range"),
        ([announcing(b"", [], {0: [0]})], "out of range"),
        ([announcing(b"\x00", [b"1234"], {-1: [1]})], "header: "),
        ([announcing(b"", [], {i: [1] for i in range(MAX_SHAPES + 1)})], "length <= 65536"),
        ([announcing(b"", [b""] * (MAX_ARRAYS + 1))], "length <= 1048576"),
        ([announcing(b"\x00", [b"1234"], {0: [-1]})], "header: "),
        ([announcing(b"\x00", [b"1234"], {0: [1.5]})], "header: "),
        ([announcing(b"\x00", [b"1234"], {0: [1 << 40]})], "header: "),
        ([announcing(b"\x00", [b"1234"], {0: [1] * 9})], "length <= 8"),
        ([announcing(b"\x00", [bytes(16)], {0: [2, 3]})], "cannot reshape"),
        ([announcing(b"\x00", [b""], {0: [1 << 39] * 8})], "arrays: "),
        ([announcing(b"\x00", [None])], "1 of them raw, and 0 raw frames"),
        ([announcing(b"\x00", [None]), b"1234", b"1234"], "1 of them raw, and 2 raw frames"),
        ([announcing(b"\x00", [None]), b"12345"], "multiple of element size"),
        ([announcing(b"", []), b"one more"], "and 1 raw frames"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_frames_is_said_in_one_line(frames, says):
    with pytest.raises(WireError, match=says) as caught:
        decode(frames)
    assert "\n" not in str(caught.value)


def test_deep_nesting_is_refused_and_does_not_overflow_the_stack():
    with pytest.raises(WireError):
        decode([head(b"\x92" + b"\x91" * 200_000)])


@given(st.lists(st.binary(max_size=200), max_size=4))
def test_garbage_gives_nothing_but_wire_errors(frames):
    with pytest.raises(WireError):
        decode(frames)


@given(st.binary(max_size=264))
def test_garbage_behind_a_right_prefix_gives_nothing_but_wire_errors(payload):
    with pytest.raises(WireError):
        decode([head(payload)])


@given(st.binary(max_size=4), st.lists(st.none() | st.binary(max_size=16), max_size=4), st.dictionaries(
    st.integers(-2, 5), st.lists(st.integers(-1, 2**40) | st.sampled_from([0, 1, 2]), max_size=9), max_size=3
), st.lists(st.binary(max_size=16), max_size=3))  # fmt: skip
def test_any_dtypes_parts_and_shapes_decode_or_give_a_wire_error(dtypes, parts, shapes, raw):
    with contextlib.suppress(WireError):
        arrays = decode([announcing(dtypes, parts, shapes), *raw])[1]
        assert sum(array.nbytes for array in arrays) == sum(len(part) for part in [*parts, *raw] if part is not None)


@given(MESSAGES, ARRAYS, st.data())
def test_damaged_frames_decode_or_give_a_wire_error(message, arrays, data):
    frames = [bytearray(frame) for frame in encode(message, arrays)]
    at = data.draw(st.integers(0, len(frames[0]) - 1))
    frames[0][at] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(WireError):
        decode([bytes(frame) for frame in frames])


@given(MESSAGES, ARRAYS.filter(bool), st.data())
def test_truncated_frames_give_a_wire_error(message, arrays, data):
    frames = [bytes(frame) for frame in encode(message, arrays)]
    cut = data.draw(st.integers(0, len(frames[0]) - 1))
    with pytest.raises(WireError):
        decode([frames[0][:cut], *frames[1:]])


def test_nothing_of_the_header_is_executed():
    """The whole point of not pickling: an instruction stream is bytes like any other."""
    with pytest.raises(WireError):
        decode([b"cos\nsystem\n(S'true'\ntR."])


def test_numbers_that_are_not_finite_travel():
    message = Commit(step=0, version=1, checksum="", metrics={"a": float("inf"), "b": float("nan")})
    found, _ = decode(encode(message))
    assert isinstance(found, Commit)
    assert found.metrics["a"] == float("inf")
    assert found.metrics["b"] != found.metrics["b"]


def test_messages_with_defaults_may_leave_them_out():
    found, _ = decode(
        [head(msgspec.msgpack.encode(({"type": "Hello", "role": "r", "index": 0, "pid": 1, "run": "x"}, b"", [], {})))]
    )
    assert found == Hello(role="r", index=0, pid=1, run="x")


def test_heartbeats_round_trip():
    beat = Heartbeat(role="learner", index=0, activity="busy/update", waiting_on="", since=1.5,
                     seconds={"busy/update": 2.0}, compute={"flops": 1e12}, gauges={"x": 1.0})  # fmt: skip
    assert decode(encode(beat)) == (beat, [])


BEYOND = [-(1 << 63), -2, 1 << 53, 1 << 63, (1 << 64) - 1]
HEADER = {"group": 0, "slot": 0, "attempt": 1, "problem": Problem("t", 0, "p", "a"), "generator": "g",
          "temperature": 1.0, "component_names": []}  # fmt: skip
BEAT = {"role": "g", "index": 0, "activity": "a", "waiting_on": "", "since": 0.0, "seconds": {},
        "compute": {}}  # fmt: skip
HELLO = {"role": "g", "index": 0, "pid": 1, "run": "r"}


def out_of_range() -> Iterator[Message]:
    """One field beyond its range in each."""
    for value in BEYOND:
        yield from (Hello(**HELLO | {name: value}) for name in ("index", "pid", "protocol"))
        yield from (SubmitGroup(header=GroupHeader(**HEADER | {n: value})) for n in ("group", "slot", "attempt"))
        yield SubmitGroup(header=GroupHeader(**HEADER, queued_version=value))
        yield from (LeaseRequest(room=value), NextBatch(step=value), Checkpointed(step=value, path="x"))
        yield from (FailGroup(group=value, attempt=1, reason="failed"), FailGroup(group=0, attempt=value, reason="x"))
        yield from (ReturnLeases(leases=[(0, 1), (value, 1)], detail=""), EvalResult(version=value, metrics={}))
        yield from (Commit(step=value, version=1, checksum="c"), Commit(step=0, version=value, checksum="c"))
        yield from (Commit(step=0, version=1, checksum="c", tokens=value), Failure(role="g", index=value, error="e"))
        yield Heartbeat(**BEAT | {"index": value})
    long = "x" * 257
    yield from (Hello(**HELLO | {"role": long}), Hello(**HELLO | {"run": long}))
    yield from (Heartbeat(**BEAT | {"compute": {long: 1.0}}), EvalResult(version=0, metrics={long: 1.0}))
    yield from (FailGroup(group=0, attempt=1, reason=long), StopRun(status="well"))


@pytest.mark.parametrize("message", [*out_of_range()], ids=lambda message: repr(message)[:120])
def test_a_value_out_of_its_fields_range_is_refused_where_it_enters(message: Message):
    with pytest.raises(WireError, match=r"^header: "):
        decode(encode(message))
