"""Hostile frames and messages, seeded, against a real broker behind a real socket: it answers all, and loses nothing.

The peer has the run's secret: what a stranger without it can do, test_wire_bounds.py says.
"""

from __future__ import annotations

import math
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec
import numpy as np
import pytest
import zmq

from fakes.run import group
from offtrail.core.types import Lease, Problem, ScoredBy
from offtrail.platform.broker.broker import Broker
from offtrail.platform.config.schema import Config
from offtrail.platform.wire.auth import new_keys
from offtrail.platform.wire.bundle import bundle, unbundle
from offtrail.platform.wire.codec import WireError, decode, encode
from offtrail.platform.wire.groups import group_frames, group_from
from offtrail.platform.wire.messages import (
    Acknowledged,
    BatchReply,
    Checkpointed,
    Commit,
    Committed,
    EvalResult,
    FailGroup,
    GroupAck,
    GroupHeader,
    Heartbeat,
    Hello,
    LeaseRequest,
    Leases,
    Message,
    NextBatch,
    NextEval,
    ReturnLeases,
    Status,
    StatusRequest,
    SubmitGroup,
)
from offtrail.platform.wire.sockets import Client, RefusedError, Server

SERVER, CLIENT = new_keys("127.0.0.1")
INTEGERS = (-(1 << 63), -2, -1, 0, 1, 2, 7, 1 << 31, (1 << 53) + 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
FLOATS = (math.nan, math.inf, -math.inf, 1e308, -1e308, 5e-324, 0.0, -1.0, 1.0)
TEXTS = ("", "x", "x" * 100_000, "\0", "../../etc/passwd", "generator", "learner", "launcher", "a\nb", "%s{}")
MARKERS = (0x90, 0xC0, 0xC1, 0xC6, 0xCB, 0xCF, 0xD3, 0xD9, 0xDB, 0xDD, 0xDF, 0x80, 0xFF)
REQUESTS = (LeaseRequest, SubmitGroup, FailGroup, ReturnLeases, NextBatch, Commit, Checkpointed, NextEval, EvalResult,
            Heartbeat, Hello, StatusRequest)  # fmt: skip


def problem(index: int) -> Problem:
    return Problem("t", index, f"{index}+0", str(index))


class Live:
    """A broker on a thread, behind its socket, and an honest learner and generator that may take a step."""

    def __init__(self, folder: Path) -> None:
        config = Config()
        config.learner.steps, config.batch.groups, config.batch.group_size = 100_000, 2, 2
        config.eval.every, config.tracking.tensorboard = 1000, False
        config.broker.heartbeat_seconds = 0.03  # what a hostile generator was leased goes back after 30 of them
        self.over, self.died = threading.Event(), list[BaseException]()
        self.run, self.step = folder.name, 0
        ready = threading.Event()

        def loop() -> None:
            server = Server("127.0.0.1", 0, SERVER)
            broker = Broker(config, folder, server, problem)
            self.endpoint = server.endpoint
            ready.set()
            try:
                while not self.over.is_set():
                    for envelope in server.poll(0.02):
                        broker.handle(envelope)
                    broker.serve_held()
                    broker.tick()
            except BaseException as error:
                self.died.append(error)
            finally:
                self.audit = broker.ledger.audit()
                broker.close()
                server.close()

        self.thread = threading.Thread(target=loop)
        self.thread.start()
        assert ready.wait(30)
        self.learner, self.generator = (Client(self.endpoint, name, CLIENT) for name in ("learner-0", "generator-0"))
        for client, role in ((self.learner, "learner"), (self.generator, "generator")):
            self.ask(client, Hello(role=role, index=0, pid=os.getpid(), run=self.run))
        self.ask(self.learner, Commit(step=-1, version=0, checksum="c0"))

    def ask(self, client: Client, message: Message, arrays: Any = ()) -> Any:
        return client.request(message, arrays, what="an answer", deadline_s=30)[0]

    def train(self) -> None:
        """A batch, made and trained: the run goes on."""
        while True:
            reply = self.ask(self.generator, LeaseRequest(room=4))
            for lease in reply.leases:
                header, arrays = group_frames(group(lease, reply.version))
                assert isinstance(self.ask(self.generator, SubmitGroup(header=header), arrays), GroupAck)
            if (batch := self.ask(self.learner, NextBatch(step=self.step))).headers:
                break
        assert isinstance(batch, BatchReply)
        assert {header.generator for header in batch.headers} == {"generator-0"}
        self.step += 1
        assert isinstance(
            self.ask(self.learner, Commit(step=self.step - 1, version=self.step, checksum=f"c{self.step}")), Committed
        )

    def check(self) -> None:
        """The broker lives, and goes on."""
        assert self.died == []
        status = self.ask(self.learner, StatusRequest())
        assert isinstance(status, Status)
        assert (status.failures, status.summary["groups/lost"]) == ([], 0)
        self.train()

    def close(self) -> None:
        self.learner.close()
        self.generator.close()
        self.over.set()
        self.thread.join(60)
        assert self.died == []
        assert (self.audit.lost, self.audit.duplicated) == (0, 0)


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Live]:
    (tmp_path / "run").mkdir()
    made = Live(tmp_path / "run")
    yield made
    made.close()


@contextmanager
def dealer(live: Live) -> Iterator[zmq.Socket]:
    """A peer that has the secret and keeps to nothing else."""
    socket = zmq.Context.instance().socket(zmq.DEALER)
    socket.linger = 500  # with 0 libzmq may abort the process: see sockets.CLIENT_PARTS_MS
    socket.plain_username, socket.plain_password = b"role", CLIENT.password.encode()
    socket.connect(live.endpoint.url)
    try:
        yield socket
    finally:
        socket.close()


def corpus() -> list[list[bytes]]:
    """Frames of messages of every kind of request, and of two groups, a small and a large one."""
    lease = Leases(leases=[], version=0)
    plain = [Hello(role="generator", index=9, pid=1, run="run"), LeaseRequest(room=4), NextBatch(step=0), NextEval(),
             FailGroup(group=0, attempt=1, reason="failed"), ReturnLeases(leases=[(0, 1)], detail="x"), lease,
             Commit(step=0, version=1, checksum="c", metrics={"a": 1.0}), Checkpointed(step=0, path="p"),
             EvalResult(version=0, metrics={"eval/accuracy": 1.0}), StatusRequest(), Acknowledged(),
             Heartbeat(role="generator", index=0, activity="a", waiting_on="", since=0.0, seconds={},
                       compute={})]  # fmt: skip
    made = [encode(message) for message in plain]
    for length in (3, 20_000):
        header, arrays = group_frames(hostile_group(length))
        made.append(encode(SubmitGroup(header=header), arrays))
    return [[bytes(frame) for frame in frames] for frames in made]


def hostile_group(length: int) -> Any:
    lease = Lease(0, 0, 1, problem(0), 2, 0)
    lengths = np.full(2, length, np.int32)
    return group(lease, 0, lengths=lengths, tokens=np.ones(2 * length, np.int32),
                 logprobs=np.full(2 * length, -0.5, np.float32), versions=np.zeros(2 * length, np.int32))  # fmt: skip


def mutated(rng: random.Random, frames: list[bytes]) -> list[bytes]:
    """A few bytes, a length, a frame other than they were."""
    out = [bytearray(frame) for frame in frames]
    for _ in range(rng.choice([1, 1, 2, 8])):
        frame = rng.choice(out) if out and rng.random() < 0.5 else out[0] if out else bytearray()
        match rng.randrange(8):
            case 0 if frame:
                frame[rng.randrange(min(len(frame), 256))] ^= 1 << rng.randrange(8)
            case 1 if frame:
                frame[rng.randrange(len(frame))] = rng.randrange(256)
            case 2:
                del frame[rng.randrange(len(frame) + 1) :]
            case 3:
                frame += rng.randbytes(rng.choice([1, 8, 4096]))
            case 4 if len(frame) > 16:
                frame[rng.randrange(8, min(len(frame), 200))] = rng.choice(MARKERS)
            case 5 if len(frame) > 24:
                at = rng.randrange(len(frame) - 9)
                frame[at : at + 9] = b"\xcf" + rng.choice([b"\xff" * 8, b"\x7f" + b"\xff" * 7, bytes(8)])
            case 6:
                out.append(bytearray(rng.randbytes(rng.choice([0, 1, 100]))))
            case _ if len(out) > 1:
                del out[rng.randrange(len(out))]
    return [bytes(frame) for frame in out] or [b""]


def any_value(rng: random.Random, kind: Any) -> Any:
    """A value of a field's type, at its ends and beyond them."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return any_value(rng, args[0])
    if origin is Literal:
        return rng.choice(args)
    if origin is list:
        return [any_value(rng, args[0]) for _ in range(rng.choice([0, 1, 3]))]
    if origin is tuple:
        return tuple(any_value(rng, arg) for arg in args)
    if origin is dict:
        return {any_value(rng, args[0]): any_value(rng, args[1]) for _ in range(rng.choice([0, 1, 4]))}
    if kind is Problem:
        words = (any_value(rng, k) for k in (str, int, str, str))
        return Problem(*words, {"m": rng.choice([*FLOATS, 1 << 63, b"x"])})
    if kind is ScoredBy:
        return ScoredBy(any_value(rng, str), any_value(rng, int))
    if kind is GroupHeader:
        return made(rng, GroupHeader)
    return rng.choice({int: INTEGERS, float: FLOATS, str: TEXTS, bool: (False, True)}[kind])


def made(rng: random.Random, kind: type[Any]) -> Any:
    return kind(**{f.name: any_value(rng, f.type) for f in msgspec.structs.fields(kind)})


def throw_frames(live: Live, rng: random.Random, count: int) -> Counter[str]:
    """``count`` mutated messages; what was answered. Each is answered, but for a long poll that is held."""
    material, answers, sent = corpus(), Counter[str](), 0
    while sent < count:
        with dealer(live) as peer:
            for _ in range(200):
                frames = rng.choice(material)
                whole = bundle([(i, mutated(rng, frames)) for i in range(rng.choice([1, 1, 3]))])
                peer.send_multipart(mutated(rng, whole) if rng.random() < 0.3 else whole)
                sent += 1
            while peer.poll(300):
                answers.update(type(decode(parts)[0]).__name__ for _, parts in unbundle(peer.recv_multipart()))
        live.check()
    return answers


def throw_messages(live: Live, rng: random.Random, count: int) -> Counter[str]:
    """``count`` messages with extreme values, from a generator of the run; what was answered."""
    client, answers = Client(live.endpoint, "generator-7", CLIENT), Counter[str]()
    hello = Hello(role="generator", index=7, pid=os.getpid(), run=live.run)
    try:
        live.ask(client, hello)
        for i in range(count):
            message = made(rng, rng.choice(REQUESTS))
            _, arrays = group_frames(hostile_group(3))
            try:
                ticket = client.send(message, arrays if isinstance(message, SubmitGroup) else ())
            except (OverflowError, TypeError, ValueError):
                continue  # such a message cannot even be written
            limit = time.monotonic() + (0.02 if isinstance(message, LeaseRequest | NextBatch | NextEval) else 20)
            while time.monotonic() < limit and live.thread.is_alive():
                if found := [reply for at, reply, _ in client.poll(0.02) if at == ticket]:
                    answers[type(found[0]).__name__] += 1
                    break
            if i % 100 == 0:
                live.ask(client, hello)  # the leases that it has go back
                live.check()
        live.ask(client, hello)
    finally:
        client.close()
    live.check()
    return answers


def decode_mutated(rng: random.Random, count: int) -> Counter[str]:
    """The codec alone: an exact message, or WireError."""
    material, found = corpus(), Counter[str]()
    for _ in range(count):
        try:
            message, arrays = decode(mutated(rng, rng.choice(material)))
            if isinstance(message, SubmitGroup):
                group_from(message.header, arrays)
            found["accepted"] += 1
        except WireError:
            found["refused"] += 1
    return found


def test_mutated_frames_and_extreme_messages_are_answered_and_harm_nobody(live: Live) -> None:
    rng = random.Random(0)
    decoded = decode_mutated(rng, 5000)
    assert decoded["accepted"] > 100
    assert decoded["refused"] > 1000
    assert throw_frames(live, rng, 1600)["Error"] > 800
    answers = throw_messages(live, rng, 400)
    assert answers["Error"] > 130
    with pytest.raises(RefusedError, match="it is the learner's"):
        live.ask(live.generator, Commit(step=live.step, version=live.step + 1, checksum="evil"))
    live.check()


@pytest.mark.prove
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(4))
def test_two_hundred_thousand_hostile_frames(live: Live, seed: int) -> None:
    """Over four seeds: 100,000 at the codec, 90,000 at the socket, 20,000 well-formed ones."""
    rng = random.Random(1 + seed)
    assert decode_mutated(rng, 25_000)["refused"] > 5000
    assert throw_frames(live, rng, 22_500)["Error"] > 10_000
    assert throw_messages(live, rng, 5000)["Error"] > 1500
