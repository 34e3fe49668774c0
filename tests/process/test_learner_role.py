"""The learner's loop against a scripted broker: what is said in which order, what is on disk when it is said."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from offtrail.core.types import Batch
from offtrail.platform.config.schema import Config
from offtrail.platform.learner import checkpoint, role
from offtrail.platform.runtime.context import RoleContext
from offtrail.platform.weights.store import Subscriber, checksum
from offtrail.platform.wire.groups import group_frames
from offtrail.platform.wire.messages import (
    Acknowledged,
    BatchReply,
    Beat,
    Checkpointed,
    Commit,
    Committed,
    Heartbeat,
    Hello,
    Message,
    NextBatch,
    Welcome,
)
from offtrail.platform.wire.sockets import Envelope, Server, WaitError, make_keys

MakeBatch = Callable[..., Batch]


@dataclass
class ScriptedBroker:
    """Answers one learner: batch k as ``make`` gives it, one empty answer before each. Version ``last`` is the last, or
    the run is stopped at ``stop_at``. Versions of ``due`` are to be scored.
    """

    channel: Path
    make: Callable[[int], Batch]
    start: int = 0
    last: int = 4
    due: tuple[int, ...] = (0, 2, 4)
    stop_at: int = 1 << 30
    mute: bool = False
    said: list[str] = field(default_factory=list)
    checksums: dict[int, str] = field(default_factory=dict)
    readable: dict[int, list[int]] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    finished: bool = False
    asked: set[int] = field(default_factory=set)

    def answer(self, server: Server, envelope: Envelope) -> None:
        message = envelope.message
        if isinstance(message, NextBatch) and self.mute:
            return
        if isinstance(message, NextBatch) and message.step not in self.asked:
            self.asked.add(message.step)
            server.reply(envelope, BatchReply(step=message.step, headers=[], waiting="groups"))
        elif isinstance(message, NextBatch) and message.step < min(self.stop_at, self.last):
            frames = [group_frames(g) for g in self.make(message.step).groups]
            reply = BatchReply(step=message.step, headers=[header for header, _ in frames])
            server.reply(envelope, reply, [array for _, arrays in frames for array in arrays])
        else:
            server.reply(envelope, self.reply(message))

    def reply(self, message: Message) -> Message:
        match message:
            case Hello():
                return Welcome(run="run", step=self.start, evaluate=self.start in self.due)
            case Heartbeat():
                return Beat(version=-1, stop=self.finished)
            case NextBatch():
                over = message.step >= self.stop_at
                return BatchReply(step=message.step, headers=[], stop=over, finished=not over)
            case Commit():
                self.said.append(f"commit {message.step} → {message.version}{', pinned' * (message.pinned_bytes > 0)}")
                self.checksums[message.version] = message.checksum
                self.metrics = message.metrics
                subscriber = Subscriber(self.channel)
                self.readable[message.version] = [v for v in range(10) if exists(subscriber, v)]
                with subscriber.open(message.version) as weights:
                    assert weights.checksum == checksum(weights) == message.checksum
                return Committed(lineage=0, evaluate=message.version + 1 in self.due)
            case Checkpointed():
                self.said.append(f"checkpoint {message.step} {Path(message.path).name}")
                self.finished = message.step == self.last
                return Acknowledged()
        raise AssertionError(message)


def exists(subscriber: Subscriber, version: int) -> bool:
    try:
        with subscriber.open(version) as weights:
            return bool(weights)
    except FileNotFoundError:
        return False


@contextmanager
def serving(broker: ScriptedBroker, run_dir: Path) -> Iterator[None]:
    """The broker's endpoint in the run directory, answered by a thread."""
    server, over = Server("127.0.0.1", 0, make_keys(run_dir, "127.0.0.1")), threading.Event()
    server.endpoint.write(run_dir / "endpoint.json")

    def loop() -> None:
        while not over.is_set():
            for envelope in server.poll(0.02):
                broker.answer(server, envelope)

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        server.close()


@pytest.fixture
def context(tmp_path: Path, start_dir: Path) -> RoleContext:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "start").symlink_to(start_dir)
    config = Config()
    config.batch.groups, config.batch.group_size = 4, 3
    config.learner.steps, config.learner.checkpoint_every = 4, 2
    config.learner.optim.lr = 1e-3
    config.weights.dir = str(tmp_path / "channel")
    config.broker.heartbeat_seconds = 0.05
    config.broker.deadline_seconds = 20.0
    config.eval.every = 2
    return RoleContext(config, run_dir, "learner", 0)


def test_a_version_is_readable_when_it_is_committed(context: RoleContext, make_batch: MakeBatch) -> None:
    broker = ScriptedBroker(context.weights_folder, make_batch)
    with serving(broker, context.run_dir):
        role.main(context)
    assert broker.said == [
        "commit -1 → 0, pinned",
        "commit 0 → 1",
        "commit 1 → 2, pinned",
        "checkpoint 2 step_2",
        "commit 2 → 3",
        "commit 3 → 4, pinned",
        "checkpoint 4 step_4",
    ]
    assert len(set(broker.checksums.values())) == 5
    # versions that are due for evaluation stay readable; of the others the newest
    assert broker.readable[3] == [0, 2, 3]
    assert broker.readable[4] == [0, 2, 4]
    assert {
        "loss/policy",
        "reward/accuracy",
        "staleness/mixed_sample_share",
        "mismatch/k3",
        "policy/entropy",
    } <= broker.metrics.keys()
    assert broker.metrics["policy/lr"] == 1e-3
    assert broker.metrics["weights/bytes"] == (context.weights_folder / "v00000004.safetensors").stat().st_size
    assert broker.metrics["weights/delta_share"] == 1


@pytest.mark.parametrize("last", [0, 2, 3])
def test_a_version_that_turns_out_to_be_the_last_is_kept_for_the_evaluator_and_checkpointed(
    context: RoleContext, make_batch: MakeBatch, last: int
) -> None:
    """Nobody knew before its commit: a budget was spent. Version 0 needs no checkpoint, it is the start model; that of
    version 2 is due anyway, and not written twice.
    """
    broker = ScriptedBroker(context.weights_folder, make_batch, last=last, due=())
    with serving(broker, context.run_dir):
        if last == 0:  # the launcher ends the run once version 0 is scored
            broker.finished = True
        role.main(context)
    saved = {0: [], 2: ["checkpoint 2 step_2"], 3: ["checkpoint 2 step_2", "checkpoint 3 step_3"]}[last]
    assert [line for line in broker.said if "checkpoint" in line] == saved
    commits = [line for line in broker.said if "commit" in line]
    assert commits == [*(f"commit {v - 1} → {v}" for v in range(last + 1)), f"commit {last - 1} → {last}, pinned"]
    shutil.rmtree(context.weights_folder / "writing")
    for file in context.weights_folder.glob("v*.safetensors"):
        file.unlink()
    assert exists(Subscriber(context.weights_folder), last)  # pinned: it outlives the others


@pytest.mark.parametrize("delta", [False, True])
def test_a_resumed_exact_run_repeats_its_versions_and_their_window(
    context: RoleContext, make_batch: MakeBatch, delta: bool
) -> None:
    context.config.staleness.mode, context.config.staleness.max = "exact", 2
    if delta:  # changes, of what is published for an engine of bfloat16
        context.config.weights.delta, context.config.engine.dtype = True, "bfloat16"
        context.config.learner.optim.lr = 1e-5

    def exact(step: int) -> Batch:
        return make_batch(step, versions=max(0, step - 2))

    first = ScriptedBroker(context.weights_folder, exact, stop_at=3)
    with serving(first, context.run_dir):
        role.main(context)
    assert first.said[-1] == "commit 2 → 3"
    assert (first.metrics["weights/delta_share"] < 1) == delta
    assert len(set(first.checksums.values())) == 4
    window = checkpoint.read_window(checkpoint.path_of(context.run_dir, 2))
    assert {version: checksum(tensors) for version, tensors in window.items()} == {
        version: first.checksums[version] for version in (0, 1)
    }

    for file in context.weights_folder.glob("v*.safetensors"):
        file.unlink()  # shared memory does not outlive a run
    again = ScriptedBroker(context.weights_folder, exact, start=2)
    with serving(again, context.run_dir):
        role.main(context)
    assert again.said[0] == "commit -1 → 2, pinned"
    assert {0, 1, 2} <= set(again.readable[2])
    for version in (2, 3):
        assert again.checksums[version] == first.checksums[version]


def test_nothing_is_published_of_a_refused_batch(context: RoleContext, make_batch: MakeBatch) -> None:
    broker = ScriptedBroker(context.weights_folder, lambda step: make_batch(step, versions=step + 1 if step else 0))
    with serving(broker, context.run_dir), pytest.raises(role.BatchError, match="StalenessError: step 1"):
        role.main(context)
    assert broker.said == ["commit -1 → 0, pinned", "commit 0 → 1"]
    assert Subscriber(context.weights_folder).newest() == 1


def test_a_silent_broker_ends_the_wait_with_a_sentence(context: RoleContext, make_batch: MakeBatch) -> None:
    context.config.broker.deadline_seconds = 0.5
    broker = ScriptedBroker(context.weights_folder, make_batch, mute=True)
    began = time.monotonic()
    with (
        serving(broker, context.run_dir),
        pytest.raises(WaitError, match=r"waited for batch 0 from the broker"),
    ):
        role.main(context)
    assert time.monotonic() - began >= 0.5
