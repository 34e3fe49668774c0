"""A broker on a clock of the test's own, and the roles' side of the talk with it: no sockets, no sleeping."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from offtrail.core.types import Group, Lease, Problem
from offtrail.platform.broker.broker import Broker
from offtrail.platform.broker.polls import HOLD_SECONDS
from offtrail.platform.config.schema import Config
from offtrail.platform.wire.groups import group_frames
from offtrail.platform.wire.messages import (
    Acknowledged,
    BatchReply,
    Beat,
    Checkpointed,
    Commit,
    Committed,
    GroupAck,
    Heartbeat,
    Hello,
    LeaseRequest,
    Leases,
    Message,
    NextBatch,
    SubmitGroup,
    VersionHint,
    Welcome,
)
from offtrail.platform.wire.sockets import Envelope

M = TypeVar("M", bound=Message)
B, G = 2, 2


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class FakeWire:
    """Takes the broker's replies; `ask` gives a request its reply, or None while it is held."""

    def __init__(self) -> None:
        self.replies: dict[int, tuple[Message, Sequence[Any]]] = {}
        self.hints: list[int] = []
        self.tickets = 0

    def poll(self, timeout_s: float) -> list[Envelope]:
        return []

    def reply(self, envelope: Envelope, message: Message, arrays: Sequence[Any] = ()) -> None:
        assert envelope.ticket not in self.replies, "a request is answered once"
        self.replies[envelope.ticket] = (message, arrays)

    def hint(self, message: VersionHint) -> None:
        self.hints.append(message.version)


PINNED_BYTES = 1 << 20
"""What a version that waits for its score keeps."""


class Run:
    """A broker, and the roles' side of the talk."""

    def __init__(self, run_dir: Path, **changes: Any) -> None:
        self.next: Run | None = None
        self.evaluate = False  # whether the learner was told to pin the next version
        run_dir.mkdir(exist_ok=True)
        config = Config()
        config.learner.steps, config.batch.groups, config.batch.group_size = 3, B, G
        config.staleness.max, config.eval.every, config.tracking.tensorboard = 1, 2, False
        config.broker.heartbeat_seconds, config.broker.lease_heartbeats = 1.0, 5
        for key, value in changes.items():
            part, _, name = key.rpartition("__")
            setattr(attrgetter(part.replace("__", "."))(config) if part else config, name, value)
        self.processes: dict[str, str] = {}  # by role, where it is not its first
        self.config, self.run_dir, self.wire, self.clock = config, run_dir, FakeWire(), Clock()
        self.broker = Broker(config, run_dir, self.wire, lambda i: Problem("t", i, f"{i}+0", str(i)), self.clock)

    def send(self, peer: str, message: Message, arrays: Sequence[Any] = ()) -> int:
        """``peer``: the name of a role, or of one of its lines; or name/process/line."""
        self.wire.tickets += 1
        if "/" not in peer:
            name = peer.removesuffix("-heartbeat").removesuffix("-failure")
            peer = f"{peer}/{self.processes.get(name, name)}/1"
        self.broker.handle(Envelope(peer.encode(), self.wire.tickets, message, list(arrays)))
        return self.wire.tickets

    def reply(self, ticket: int, kind: type[M]) -> M:
        message, _ = self.wire.replies[ticket]
        assert isinstance(message, kind), message
        return message

    def ask(self, peer: str, message: Message, kind: type[M], arrays: Sequence[Any] = ()) -> M:
        ticket = self.send(peer, message, arrays)
        if ticket not in self.wire.replies:
            self.clock.now += HOLD_SECONDS
            self.broker.serve_held()
        return self.reply(ticket, kind)

    def hello(self, role: str, index: int = 0, process: str = "") -> Welcome:
        """``process``: another one than before, which took its place."""
        if process:
            self.processes[f"{role}-{index}"] = process
        message = Hello(role=role, index=index, pid=os.getpid(), run=self.run_dir.name)
        welcome = self.ask(f"{role}-{index}", message, Welcome)
        if role == "learner":
            self.evaluate = welcome.evaluate
        return welcome

    def everybody(self) -> None:
        for role in ("launcher", "learner", "generator", "evaluator"):
            self.hello(role)
        start = self.broker.ledger.checkpoint
        self.commit(-1, start)

    def beat(self, role: str, index: int = 0, **changes: Any) -> Beat:
        fields = {
            "role": role, "index": index, "activity": "busy/x", "waiting_on": "", "since": 0.0,
            "seconds": {}, "compute": {},
        }  # fmt: skip
        return self.ask(f"{role}-{index}-heartbeat", Heartbeat(**(fields | changes)), Beat)

    def lease(self, room: int = 8, peer: str = "generator-0") -> Leases:
        return self.ask(peer, LeaseRequest(room=room), Leases)

    def submit(self, lease: Lease, version: int, peer: str = "generator-0", **changes: Any) -> GroupAck:
        header, arrays = group_frames(group(lease, version, **changes))
        return self.ask(peer, SubmitGroup(header=header), GroupAck, arrays)

    def commit(self, step: int, version: int, checksum: str | None = None, **metrics: float) -> Committed:
        kept = PINNED_BYTES if self.evaluate else 0
        message = Commit(
            step=step, version=version, checksum=checksum or f"c{version}", pinned_bytes=kept, metrics=metrics
        )
        committed = self.ask("learner-0", message, Committed)
        self.evaluate = committed.evaluate
        return committed

    def make(self, room: int = 8) -> list[Lease]:
        leases = self.lease(room).leases
        for lease in leases:
            newest = max(0, self.broker.scheduler.version)
            assert self.submit(lease, newest if lease.exact_version < 0 else lease.exact_version).accepted
        return leases

    def train(self, checkpoint: bool = True, **metrics: float) -> BatchReply:
        step = self.broker.scheduler.version
        self.make()
        batch = self.ask("learner-0", NextBatch(step=step), BatchReply)
        assert batch.headers
        self.commit(step, step + 1, **metrics)
        if checkpoint:
            self.ask("learner-0", Checkpointed(step=step + 1, path=f"step_{step + 1}"), Acknowledged)
        return batch

    def restarted(self, **changes: Any) -> Run:
        """All of it again on the same directory, up to the learner's start."""
        run = self.again(**changes)
        run.everybody()
        return run

    def again(self, **changes: Any) -> Run:
        """A new broker on the same directory."""
        self.close()
        self.next = Run(self.run_dir, **changes)
        return self.next

    def close(self) -> None:
        self.broker.close()
        if self.next:
            self.next.close()

    def summary(self) -> dict[str, Any]:
        return json.loads((self.run_dir / "summary.json").read_text())

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run_dir / "metrics.jsonl").read_text().splitlines()]

    def finish_archive(self) -> None:
        limit = time.monotonic() + 30
        while self.broker.ledger.shards.unsealed() and time.monotonic() < limit:
            self.broker.tick()
            time.sleep(0.002)


def group(lease: Lease, version: int, **changes: Any) -> Group:
    fields = {
        "group": lease.group, "slot": lease.slot, "attempt": lease.attempt, "problem": lease.problem,
        "generator": "generator-0", "temperature": 1.0, "prompt_tokens": np.array([1, 2], np.int32),
        "lengths": np.array([1, 2], np.int32), "tokens": np.array([3, 4, 5], np.int32),
        "logprobs": np.array([-1, -1, -1], np.float32), "versions": np.full(3, version, np.int32),
        "finish": np.zeros(G, np.uint8), "rewards": np.zeros(G, np.float32),
        "components": {"accuracy": np.zeros(G, np.float32)}, "times": np.zeros((G, 3)),
    }  # fmt: skip
    return Group(**(fields | changes))


def three_samples() -> dict[str, Any]:
    return {
        "lengths": np.array([1, 1, 1], np.int32), "finish": np.zeros(3, np.uint8),
        "rewards": np.zeros(3, np.float32), "components": {}, "times": np.zeros((3, 3)),
    }  # fmt: skip
