"""The open requests of a scorer, of all who ask: batches by tokens, and when new weights may be loaded.

    put ──► one queue a model, oldest first ──► take: a batch of one model ──► answered by the caller at once
                                            ◄── back: a batch that is to be scored again

Invariants: a request is in one batch at a time, whole, and what is answered of a batch is answered by one version; of
one model requests are taken in the order in which they came; a request larger than a batch is a batch alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from offtrail.platform.model.reader import Question
from offtrail.platform.wire.sockets import Envelope


@dataclass(frozen=True, eq=False)
class Request:
    """One question to a model; ``place`` among all that were ever put."""

    envelope: Envelope
    model: str
    question: Question
    place: int

    @property
    def tokens(self) -> int:
        """That go through the model: the prompt once, and the outputs."""
        return len(self.question.prompt) + sum(map(len, self.question.outputs))


class Desk:
    """``budget``: tokens of a batch, 0: one request a batch. ``finish``: what was asked before new weights is answered
    under the old ones, or else with the next batch under the new.
    """

    def __init__(self, models: Sequence[str], *, budget: int, finish: bool) -> None:
        self._budget, self._finish = budget, finish
        self._open: dict[str, deque[Request]] = {name: deque() for name in models}
        self._before: dict[str, int] = {}
        """Model that waits for new weights → how many of its requests come before them."""
        self._placed = 0

    def __len__(self) -> int:
        """Open requests."""
        return sum(map(len, self._open.values()))

    def put(self, envelope: Envelope, model: str, question: Question) -> None:
        """A new request."""
        self._placed += 1
        self._open[model].append(Request(envelope, model, question, self._placed))

    def take(self) -> list[Request]:
        """The next batch: of the model whose oldest request is the oldest of all, as many as a batch holds."""
        waiting = [queue[0] for queue in self._open.values() if queue]
        if not waiting:
            return []
        model = min(waiting, key=lambda request: request.place).model
        queue, batch, tokens = self._open[model], list[Request](), 0
        most = self._before.get(model, len(queue)) if self._budget else 1
        while queue and len(batch) < most and (not batch or tokens + queue[0].tokens <= self._budget):
            batch.append(queue.popleft())
            tokens += batch[-1].tokens
        if model in self._before:
            self._before[model] -= len(batch)
        return batch

    def back(self, batch: Sequence[Request]) -> None:
        """A batch that was not answered is open again, before all others."""
        for request in reversed(batch):
            self._open[request.model].appendleft(request)

    def may_load(self, model: str) -> bool:
        """New weights of the model are there: whether they may be loaded now. Ask again after each batch."""
        if not self._finish:
            return True
        if self._before.setdefault(model, len(self._open[model])):
            return False
        del self._before[model]
        return True
