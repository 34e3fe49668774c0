"""Delta encoding: the same bits come out, chains are kept and checked, and a reader refuses what it cannot build."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file

from offtrail.platform.learner import checkpoint
from offtrail.platform.weights.delta import Changes, _from_gaps, _gaps, apply
from offtrail.platform.weights.files import PIECE, Layout, Source, VersionFile, as_bytes
from offtrail.platform.weights.store import Publisher, Subscriber, WeightsError, checksum, copy_whole, whole_size

DTYPES = [torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.bool, torch.int64, torch.uint16]
N = 40_000
Tensors = dict[str, torch.Tensor]


def bits_equal(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        (a[n].dtype, a[n].shape) == (b[n].dtype, b[n].shape)
        and np.array_equal(as_bytes(a[n].contiguous()), as_bytes(b[n].contiguous()))
        for n in b
    )


def weights(version: int) -> Tensors:
    """A thousandth of ``w`` changes from version to version; ``still`` never does; ``dense`` is all new."""
    w = torch.linspace(-1, 1, N).to(torch.bfloat16)
    for step in range(1, version + 1):
        w[step % 7 :: 1000] *= 1 + 2**-6 * (-1) ** step
    return {"w": w, "still": torch.arange(5000.0), "dense": torch.full((7, 3), float(version))}


def file_of(folder: Path, version: int) -> Path:
    return folder / f"v{version:08d}.safetensors"


def kept(folder: Path) -> list[int]:
    return sorted(int(path.name[1:9]) for path in folder.glob("v*.safetensors"))


def metadata(path: Path) -> dict[str, str]:
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]


def rewrite(path: Path, **changed: str) -> None:
    """The same tensors under other metadata."""
    told, tensors = metadata(path) | changed, load_file(path)
    path.unlink()
    sources = {name: Source.of(tensor) for name, tensor in tensors.items()}
    file = VersionFile(path, mapped=False)
    file.write(sources, Layout.of(sources, told), told)
    file.close()


@pytest.fixture
def publisher(tmp_path):
    publisher = Publisher(tmp_path / "weights", keep=2, full_every=5)
    yield publisher
    publisher.close()


@pytest.fixture
def reader(publisher):
    return Subscriber(publisher.folder)


# What a change is


@st.composite
def changed_bytes(draw):
    """A tensor's bytes before and after: elements redrawn, stepped or left, densely or rarely, in runs or alone."""
    dtype = draw(st.sampled_from(DTYPES))
    size, seed = draw(st.integers(0, 3000)), draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    width = dtype.itemsize
    before = rng.integers(0, 256, size * width).astype(np.uint8)
    if dtype == torch.bool:
        before &= 1
    after = before.copy().view({1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[width])
    share = draw(st.sampled_from([0.0, 0.001, 0.02, 0.3, 0.9, 1.0]))
    where = rng.random(size) < share
    if draw(st.booleans()) and size:
        where[rng.integers(size) :] = False  # one run of changes before, none after
    least = draw(st.sampled_from([1, 127, 128, 129, 2**15, 2**31, 2**63]))
    steps = rng.choice(np.array([least, 1, 2**64 - 1, 2**64 - least], np.uint64), size).astype(after.dtype)
    after[where] += steps[where]
    if dtype == torch.bool:
        after &= 1
    return dtype, before, after.view(np.uint8)


def tensor_of(dtype: torch.dtype, data: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(data.copy()).view(dtype) if len(data) else torch.empty(0, dtype=dtype)


@settings(max_examples=300, deadline=None)
@given(st.lists(changed_bytes(), min_size=1, max_size=3), st.permutations(range(30)))
def test_any_change_makes_the_same_bits(changes, order):
    held = {f"layers.{i}": tensor_of(dtype, before) for i, (dtype, before, _) in enumerate(changes)}
    apart = {name: tensor.clone() for name, tensor in held.items()}
    found = Changes(held)
    pieces = []
    for i, (dtype, _, after) in enumerate(changes):
        step = 128 * dtype.itemsize  # as PIECE, a multiple of eight elements
        pieces += [(f"layers.{i}", at, after[at : at + step]) for at in range(0, len(after), step)]
    for place in sorted(range(len(pieces)), key=lambda p: order[p % 30]):
        found.take(*pieces[place])
    parts = found.parts()
    wanted = {f"layers.{i}": tensor_of(dtype, after) for i, (dtype, _, after) in enumerate(changes)}
    assert bits_equal(held, wanted)
    apply(apart, parts)
    assert bits_equal(apart, wanted)
    for i, (_, before, after) in enumerate(changes):
        bytes_of = sum(t.nbytes for name, t in parts.items() if name.split("::")[0] == f"layers.{i}")
        assert bytes_of <= len(after)
        assert bytes_of or np.array_equal(before, after)
        assert not bytes_of or not np.array_equal(before, after)


@pytest.mark.parametrize(
    ("where", "gaps"),
    [
        ([0, 1, 2], [0, 0, 0]),
        ([300], [255, 45]),
        ([254, 510], [254, 255, 0]),  # 254 unchanged, then 255
        ([0, 1, 2, 3, 4, 770], [0, 0, 0, 0, 0, 255, 255, 255, 0]),
        ([1], [1]),
    ],
)
def test_gaps_by_hand(where, gaps):
    coded = _gaps(np.array(where))
    assert coded.dtype == np.uint8
    assert coded.tolist() == gaps
    assert _from_gaps(coded).tolist() == where


def test_rare_changes_take_wider_gaps():
    for every, dtype in ((100, np.uint8), (10_000, np.uint16), (10_000_000, np.uint32)):
        where = np.arange(1, 40) * every
        coded = _gaps(where)
        assert coded.dtype == dtype
        assert _from_gaps(coded).tolist() == where.tolist()


def test_bits_are_compared_not_values():
    held = {"a": torch.tensor([0.0, float("nan"), 1.0])}
    found = Changes(held)
    found.take("a", 0, as_bytes(torch.tensor([-0.0, float("nan"), 1.0])))
    assert str(held["a"][0]) == "tensor(-0.)"
    assert found.parts()
    same = Changes(held)
    same.take("a", 0, as_bytes(held["a"].clone()))
    assert same.parts() == {}


def test_a_bfloat16_change_takes_two_bytes_where_whole_takes_two_thousand():
    held = {"w": torch.ones(1000, 500, dtype=torch.bfloat16)}
    new = held["w"].clone()
    new.view(-1)[::1000] = 1 + 2**-7
    found = Changes(held)
    for begin in range(0, new.nbytes, PIECE):
        found.take("w", begin, as_bytes(new)[begin : begin + PIECE])
    # 500 changes: a gap of 999 is 255, 255, 255, 234 in bytes, or one word of 16 bits; a step of 1 is a byte
    assert {name: t.nbytes for name, t in found.parts().items()} == {"w::gaps": 1000, "w::steps": 500, "w::values": 0}


def test_changes_of_another_version_are_refused():
    held = {"w": torch.zeros(10)}
    with pytest.raises(WeightsError, match="which the version before does not have"):
        apply(held, {"v": torch.zeros(10)})
    steps, none = torch.ones(1, dtype=torch.int16), torch.zeros(0, dtype=torch.int32)
    with pytest.raises(WeightsError, match="1 changes at 1 places of w, which has 10 elements"):
        apply(held, {"w::gaps": torch.tensor([10], dtype=torch.uint8), "w::steps": steps, "w::values": none})


# Chains


def test_a_reader_goes_on_or_begins_late(publisher, reader):
    shares = []
    for version in range(12):
        digest = publisher.publish(version, weights(version))
        shares.append(publisher.delta_share)
        assert digest == checksum(weights(version))
        for subscriber in (reader, Subscriber(publisher.folder)):
            with subscriber.open(version) as found:
                assert bits_equal(found, weights(version))
                assert (found.version, found.checksum, found.folder) == (version, digest, publisher.folder)
    assert [share == 1 for share in shares] == [version % 5 == 0 for version in range(12)]
    # N/1000 steps and gaps of 2 bytes beside 21 floats, in a file whose header takes a page
    assert all(share < 0.1 for share in shares if share != 1)


def test_chains_are_kept_back_to_the_whole_version(publisher):
    told = {}
    for version in range(12):
        publisher.publish(version, weights(version))
        told[version] = kept(publisher.folder)
    assert told[4] == [0, 1, 2, 3, 4]
    assert told[5] == [0, 1, 2, 3, 4, 5]  # 4 is kept
    assert told[6] == [5, 6]
    assert told[10] == [5, 6, 7, 8, 9, 10]
    assert told[11] == [10, 11]
    late = Subscriber(publisher.folder)
    with late.open(11) as found:
        assert bits_equal(found, weights(11))


def test_a_reader_may_skip_and_go_back(publisher, reader):
    for version in range(5):
        publisher.publish(version, weights(version))
    for version in (3, 1, 4, 4, 0, 2):
        with reader.open(version) as found:
            assert bits_equal(found, weights(version))


def test_what_is_open_stays_while_another_is_read(publisher, reader):
    for version in range(3):
        publisher.publish(version, weights(version))
    with reader.open(1) as first, reader.open(2) as second, reader.open(0) as third:
        assert [bits_equal(found, weights(v)) for v, found in ((1, first), (2, second), (0, third))] == [True] * 3
    with reader.open(2) as found:
        assert bits_equal(found, weights(2))


def test_bytes_are_counted(publisher):
    for version in range(7):
        publisher.publish(version, weights(version))
    sizes = [file_of(publisher.folder, version).stat().st_size for version in kept(publisher.folder)]
    assert sizes[-1] == publisher.bytes_last
    assert publisher.delta_share == publisher.bytes_last / whole_size(publisher.folder, 6)
    assert publisher.bytes_published > sum(sizes)
    assert whole_size(publisher.folder, 6) == file_of(publisher.folder, 5).stat().st_size


def test_a_change_that_is_not_worth_it_is_written_whole(publisher, reader):
    for version in range(4):
        publisher.publish(version, {"w": torch.randn(N, generator=torch.Generator().manual_seed(version))})
        assert publisher.delta_share == 1
    assert kept(publisher.folder) == [2, 3]
    assert "base" not in metadata(file_of(publisher.folder, 3))


def test_other_tensors_are_written_whole(publisher, reader):
    publisher.publish(0, weights(0))
    for version, tensors in enumerate(
        [weights(0) | {"more": torch.zeros(1)}, weights(0), weights(0) | {"w": torch.zeros(N)}], start=1
    ):
        publisher.publish(version, tensors)
        assert publisher.delta_share == 1
        with reader.open(version) as found:
            assert bits_equal(found, tensors)


def test_changes_are_of_what_was_published_not_of_what_was_given(tmp_path):
    publisher = Publisher(tmp_path / "weights", dtype=torch.bfloat16, full_every=5)
    reader = Subscriber(publisher.folder)
    w = torch.linspace(-1, 1, N)
    for version in range(4):
        publisher.publish(version, {"w": w})
        published = w.to(torch.bfloat16)
        w[::1000] += 1.0  # in place, as an optimizer does
        w[1::1000] *= 1 + 2**-20  # nothing in bfloat16
    assert publisher.delta_share < 0.2
    with reader.open(3) as found:
        assert torch.equal(found["w"], published)
    publisher.close()


# Damage


def test_damage_of_a_change_is_told_and_nothing_is_handed_out(publisher, reader):
    for version in range(3):
        publisher.publish(version, weights(version))
    with reader.open(1):
        pass
    path = file_of(publisher.folder, 2)
    whole = path.read_bytes()
    for broken in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:-1], whole[:100]):
        path.write_bytes(broken)
        with pytest.raises(WeightsError, match=r"v00000002\.safetensors is damaged"):
            reader.open(2)
    path.write_bytes(whole)
    file_of(publisher.folder, 0).unlink()
    with reader.open(2) as found:  # from version 1, which it still has
        assert bits_equal(found, weights(2))


def test_damage_of_the_whole_version_below_is_told(publisher):
    for version in range(3):
        publisher.publish(version, weights(version))
    path = file_of(publisher.folder, 0)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    late = Subscriber(publisher.folder)
    for _ in range(2):
        with pytest.raises(WeightsError, match=r"v00000000\.safetensors is damaged"):
            late.open(2)


def test_a_missing_base_is_named(publisher, reader):
    for version in range(4):
        publisher.publish(version, weights(version))
    with reader.open(1):
        pass
    file_of(publisher.folder, 1).unlink()
    with pytest.raises(WeightsError, match=r"version 2 holds .* since version 1, which is not in .* any more"):
        Subscriber(publisher.folder).open(3)
    with reader.open(3) as found:  # it has version 1
        assert bits_equal(found, weights(3))


def test_another_base_is_named(publisher, reader):
    for version in range(3):
        publisher.publish(version, weights(version))
    digest = metadata(file_of(publisher.folder, 1))["checksum"]
    rewrite(file_of(publisher.folder, 1), checksum="f" * 32)
    with pytest.raises(
        WeightsError, match=rf"version 2 .* since version 1 with checksum {digest}, but the version 1 in .* has f{{32}}"
    ):
        reader.open(2)


def test_a_result_that_differs_is_refused_and_forgotten(publisher, reader):
    for version in range(3):
        publisher.publish(version, weights(version))
    good = metadata(file_of(publisher.folder, 2))["checksum"]
    rewrite(file_of(publisher.folder, 2), checksum="f" * 32)
    with pytest.raises(WeightsError, match=r"does not lead to version 2: the result has checksum"):
        reader.open(2)
    rewrite(file_of(publisher.folder, 2), checksum=good)
    with reader.open(2) as found:
        assert bits_equal(found, weights(2))


def test_after_a_write_that_failed_the_next_is_whole(publisher, reader, monkeypatch):
    publisher.publish(0, weights(0))
    publisher.publish(1, weights(1))

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fail)
        with pytest.raises(WeightsError, match="No space left"):
            publisher.publish(2, weights(2))
    assert kept(publisher.folder) == [0, 1]
    publisher.publish(2, weights(2))
    assert publisher.delta_share == 1
    with reader.open(2) as found:
        assert bits_equal(found, weights(2))


# Pins, restarts, checkpoints


def test_a_pinned_change_is_whole_and_outlives_its_chain(publisher):
    for version in range(4):
        publisher.publish(version, weights(version))
    publisher.pin(3)
    publisher.pin(3)
    pinned = file_of(publisher.folder / "pinned", 3)
    assert bits_equal(load_file(pinned), weights(3))
    for version in range(4, 12):
        publisher.publish(version, weights(version))
    evaluator = Subscriber(publisher.folder)
    for _ in range(2):
        with evaluator.open(3) as found:
            assert bits_equal(found, weights(3))
            assert found.folder == publisher.folder
    evaluator.unpin(3)
    with pytest.raises(FileNotFoundError):
        evaluator.open(3)


def test_a_replay_after_a_restart_begins_whole_and_readers_follow(tmp_path):
    folder = tmp_path / "weights"
    first, reader = Publisher(folder, full_every=10), Subscriber(folder)
    dead = weights(0)
    for version in range(4):
        first.publish(version, weights(version) if version < 3 else dead | {"dense": torch.full((7, 3), -1.0)})
    with reader.open(3):  # of the lineage that dies
        pass
    first.close()
    again = Publisher(folder, full_every=10)
    digests = {version: again.publish(version, weights(version)) for version in (2, 3, 4)}
    assert "base" not in metadata(file_of(folder, 2))
    assert metadata(file_of(folder, 3))["base"] == "2"
    with reader.open(4) as found:
        assert bits_equal(found, weights(4))
    again.publish(3, weights(3))  # a version that is there already, and older than the last
    assert "base" not in metadata(file_of(folder, 3))
    with reader.open(3) as found:
        assert found.checksum == digests[3]
    again.close()


def test_a_checkpoints_window_holds_whole_versions(publisher, tmp_path):
    digests = {version: publisher.publish(version, weights(version)) for version in range(4)}
    (tmp_path / "step_4" / "window").mkdir(parents=True)
    for version in (2, 3):
        copy_whole(publisher.folder, version, file_of(tmp_path / "step_4" / "window", version))
    window = checkpoint.read_window(tmp_path / "step_4")
    assert list(window) == [2, 3]
    for version, tensors in window.items():
        assert bits_equal(tensors, weights(version))
        assert checksum(tensors) == digests[version]
