"""The broker: answers every request of a run, from the ledger and the admission policy, in one loop.

    poll ──► handle: a reply, an Error, or held ──► serve what is held (long polls) ──► tick: leases, shards, deadlines

Invariants: I1 (ledger.py), I2 and I2b (admission.py), through scheduler.py. A reply that promises something leaves
after the transaction that made it durable. I4: whoever is held is told at least once a second for what, on whom and
since when it waits; when a role waits and nothing in the run moves for broker.deadline_seconds, the run fails with that
sentence. Nothing in the loop blocks: shards are written by the archive's thread.

The run completes when the last version is trained, checkpointed and scored; how it ends stands in ending.py.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from offtrail.core.types import Group, Problem
from offtrail.platform.broker.admission import AdmissionPolicy
from offtrail.platform.broker.archive import Archive, Sealed
from offtrail.platform.broker.authority import check_hello, check_sender
from offtrail.platform.broker.deadlines import TICK_SECONDS, Deadlines
from offtrail.platform.broker.ending import Ending
from offtrail.platform.broker.evaluations import Evaluations
from offtrail.platform.broker.held import Held
from offtrail.platform.broker.polls import NO_ARRAYS, Answer, LongPoll, Polls, Wire
from offtrail.platform.broker.resume import check_settings, check_whole, cold_start_of, note_launch
from offtrail.platform.broker.roster import Member, Roster
from offtrail.platform.broker.rules import GroupRules
from offtrail.platform.broker.run_metrics import LARGEST, RunMetrics, plain
from offtrail.platform.broker.scheduler import Outcome, RequestError, Scheduler
from offtrail.platform.config.errors import ConfigError
from offtrail.platform.config.schema import Config
from offtrail.platform.ledger.database import LedgerError, UnfitError
from offtrail.platform.ledger.ledger import FILE, Ledger
from offtrail.platform.runtime.roles import JOBS, roles_of
from offtrail.platform.tracking import compute
from offtrail.platform.tracking.diagnosis import Diagnosis
from offtrail.platform.tracking.recorder import Recorder
from offtrail.platform.wire.auth import is_remote
from offtrail.platform.wire.codec import WireError
from offtrail.platform.wire.groups import group_frames, group_from, unpack_group
from offtrail.platform.wire.messages import (
    LAUNCHER,
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
    HeldOut,
    Hello,
    LeaseRequest,
    Leases,
    Message,
    NextBatch,
    NextEval,
    NextRefresh,
    RefreshJob,
    ReturnLeases,
    Serving,
    StatusRequest,
    StopRun,
    SubmitGroup,
    VersionHint,
    Welcome,
)
from offtrail.platform.wire.sockets import Envelope

log = logging.getLogger("offtrail.broker")


class Broker:
    """One run's broker. ``problems`` maps a place of the data order to its problem; it began ``age`` seconds ago.

    LedgerError, ConfigError or ValueError at the start when the ledger is another run's, or the admission policy cannot
    work.
    """

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        wire: Wire,
        problems: Callable[[int], Problem],
        clock: Callable[[], float] = time.monotonic,
        age: float = 0.0,
    ) -> None:
        self.config, self.run_dir, self.wire, self.clock = config, run_dir, wire, clock
        self.admission = AdmissionPolicy.of(config)
        self.ledger = Ledger(run_dir / FILE)
        try:
            check_whole(self.ledger, run_dir)
            check_settings(self.ledger, config, run_dir)
            note_launch(self.ledger, config, run_dir.name)
            cold_start = cold_start_of(config, run_dir)
        except (ConfigError, ValueError):
            self.ledger.close()
            raise
        self.scheduler = Scheduler(
            self.ledger,
            self.admission,
            problems,
            config.batch.group_size,
            driver=config.search.name,
            flexible=config.search.flexible,
            rules=GroupRules.of(config, run_dir),
        )
        self.ledger.release()
        self.scheduler.begin()
        self.roster = Roster()
        of_groups, sets = "generator" in JOBS[config.job], tuple(config.eval.sets)
        self.numbers = RunMetrics(self.ledger, self.roster, clock, cold_start, of_groups, sets)
        self.held = Held(self.ledger.records, clock, age)
        self.held.cold_start = compute.load_devices(run_dir / "start") if cold_start else []
        self.recorder = Recorder(run_dir, config)
        self.archive = Archive(run_dir / FILE, run_dir / "trajectories", run_dir.name)
        self.ledger.shards.name_missing(run_dir / "trajectories")
        self.archive.seal(self.ledger.shards.unsealed())
        self.evaluations = Evaluations(
            self.ledger, config.eval.every, config.eval.waiting_mb << 20, scores="evaluator" in JOBS[config.job]
        )
        self.ending = Ending(
            config, run_dir, self.scheduler, self.evaluations, self.archive, self.numbers, self.held, clock
        )
        self.ending.sinks = self.recorder.sinks
        self.polls = Polls(clock, wire, self._refused)
        self.deadlines = Deadlines(config, run_dir, self.scheduler, self.roster, self.polls, self.ending, clock)
        self._here = not is_remote(config.broker.address)
        self.restartable = {spec.name for spec in roles_of(config) if spec.restarts}
        self.deferred: list[Callable[[], None]] = []
        self._restore_rows()
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
            HeldOut: self.on_held_out,
            NextRefresh: self.on_next_refresh,
            Serving: self.on_serving,
            Heartbeat: self.on_heartbeat,
            Failure: self.on_failure,
            StatusRequest: self.on_status_request,
            StopRun: self.on_stop_run,
        }

    # ------------------------------------------------------------------ the loop

    def run(self) -> None:
        """Until the run has ended, its shards are sealed and its roles are gone."""
        while not self.ending.may_leave():
            for envelope in self.wire.poll(self.patience()):
                self.handle(envelope)
            self.serve_held()
            self.tick()
        self.ending.write_last_summary()

    def patience(self) -> float:
        """How long the next poll may wait."""
        now = self.clock()
        return min(TICK_SECONDS, max(0.0, self.polls.soonest(default=now + TICK_SECONDS) - now))

    def handle(self, envelope: Envelope) -> None:
        """Answer one request, or hold it."""
        member = self.roster.sender(envelope.process)
        if member is not None and not isinstance(envelope.message, Hello):  # its process may be another one
            member.heard, member.lost = self.clock(), False
        if not isinstance(envelope.message, Heartbeat | StatusRequest):
            self.polls.dirty = True
        try:
            check_sender(envelope, self.roster)
            answer = self._handlers[type(envelope.message)](envelope.message, envelope)
            if answer is not None:
                self.wire.reply(envelope, *answer)
        except Exception as error:
            self.wire.reply(envelope, self._refused(error, envelope.peer_name))
        self._catch_up()

    def _refused(self, error: Exception, peer: str) -> Message:
        """The answer to a request that raised ``error``, whatever that is. What the disk does not take ends the run."""
        if isinstance(error, LedgerError | OSError):
            return Error(error=self.ending.broken(error))
        if isinstance(error, RequestError | WireError | UnfitError):
            log.warning("%s: %s", peer, error)
            return Error(error=str(error))
        log.error("a request of %s could not be carried out", peer, exc_info=error)
        return Error(
            error=f"the broker could not carry it out ({type(error).__name__}: {error}): see logs/broker-0.log"
        )

    def _catch_up(self) -> None:
        """What a reply need not wait for: files that are made of what the ledger holds already."""
        while self.deferred:
            try:
                self.deferred.pop(0)()
            except (LedgerError, UnfitError, OSError) as error:
                self.ending.broken(error)
            except Exception:
                log.exception("a file could not be brought up to date with the ledger")

    def serve_held(self) -> None:
        """Answer the long polls that can be answered; after the end, all of them."""
        self.polls.dirty = self.polls.dirty or bool(self.ending.status)
        self.polls.serve()

    def tick(self) -> None:
        """What time brings: sealed shards, lost holders, starvation, deadlines, a spent budget."""
        try:
            for shard in self.archive.done():
                self._note_sealed(shard)
            self.deadlines.tick()
            self.ending.check()
            self.held.note()
        except (LedgerError, UnfitError, OSError) as error:
            self.ending.broken(error)

    def _note_sealed(self, shard: Sealed) -> None:
        for line in [shard.why] if shard.why else shard.left_out.values():
            log.warning("%s: %s", shard.name, line)
        if shard.why:
            self.ledger.shards.set_aside(shard.name, shard.why)
        else:
            self.ledger.shards.sealed(shard.name, shard.left_out)

    # ------------------------------------------------------------------ the beginning

    def _restore_rows(self) -> None:
        evals = self.ledger.records.evals()
        rows = [{**row, **evals.get(int(row["step"]), {})} for row in self.ledger.records.metrics()]
        if 0 in evals:
            rows.insert(0, {"step": 0, **evals[0]})
        self.recorder.restore(rows)
        self.ending.diagnosis = Diagnosis(self.config, rows, self.ledger.failure)

    def on_hello(self, hello: Hello, envelope: Envelope) -> Answer:
        """A role begins, or begins again: then its leases go back, and a new learner's replay starts over."""
        check_hello(hello, envelope.process, self.run_dir.name, self.roster, here=self._here)
        name = f"{hello.role}-{hello.index}"
        before = self.roster.get(name)
        # A process that comes back under a new connection goes on with its cumulative charges.
        again = before is not None and before.process != envelope.process
        life = before.life if before and not again else self.ledger.records.life(hello.role, hello.index)
        self.roster.add(Member(hello.role, hello.index, hello.pid, life, self.clock(), envelope.process))
        start = self.ledger.checkpoint
        if hello.role == LAUNCHER:
            return Welcome(run=self.run_dir.name, step=start), NO_ARRAYS
        self.held.holds(name, hello.role, hello.devices)
        self.polls.forget(name)
        self.ledger.return_leases(name)
        if again and name == "learner-0" and not self.ending.status:
            self.scheduler.rewind()
            self._restore_rows()
            self.evaluations.kept.clear()
        self.deadlines.progress()
        log.info("%s is here (pid %d)", name, hello.pid)
        return Welcome(run=self.run_dir.name, step=start, evaluate=self.evaluations.due(start)), NO_ARRAYS

    # ------------------------------------------------------------------ generators

    def on_lease_request(self, request: LeaseRequest, envelope: Envelope) -> Answer | None:
        """Leases as far as the admission policy allows; held while there are none. Trap: what comes back from a lost
        holder must not go to the poll that it left behind.
        """
        member = self._member(envelope)
        holder = member.name

        def serve() -> Answer | None:
            if self.ending.status:
                return Leases(leases=[], version=self.scheduler.version, stop=True), NO_ARRAYS
            if member.lost:
                return None
            leases = self.scheduler.grant(holder, request.room, len(self.roster.alive("generator")), time.time())
            if not leases:
                return None
            self.deadlines.progress()
            return Leases(leases=leases, version=self.scheduler.version), NO_ARRAYS

        def empty(sentence: str) -> Message:
            return Leases(leases=[], version=self.scheduler.version, waiting=sentence)

        def sentence() -> str:
            return self.scheduler.why_no_lease(holder, len(self.roster.alive("generator")))

        return self.polls.hold(LongPoll(envelope, serve, empty, sentence))

    def on_submit(self, message: SubmitGroup, envelope: Envelope) -> Answer:
        """A finished group: durable before it is acknowledged."""
        holder, header = self._member(envelope).name, message.header
        try:
            group = group_from(header, envelope.arrays, self.scheduler.rules.vocab_size)
        except WireError as error:
            return self._give_up(header.group, header.attempt, holder, "failed", str(error))
        verdict = self.scheduler.arrive(group, holder, time.time())
        if verdict.changed:
            self.deadlines.progress()
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

        def behind() -> str:
            return self.evaluations.behind(step, self.scheduler.version)

        def serve() -> Answer | None:
            if self.ending.status or step >= self.ledger.last:
                over = bool(self.ending.status)
                return BatchReply(step=step, headers=[], stop=over, finished=not over), NO_ARRAYS
            if behind() or (ids := self.scheduler.batch(step)) is None:
                return None
            if (groups := self.scheduler.contents(step, ids)) is None:
                return None
            self.deadlines.progress()
            return self._batch_reply(step, groups)

        def empty(sentence: str) -> Message:
            return BatchReply(step=step, headers=[], waiting=sentence)

        def why() -> str:
            return behind() or self.scheduler.why_no_batch(step)

        def idle() -> bool:  # it asks for the next batch while it trains this one: it waits once that version is out
            return step == self.scheduler.version

        return self.polls.hold(LongPoll(envelope, serve, empty, why, idle))

    def _batch_reply(self, step: int, groups: Sequence[Group]) -> Answer:
        frames = [group_frames(group) for group in groups]
        arrays = [array for _, parts in frames for array in parts]
        replay = step < self.scheduler.replay_until
        return BatchReply(step=step, headers=[header for header, _ in frames], replay=replay), arrays

    def on_commit(self, message: Commit, envelope: Envelope) -> Answer:
        """A version is out. Its batch is trained, durably, with its metrics; then everybody is told."""
        if message.version != message.step + 1 and message.step >= 0:
            raise RequestError(f"step {message.step} cannot make version {message.version}")
        if "step" in message.metrics:
            raise RequestError("a metric named step: that is the row's own number")
        if message.step < 0:
            if (outcome := self.scheduler.start(message.version, message.checksum)) != "repeated":
                self.numbers.mark()
                self.evaluations.resume()
        elif message.version <= self.scheduler.version:
            outcome = self.scheduler.commit(message.step, message.checksum, {})
        else:
            outcome = self._train(message)
        if outcome == "diverged":
            log.warning(
                "version %d differs from the one logged before: lineage %d", message.version, self.ledger.lineage
            )
        if outcome != "repeated":
            self.deadlines.progress()
            self.wire.hint(VersionHint(version=self.scheduler.version))
            self.deferred.append(self.ending.write_summary)
        if message.pinned_bytes:
            self.evaluations.kept[message.version] = message.pinned_bytes
        self.ending.check()
        due, spared = self.evaluations.due(message.version + 1), self.evaluations.stored
        diverged = outcome == "diverged"
        return Committed(lineage=self.ledger.lineage, diverged=diverged, evaluate=due, spared=spared), NO_ARRAYS

    def _train(self, message: Commit) -> Outcome:
        step = message.step
        row = self.numbers.row(self.ledger.ages(step), self.ledger.samples(step), message.tokens)
        metrics = {**message.metrics, **row}
        outcome = self.scheduler.commit(step, message.checksum, metrics)
        self.ledger.records.put(self.numbers.remarks())
        for line in self.ending.diagnosis.take({**metrics, "step": step + 1}):
            log.warning("%s", line)
        self.deferred.append(
            lambda: self.recorder.step({**metrics, "step": step + 1}, message.histograms, message.texts)
        )
        return outcome

    def on_checkpointed(self, message: Checkpointed, envelope: Envelope) -> Answer:
        """Batches before it need no payload any more: they leave the spool for the archive."""
        if not self.ledger.checkpoint <= message.step <= self.scheduler.version:
            raise RequestError(f"checkpoint {message.step}: the newest version is {self.scheduler.version}")
        self.ledger.checkpointed(message.step)
        log.info("checkpoint %d is written: %s", message.step, message.path)
        self.ending.seal()
        self.ending.recount()
        self.deadlines.progress()
        self.ending.check()
        return Acknowledged(), NO_ARRAYS

    # ------------------------------------------------------------------ the evaluator

    def on_next_eval(self, request: NextEval, envelope: Envelope) -> Answer | None:
        """The oldest version that is due and not scored; held while there is none."""

        def serve() -> Answer | None:
            if self.ending.status:
                return EvalJob(version=-1, stop=True), NO_ARRAYS
            job = self.evaluations.next()
            return (job, NO_ARRAYS) if job is not None else None

        def empty(sentence: str) -> Message:
            return EvalJob(version=-1, waiting=sentence)

        def why() -> str:
            return self.evaluations.why_none(self.scheduler.version)

        return self.polls.hold(LongPoll(envelope, serve, empty, why))

    def on_eval_result(self, message: EvalResult, envelope: Envelope) -> Answer:
        """Scores of one version go to its row of metrics.jsonl; one that is to be had no more, to the summary."""
        self._check_scores(message)
        if message.lost:
            self.evaluations.lose(message.version)
            log.warning("version %d cannot be scored any more: %s", message.version, message.lost)
        else:
            self._note_scores(message)
        self.deadlines.progress()
        self.ending.check()
        if not self.ending.status:
            self.ending.write_summary()
        return Acknowledged(), NO_ARRAYS

    def on_held_out(self, message: HeldOut, envelope: Envelope) -> Answer:
        """The same of a learner that measures its versions itself."""
        self._check_scores(message)
        self._note_scores(EvalResult(version=message.version, metrics=message.metrics))
        self.deadlines.progress()
        return Acknowledged(), NO_ARRAYS

    def _check_scores(self, message: EvalResult | HeldOut) -> None:
        if not 0 <= message.version <= self.scheduler.version:
            raise RequestError(
                f"version {message.version} was scored, but the newest version is {self.scheduler.version}"
            )
        if strange := [name for name in message.metrics if not name.startswith("eval/")]:
            raise RequestError(f"a score named {strange[0]!r}: scores are eval/…")

    def _note_scores(self, message: EvalResult) -> None:
        scores = {name: value for name, value in message.metrics.items() if abs(value) <= LARGEST}
        self.numbers.dropped += len(message.metrics) - len(scores)
        self.ledger.records.evaluated(message.version, scores)
        self.recorder.evaluation(message.version, scores, message.texts)
        for line in self.ending.diagnosis.take_scores(message.version, scores):
            log.warning("%s", line)

    # ------------------------------------------------------------------ scorers

    def on_serving(self, message: Serving, envelope: Envelope) -> Answer:
        """Where a scorer can be asked: those who ask hear of it with their next heartbeat."""
        member = self._member(envelope)
        member.serves = message.url
        self.deadlines.progress()
        log.info("%s answers at %s", member.name, message.url)
        return Acknowledged(), NO_ARRAYS

    def on_next_refresh(self, request: NextRefresh, envelope: Envelope) -> Answer | None:
        """What a model of scorer.models is to be trained on next; held while the policy has not come that far."""
        every = self.config.scorer.refresh_every

        def serve() -> Answer | None:
            version = self.scheduler.version
            if self.ending.status:
                return RefreshJob(version=-1, stop=True), NO_ARRAYS
            due = version - version % every
            if due <= request.after or version >= self.ledger.last:  # of the last version nothing is asked any more
                return None
            self.deadlines.progress()
            return self._refresh_job(due, self.scheduler.trained(request.after, due, request.groups))

        def empty(sentence: str) -> Message:
            return RefreshJob(version=-1, waiting=sentence)

        def why() -> str:
            coming = max(request.after, self.scheduler.version) // every * every + every
            return f"version {coming} from learner-0" if coming < self.ledger.last else "the end of the run"

        # Never idle: that it waits says nothing of whether the run stands still.
        return self.polls.hold(LongPoll(envelope, serve, empty, why, lambda: False))

    def _refresh_job(self, due: int, ids: Sequence[int]) -> Answer:
        bodies = self.ledger.payloads(ids)
        frames = [group_frames(unpack_group(bodies[group])) for group in ids if group in bodies]
        arrays = [array for _, parts in frames for array in parts]
        headers = [header for header, _ in frames]
        return RefreshJob(version=due, headers=headers, archived=self.ledger.archived(ids)), arrays

    # ------------------------------------------------------------------ all roles, and the launcher

    def on_heartbeat(self, beat: Heartbeat, envelope: Envelope) -> Answer:
        """A sign of life; its counters go to the compute ledger, but for what is no number of a counter."""
        beat, dropped = plain(beat)
        self.numbers.dropped += dropped
        member = self._member(envelope)
        if member.take(beat, self.clock()):
            self.deadlines.progress()
        seconds = {f"{name} seconds": value for name, value in beat.seconds.items()}
        try:
            self.ledger.records.charge([(beat.role, beat.index, member.life, {**beat.compute, **seconds})])
        except LedgerError as error:  # the beat must still be answered: it is what says stop
            self.ending.broken(error)
        version, stop = self.scheduler.version, bool(self.ending.status)
        trained, scorers = version == self.ledger.last, self.roster.serving()
        return Beat(version=version, stop=stop, trained=trained, scorers=scorers), NO_ARRAYS

    def on_failure(self, failure: Failure, envelope: Envelope) -> Answer:
        """A role dies. Where the launcher starts it again its leases go back now; else the run fails with its words.
        Trap: a word of the launcher that comes late must not remove the process that has followed the dead one.
        """
        name = f"{failure.role}-{failure.index}"
        member = self.roster.get(name)
        if failure.pid and member is not None and member.pid != failure.pid and member.runs(here=self._here):
            log.info("%s: process %d is dead, and process %d has followed it", name, failure.pid, member.pid)
            return Acknowledged(), NO_ARRAYS
        if failure.role == "learner" and failure.batch >= 0 and not self.ending.status:
            self.scheduler.blame(failure.batch, failure.error)
        if failure.final or name not in self.restartable:
            self.ending.failures.append(failure)
            self.ending.end("failed", f"{name}: {failure.error}")
            return Acknowledged(), NO_ARRAYS
        self.roster.remove(name)
        self.polls.forget(name)
        returned = self.ledger.return_leases(name)
        log.warning("%s is lost, %d leases returned: %s", name, len(returned), failure.error)
        self.deadlines.progress()
        return Acknowledged(), NO_ARRAYS

    def on_status_request(self, request: StatusRequest, envelope: Envelope) -> Answer:
        """How the run stands now."""
        return self.ending.stands(self.recorder.last), NO_ARRAYS

    def on_stop_run(self, message: StopRun, envelope: Envelope) -> Answer:
        """The launcher ends the run."""
        self.ending.end(message.status, message.reason)
        return Acknowledged(), NO_ARRAYS

    def close(self) -> None:
        """End the thread, close the files."""
        self.archive.close()
        self.recorder.close()
        self.ledger.close()

    # ------------------------------------------------------------------ small things

    def _member(self, envelope: Envelope) -> Member:
        """The sender of a message that `check_sender` has let through."""
        member = self.roster.sender(envelope.process)
        assert member is not None
        return member
