"""weights.channel=distributed: a learner broadcasts into two servers; the real command does with two FSDP2 ranks."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from fakes.client import VOCAB, Weights
from offtrail.core.protocols import Request
from offtrail.core.types import Sampling
from offtrail.platform.config.schema import Config, SglangConfig
from offtrail.platform.engines.channels import open_channel, open_reader
from offtrail.platform.engines.sglang.engine import SglangEngine
from offtrail.platform.engines.sglang.push import DistributedChannel, PushedReader
from offtrail.platform.weights.store import Subscriber

PROMPT, OUTPUT = np.arange(5, 25, dtype=np.int32), np.arange(30, 60, dtype=np.int32)


@pytest.fixture
def pair(
    request: pytest.FixtureRequest, weights: tuple[Weights, Weights], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[SglangEngine, DistributedChannel, PushedReader]]:
    """An engine with two servers, and the learner's and the generator's end of the channel."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    settings = SglangConfig(
        max_running=8, servers=2, start_seconds=240.0, hang_seconds=8.0, pause_mode=getattr(request, "param", "retract")
    )
    config = Config(engine=settings)
    config.weights.channel, config.weights.bucket_mb = "distributed", 1
    engine = SglangEngine(
        weights[0].path, settings, max_length=512, threads=1, owner="generator-0", count=2, run_dir=tmp_path,
        command="fake_sglang",
    )  # fmt: skip
    (tmp_path / "start").symlink_to(weights[0].path)
    channel = open_channel(config, tmp_path / "weights", tmp_path, 2)
    assert isinstance(channel, DistributedChannel)
    reader = open_reader(config, tmp_path / "weights")
    assert isinstance(reader, PushedReader)
    wait(engine, 2)
    yield engine, channel, reader
    channel.close()
    engine.close()


def wait(engine: SglangEngine, servers: int) -> None:
    limit = time.monotonic() + 240
    while engine.replicas < servers:
        engine._raise_failure()
        time.sleep(0.05)
        assert time.monotonic() < limit, engine.servers.describe()


def load(engine: SglangEngine, reader: PushedReader, version: int) -> None:
    with reader.open(version) as pushed:
        engine.load_weights(version, pushed)


def gaps(engine: SglangEngine, weights: Weights) -> list[float]:
    """Largest |Δ log p| to transformers, of each server that holds the version loaded last."""
    theirs = weights.logprobs(PROMPT.tolist(), OUTPUT.tolist())
    found = []
    for replica in range(engine.replicas):
        with contextlib.suppress(ConnectionError):
            [scored] = engine.logprobs([PROMPT], [OUTPUT], 1.0, replica)
            found.append(float(np.abs(scored - theirs).max()))
    return found


def running(count: int = 2) -> list[Request]:
    rng = np.random.default_rng(count)
    return [Request(i, rng.integers(3, VOCAB, 20).astype(np.int32), 2, Sampling(200, 0.7)) for i in range(count)]


@pytest.mark.parametrize("pair", ["retract", pytest.param("abort", marks=pytest.mark.prove)], indirect=True)
def test_versions_reach_all_servers_in_flight(
    pair: tuple[SglangEngine, DistributedChannel, PushedReader], weights: tuple[Weights, Weights]
) -> None:
    engine, channel, reader = pair
    assert channel.publish(0, dict(weights[0].named)) != ""
    for version in range(1, 11):
        engine.generate(running())
        side = weights[version % 2]
        channel.publish(version, dict(side.named), probe=[-1.0])
        assert reader.probe(version) == [-1.0]
        load(engine, reader, version)
        assert engine.version == version
        assert max(gaps(engine, side)) < 1e-4
        done = []
        while engine.unfinished:
            done += engine.step()
        assert engine.lost() == []
        assert {int(v) for c in done for v in c.versions} <= {version - 1, version}
        assert all(len(c.tokens) == 200 for c in done)
    assert channel.bytes_last == sum(tensor.nbytes for _, tensor in weights[0].named)
    with pytest.raises(FileNotFoundError, match="version 3 is not in"), reader.open(3):
        pass


def come_back(engine: SglangEngine, place: int) -> None:
    """Until the server at ``place`` has been started a second time and is up."""
    limit = time.monotonic() + 240
    while engine.servers.address(place).incarnation < 2 or engine.servers.address(place) not in engine._held:
        engine._raise_failure()
        time.sleep(0.05)
        assert time.monotonic() < limit, engine.servers.describe()


def all_hold(engine: SglangEngine, version: int) -> bool:
    limit = time.monotonic() + 240
    while set(engine._held.values()) != {version} and time.monotonic() < limit:
        time.sleep(0.05)
    return list(engine._held.values()) == [version] * 2


def test_a_server_that_dies_or_comes_late_is_given_the_newest_version(
    pair: tuple[SglangEngine, DistributedChannel, PushedReader], weights: tuple[Weights, Weights]
) -> None:
    """Killed between two pushes; hung during one, whose other server gets the version all the same."""
    engine, channel, reader = pair
    channel.publish(1, dict(weights[1].named))
    load(engine, reader, 1)
    os.kill(engine.servers._places[0].pid, signal.SIGKILL)  # type: ignore[attr-defined]
    channel.publish(2, dict(weights[0].named))
    load(engine, reader, 2)
    assert max(gaps(engine, weights[0])) < 1e-4
    come_back(engine, 0)
    load(engine, reader, 2)
    assert engine.version == 2  # the late one holds nobody up
    assert len(gaps(engine, weights[0])) == 1
    channel.serve_late_readers()
    assert all_hold(engine, 2)
    assert gaps(engine, weights[0]) == pytest.approx([0.0, 0.0], abs=1e-4)

    os.kill(engine.servers._places[1].pid, signal.SIGSTOP)  # type: ignore[attr-defined]
    channel.publish(3, dict(weights[1].named))
    load(engine, reader, 3)
    assert max(gaps(engine, weights[1])) < 1e-4
    come_back(engine, 1)
    load(engine, reader, 3)
    channel.serve_late_readers()
    assert all_hold(engine, 3)
    assert gaps(engine, weights[1]) == pytest.approx([0.0, 0.0], abs=1e-4)


def test_a_pinned_version_is_a_file_for_the_evaluator(
    pair: tuple[SglangEngine, DistributedChannel, PushedReader], weights: tuple[Weights, Weights], tmp_path: Path
) -> None:
    _, channel, _ = pair
    channel.publish(5, dict(weights[1].named))
    channel.pin(5)
    channel.publish(6, dict(weights[0].named))
    with Subscriber(tmp_path / "weights").open(5) as pinned:
        for name, tensor in weights[1].named:
            assert torch.equal(pinned[name], tensor)


def test_a_version_of_another_model_is_refused_before_a_server_is_spoken_to(
    weights: tuple[Weights, Weights], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoken(self: DistributedChannel) -> None:
        raise AssertionError("servers were looked for")

    monkeypatch.setattr(DistributedChannel, "_up", spoken)
    config = Config(engine=SglangConfig())
    config.weights.channel = "distributed"
    (tmp_path / "start").symlink_to(weights[0].path)
    channel = open_channel(config, tmp_path / "weights", tmp_path, 2)
    whole = dict(weights[0].named)
    name = sorted(whole)[0]
    for tensors, words in (
        ({key: tensor for key, tensor in whole.items() if key != name}, f"lacks {name}"),
        (whole | {"other.weight": whole[name]}, "holds in addition other.weight"),
        (whole | {name: whole[name][:-1]}, f"has another shape of {name}"),
    ):
        with pytest.raises(ValueError, match=f"version 7 is of another model: it {words}"):
            channel.publish(7, tensors)
    channel.publish(0, whole)
    with pytest.raises(AssertionError, match="servers were looked for"):
        channel.publish(1, whole)
    channel.close()
