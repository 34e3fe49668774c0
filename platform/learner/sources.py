"""The batches of a run, from the broker: of groups, or empty ones, which pace a job that has its own data (data.py)."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from offtrail.core.types import Batch
from offtrail.platform.learner.world import World
from offtrail.platform.runtime.context import Connection
from offtrail.platform.wire.groups import arrays_per_group, group_from, pack_group, unpack_group
from offtrail.platform.wire.messages import BatchReply, NextBatch

WAITING, FINISHED, STOP = b"w", b"f", b"s"


class BrokerSource:
    """The batches of a run in their durable order, until the broker says that there are no more. Rank 0 asks it, one
    step ahead, so that the next batch arrives while this one trains; every rank returns the same batch.

    Invariant: after each answer of the broker, an empty one too, all ranks meet in a broadcast, so that a rank never
    waits longer in a collective than one long poll takes. ``tend`` is called on rank 0 after each empty answer.
    """

    def __init__(
        self,
        connection: Connection,
        world: World,
        deadline_s: float,
        serve_late_readers: Callable[[], None] | None = None,
    ) -> None:
        self.connection, self.world, self.deadline_s = connection, world, deadline_s
        self._serve_late_readers = serve_late_readers
        self._asked: dict[int, int] = {}
        """Tickets of open requests by step."""
        self.finished = False
        """The version before the step that was asked for last is the run's last one."""

    def next(self, step: int) -> Batch | None:
        """The batch of ``step``; None when the run stops, or is ``finished``: it has no such step.

        Raises WaitError (I4) when the broker falls silent for the deadline. While it answers, it is the one who knows
        whether anything moves, and ends a run in which nothing does.
        """
        word = ""
        while True:
            with self.connection.activity.waiting("batch", on=word or "broker"):
                reply, batch = self._ask(step) if self.world.main else (None, None)
                blob = self.world.broadcast(_blob(reply, batch) if self.world.size > 1 and reply is not None else b"")
            if not self.world.main:
                reply, batch = None, _open_blob(blob)
            if batch is not None:
                return batch
            self.finished = reply.finished if reply is not None else blob == FINISHED
            if self.finished or (reply is not None and reply.stop) or blob == STOP:
                return None
            word = reply.waiting if reply is not None else ""
            if self._serve_late_readers is not None:
                self._serve_late_readers()

    def _ask(self, step: int) -> tuple[BatchReply, Batch | None]:
        self._request(step)
        ticket = self._asked.pop(step)
        reply, arrays = self.connection.client.wait(ticket, what=f"batch {step}", deadline_s=self.deadline_s)
        assert isinstance(reply, BatchReply)
        if reply.stop or reply.finished or reply.waiting:
            return reply, None
        self._request(step + 1)
        groups, end = [], 0
        for header in reply.headers:
            start, end = end, end + arrays_per_group(header)
            groups.append(group_from(header, arrays[start:end]))
        return reply, Batch(reply.step, tuple(groups), reply.replay)

    def _request(self, step: int) -> None:
        if step not in self._asked:
            self._asked[step] = self.connection.client.send(NextBatch(step=step))


def _blob(reply: BatchReply, batch: Batch | None) -> bytes:
    if batch is None:
        return STOP if reply.stop else FINISHED if reply.finished else WAITING
    return msgspec.msgpack.encode((batch.step, batch.replay, [pack_group(g) for g in batch.groups]))


def _open_blob(blob: bytes | bytearray | memoryview) -> Batch | None:
    if bytes(blob[:2]) in (WAITING, FINISHED, STOP):
        return None
    step, replay, groups = msgspec.msgpack.decode(blob, type=tuple[int, bool, list[bytes]])
    return Batch(step, tuple(unpack_group(g) for g in groups), replay)
