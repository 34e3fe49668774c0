"""The rollout loop's parts. One Rollout owns one engine and everything between a lease and its acknowledged group.

    leases ──► waiting ──(version applied)──► drivers ⇄ engine ──► judges ──► submitted ──(ack)──► forgotten
                                                 └─ a server died: the lease goes back, to be issued again

Invariants kept here
- I2: a group enters the engine only when the engine's version is ≥ its lease's ``min_version``.
- I2b, I3: in exact mode a wave enters whole, in slot order, into an empty engine that holds exactly its version, and
  weights and the next wave wait until all drivers of this one have ended.
- I1: a group is forgotten only after the broker's acknowledgement, which comes after the group is durable.
Nothing here blocks while the engine has work: replies, verdicts and weights are looked for between decode steps.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from offtrail.core.protocols import Driver, Engine
from offtrail.core.types import Int32, Lease
from offtrail.platform.config.schema import Config
from offtrail.platform.engines.channels import Reader
from offtrail.platform.engines.limits import MOST_LOST
from offtrail.platform.generator.drivers import Drivers
from offtrail.platform.generator.judges import Judges, Refused
from offtrail.platform.runtime.context import Connection
from offtrail.platform.weights.probe import compare, probe_text
from offtrail.platform.wire.groups import group_frames
from offtrail.platform.wire.messages import (
    Acknowledged,
    Error,
    FailGroup,
    GroupAck,
    LeaseRequest,
    Leases,
    Message,
    ReturnLeases,
    SubmitGroup,
)
from offtrail.platform.wire.sockets import WaitError

log = logging.getLogger("offtrail.generator")


@dataclass
class Rollout:
    """State of one generator; each public method is one verb of the loop in role.py."""

    config: Config
    connection: Connection
    engine: Engine
    weights: Reader
    judges: Judges
    make_driver: Callable[[Lease], Driver]
    encode: Callable[[Lease], Int32]
    stopping: bool = False
    waiting_for: str = "broker"
    newest: int = -1
    _lease_ticket: int | None = None
    _waiting: list[Driver] = field(default_factory=list)
    _running: Drivers = field(init=False)
    _judging: set[int] = field(default_factory=set)
    _width: int = 1
    """Samples that the next lease is thought to bring: as many as the last one."""
    _unacknowledged: dict[int, int] = field(default_factory=dict)
    _returned: set[int] = field(default_factory=set)
    _attempts: dict[int, int] = field(default_factory=dict)
    _losses: Counter[int] = field(default_factory=Counter)
    """By group, how often a server has lost what it asked."""

    def __post_init__(self) -> None:
        """No driver runs yet."""
        self._width = self.config.batch.group_size
        self._running = Drivers(self.engine, self.judges, rounds=self._exact)

    @property
    def held(self) -> int:
        """Groups between lease and acknowledgement."""
        return len(self._waiting) + len(self._running) + len(self._judging) + len(self._unacknowledged)

    # --- the verbs ---

    def take_replies(self, timeout_s: float = 0.0) -> None:
        """Leases granted, groups acknowledged. Raises RuntimeError when the broker refuses a request outright."""
        for ticket, message, _ in self.connection.client.poll(timeout_s):
            self._take(ticket, message)
        hint = self.connection.client.newest_hint()
        self.newest = max(self.newest, self.connection.heartbeat.version, -1 if hint is None else hint)

    def ask_for_leases(self) -> None:
        """Keep one lease request outstanding while there is room, so that the engine never runs dry. An engine whose
        servers are all down asks for none: another generator may have them.
        """
        room = self._room()
        if self._lease_ticket is None and room > 0 and not self.engine.waiting_for:
            self._lease_ticket = self.connection.client.send(LeaseRequest(room=room))

    def apply_weights(self) -> None:
        """Between two decode steps: the newest version, or in exact mode the one that the next wave names."""
        version = self._wanted_version()
        if version is None or version == self.engine.version or not self.engine.replicas:
            return
        with self.connection.activity.busy("load_weights"):
            try:
                with self.weights.open(version) as weights:
                    self.engine.load_weights(version, weights)
            except FileNotFoundError:
                if self._exact:
                    raise
                return  # retired while we looked: a newer one is out, the next turn takes it
            self._probe(version)

    def start_ready(self) -> None:
        """Start every driver whose lease's version rule is met."""
        self._running.enter()
        ready = self._ready()
        started = {driver.lease.group for driver in ready}
        self._waiting = [driver for driver in self._waiting if driver.lease.group not in started]
        for driver in ready:
            try:
                prompt_tokens = self.encode(driver.lease)
            except ValueError as error:
                self._give_up(driver.lease, Refused(str(error)))
            else:
                self._running.start(driver, prompt_tokens)
        self._take_ended()

    def decode(self) -> None:
        """One decode step; finished samples go to their drivers."""
        activity, server = self.connection.activity, self.engine.waiting_for
        with activity.waiting("server", on=server) if server else activity.busy("decode"):
            completions = self.engine.step()
        self._return_lost()
        self._running.completed(completions)
        self._take_ended()

    def submit_judged(self) -> None:
        """Take verdicts and scores to the drivers that asked, and send every group that all have judged; one that they
        refuse (reward.on_timeout) fails.
        """
        answers, groups = self.judges.poll()
        self._running.judged(answers)
        self._take_ended()
        for group, refused in groups:
            self._judging.remove(group.group)
            group.attempt = self._attempts.pop(group.group)
            if refused is not None:
                self._fail(group.group, group.attempt, refused)
                continue
            header, arrays = group_frames(group)
            ticket = self.connection.client.send(SubmitGroup(header=header), arrays, share=True)
            self._unacknowledged[ticket] = group.group
        self.connection.client.flush()

    def charge(self) -> None:
        """The cumulative counters of engine and judges into the compute ledger (I6)."""
        activity = self.connection.activity
        activity.charge_totals({**self.engine.counters, **self.judges.counters})
        activity.gauge("running_samples", float(self.engine.unfinished))
        activity.gauge("version", float(self.engine.version))

    def wait(self) -> None:
        """Nothing to decode: wait for the broker, the judges or a version, whichever the held groups need.

        Raises WaitError (I4) when the broker has answered no heartbeat for broker.deadline_seconds.
        """
        heartbeat, server = self.connection.heartbeat, self.engine.waiting_for
        what, on = self.judges.waiting_for
        patience = {"verdicts": 0.001, "scores": 0.005}.get(what, 0.02)
        if not what:
            what, on = ("server", server) if server else ("leases", self.waiting_for)
        with self.connection.activity.waiting(what, on=on):
            self.take_replies(timeout_s=patience)
        self.stopping = self.stopping or heartbeat.stop
        if heartbeat.lost > self.config.broker.deadline_seconds:
            raise WaitError.passed(what, f"the broker ({on})", time.time() - heartbeat.lost, heartbeat.lost)

    def close(self) -> None:
        """Let go of unfinished work: the broker re-issues or refuses what was not acknowledged."""
        self.judges.close()
        self.engine.close()
        self.connection.close()

    # --- the rules behind them ---

    def _return_lost(self) -> None:
        """Give the leases back whose samples died with a server: nothing is lost, another attempt makes them. A group
        that they die of again and again fails.
        """
        lost = self._running.lost(self.engine.lost())
        self._losses.update(lease.group for lease in lost)
        returned = list[tuple[int, int]]()
        for lease in lost:
            if (times := self._losses[lease.group]) > MOST_LOST:
                why = f"servers have lost it {times} times: they die of it or refuse it; see their logs"
                self._give_up(lease, Refused(why))
            else:
                returned.append((lease.group, self._attempts.pop(lease.group)))
        if returned:
            detail = f"a server died or broke off: {self.engine.waiting_for or 'others go on'}"
            log.warning("%d leases go back: %s", len(returned), detail)
            ticket = self.connection.client.send(ReturnLeases(leases=returned, detail=detail))
            self._returned.add(ticket)

    def _take(self, ticket: int, message: Message) -> None:
        if isinstance(message, Leases):
            self._lease_ticket = None
            granted = {lease.group for lease in message.leases}
            self._waiting = [driver for driver in self._waiting if driver.lease.group not in granted]
            for lease in message.leases:
                if not self._already_held(lease):
                    self._wait_with(lease)
            self._waiting.sort(key=lambda driver: (driver.lease.wave, driver.lease.slot, driver.lease.group))
            self.newest = max(self.newest, message.version)
            self.stopping = self.stopping or message.stop
            self.waiting_for = message.waiting or "broker"
        elif isinstance(message, GroupAck):
            self._unacknowledged.pop(ticket, None)
            if not message.accepted:
                log.info("group %d was not accepted: %s", message.group, message.reason)
        elif isinstance(message, Acknowledged):
            self._returned.discard(ticket)
        elif isinstance(message, Error):
            raise RuntimeError(f"the broker refused a request: {message.error}")

    def _probe(self, version: int) -> None:
        """Engine against learner on the fixed text, where the version carries the learner's numbers (I5).

        Raises MismatchError when they differ by more than weights.probe_alarm.
        """
        try:
            learner = self.weights.probe(version)
        except FileNotFoundError:  # retired meanwhile; a later version carries one too
            return
        if learner:
            prompt, output = probe_text(self.engine.vocab_size)
            alarm = self.config.weights.probe_alarm
            rounded = {self.config.engine.dtype, self.config.learner.dtype} != {"float32"}
            found = []
            for replica in range(self.engine.replicas):
                with contextlib.suppress(ConnectionError):  # that copy is gone; its successor is probed in its turn
                    [engine] = self.engine.logprobs([prompt], [output], 1.0, replica)
                    found.append(compare(engine, learner, version=version, alarm=alarm, rounded=rounded))
            for name in found[0] if found else ():
                self.connection.activity.gauge(name, max(one[name] for one in found))

    def _already_held(self, lease: Lease) -> bool:
        """A group leased to us again (our heartbeats were lost for a while) goes on under the new attempt's number."""
        self._attempts[lease.group] = lease.attempt
        return lease.group in self._running or lease.group in self._judging

    def _wait_with(self, lease: Lease) -> None:
        try:
            driver = self.make_driver(lease)
        except ValueError as error:
            self._give_up(lease, Refused(str(error)))
        else:
            self._waiting.append(driver)
            self._width = driver.width

    def _take_ended(self) -> None:
        """What drivers came to: a whole group goes to the judges, anything else fails its group."""
        ended, self._running.ended = self._running.ended, []
        for lease, outcome in ended:
            if isinstance(outcome, Refused):
                self._give_up(lease, outcome)
            else:
                self._judging.add(lease.group)
                self.judges.judge(outcome)

    @property
    def _exact(self) -> bool:
        return self.config.staleness.mode == "exact"

    @property
    def _idle(self) -> bool:
        """Whether nothing is under way that a change of weights or a new wave would disturb, in exact mode."""
        return not self._running and not self.engine.unfinished

    def _room(self) -> int:
        """Groups to ask for: enough waiting samples to fill the engine once over; in exact mode whole waves."""
        if self._exact:
            return self.config.batch.groups * (self.config.staleness.max + 1) - self.held
        waiting = sum(driver.width for driver in self._waiting) + self._running.samples
        return math.ceil((2 * self.engine.capacity - waiting) / self._width)

    def _wanted_version(self) -> int | None:
        if self._exact:
            wave = self._next_wave()
            version = wave[0].lease.exact_version if wave and self._idle else self._running.wanted_version
            return version if version >= 0 else None
        return self.newest if self.newest > self.engine.version else None

    def _next_wave(self) -> list[Driver]:
        """Those of the oldest wave. The broker grants a wave whole in one reply, so they are all here or none."""
        return [driver for driver in self._waiting if driver.lease.wave == self._waiting[0].lease.wave]

    def _ready(self) -> list[Driver]:
        if self._exact:
            wave = self._next_wave()
            ready = wave and self._idle and self.engine.version == wave[0].lease.exact_version
            return wave if ready else []
        limit = 2 * self.engine.capacity
        fitting: list[Driver] = []
        samples = self._running.samples
        for driver in self._waiting:
            if driver.lease.min_version <= self.engine.version and samples < limit:
                fitting.append(driver)
                samples += driver.width
        return fitting

    def _give_up(self, lease: Lease, why: Refused) -> None:
        """The group's fault, not the generator's: a prompt that does not fit, a driver that is not there."""
        log.warning("group %d %s: %s", lease.group, why.kind, why)
        self._fail(lease.group, self._attempts.pop(lease.group), why)

    def _fail(self, group: int, attempt: int, why: Refused) -> None:
        ticket = self.connection.client.send(FailGroup(group=group, attempt=attempt, reason=why.kind, detail=str(why)))
        self._unacknowledged[ticket] = group
