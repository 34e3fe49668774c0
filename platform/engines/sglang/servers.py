"""The SGLang servers of one role: started, watched, restarted and stopped (or attached, with engine.urls).

    engine ──poll──► Servers ──► OwnServer × count ──► child process trees (serve.py)
                        │   └──► OwnServer router, told of every server that comes and goes
                        └──writes──► run_dir/servers/OWNER.json ──► the learner (weights.channel=distributed)

Invariants: whoever is in `ready` has answered with this run's keys since its last start; an address names the start
that it belongs to (incarnation), and every start has another port, so that nobody reaches a later server by an earlier
address unknowingly; nothing outlives `close`, nor the thread that called `start` and `poll`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from offtrail.platform.config.schema import SglangConfig
from offtrail.platform.engines.sglang.child import Child
from offtrail.platform.engines.sglang.flags import environment, router_flags, server_flags
from offtrail.platform.engines.sglang.health import ask, attached_server, listens, own_server, serving
from offtrail.platform.engines.sglang.lifecycle import (
    AttachedServer,
    OwnServer,
    ServerError,
    UnhealthyError,
    WatchedServer,
)
from offtrail.platform.engines.sglang.serve import ADMIN_KEY_VARIABLE, KEY_VARIABLE
from offtrail.platform.runtime.context import make_temporary, servers_folder
from offtrail.platform.runtime.host import free_port
from offtrail.platform.wire.auth import write_private

__all__ = ["Address", "ServerError", "Servers", "read_addresses"]

log = logging.getLogger("offtrail.sglang")

SERVER = "offtrail.platform.engines.sglang.serve"
ROUTER = "offtrail.platform.engines.sglang.router"

ROUTER_PERIOD_S = 0.5
"""Between two attempts to let the router know who is ready."""
KEPT_SECONDS = 2.0
"""How long whoever talks to a server keeps a connection on which nothing is asked: the server hangs up after 5 s, and a
request that is on its way at that moment is lost.
"""


@dataclass(frozen=True, slots=True)
class Address:
    """What a client of a server needs. ``key``: /generate and the OpenAI API; ``admin_key``: the control endpoints.

    ``incarnation`` counts the starts at this place: another one is another process, with the start's weights.
    """

    url: str
    key: str
    admin_key: str
    incarnation: int


class Servers:
    """``count`` servers of the model in ``model``, or one at each of config.urls, for the role ``owner``.

    ``max_length`` bounds prompt + answer, in tokens; ``threads`` is a server's on a CPU; ``weight_version`` is what the
    model in ``model`` counts as. Logs go to run_dir/logs/sglang-OWNER-PLACE.log. Not thread-safe, and `start` and
    `poll` must be called by a thread that lives as long as the servers: the kernel kills them when it ends.

    ``name`` is the model's in the OpenAI API, else its path. ``as_it_is``: servers of config.urls are never updated, so
    that they need no admin key. ``more_flags``: of every server, before the user's. ``command`` is the module of one
    server, for tests.
    """

    def __init__(
        self,
        config: SglangConfig,
        model: Path,
        *,
        owner: str,
        count: int,
        max_length: int,
        threads: int,
        run_dir: Path,
        weight_version: int = 0,
        name: str = "",
        as_it_is: bool = False,
        more_flags: Sequence[str] = (),
        command: str = SERVER,
    ) -> None:
        self._as_it_is = as_it_is
        self._config, self._model, self._owner, self._command = config, model, owner, command
        self._name, self._more_flags = name, more_flags
        self._max_length, self._threads, self._weight_version = max_length, threads, weight_version
        self._run_dir = run_dir
        self._logs, self._file = run_dir / "logs", servers_folder(run_dir) / f"{owner}.json"
        self._key, self._admin_key = self._keys()
        self._pool = ThreadPoolExecutor(max_workers=count + 2, thread_name_prefix="sglang-health")
        self._temporary: Path | None = None
        self._written: dict[int, Address] | None = None
        self._router = self._make_router() if config.router else None
        self._told: Future[set[str]] | None = None
        self._told_at = 0.0
        self._routed: set[str] = set()
        self._places = [self._attached(url) for url in config.urls] or [self._own(place) for place in range(count)]

    def start(self) -> None:
        """Launch all processes (none with engine.urls) and return at once; `ready` says who is up."""
        self._temporary = make_temporary(self._run_dir, "sglang")
        self._write()
        for server in self._watched():
            server.start()

    def poll(self) -> None:
        """Notice exits, silences and readiness, and restart what died. Called often; never waits for a server.

        Raises ServerError when a server does not start (in engine.start_seconds), died more than engine.max_restarts
        times, or is an attached one that cannot be used.
        """
        try:
            for server in self._watched():
                server.poll()
        finally:
            self._tell_router()
            self._write()

    def ready(self) -> list[int]:
        """Places of servers that are up and healthy."""
        return [place for place, server in enumerate(self._places) if server.ready]

    def describe(self) -> str:
        """Who is not ready, since when and until when it is waited for, and what its last answer was; else empty."""
        return "; ".join(server.describe() for server in self._places if not server.ready)

    def address(self, place: int) -> Address:
        """The address of the server at ``place`` as it runs now, ready or not."""
        return self._address_of(self._places[place])

    @property
    def router(self) -> Address | None:
        """With engine.router, where requests may go once it knows a server; control calls find nobody there."""
        router = self._router
        return self._address_of(router) if router is not None and router.ready and self._routed else None

    def kill(self, place: int, why: str) -> None:
        """End a server that hangs: SIGKILL for its whole process tree, stopped processes too; `poll` restarts it.

        ``why`` completes "the server …". Raises ServerError for an attached one.
        """
        self._places[place].kill(why)
        self._write()

    def close(self) -> None:
        """Kill every process that was started, and remove what they left. A second call does nothing."""
        for server in self._watched():
            server.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._file.unlink(missing_ok=True)
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)

    # Making

    def _keys(self) -> tuple[str, str]:
        if not self._config.urls:
            return secrets.token_hex(16), secrets.token_hex(16)
        found = tuple(os.environ.get(variable, "") for variable in (KEY_VARIABLE, ADMIN_KEY_VARIABLE))
        if self._as_it_is:
            return found[0], found[1] or found[0]
        if not all(found):
            raise ServerError(
                f"engine.urls: set ${KEY_VARIABLE} and ${ADMIN_KEY_VARIABLE} to the servers' --api-key and "
                "--admin-api-key, which they must have been started with"
            )
        return found[0], found[1]

    def _own(self, place: int) -> WatchedServer:
        def launch(port: int) -> Child:
            flags = server_flags(
                self._config,
                self._model,
                place=place,
                port=port,
                max_length=self._max_length,
                weight_version=self._weight_version,
                name=self._name,
                more=self._more_flags,
            )
            return Child(self._command, flags, self._environment(), self._logs / f"sglang-{self._owner}-{place}.log")

        title = f"SGLang server {place} of {self._owner}"
        return OwnServer(title, self._config, own_server(self._key, self._admin_key), self._pool, launch)

    def _attached(self, url: str) -> WatchedServer:
        updated = attached_server(self._key, self._admin_key, self._config)
        check = serving(self._key) if self._as_it_is else updated
        server = AttachedServer(url, self._config, check, self._pool)
        server.url = url.rstrip("/")
        return server

    def _make_router(self) -> OwnServer:
        def launch(port: int) -> Child:
            flags = router_flags(self._config, port, free_port("127.0.0.1"))
            return Child(ROUTER, flags, self._environment(), self._logs / f"sglang-{self._owner}-router.log")

        return OwnServer(f"sglang-router of {self._owner}", self._config, listens, self._pool, launch)

    def _environment(self) -> Mapping[str, str]:
        assert self._temporary is not None
        return environment(self._threads, self._key, self._admin_key, self._temporary)

    def _watched(self) -> list[WatchedServer]:
        return [*self._places, *([self._router] if self._router is not None else [])]

    def _address_of(self, server: WatchedServer) -> Address:
        return Address(server.url, self._key, self._admin_key, server.incarnation)

    # Telling

    def _write(self) -> None:
        """Let OWNER.json say who is ready, if that has changed."""
        ready = {place: self.address(place) for place in self.ready()}
        if ready != self._written:
            write_addresses(self._file, ready)
            self._written = ready

    def _tell_router(self) -> None:
        """Let the router know who is ready, in the background; a router that has restarted knows nobody."""
        if self._told is not None:
            if not self._told.done():
                return
            told, self._told = self._told, None
            with contextlib.suppress(UnhealthyError):
                self._routed = told.result()
        if self._router is None or not self._router.ready:
            self._routed = set()
            return
        wanted = {self._places[place].url for place in self.ready()}
        if wanted != self._routed and time.monotonic() - self._told_at > ROUTER_PERIOD_S:
            self._told_at = time.monotonic()
            self._told = self._pool.submit(route, self._router.url, self._key, wanted)


def route(router: str, key: str, wanted: set[str]) -> set[str]:
    """Add and remove servers of sglang-router until it sends to those at ``wanted`` urls; those that it has now.

    It takes a change at once and carries it out in the background, so that the caller asks again until they agree.
    """
    _, body = ask(f"{router}/workers", key)
    known = {worker["url"]: worker["id"] for worker in (body or {}).get("workers", [])}
    for url in wanted - set(known):
        ask(f"{router}/workers", key, {"url": url, "api_key": key})
    for url in set(known) - wanted:
        ask(f"{router}/workers/{known[url]}", key, method="DELETE")
    return set(known)


def write_addresses(file: Path, ready: Mapping[int, Address]) -> None:
    """Replace ``file`` by the addresses of the ready servers; only its owner can read it, for the keys stand in it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    servers = [{"place": place, **asdict(address)} for place, address in ready.items()]
    write_private(file, json.dumps({"servers": servers}))


def read_addresses(file: Path) -> dict[int, Address]:
    """Place → address of the ready servers in run_dir/servers/OWNER.json; empty while there is none."""
    try:
        servers: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["servers"]
    except FileNotFoundError:
        return {}
    return {server.pop("place"): Address(**server) for server in servers}
