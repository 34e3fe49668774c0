"""Groups: bit-exact through frames and blobs, checked on arrival, never anything but WireError on damage."""

from __future__ import annotations

import struct
import zlib
from dataclasses import fields, replace
from typing import get_args

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offtrail.core.types import SHORT, Axis, Channel, Group, Problem, ScoredBy
from offtrail.platform.wire.codec import WireError, decode, encode
from offtrail.platform.wire.groups import arrays_per_group, group_frames, group_from, pack_group, unpack_group
from offtrail.platform.wire.messages import Acknowledged, BatchReply, SubmitGroup

HEAD = struct.Struct("<4sHH")


def make_group(
    lengths: list[int], seed: int = 0, components: tuple[str, ...] = ("accuracy",), axes: tuple[Axis, ...] = ()
) -> Group:
    """Random values; a step ends at every other token or so, and there is a channel of each axis named."""
    rng = np.random.default_rng(seed)
    G, T = len(lengths), sum(lengths)
    ends = 1 + np.flatnonzero(rng.random(T) < 0.5).astype(np.int32)
    sizes = {"token": T, "step": len(ends), "sample": G, "node": 5}
    names = [f"{axis} {place}" for place, axis in enumerate(axes)]
    channels = {
        name: Channel(
            axis, rng.random(sizes[axis], np.float32) if rng.random() < 0.5 else np.arange(sizes[axis], dtype=np.int32)
        )
        for name, axis in zip(names, axes, strict=True)
    }
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
        channels=channels,
        step_ends=ends,
        scored_by={name: ScoredBy("prm", seed % 1000) for name in [*components, *names]},
        queued_version=4,
        queued_at=12.5,
        counts={"answers": float(G), "reflection": 0.1 * seed},
    )


def plain(group: Group) -> dict[str, object]:
    """All fields by value; arrays as dtype, shape and bytes, so that equal means bit for bit."""

    def value(found: object) -> object:
        if isinstance(found, np.ndarray):
            return found.dtype.str, found.shape, found.tobytes()
        if isinstance(found, Channel):
            return found.axis, value(found.values)
        return {k: value(v) for k, v in found.items()} if isinstance(found, dict) else found

    return {field.name: value(getattr(group, field.name)) for field in fields(group)}


GROUPS = st.builds(
    make_group,
    st.lists(st.integers(0, 40), min_size=1, max_size=9),
    st.integers(0, 2**31),
    st.lists(st.text(max_size=8), unique=True, max_size=3).map(tuple),
    st.lists(st.sampled_from(get_args(Axis)), max_size=5).map(tuple),
)


@given(GROUPS)
def test_round_trips_are_exact(group):
    header, arrays = group_frames(group)
    message, views = decode([bytes(frame) for frame in encode(SubmitGroup(header=header), arrays)])
    assert isinstance(message, SubmitGroup)
    assert plain(group_from(message.header, views)) == plain(group)
    assert plain(unpack_group(pack_group(group))) == plain(group)


def test_large_groups_round_trip():
    group = make_group([9000] * 8, axes=("token", "step"))
    assert plain(unpack_group(memoryview(pack_group(group)))) == plain(group)


@pytest.mark.parametrize("odd", range(8))
def test_large_arrays_of_a_blob_are_aligned_however_long_its_head(odd):
    group = replace(make_group([9000] * 8), generator="g" * odd)
    found = unpack_group(pack_group(group))
    assert all(array.flags.aligned for array in group_frames(found)[1])


def test_arrays_of_a_batch_are_cut_by_the_headers():
    groups = [
        make_group([3, 4], 1),
        make_group([5], 2, ("accuracy", "format"), ("node", "sample")),
        make_group([0, 1], 3, ()),
    ]
    parts = [group_frames(group) for group in groups]
    reply = BatchReply(step=0, headers=[header for header, _ in parts])
    message, arrays = decode(encode(reply, [array for _, part in parts for array in part]))
    assert isinstance(message, BatchReply)
    for header, group in zip(message.headers, groups, strict=True):
        count = arrays_per_group(header)
        assert plain(group_from(header, arrays[:count])) == plain(group)
        arrays = arrays[count:]
    assert arrays == []


EDGES = np.array([0.0, -0.0, 1e-45, -1e-45, 1e-4, -1e4], np.float32)
BEYOND = np.array(
    [np.nextafter(np.float32(1e-4), np.float32(1)), np.nextafter(np.float32(-1e4), np.float32(-2e4)),
     1.0, -3e38, np.inf, -np.inf, np.nan, -np.nan],
    np.float32,
)  # fmt: skip


@pytest.mark.parametrize("tokens", [3, SHORT + 1])
@pytest.mark.parametrize("others", [-0.5, 0.0])
def test_logprobs_are_checked_to_the_last_bit(tokens, others):
    def logprobs(value):
        found = np.full(tokens, others, np.float32)
        found[1] = value
        return replace(make_group([tokens]), logprobs=found)

    for value in EDGES:
        logprobs(value).check()
    for value in BEYOND:
        with pytest.raises(ValueError, match="log-probability"):
            logprobs(value).check()


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
        ("logprobs", np.array([0, 0, -1e38, 0], np.float32), "a log-probability of -1e[+]38 .* beyond -1e[+]04"),
        ("rewards", np.array([1, np.inf], np.float32), "not finite"),
        ("rewards", np.array([1, -3e38], np.float32), "a reward of 3e[+]38 is beyond"),
        ("finish", np.array([0, 3], np.uint8), "unknown finish reason 3"),
        ("times", np.zeros((3, 2)), "times has shape"),
        ("components", {"accuracy": np.zeros(3, np.float32)}, "accuracy has shape"),
        ("components", {"accuracy": np.zeros(2, np.float64)}, "component accuracy is float64"),
        ("components", {"accuracy": np.array([1, -np.inf], np.float32)}, "component accuracy is infinite"),
        ("step_ends", np.array([0, 2], np.int32), "must ascend within 1…4"),
        ("step_ends", np.array([2, 2], np.int32), "must ascend within 1…4"),
        ("step_ends", np.array([2, 5], np.int32), "must ascend within 1…4"),
        ("step_ends", np.array([[2]], np.int32), "must ascend within 1…4"),
        ("step_ends", np.array([2], np.int64), "step_ends is int64, expected int32"),
        (
            "channels",
            {"a": Channel("token", np.zeros(5, np.float32))},
            "a has shape .5,., expected .4,., one value a token",
        ),
        ("channels", {"a": Channel("token", np.zeros((2, 2), np.float32))}, "a has shape .2, 2., expected .4,."),
        ("channels", {"a": Channel("sample", np.zeros(4, np.float32))}, "expected .2,., one value a sample"),
        ("channels", {"a": Channel("step", np.zeros(1, np.float32))}, "expected .3,., one value a step"),
        (
            "channels",
            {"a": Channel("node", np.zeros(3, np.float32)), "b": Channel("node", np.zeros(2, np.int32))},
            "b has shape .2,., expected .3,., one value a node",
        ),
        ("channels", {"a": Channel("node", np.zeros((5, 7), np.float32))}, "a has shape .5, 7."),
        ("channels", {"a": Channel("sample", np.array([1, np.nan], np.float32))}, "a holds a value that is not finite"),
        (
            "channels",
            {"a": Channel("sample", np.array([1, -np.inf], np.float32))},
            "a holds a value that is not finite",
        ),
        ("channels", {"a": Channel("sample", np.zeros(2, np.float64))}, "a is float64, expected int32 or float32"),  # type: ignore[arg-type]
        ("channels", {"a": Channel("leaf", np.zeros(2, np.int32))}, "a has axis leaf"),  # type: ignore[arg-type]
        ("channels", {"parent": Channel("node", np.array([-1, 0, 2], np.int32))}, "each value an earlier node or -1"),
        ("channels", {"parent": Channel("node", np.array([0], np.int32))}, "each value an earlier node or -1"),
        ("channels", {"parent": Channel("node", np.array([-1, -2], np.int32))}, "each value an earlier node or -1"),
        ("channels", {"parent": Channel("node", np.array([-1, 0], np.float32))}, "must be int32 on axis node"),
        ("channels", {"parent": Channel("sample", np.array([-1, 0], np.int32))}, "must be int32 on axis node"),
        ("scored_by", {"style": ScoredBy("prm", 1)}, "scored_by names style, no component or channel"),
        ("scored_by", {"accuracy": ScoredBy("prm", -1)}, "accuracy was scored by version -1 of prm"),
        ("scored_by", {"accuracy": ScoredBy("prm", 1 << 31)}, "scored by version 2147483648 of prm"),
    ],
)
def test_what_is_wrong_with_a_group_is_named(field, value, says):
    group = replace(make_group([2, 2]), scored_by={}, step_ends=np.array([1, 2, 4], np.int32))
    setattr(group, field, value)
    with pytest.raises(WireError, match=says):
        group_from(*group_frames(group))


def test_a_group_never_mixes_versions_of_one_model_and_may_hold_several_models():
    group = make_group([2], components=("style",), axes=("step", "sample"))
    group.scored_by = {"style": ScoredBy("rm", 7), "step 0": ScoredBy("prm", 3), "sample 1": ScoredBy("prm", 3)}
    assert unpack_group(pack_group(group)).scored_by == group.scored_by
    group.scored_by["sample 1"] = ScoredBy("prm", 4)
    with pytest.raises(WireError, match="versions 3 and 4 of prm scored it, and a group never mixes versions"):
        unpack_group(pack_group(group))


def test_a_component_may_say_that_it_does_not_apply():
    group = replace(make_group([1, 1]), components={"accuracy": np.array([1, np.nan], np.float32)})
    assert plain(unpack_group(pack_group(group))) == plain(group)


def test_a_tree_is_nodes_that_come_after_their_parents():
    group = make_group([1, 2])
    group.channels = {"parent": Channel("node", np.array([-1, 0, 0, 2, -1], np.int32))}
    assert plain(unpack_group(pack_group(group))) == plain(group)


def test_a_step_is_of_the_sample_that_holds_its_end():
    # Samples are tokens 0…1, none, 2…4: ends 1 and 2 lie in the first, 3 and 5 in the third.
    group = replace(make_group([2, 0, 3]), step_ends=np.array([1, 2, 3, 5], np.int32))
    assert group.step_samples.tolist() == [0, 0, 2, 2]


@given(st.sampled_from(["channels", "scored_by", "component_names"]), st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
))  # fmt: skip
def test_hostile_header_fields_give_nothing_but_wire_errors(field, value):
    group = make_group([2, 1], axes=("step", "node"))
    header, arrays = group_frames(group)
    (frame,) = encode(SubmitGroup(header=header), arrays)
    told, *rest = msgspec.msgpack.decode(frame[HEAD.size :])
    told["header"][field] = value
    hostile = frame[: HEAD.size] + msgspec.msgpack.encode((told, *rest))
    try:
        message, views = decode([hostile])
        assert isinstance(message, SubmitGroup)
        group_from(message.header, views).check()
    except WireError:
        return


def test_names_and_counts_must_agree_with_the_arrays():
    header, arrays = group_frames(make_group([2], components=("a", "b")))
    with pytest.raises(WireError, match="10 arrays, its header announces 11"):
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


def sealed(blob: bytes) -> bytes:
    """With the checksum that pack_group puts behind it."""
    return blob + zlib.crc32(blob).to_bytes(4, "little")


@given(st.data())
def test_a_blob_with_a_damaged_byte_is_refused(data):
    blob = bytearray(pack_group(make_group([5, 6])))
    blob[data.draw(st.integers(0, len(blob) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(WireError, match="that is damaged: its checksum is another one"):
        unpack_group(bytes(blob))


@given(st.data())
def test_a_hostile_blob_decodes_to_a_checked_group_or_gives_a_wire_error(data):
    blob = bytearray(pack_group(make_group([5, 6]))[:-4])
    blob[data.draw(st.integers(0, len(blob) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        group = unpack_group(sealed(bytes(blob)))
    except WireError:
        return
    group.check()


def test_a_blob_of_another_message_is_refused():
    (frame,) = encode(Acknowledged())
    blob = (1).to_bytes(4, "little") + len(frame).to_bytes(8, "little") + bytes(frame)
    with pytest.raises(WireError, match="holds Acknowledged"):
        unpack_group(sealed(blob))
