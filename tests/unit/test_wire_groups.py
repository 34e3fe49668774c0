"""Groups: bit-exact through frames and blobs, checked on arrival, never anything but WireError on damage."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offtrail.core.types import Group, Problem
from offtrail.platform.wire.codec import WireError, decode, encode
from offtrail.platform.wire.groups import arrays_per_group, group_frames, group_from, pack_group, unpack_group
from offtrail.platform.wire.messages import Acknowledged, BatchReply, SubmitGroup


def make_group(
    lengths: list[int], seed: int = 0, components: tuple[str, ...] = ("accuracy",), nodes: bool = False
) -> Group:
    rng = np.random.default_rng(seed)
    G, T = len(lengths), sum(lengths)
    return Group(
        group=seed,
        slot=3,
        attempt=2,
        problem=Problem("chain", 5, "1 + 1 = ?", "2", {"operations": ["+1"], "start": 1}),
        generator="generator-0",
        temperature=0.9,
        prompt_tokens=rng.integers(0, 60, 7, dtype=np.int32),
        lengths=np.array(lengths, np.int32),
        tokens=rng.integers(0, 60, T, dtype=np.int32),
        logprobs=-rng.random(T, dtype=np.float32),
        versions=rng.integers(0, 4, T, dtype=np.int32),
        finish=rng.integers(0, 3, G, dtype=np.uint8),
        rewards=rng.random(G, dtype=np.float32),
        components={name: rng.random(G, dtype=np.float32) for name in components},
        times=rng.random((G, 3)),
        channels={"node": np.arange(T, dtype=np.int64)} if nodes else {},
        queued_version=4,
        queued_at=12.5,
    )


def plain(group: Group) -> dict[str, object]:
    """All fields by value; arrays as dtype, shape and bytes, so that equal means bit for bit."""

    def value(found: object) -> object:
        if isinstance(found, np.ndarray):
            return found.dtype.str, found.shape, found.tobytes()
        return {k: value(v) for k, v in found.items()} if isinstance(found, dict) else found

    return {field.name: value(getattr(group, field.name)) for field in fields(group)}


GROUPS = st.builds(
    make_group,
    st.lists(st.integers(0, 40), min_size=1, max_size=9),
    st.integers(0, 2**31),
    st.lists(st.text(max_size=8), unique=True, max_size=3).map(tuple),
    st.booleans(),
)


@given(GROUPS)
def test_round_trips_are_exact(group):
    header, arrays = group_frames(group)
    message, views = decode([bytes(frame) for frame in encode(SubmitGroup(header=header), arrays)])
    assert isinstance(message, SubmitGroup)
    assert plain(group_from(message.header, views)) == plain(group)
    assert plain(unpack_group(pack_group(group))) == plain(group)


def test_large_groups_round_trip():
    group = make_group([9000] * 8, nodes=True)
    assert plain(unpack_group(memoryview(pack_group(group)))) == plain(group)


def test_arrays_of_a_batch_are_cut_by_the_headers():
    groups = [make_group([3, 4], 1), make_group([5], 2, ("accuracy", "format"), nodes=True), make_group([0, 1], 3, ())]
    parts = [group_frames(group) for group in groups]
    reply = BatchReply(step=0, headers=[header for header, _ in parts])
    message, arrays = decode(encode(reply, [array for _, part in parts for array in part]))
    assert isinstance(message, BatchReply)
    for header, group in zip(message.headers, groups, strict=True):
        count = arrays_per_group(header)
        assert plain(group_from(header, arrays[:count])) == plain(group)
        arrays = arrays[count:]
    assert arrays == []


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("lengths", np.array([3, -1], np.int32), "lengths sum to 2"),
        ("lengths", np.array([2, 1], np.int32), "lengths sum to 3, but there are 4 tokens"),
        ("lengths", np.array(4, np.int32), "not one-dimensional"),
        ("lengths", np.zeros(0, np.int32), "empty"),
        ("prompt_tokens", np.zeros(0, np.int32), "empty"),
        ("prompt_tokens", np.array([[1]], np.int32), "not one-dimensional"),
        ("tokens", np.zeros((2, 2), np.int32), "tokens has shape"),
        ("tokens", np.array([1, 2, 3, -4], np.int32), "token ids span -4…"),
        ("tokens", np.zeros(4, np.int64), "tokens is int64, expected int32"),
        ("logprobs", np.zeros(5, np.float32), "logprobs has shape"),
        ("logprobs", np.array([0, 0, 0, np.nan], np.float32), "not finite"),
        ("logprobs", np.array([0, -np.inf, 0, 0], np.float32), "not finite"),
        ("logprobs", np.array([0, 0, 0, 0.5], np.float32), "above 0 .0.5."),
        ("rewards", np.array([1, np.inf], np.float32), "not finite"),
        ("finish", np.array([0, 3], np.uint8), "unknown finish reason 3"),
        ("times", np.zeros((3, 2)), "times has shape"),
        ("components", {"accuracy": np.zeros(3, np.float32)}, "accuracy has shape"),
        ("components", {"accuracy": np.zeros(2, np.float64)}, "component accuracy is float64"),
    ],
)
def test_what_is_wrong_with_a_group_is_named(field, value, says):
    group = make_group([2, 2])
    setattr(group, field, value)
    with pytest.raises(WireError, match=says):
        group_from(*group_frames(group))


def test_names_and_counts_must_agree_with_the_arrays():
    header, arrays = group_frames(make_group([2], components=("a", "b")))
    with pytest.raises(WireError, match="9 arrays, its header announces 10"):
        group_from(header, arrays[:-1])
    header.component_names[1] = "a"
    with pytest.raises(WireError, match="stands twice"):
        group_from(header, arrays)


@given(st.binary(max_size=300))
def test_garbage_blobs_give_nothing_but_wire_errors(blob):
    with pytest.raises(WireError):
        unpack_group(blob)


@given(st.integers(0, 10_000))
def test_truncated_blobs_give_nothing_but_wire_errors(cut):
    blob = pack_group(make_group([5, 6]))
    with pytest.raises(WireError):
        unpack_group(blob[: cut % len(blob)])


@given(st.data())
def test_damaged_blobs_decode_to_a_checked_group_or_give_a_wire_error(data):
    blob = bytearray(pack_group(make_group([5, 6])))
    blob[data.draw(st.integers(0, len(blob) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        group = unpack_group(bytes(blob))
    except WireError:
        return
    group.check()


def test_a_blob_of_another_message_is_refused():
    (frame,) = encode(Acknowledged())
    blob = (1).to_bytes(4, "little") + len(frame).to_bytes(8, "little") + bytes(frame)
    with pytest.raises(WireError, match="holds Acknowledged"):
        unpack_group(blob)
