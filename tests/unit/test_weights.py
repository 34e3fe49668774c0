"""The weight channel: a visible version is whole, stays readable while it is read, and damage is told."""

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import namedtuple
from collections.abc import Mapping
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file, save_file

from offtrail.platform.config.schema import Config, LocalConfig
from offtrail.platform.engines.local import LocalEngine
from offtrail.platform.model.tiny import save_start
from offtrail.platform.weights import files, store
from offtrail.platform.weights.files import file_system
from offtrail.platform.weights.probe import probe_text
from offtrail.platform.weights.store import Publisher, Subscriber, WeightsError, checksum, remove


def tensors(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {
        "b.weight": torch.full((3, 2), value),
        "a.weight": torch.arange(4, dtype=torch.bfloat16) * value,
        "empty": torch.zeros(0),
        "scalar": torch.tensor(value),
    }


def same(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name], tensor)


def value(reader: Subscriber, version: int) -> float:
    with reader.open(version) as weights:
        return float(weights["scalar"])


def file_of(folder: Path, version: int) -> Path:
    return folder / f"v{version:08d}.safetensors"


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_file() and p.name != "lock")


@pytest.fixture
def publisher(tmp_path):
    publisher = Publisher(tmp_path / "weights", keep=2)
    yield publisher
    publisher.close()


@pytest.fixture
def reader(publisher):
    return Subscriber(publisher.folder)


def test_round_trip(publisher, reader):
    assert reader.newest() is None
    digest = publisher.publish(12, tensors())
    assert names(publisher.folder) == ["v00000012.safetensors"]
    assert reader.newest() == 12
    with reader.open(12) as loaded:
        assert (loaded.version, loaded.folder, loaded.checksum) == (12, publisher.folder, digest)
        assert len(loaded) == 4
        same(loaded, tensors())
        assert checksum(loaded) == checksum(tensors()) == digest
    with pytest.raises(WeightsError, match="version 12 was let go"):
        loaded["scalar"]
    same(load_file(file_of(publisher.folder, 12)), tensors())  # a file as any other of safetensors


def test_keeps_the_newest_by_number_not_by_name(publisher, reader):
    for version in (99_999_998, 99_999_999, 100_000_000):
        publisher.publish(version, tensors(version))
    assert reader.newest() == 100_000_000
    assert names(publisher.folder) == ["v100000000.safetensors", "v99999999.safetensors"]
    with pytest.raises(FileNotFoundError, match=r"version 99999998 is not in .* \(newest: 100000000\)"):
        reader.open(99_999_998)


def test_publishing_a_version_again_replaces_it(publisher, reader):
    publisher.publish(1, tensors(1))
    with reader.open(1) as before:
        publisher.publish(1, tensors(2))
        assert value(reader, 1) == 2
        assert before["scalar"] == 1


def test_what_is_open_survives_removal(publisher, reader):
    publisher.publish(0, tensors(5))
    with reader.open(0) as opened:
        for version in range(1, 6):
            publisher.publish(version, tensors())
            assert torch.equal(opened["b.weight"], torch.full((3, 2), 5.0))
        assert not file_of(publisher.folder, 0).exists()


def test_pinned_versions_stay_until_unpinned(publisher, reader):
    for version in range(4):
        publisher.publish(version, tensors(version))
        if version == 0:
            assert publisher.pin(0) == publisher.pin(0) == publisher.bytes_last
    assert reader.newest() == 3
    assert value(reader, 0) == 0
    reader.unpin(0)
    reader.unpin(0)
    with pytest.raises(FileNotFoundError):
        reader.open(0)
    with pytest.raises(WeightsError, match="pin it when it is published"):
        publisher.pin(0)


def test_pinning_costs_no_bytes_and_follows_a_replay(publisher, reader):
    publisher.publish(0, tensors(1))
    publisher.pin(0)
    assert file_of(publisher.folder, 0).stat().st_nlink == 2
    publisher.publish(0, tensors(2))
    publisher.pin(0)
    assert names(publisher.folder / "pinned") == ["v00000000.safetensors"]
    publisher.publish(1, tensors())
    publisher.publish(2, tensors())
    assert value(reader, 0) == 2


def test_tied_tensors_are_written_once(publisher, reader):
    embedding = torch.nn.Parameter(torch.randn(5, 3))
    publisher.publish(0, {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding})
    with reader.open(0) as loaded:
        assert list(loaded) == ["model.embed_tokens.weight"]
        assert not loaded["model.embed_tokens.weight"].requires_grad


def test_views_of_one_storage_are_not_tied(publisher, reader):
    base = torch.arange(6.0).reshape(2, 3)
    publisher.publish(0, {"row": base[0], "column": base[:, 0], "turned": base.T, "base": base})
    with reader.open(0) as loaded:
        assert loaded["column"].tolist() == [0, 3]
        assert torch.equal(loaded["turned"], base.T)
        assert len(loaded) == 4


def test_checksum_knows_names_dtypes_shapes_and_bytes():
    base = {"a": torch.tensor([1, 2, 3, 4], dtype=torch.int32)}
    others = [
        {"b": base["a"]},
        {"a": base["a"].view(torch.float32)},
        {"a": base["a"].reshape(2, 2)},
        {"a": torch.tensor([1, 2, 3, 5], dtype=torch.int32)},
        base | {"b": torch.zeros(0)},
    ]
    assert len({checksum(t) for t in [base, *others]}) == 6
    assert checksum(base) == checksum({"a": base["a"].clone()})
    assert checksum({"a": base["a"], "b": base["a"]}) == checksum({"b": base["a"], "a": base["a"]})


def test_damage_is_told(publisher, reader):
    publisher.publish(3, tensors(), probe=[-1.5])
    path = file_of(publisher.folder, 3)
    whole = path.read_bytes()
    for broken in (whole[:-3], whole[:40], b"", whole[:-1] + b"\x55"):
        path.write_bytes(broken)
        with pytest.raises(WeightsError, match=r"v00000003\.safetensors is damaged"):
            reader.open(3)
    path.rename(file_of(publisher.folder, 4))
    file_of(publisher.folder, 4).write_bytes(whole)
    with pytest.raises(WeightsError, match="holds version 3, not 4"):
        reader.open(4)
    altered = whole.replace(b"[-1.5]", b"[-2.5]")
    assert altered != whole
    path.write_bytes(altered)
    with pytest.raises(WeightsError, match="is damaged: its header"):
        reader.open(3)
    save_file({"a": torch.zeros(1)}, file_of(publisher.folder, 5))
    with pytest.raises(WeightsError, match="holds version None"):
        reader.open(5)


def test_no_room_names_folder_bytes_and_the_way_out(publisher, monkeypatch):
    usage = namedtuple("usage", "total used free")(10, 3, 1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(WeightsError) as error:
        publisher.publish(0, {"a": torch.zeros(1000)})
    assert str(publisher.folder) in str(error.value)
    assert "1,056,672 bytes" in str(error.value)
    assert "1,000,000 are free" in str(error.value)
    assert "weights.dir" in str(error.value)
    assert names(publisher.folder) == []


def test_a_failed_write_leaves_nothing(publisher, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fail)
        with pytest.raises(WeightsError, match=r"cannot be written .*No space left"):
            publisher.publish(0, tensors())
    assert names(publisher.folder) == names(publisher.folder / "writing") == []
    publisher.publish(0, tensors())


def test_only_dense_tensors(publisher):
    with pytest.raises(WeightsError, match="gather it"):
        publisher.publish(0, {"a": torch.empty(2, device="meta")})


def test_a_new_publisher_clears_the_old_ones_remains_but_not_pins(tmp_path):
    folder = tmp_path / "weights"
    first = Publisher(folder)
    first.publish(7, tensors(7))
    first.pin(7)
    first.close()
    (folder / "writing" / "v00000008.safetensors").write_bytes(b"half")
    (folder / "notes.txt").write_text("mine")
    second = Publisher(folder)
    assert names(folder) == ["notes.txt"]
    assert names(folder / "pinned") == ["v00000007.safetensors"]
    assert names(folder / "writing") == []
    assert Subscriber(folder).newest() is None
    assert value(Subscriber(folder), 7) == 7
    second.close()
    remove(folder)
    assert [p.name for p in folder.iterdir()] == ["notes.txt"]
    (folder / "notes.txt").unlink()
    remove(folder)
    remove(folder)
    assert not folder.exists()


def test_one_publisher_a_folder(publisher):
    with pytest.raises(WeightsError, match="another run publishes into"):
        Publisher(publisher.folder)


def test_folder_is_private_and_refused_where_it_cannot_be(tmp_path, monkeypatch):
    Publisher(tmp_path / "mine").close()
    assert (tmp_path / "mine").stat().st_mode & 0o777 == 0o700
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightsError, match=r"set weights\.dir"):
        Publisher(tmp_path / "file" / "below")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    with pytest.raises(WeightsError, match="is not a folder of user"):
        Publisher(tmp_path / "link")
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(WeightsError, match="is not a folder of user 12345"):
        Publisher(tmp_path / "mine")
    with pytest.raises(ValueError, match="keep=0"):
        Publisher(tmp_path / "mine", keep=0)


def inode(path: Path) -> int:
    return path.stat().st_ino


def test_a_retired_file_is_written_again_where_nobody_reads_it(publisher, reader):
    publisher.publish(0, tensors(0))
    first = inode(file_of(publisher.folder, 0))
    publisher.publish(1, tensors(1))
    publisher.publish(2, tensors(2), probe=[-1.0] * 24)
    assert len(names(publisher.folder / "writing")) == 1
    publisher.publish(3, tensors(3))
    assert inode(file_of(publisher.folder, 3)) == first
    for version in range(4, 20):
        publisher.publish(version, tensors(version), probe=[-1.0] * (version % 2 * 24))
        assert value(reader, version - 1) == version - 1
        assert value(reader, version) == version
    assert first in {inode(file_of(publisher.folder, version)) for version in (18, 19)} | {
        inode(path) for path in (publisher.folder / "writing").iterdir()
    }
    assert len(names(publisher.folder / "writing")) == 1


def test_a_file_that_is_read_is_not_written_and_comes_back_later(publisher, reader):
    publisher.publish(0, tensors(0))
    held = inode(file_of(publisher.folder, 0))
    with reader.open(0) as opened, Subscriber(publisher.folder).open(0) as again:
        for version in range(1, 8):
            publisher.publish(version, tensors(version))
            assert inode(file_of(publisher.folder, version)) != held
        same(opened, tensors(0))
        opened.close()
        publisher.publish(8, tensors(8))
        assert inode(file_of(publisher.folder, 8)) != held
        same(again, tensors(0))
    published = []
    for version in range(9, 12):
        publisher.publish(version, tensors(version))
        published.append(inode(file_of(publisher.folder, version)))
    assert held in published or held not in {inode(p) for p in (publisher.folder / "writing").iterdir()}
    assert len(names(publisher.folder / "writing")) == 1


def test_a_pinned_file_is_not_written_while_it_is_pinned(publisher, reader):
    publisher.publish(0, tensors(0))
    publisher.pin(0)
    held = inode(file_of(publisher.folder, 0))
    for version in range(1, 8):
        publisher.publish(version, tensors(version))
        assert inode(file_of(publisher.folder, version)) != held
        assert value(reader, 0) == 0
    with reader.open(0) as opened:
        reader.unpin(0)
        publisher.publish(8, tensors(8))
        publisher.publish(9, tensors(9))
        same(opened, tensors(0))
    for version in range(10, 13):
        publisher.publish(version, tensors(version))
    assert len(names(publisher.folder / "writing")) == 1


def held_files() -> set[str]:
    """Names of versions that this process has mapped, removed ones too."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split(maxsplit=5)[5] for line in lines if ".safetensors" in line}


def test_without_reuse_nothing_of_a_retired_version_is_held(tmp_path):
    publisher, reader = Publisher(tmp_path / "w", keep=1, reuse=False), Subscriber(tmp_path / "w", reuse=False)
    for version in range(3):
        publisher.publish(version, tensors(version))
        assert value(reader, version) == version
        assert names(publisher.folder) == [f"v{version:08d}.safetensors"]
        assert not list((publisher.folder / "writing").iterdir())
        assert not held_files()
    publisher.close()


def test_an_unpinned_version_is_not_held_by_its_readers_map(tmp_path):
    publisher, reader = Publisher(tmp_path / "w", keep=1, reuse=False), Subscriber(tmp_path / "w")
    publisher.publish(0, tensors(0))
    publisher.pin(0)
    assert value(reader, 0) == 0
    publisher.publish(1, tensors(1))
    assert held_files()
    reader.unpin(0)
    assert not held_files()
    publisher.close()


def test_other_sizes_take_new_files(publisher, reader):
    for version in range(6):
        publisher.publish(version, {"a": torch.full((10_000 * (version + 1),), float(version))})
        with reader.open(version) as weights:
            assert weights["a"].tolist() == [version] * 10_000 * (version + 1)
    assert len(names(publisher.folder / "writing")) == 1


def test_nothing_is_written_again_on_a_file_system_of_many_hosts(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "file_system", lambda folder: None)
    publisher = Publisher(tmp_path / "weights", keep=1)
    publisher.publish(0, tensors(0))
    with Subscriber(publisher.folder).open(0) as opened:
        publisher.publish(1, tensors(1))
        publisher.publish(2, tensors(2))
        assert len(names(publisher.folder / "writing")) == 1  # stays for its reader, and no other
        same(opened, tensors(0))
    publisher.publish(3, tensors(3))
    assert names(publisher.folder / "writing") == []
    publisher.close()


def test_a_file_system_without_locks_takes_new_files(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(store, "file_system", lambda folder: None)
    monkeypatch.setattr(files.fcntl, "fcntl", no_locks)
    publisher = Publisher(tmp_path / "weights")
    for version in range(5):
        publisher.publish(version, tensors(version))
        assert value(Subscriber(publisher.folder), version) == version
        assert names(publisher.folder / "writing") == []
    publisher.close()


def test_file_systems_are_told_apart():
    assert file_system(Path("/dev/shm")) == "tmpfs"
    assert file_system(Path("/proc")) is None


@pytest.fixture(params=["shm", "disk"])
def place(request, tmp_path):
    """A folder in shared memory, where files are written through a map, and one on the disk."""
    if request.param == "disk":
        yield tmp_path / "weights"
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="offtrail-test-") as folder:
        yield Path(folder) / "weights"


def test_large_tensors_of_all_kinds_survive_many_rounds(place):
    publisher, reader = Publisher(place), Subscriber(place)
    for version in range(8):
        draw = torch.Generator().manual_seed(version)
        wanted = {
            "half": torch.randn(1_000_003, generator=draw).to(torch.bfloat16),
            "turned": torch.randn(1200, 701, generator=draw).T,
            "double": torch.randn(70_001, generator=draw, dtype=torch.float64),
            "bool": torch.randn(700_001, generator=draw) > 0,
            "long": torch.randint(0, 1 << 60, (33, 3), generator=draw),
            "big": torch.randn(9_000_000, generator=draw),  # above what two threads share
            "fp8": torch.randn(1001, generator=draw).to(torch.float8_e4m3fn),
        }
        digest = publisher.publish(version, wanted)
        with reader.open(version) as found:
            assert found.checksum == digest == checksum(wanted)
            for name, tensor in wanted.items():
                assert torch.equal(found[name].view(torch.uint8), tensor.contiguous().view(torch.uint8))
    publisher.close()


def test_tensors_are_cast_when_they_are_published(place):
    publisher, reader = Publisher(place, dtype=torch.bfloat16), Subscriber(place)
    wanted = {"w": torch.randn(300_001) * 1e3, "n": torch.arange(5), "b": torch.tensor([True])}
    for version in range(4):
        digest = publisher.publish(version, wanted)
    cast = wanted | {"w": wanted["w"].to(torch.bfloat16)}
    with reader.open(3) as found:
        same(found, cast)
    assert digest == checksum(cast)
    publisher.close()


def test_an_engine_of_bfloat16_is_the_same_by_either_cast(tmp_path):
    save_start(tmp_path / "start", Config().model, 0)
    weights = {n: t + 0.001 * torch.randn_like(t) for n, t in load_file(tmp_path / "start/model.safetensors").items()}
    config = LocalConfig(dtype="bfloat16", max_running=2)
    prompt, output = probe_text(32)
    scores = []
    for dtype in (None, torch.bfloat16):
        publisher = Publisher(tmp_path / "weights", dtype=dtype)
        publisher.publish(1, weights)
        engine = LocalEngine(tmp_path / "start", config, max_length=64, threads=1)
        with Subscriber(publisher.folder).open(1) as published:
            assert published["model.norm.weight"].dtype == (dtype or torch.float32)
            engine.load_weights(1, published)
        scores.append(engine.logprobs([prompt], [output], 1.0)[0])
        publisher.close()
    assert scores[0].tolist() == scores[1].tolist()


def test_what_was_loaded_does_not_change_with_the_memory_it_came_from(publisher, reader):
    publisher.publish(0, tensors(7))
    mine = {name: torch.zeros_like(tensor) for name, tensor in tensors().items()}
    with reader.open(0) as weights:
        weights["scalar"].fill_(9)  # a reader's own copy of the page
        for name, tensor in mine.items():
            tensor.copy_(weights[name])
    assert mine["scalar"] == 9
    assert value(Subscriber(publisher.folder), 0) == 7
    with pytest.raises(WeightsError, match="is damaged"):
        reader.open(0)


@pytest.mark.parametrize("now", [1, 3])
def test_a_file_that_was_taken_between_open_and_lock_is_not_read(publisher, reader, monkeypatch, now):
    """``now`` versions come out in between: the file has lost its name, or is written again already."""
    publisher.keep = 1
    publisher.publish(0, tensors(0))
    taken, lock = inode(file_of(publisher.folder, 0)), files._lock

    def late(file, kind):
        if kind == fcntl.F_RDLCK:
            monkeypatch.setattr(files, "_lock", lock)
            for version in range(1, 1 + now):
                publisher.publish(version, tensors(version))
            paths = [*publisher.folder.glob("v*"), *(publisher.folder / "writing").iterdir()]
            assert taken in {inode(path) for path in paths}
        return lock(file, kind)

    monkeypatch.setattr(files, "_lock", late)
    with pytest.raises(FileNotFoundError, match="version 0 is not in"):
        reader.open(0)
    assert value(reader, now) == now


def test_a_file_that_is_being_written_is_not_read(publisher, reader, monkeypatch):
    publisher.keep = 1
    publisher.publish(0, tensors(0))
    publisher.publish(1, tensors(1))
    held = os.open(next((publisher.folder / "writing").iterdir()), os.O_RDONLY)  # opened while it was version 0
    seen, sweep = [], files.sweep

    def spied(*args):
        seen.append(files._lock(held, fcntl.F_RDLCK))
        return sweep(*args)

    monkeypatch.setattr(files, "sweep", spied)
    publisher.publish(2, tensors(2))
    assert seen == [False]
    assert files._lock(held, fcntl.F_RDLCK)  # whole again
    os.close(held)


DO = st.lists(
    st.tuples(st.sampled_from(["publish", "publish", "pin", "unpin", "open", "close"]), st.integers(0, 6)), max_size=60
)


@settings(max_examples=150, deadline=None)
@given(DO, st.integers(1, 3), st.sampled_from([0, 1, 3]), st.booleans())
def test_whatever_is_done_a_reader_gets_the_version_it_asked_for(steps, keep, full_every, again):
    """Against a model: which versions must be readable, and what each holds. ``back``: versions before the newest."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="offtrail-test-") as folder:
        publisher, reader = Publisher(Path(folder) / "weights", keep, full_every=full_every), None
        held, pinned, newest = [], set(), -1
        for what, back in [("publish", 0), *steps]:
            version = max(0, newest - back)
            if what == "publish":
                newest += 1
                still = torch.zeros(5000)  # most of it stays, so that a change is worth it
                publisher.publish(newest, tensors(newest) | {"still": still})
            elif what == "pin" and newest - version < keep:
                publisher.pin(version)
                pinned.add(version)
            elif what == "unpin":
                Subscriber(publisher.folder).unpin(version)
                pinned.discard(version)
            elif what == "close" and held:
                held.pop(back % len(held)).close()
            elif what == "open":
                reader = reader if reader and again else Subscriber(publisher.folder)
                try:
                    held.append(reader.open(version))
                except FileNotFoundError:
                    assert newest - version >= keep
                    assert version not in pinned
            for weights in held:
                same({n: t for n, t in weights.items() if n != "still"}, tensors(weights.version))
        for weights in held:
            weights.close()
        publisher.close()


HAMMER = textwrap.dedent("""
    import sys, time
    from pathlib import Path
    import torch
    from offtrail.platform.weights.store import Subscriber, checksum

    reader, last, opened, gone = Subscriber(Path(sys.argv[1])), int(sys.argv[2]), 0, 0
    mine = [torch.zeros(200_000), torch.zeros(7)]
    print("ready", flush=True)
    version = -1
    while version < last:
        version = reader.newest()
        version = version - opened % 2 if version else -1  # a version that is about to go, too
        if version < 0:
            continue
        try:
            weights = reader.open(version)
        except FileNotFoundError:
            gone += 1
            continue
        with weights:
            time.sleep(0.002 * (opened % 3))
            for tensor, name in zip(mine, ("a", "b")):
                tensor.copy_(weights[name])
            assert checksum(weights) == weights.checksum
        assert all((tensor == version).all() for tensor in mine), version
        opened += 1
    print(opened, gone)
""")


@pytest.mark.parametrize("last", [200, pytest.param(400, marks=pytest.mark.prove)])
@pytest.mark.parametrize("full_every", [0, 5])
def test_readers_and_publisher_hammer_one_folder(place, full_every, last):
    publisher = Publisher(place, keep=2, full_every=full_every)
    command = [sys.executable, "-W", "error", "-c", HAMMER, str(place), str(last)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    readers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) for _ in range(2)]
    try:
        assert all(child.stdout.readline() == "ready\n" for child in readers)
        inodes = set()
        for version in range(1, last + 1):
            wanted = {"a": torch.full((200_000,), float(version)), "b": torch.full((7,), float(version))}
            if full_every:
                wanted["c"] = torch.arange(100_000.0)  # stays, so that a change is worth it
            publisher.publish(version, wanted)
            inodes.add(inode(file_of(place, version)))
            time.sleep(0.001)
        told = [child.communicate(timeout=60)[0].split() for child in readers]
    finally:
        for child in readers:
            child.kill()
            child.communicate()
        publisher.close()
    assert [child.returncode for child in readers] == [0, 0]
    assert all(int(opened) >= 50 for opened, _ in told)
    assert full_every or len(inodes) < last / 2, "hardly a file was written again: the test proves little"


KILLED_PUBLISHER = textwrap.dedent("""
    import contextlib, ctypes, os, signal, sys, time
    from pathlib import Path
    import torch
    from offtrail.platform.weights.files import Maps, Reading
    from offtrail.platform.weights.store import Publisher, Subscriber, WeightsError, _path

    folder, kills = Path(sys.argv[1]), int(sys.argv[2])

    def torn(path):
        (folder / "copy").mkdir(exist_ok=True)
        for version in range(1, 10_000):
            copy = _path(folder / "copy", version)
            os.link(path, copy)
            try:
                with Reading(copy, version, Maps()) as reading:
                    reading.verify()
                return False
            except WeightsError as error:
                if "holds version" not in str(error):
                    return True
            finally:
                copy.unlink()

    seen = halves = 0
    for kill in range(kills):
        child = os.fork()
        if child == 0:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: not to outlive a failed test
            publisher, version = Publisher(folder, keep=2), 0
            while True:
                version += 1
                publisher.publish(version, {n: torch.full((size,), version) for n, size in [("a", 300_000), ("b", 7)]})
        reader = Subscriber(folder)
        while (reader.newest() or 0) < 5:  # from the fourth on files are written again
            time.sleep(0.001)
        opened = None
        while opened is None:
            with contextlib.suppress(FileNotFoundError):  # retired while we looked
                opened = reader.open(reader.newest())
        with opened:
            time.sleep(0.003 * (kill % 7))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            assert (opened["a"] == opened.version).all()
        halves += any(torn(path) for path in (folder / "writing").iterdir())
        for path in folder.glob("v*.safetensors"):
            version = int(path.name[1:9])
            with reader.open(version) as loaded:
                assert (loaded["a"] == version).all() and (loaded["b"] == version).all()
            seen += 1
        for path in folder.glob("v*.safetensors"):
            path.unlink()
    print(seen, halves)
""")


def test_kill_9_never_shows_half_a_version(place):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", KILLED_PUBLISHER, str(place), "40"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    seen, halves = map(int, done.stdout.split())
    assert seen >= 40
    assert halves >= 1, "no kill fell into a file that was written again: the test proves nothing"
    publisher = Publisher(place)
    assert names(place) == names(place / "writing") == []
    publisher.publish(1, tensors(1))
    assert value(Subscriber(place), 1) == 1
    publisher.close()


def test_a_killed_publisher_frees_its_folder(tmp_path):
    code = f"""
import sys
from pathlib import Path
from offtrail.platform.weights.store import Publisher
p = Publisher(Path({str(tmp_path / "weights")!r}))
print("ready", flush=True)
sys.stdin.read()
"""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    ) as child:
        assert child.stdout.readline() == "ready\n"
        with pytest.raises(WeightsError, match="another run"):
            Publisher(tmp_path / "weights")
        child.send_signal(signal.SIGKILL)
    Publisher(tmp_path / "weights").close()
