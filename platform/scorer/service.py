"""The loop of a scorer: requests in, batches over all who ask, answers out.

    generators ── ScoreRequest ──► poll ──► desk ──► a batch ──► served.score ──► Scored | Unscored ──► who asked
                                     new weights ──► may they be loaded now? (scorer.on_refresh) ──► served.load

Invariant: every request gets one answer, all of it by one version of its model; bytes that fit no request are answered
with why, and change nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Protocol

import numpy as np

from offtrail.platform.model.reader import Question
from offtrail.platform.runtime.activity import Activity
from offtrail.platform.scorer.desk import Desk, Request
from offtrail.platform.scorer.served import Served
from offtrail.platform.wire.codec import Array
from offtrail.platform.wire.messages import Error, Message, Scored, ScoreRequest, Unscored
from offtrail.platform.wire.sockets import Envelope

log = logging.getLogger("offtrail.scorer")

IDLE_SECONDS = 0.05
"""How long a scorer that has nothing to do waits before it looks for new weights, and whether it is to leave."""


class Wire(Protocol):
    """The server's side of the wire."""

    def poll(self, timeout_s: float) -> list[Envelope]:
        """See sockets.Server."""

    def reply(self, envelope: Envelope, message: Message, arrays: Sequence[Array] = ()) -> None:
        """See sockets.Server."""


class Service:
    """``models`` by name; ``again``: a batch that was under way when new weights came is scored under them."""

    def __init__(
        self, wire: Wire, desk: Desk, models: Mapping[str, Served], activity: Activity, *, again: bool = False
    ) -> None:
        self._wire, self._desk, self._models, self._activity, self._again = wire, desk, models, activity, again

    def turn(self) -> None:
        """Load what is new, take what was asked, answer one batch."""
        for name, model in self._models.items():
            self._refresh(name, model)
        idle = not self._desk
        with self._activity.waiting("requests", on="generators") if idle else nullcontext():
            envelopes = self._wire.poll(IDLE_SECONDS if idle else 0.0)
        for envelope in envelopes:
            self._put(envelope)
        if batch := self._desk.take():
            self._answer(batch)

    def _put(self, envelope: Envelope) -> None:
        message = envelope.message
        if not isinstance(message, ScoreRequest):
            self._wire.reply(envelope, Error(error=f"{type(message).__name__}: a scorer answers ScoreRequest alone"))
            return
        model = self._models.get(message.model)
        if model is None:
            known = ", ".join(self._models)
            self._unscored(envelope, message.model, f"no model of that name; this scorer has {known}")
            return
        try:
            question = question_of(envelope.arrays, steps=model.scoring.spec.reads == "steps")
            if why := model.unfit(question):
                raise ValueError(why)
        except ValueError as error:
            self._unscored(envelope, message.model, str(error))
        else:
            self._desk.put(envelope, message.model, question)

    def _refresh(self, name: str, model: Served) -> None:
        while (version := model.newer()) is not None and self._desk.may_load(name):
            try:
                with self._activity.busy("load_weights"):
                    model.load(version)
            except FileNotFoundError:  # retired meanwhile: a newer one is out
                continue

    def _answer(self, batch: list[Request]) -> None:
        model = self._models[batch[0].model]
        with self._activity.busy("score"):
            answers = model.score([request.question for request in batch])
        if self._again and model.newer() is not None:
            self._desk.back(batch)
            return
        for request, answer in zip(batch, answers, strict=True):
            if isinstance(answer, str):
                self._unscored(request.envelope, request.model, answer)
            else:
                self._wire.reply(request.envelope, Scored(model=request.model, version=model.version), [answer])
        self._activity.charge("score_batches", 1)
        self._activity.charge("score_requests", len(batch))
        totals = [served.counters for served in self._models.values()]
        self._activity.charge_totals({name: sum(total[name] for total in totals) for name in model.counters})

    def _unscored(self, envelope: Envelope, model: str, reason: str) -> None:
        log.warning("%s: %s: %s", envelope.peer_name, model, reason)
        self._wire.reply(envelope, Unscored(model=model, reason=reason))


def question_of(arrays: Sequence[Array], *, steps: bool) -> Question:
    """What a ScoreRequest asks. ValueError, one line, where its arrays do not fit each other."""
    if len(arrays) != 3 + steps or any(array.dtype != np.int32 or array.ndim != 1 for array in arrays):
        raise ValueError(f"a request of {len(arrays)} arrays, expected {3 + steps} of int32 and one dimension")
    prompt, lengths, tokens = arrays[:3]
    if not prompt.size or not lengths.size or int(lengths.min()) < 1 or int(lengths.sum(dtype=np.int64)) != tokens.size:
        raise ValueError("a request needs a prompt, and outputs whose lengths add up to its tokens")
    bounds = np.cumsum(lengths, dtype=np.int64)
    outputs = np.split(tokens, bounds[:-1])
    if not steps:
        return Question(prompt, outputs)
    ends = arrays[3].astype(np.int64)
    if ends.size and not (ends[0] > 0 and ends[-1] <= tokens.size and (ends[1:] > ends[:-1]).all()):
        raise ValueError(f"the ends of steps must ascend within 1…{tokens.size}")
    of = np.searchsorted(bounds, ends)
    begins = bounds - lengths
    return Question(prompt, outputs, [ends[of == i] - begins[i] for i in range(len(outputs))])
