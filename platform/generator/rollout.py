"""The rollout loop's parts. One Rollout owns one engine and everything between a lease and its acknowledged group.

    leases ──► waiting ──(version applied)──► engine ──► driver ──► verifiers ──► submitted ──(ack)──► forgotten
                                                └─ its server died: the lease goes back, to be issued again

Invariants kept here
- I2: a group enters the engine only when the engine's version is ≥ its lease's ``min_version``.
- I2b, I3: in exact mode a wave enters whole, in slot order, into an empty engine that holds exactly its version.
- I1: a group is forgotten only after the broker's acknowledgement, which comes after the group is durable.
Nothing here blocks while the engine has work: replies, verdicts and weights are looked for between decode steps.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from offtrail.core.protocols import Driver, Engine
from offtrail.core.types import FINISH_REASONS, Group, Int32, Lease
from offtrail.platform.config.schema import Config
from offtrail.platform.engines.channels import Reader
from offtrail.platform.runtime.context import Connection
from offtrail.platform.verifier.pool import VerifierPool
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
from offtrail.rewards.total import total

log = logging.getLogger("offtrail.generator")


@dataclass
class Rollout:
    """State of one generator; each public method is one verb of the loop in role.py."""

    config: Config
    connection: Connection
    engine: Engine
    weights: Reader
    verifiers: VerifierPool
    make_driver: Callable[[Lease], Driver]
    encode: Callable[[Lease], Int32]
    decode_text: Callable[[Int32], str]
    stopping: bool = False
    waiting_for: str = "broker"
    newest: int = -1
    _lease_ticket: int | None = None
    _waiting: list[Lease] = field(default_factory=list)
    _running: dict[int, tuple[Lease, Driver]] = field(default_factory=dict)
    _scoring: dict[int, Group] = field(default_factory=dict)
    _unacknowledged: dict[int, int] = field(default_factory=dict)
    _returned: set[int] = field(default_factory=set)
    _attempts: dict[int, int] = field(default_factory=dict)
    _charged: dict[str, float] = field(default_factory=dict)

    @property
    def held(self) -> int:
        """Groups between lease and acknowledgement."""
        return len(self._waiting) + len(self._running) + len(self._scoring) + len(self._unacknowledged)

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
                if self.config.staleness.mode == "exact":
                    raise
                return  # retired while we looked: a newer one is out, the next turn takes it
            self._probe(version)

    def start_ready(self) -> None:
        """Hand the engine every lease whose version rule is met."""
        for lease in self._ready():
            self._waiting.remove(lease)
            driver = self.make_driver(lease)
            try:
                requests = driver.start(lease, self.encode(lease))
                self.engine.generate(requests)
            except ValueError as error:  # a prompt that does not fit: the group's fault, not the generator's
                log.warning("group %d failed: %s", lease.group, error)
                self._fail(lease.group, self._attempts.pop(lease.group), str(error))
                continue
            self._running[lease.group] = (lease, driver)

    def decode(self) -> None:
        """One decode step; finished samples go to their driver, finished groups to the verifiers."""
        activity, server = self.connection.activity, self.engine.waiting_for
        with activity.waiting("server", on=server) if server else activity.busy("decode"):
            completions = self.engine.step()
        self._return_lost()
        for completion in completions:
            if completion.request not in self._running:  # lost since
                continue
            _, driver = self._running[completion.request]
            requests, group = driver.finished(completion)
            if requests:
                self.engine.generate(requests)
            if group is not None:
                del self._running[completion.request]
                self._verify(group)

    def submit_scored(self) -> None:
        """Send every group whose verdict is in; a verifier that was killed may fail its group (reward.on_timeout)."""
        for key, components in self.verifiers.poll():
            group = self._scoring.pop(key)
            group.attempt = self._attempts.pop(key)
            if components is None:
                self._fail(group.group, group.attempt, self.verifiers.reason(key))
                continue
            group.components = components
            step = group.slot // self.config.batch.groups  # in completion order: the likely one
            group.rewards = total(self.config.reward, components, task=group.problem.task, step=step)
            header, arrays = group_frames(group)
            ticket = self.connection.client.send(SubmitGroup(header=header), arrays)
            self._unacknowledged[ticket] = group.group

    def charge(self) -> None:
        """The cumulative counters of engine and verifiers into the compute ledger (I6)."""
        activity = self.connection.activity
        for name, value in {**self.engine.counters, **self.verifiers.counters}.items():
            activity.charge(name, value - self._charged.get(name, 0.0))
            self._charged[name] = value
        activity.gauge("running_samples", float(self.engine.unfinished))
        activity.gauge("version", float(self.engine.version))

    def wait(self) -> None:
        """Nothing to decode: wait for the broker, the verifiers or a version, whichever the held groups need.

        Raises WaitError (I4) when the broker has answered no heartbeat for broker.deadline_seconds.
        """
        heartbeat, server = self.connection.heartbeat, self.engine.waiting_for
        what, on = ("verdicts", "verifiers") if self._scoring else ("leases", self.waiting_for)
        if server and not self._scoring:
            what, on = "server", server
        with self.connection.activity.waiting(what, on=on):
            self.take_replies(timeout_s=0.001 if self._scoring else 0.02)
        self.stopping = self.stopping or heartbeat.stop
        if heartbeat.lost > self.config.broker.deadline_seconds:
            raise WaitError.passed(what, f"the broker ({on})", time.time() - heartbeat.lost, heartbeat.lost)

    def close(self) -> None:
        """Let go of unfinished work: the broker re-issues or refuses what was not acknowledged."""
        self.verifiers.close()
        self.engine.close()
        self.connection.close()

    # --- the rules behind them ---

    def _return_lost(self) -> None:
        """Give the leases back whose samples died with a server: nothing is lost, another attempt makes them."""
        returned = []
        for request in self.engine.lost():
            if request not in self._running:
                continue
            lease, _ = self._running.pop(request)
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
            self._waiting = [lease for lease in self._waiting if lease.group not in granted]
            self._waiting += [lease for lease in message.leases if not self._already_held(lease)]
            self._waiting.sort(key=lambda lease: (lease.wave, lease.slot, lease.group))
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
            found = []
            for replica in range(self.engine.replicas):
                with contextlib.suppress(ConnectionError):  # that copy is gone; its successor is probed in its turn
                    [engine] = self.engine.logprobs([prompt], [output], 1.0, replica)
                    found.append(compare(engine, learner, version=version, alarm=alarm))
            for name in found[0] if found else ():
                self.connection.activity.gauge(name, max(one[name] for one in found))

    def _already_held(self, lease: Lease) -> bool:
        """A group leased to us again (our heartbeats were lost for a while) goes on under the new attempt's number."""
        held = lease.group in self._running or lease.group in self._scoring
        self._attempts[lease.group] = lease.attempt
        return held

    def _room(self) -> int:
        """Groups to ask for: enough waiting samples to fill the engine once over; in exact mode whole waves."""
        if self.config.staleness.mode == "exact":
            return self.config.batch.groups * (self.config.staleness.max + 1) - self.held
        waiting = sum(lease.samples for lease in self._waiting) + self.engine.unfinished
        return math.ceil((2 * self.engine.capacity - waiting) / self.config.batch.group_size)

    def _wanted_version(self) -> int | None:
        if self.config.staleness.mode == "exact":
            wave = self._next_wave()
            return wave[0].exact_version if wave and not self.engine.unfinished else None
        return self.newest if self.newest > self.engine.version else None

    def _next_wave(self) -> list[Lease]:
        """The leases of the oldest wave. The broker grants a wave whole in one reply, so they are all here or none."""
        return [lease for lease in self._waiting if lease.wave == self._waiting[0].wave]

    def _ready(self) -> list[Lease]:
        if self.config.staleness.mode == "exact":
            wave = self._next_wave()
            ready = bool(wave) and not self.engine.unfinished and self.engine.version == wave[0].exact_version
            return wave if ready else []
        limit = 2 * self.engine.capacity
        fitting: list[Lease] = []
        samples = self.engine.unfinished
        for lease in self._waiting:
            if lease.min_version <= self.engine.version and samples < limit:
                fitting.append(lease)
                samples += lease.samples
        return fitting

    def _verify(self, group: Group) -> None:
        stop = FINISH_REASONS.index("stop")
        texts = [self.decode_text(sample.tokens) for sample in group.samples()]
        self.verifiers.submit(group.group, group.problem, texts, (group.finish == stop).tolist())
        self._scoring[group.group] = group

    def _fail(self, group: int, attempt: int, detail: str) -> None:
        ticket = self.connection.client.send(FailGroup(group=group, attempt=attempt, reason="failed", detail=detail))
        self._unacknowledged[ticket] = group
