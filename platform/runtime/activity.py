"""What a role is doing now, and where its seconds went (I4, I6).

The role's loop calls `busy` and `waiting`; the heartbeat's thread reads `snapshot`. Invariant: within one thread
every moment counts for at most one name, the innermost open one, so that the seconds of a role never exceed its wall
time; a wait that is taken up again at once, as by the next long poll, is one wait and keeps its `since`.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

RESUMED_SECONDS = 0.1
"""A span like the one closed so shortly before goes on with it."""


@dataclass(frozen=True, slots=True)
class ActivitySnapshot:
    """One look at a role: ``activity`` is "busy/…", "waiting/…" or "idle", open since ``since`` (epoch seconds).

    ``seconds`` by activity name, the open one included; ``compute`` charges and ``gauges`` by name.
    """

    activity: str
    waiting_on: str
    since: float
    seconds: dict[str, float]
    compute: dict[str, float]
    gauges: dict[str, float]


@dataclass(slots=True)
class _Open:
    name: str
    on: str
    since: float
    counted: float
    """Monotonic time up to which this span's seconds are booked."""


class Activity:
    """Books seconds by activity, compute charges and gauges; every method may be called from any thread.

    ``snapshot`` reports as the present activity that of the thread that made this object.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner = threading.get_ident()
        self._stacks: defaultdict[int, list[_Open]] = defaultdict(list)
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._compute: defaultdict[str, float] = defaultdict(float)
        self._charged: dict[str, float] = {}
        self._gauges: dict[str, float] = {}
        self._closed: dict[int, tuple[_Open, float]] = {}
        """By thread, the span closed last, and when on the monotonic clock."""
        self._idle_since = time.time()

    @contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """Book the block's seconds under "busy/``what``"."""
        with self._span(f"busy/{what}", ""):
            yield

    @contextmanager
    def waiting(self, what: str, on: str = "") -> Iterator[None]:
        """Book the block's seconds under "waiting/``what``"; ``on`` names whom the role waits for."""
        with self._span(f"waiting/{what}", on):
            yield

    @contextmanager
    def _span(self, name: str, on: str) -> Iterator[None]:
        thread = threading.get_ident()
        with self._lock:
            stack = self._stacks[thread]
            now = time.monotonic()
            self._book(stack, now)
            stack.append(_Open(name, on, self._began(thread, name, on, now), now))
        try:
            yield
        finally:
            with self._lock:
                now = time.monotonic()
                self._book(stack, now)
                self._closed[thread] = stack.pop(), now
                if stack:
                    stack[-1].counted = now
                else:
                    del self._stacks[thread]
                    self._idle_since = time.time()

    def _began(self, thread: int, name: str, on: str, now: float) -> float:
        """Since when, epoch seconds: now, or where the span takes up the one just closed, since that one's begin."""
        last, closed = self._closed.get(thread, (None, 0.0))
        if last is not None and (last.name, last.on) == (name, on) and now - closed <= RESUMED_SECONDS:
            return last.since
        return time.time()

    def _book(self, stack: list[_Open], now: float) -> None:
        """Book the innermost open span up to ``now``; the lock is held."""
        if stack:
            self._seconds[stack[-1].name] += now - stack[-1].counted
            stack[-1].counted = now

    def charge(self, name: str, amount: float) -> None:
        """Add to a counter of the compute ledger, e.g. ``charge("decoded_tokens", 64)``."""
        with self._lock:
            self._compute[name] += amount

    def charge_totals(self, totals: Mapping[str, float]) -> None:
        """Charge what cumulative counters have risen by since they were charged last, e.g. an engine's."""
        with self._lock:
            for name, total in totals.items():
                self._compute[name] += total - self._charged.get(name, 0.0)
                self._charged[name] = total

    def gauge(self, name: str, value: float) -> None:
        """Set a value that is not a sum, e.g. the samples in flight."""
        with self._lock:
            self._gauges[name] = value

    def forget_gauges(self, area: str) -> None:
        """Those whose names begin so: what was measured before."""
        with self._lock:
            self._gauges = {name: value for name, value in self._gauges.items() if not name.startswith(area)}

    def snapshot(self) -> ActivitySnapshot:
        """A consistent copy; the open spans are booked up to now."""
        with self._lock:
            now = time.monotonic()
            for stack in self._stacks.values():
                self._book(stack, now)
            mine = self._stacks.get(self._owner)
            name, on, since = (mine[-1].name, mine[-1].on, mine[-1].since) if mine else ("idle", "", self._idle_since)
            return ActivitySnapshot(name, on, since, dict(self._seconds), dict(self._compute), dict(self._gauges))
