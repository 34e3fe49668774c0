"""The broker: answers every request of a run, from the ledger and the admission policy, in one loop.

    poll ──► handle: a reply, an Error, or held ──► serve what is held (long polls) ──► tick: leases, shards, deadlines

Invariants: I1 (ledger.py), I2 and I2b (admission.py), through scheduler.py. A reply that promises something leaves
after the transaction that made it durable. I4: whoever is held is told at least once a second for what, on whom and
since when it waits; when a role waits and nothing in the run moves for broker.deadline_seconds, the run fails with that
sentence. Nothing in the loop blocks: shards are written by the archive's thread.

States of the run: status "" while it runs; then completed | failed | interrupted, and every reply says stop; the broker
leaves once the shards are sealed and the roles are gone. The run completes when the last version is trained,
checkpointed and scored.
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt

from offtrail.core.types import Problem
from offtrail.platform.broker.admission import AdmissionPolicy
from offtrail.platform.broker.archive import SHARD_BYTES, Archive
from offtrail.platform.broker.ledger import FILE, Ledger, LedgerError
from offtrail.platform.broker.roster import Member, Roster, names
from offtrail.platform.broker.run_metrics import RunMetrics, queue_row
from offtrail.platform.broker.scheduler import Outcome, RequestError, Scheduler
from offtrail.platform.config.schema import Config
from offtrail.platform.runtime.roles import roles_of
from offtrail.platform.tracking.recorder import Recorder
from offtrail.platform.tracking.summary import write_summary
from offtrail.platform.wire.auth import needs_keys
from offtrail.platform.wire.codec import WireError
from offtrail.platform.wire.groups import group_frames, group_from, unpack_group
from offtrail.platform.wire.messages import (
    PROTOCOL,
    Acknowledged,
    BatchReply,
    Beat,
    Checkpointed,
    Commit,
    Committed,
    Error,
    EvalJob,
    EvalResult,
    FailGroup,
    Failure,
    GroupAck,
    Heartbeat,
    Hello,
    LeaseRequest,
    Leases,
    Message,
    NextBatch,
    NextEval,
    ReturnLeases,
    Status,
    StatusRequest,
    StopRun,
    SubmitGroup,
    VersionHint,
    Welcome,
)
from offtrail.platform.wire.sockets import Envelope

log = logging.getLogger("offtrail.broker")

HOLD_SECONDS = 1.0
"""A long poll is answered after so long, with what it waits for."""
TICK_SECONDS = 0.25
SEAL_SECONDS = 600.0
"""A completed run's last shards get so long; what is unsealed then stays in the ledger (archive/unsealed)."""
LINGER_HEARTBEATS = 30
"""After the end, roles that still beat are answered for so many heartbeats."""

Arrays = Sequence[npt.NDArray[Any]]
Answer = tuple[Message, Arrays]
NO_ARRAYS: Arrays = ()


class Wire(Protocol):
    """What the broker needs of wire.sockets.Server."""

    def poll(self, timeout_s: float) -> list[Envelope]:
        """Requests at hand."""

    def reply(self, envelope: Envelope, message: Message, arrays: Arrays = ()) -> None:
        """Answer one."""

    def hint(self, message: VersionHint) -> None:
        """Tell everybody, perhaps."""


@dataclass
class LongPoll:
    """A long poll that waits: ``serve`` gives its answer or None, ``waiting`` the empty answer that says for what.

    ``idle``: whether its role has nothing else to do. Who asks ahead does not wait yet.
    """

    envelope: Envelope
    serve: Callable[[], Answer | None]
    waiting: Callable[[str], Message]
    sentence: Callable[[], str]
    idle: Callable[[], bool]
    until: float


@dataclass(frozen=True)
class Wait:
    """Since when a role has been waiting without an answer: on the broker's clock, and in epoch seconds."""

    since: float
    since_epoch: float


class Broker:
    """One run's broker. ``problems`` maps a place of the data order to its problem.

    LedgerError or ValueError at the start when the ledger is another run's, or the admission policy cannot work.
    """

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        wire: Wire,
        problems: Callable[[int], Problem],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config, self.run_dir, self.wire, self.clock = config, run_dir, wire, clock
        self.admission = AdmissionPolicy.of(config)
        self.ledger = Ledger(run_dir / FILE)
        self._check_same_run()
        self.scheduler = Scheduler(self.ledger, self.admission, problems, config.batch.group_size)
        self.ledger.release()
        self.scheduler.rewind()
        self.roster = Roster()
        self.numbers = RunMetrics(self.ledger, self.roster, clock)
        self.recorder = Recorder(run_dir, config)
        self.archive = Archive(run_dir / FILE, run_dir / "trajectories", run_dir.name)
        self.archive.seal(self.ledger.unsealed())
        self.expected = [spec.name for spec in roles_of(config) if spec.role != "broker"]
        self.held: dict[str, LongPoll] = {}
        self.waits: dict[str, Wait] = {}
        self.failures: list[Failure] = []
        self.later: list[Callable[[], None]] = []
        self.dirty = False
        self.status = self.reason = ""
        self.first_version = self.ledger.checkpoint
        self.audit = self.ledger.audit()
        self.moved = self.ticked = self.ended_at = clock()
        self._restore_rows()
        self.summary = self._summarise()
        self._handlers: dict[type[Message], Callable[[Any, Envelope], Answer | None]] = {
            Hello: self.on_hello,
            LeaseRequest: self.on_lease_request,
            SubmitGroup: self.on_submit,
            FailGroup: self.on_fail_group,
            ReturnLeases: self.on_return_leases,
            NextBatch: self.on_next_batch,
            Commit: self.on_commit,
            Checkpointed: self.on_checkpointed,
            NextEval: self.on_next_eval,
            EvalResult: self.on_eval_result,
            Heartbeat: self.on_heartbeat,
            Failure: self.on_failure,
            StatusRequest: self.on_status_request,
            StopRun: self.on_stop_run,
        }

    # ------------------------------------------------------------------ the loop

    def run(self) -> None:
        """Until the run has ended, its shards are sealed and its roles are gone."""
        while not self.may_leave():
            for envelope in self.wire.poll(self.patience()):
                self.handle(envelope)
            self.serve_held()
            self.tick()
        self._write_last_summary()

    def patience(self) -> float:
        """How long the next poll may wait."""
        soonest = min((held.until for held in self.held.values()), default=self.clock() + TICK_SECONDS)
        return min(TICK_SECONDS, max(0.0, soonest - self.clock()))

    def handle(self, envelope: Envelope) -> None:
        """Answer one request, or hold it."""
        if (member := self.roster.get(envelope.peer_name)) is not None:
            member.heard = self.clock()
        self.dirty = self.dirty or not isinstance(envelope.message, Heartbeat | StatusRequest)
        try:
            answer = self._handlers[type(envelope.message)](envelope.message, envelope)
        except (RequestError, WireError) as error:
            log.warning("%s: %s", envelope.peer_name, error)
            answer = Error(error=str(error)), NO_ARRAYS
        except (LedgerError, OSError) as error:
            answer = Error(error=self.broken(error)), NO_ARRAYS
        if answer is not None:
            self.wire.reply(envelope, *answer)
        self._catch_up()

    def _catch_up(self) -> None:
        """What a reply need not wait for: files that are made of what the ledger holds already."""
        while self.later:
            try:
                self.later.pop(0)()
            except (LedgerError, OSError) as error:
                self.broken(error)

    def serve_held(self) -> None:
        """Answer the long polls that can be answered since something happened, and those that were held long enough."""
        dirty, self.dirty = self.dirty, False
        for peer, held in list(self.held.items()):
            late = self.clock() >= held.until
            self._note_wait(peer, held)
            try:
                answer = held.serve() if dirty or late else None
                sentence = held.sentence() if late and answer is None else ""
            except RequestError as error:
                answer, sentence = (Error(error=str(error)), NO_ARRAYS), ""
            except (LedgerError, OSError) as error:
                answer, sentence = (Error(error=self.broken(error)), NO_ARRAYS), ""
            if answer is not None:
                self.waits.pop(peer, None)
            elif late:
                answer = held.waiting(f"{sentence}{self._since(peer)}"), NO_ARRAYS
            if answer is not None:
                del self.held[peer]
                self.wire.reply(held.envelope, *answer)

    def tick(self) -> None:
        """What time brings: lost holders, sealed shards, starvation, deadlines."""
        now = self.clock()
        # A broker that was stopped itself must not blame the others for it.
        gap, self.ticked = now - self.ticked, now
        if gap > self.config.broker.heartbeat_seconds + TICK_SECONDS:
            for member in self.roster:
                member.heard = min(now, member.heard + gap)
            self.moved = min(now, self.moved + gap)
        try:
            for name in self.archive.done():
                self.ledger.sealed(name)
            if not self.status:
                self._expire(now)
                self._check_deadlines(now)
        except (LedgerError, OSError) as error:
            self.broken(error)

    def _expire(self, now: float) -> None:
        """Leases of a holder whose heartbeats are lost go back; a long answer alone never loses one."""
        limit = self.config.broker.heartbeat_seconds * self.config.broker.lease_heartbeats
        for member in self.roster:
            if member.lost or now - member.heard <= limit:
                member.lost = member.lost and now - member.heard > limit
                continue
            member.lost = self.dirty = True
            returned = self.ledger.return_leases(member.name)
            log.warning(
                "%s: no heartbeat for %.1f s, %d leases returned", member.name, now - member.heard, len(returned)
            )

    def _check_deadlines(self, now: float) -> None:
        """End a run that starves or stands still, with the sentence that says why (I4)."""
        if line := self.scheduler.starved():
            self.fail(line)
            return
        deadline = self.config.broker.deadline_seconds
        if now - self.moved <= deadline:
            return
        if missing := [name for name in self.expected if name not in self.roster]:
            self.fail(
                f"the broker waits for {', '.join(missing)} to dial {self.run_dir / 'endpoint.json'}; "
                f"nothing has moved for broker.deadline_seconds={deadline:g}; see their logs in {self.run_dir / 'logs'}"
            )
            return
        waiting = sorted((wait.since, peer) for peer, wait in self.waits.items() if peer in self.held)
        if waiting and now - waiting[0][0] > deadline:
            peer = waiting[0][1]
            self.fail(
                f"{peer} waits for {self.held[peer].sentence()}{self._since(peer)}; nothing has moved for "
                f"broker.deadline_seconds={deadline:g} ({self._doings(now, peer)})"
            )

    def _doings(self, now: float, but: str) -> str:
        others = [m for m in self.roster if m.name != but]
        return ", ".join(
            f"{m.name} {m.beat.activity if m.beat else 'silent'}, heard {now - m.heard:.0f} s ago" for m in others
        )

    # ------------------------------------------------------------------ the beginning

    def _check_same_run(self) -> None:
        """A ledger goes on only under the settings that its slots and replays depend on."""
        config = self.config
        settings = {
            "run.seed": config.run.seed,
            "batch.groups": config.batch.groups,
            "batch.group_size": config.batch.group_size,
            "staleness.mode": config.staleness.mode,
            "staleness.on_violation": config.staleness.on_violation,
            "task": asdict(config.task),
        }
        now = {key: json.dumps(value, sort_keys=True) for key, value in settings.items()}
        before = self.ledger.get("settings")
        for key, value in (json.loads(before) if before else {}).items():
            if now.get(key, value) != value:
                self.ledger.close()
                raise ValueError(
                    f"{key}={now[key]}: the run {self.run_dir.name} began with {value}; "
                    "resume it with that, or choose another run.name"
                )
        if (done := self.ledger.checkpoint) > self.admission.steps:
            self.ledger.close()
            raise ValueError(
                f"learner.steps={self.admission.steps}: the run {self.run_dir.name} is at step {done} already; "
                "raise it, or choose another run.name"
            )
        self.ledger.put({"run": self.run_dir.name, "settings": json.dumps(now)})

    def _restore_rows(self) -> None:
        evals = self.ledger.evals()
        rows = [{**row, **evals.get(int(row["step"]), {})} for row in self.ledger.metrics()]
        if 0 in evals:
            rows.insert(0, {"step": 0, **evals[0]})
        self.recorder.restore(rows)

    def on_hello(self, hello: Hello, envelope: Envelope) -> Answer:
        """A role begins, or begins again: then its leases go back, and the learner's replay starts over."""
        if hello.protocol != PROTOCOL:
            raise RequestError(
                f"protocol {hello.protocol} was spoken, this broker speaks {PROTOCOL}: install one version of offtrail"
            )
        if hello.run != self.run_dir.name:
            raise RequestError(
                f"run {hello.run!r} was asked for, this broker serves {self.run_dir.name!r}: dial its own endpoint.json"
            )
        name = f"{hello.role}-{hello.index}"
        again = name in self.roster
        life = self.ledger.life(hello.role, hello.index)
        self.roster.add(Member(hello.role, hello.index, hello.pid, life, self.clock()))
        self.held.pop(name, None)
        self.waits.pop(name, None)
        self.ledger.return_leases(name)
        if again and name == "learner-0":
            self.scheduler.rewind()
            self._restore_rows()
            self.first_version = self.ledger.checkpoint
        self._progress()
        log.info("%s is here (pid %d)", name, hello.pid)
        return Welcome(run=self.run_dir.name, step=self.ledger.checkpoint), NO_ARRAYS

    # ------------------------------------------------------------------ generators

    def on_lease_request(self, request: LeaseRequest, envelope: Envelope) -> Answer | None:
        """Leases as far as the admission policy allows; held while there are none."""
        holder = self._member(envelope).name

        def serve() -> Answer | None:
            if self.status:
                return Leases(leases=[], version=self.scheduler.version, stop=True), NO_ARRAYS
            leases = self.scheduler.grant(holder, request.room, len(self.roster.alive("generator")), time.time())
            if not leases:
                return None
            self._progress()
            return Leases(leases=leases, version=self.scheduler.version), NO_ARRAYS

        def empty(sentence: str) -> Message:
            return Leases(leases=[], version=self.scheduler.version, waiting=sentence)

        return self._hold(
            envelope, serve, empty, lambda: self.scheduler.why_no_lease(holder, len(self.roster.alive("generator")))
        )

    def on_submit(self, message: SubmitGroup, envelope: Envelope) -> Answer:
        """A finished group: durable before it is acknowledged."""
        holder, header = self._member(envelope).name, message.header
        try:
            group = group_from(header, envelope.arrays)
        except WireError as error:
            return self._give_up(header.group, header.attempt, holder, "failed", str(error))
        if abs(group.temperature - self.config.sampling.temperature) > 1e-6:  # I5
            expected = self.config.sampling.temperature
            detail = f"sampled at temperature {group.temperature}, not sampling.temperature={expected}"
            return self._give_up(group.group, group.attempt, holder, "failed", detail)
        verdict = self.scheduler.arrive(group, holder, time.time())
        if verdict.changed:
            self._progress()
        if not verdict.accepted:
            log.info("group %d from %s: %s", group.group, holder, verdict.reason)
        return GroupAck(group=group.group, accepted=verdict.accepted, reason=verdict.reason), NO_ARRAYS

    def on_fail_group(self, message: FailGroup, envelope: Envelope) -> Answer:
        """The holder gives a group up."""
        return self._give_up(
            message.group, message.attempt, self._member(envelope).name, message.reason, message.detail
        )

    def on_return_leases(self, message: ReturnLeases, envelope: Envelope) -> Answer:
        """Leases that their holder cannot finish go back, to be issued again; a late attempt's are gone already."""
        holder = self._member(envelope).name
        returned = self.ledger.return_leases(holder, dict(message.leases))
        log.warning("%s returned %d leases: %s", holder, len(returned), message.detail)
        return Acknowledged(), NO_ARRAYS

    def _give_up(self, group: int, attempt: int, holder: str, reason: str, detail: str) -> Answer:
        verdict = self.scheduler.fail(group, attempt, holder, reason, detail)
        log.warning("group %d from %s: %s (%s)", group, holder, verdict.reason, detail)
        return GroupAck(group=group, accepted=False, reason=f"{verdict.reason}: {detail}"), NO_ARRAYS

    # ------------------------------------------------------------------ the learner

    def on_next_batch(self, request: NextBatch, envelope: Envelope) -> Answer | None:
        """The batch of a step, durable in its order before it leaves; held while there are not enough groups."""
        step = request.step
        self._member(envelope)

        def serve() -> Answer | None:
            if self.status or step >= self.admission.steps:
                return BatchReply(step=step, headers=[], stop=True), NO_ARRAYS
            groups = self.scheduler.batch(step)
            if groups is None:
                return None
            self._progress()
            return self._batch_reply(step, groups)

        def empty(sentence: str) -> Message:
            return BatchReply(step=step, headers=[], waiting=sentence)

        # It asks for the next batch while it trains this one: it waits once that one's version is out.
        return self._hold(
            envelope, serve, empty, lambda: self.scheduler.why_no_batch(step), lambda: step == self.scheduler.version
        )

    def _batch_reply(self, step: int, groups: Sequence[int]) -> Answer:
        frames = [group_frames(unpack_group(body)) for body in self.ledger.payloads(groups)]
        arrays = [array for _, parts in frames for array in parts]
        replay = step < self.scheduler.replay_until
        return BatchReply(step=step, headers=[header for header, _ in frames], replay=replay), arrays

    def on_commit(self, message: Commit, envelope: Envelope) -> Answer:
        """A version is out. Its batch is trained, durably, with its metrics; then everybody is told."""
        self._member(envelope)
        if message.version != message.step + 1 and message.step >= 0:
            raise RequestError(f"step {message.step} cannot make version {message.version}")
        if message.step < 0:
            if (outcome := self.scheduler.start(message.version, message.checksum)) != "repeated":
                self.numbers.mark()
                self._finish()
        elif message.version <= self.scheduler.version:
            outcome = self.scheduler.commit(message.step, message.checksum, {})
        else:
            outcome = self._train(message)
        if outcome == "diverged":
            log.warning(
                "version %d differs from the one logged before: lineage %d", message.version, self.ledger.lineage
            )
        if outcome != "repeated":
            self._progress()
            self.wire.hint(VersionHint(version=self.scheduler.version))
            self.later.append(self._write_summary)
        return Committed(lineage=self.ledger.lineage, diverged=outcome == "diverged"), NO_ARRAYS

    def _train(self, message: Commit) -> Outcome:
        step = message.step
        row = self.numbers.row(self.ledger.ages(step), self.ledger.samples(step))
        metrics = {**message.metrics, **row}
        outcome = self.scheduler.commit(step, message.checksum, metrics)
        self.ledger.put(self.numbers.remarks())
        self.later.append(lambda: self.recorder.step({**metrics, "step": step + 1}, message.histograms, message.texts))
        return outcome

    def on_checkpointed(self, message: Checkpointed, envelope: Envelope) -> Answer:
        """Batches before it need no payload any more: they leave the spool for the archive."""
        self._member(envelope)
        if not self.ledger.checkpoint <= message.step <= self.scheduler.version:
            raise RequestError(f"checkpoint {message.step}: the newest version is {self.scheduler.version}")
        self.ledger.checkpointed(message.step)
        log.info("checkpoint %d is written: %s", message.step, message.path)
        self._seal()
        self.audit = self.ledger.audit()
        self._progress()
        self._finish()
        return Acknowledged(), NO_ARRAYS

    # ------------------------------------------------------------------ the evaluator

    def on_next_eval(self, request: NextEval, envelope: Envelope) -> Answer | None:
        """The oldest version that is due and not scored; held while there is none."""
        self._member(envelope)

        def serve() -> Answer | None:
            if self.status:
                return EvalJob(version=-1, stop=True), NO_ARRAYS
            due = self._due()
            return (EvalJob(version=due[0]), NO_ARRAYS) if due else None

        def empty(sentence: str) -> Message:
            return EvalJob(version=-1, waiting=sentence)

        return self._hold(envelope, serve, empty, self._why_no_eval)

    def _due(self) -> list[int]:
        """Versions to score: 0, every eval.every-th, the last. The weights of those from before a restart are gone."""
        scored = self.ledger.scored()
        out = range(self.first_version, self.scheduler.version + 1)
        return [version for version in out if self._evaluates(version) and version not in scored]

    def _evaluates(self, version: int) -> bool:
        every = self.config.eval.every
        return version in (0, self.admission.steps) or (every > 0 and version % every == 0)

    def _why_no_eval(self) -> str:
        later = range(self.scheduler.version + 1, self.admission.steps + 1)
        version = next((v for v in later if self._evaluates(v)), self.admission.steps)
        return f"version {version} from learner-0"

    def on_eval_result(self, message: EvalResult, envelope: Envelope) -> Answer:
        """Scores of one version go to its row of metrics.jsonl."""
        self._member(envelope)
        if not 0 <= message.version <= self.scheduler.version:
            raise RequestError(
                f"version {message.version} was scored, but the newest version is {self.scheduler.version}"
            )
        self.ledger.evaluated(message.version, message.metrics)
        self.recorder.evaluation(message.version, message.metrics, message.texts)
        self._progress()
        self._finish()
        if not self.status:
            self._write_summary()
        return Acknowledged(), NO_ARRAYS

    # ------------------------------------------------------------------ all roles, and the launcher

    def on_heartbeat(self, beat: Heartbeat, envelope: Envelope) -> Answer:
        """A sign of life; its counters go to the compute ledger."""
        member = self.roster.get(f"{beat.role}-{beat.index}")
        if member is not None and member.pid == beat.pid:
            member.heard = self.clock()
            if member.take(beat, self.clock()):
                self._progress()
            seconds = {f"{name} seconds": value for name, value in beat.seconds.items()}
            try:
                self.ledger.charge([(beat.role, beat.index, member.life, {**beat.compute, **seconds})])
            except LedgerError as error:  # the beat must still be answered: it is what says stop
                self.broken(error)
        return Beat(version=self.scheduler.version, stop=bool(self.status)), NO_ARRAYS

    def on_failure(self, failure: Failure, envelope: Envelope) -> Answer:
        """A role says why it dies: the run fails with its words."""
        self.failures.append(failure)
        self.end("failed", f"{failure.role}-{failure.index}: {failure.error}")
        return Acknowledged(), NO_ARRAYS

    def on_status_request(self, request: StatusRequest, envelope: Envelope) -> Answer:
        """How the run stands now."""
        live = {**self.recorder.last, **queue_row(self.ledger.tally())}
        # A number that is not finite stands as null in the row; Status.metrics holds numbers only.
        live = {name: value for name, value in live.items() if value is not None}
        status = Status(
            summary={**self.summary, "wall_seconds": self.numbers.wall_seconds},
            roles=[m.beat for m in self.roster if m.beat is not None],
            metrics=live if "step" in live else {},
            failures=self.failures,
            finished=self.status == "completed" and not self.ledger.unsealed(),
        )
        return status, NO_ARRAYS

    def on_stop_run(self, message: StopRun, envelope: Envelope) -> Answer:
        """The launcher ends the run."""
        self.end(message.status, message.reason)
        return Acknowledged(), NO_ARRAYS

    # ------------------------------------------------------------------ the end

    def _finish(self) -> None:
        last = self.admission.steps
        if self.scheduler.version == last == self.ledger.checkpoint and last in self.ledger.scored():
            self.end("completed", "")

    def fail(self, line: str) -> None:
        """End the run by the broker's own finding."""
        log.error("%s", line)
        self.failures.append(Failure(role="broker", index=0, error=line))
        self.end("failed", line)

    def broken(self, error: Exception) -> str:
        """The disk does not take what must be durable: nothing more is acknowledged, the run fails in one line."""
        line = (
            str(error)
            if isinstance(error, LedgerError)
            else (
                f"{self.run_dir}: {error}; nothing acknowledged is lost: free space (or make it writable) "
                "and go on with run.resume=true"
            )
        )
        if not self.status:
            self.fail(line)
        return line

    def end(self, status: str, reason: str) -> None:
        """From here on every reply says stop. Only the first end counts.

        A completed run refuses what is left as `run_ended` and archives everything; any other keeps its groups and
        payloads, so that run.resume=true goes on from there.
        """
        if self.status:
            return
        self.status, self.reason, self.ended_at, self.dirty = status, reason, self.clock(), True
        log.info("the run is %s %s", status, reason)
        try:
            if status == "completed":
                self.ledger.end()
                self._seal()
            self.ledger.put(self.numbers.remarks())
            self.audit = self.ledger.audit()
            self._write_summary()
        except (LedgerError, OSError, sqlite3.Error) as error:
            log.error("the summary could not be written: %s", error)

    def _seal(self) -> None:
        self.ledger.plan_shards(SHARD_BYTES)
        self.archive.seal(self.ledger.unsealed())

    def _summarise(self) -> dict[str, Any]:
        # A run that is killed says nothing any more: until it ends otherwise, it is interrupted.
        status = self.status or "interrupted"
        return self.numbers.summary(status, self.reason, self.config.run.seed, self.scheduler.version, self.audit)

    def _write_summary(self) -> None:
        self.summary = self._summarise()
        write_summary(self.run_dir, self.summary)

    def _write_last_summary(self) -> None:
        """Once more when nothing can change any more: shards were sealed since the end."""
        try:
            self._write_summary()
        except (LedgerError, OSError, sqlite3.Error) as error:
            log.error("the last summary could not be written: %s", error)

    def may_leave(self) -> bool:
        """The run has ended, its shards are sealed, and nobody is left to be told."""
        if not self.status:
            return False
        waited = self.clock() - self.ended_at
        if self.status == "completed" and self.ledger.unsealed():
            return waited > SEAL_SECONDS
        if waited > LINGER_HEARTBEATS * self.config.broker.heartbeat_seconds:
            return True
        return not any(self._present(m) for m in self.roster)

    def _present(self, member: Member) -> bool:
        """Whether a role may still ask. On one host its process says so, elsewhere its heartbeats."""
        if self.clock() - member.heard > 3 * self.config.broker.heartbeat_seconds:
            return False
        if needs_keys(self.config.broker.address):
            return True
        try:
            os.kill(member.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True

    def close(self) -> None:
        """End the thread, close the files."""
        self.archive.close()
        self.recorder.close()
        self.ledger.close()

    # ------------------------------------------------------------------ small things

    def _member(self, envelope: Envelope) -> Member:
        member = self.roster.get(envelope.peer_name)
        if member is None:
            raise RequestError(f"{envelope.peer_name} has not said Hello; known are {names(self.roster)}")
        return member

    def _hold(
        self,
        envelope: Envelope,
        serve: Callable[[], Answer | None],
        waiting: Callable[[str], Message],
        sentence: Callable[[], str],
        idle: Callable[[], bool] = lambda: True,
    ) -> Answer | None:
        peer = envelope.peer_name
        if (answer := serve()) is not None:
            self.waits.pop(peer, None)
            return answer
        self.held[peer] = LongPoll(envelope, serve, waiting, sentence, idle, self.clock() + HOLD_SECONDS)
        self._note_wait(peer, self.held[peer])
        return None

    def _note_wait(self, peer: str, held: LongPoll) -> None:
        if peer not in self.waits and held.idle():
            self.waits[peer] = Wait(self.clock(), time.time())

    def _since(self, peer: str) -> str:
        """The end of a waiting role's sentence."""
        wait = self.waits.get(peer)
        return f", since {time.strftime('%H:%M:%S', time.localtime(wait.since_epoch))}" if wait else ""

    def _progress(self) -> None:
        self.moved = self.clock()
