"""What stands between the users of job=serve and its SGLang server: keys, bounds, and answers while it starts anew.

    users ──► Gateway (a thread: serve.address, serve.port) ──► the server (loopback, a port and a key of its own)

Two endpoints of OpenAI's API and the list of models are served with the key, /health without it (it asks nobody);
everything else is 404. Invariants: nothing reaches the server that api_request.py refuses, nor more than ``most``
requests at a time; who leaves ends his request there, too; a connection that asks nothing for IDLE_SECONDS is let go.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import aiohttp
from aiohttp import web

from offtrail.platform.engines.sglang.servers import KEPT_SECONDS, Address
from offtrail.platform.launcher.api_request import PATHS, Bounds, InvalidError, read_request

log = logging.getLogger("offtrail.serve")

IDLE_SECONDS = 30.0
BODY_SECONDS = 60.0
"""The longest that a request's body may take to arrive."""
START_SECONDS = 10.0
SPARE_CONNECTIONS = 256
"""Connections beyond those of the requests that are answered."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a gateway listens, and the key that it wants."""

    address: str
    port: int
    key: str
    model: str


class Gateway:
    """Listens from the start on; ``server`` is where requests go, None while there is none."""

    def __init__(self, place: Place, bounds: Bounds, most: int) -> None:
        self.server: Address | None = None
        self.place, self._bounds, self._most = place, bounds, most
        self._answered = 0
        self._socket = _bound(place.address, place.port)
        self.port = int(self._socket.getsockname()[1])
        self._asking: set[asyncio.BaseTransport] = set()
        self._ready, self._stop = threading.Event(), asyncio.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="gateway", daemon=True)
        self._thread.start()
        if not self._ready.wait(START_SECONDS):
            raise TimeoutError(f"nothing listens at {place.address} after {START_SECONDS:g} s")

    @property
    def alive(self) -> bool:
        """Whether it listens."""
        return self._thread.is_alive()

    def close(self) -> None:
        """End every request and stop to listen."""
        with contextlib.suppress(RuntimeError):  # its loop has ended
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(START_SECONDS)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        app = web.Application(middlewares=[self._guard], client_max_size=self._bounds.body_bytes)
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        for path in PATHS:
            app.router.add_post(path, self._answer)
        # who leaves cancels his request; nothing is logged of each
        runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        async with aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=START_SECONDS),
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEPT_SECONDS),
            auto_decompress=False,
        ) as self._session:
            await web.SockSite(runner, self._socket).start()
            self._ready.set()
            sweeping = asyncio.create_task(self._let_go(runner))
            await self._stop.wait()
            sweeping.cancel()
            await runner.cleanup()

    # Who may ask

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """The key first, whatever is asked for; then every mistake in the form of OpenAI's API."""
        transport = request.transport
        if transport is not None:
            self._asking.add(transport)
        try:
            if request.path != "/health" and not self._has_key(request):
                return refusal(
                    401, "no such key; send the header `Authorization: Bearer KEY`", kind="authentication_error"
                )
            return await handler(request)
        except InvalidError as error:
            return refusal(error.status, str(error), error.field)
        except web.HTTPRequestEntityTooLarge:
            return refusal(413, f"the body is longer than {self._bounds.body_bytes:,} bytes")
        except web.HTTPException as error:
            served = ", ".join((*PATHS, "/v1/models", "/health"))
            return refusal(error.status, f"{request.method} {request.path[:200]}: {error.reason}; served are {served}")
        finally:
            if transport is not None:
                self._asking.discard(transport)

    def _has_key(self, request: web.Request) -> bool:
        kind, _, key = request.headers.get("Authorization", "").partition(" ")
        given, wanted = key.encode(errors="surrogateescape"), self.place.key.encode()
        return kind.lower() == "bearer" and secrets.compare_digest(given, wanted)

    async def _let_go(self, runner: web.AppRunner) -> None:
        """Close connections that ask nothing for too long, and the longest idle ones where there are too many."""
        since: dict[web.RequestHandler, float] = {}
        while runner.server is not None:
            now, connections = time.monotonic(), list(runner.server.connections)
            since = {c: since.get(c, now) for c in connections if c.transport not in self._asking}
            surplus = len(connections) - self._most - SPARE_CONNECTIONS
            for place, connection in enumerate(sorted(since, key=since.__getitem__)):
                if place < surplus or now - since[connection] > IDLE_SECONDS:
                    connection.force_close()
            await asyncio.sleep(1.0)

    # Answers

    async def _health(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"ready": self.server is not None}, status=200 if self.server else 503)

    async def _models(self, request: web.Request) -> web.StreamResponse:
        model = {"id": self.place.model, "object": "model", "owned_by": "offtrail"}
        return web.json_response({"object": "list", "data": [model | {"max_model_len": self._bounds.positions}]})

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        if self._answered >= self._most:
            return refusal(429, f"{self._most} requests are being answered (serve.max_requests); ask again later")
        self._answered += 1
        try:
            try:
                async with asyncio.timeout(BODY_SECONDS):
                    body = await request.read()
            except TimeoutError:
                return refusal(408, f"the body has not arrived for {BODY_SECONDS:g} s")
            asked = read_request(body, request.path, self._bounds)
            return await self._forward(request, asked)
        finally:
            self._answered -= 1

    async def _forward(self, request: web.Request, asked: dict[str, object]) -> web.StreamResponse:
        """The server's answer as it comes; 503 where there is no server, a cut where it breaks off."""
        server, response = self.server, None
        if server is None:
            return refusal(503, "the server starts; ask again later", kind="server_error")
        headers = {"Authorization": f"Bearer {server.key}"}
        try:
            async with self._session.post(f"{server.url}{request.path}", json=asked, headers=headers) as answer:
                response = web.StreamResponse(
                    status=answer.status, headers={"Content-Type": answer.headers.get("Content-Type", "text/plain")}
                )
                await response.prepare(request)
                async for piece in answer.content.iter_any():
                    await response.write(piece)
                await response.write_eof()
                return response
        except aiohttp.ClientError as error:
            log.warning("the server broke off: %s", error)
            if response is None or not response.prepared:
                return refusal(503, "the server broke off, and is started anew", kind="server_error")
            if request.transport is not None:  # the end of a half answer must not look like its end
                request.transport.abort()
            return response


def refusal(status: int, message: str, field: str = "", kind: str = "invalid_request_error") -> web.Response:
    """An error as OpenAI's API has them."""
    error = {"message": message, "type": kind, "param": field or None, "code": None}
    return web.json_response({"error": error}, status=status)


def _bound(address: str, port: int) -> socket.socket:
    """A socket that is bound; OSError where it cannot be."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    bound = socket.socket(family)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((address, port))
    except OSError:
        bound.close()
        raise
    return bound
