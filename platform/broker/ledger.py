"""The ledger: the durable truth about every group, batch and version of a run.

I1 exactly once: every admitted group is trained once, or refused once with a named reason. At every moment
admitted = leased + queued + training + trained + refused by reason. A batch's ordered ids are durable before it trains;
payloads are kept until a checkpoint covers them; *trained once* holds in the lineage that survives.

    admit          submit           log_batch           commit
    ─────► leased ───────► queued ◄───────────► training ◄──────► trained
             │ ▲              │      (un-log)      │     (rewind)
   attempt+1 └─┘              ▼                    ▼
                           refused  ◄──────────────┘  superseded

The schema (tables.py) itself refuses any other move, and counts inside the transaction of the move. `audit` recounts
from the rows, the payloads and the batch log.

Durable: survives kill -9 of any process; power loss is out of scope. Why sqlite3: it is in Python itself, one file, one
writer (the broker), transactions over groups, batches, versions and metrics together, partial indexes and triggers that
hold the invariants, and a file that any tool can open. Of the others, LMDB has no indexes or constraints of its own and
a map size to choose, RocksDB bindings are a heavy dependency for one writer, and an append-only log would need its own
recovery. WAL with synchronous=NORMAL writes each commit to the log without an fsync: the page cache survives a killed
process, and fsync at WAL checkpoints keeps the file consistent even through power loss.
WAL needs shared memory: on a network file system the file must be opened from one host only, which is the broker's.
"""

from __future__ import annotations

import fcntl
import json
import math
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offtrail.platform.broker.admission import Tally
from offtrail.platform.broker.tables import LEDGER_SCHEMA, TABLES

FILE = "ledger.sqlite"


class LedgerError(RuntimeError):
    """The ledger cannot go on; one line that names the path, the cause and the way out."""


@dataclass(frozen=True, slots=True)
class GroupRow:
    """One group as the ledger holds it (without its payload)."""

    id: int
    slot: int
    state: str
    reason: str
    attempt: int
    holder: str
    needs: int
    min_version: int | None
    max_version: int | None


@dataclass(frozen=True, slots=True)
class Grant:
    """One lease to hand out: an open slot (``group`` is None) or a returned group."""

    slot: int
    needs: int
    group: int | None = None


@dataclass(frozen=True, slots=True)
class Arrival:
    """What the ledger keeps of a finished group. ``body``: the packed group of so many ``samples``. ``versions``:
    version → tokens.
    """

    body: bytes
    samples: int
    versions: Mapping[int, int]
    queued_version: int
    queued_at: float


@dataclass(frozen=True, slots=True)
class Ages:
    """Staleness of trained or logged tokens, in versions. Sums are over tokens."""

    tokens: int = 0
    stale_tokens: int = 0
    age_sum: int = 0
    age_max: int = 0
    flight_sum: int = 0
    queue_sum: int = 0


@dataclass(frozen=True, slots=True)
class Audit:
    """A recount of the ledger. ``lost``: groups that were admitted and are not where their state says.

    ``duplicated``: how often a group stands in the batch log again.
    """

    admitted: int
    lost: int
    duplicated: int


ROW = "id, slot, state, reason, attempt, holder, needs, min_version, max_version"


class Ledger:
    """One run's ledger. One process writes it; every public method is one transaction.

    LedgerError on a file that another broker holds, that another schema wrote, that cannot be written, or on a full
    disk.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._lock = path.with_suffix(".lock").open("w")
        except OSError as error:
            raise self._broken(error) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise LedgerError(
                f"{path}: another broker holds this run; stop it first, or choose another run.name"
            ) from error
        self._db = sqlite3.connect(path, isolation_level=None)
        self._read: dict[tuple[Any, ...], list[Any]] = {}
        """What was read since the last change, by query: this process alone writes the file."""
        try:
            self._open()
        except sqlite3.Error as error:
            self.close()
            raise self._broken(error) from error
        except LedgerError:
            self.close()
            raise

    def _open(self) -> None:
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._db.execute("PRAGMA journal_size_limit = 67108864")
        (made,) = self._db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
        if not made:
            # executescript would commit each statement alone: a kill in between must leave no half-made schema.
            self._db.executescript(f"BEGIN IMMEDIATE; {TABLES} PRAGMA user_version = {LEDGER_SCHEMA}; COMMIT;")
        (schema,) = self._db.execute("PRAGMA user_version").fetchone()
        if schema != LEDGER_SCHEMA:
            raise LedgerError(
                f"{self.path}: written by ledger schema {schema}, this is {LEDGER_SCHEMA}; "
                "go on with the version of offtrail that wrote it, or start a new run.name"
            )
        (self._arrivals,) = self._db.execute("SELECT COALESCE(MAX(arrival) + 1, 0) FROM groups").fetchone()

    def close(self) -> None:
        """Give the file back; what was acknowledged stays."""
        self._db.close()
        self._lock.close()

    def _broken(self, error: Exception) -> LedgerError:
        return LedgerError(
            f"{self.path}: {error}; nothing acknowledged is lost: free space (or make it writable) "
            "and go on with run.resume=true"
        )

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all of it or nothing, also through kill -9."""
        self._read.clear()
        try:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise self._broken(error) from error

    def _rows(self, query: str, *values: Any) -> list[Any]:
        """The rows of a query. Between two changes each query reaches the file once: do not change the list."""
        rows = self._read.get((query, *values))
        if rows is None:
            rows = self._fetch(query, *values)
            if not self._db.in_transaction:
                self._read[query, *values] = rows
        return rows

    def _fetch(self, query: str, *values: Any) -> list[Any]:
        try:
            return self._db.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise self._broken(error) from error

    def _one(self, query: str, *values: Any) -> Any:
        return self._rows(query, *values)[0][0]

    # ------------------------------------------------------------------ counts

    def tally(self) -> Tally:
        """The counts of I1 at this moment."""
        states: dict[str, int] = {}
        refused: dict[str, int] = {}
        tokens = 0
        for state, reason, n, part in self._rows("SELECT state, reason, n, tokens FROM tally"):
            tokens += part
            if state == "refused":
                refused[reason] = n
            else:
                states[state] = n
        return Tally(self.admitted, refused=refused, tokens=tokens, **states)

    @property
    def admitted(self) -> int:
        """How many groups were ever admitted; the next group's id and problem index."""
        return int(self._one("SELECT COALESCE(MAX(id) + 1, 0) FROM groups"))

    def audit(self) -> Audit:
        """Recount everything from the rows, the payloads and the batch log, trusting no counter."""
        self._read.clear()
        admitted, rows = self._rows("SELECT COALESCE(MAX(id) + 1, 0), COUNT(*) FROM groups")[0]
        log = "SELECT j.value AS id FROM batches b, json_each(b.ids) j"
        lost = {i for (i,) in self._rows(f"SELECT id FROM groups WHERE state IN ('training', 'trained') EXCEPT {log}")}
        lost |= {i for (i,) in self._rows(f"{log} EXCEPT SELECT id FROM groups WHERE state IN ('training', 'trained')")}
        unkept = self._rows(
            "SELECT g.id FROM groups g LEFT JOIN payloads p ON p.id = g.id LEFT JOIN shards s ON s.name = g.shard "
            "WHERE p.id IS NULL AND (state IN ('queued', 'training') OR state = 'trained' AND COALESCE(sealed, 0) = 0)"
        )
        lost |= {i for (i,) in unkept}
        if admitted != rows:
            lost |= set(range(admitted)) - {i for (i,) in self._rows("SELECT id FROM groups")}
        drift = abs(rows - self._one("SELECT COALESCE(SUM(n), 0) FROM tally"))
        twice = self._one(f"SELECT COALESCE(SUM(n - 1), 0) FROM (SELECT COUNT(*) AS n FROM ({log}) GROUP BY id)")
        return Audit(admitted, len(lost) + drift, twice)

    # ------------------------------------------------------------------ leases

    def row(self, group: int) -> GroupRow | None:
        """One group, or None when it was never admitted."""
        rows = self._rows(f"SELECT {ROW} FROM groups WHERE id = ?", group)
        return GroupRow(*rows[0]) if rows else None

    def leased(self) -> list[GroupRow]:
        """All leased groups in slot order; those with an empty holder were returned and wait to be issued again."""
        return [GroupRow(*r) for r in self._rows(f"SELECT {ROW} FROM groups WHERE state = 'leased' ORDER BY slot")]

    def returned(self) -> list[GroupRow]:
        """Those of the leased groups that were returned, in slot order."""
        rows = self._rows(f"SELECT {ROW} FROM groups WHERE state = 'leased' AND holder = '' ORDER BY slot")
        return [GroupRow(*r) for r in rows]

    def held(self, holder: str) -> int:
        """How many leases ``holder`` has."""
        return int(self._one("SELECT COUNT(*) FROM groups WHERE state = 'leased' AND holder = ?", holder))

    def taken(self, first: int) -> set[int]:
        """The slots from ``first`` on that a living group holds."""
        return {s for (s,) in self._rows("SELECT slot FROM groups WHERE state <> 'refused' AND slot >= ?", first)}

    def grant(self, holder: str, grants: Sequence[Grant], now: float) -> list[GroupRow]:
        """Admit a fresh group for each open slot, and issue returned groups again, all to ``holder``; rows in order."""
        ids: list[int] = []
        with self._change() as db:
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
                    db.execute(
                        "UPDATE groups SET holder = ?, leased_at = ? WHERE id = ? AND state = 'leased' AND holder = ''",
                        (holder, now, grant.group),
                    )
                    ids.append(grant.group)
        rows = {
            r[0]: GroupRow(*r) for r in self._rows(f"SELECT {ROW} FROM groups WHERE id IN ({','.join(map(str, ids))})")
        }
        return [rows[i] for i in ids]

    def return_leases(self, holder: str, attempts: Mapping[int, int] | None = None) -> list[int]:
        """Take back what ``holder`` has, or only the groups of ``attempts`` (group → attempt); a late submission will
        carry an old attempt number.
        """
        mine = "state = 'leased' AND holder = ?"
        with self._change() as db:
            rows = db.execute(f"SELECT id, attempt FROM groups WHERE {mine}", (holder,)).fetchall()
            found = sorted(group for group, attempt in rows if attempts is None or attempts.get(group) == attempt)
            db.executemany("UPDATE groups SET holder = '', attempt = attempt + 1 WHERE id = ?", [(g,) for g in found])
        return found

    # ------------------------------------------------------------------ arrivals

    def submit(self, group: int, arrival: Arrival, lineage: int) -> None:
        """Leased → queued, with its payload: durable when this returns."""
        with self._change() as db:
            self._arrive(db, group, arrival, lineage)
            db.execute("UPDATE groups SET state = 'queued' WHERE id = ?", (group,))

    def refuse(
        self, group: int, reason: str, detail: str = "", arrival: Arrival | None = None, lineage: int = 0
    ) -> None:
        """Leased or queued → refused; the payload, where there is one, is kept for the archive."""
        with self._change() as db:
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
        with self._change() as db:
            left = [i for (i,) in db.execute("SELECT id FROM groups WHERE state IN ('leased', 'queued')")]
            self._refuse(db, left, "run_ended")
        return len(left)

    # ------------------------------------------------------------------ batches

    def queued(self) -> list[GroupRow]:
        """The queue, in order of arrival."""
        return [GroupRow(*r) for r in self._rows(f"SELECT {ROW} FROM groups WHERE state = 'queued' ORDER BY arrival")]

    def queued_slots(self, first: int, count: int) -> list[GroupRow]:
        """The queued groups of slots first…first+count−1, in slot order."""
        query = f"SELECT {ROW} FROM groups WHERE state = 'queued' AND slot >= ? AND slot < ? ORDER BY slot"
        return [GroupRow(*r) for r in self._rows(query, first, first + count)]

    def batch(self, step: int) -> list[int] | None:
        """The ordered ids of a logged batch."""
        rows = self._rows("SELECT ids FROM batches WHERE step = ?", step)
        return json.loads(rows[0][0]) if rows else None

    def logged(self) -> int:
        """One past the last logged batch."""
        return int(self._one("SELECT COALESCE(MAX(step) + 1, 0) FROM batches"))

    def payloads(self, groups: Sequence[int]) -> list[bytes]:
        """The packed groups, in the order asked for; LedgerError when one is gone."""
        found = dict(self._fetch(f"SELECT id, body FROM payloads WHERE id IN ({','.join(map(str, groups))})"))
        missing = [g for g in groups if g not in found]
        if missing:
            raise LedgerError(f"{self.path}: no payload of groups {missing}; the file was changed by something else")
        return [found[g] for g in groups]

    def log_batch(self, step: int, groups: Sequence[int]) -> None:
        """Queued → training: the ordered ids are durable when this returns, before anyone trains on them."""
        with self._change() as db:
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
        where = "step = ?" if step is not None else "trained = 1"
        rows = self._rows(
            "SELECT COALESCE(SUM(tokens), 0), COALESCE(SUM(stale_tokens), 0), COALESCE(SUM(age_sum), 0), "
            "COALESCE(MAX(age_max), 0), COALESCE(SUM(flight_sum), 0), COALESCE(SUM(queue_sum), 0) "
            f"FROM batches WHERE {where}",
            *([step] if step is not None else []),
        )
        return Ages(*rows[0])

    def samples(self, step: int) -> int:
        """Samples of a logged batch: its groups need not all be of one size."""
        return int(self._one("SELECT COALESCE(SUM(samples), 0) FROM groups WHERE batch = ?", step))

    # ------------------------------------------------------------------ versions

    @property
    def lineage(self) -> int:
        """How often a replay differed from what was logged."""
        return int(self._one("SELECT COALESCE(MAX(lineage), 0) FROM versions"))

    @property
    def newest(self) -> int:
        """The newest version of the living lineage, logged in this life or before; −1 before the first."""
        return int(self._one("SELECT COALESCE(MAX(version), -1) FROM versions WHERE dead = 0"))

    def checksum(self, version: int) -> str | None:
        """Of a living version."""
        rows = self._rows("SELECT checksum FROM versions WHERE version = ? AND dead = 0", version)
        return rows[0][0] if rows else None

    def publish(self, version: int, checksum: str) -> bool:
        """A version is out without a batch: the start, or a checkpoint's again. True when it differs from the log."""
        with self._change() as db:
            return self._publish(db, version, checksum)

    def commit(self, step: int, checksum: str, metrics: Mapping[str, float]) -> bool:
        """Training → trained for the batch of ``step``, with version step+1 and its metrics, in one transaction.

        True when this was a replay and its checksum differs from the logged one: the lineage rose.
        """
        with self._change() as db:
            diverged = self._publish(db, step + 1, checksum)
            db.execute("UPDATE groups SET state = 'trained' WHERE batch = ? AND state = 'training'", (step,))
            db.execute("UPDATE batches SET trained = 1 WHERE step = ?", (step,))
            db.execute("INSERT OR REPLACE INTO steps VALUES (?, ?)", (step + 1, _json(metrics)))
        return diverged

    def _publish(self, db: sqlite3.Connection, version: int, checksum: str) -> bool:
        logged = self.checksum(version)
        if logged == checksum:
            return False
        lineage = self.lineage
        if logged is not None:
            lineage += 1
            self._supersede(db, version)
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

    # ------------------------------------------------------------------ checkpoints and restarts

    @property
    def checkpoint(self) -> int:
        """The version to restart from; 0 = the start model."""
        return int(self.get("checkpoint") or 0)

    def checkpointed(self, step: int) -> None:
        """A checkpoint covers all batches before ``step``."""
        with self._change() as db:
            self._put(db, "checkpoint", str(step))

    def rewind(self) -> None:
        """The learner starts from its checkpoint: later batches are trained again, in the order of the log.

        Metrics and evaluations after it are dropped, because the replay makes them again. A queued group with a token
        of a version that was applied but never committed cannot be told from a dead one: it is refused.
        """
        step = self.checkpoint
        with self._change() as db:
            db.execute("UPDATE groups SET state = 'training' WHERE state = 'trained' AND batch >= ?", (step,))
            db.execute("UPDATE batches SET trained = 0 WHERE step >= ?", (step,))
            db.execute("DELETE FROM steps WHERE step > ?", (step,))
            db.execute("DELETE FROM evals WHERE version > ?", (step,))
            orphans = db.execute(
                "SELECT id FROM groups WHERE state = 'queued' AND max_version > ?", (self.newest,)
            ).fetchall()
            self._refuse(db, [i for (i,) in orphans], "superseded", "a token of a version that was never committed")

    def release(self) -> None:
        """No holder of an earlier life is left: every lease waits to be issued again, under a new attempt."""
        with self._change() as db:
            db.execute("UPDATE groups SET holder = '', attempt = attempt + 1 WHERE state = 'leased'")

    # ------------------------------------------------------------------ metrics, evaluations, compute

    def metrics(self) -> list[dict[str, float]]:
        """The rows of metrics.jsonl: "step" and the scalars of each learner step, in order."""
        return [{"step": s, **json.loads(m)} for s, m in self._rows("SELECT step, metrics FROM steps ORDER BY step")]

    def mean_metric(self, name: str) -> float | None:
        """Mean of one scalar over all steps that have it."""
        value = self._one("SELECT AVG(json_extract(metrics, '$.\"' || ? || '\"')) FROM steps", name)
        return None if value is None else float(value)

    def edge_metrics(self, name: str) -> tuple[float | None, float | None]:
        """One scalar at the first and the last step."""
        found = [
            self._rows(
                f"SELECT json_extract(metrics, '$.\"' || ? || '\"') FROM steps ORDER BY step {way} LIMIT 1", name
            )
            for way in ("ASC", "DESC")
        ]
        first, last = (rows[0][0] if rows else None for rows in found)
        return first, last

    def evaluated(self, version: int, metrics: Mapping[str, float]) -> None:
        """The scores of one version."""
        with self._change() as db:
            db.execute("INSERT OR REPLACE INTO evals VALUES (?, ?)", (version, _json(metrics)))

    def evals(self) -> dict[int, dict[str, float]]:
        """Scores by version, in order."""
        return {v: json.loads(m) for v, m in self._rows("SELECT version, metrics FROM evals ORDER BY version")}

    def scored(self) -> set[int]:
        """The versions that have scores."""
        return {version for (version,) in self._rows("SELECT version FROM evals")}

    def life(self, role: str, place: int) -> int:
        """A number for a role's new process: its charges add to those of its earlier lives."""
        return int(
            self._one("SELECT COALESCE(MAX(life) + 1, 0) FROM charges WHERE role = ? AND place = ?", role, place)
        )

    def charge(self, entries: Sequence[tuple[str, int, int, Mapping[str, float]]]) -> None:
        """Cumulative charges of lives: (role, index, life, name → amount)."""
        with self._change() as db:
            db.executemany(
                "INSERT OR REPLACE INTO charges VALUES (?, ?, ?, ?, ?)",
                [
                    (role, place, life, name, amount)
                    for role, place, life, all_ in entries
                    for name, amount in all_.items()
                ],
            )

    def charges(self) -> dict[str, dict[str, float]]:
        """Role → name → total over its processes and lives."""
        totals: dict[str, dict[str, float]] = {}
        for role, name, amount in self._rows("SELECT role, name, SUM(amount) FROM charges GROUP BY role, name"):
            totals.setdefault(role, {})[name] = amount
        return totals

    # ------------------------------------------------------------------ the archive's side

    def plan_shards(self, shard_bytes: int) -> None:
        """Assign every payload that may leave the spool to a shard of about ``shard_bytes``, durably.

        May leave: groups of batches before the checkpoint, and refused groups. The plan is written before the file, so
        that a crash between the file's rename and `sealed` writes the same file again.
        """
        kept = "FROM groups g JOIN payloads p ON p.id = g.id WHERE g.shard IS NULL"
        trained = self._rows(
            f"SELECT batch, g.id, length(body) {kept} AND state = 'trained' AND batch < ? ORDER BY batch, position",
            self.checkpoint,
        )
        refused = self._rows(f"SELECT NULL, g.id, length(body) {kept} AND state = 'refused' ORDER BY g.id")
        with self._change() as db:
            number = int(self._one("SELECT COUNT(*) FROM shards"))
            for parts in _cut(trained, shard_bytes), _cut(refused, shard_bytes):
                for part in parts:
                    name = _shard_name(number, part)
                    db.execute("INSERT INTO shards (name) VALUES (?)", (name,))
                    db.executemany("UPDATE groups SET shard = ? WHERE id = ?", [(name, i) for _, i, _ in part])
                    number += 1

    def unsealed(self) -> list[str]:
        """Planned shards whose file may not stand yet."""
        return [name for (name,) in self._rows("SELECT name FROM shards WHERE sealed = 0 ORDER BY name")]

    def sealed(self, name: str) -> None:
        """The shard's file stands: its payloads leave the spool."""
        with self._change() as db:
            db.execute("DELETE FROM payloads WHERE id IN (SELECT id FROM groups WHERE shard = ?)", (name,))
            db.execute("UPDATE shards SET sealed = 1 WHERE name = ?", (name,))

    def get(self, key: str) -> str | None:
        """A remark about the run."""
        rows = self._rows("SELECT value FROM meta WHERE key = ?", key)
        return rows[0][0] if rows else None

    def put(self, remarks: Mapping[str, str]) -> None:
        """Set remarks about the run."""
        with self._change() as db:
            for key, value in remarks.items():
                self._put(db, key, value)

    @staticmethod
    def _put(db: sqlite3.Connection, key: str, value: str) -> None:
        db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))


def _json(metrics: Mapping[str, float]) -> str:
    """Strict JSON, which SQLite can read: null for what is not finite."""
    return json.dumps({name: value if math.isfinite(value) else None for name, value in metrics.items()})


Planned = tuple[int | None, int, int]
"""batch (None: refused), group, bytes."""


def _cut(rows: Sequence[Planned], shard_bytes: int) -> Iterator[list[Planned]]:
    """Runs of rows of about ``shard_bytes``; a batch is never cut in two."""
    part: list[Planned] = []
    size = 0
    for row in rows:
        if part and size >= shard_bytes and (row[0] is None or row[0] != part[-1][0]):
            yield part
            part, size = [], 0
        part.append(row)
        size += row[2]
    if part:
        yield part


def _shard_name(number: int, part: Sequence[Planned]) -> str:
    first, last = part[0], part[-1]
    if first[0] is None:
        return f"{number:06d}_refused_{first[1]:08d}-{last[1]:08d}.parquet"
    return f"{number:06d}_batches_{first[0]:06d}-{last[0]:06d}.parquet"


def read_shard(path: Path, name: str) -> list[tuple[dict[str, Any], bytes]]:
    """The groups of a planned shard, as (what the ledger says of it, payload): for another thread, read only."""
    db = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        rows = db.execute(
            "SELECT g.id, state, reason, detail, batch, position, lineage, body "
            "FROM groups g JOIN payloads p ON p.id = g.id "
            "WHERE g.shard = ? ORDER BY batch, position, g.id",
            (name,),
        ).fetchall()
    except sqlite3.Error as error:
        raise LedgerError(f"{path}: {error}") from error
    finally:
        db.close()
    names = ("group", "state", "reason", "detail", "batch", "position", "lineage")
    return [(dict(zip(names, row[:-1], strict=True)), row[-1]) for row in rows]
