"""The life of one server: one that offtrail starts and keeps alive (OwnServer), or one that runs without it
(AttachedServer). Driven by servers.py.

    OwnServer:       start ──► starting ──healthy──► ready ──exits, hangs, is killed──► start, with another port
    AttachedServer:  start ──► starting ──healthy──► ready ──unreachable──► ServerError

Invariants: health is asked in the background, so that `poll` never waits for a server; an incarnation is ready only
after it has answered with the run's own key, so that a stranger on its port is never taken for it; every wait ends in
a ServerError that says for what, on whom, since when and until when (I4).
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Executor, Future

from offtrail.platform.config.errors import FinalError
from offtrail.platform.config.schema import SglangConfig
from offtrail.platform.engines.sglang.child import Child
from offtrail.platform.engines.sglang.flags import url_of
from offtrail.platform.runtime.host import free_port

log = logging.getLogger("offtrail.sglang")

STARTING_PERIOD_S = 0.25
RUNNING_PERIOD_S = 5.0
"""Between two questions for its health."""
ATTACH_SECONDS = 30.0
"""The longest that a server of engine.urls may take to answer first: it is said to run already."""


class ServerError(FinalError):
    """A server cannot be had: it does not start, has died too often, or is not offtrail's to start. One line."""


class UnhealthyError(Exception):
    """What a check raises: the server does not answer as it should. ``final``: nor will it later. ``nobody``: nothing
    listens at its port.
    """

    def __init__(self, reason: str, *, final: bool = False, nobody: bool = False) -> None:
        super().__init__(reason)
        self.final, self.nobody = final, nobody


Check = Callable[[str, bool], None]
"""Called with (url, whether it is the first time); raises UnhealthyError. Runs in another thread."""


class WatchedServer(ABC):
    """A server at ``url`` whose health is asked again and again. ``title`` names it in messages."""

    def __init__(self, title: str, config: SglangConfig, check: Check, pool: Executor) -> None:
        self.title, self.url = title, ""
        self.incarnation = 0
        self.ready = False
        self._config, self._check, self._pool = config, check, pool
        self._asked: Future[None] | None = None
        self._asked_at = self._since = 0.0
        self._unanswered_since: float | None = None
        self._since_clock = ""
        self._reason = "nothing asked yet"

    @abstractmethod
    def start(self) -> None:
        """Launch, or begin to ask."""

    @abstractmethod
    def poll(self) -> None:
        """Notice what has happened. Raises ServerError."""

    @abstractmethod
    def kill(self, why: str) -> None:
        """End this incarnation: it hangs, says the engine."""

    @abstractmethod
    def close(self) -> None:
        """End it for good."""

    def _begin(self, url: str) -> None:
        self.url, self.ready = url, False
        self._asked = self._unanswered_since = None
        self.incarnation += 1

    def _wait_begins(self) -> None:
        self._since, self._since_clock = time.monotonic(), time.strftime("%H:%M:%S")

    def _ask(self) -> UnhealthyError | None:
        """Take an answer if there is one, ask again if it is time; what the answer complained about."""
        now = time.monotonic()
        if self._asked is None:
            if now - self._asked_at >= (RUNNING_PERIOD_S if self.ready else STARTING_PERIOD_S):
                self._asked, self._asked_at = self._pool.submit(self._check, self.url, not self.ready), now
                self._unanswered_since = self._unanswered_since or now
            return None
        if not self._asked.done():
            return None
        error, self._asked = self._asked.exception(), None
        if isinstance(error, UnhealthyError):
            self._reason = str(error)
            return error
        if error is not None:
            raise error
        self._unanswered_since = None
        if not self.ready:
            log.info("%s is ready at %s (start %d)", self.title, self.url, self.incarnation)
        self.ready = True
        return None

    def _silence(self) -> str:
        """What to say of a ready server that has been asked in vain for engine.hang_seconds; empty of any other."""
        limit, since = self._config.hang_seconds, self._unanswered_since
        if not self.ready or since is None or time.monotonic() - since <= limit:
            return ""
        return f"has not answered for {limit:g} s (engine.hang_seconds): {self._reason}"

    @property
    @abstractmethod
    def patience(self) -> float:
        """Seconds that it may take to become ready."""

    def describe(self) -> str:
        """It, since when and until when it is waited for, and what its last answer was."""
        until = time.time() + self._since + self.patience - time.monotonic()
        clock = time.strftime("%H:%M:%S", time.localtime(until))
        return f"{self.title} ({self.url}) since {self._since_clock} until {clock}: {self._reason}"

    def _late(self) -> bool:
        return not self.ready and time.monotonic() - self._since > self.patience


class OwnServer(WatchedServer):
    """A server of this run's own. ``launch`` starts it at a port."""

    def __init__(
        self,
        title: str,
        config: SglangConfig,
        check: Check,
        pool: Executor,
        launch: Callable[[int], Child],
    ) -> None:
        super().__init__(title, config, check, pool)
        self._launch = launch
        self._child: Child | None = None
        self._deaths = 0
        self._why = ""
        self._was_ever_ready = False

    @property
    def patience(self) -> float:
        """engine.start_seconds."""
        return self._config.start_seconds

    @property
    def pid(self) -> int:
        """The number of the running server's first process."""
        assert self._child is not None
        return self._child.pid

    def start(self) -> None:
        """Launch an incarnation; engine.start_seconds count from here."""
        self._wait_begins()
        self._launch_at_free_port()

    def poll(self) -> None:
        """Notice an exit, a readiness or a silence, and restart. ServerError when it cannot be started."""
        if self._child is None:
            return
        if self._child.exited:
            self._died(self._child)
            return
        was_ready = self.ready
        self._ask()
        if self.ready and not was_ready:
            self._was_ever_ready = True
            self._child.remember()
        if silence := self._silence():
            self.kill(silence)
        elif self._late():
            raise ServerError(
                f"waited for {self.describe()}; raise engine.start_seconds, or see its log: {self._child.log}"
            )

    def kill(self, why: str) -> None:
        """Kill its whole process tree; the next `poll` restarts it."""
        if self._child is not None:
            self._why, self.ready = why, False
            self._child.end()

    def close(self) -> None:
        """Kill its whole process tree."""
        self.ready = False
        if self._child is not None:
            self._child.end()
            self._child = None

    def _launch_at_free_port(self) -> None:
        try:
            port = free_port(self._config.address)
        except OSError as error:
            where = f"engine.address={self._config.address}"
            raise ServerError(f"{self.title} can have no port at {where} ({error.strerror}); give it another") from None
        self._begin(url_of(self._config.address, port))
        self._child = self._launch(port)

    def _died(self, child: Child) -> None:
        """Restart a server that has ended, unless that is of no use."""
        killed, was_ready, self.ready = self._why, self.ready, False
        how, self._why = child.end(), ""
        if not (killed or was_ready) and child.port_was_taken:
            log.warning("%s lost its port to another process; it is started at another one", self.title)
            self._launch_at_free_port()  # the wait goes on
            return
        if not (killed or self._was_ever_ready):  # what keeps it from starting at all, another start does not cure
            raise ServerError(f"{self.title} does not start: it {how}")
        self._deaths += 1
        how = f"was killed, for it {killed} (log: {child.log})" if killed else how
        if self._deaths > self._config.max_restarts:
            limit = self._config.max_restarts
            raise ServerError(f"{self.title} died {self._deaths} times (engine.max_restarts={limit}): it {how}")
        log.warning("%s %s; start %d follows", self.title, how, self.incarnation + 1)
        self.start()


class AttachedServer(WatchedServer):
    """A server of engine.urls: never started, killed or restarted."""

    @property
    def patience(self) -> float:
        """ATTACH_SECONDS, or engine.start_seconds if that is less."""
        return min(ATTACH_SECONDS, self._config.start_seconds)

    def start(self) -> None:
        """Begin to ask."""
        self._wait_begins()
        self._begin(self.url)

    def poll(self) -> None:
        """Notice a readiness. ServerError when it does not answer, refuses a key or is of no use."""
        was_ready, complaint = self.ready, self._ask()
        if complaint is not None and (complaint.final or (was_ready and complaint.nobody)):
            raise ServerError(f"engine.urls: {self.url} {complaint}")
        if silence := self._silence():
            raise ServerError(f"engine.urls: {self.url} {silence}")
        if self._late():
            raise ServerError(f"engine.urls: waited for {self.describe()}; is it running?")

    def kill(self, why: str) -> None:
        """Not offtrail's to kill: ServerError."""
        raise ServerError(f"engine.urls: {self.url} {why}; offtrail has not started it and leaves it as it is")

    def close(self) -> None:
        """It goes on without this run."""
        self.ready = False
