"""Learner, generator and evaluator without a model: they speak the real protocol, and what they make is exact.

A version's checksum is a hash of the one before and of all that its batch holds, so that a replay which differs in a
byte, a group or their order is seen. A generator's tokens follow from the group, and its log-probabilities from all
groups that it was granted together as well, as rounding does in a real engine: a wave that is issued again in part
makes another version. Without exact mode it also fails some groups, and returns some leases.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from offtrail.core.types import Group, Lease
from offtrail.platform.runtime.contents import write_manifest
from offtrail.platform.runtime.context import Connection, RoleContext
from offtrail.platform.wire.groups import arrays_per_group, group_frames, group_from
from offtrail.platform.wire.messages import (
    Checkpointed,
    Commit,
    EvalResult,
    FailGroup,
    LeaseRequest,
    Message,
    NextBatch,
    NextEval,
    ReturnLeases,
    SubmitGroup,
)

LENGTH = 20
STATE = "fake.json"


def ask(connection: Connection, message: Message, arrays: Any = ()) -> tuple[Any, Any]:
    """A request and its answer."""
    return connection.client.request(message, arrays, what=type(message).__name__, deadline_s=120)


def digest(*parts: object) -> str:
    """Of anything that prints as what it is."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def luck() -> float:
    """Between 0 and 1; of the system, because forks share the state of Python's own."""
    return int.from_bytes(os.urandom(4)) / (1 << 32)


def contents(group: Group) -> tuple[object, ...]:
    """All of a group but its attempt, its generator and its times."""
    columns = (group.tokens, group.logprobs, group.versions, group.rewards)
    return (group.group, group.slot, group.problem.prompt, *(column.tobytes() for column in columns))


def learner(context: RoleContext) -> None:
    """Hashes instead of training; its checkpoints take a moment to write."""
    connection = context.connect()
    folder, every = context.run_dir / "checkpoints", context.config.learner.checkpoint_every
    folder.mkdir(exist_ok=True)
    step = connection.welcome.step
    version = json.loads((folder / f"step_{step}" / STATE).read_text())["version"] if step else "start"

    def commit(step: int, metrics: dict[str, float]) -> bool:
        made = Commit(step=step, version=step + 1, checksum=version, pinned_bytes=int(due), metrics=metrics)
        return bool(ask(connection, made)[0].evaluate)

    due = connection.welcome.evaluate
    start = Commit(step=-1, version=step, checksum=version, pinned_bytes=int(due))
    due = ask(connection, start)[0].evaluate
    while not (batch := ask(connection, NextBatch(step=step)))[0].finished and not batch[0].stop:
        reply, arrays = batch
        if reply.waiting:
            continue
        groups, end = [], 0
        for header in reply.headers:
            begin, end = end, end + arrays_per_group(header)
            groups.append(group_from(header, arrays[begin:end]))
        time.sleep(luck() * 0.02)
        version = digest(version, *map(contents, groups))
        due = commit(step, {"reward/accuracy": 0.5})
        step += 1
        if step % every == 0:
            save(connection, folder, step, version)
    if not batch[0].stop and step % every:
        save(connection, folder, step, version)
    while not connection.heartbeat.stop:
        time.sleep(0.02)
    connection.close()


def save(connection: Connection, folder: Path, step: int, version: str) -> None:
    """A checkpoint, whole by rename; the two before it stay."""
    part = folder / f".step_{step}.writing"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    time.sleep(0.01)
    (part / STATE).write_text(json.dumps({"version": version}))
    write_manifest(part)
    shutil.rmtree(folder / f"step_{step}", ignore_errors=True)
    os.replace(part, folder / f"step_{step}")
    ask(connection, Checkpointed(step=step, path=str(folder)))
    for old in sorted(folder.glob("step_*"), key=lambda path: int(path.name[5:]))[:-3]:
        shutil.rmtree(old)


def generator(context: RoleContext) -> None:
    """Makes what it is granted, one group after another."""
    connection = context.connect()
    while not connection.heartbeat.stop:
        reply, _ = ask(connection, LeaseRequest(room=5))
        if reply.stop:
            break
        together = tuple(sorted(lease.group for lease in reply.leases))
        for lease in reply.leases:
            time.sleep(luck() * 0.01)
            answer, arrays = answered(context, lease, reply.version, together)
            ask(connection, answer, arrays)
    connection.close()


def answered(context: RoleContext, lease: Lease, newest: int, together: tuple[int, ...]) -> tuple[Message, Any]:
    """A group, or bad luck."""
    exact, G = lease.exact_version >= 0, lease.samples
    drawn = luck()
    if not exact and drawn < 0.04:
        return FailGroup(group=lease.group, attempt=lease.attempt, reason="failed", detail="bad luck"), ()
    if not exact and drawn < 0.06:
        return ReturnLeases(leases=[(lease.group, lease.attempt)], detail="bad luck"), ()
    tokens = np.random.default_rng(lease.group)
    rounding = np.random.default_rng([lease.group, *together])
    header, arrays = group_frames(
        Group(
            group=lease.group,
            slot=lease.slot,
            attempt=lease.attempt,
            problem=lease.problem,
            generator=f"generator-{context.index}",
            temperature=context.config.sampling.temperature,
            prompt_tokens=np.arange(3, 12, dtype=np.int32),
            lengths=np.full(G, LENGTH, np.int32),
            tokens=tokens.integers(3, 20, G * LENGTH, dtype=np.int32),
            logprobs=-rounding.random(G * LENGTH, dtype=np.float32),
            versions=np.full(G * LENGTH, lease.exact_version if exact else max(lease.min_version, newest), np.int32),
            finish=np.zeros(G, np.uint8),
            rewards=tokens.random(G, dtype=np.float32),
            components={"accuracy": np.ones(G, np.float32)},
            times=np.zeros((G, 3)),
        )
    )
    return SubmitGroup(header=header), arrays


def evaluator(context: RoleContext) -> None:
    """Scores every version alike."""
    connection = context.connect()
    while True:
        job, _ = ask(connection, NextEval())
        if job.stop:
            break
        if job.version >= 0:
            ask(connection, EvalResult(version=job.version, metrics={"eval/accuracy": 0.5}))
    connection.close()
