"""The heartbeat of a role: a thread with a socket of its own, so that a long computation never looks like a death.

    role ── Heartbeat (what it does, since when, counters) ──► broker      every period_s
    role ◄── Beat (newest version, trained, stop) ──────────── broker

Started by RoleContext.connect. The role's loop reads `version`, `trained`, `stop`, `scorers` and `lost`; nobody writes
them but the thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from offtrail.platform.runtime.activity import Activity
from offtrail.platform.wire.messages import Beat, Heartbeat, ScorerAt
from offtrail.platform.wire.sockets import Client


class HeartbeatThread:
    """Beats until ``close``, which sends one last beat so that the final counters reach the broker. ``dial`` opens its
    line, in its thread.

    ``version``: newest version the broker knows (−1 before the first reply). ``trained``: the last one is out.
    ``stop``: the run ends. ``lost``: seconds since the last reply. ``scorers``: whom the broker knows to answer for
    scores.
    """

    def __init__(
        self,
        dial: Callable[[], Client],
        role: str,
        index: int,
        activity: Activity,
        period_s: float,
    ) -> None:
        self.version = -1
        self.trained = self.stop = False
        self.scorers: list[ScorerAt] = []
        self._role, self._index = role, index
        self._dial, self._activity, self._period_s = dial, activity, period_s
        self._answered = time.monotonic()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"{role}-{index}-heartbeat", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> float:
        """Seconds since the last reply; compare it with broker.heartbeat_seconds."""
        return time.monotonic() - self._answered

    def close(self) -> None:
        """Send the last beat, wait for its reply no longer than one second, end the thread."""
        self._closing.set()
        self._thread.join()

    def _beat(self) -> None:
        client = self._dial()
        try:
            while not self._closing.is_set():
                client.send(self._heartbeat())
                self._listen(client, self._period_s)
            last = client.send(self._heartbeat())
            limit = time.monotonic() + 1.0
            while time.monotonic() < limit and last not in self._read(client, 0.1):
                pass
        finally:
            client.close()

    def _listen(self, client: Client, period_s: float) -> None:
        """Wait one period; replies are read when they come, so that ``lost`` measures the broker and not the period."""
        limit = time.monotonic() + period_s
        while (left := limit - time.monotonic()) > 0 and not self._closing.is_set():
            if not self._read(client, min(left, 0.1)):
                continue
            self._closing.wait(limit - time.monotonic())

    def _read(self, client: Client, timeout_s: float) -> list[int]:
        replies = client.poll(timeout_s)
        for _, message, _ in replies:
            if isinstance(message, Beat):  # an Error says that the process is not in the run any more: it is lost
                self._answered = time.monotonic()
                self.version = max(self.version, message.version)
                self.trained = self.trained or message.trained
                self.stop = self.stop or message.stop
                self.scorers = message.scorers
        return [ticket for ticket, _, _ in replies]

    def _heartbeat(self) -> Heartbeat:
        now = self._activity.snapshot()
        return Heartbeat(
            role=self._role,
            index=self._index,
            activity=now.activity,
            waiting_on=now.waiting_on,
            since=now.since,
            seconds=now.seconds,
            compute=now.compute,
            gauges=now.gauges,
        )
