"""The gateway of job=serve before a stand-in for its server, which notes what reaches it."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from aiohttp import web

from offtrail.platform.engines.sglang.servers import Address
from offtrail.platform.launcher import gateway as module
from offtrail.platform.launcher.api_request import Bounds
from offtrail.platform.launcher.gateway import Gateway, Place

KEY, OWN = "users-key", "servers-own"
BOUNDS = Bounds(positions=1000, vocabulary=50, answers=4)
WAIT_S = 20.0


class Server:
    """A server's OpenAI API, in a thread: prompt "slow" waits for `release`, "stream" comes in three pieces, "broken"
    is cut in the middle.
    """

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []
        self.left = threading.Event()
        self.release, self._ready = asyncio.Event(), threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        assert self._ready.wait(WAIT_S)

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application()
        app.router.add_post("/v1/completions", self._completions)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.address = Address(f"http://127.0.0.1:{runner.addresses[0][1]}", OWN, "", 1)
        self._ready.set()
        await self._stop.wait()
        await runner.cleanup()

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        assert request.headers["Authorization"] == f"Bearer {OWN}"
        body = await request.json()
        self.seen.append(body)
        if body["prompt"] == "slow":
            try:
                await self.release.wait()
            except asyncio.CancelledError:
                self.left.set()
                raise
        if body["prompt"] == "refused":
            return web.json_response({"message": "too long"}, status=400)
        if body["prompt"] not in ("stream", "broken"):
            return web.json_response({"choices": [{"text": body["prompt"]}]})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for piece in range(3):
            await response.write(b"data: %d\n\n" % piece)
            if body["prompt"] == "broken":
                assert request.transport is not None
                request.transport.abort()
                break
        return response

    def free(self) -> None:
        self._loop.call_soon_threadsafe(self.release.set)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(WAIT_S)


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


@pytest.fixture
def gateway(server: Server) -> Iterator[Gateway]:
    made = Gateway(Place("127.0.0.1", 0, KEY, "tiny"), BOUNDS, most=3)
    made.server = server.address
    yield made
    made.close()
    assert not made.alive


def ask(
    gateway: Gateway, body: Any = None, path: str = "/v1/completions", key: str = KEY, method: str = ""
) -> tuple[int, Any]:
    """(status, JSON or text)."""
    line = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=WAIT_S)
    data = body if isinstance(body, bytes) else None if body is None else json.dumps(body)
    line.request(method or ("GET" if body is None else "POST"), path, data, {"Authorization": f"Bearer {key}"})
    answer = line.getresponse()
    said = answer.read().decode()
    line.close()
    return answer.status, json.loads(said) if "json" in answer.headers["Content-Type"] else said


def asking(gateway: Gateway, prompt: str) -> http.client.HTTPConnection:
    """A connection whose request is on its way."""
    line = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=WAIT_S)
    line.request("POST", "/v1/completions", json.dumps({"prompt": prompt}), {"Authorization": f"Bearer {KEY}"})
    return line


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_request_within_bounds_reaches_the_server_and_its_answer_the_user(gateway: Gateway, server: Server) -> None:
    body = {"prompt": "hello", "max_tokens": 5}
    assert ask(gateway, body) == (200, {"choices": [{"text": "hello"}]})
    assert server.seen == [body]
    assert ask(gateway, {"prompt": "refused"}) == (400, {"message": "too long"})
    assert ask(gateway, {"prompt": "stream", "stream": True}) == (200, "data: 0\n\ndata: 1\n\ndata: 2\n\n")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"prompt": [1_000_000_000]}, "prompt"),
        ({"prompt": "a", "n": 10_000}, "n"),
        ({"prompt": "a", "max_tokens": 10**9}, "max_tokens"),
        ({"prompt": "a", "temperature": -1}, "temperature"),
        ({"prompt": ["a"] * 5}, "prompt"),
        ({"prompt": [[[1]]]}, "prompt"),
        ({"prompt": "a", "logprobs": 10_000}, "logprobs"),
        ({"prompt": "a", "json_schema": "{}"}, "json_schema"),
        (b'{"prompt": "a", "temperature": NaN}', None),
    ],
)
def test_a_request_beyond_them_is_answered_here(gateway: Gateway, server: Server, body: Any, field: str) -> None:
    status, said = ask(gateway, body)
    assert (status, said["error"]["type"], said["error"]["param"]) == (400, "invalid_request_error", field)
    assert server.seen == []


def test_a_body_that_is_too_long_is_not_read_to_its_end(gateway: Gateway, server: Server) -> None:
    status, said = ask(gateway, b"x" * (BOUNDS.body_bytes + 1))
    assert (status, said["error"]["message"]) == (413, f"the body is longer than {BOUNDS.body_bytes:,} bytes")
    assert server.seen == []


def test_nothing_but_health_is_answered_without_the_key(gateway: Gateway, server: Server) -> None:
    for key in ("", "wrong", OWN, "é"):
        assert ask(gateway, {"prompt": "a"}, key=key.encode().decode("latin-1"))[0] == 401
        for path in ("/v1/models", "/health_generate", "/generate", "/nothing"):
            assert ask(gateway, path=path, key="wrong")[0] == 401
    assert ask(gateway, path="/health", key="") == (200, {"ready": True})
    assert server.seen == []


def test_only_the_api_is_there_with_the_key(gateway: Gateway) -> None:
    for path in ("/generate", "/health_generate", "/server_info", "/flush_cache", "/v1/../generate"):
        status, said = ask(gateway, {"prompt": "a"}, path=path)
        assert status == 404
        assert said["error"]["message"].endswith(
            "served are /v1/completions, /v1/chat/completions, /v1/models, /health"
        )
    assert ask(gateway, path="/v1/completions")[0] == 405
    status, said = ask(gateway, path="/v1/models")
    assert (status, said["data"][0]["id"], said["data"][0]["max_model_len"]) == (200, "tiny", 1000)


def test_more_requests_than_may_be_answered_at_a_time_are_told_so(gateway: Gateway, server: Server) -> None:
    slow = [asking(gateway, "slow") for _ in range(3)]
    wait_for(lambda: len(server.seen) == 3)
    status, said = ask(gateway, {"prompt": "a"})
    assert (status, said["error"]["message"]) == (
        429, "3 requests are being answered (serve.max_requests); ask again later",
    )  # fmt: skip
    server.free()
    assert [line.getresponse().status for line in slow] == [200] * 3
    assert ask(gateway, {"prompt": "a"})[0] == 200
    for line in slow:
        line.close()


def test_who_leaves_ends_his_request_at_the_server(gateway: Gateway, server: Server) -> None:
    line = asking(gateway, "slow")
    wait_for(lambda: server.seen)
    line.close()
    assert server.left.wait(WAIT_S)


def test_a_server_that_is_away_or_breaks_off(gateway: Gateway, server: Server) -> None:
    line = asking(gateway, "broken")
    with pytest.raises(http.client.IncompleteRead):
        line.getresponse().read()
    line.close()
    gateway.server = None
    assert ask(gateway, {"prompt": "a"})[0] == 503
    assert ask(gateway, path="/health", key="") == (503, {"ready": False})
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        gateway.server = Address(f"http://127.0.0.1:{nobody.getsockname()[1]}", OWN, "", 2)
        status, said = ask(gateway, {"prompt": "a"})
    assert (status, said["error"]["message"]) == (503, "the server broke off, and is started anew")
    gateway.server = server.address
    assert ask(gateway, {"prompt": "a"})[0] == 200


def test_connections_that_ask_nothing_are_let_go(monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    """Silent ones, and those that never end their request's head; one that waits for its answer stays."""
    monkeypatch.setattr(module, "IDLE_SECONDS", 0.2)
    gateway = Gateway(Place("127.0.0.1", 0, KEY, "tiny"), BOUNDS, most=3)
    gateway.server = server.address
    slow = asking(gateway, "slow")
    strangers = [socket.create_connection(("127.0.0.1", gateway.port), timeout=WAIT_S) for _ in range(5)]
    strangers[0].sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n")
    assert [stranger.recv(1) for stranger in strangers] == [b""] * 5
    server.free()
    assert slow.getresponse().status == 200
    for line in (slow, *strangers):
        line.close()
    gateway.close()


def test_a_port_that_is_taken_is_said(gateway: Gateway) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(OSError, match="Address already in use"):
            Gateway(Place("127.0.0.1", other.getsockname()[1], KEY, "tiny"), BOUNDS, most=3)
