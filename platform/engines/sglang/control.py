"""Control of a running SGLang server: stop, give it weights, let it go on.

    swap ──► [handed back] ── pause ──► [flushed] ──► begin ── transfer ── end ──► continue

Called by the engine (it brings a version to its own servers) and by the learner (it pushes one to all servers,
push.py). Invariants: a version becomes the server's in the same call that loads its last tensor, while
nothing decodes, so that a token's stamp is the weights that made it; whatever happens after the pause, the server goes
on or the caller is told that it cannot be trusted any more (`TornError`).

Traps of SGLang (seen): an update with flush_cache while anything runs kills the server, so that the cache is emptied
by a call of its own, before; versions before 0.5.21 have no
sessions, later ones refuse tensors outside one; a checkpoint of another architecture is answered with success, so that
names and shapes are checked by the caller, before.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import aiohttp

from offtrail.platform.engines.sglang.loader import request
from offtrail.platform.engines.sglang.servers import Address

PauseMode = Literal["retract", "in_place", "abort"]
FLUSH_SECONDS = 10.0
VERDICT_SECONDS = 10.0
AGAIN_SECONDS = 0.05
"""Between two abortions of all samples: one that was on its way to the server escapes the first."""
LOADER = "offtrail.platform.engines.sglang.loader.load"
"""The custom weight loader that offtrail's own servers are started with."""


class ControlError(RuntimeError):
    """A control call that the server refused, or that failed on the way; one line with the server and its words."""


class AnsweredError(ControlError):
    """The server answered that it does not do it."""


class TornError(ControlError):
    """The server may hold a part of the new weights: it must be restarted, or given the whole of a version."""


class LoaderRefusedError(ControlError):
    """The loader inside the server refused a version before it changed anything."""


@dataclass(frozen=True, slots=True)
class Server:
    """One server as the control calls see it. ``has_sessions``: it wants tensors between begin and end (≥ 0.5.21)."""

    address: Address
    session: aiohttp.ClientSession
    has_sessions: bool = True
    deadline_s: float = 120.0

    async def post(
        self, path: str, body: dict[str, Any] | None = None, deadline_s: float | None = None
    ) -> dict[str, Any]:
        """The answer of a control endpoint. Raises ControlError when it refuses, breaks off, or takes too long."""
        limit, started = deadline_s or self.deadline_s, time.time()
        try:
            async with self.session.post(
                f"{self.address.url}{path}",
                json=body or {},
                headers={"Authorization": f"Bearer {self.address.admin_key}"},
                timeout=aiohttp.ClientTimeout(total=limit),
            ) as reply:
                text = await reply.text()
                answer = await reply.json(content_type=None) if text.startswith("{") else {"message": text}
                if reply.status != 200 or not answer.get("success", True):
                    words = answer.get("message") or answer.get("error") or text
                    raise AnsweredError(f"{self.address.url}{path} answered {reply.status}: {words}")
                return dict(answer)
        except TimeoutError:
            raise ControlError(
                f"{self.address.url}{path} has not answered since {time.strftime('%H:%M:%S', time.localtime(started))} "
                f"({limit:g} s, engine.hang_seconds)"
            ) from None
        except (aiohttp.ClientError, OSError) as error:
            raise ControlError(f"{self.address.url}{path}: {type(error).__name__}: {error}") from error

    async def model_info(self) -> dict[str, Any]:
        """What the server says of its model, ``weight_version`` among it."""
        try:
            async with self.session.get(
                f"{self.address.url}/model_info",
                headers={"Authorization": f"Bearer {self.address.key}"},
                timeout=aiohttp.ClientTimeout(total=self.deadline_s),
            ) as reply:
                return dict(await reply.json()) if reply.status == 200 else {}
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise ControlError(f"{self.address.url}/model_info: {type(error).__name__}: {error}") from error


Transfer = Callable[[Server], Awaitable[None]]
"""Gives a paused server the tensors."""


async def swap(
    server: Server,
    version: int,
    mode: PauseMode,
    transfer: Transfer,
    *,
    drained: Callable[[], Awaitable[None]] | None = None,
) -> None:
    """Pause, transfer, name the version, continue. ``drained`` (mode=abort): returns when every sample has come back.

    What each mode does with unfinished samples: ``retract`` holds them and computes their keys and values anew under
    the new weights; ``in_place`` goes on from the old ones; ``abort`` hands them back, and the client sends them again.

    Raises:
        ControlError: refused; the server goes on with the weights that it had.
        TornError: it failed half-way, or does not go on.
    """
    if mode == "abort" and drained is not None:
        await hand_back(server, drained)
    await server.post("/pause_generation", {"mode": mode})
    try:
        if mode != "in_place":
            await flush(server)
        await transfer(server)
        await _name(server, version)
    except BaseException as error:
        if not isinstance(error, TornError):
            await _go_on(server)
        raise
    await _go_on(server)


async def hand_back(server: Server, drained: Callable[[], Awaitable[None]]) -> None:
    """Have the server abort all samples, until they have come back.

    Trap: a pause with mode=abort does this too, but looks only once a second whether they have.
    """
    back, limit = asyncio.ensure_future(drained()), time.monotonic() + server.deadline_s
    try:
        while not back.done():
            await server.post("/abort_request", {"abort_all": True})
            await asyncio.wait({back}, timeout=AGAIN_SECONDS)
            if not back.done() and time.monotonic() > limit:
                raise ControlError(
                    f"{server.address.url} has not handed its samples back in {server.deadline_s:g} s "
                    "(engine.hang_seconds)"
                )
    finally:
        back.cancel()


async def _name(server: Server, version: int) -> None:
    try:
        # Trap: abort_all_requests is true unless it is told otherwise.
        await server.post("/update_weight_version", {"new_version": str(version), "abort_all_requests": False})
    except ControlError as error:
        raise TornError(str(error)) from error


async def _go_on(server: Server) -> None:
    try:
        # An empty_cache at each update would give the allocator's blocks back for nothing.
        await server.post("/continue_generation", {"torch_empty_cache": False} if server.has_sessions else {})
    except ControlError as error:
        raise TornError(str(error)) from error


async def flush(server: Server) -> None:
    """Empty the cache of a server where nothing runs; for a moment after a request ends it answers that it is not idle.

    Traps: an update that flushes by itself dies of that moment; with a timeout in the call a server that holds samples
    waits it out, and refuses.
    """
    limit = time.monotonic() + FLUSH_SECONDS
    while True:
        try:
            await server.post("/flush_cache")
            return
        except ControlError:
            if time.monotonic() > limit:
                raise
            await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def weight_session(server: Server) -> AsyncIterator[None]:
    """Begin … end around tensors, where the server has sessions. A failure inside, other than a loader that refused,
    leaves the weights torn.
    """
    if server.has_sessions:
        await server.post("/begin_weight_update")
    try:
        yield
    except LoaderRefusedError:
        await _end_session(server)
        raise
    except ControlError as error:
        with contextlib.suppress(ControlError):
            await _end_session(server)
        raise TornError(str(error)) from error
    await _end_session(server)


async def _end_session(server: Server) -> None:
    if not server.has_sessions:
        return
    try:
        await server.post("/end_weight_update")
    except ControlError as error:
        raise TornError(str(error)) from error


@dataclass(frozen=True)
class FromFile:
    """A published version, read by offtrail's loader inside the server (shm, disk). ``ranks``: of the server."""

    folder: Path
    version: int
    ranks: int = 1

    async def __call__(self, server: Server) -> None:
        """Name the file to the server; it maps, checks and loads it."""
        verdict = self.folder / f"verdict-{uuid.uuid4().hex}"
        payload = base64.b64encode(request(str(self.folder), self.version, str(verdict))).decode()
        body = {"serialized_named_tensors": [payload] * self.ranks, "load_format": LOADER, "flush_cache": False}
        async with weight_session(server):
            await server.post("/update_weights_from_tensor", body)
            words = [await _verdict(verdict.with_name(f"{verdict.name}.{rank}")) for rank in range(self.ranks)]
            if all(word.startswith("refused") for word in words):
                raise LoaderRefusedError(f"{server.address.url}: version {self.version} {words[0]}")
            if any(word != "ok" for word in words):
                raise TornError(f"{server.address.url}: version {self.version}: {'; '.join(words)}")


async def _verdict(file: Path) -> str:
    """What the loader wrote; on a network's file system it may take a moment to be seen."""
    limit = time.monotonic() + VERDICT_SECONDS
    while time.monotonic() < limit:
        with contextlib.suppress(FileNotFoundError):
            words = file.read_text()
            file.unlink(missing_ok=True)
            return words
        await asyncio.sleep(0.005)
    return f"no verdict in {file} after {VERDICT_SECONDS:g} s"


@dataclass(frozen=True)
class FromDirectory:
    """A Hugging Face directory, read by SGLang's own loader: for servers that lack offtrail's."""

    folder: Path
    version: int

    async def __call__(self, server: Server) -> None:
        """Name the directory to the server."""
        try:
            await server.post("/update_weights_from_disk", {"model_path": str(self.folder), "flush_cache": False})
        except ControlError as error:  # it rolls back by reading the same directory again
            raise TornError(str(error)) from error


@dataclass(frozen=True)
class FromMemory:
    """Handles to the learner's tensors (CUDA IPC, or shared memory on a CPU), fetched for each server."""

    fetch: Callable[[int], list[list[str]]]
    ranks: int = 1

    async def __call__(self, server: Server) -> None:
        """Bucket by bucket."""
        buckets = await asyncio.to_thread(self.fetch, self.ranks)
        async with weight_session(server):
            for bucket in buckets:
                body = {"serialized_named_tensors": bucket, "flush_cache": False}
                await server.post("/update_weights_from_tensor", body)
