"""Long polls: requests that are answered once there is something to say, or told every second what they wait for (I4).

    broker: a handler ──► hold ──► answered now, or kept ──► serve: what has changed, what was held long enough

A role waits since the first of its polls that found nothing, until one is answered: what it is told says since when.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy.typing as npt

from offtrail.platform.wire.messages import Message, VersionHint
from offtrail.platform.wire.sockets import Envelope

HOLD_SECONDS = 1.0
"""A long poll is answered after so long, with what it waits for."""

Arrays = Sequence[npt.NDArray[Any]]
Answer = tuple[Message, Arrays]
NO_ARRAYS: Arrays = ()


@dataclass
class LongPoll:
    """A long poll that waits: ``serve`` gives its answer or None, ``waiting`` the empty answer that says for what.

    ``idle``: whether its role has nothing else to do. Who asks ahead does not wait yet.
    """

    envelope: Envelope
    serve: Callable[[], Answer | None]
    waiting: Callable[[str], Message]
    sentence: Callable[[], str]
    idle: Callable[[], bool] = lambda: True
    until: float = 0.0


@dataclass(frozen=True)
class Wait:
    """Since when a role has been waiting without an answer: on the broker's clock, and in epoch seconds."""

    since: float
    since_epoch: float


class Wire(Protocol):
    """What the broker needs of wire.sockets.Server."""

    def poll(self, timeout_s: float) -> list[Envelope]:
        """Requests at hand."""

    def reply(self, envelope: Envelope, message: Message, arrays: Arrays = ()) -> None:
        """Answer one."""

    def hint(self, message: VersionHint) -> None:
        """Tell everybody, perhaps."""


class Polls:
    """The long polls of a run by role, one each, and since when each role waits.

    ``wire`` answers one, ``refused`` makes the answer out of what was raised for a peer, while its own was made.
    ``dirty``: something has happened since they were last served.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        wire: Wire,
        refused: Callable[[Exception, str], Message],
    ) -> None:
        self.clock, self.wire, self.refused = clock, wire, refused
        self.held: dict[str, LongPoll] = {}
        self.waits: dict[str, Wait] = {}
        self.dirty = False

    def hold(self, poll: LongPoll) -> Answer | None:
        """The answer, where there is one now; else the poll is kept."""
        peer = poll.envelope.peer_name
        if (answer := poll.serve()) is not None:
            self.waits.pop(peer, None)
            return answer
        poll.until = self.clock() + HOLD_SECONDS
        self.held[peer] = poll
        self._note_wait(peer, poll)
        return None

    def serve(self) -> None:
        """Answer the polls that can be answered since something happened, and those that were held long enough."""
        dirty, self.dirty = self.dirty, False
        for peer, poll in list(self.held.items()):
            late = self.clock() >= poll.until
            self._note_wait(peer, poll)
            try:
                answer = poll.serve() if dirty or late else None
                sentence = poll.sentence() if late and answer is None else ""
            except Exception as error:
                answer, sentence = (self.refused(error, peer), NO_ARRAYS), ""
            if answer is not None:
                self.waits.pop(peer, None)
            elif late:
                answer = poll.waiting(f"{sentence}{self.since(peer)}"), NO_ARRAYS
            if answer is not None:
                del self.held[peer]
                self.wire.reply(poll.envelope, *answer)

    def forget(self, peer: str) -> None:
        """A role begins anew: nobody waits for the answer to what it asked before."""
        self.held.pop(peer, None)
        self.waits.pop(peer, None)

    def soonest(self, default: float) -> float:
        """When the next poll has been held long enough."""
        return min((poll.until for poll in self.held.values()), default=default)

    def longest(self) -> tuple[str, float] | None:
        """Who of the held ones waits longest, and since when on the broker's clock."""
        waiting = sorted((wait.since, peer) for peer, wait in self.waits.items() if peer in self.held)
        return (waiting[0][1], waiting[0][0]) if waiting else None

    def sentence(self, peer: str) -> str:
        """For what a held role waits, on whom and since when."""
        return f"{self.held[peer].sentence()}{self.since(peer)}"

    def since(self, peer: str) -> str:
        """The end of a waiting role's sentence."""
        wait = self.waits.get(peer)
        return f", since {time.strftime('%H:%M:%S', time.localtime(wait.since_epoch))}" if wait else ""

    def _note_wait(self, peer: str, poll: LongPoll) -> None:
        if peer not in self.waits and poll.idle():
            self.waits[peer] = Wait(self.clock(), time.time())
