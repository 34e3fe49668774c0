"""The learner's waiting for a batch: while the broker answers, it is the broker who judges how long."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from offtrail.platform.learner.sources import BrokerSource
from offtrail.platform.learner.world import World
from offtrail.platform.runtime.activity import Activity
from offtrail.platform.wire.messages import BatchReply, Message
from offtrail.platform.wire.sockets import WaitError


@dataclass
class WaitingBroker:
    """Says ``answers`` times, in the same words, that it waits for the evaluator; then ``then`` happens."""

    answers: int
    then: BatchReply | WaitError
    asked: list[Message] = field(default_factory=list)

    def send(self, message: Message, arrays: Any = ()) -> int:
        self.asked.append(message)
        return len(self.asked)

    def wait(self, ticket: int, *, what: str, deadline_s: float) -> tuple[Message, list[Any]]:
        if len(self.asked) <= self.answers:
            return BatchReply(step=0, headers=[], waiting="a score of version 0 from evaluator-0"), []
        if isinstance(self.then, WaitError):
            raise self.then
        return self.then, []


@dataclass
class Line:
    client: WaitingBroker
    activity: Activity


def source(broker: WaitingBroker) -> BrokerSource:
    line: Any = Line(broker, Activity())
    return BrokerSource(line, World(0, 1, torch.device("cpu")), deadline_s=0.0)


def test_a_wait_of_any_length_goes_on_while_the_broker_answers() -> None:
    broker = WaitingBroker(answers=5000, then=BatchReply(step=0, headers=[], stop=True))
    assert source(broker).next(0) is None
    assert len(broker.asked) == 5001


def test_a_silent_broker_ends_it() -> None:
    with pytest.raises(WaitError, match="nobody there"):
        source(WaitingBroker(answers=3, then=WaitError("nobody there"))).next(0)
