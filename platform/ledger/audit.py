"""The recount of I1: where every admitted group is, from the rows, the payloads and the batch log, trusting no counter.

    at the start and the end of a life: whole()          at each checkpoint: recent(), what came since the last audit

What is before a checkpoint is final for this life (only a launch with run.resume_from goes behind it, and that begins
with `whole`), so that it need be counted once only: the cost of `recent` follows what has happened since the last
checkpoint, and not the run's age.
"""

from __future__ import annotations

from collections import Counter

from offtrail.platform.ledger.database import Database
from offtrail.platform.ledger.rows import Audit

KEPT = "LEFT JOIN payloads p ON p.id = g.id LEFT JOIN shards s ON s.name = g.shard WHERE p.id IS NULL"


class Auditor:
    """Audits one ledger. What was found clean before its last checkpoint is remembered, and not looked at again."""

    def __init__(self, database: Database) -> None:
        self.file = database
        self.batches = self.groups = 0
        """Batches and groups below these numbers are counted and in order."""

    def whole(self) -> Audit:
        """Recount everything."""
        self.file.forget()
        admitted, rows = self.file.rows("SELECT COALESCE(MAX(id) + 1, 0), COUNT(*) FROM groups")[0]
        log = "SELECT j.value AS id FROM batches b, json_each(b.ids) j"
        trained = "SELECT id FROM groups WHERE state IN ('training', 'trained')"
        lost = {i for (i,) in self.file.rows(f"{trained} EXCEPT {log}")}
        lost |= {i for (i,) in self.file.rows(f"{log} EXCEPT {trained}")}
        unkept = self.file.rows(
            f"SELECT g.id FROM groups g {KEPT} "
            "AND (state IN ('queued', 'training') OR state = 'trained' AND COALESCE(sealed, 0) <> 1)"
        )
        lost |= {i for (i,) in unkept}
        if admitted != rows:
            lost |= set(range(admitted)) - {i for (i,) in self.file.rows("SELECT id FROM groups")}
        twice = self.file.one(f"SELECT COALESCE(SUM(n - 1), 0) FROM (SELECT COUNT(*) AS n FROM ({log}) GROUP BY id)")
        return Audit(admitted, len(lost) + self._drift(rows), twice)

    def recent(self, checkpoint: int) -> Audit:
        """Recount what came since the last audit that found nothing; batches below ``checkpoint`` are final."""
        self.file.forget()
        first = self.batches
        log = self.file.rows("SELECT j.value FROM batches b, json_each(b.ids) j WHERE b.step >= ?", first)
        logged = Counter(i for (i,) in log)
        trained = {i for (i,) in self.file.rows("SELECT id FROM groups WHERE batch >= ?", first)}
        odd = trained ^ logged.keys()
        again = {i for i in odd - trained if self._batch(i) in range(first)}  # in a batch that was final already
        lost = odd - again
        unkept = self.file.rows(
            f"SELECT g.id FROM groups g {KEPT} AND state = 'queued' UNION ALL "
            f"SELECT g.id FROM groups g {KEPT} AND batch >= ? AND COALESCE(sealed, 0) <> 1",
            first,
        )
        lost |= {i for (i,) in unkept}
        admitted = int(self.file.one("SELECT COALESCE(MAX(id) + 1, 0) FROM groups"))
        present = {i for (i,) in self.file.rows("SELECT id FROM groups WHERE id >= ?", self.groups)}
        lost |= set(range(self.groups, admitted)) - present
        found = len(lost) + self._drift(self.groups + len(present))
        twice = sum(logged.values()) - len(logged) + len(again)
        if not found and not twice:
            self.batches, self.groups = max(first, checkpoint), admitted
        return Audit(admitted, found, twice)

    def _drift(self, rows: int) -> int:
        return int(abs(rows - self.file.one("SELECT COALESCE(SUM(n), 0) FROM tally")))

    def _batch(self, group: int) -> int | None:
        rows = self.file.rows("SELECT batch FROM groups WHERE id = ?", group)
        return rows[0][0] if rows else None
