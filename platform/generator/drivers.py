"""Drivers in flight: whose each request and each question is, and what becomes of the answers.

    start ──► driver ──► asks ──► engine (Generate) · judges (Verify, Score)
                 ▲                        │
                 └──── answered ◄── owner of the request or question        driver.group whole ──► ended

Invariants
- A request or question has a number that is never used again and one owner, a driver and its ask. What comes for a
  number without an owner (of a cancelled ask, an ended driver, an attempt whose server died) counts for nothing.
- What goes wrong with a driver's asks (ValueError) ends that driver and fails its group alone.
- A driver that has nothing in flight and no group is an error, not a silence (I4).
- I2: no request enters an engine whose version is below the lease's ``min_version``, as it is when a server was started
  anew while a driver waited for a verdict; the request is held back until the weights are there.
- In rounds (exact mode) verdicts and scores reach drivers only while the engine is empty and no question is open, in
  the order of slots and asks: what enters the engine next does not depend on when a verifier was done (I2b).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from offtrail.core.protocols import LAST_ASK, Answer, Ask, Cancel, Completion, Driver, Engine, Generate, Request
from offtrail.core.types import Group, Int32, Lease
from offtrail.platform.generator.judges import Judges, Refused


@dataclass(eq=False)
class _Flight:
    """A driver and its open asks, each with its request of the engine or its question to the judges."""

    driver: Driver
    prompt_tokens: Int32
    requests: dict[int, int] = field(default_factory=dict)
    questions: dict[int, int] = field(default_factory=dict)
    to_come: dict[int, int] = field(default_factory=dict)
    """Open ask → completions that it still owes."""
    asked: set[int] = field(default_factory=set)


class Drivers:
    """The running drivers of one engine. ``ended`` collects what they came to, for the caller to take: a whole group,
    or why there will be none.
    """

    def __init__(self, engine: Engine, judges: Judges, *, rounds: bool) -> None:
        self._engine, self._judges, self._rounds = engine, judges, rounds
        self._flights: dict[int, _Flight] = {}
        self._requests: dict[int, tuple[_Flight, int]] = {}
        self._questions: dict[int, tuple[_Flight, int]] = {}
        self._held: list[tuple[_Flight, int, Answer]] = []
        self._held_back: list[tuple[_Flight, list[Request]]] = []
        self._numbers = itertools.count()
        self.ended: list[tuple[Lease, Group | Refused]] = []

    def __len__(self) -> int:
        """Drivers that run."""
        return len(self._flights)

    def __contains__(self, group: int) -> bool:
        """Whether the driver of that group runs."""
        return group in self._flights

    @property
    def samples(self) -> int:
        """Samples that they fill the engine with: those in it, and the width of each driver that has none there now
        but comes back with more once its verdict is in.
        """
        resting = (flight.driver.width for flight in self._flights.values() if not flight.requests)
        return self._engine.unfinished + sum(resting)

    @property
    def wanted_version(self) -> int:
        """The version that requests are held back for; −1 where none is."""
        return max((flight.driver.lease.min_version for flight, _ in self._held_back), default=-1)

    def enter(self) -> None:
        """Let the requests enter that were held back, as far as the engine has their version now."""
        held_back, self._held_back = self._held_back, []
        for flight, requests in held_back:
            try:
                self._generate(flight, [request for request in requests if request.id in self._requests])
            except ValueError as error:
                self._end(flight, Refused(str(error)))

    def start(self, driver: Driver, prompt_tokens: Int32) -> None:
        """Put the driver's first asks."""
        flight = self._flights[driver.lease.group] = _Flight(driver, prompt_tokens)
        self._ask(flight, lambda: driver.start(prompt_tokens))

    def completed(self, completions: Sequence[Completion]) -> None:
        """Take what the engine finished to the owners."""
        for completion in completions:
            if (owner := self._requests.get(completion.request)) is None:
                continue
            flight, ask = owner
            flight.to_come[ask] -= 1
            if not flight.to_come[ask]:
                del flight.to_come[ask], self._requests[flight.requests.pop(ask)]
            self._tell(flight, ask, replace(completion, request=ask))

    def judged(self, answers: Sequence[tuple[int, Answer | Refused]]) -> None:
        """Take what the judges answered to the owners; in rounds not before the engine is empty and all have answered.
        A refusal fails the group.
        """
        for question, answer in answers:
            if (owner := self._questions.pop(question, None)) is None:
                continue
            flight, ask = owner
            if isinstance(answer, Refused):
                self._end(flight, answer)
            else:
                self._held.append((flight, ask, answer))
        if self._rounds and (self._engine.unfinished or self._questions):
            return
        held, self._held = sorted(self._held, key=lambda one: (one[0].driver.lease.slot, one[1])), []
        for flight, ask, answer in held:
            if flight.questions.pop(ask, None) is not None:  # neither cancelled nor ended meanwhile
                self._tell(flight, ask, answer)

    def lost(self, requests: Sequence[int]) -> list[Lease]:
        """End the drivers whose requests died with a server; their leases, for another attempt."""
        flights = dict.fromkeys(self._requests[request][0] for request in requests if request in self._requests)
        for flight in flights:
            self._drop(flight)
        return [flight.driver.lease for flight in flights]

    # --- one driver's turn ---

    def _tell(self, flight: _Flight, ask: int, answer: Answer) -> None:
        self._ask(flight, lambda: flight.driver.answered(ask, answer))

    def _ask(self, flight: _Flight, turn: Callable[[], Sequence[Ask]]) -> None:
        """Let the driver have its turn and put what it asks."""
        driver = flight.driver
        try:
            self._put(flight, turn())
            if driver.group is None and not flight.requests and not flight.questions:
                raise ValueError(f"driver {driver.lease.driver} has nothing in flight and no group")
        except ValueError as error:
            self._end(flight, Refused(str(error)))
        else:
            if driver.group is not None:
                self._end(flight, driver.group)

    def _put(self, flight: _Flight, asks: Sequence[Ask]) -> None:
        """Hand the asks on; the requests among them enter the engine together, in their order."""
        lease, requests = flight.driver.lease, list[Request]()
        for ask in asks:
            if isinstance(ask, Cancel):
                self._cancel(flight, ask.ask)
                continue
            self._check_number(flight, ask.ask)
            if isinstance(ask, Generate):
                number = next(self._numbers)
                requests.append(ask.request(number, lease.group))
                flight.requests[ask.ask], flight.to_come[ask.ask] = number, ask.samples
                self._requests[number] = flight, ask.ask
            else:
                number = self._judges.ask(lease, flight.prompt_tokens, ask)
                flight.questions[ask.ask] = number
                self._questions[number] = flight, ask.ask
        self._generate(flight, requests)

    def _generate(self, flight: _Flight, requests: list[Request]) -> None:
        if requests and self._engine.version < flight.driver.lease.min_version:
            self._held_back.append((flight, requests))
        elif requests:
            self._engine.generate(requests)

    @staticmethod
    def _check_number(flight: _Flight, ask: int) -> None:
        if ask in flight.asked or not 0 <= ask <= LAST_ASK:
            name = flight.driver.lease.driver
            raise ValueError(f"driver {name}: ask {ask} must be a number from 0 to {LAST_ASK}, not used before")
        flight.asked.add(ask)

    def _cancel(self, flight: _Flight, ask: int) -> None:
        """Forget an open ask; one that is answered already has nothing left to stop."""
        if (request := flight.requests.pop(ask, None)) is not None:
            del self._requests[request], flight.to_come[ask]
            self._engine.cancel([request])
        if (question := flight.questions.pop(ask, None)) is not None:
            self._questions.pop(question, None)

    def _end(self, flight: _Flight, outcome: Group | Refused) -> None:
        self._drop(flight)
        self.ended.append((flight.driver.lease, outcome))

    def _drop(self, flight: _Flight) -> None:
        """Forget the driver and all that it has in flight."""
        del self._flights[flight.driver.lease.group]
        for ask in [*flight.requests, *flight.questions]:
            self._cancel(flight, ask)
