"""The client by itself: weights that give no finite number, though the server calls the answer stopped, and servers
that hang up on connections which are kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from offtrail.core.protocols import Completion, Request
from offtrail.core.types import Sampling
from offtrail.platform.engines.sglang.client import Client, Loop
from offtrail.platform.engines.sglang.servers import KEPT_SECONDS, Address
from offtrail.platform.engines.stops import StopStrings

STOPPED = {"type": "stop", "matched": 9}


def report(finish: Any, *logprobs: float | None) -> dict[str, Any]:
    entries = [[value, 9, None] for value in logprobs]
    meta = {"output_token_logprobs": entries, "finish_reason": finish, "weight_version": "3", "cached_tokens": 0}
    return {"output_ids": [9] * len(logprobs), "meta_info": meta | {"completion_tokens": len(logprobs)}}


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop("test")
    yield loop
    loop.close()


def answer(loop: Loop, given: dict[str, Any]) -> list[Completion]:
    """What the client makes of a server whose every answer is one report."""

    async def generate(request: web.Request) -> web.StreamResponse:
        reply = web.StreamResponse()
        await reply.prepare(request)
        await reply.write(f"data: {json.dumps(given)}\n\n".encode())
        return reply

    async def serve() -> tuple[web.AppRunner, str]:
        app = web.Application()
        app.router.add_post("/generate", generate)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner, f"http://127.0.0.1:{runner.addresses[0][1]}"

    runner, url = loop.run(serve())
    client = Client(loop, prefix_tokens=64, keyed=False, recomputes=True, stops=StopStrings(Path()))
    address = Address(url, "", "", 1)
    loop.loop.call_soon_threadsafe(client.set_places, {0: address}, {address: 3}, 3)
    client.generate([Request(0, np.array([4, 5], np.int32), 1, Sampling(8, stop_token_ids=(9,)))])
    try:
        while not (taken := client.take(1.0))[0]:
            assert not taken[1]
        return taken[0]
    finally:
        loop.run(runner.cleanup())


def test_a_stopped_answer_is_one(loop: Loop) -> None:
    [completion] = answer(loop, report(STOPPED, -0.5, -0.25))
    assert (completion.finish, completion.logprobs.tolist()) == ("stop", [-0.5, -0.25])


@pytest.mark.parametrize(
    "given",
    [
        report({"type": "stop", "matched": "NaN happened"}, -0.5, -0.25),
        report(STOPPED, -0.5, float("nan")),
        report(STOPPED, float("-inf")),
        report(STOPPED, None),
    ],
)
def test_numbers_that_are_not_finite_are_no_answer(given: dict[str, Any], loop: Loop) -> None:
    with pytest.raises(FloatingPointError, match="weights of version 3 give log-probabilities that are not fini"):
        answer(loop, given)


class HangsUp:
    """A server that answers one token a sample, each on any connection; on one on which nothing was asked for ``idle``
    seconds, and of the first ``lost`` requests in any case, it hangs up once the next request has come.
    """

    def __init__(self, idle: float = 600.0, lost: int = 0) -> None:
        self.idle, self.lost = idle, lost
        self.connections, self.rids = 0, list[str]()
        self._open = dict[asyncio.StreamWriter, asyncio.Event]()

    async def start(self) -> Address:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return Address(f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}", "", "", 1)

    async def close(self) -> None:
        self._server.close()
        for writer, ended in list(self._open.items()):
            writer.transport.abort()
            await ended.wait()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        ended = self._open[writer] = asyncio.Event()
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):  # the client has hung up
            await self._answer(reader, writer)
        writer.close()
        ended.set()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        free = time.monotonic()
        while head := await reader.readuntil(b"\r\n\r\n"):
            length = next(line for line in head.lower().splitlines() if line.startswith(b"content-length"))
            asked = json.loads(await reader.readexactly(int(length.split()[1])))
            if b"/abort_request" in head:
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
                continue
            if time.monotonic() - free > self.idle:
                return
            self.rids.append(asked["rid"])
            if len(self.rids) <= self.lost:
                return
            body = f"data: {json.dumps(report(STOPPED, -0.5))}\n\n".encode()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
            free = time.monotonic()


def client_of(loop: Loop, server: HangsUp) -> tuple[Client, Address]:
    address = loop.run(server.start())
    client = Client(loop, prefix_tokens=64, keyed=False, recomputes=True, stops=StopStrings(Path()))
    look(loop, client, address)
    return client, address


def look(loop: Loop, client: Client, address: Address) -> None:
    """The engine has looked: the server is there."""
    loop.loop.call_soon_threadsafe(client.set_places, {0: address}, {address: 3}, 3)


def ask(client: Client, samples: int) -> tuple[list[Completion], list[int]]:
    """Everything that comes of request 0."""
    client.generate([Request(0, np.array([4, 5], np.int32), samples, Sampling(8, stop_token_ids=(9,)))])
    done = list[Completion]()
    while len(done) < samples:
        found, lost = client.take(1.0)
        if lost:
            return done + found, lost
        done += found
    return done, []


def test_a_connection_is_given_up_before_a_server_hangs_up_on_it(loop: Loop) -> None:
    server = HangsUp(idle=KEPT_SECONDS + 0.5)  # SGLang: 5 s
    client, _ = client_of(loop, server)
    for pause in (0.0, 0.1, KEPT_SECONDS + 1.0):
        time.sleep(pause)
        done, lost = ask(client, 1)
        assert (len(done), lost) == (1, [])
    assert server.connections == 2  # the second request came on the first one's connection
    assert client.counters["lost_requests"] == 0
    loop.run(server.close())


def test_what_a_server_hangs_up_on_is_lost_once_told_counted_and_never_answered(
    loop: Loop, caplog: pytest.LogCaptureFixture
) -> None:
    """Two of three samples of a request are answered, perhaps: asked anew, all three come, and each once."""
    server = HangsUp(lost=1)
    client, address = client_of(loop, server)
    with caplog.at_level(logging.WARNING, logger="offtrail.generator"):
        assert ask(client, 3)[1] == [0]
    assert client.counters["lost_requests"] == 1
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith("request 0 is lost: ")
    look(loop, client, address)
    done, lost = ask(client, 3)
    assert (sorted(completion.index for completion in done), lost) == ([0, 1, 2], [])
    assert client.take(0.2) == ([], [])
    assert client.counters["lost_requests"] == 1
    assert len(set(server.rids)) == len(server.rids)  # no sample was sent twice under one name
    loop.run(server.close())
