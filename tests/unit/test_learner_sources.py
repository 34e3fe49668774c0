"""The learner's waiting for a batch: on whose clock, and until when."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from offtrail.platform.learner import sources
from offtrail.platform.learner.sources import BrokerSource
from offtrail.platform.learner.world import World
from offtrail.platform.runtime.activity import Activity
from offtrail.platform.wire.messages import BatchReply, Message
from offtrail.platform.wire.sockets import WaitError


@dataclass
class Clocks:
    """Stand-in for the time module: each answer of the broker takes a second, and may move the wall clock."""

    wall: float = 1.7e9
    steady: float = 50.0
    strftime: Callable[..., str] = time.strftime
    localtime: Callable[..., time.struct_time] = time.localtime

    def time(self) -> float:
        return self.wall

    def monotonic(self) -> float:
        return self.steady


@dataclass
class WaitingBroker:
    """Answers that it waits for groups, each time ``jump`` seconds of wall clock and one second later; then stop."""

    clocks: Clocks
    jump: float
    answers: int
    asked: list[int] = field(default_factory=list)

    def send(self, message: Message, arrays: Any = ()) -> int:
        self.asked.append(0)
        return len(self.asked)

    def wait(self, ticket: int, *, what: str, deadline_s: float) -> tuple[Message, list[Any]]:
        self.clocks.wall += self.jump
        self.clocks.steady += 1.0
        if len(self.asked) > self.answers:
            return BatchReply(step=0, headers=[], stop=True), []
        return BatchReply(step=0, headers=[], waiting="groups"), []


@dataclass
class Line:
    client: WaitingBroker
    activity: Activity


def source(monkeypatch: pytest.MonkeyPatch, jump: float, answers: int, deadline_s: float) -> BrokerSource:
    clocks = Clocks()
    monkeypatch.setattr(sources, "time", clocks)
    line: Any = Line(WaitingBroker(clocks, jump, answers), Activity())
    return BrokerSource(line, World(0, 1, torch.device("cpu")), deadline_s)


@pytest.mark.parametrize("jump", [3600.0, -3600.0, 0.0])
def test_a_wall_clock_that_is_set_neither_ends_a_wait_nor_prolongs_it(jump, monkeypatch: pytest.MonkeyPatch) -> None:
    assert source(monkeypatch, jump, answers=8, deadline_s=20.0).next(0) is None
    waiting = source(monkeypatch, jump, answers=99, deadline_s=20.0)
    with pytest.raises(WaitError, match=r"waited for batch 0 from the broker \(groups\)"):
        waiting.next(0)
    assert 20 <= len(waiting.connection.client.asked) <= 23  # type: ignore[attr-defined]
