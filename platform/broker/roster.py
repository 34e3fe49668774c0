"""Who takes part in the run: one Member for each role process, fed by its heartbeats.

Called by broker.py. A member is one process: its messages are those of the connections that show the random number of
the process that said Hello for it, whatever other peer knows its name. The launcher takes part too, but is none of the
members: it has no heartbeat.

Invariant: shares of time are differences between two heartbeats of one process over the time between them, so that they
lie in [0, 1] however short a learner step is. They begin at the first heartbeat after the first version is out:
start-up is in none of them.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from offtrail.platform.wire.messages import LAUNCHER, Heartbeat, ScorerAt


@dataclass
class Member:
    """One role process. Times are of the broker's clock; ``mark`` is the heartbeat at the last commit."""

    role: str
    index: int
    pid: int
    life: int
    heard: float
    process: bytes
    """The number of the process that said Hello."""
    beat: Heartbeat | None = None
    beat_at: float = 0.0
    mark: tuple[float, dict[str, float]] | None = None
    lost: bool = False
    serves: str = ""
    """Where it answers requests of others; empty where it does not, or not yet."""

    @property
    def name(self) -> str:
        """Such as generator-0: the identity under which it dials."""
        return f"{self.role}-{self.index}"

    def runs(self, *, here: bool) -> bool:
        """Whether its process may be there still. ``here``: on this host, where its process id says so."""
        if self.lost or not here:
            return not self.lost
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return True

    def take(self, beat: Heartbeat, now: float) -> bool:
        """Note a heartbeat; whether the compute ledger moved since the last one."""
        moved = self.beat is None or beat.compute != self.beat.compute
        self.beat, self.beat_at = beat, now
        if self.mark is None:
            self.mark = (now, beat.seconds)
        return moved

    def window(self) -> tuple[float, dict[str, float]]:
        """Seconds since the mark, and of these by activity; the mark moves to the newest heartbeat."""
        if self.beat is None or self.mark is None:
            return 0.0, {}
        at, before = self.mark
        self.mark = (self.beat_at, self.beat.seconds)
        spent = {name: total - before.get(name, 0.0) for name, total in self.beat.seconds.items()}
        return self.beat_at - at, spent


@dataclass
class Roster:
    """The members by name, such as generator-0."""

    members: dict[str, Member] = field(default_factory=dict)
    launcher: Member | None = None
    starts: Counter[str] = field(default_factory=Counter)
    """Processes that have said Hello, by name."""
    _newest: dict[str, bytes] = field(default_factory=dict)
    _senders: dict[bytes, Member] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Member]:
        return iter(self.members.values())

    def __contains__(self, name: str) -> bool:
        return name in self.members

    def get(self, name: str) -> Member | None:
        """The member of that name, or the launcher, if it has said Hello."""
        return self.launcher if name.startswith(f"{LAUNCHER}-") else self.members.get(name)

    def sender(self, process: bytes) -> Member | None:
        """Whose number that is."""
        return self._senders.get(process)

    def add(self, member: Member) -> None:
        """A role process begins; it takes the place of an earlier one of its name."""
        if (before := self.get(member.name)) is not None:
            self._senders.pop(before.process, None)
        self._senders[member.process] = member
        if member.role == LAUNCHER:
            self.launcher = member
            return
        self.starts[member.name] += member.process != self._newest.get(member.name)
        self._newest[member.name] = member.process
        self.members[member.name] = member

    def remove(self, name: str) -> None:
        """Its process has died; another one may begin under its name."""
        if (member := self.members.pop(name, None)) is not None:
            self._senders.pop(member.process, None)

    @property
    def restarts(self) -> dict[str, int]:
        """How often a role was started again, by name."""
        return {name: starts - 1 for name, starts in sorted(self.starts.items()) if starts > 1}

    def serving(self) -> list[ScorerAt]:
        """Whom others can ask for scores."""
        return [ScorerAt(m.name, m.serves, m.life) for m in self.alive("scorer") if m.serves]

    def alive(self, role: str) -> list[Member]:
        """The members of a role whose heartbeats come."""
        return [m for m in self if m.role == role and not m.lost]


def names(members: Iterable[Member]) -> str:
    """For a sentence."""
    return ", ".join(m.name for m in members) or "nobody"
