"""The end of a run: its status and reason, the summary that says so, and when the broker may leave.

    broker ──► end | fail | broken ──► every reply says stop ──► shards sealed, roles gone ──► may_leave

States: status "" while the run goes on; then completed | failed | interrupted. Only the first end counts.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

from offtrail.platform.broker.archive import SHARD_BYTES, Archive
from offtrail.platform.broker.budget import Budget
from offtrail.platform.broker.evaluations import Evaluations
from offtrail.platform.broker.held import Held
from offtrail.platform.broker.roster import Member
from offtrail.platform.broker.run_metrics import Metrics, RunMetrics, queue_row
from offtrail.platform.broker.scheduler import Scheduler
from offtrail.platform.config.schema import Config
from offtrail.platform.ledger.database import LedgerError, UnfitError
from offtrail.platform.ledger.ledger import Ledger
from offtrail.platform.tracking.cost import cost_of_summary
from offtrail.platform.tracking.diagnosis import Diagnosis
from offtrail.platform.tracking.sinks.worker import Sinks
from offtrail.platform.tracking.summary import write_summary
from offtrail.platform.wire.auth import is_remote
from offtrail.platform.wire.messages import Failure, Status

log = logging.getLogger("offtrail.broker")

SEAL_SECONDS = 600.0
"""A completed run's last shards get so long; what is unsealed then stays in the ledger (archive/unsealed)."""
LINGER_HEARTBEATS = 30
"""After the end, roles that still beat are answered for so many heartbeats."""


class Ending:
    """How the run has ended, or stands. ``summary``: the newest contents of summary.json. ``diagnosis``: what does not
    move in it.
    """

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        scheduler: Scheduler,
        evaluations: Evaluations,
        archive: Archive,
        numbers: RunMetrics,
        held: Held,
        clock: Callable[[], float],
    ) -> None:
        self.config, self.run_dir, self.scheduler, self.evaluations = config, run_dir, scheduler, evaluations
        self.archive, self.numbers, self.roster, self.clock = archive, numbers, numbers.roster, clock
        self.held = held
        self.ledger: Ledger = scheduler.ledger
        self.budget = Budget(config.run, numbers)
        self.status = self.reason = ""
        self.failures: list[Failure] = []
        self.ended_at = clock()
        self.audit = self.ledger.audit()
        self.diagnosis = Diagnosis(config, failure=self.ledger.failure)
        self.sinks: Sinks | None = None
        self.summary = self._summarise()

    def check(self) -> None:
        """Complete the run once its last version is trained, checkpointed and scored. Once its budget is spent no batch
        is begun any more: what was begun is the rest of it.
        """
        if self.status:
            return
        if not self.scheduler.complete and (spent := self.budget.spent()):
            self.ledger.records.put(self.numbers.remarks())
            self.scheduler.end_here(f"{spent}, the last step is {self.ledger.logged()}")
            log.info("%s", self.ledger.last_why)
        if self.scheduler.version == self.ledger.last and self.evaluations.finished:
            self.end("completed", self.ledger.last_why)

    def end(self, status: str, reason: str) -> None:
        """From here on every reply says stop. Only the first end counts.

        A completed run refuses what is left as `run_ended` and archives everything; any other keeps its groups and
        payloads, so that run.resume=true goes on from there.
        """
        if self.status:
            return
        self.status, self.reason, self.ended_at = status, reason, self.clock()
        log.info("the run is %s %s", status, reason)
        try:
            if status == "completed":
                self.ledger.end()
                self.seal()
            self.ledger.records.put(self.numbers.remarks())
            self.audit = self.ledger.audit()
            self.write_summary()
        except (LedgerError, UnfitError, OSError, sqlite3.Error) as error:
            log.error("the summary could not be written: %s", error)

    def fail(self, line: str) -> None:
        """End the run by the broker's own finding."""
        log.error("%s", line)
        self.failures.append(Failure(role="broker", index=0, error=line))
        self.end("failed", line)

    def broken(self, error: Exception) -> str:
        """The disk does not take what must be durable: nothing more is acknowledged, the run fails in one line."""
        line = (
            str(error)
            if isinstance(error, LedgerError | UnfitError)
            else (
                f"{self.run_dir}: {error}; nothing acknowledged is lost: free space (or make it writable) "
                "and go on with run.resume=true"
            )
        )
        if not self.status:
            self.fail(line)
        return line

    def seal(self) -> None:
        """Plan the shards of what may leave the spool (all of it once the run is completed), and have them written."""
        self.ledger.shards.plan(SHARD_BYTES, self.ledger.checkpoint, everything=self.status == "completed")
        self.archive.seal(self.ledger.shards.unsealed())

    def recount(self) -> None:
        """The audit of the summary is as new as the last call; here, of what came since the last one."""
        self.audit = self.ledger.auditor.recent(self.ledger.checkpoint)

    def _summarise(self) -> dict[str, Any]:
        # A run that is killed says nothing any more: until it ends otherwise, it is interrupted.
        status = self.status or "interrupted"
        summary = self.numbers.summary(status, self.reason, self.config.seed, self.scheduler.version, self.audit)
        unscored = {"eval/unscored": self.evaluations.unscored} if self.evaluations.unscored else {}
        summary |= self.held.summary()
        cost = cost_of_summary(self.run_dir.name, self.config, self.config.cost, summary).row()
        return summary | unscored | self.budget.row() | cost | self._told()

    def _told(self) -> dict[str, Any]:
        """What the run says of itself, and its trackers."""
        onsets = self.diagnosis.onsets
        if self.sinks is None:
            return onsets | {"warnings": self.diagnosis.lines}
        return onsets | self.sinks.summary() | {"warnings": [*self.diagnosis.lines, *self.sinks.lines]}

    def write_summary(self) -> None:
        """summary.json as things stand."""
        self.summary = self._summarise()
        write_summary(self.run_dir, self.summary)

    def write_last_summary(self) -> None:
        """Once more when nothing can change any more: shards were sealed since the end."""
        try:
            self.held.note(at_once=True)
            self.write_summary()
        except (LedgerError, UnfitError, OSError, sqlite3.Error) as error:
            log.error("the last summary could not be written: %s", error)

    def stands(self, row: Metrics) -> Status:
        """How the run stands now; ``row``: the newest of its metrics."""
        live = {**row, **queue_row(self.ledger.tally())}
        # A number that is not finite stands as null in the row; Status.metrics holds numbers only.
        live = {name: value for name, value in live.items() if value is not None}
        return Status(
            summary={**self.summary, "wall_seconds": self.numbers.wall_seconds},
            roles=[m.beat for m in self.roster if m.beat is not None],
            metrics=live if "step" in live else {},
            failures=self.failures,
            finished=self.status == "completed" and not self.ledger.shards.unsealed(),
        )

    def may_leave(self) -> bool:
        """The run has ended, its shards are sealed, and nobody is left to be told."""
        if not self.status:
            return False
        waited = self.clock() - self.ended_at
        if self.status == "completed" and self.ledger.shards.unsealed():
            return waited > SEAL_SECONDS
        closed = self.sinks is None or self.sinks.finish()
        if waited > LINGER_HEARTBEATS * self.config.broker.heartbeat_seconds:
            return True
        return closed and not any(self._present(m) for m in self.roster)

    def _present(self, member: Member) -> bool:
        """Whether a role may still ask. On one host its process says so, elsewhere its heartbeats."""
        if self.clock() - member.heard > 3 * self.config.broker.heartbeat_seconds:
            return False
        return member.runs(here=not is_remote(self.config.broker.address))
