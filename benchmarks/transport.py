"""Trajectory groups through the wire, decoded and checked, against raw pyzmq multipart of the same bytes.

    python benchmarks/transport.py [--seconds 1.0] [--rounds 7]

Both sides: one sending process (DEALER), one receiving process (ROUTER), TCP on loopback, every message answered,
WINDOW messages open. The wire's sender encodes each message out of a Group object, and its receiver decodes it, builds
the Group and runs Group.check on it. The peer sends frames that were encoded once, and its receiver only counts their
bytes, once with pyzmq's default calls and once with its zero-copy calls: the faster of the two counts as the peer. The
ways alternate within a round; a figure is the median over rounds of the ratio within the round, so that noise of the
machine hits all. The last line of stdout is one JSON object: `throughput_ratio` is the geometric mean over sizes.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import struct
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import zmq

from offtrail.core.types import Group, Problem
from offtrail.platform.wire.auth import ClientKeys, new_keys
from offtrail.platform.wire.codec import encode
from offtrail.platform.wire.groups import group_frames, group_from
from offtrail.platform.wire.messages import GroupAck, SubmitGroup
from offtrail.platform.wire.sockets import Client, Endpoint, Server

SIZES = {"10kB": 10_000, "100kB": 100_000, "1MB": 1_000_000}
WAYS = ("wire", "raw_copy", "raw_zero_copy")
WINDOW = 16
PATIENCE_S = 30.0
RAW_END_S = 2.0
"""After a measurement: in one of a hundred or so at 1 MB, libzmq's zmq_ctx_term never returns, whatever the linger."""
STOP = b"stop"


def make_group(target_bytes: int) -> Group:
    """A group of 8 samples whose frames hold about ``target_bytes`` (12 a token: id, log-probability, version)."""
    rng = np.random.default_rng(target_bytes)
    G, P, T = 8, 48, target_bytes // 12
    cuts = np.sort(rng.integers(0, T, G - 1))
    return Group(
        group=7,
        slot=7,
        attempt=0,
        problem=Problem("chain", 7, "start 3; +4 *2 -5 = ?", "9", {"start": 3, "operations": ["+4", "*2", "-5"]}),
        generator="generator-0",
        temperature=1.0,
        prompt_tokens=rng.integers(0, 60, P, dtype=np.int32),
        lengths=np.diff(cuts, prepend=0, append=T).astype(np.int32),
        tokens=rng.integers(0, 60, T, dtype=np.int32),
        logprobs=-rng.random(T, dtype=np.float32),
        versions=np.sort(rng.integers(0, 3, T, dtype=np.int32)),
        finish=np.zeros(G, np.uint8),
        rewards=rng.random(G, dtype=np.float32),
        components={name: rng.random(G, dtype=np.float32) for name in ("accuracy", "format")},
        times=np.full((G, 3), 1.7e9),
    )


def wire_frames(group: Group) -> list[bytes]:
    """What the wire sends for this group: the peer's payload."""
    header, arrays = group_frames(group)
    return [bytes(frame) for frame in encode(SubmitGroup(header=header), arrays)]


def receive_wire(pipe: Connection) -> None:
    """Decode, build and check every group, answer with the broker's message."""
    keys, shown = new_keys("127.0.0.1")
    server = Server("127.0.0.1", 0, keys)
    pipe.send((server.endpoint.url, server.endpoint.hints_url, shown))
    while not pipe.poll():
        for envelope in server.poll(0.02):
            assert isinstance(envelope.message, SubmitGroup)
            group = group_from(envelope.message.header, envelope.arrays)
            server.reply(envelope, GroupAck(group=group.group, accepted=True))
    server.close()


def receive_raw(pipe: Connection, copy: bool) -> None:
    """Take the frames and answer with as many bytes as the wire's acknowledgement has."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    socket.set_hwm(0)
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    pipe.send((f"tcp://127.0.0.1:{port}", "", None))
    ack = encode(GroupAck(group=7, accepted=True))
    while not pipe.poll():
        if not socket.poll(20):
            continue
        while True:
            try:
                peer, ticket, *frames = socket.recv_multipart(zmq.NOBLOCK, copy=copy)
            except zmq.Again:
                break
            assert sum(map(len, frames))
            socket.send_multipart([peer, ticket, *ack], copy=copy)
    context.destroy(linger=500)


def send_wire(endpoint: Endpoint, keys: ClientKeys, group: Group, seconds: float) -> float:
    """Groups per second through the wire."""
    client = Client(endpoint, "sender", keys)

    def send() -> None:
        header, arrays = group_frames(group)
        client.send(SubmitGroup(header=header), arrays, share=True)

    rate = windowed(send, lambda: len(client.poll(1.0)), seconds)
    client.close()
    return rate


def send_raw(endpoint: Endpoint, frames: list[bytes], seconds: float, copy: bool) -> float:
    """Messages per second of the same bytes."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.set_hwm(0)
    socket.connect(endpoint.url)
    ticket = struct.pack("<Q", 1)

    def receive() -> int:
        socket.poll(1000)
        count = 0
        while True:
            try:
                socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return count
            count += 1

    rate = windowed(lambda: socket.send_multipart([ticket, *frames], copy=copy), receive, seconds)
    context.destroy(linger=500)
    return rate


def windowed(send: Callable[[], Any], receive: Callable[[], int], seconds: float) -> float:
    """Keep WINDOW messages open for ``seconds`` after a short warm-up; answered messages per second."""
    window, done, counted = 0, 0, 0
    began = heard = time.perf_counter()
    warm_up = seconds / 5
    started: float | None = None
    while True:
        while window < WINDOW:
            send()
            window += 1
        got = receive()
        window, done = window - got, done + got
        now = time.perf_counter()
        heard = now if got else heard
        if now - heard > PATIENCE_S:
            raise TimeoutError(f"{window} messages open and no answer for {PATIENCE_S:g} s, after {done}")
        if started is None and now - began > warm_up:
            started, counted = now, done
        if started is not None and now - started > seconds:
            return (done - counted) / (now - started)


def measure(way: str, group: Group, seconds: float) -> float:
    """One measurement in a fresh pair of processes."""
    here, there = multiprocessing.Pipe()
    target, args = (receive_wire, (there,)) if way == "wire" else (receive_raw, (there, way == "raw_copy"))
    receiver = multiprocessing.get_context("spawn").Process(target=target, args=args, daemon=True)
    receiver.start()
    if not here.poll(PATIENCE_S):
        raise TimeoutError(f"the receiver of {way} did not come up in {PATIENCE_S:g} s")
    url, hints_url, keys = here.recv()
    endpoint = Endpoint(url, hints_url)
    if way == "wire":
        rate = send_wire(endpoint, keys, group, seconds)
    else:
        rate = send_raw(endpoint, wire_frames(group), seconds, way == "raw_copy")
    here.send(STOP)
    receiver.join(PATIENCE_S if way == "wire" else RAW_END_S)
    if receiver.is_alive():
        receiver.kill()
        if way == "wire":
            raise TimeoutError(f"the receiver of {way} did not end in {PATIENCE_S:g} s")
    return rate


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=7, help="alternations of the ways at each size")
    options = parser.parse_args()
    ratios: dict[str, float] = {}
    rates: dict[str, dict[str, float]] = {}
    sizes: dict[str, int] = {}
    for name, target in SIZES.items():
        group = make_group(target)
        sizes[name] = sum(map(len, wire_frames(group)))
        rounds = []
        for turn in range(options.rounds):
            order = WAYS[turn % 3 :] + WAYS[: turn % 3]
            rounds.append({way: measure(way, group, options.seconds) for way in order})
        median = {way: statistics.median(one[way] for one in rounds) for way in WAYS}
        peer = max(WAYS[1:], key=lambda way: median[way])
        ratios[name] = statistics.median(one["wire"] / one[peer] for one in rounds)
        rates[name] = median
        shown = ", ".join(f"{way} {rate:,.0f}/s ({rate * sizes[name] / 1e6:,.0f} MB/s)" for way, rate in median.items())
        print(f"{name}: {sizes[name]} bytes, {shown}; ratio {ratios[name]:.3f} against {peer}", flush=True)
    result = {
        "throughput_ratio": round(math.exp(statistics.fmean(map(math.log, ratios.values()))), 4),
        "ratios": {name: round(ratio, 4) for name, ratio in ratios.items()},
        "groups_per_second": {name: {way: round(r, 1) for way, r in ways.items()} for name, ways in rates.items()},
        "bytes_per_group": sizes,
        "goal": 0.8,
        "window": WINDOW,
        "rounds": options.rounds,
        "seconds": options.seconds,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
