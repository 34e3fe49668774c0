"""One verifier process: reads jobs from its stdin, writes verdicts to its stdout, dies with its parent (keeper.py).

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

from offtrail.core.plugins import PluginError
from offtrail.core.types import Problem
from offtrail.platform.verifier.keeper import keep
from offtrail.rewards.base import RewardError
from offtrail.rewards.behaviour import counted
from offtrail.rewards.config import RewardConfig
from offtrail.rewards.registry import Reward, make_reward
from offtrail.tasks.registry import family, make_task

LENGTH = struct.Struct("<I")
LONGEST_ERROR = 500
READY = -1


class Setup(msgspec.Struct, frozen=True):
    """First frame to a worker: from what to rebuild its reward, its limit in bytes of address space, and the same of
    the ``sets`` that it also judges, by name. ``language``: in which answers are to be written, for what is counted in
    them (rewards/behaviour.py); "" = nothing is.
    """

    task: str
    task_settings: dict[str, Any]
    reward_settings: dict[str, Any]
    memory: int
    sets: dict[str, Setup] = {}
    language: str = ""


class Job(msgspec.Struct, frozen=True):
    """The G answers of one group; ``finished``: a stop token ended the answer. ``of``: the set, or "" for the task."""

    ticket: int
    problem: Problem
    texts: list[str]
    finished: list[bool]
    of: str = ""


class Verdict(msgspec.Struct, frozen=True):
    """Components by name, each G long, None where one does not apply; or ``error`` says what was raised. ``seconds`` of
    CPU it took. ``counts``: of the G answers together.
    """

    ticket: int
    components: dict[str, list[float | None]] = {}
    error: str = ""
    seconds: float = 0.0
    counts: dict[str, float] = {}


def serve(make: Callable[[Setup], Reward]) -> None:
    """Answer jobs until stdin ends; a reward that cannot be made is the one and only verdict's error."""
    keep()
    # Trap: a print() inside a verifier must not land between frames, so fd 1 becomes stderr.
    jobs, verdicts = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    frame = read(jobs)
    if frame is None:
        return
    setup = msgspec.msgpack.decode(frame, type=Setup)
    resource.setrlimit(resource.RLIMIT_AS, (setup.memory, setup.memory))
    try:
        rewards = {name: (make(one), one.language) for name, one in ({"": setup} | setup.sets).items()}
    except Exception as error:
        write(verdicts, Verdict(READY, {}, said(error)))
        return
    write(verdicts, Verdict(READY))
    decoder = msgspec.msgpack.Decoder(Job)
    while (frame := read(jobs)) is not None:
        job = decoder.decode(frame)
        write(verdicts, judge(job, *rewards[job.of]))


def judge(job: Job, reward: Reward, language: str = "") -> Verdict:
    """Score one group, and count what is counted; whatever a component raises becomes the verdict's error."""
    start = time.process_time()
    try:
        scores = reward.judge(job.problem, job.texts, job.finished)
        counts = (counted(job.texts, job.finished, language) if language else {}) | reward.counts
    except Exception as error:
        return Verdict(job.ticket, {}, said(error))
    return Verdict(job.ticket, scores, "", time.process_time() - start, counts)


def said(error: Exception) -> str:
    """An exception in the words of the log; one of ours speaks for itself."""
    text = str(error) if isinstance(error, RewardError | PluginError) else f"{type(error).__name__}: {error}"
    return text[:LONGEST_ERROR]


def rebuilt(setup: Setup) -> Reward:
    """The run's reward and task, made from their settings without reading the task's data."""
    task = make_task(msgspec.convert(setup.task_settings, family(setup.task).Config), 0, load=False)
    return make_reward(msgspec.convert(setup.reward_settings, RewardConfig), task.verify)


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
    serve(rebuilt)
