"""The weight channel: a visible version is whole, stays readable while it is read, and damage is told."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from offtrail.platform.weights import store
from offtrail.platform.weights.store import Publisher, Subscriber, WeightsError, checksum, remove


def tensors(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {
        "b.weight": torch.full((3, 2), value),
        "a.weight": torch.arange(4, dtype=torch.bfloat16) * value,
        "empty": torch.zeros(0),
        "scalar": torch.tensor(value),
    }


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
    loaded = reader.load(12)
    assert loaded.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    assert checksum(loaded) == digest


def test_keeps_the_newest_by_number_not_by_name(publisher, reader):
    for version in (99_999_998, 99_999_999, 100_000_000):
        publisher.publish(version, tensors(version))
    assert reader.newest() == 100_000_000
    assert names(publisher.folder) == ["v100000000.safetensors", "v99999999.safetensors"]
    with pytest.raises(FileNotFoundError, match=r"version 99999998 is not in .* \(newest: 100000000\)"):
        reader.load(99_999_998)


def test_publishing_a_version_again_replaces_it(publisher, reader):
    publisher.publish(1, tensors(1))
    mapped = reader.load(1)
    publisher.publish(1, tensors(2))
    assert reader.load(1)["scalar"] == 2
    assert mapped["scalar"] == 1


def test_what_is_mapped_survives_removal(publisher, reader):
    publisher.publish(0, tensors(5))
    mapped = reader.load(0)
    publisher.publish(1, tensors())
    publisher.publish(2, tensors())
    assert not file_of(publisher.folder, 0).exists()
    assert torch.equal(mapped["b.weight"], torch.full((3, 2), 5.0))


def test_pinned_versions_stay_until_unpinned(publisher, reader):
    for version in range(4):
        publisher.publish(version, tensors(version))
        if version == 0:
            publisher.pin(0)
            publisher.pin(0)
    assert reader.newest() == 3
    assert reader.load(0)["scalar"] == 0
    reader.unpin(0)
    reader.unpin(0)
    with pytest.raises(FileNotFoundError):
        reader.load(0)
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
    assert reader.load(0)["scalar"] == 2


def test_tied_tensors_are_written_once(publisher, reader):
    embedding = torch.nn.Parameter(torch.randn(5, 3))
    publisher.publish(0, {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding})
    assert list(reader.load(0)) == ["model.embed_tokens.weight"]
    assert not reader.load(0)["model.embed_tokens.weight"].requires_grad


def test_views_of_one_storage_are_not_tied(publisher, reader):
    base = torch.arange(6.0).reshape(2, 3)
    publisher.publish(0, {"row": base[0], "column": base[:, 0], "turned": base.T, "base": base})
    loaded = reader.load(0)
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
    publisher.publish(3, tensors())
    path = file_of(publisher.folder, 3)
    whole = path.read_bytes()
    for broken in (whole[:-3], whole[:40], b"", whole[:-1] + b"\x55"):
        path.write_bytes(broken)
        with pytest.raises(WeightsError, match=r"v00000003\.safetensors is damaged"):
            reader.load(3)
    path.rename(file_of(publisher.folder, 4))
    file_of(publisher.folder, 4).write_bytes(whole)
    with pytest.raises(WeightsError, match="holds version 3, not 4"):
        reader.load(4)
    save_file({"a": torch.zeros(1)}, file_of(publisher.folder, 5))
    with pytest.raises(WeightsError, match="holds version None"):
        reader.load(5)


def test_no_room_names_folder_bytes_and_the_way_out(publisher, monkeypatch):
    usage = namedtuple("usage", "total used free")(10, 3, 1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(WeightsError) as error:
        publisher.publish(0, {"a": torch.zeros(1000)})
    assert str(publisher.folder) in str(error.value)
    assert "1,052,576 bytes" in str(error.value)
    assert "1,000,000 are free" in str(error.value)
    assert "weights.dir" in str(error.value)
    assert names(publisher.folder) == []


def test_a_failed_write_leaves_nothing(publisher, monkeypatch):
    def fail(_tensors, filename, metadata):
        Path(filename).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "save_file", fail)
    with pytest.raises(WeightsError, match=r"cannot be written .*No space left"):
        publisher.publish(0, tensors())
    assert names(publisher.folder) == names(publisher.folder / "writing") == []


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
    assert Subscriber(folder).load(7)["scalar"] == 7
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


KILLED_PUBLISHER = textwrap.dedent("""
    import os, signal, sys, time
    from pathlib import Path
    import torch
    from offtrail.platform.weights.store import Publisher, Subscriber

    folder, kills = Path(sys.argv[1]), int(sys.argv[2])
    reader, seen, halves = Subscriber(folder), 0, 0
    for kill in range(kills):
        child = os.fork()
        if child == 0:
            publisher, version = Publisher(folder, keep=2), 0
            while True:
                version += 1
                publisher.publish(version, {n: torch.full((size,), version) for n, size in [("a", 300_000), ("b", 7)]})
        while reader.newest() is None:
            time.sleep(0.001)
        time.sleep(0.003 * kill)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        halves += any((folder / "writing").iterdir())
        for path in folder.glob("v*.safetensors"):
            version = int(path.name[1:9])
            loaded = reader.load(version)
            assert (loaded["a"] == version).all() and (loaded["b"] == version).all()
            seen += 1
        for path in folder.glob("v*.safetensors"):
            path.unlink()
    print(seen, halves)
""")


def test_kill_9_never_shows_half_a_version(tmp_path):
    folder = tmp_path / "weights"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", KILLED_PUBLISHER, str(folder), "25"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    seen, halves = map(int, done.stdout.split())
    assert seen >= 25
    assert halves >= 1, "no kill fell into a write: the test proves nothing"
    Publisher(folder).close()
    assert names(folder) == names(folder / "writing") == []


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
