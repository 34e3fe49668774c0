"""The ledger: the durable truth about every group, batch and version of a run.

I1 exactly once: every admitted group is trained once, or refused once with a named reason. At every moment
admitted = leased + queued + training + trained + refused by reason. A batch's ordered ids are durable before it trains;
payloads are kept until a checkpoint covers them; *trained once* holds in the lineage that survives.

    admit          submit           log_batch           commit
    ─────► leased ───────► queued ◄───────────► training ◄──────► trained
             │ ▲              │      (un-log)      │     (rewind)
             │ └──────────────┤                    │
   attempt+1 └─┘   attempt+1  ▼                    ▼
                           refused  ◄──────────────┘  superseded

The schema (tables.py) itself refuses any other move, and counts inside the transaction of the move. audit.py recounts
from the rows, the payloads and the batch log. No call's cost grows with the run's age: what a summary needs of all of
it is kept as it comes.

One connection (database.py: what durable means) serves this, `records` (metrics, evaluations, charges, remarks) and
`shards` (the archive's side).
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path

from offtrail.platform.ledger.audit import Auditor
from offtrail.platform.ledger.database import Database, LedgerError, UnfitError
from offtrail.platform.ledger.mend import mend
from offtrail.platform.ledger.records import Records, put_aside, put_metrics, put_remark
from offtrail.platform.ledger.rows import Ages, Arrival, Audit, Grant, GroupRow, Tally
from offtrail.platform.ledger.shards import Shards

FILE = "ledger.sqlite"


ROW = "id, slot, state, reason, attempt, holder, needs, min_version, max_version"


class Ledger:
    """One run's groups, batches and versions. One process writes it; every public method is one transaction.

    LedgerError on a file that another broker holds, that another schema wrote, that cannot be written, or on a full
    disk.
    """

    def __init__(self, path: Path) -> None:
        self.file = Database(path)
        self.records = Records(self.file)
        self.shards = Shards(self.file)
        self.auditor = Auditor(self.file)
        self._trained: Ages | None = None
        """The staleness of all trained batches, once it was asked for; None: to be read anew."""
        try:
            mend(self.file)
            self._arrivals = int(self.file.one("SELECT COALESCE(MAX(arrival) + 1, 0) FROM groups"))
        except (LedgerError, UnfitError):
            self.close()
            raise

    def close(self) -> None:
        """Give the file back; what was acknowledged stays."""
        self.file.close()

    # ------------------------------------------------------------------ counts

    def tally(self) -> Tally:
        """The counts of I1 at this moment."""
        states: dict[str, int] = {}
        refused: dict[str, int] = {}
        tokens = discarded = 0
        for state, reason, n, part in self.file.rows("SELECT state, reason, n, tokens FROM tally"):
            tokens += part
            if state == "refused":
                refused[reason] = n
                discarded += part
            else:
                states[state] = n
        return Tally(self.admitted, refused=refused, tokens=tokens, discarded=discarded, **states)

    @property
    def admitted(self) -> int:
        """How many groups were ever admitted; the next group's id and problem index."""
        return int(self.file.one("SELECT COALESCE(MAX(id) + 1, 0) FROM groups"))

    def audit(self) -> Audit:
        """Recount everything; see audit.py."""
        return self.auditor.whole()

    # ------------------------------------------------------------------ leases

    def row(self, group: int) -> GroupRow | None:
        """One group, or None when it was never admitted."""
        rows = self.file.rows(f"SELECT {ROW} FROM groups WHERE id = ?", group)
        return GroupRow(*rows[0]) if rows else None

    def leased(self) -> list[GroupRow]:
        """All leased groups in slot order; those with an empty holder were returned and wait to be issued again."""
        return [GroupRow(*r) for r in self.file.rows(f"SELECT {ROW} FROM groups WHERE state = 'leased' ORDER BY slot")]

    def returned(self) -> list[GroupRow]:
        """Those of the leased groups that were returned, in slot order."""
        rows = self.file.rows(f"SELECT {ROW} FROM groups WHERE state = 'leased' AND holder = '' ORDER BY slot")
        return [GroupRow(*r) for r in rows]

    def held(self, holder: str) -> int:
        """How many leases ``holder`` has."""
        return int(self.file.one("SELECT COUNT(*) FROM groups WHERE state = 'leased' AND holder = ?", holder))

    def taken(self, first: int) -> set[int]:
        """The slots from ``first`` on that a living group holds."""
        return {s for (s,) in self.file.rows("SELECT slot FROM groups WHERE state <> 'refused' AND slot >= ?", first)}

    def grant(self, holder: str, grants: Sequence[Grant], now: float) -> list[GroupRow]:
        """Admit a fresh group for each open slot, and issue returned groups again, all to ``holder``; rows in order.

        A queued group among them is given up for another attempt: its payload goes.
        """
        ids: list[int] = []
        with self.file.change() as db:
            fresh = self.admitted
            for grant in grants:
                if grant.group is None:
                    db.execute(
                        "INSERT INTO groups (id, slot, state, holder, leased_at, needs) "
                        "VALUES (?, ?, 'leased', ?, ?, ?)",
                        (fresh, grant.slot, holder, now, grant.needs),
                    )
                    ids.append(fresh)
                    fresh += 1
                else:
                    again = "state = 'leased', attempt = attempt + 1 WHERE id = ? AND state = 'queued'"
                    if db.execute(f"UPDATE groups SET {again}", (grant.group,)).rowcount:
                        db.execute("DELETE FROM payloads WHERE id = ?", (grant.group,))
                    db.execute(
                        "UPDATE groups SET holder = ?, leased_at = ? WHERE id = ? AND state = 'leased' AND holder = ''",
                        (holder, now, grant.group),
                    )
                    ids.append(grant.group)
        rows = {
            r[0]: GroupRow(*r)
            for r in self.file.rows(f"SELECT {ROW} FROM groups WHERE id IN ({','.join(map(str, ids))})")
        }
        return [rows[i] for i in ids]

    def return_leases(self, holder: str, attempts: Mapping[int, int] | None = None) -> list[int]:
        """Take back what ``holder`` has, or only the groups of ``attempts`` (group → attempt); a late submission will
        carry an old attempt number.
        """
        mine = "state = 'leased' AND holder = ?"
        with self.file.change() as db:
            rows = db.execute(f"SELECT id, attempt FROM groups WHERE {mine}", (holder,)).fetchall()
            found = sorted(group for group, attempt in rows if attempts is None or attempts.get(group) == attempt)
            db.executemany("UPDATE groups SET holder = '', attempt = attempt + 1 WHERE id = ?", [(g,) for g in found])
        return found

    # ------------------------------------------------------------------ arrivals

    def submit(self, group: int, arrival: Arrival, lineage: int) -> None:
        """Leased → queued, with its payload: durable when this returns."""
        with self.file.change() as db:
            self._arrive(db, group, arrival, lineage)
            db.execute("UPDATE groups SET state = 'queued' WHERE id = ?", (group,))

    def refuse(
        self, group: int, reason: str, detail: str = "", arrival: Arrival | None = None, lineage: int = 0
    ) -> None:
        """Leased or queued → refused; the payload, where there is one, is kept for the archive."""
        with self.file.change() as db:
            if arrival is not None:
                self._arrive(db, group, arrival, lineage)
            self._refuse(db, [group], reason, detail)

    def _arrive(self, db: sqlite3.Connection, group: int, arrival: Arrival, lineage: int) -> None:
        low = min(arrival.versions, default=arrival.queued_version)
        high = max(arrival.versions, default=arrival.queued_version)
        db.execute(
            "UPDATE groups SET holder = '', arrival = ?, queued_at = ?, queued_version = ?, min_version = ?, "
            "max_version = ?, versions = ?, samples = ?, tokens = ?, lineage = ? WHERE id = ?",
            (self._arrivals, arrival.queued_at, arrival.queued_version, low, high, json.dumps(dict(arrival.versions)),
             arrival.samples, sum(arrival.versions.values()), lineage, group),
        )  # fmt: skip
        self._arrivals += 1
        db.execute("INSERT INTO payloads VALUES (?, ?)", (group, arrival.body))

    @staticmethod
    def _refuse(db: sqlite3.Connection, groups: Sequence[int], reason: str, detail: str = "") -> None:
        db.executemany(
            "UPDATE groups SET state = 'refused', reason = ?, detail = ?, holder = '', batch = NULL, position = NULL "
            "WHERE id = ?",
            [(reason, detail, group) for group in groups],
        )

    def end(self) -> int:
        """Refuse what is still leased or queued as `run_ended`; how many."""
        with self.file.change() as db:
            left = [i for (i,) in db.execute("SELECT id FROM groups WHERE state IN ('leased', 'queued')")]
            self._refuse(db, left, "run_ended")
        return len(left)

    # ------------------------------------------------------------------ batches

    def refusal(self) -> str:
        """Why the newest of the refused groups was refused."""
        rows = self.file.rows("SELECT reason, detail FROM groups WHERE state = 'refused' ORDER BY id DESC LIMIT 1")
        return ": ".join(rows[0]) if rows else ""

    def failure(self) -> str:
        """Why the newest of the groups that were refused as failed or unscored was."""
        rows = self.file.rows(
            "SELECT detail FROM groups WHERE reason IN ('failed', 'unscored') ORDER BY id DESC LIMIT 1"
        )
        return str(rows[0][0]) if rows else ""

    def queued(self) -> list[GroupRow]:
        """The queue, in order of arrival."""
        return [
            GroupRow(*r) for r in self.file.rows(f"SELECT {ROW} FROM groups WHERE state = 'queued' ORDER BY arrival")
        ]

    def queued_slots(self, first: int, count: int) -> list[GroupRow]:
        """The queued groups of slots first…first+count−1, in slot order."""
        query = f"SELECT {ROW} FROM groups WHERE state = 'queued' AND slot >= ? AND slot < ? ORDER BY slot"
        return [GroupRow(*r) for r in self.file.rows(query, first, first + count)]

    def queued_beside(self, returned: Sequence[int]) -> list[GroupRow]:
        """The queued groups that were issued in one grant with any of the returned ones."""
        granted = f"SELECT leased_at FROM groups WHERE id IN ({','.join(map(str, returned))})"
        rows = self.file.rows(f"SELECT {ROW} FROM groups WHERE state = 'queued' AND leased_at IN ({granted})")
        return [GroupRow(*row) for row in rows]

    def batch(self, step: int) -> list[int] | None:
        """The ordered ids of a logged batch."""
        rows = self.file.rows("SELECT ids FROM batches WHERE step = ?", step)
        return json.loads(rows[0][0]) if rows else None

    def logged(self) -> int:
        """One past the last logged batch."""
        return int(self.file.one("SELECT COALESCE(MAX(step) + 1, 0) FROM batches"))

    def payloads(self, groups: Sequence[int]) -> dict[int, bytes]:
        """Group → its packed body, of those that are in the spool."""
        return dict(
            self.file.fetch(f"SELECT id, CAST(body AS BLOB) FROM payloads WHERE id IN ({','.join(map(str, groups))})")
        )

    def archived(self, groups: Sequence[int]) -> dict[str, list[int]]:
        """Shard → its groups, of those that have left the spool."""
        rows = self.file.rows(
            f"SELECT shard, id FROM groups WHERE id IN ({','.join(map(str, groups))}) AND shard IS NOT NULL "
            "AND id NOT IN (SELECT id FROM payloads) ORDER BY shard, id"
        )
        return {shard: [group for name, group in rows if name == shard] for shard, _ in rows}

    def log_batch(self, step: int, groups: Sequence[int]) -> None:
        """Queued → training: the ordered ids are durable when this returns, before anyone trains on them."""
        with self.file.change() as db:
            ages = self._ages(db, step, groups)
            db.execute(
                "INSERT INTO batches VALUES (?, ?, ?, ?, ?, ?, ?, ?, 0)",
                (step, json.dumps(list(groups)), ages.tokens, ages.stale_tokens, ages.age_sum, ages.age_max,
                 ages.flight_sum, ages.queue_sum),
            )  # fmt: skip
            db.executemany(
                "UPDATE groups SET state = 'training', batch = ?, position = ? WHERE id = ?",
                [(step, position, group) for position, group in enumerate(groups)],
            )

    @staticmethod
    def _ages(db: sqlite3.Connection, step: int, groups: Sequence[int]) -> Ages:
        """Age of a token = step − version = (queued_version − version) in flight + (step − queued_version) queued."""
        tokens = stale = total = oldest = flight = queue = 0
        ids = ",".join(map(str, groups))
        for text, queued_version in db.execute(f"SELECT versions, queued_version FROM groups WHERE id IN ({ids})"):
            for name, n in json.loads(text).items():
                age = step - int(name)
                tokens += n
                stale += n if age > 0 else 0
                total += n * age
                oldest = max(oldest, age)
                flight += n * (queued_version - int(name))
                queue += n * (step - queued_version)
        return Ages(tokens, stale, total, oldest, flight, queue)

    def ages(self, step: int | None = None) -> Ages:
        """Staleness of one logged batch, or of all trained ones."""
        if step is None:
            self._trained = self._trained or self._ages_where("trained = 1")
            return self._trained
        return self._ages_where("step = ?", step)

    def _ages_where(self, where: str, *values: int) -> Ages:
        rows = self.file.rows(
            "SELECT COALESCE(SUM(tokens), 0), COALESCE(SUM(stale_tokens), 0), COALESCE(SUM(age_sum), 0), "
            "COALESCE(MAX(age_max), 0), COALESCE(SUM(flight_sum), 0), COALESCE(SUM(queue_sum), 0) "
            f"FROM batches WHERE {where}",
            *values,
        )
        return Ages(*rows[0])

    def samples(self, step: int) -> int:
        """Samples of a logged batch: its groups need not all be of one size."""
        return int(self.file.one("SELECT COALESCE(SUM(samples), 0) FROM groups WHERE batch = ?", step))

    # ------------------------------------------------------------------ versions

    @property
    def lineage(self) -> int:
        """How often a replay differed from what was logged."""
        return int(self.file.one("SELECT COALESCE(MAX(lineage), 0) FROM versions"))

    @property
    def newest(self) -> int:
        """The newest version of the living lineage, logged in this life or before; −1 before the first."""
        return int(self.file.one("SELECT COALESCE(MAX(version), -1) FROM versions WHERE dead = 0"))

    @property
    def newest_ever(self) -> int:
        """The newest version that was ever logged, one of a dead lineage too; −1 before the first."""
        return int(self.file.one("SELECT COALESCE(MAX(version), -1) FROM versions"))

    def checksum(self, version: int) -> str | None:
        """The checksum of a living version; None where there is none."""
        rows = self.file.rows("SELECT checksum FROM versions WHERE version = ? AND dead = 0", version)
        return rows[0][0] if rows else None

    def publish(self, version: int, checksum: str) -> bool:
        """A version is out without a batch: the start, or a checkpoint's again. True when it differs from the log."""
        with self.file.change() as db:
            diverged = self._publish(db, version, checksum)
        if diverged:
            self._forget()
        return diverged

    def commit(self, step: int, checksum: str, metrics: Mapping[str, float]) -> bool:
        """Training → trained for the batch of ``step``, with version step+1 and its metrics, in one transaction.

        True when this was a replay and its checksum differs from the logged one: the lineage rose.
        """
        with self.file.change() as db:
            diverged = self._publish(db, step + 1, checksum)
            db.execute("UPDATE groups SET state = 'trained' WHERE batch = ? AND state = 'training'", (step,))
            db.execute("UPDATE batches SET trained = 1 WHERE step = ?", (step,))
            put_metrics(db, step + 1, metrics)
        if diverged:
            self._forget()
        else:
            self._trained = self._trained and self._trained + self.ages(step)
            self.records.trained(metrics)
        return diverged

    def _forget(self) -> None:
        """Steps were taken back: the sums over all of them are to be read anew."""
        self._trained = None
        self.records.forget()

    def _publish(self, db: sqlite3.Connection, version: int, checksum: str) -> bool:
        logged = self.checksum(version)
        if logged == checksum or (logged and not checksum):
            return False
        if logged == "":  # of a job whose versions nobody reads: nothing was made of it that could differ
            db.execute("UPDATE versions SET checksum = ? WHERE version = ? AND dead = 0", (checksum, version))
            return False
        lineage = self.lineage
        if logged is not None:
            self._supersede(db, version)
        if db.execute("SELECT 1 FROM versions WHERE version = ? AND lineage = ?", (version, lineage)).fetchone():
            lineage += 1  # it was made before, and that one is dead
        db.execute("INSERT INTO versions VALUES (?, ?, ?, 0)", (version, lineage, checksum))
        return logged is not None

    def _supersede(self, db: sqlite3.Connection, version: int) -> None:
        """Everything made by ``version`` or later belongs to a dead lineage; what is older goes on.

        Batches from ``version`` on are un-logged, their groups and the queued ones are refused when they hold a dead
        token. Leases begin again under a new attempt. Those that need a version after this one are refused: they were
        admitted by a version that is dead, and would keep the slots below them from being filled.
        """
        db.execute("UPDATE versions SET dead = 1 WHERE version >= ?", (version,))
        db.execute("DELETE FROM batches WHERE step >= ?", (version,))
        db.execute("DELETE FROM steps WHERE step >= ?", (version,))
        db.execute("DELETE FROM evals WHERE version >= ?", (version,))
        db.execute(
            "UPDATE groups SET state = 'queued', batch = NULL, position = NULL WHERE batch >= ? AND state = 'training'",
            (version,),
        )
        db.execute("UPDATE groups SET holder = '', attempt = attempt + 1 WHERE state = 'leased'")
        dead = db.execute(
            "SELECT id FROM groups WHERE (state = 'queued' AND max_version >= ?) OR (state = 'leased' AND needs > ?)",
            (version, version),
        ).fetchall()
        self._refuse(db, [i for (i,) in dead], "superseded", f"version {version} was made anew and differs")

    def unlog(self, step: int, unfit: Mapping[int, str]) -> None:
        """Take the batch of ``step``, which is not trained, and all after it back: its ``unfit`` groups are refused as
        `failed`, each for the reason given, and set aside; the others are queued again. A version that was made of this
        batch before (it is replayed) is dead, because the next one differs.
        """
        with self.file.change() as db:
            if self.newest > step:
                self._supersede(db, step + 1)
            # Trap: a lease that needs a version which is to be made anew would keep the places below it from being
            # filled, and it is these that the version waits for.
            ahead = [i for (i,) in db.execute("SELECT id FROM groups WHERE state = 'leased' AND needs > ?", (step,))]
            self._refuse(db, ahead, "superseded", f"version {step + 1} is to be made anew")
            db.execute("DELETE FROM batches WHERE step >= ?", (step,))
            db.execute(
                "UPDATE groups SET state = 'queued', batch = NULL, position = NULL "
                "WHERE batch >= ? AND state = 'training'",
                (step,),
            )
            for group, why in unfit.items():
                self._refuse(db, [group], "failed", why)
                put_aside(db, f"group {group} of batch {step}", why)
        self._forget()

    # ------------------------------------------------------------------ last version, checkpoints, restarts

    @property
    def last(self) -> int:
        """The version with which the run ends: how many steps it has."""
        return int(self.records.get("last") or 0)

    @property
    def last_why(self) -> str:
        """Why it ends earlier than the configuration says, or ""."""
        return self.records.get("last_why") or ""

    @property
    def checkpoint(self) -> int:
        """The version to restart from; 0 = the start model."""
        return int(self.records.get("checkpoint") or 0)

    def checkpointed(self, step: int) -> None:
        """A checkpoint covers all batches before ``step``."""
        with self.file.change() as db:
            put_remark(db, "checkpoint", str(step))

    def rewind(self) -> None:
        """The learner starts from its checkpoint: later batches are trained again, in the order of the log.

        Metrics and evaluations after it are dropped, because the replay makes them again. A queued group with a token
        of a version that was applied but never committed cannot be told from a dead one: it is refused.
        """
        step = self.checkpoint
        with self.file.change() as db:
            db.execute("UPDATE groups SET state = 'training' WHERE state = 'trained' AND batch >= ?", (step,))
            db.execute("UPDATE batches SET trained = 0 WHERE step >= ?", (step,))
            db.execute("DELETE FROM steps WHERE step > ?", (step,))
            db.execute("DELETE FROM evals WHERE version > ?", (step,))
            orphans = db.execute(
                "SELECT id FROM groups WHERE state = 'queued' AND max_version > ?", (self.newest,)
            ).fetchall()
            self._refuse(db, [i for (i,) in orphans], "superseded", "a token of a version that was never committed")
        self._forget()

    def release(self) -> None:
        """No holder of an earlier life is left: every lease waits to be issued again, under a new attempt."""
        with self.file.change() as db:
            db.execute("UPDATE groups SET holder = '', attempt = attempt + 1 WHERE state = 'leased'")
