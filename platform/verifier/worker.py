"""One verifier process: reads jobs from its stdin, writes verdicts to its stdout, dies with its parent.

Started and killed by pool.py, which alone knows deadlines. Imports no torch, so that a restart costs little.
Frames both ways are a length (uint32, little-endian) and that many bytes of msgpack: in, a Setup, then Jobs; out, a
Verdict of ticket −1 when ready, then one for each Job, in order.
"""

from __future__ import annotations

import os
import resource
import struct
import sys
import time
from collections.abc import Callable
from typing import Any, BinaryIO

import msgspec

from offtrail.core.types import Problem
from offtrail.platform.runtime.host import die_with
from offtrail.rewards.rule import score
from offtrail.tasks.config import TASKS
from offtrail.tasks.registry import make_task

LENGTH = struct.Struct("<I")
LONGEST_ERROR = 500
READY = -1

Verify = Callable[[Problem, str], bool]


class Setup(msgspec.Struct, frozen=True):
    """First frame to a worker: from what to rebuild its verifier, and its limit in bytes of address space."""

    task: str
    settings: dict[str, Any]
    memory: int


class Job(msgspec.Struct, frozen=True):
    """The G answers of one group; ``finished``: a stop token ended the answer."""

    ticket: int
    problem: Problem
    texts: list[str]
    finished: list[bool]


class Verdict(msgspec.Struct, frozen=True):
    """Components by name, each G long; or ``error`` says what the verifier raised. ``seconds`` of CPU it took."""

    ticket: int
    components: dict[str, list[float]] = {}
    error: str = ""
    seconds: float = 0.0


def serve(make_verify: Callable[[Setup], Verify]) -> None:
    """Answer jobs until stdin ends."""
    die_with(int(os.environ["OFFTRAIL_PARENT"]))
    # Trap: a print() inside a verifier must not land between frames, so fd 1 becomes stderr.
    jobs, verdicts = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    frame = read(jobs)
    if frame is None:
        return
    setup = msgspec.msgpack.decode(frame, type=Setup)
    resource.setrlimit(resource.RLIMIT_AS, (setup.memory, setup.memory))
    verify = make_verify(setup)
    write(verdicts, Verdict(READY))
    decoder = msgspec.msgpack.Decoder(Job)
    while (frame := read(jobs)) is not None:
        write(verdicts, judge(decoder.decode(frame), verify))


def judge(job: Job, verify: Verify) -> Verdict:
    """Score one group; whatever the verifier raises becomes the verdict's error."""
    start = time.process_time()
    try:
        scores = [score(job.problem, t, verify, finished=f) for t, f in zip(job.texts, job.finished, strict=True)]
    except Exception as error:
        return Verdict(job.ticket, {}, f"verifier raised {type(error).__name__}: {error}"[:LONGEST_ERROR])
    components = {name: [s[name] for s in scores] for name in (scores[0] if scores else ())}
    return Verdict(job.ticket, components, "", time.process_time() - start)


def task_verifier(setup: Setup) -> Verify:
    """The task's own verifier, rebuilt from its settings without reading its data."""
    config = msgspec.convert(setup.settings, TASKS[setup.task])
    return make_task(config, 0, load=False).verify


def read(stream: BinaryIO) -> bytes | None:
    """The next frame's body; None at the end of the stream."""
    head = stream.read(LENGTH.size)
    return stream.read(LENGTH.unpack(head)[0]) if len(head) == LENGTH.size else None


def write(stream: BinaryIO, verdict: Verdict) -> None:
    """One frame, flushed."""
    stream.write(frame_of(verdict))
    stream.flush()


def frame_of(message: Setup | Job | Verdict) -> bytes:
    """Length and body of a message."""
    body = msgspec.msgpack.encode(message)
    return LENGTH.pack(len(body)) + body


if __name__ == "__main__":
    serve(task_verifier)
