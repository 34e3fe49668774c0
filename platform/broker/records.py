"""What the ledger remembers beside its groups: metrics of steps, scores of versions, charges, remarks about the run.

On the ledger's own connection, so that a commit writes its metrics in the transaction that makes its groups trained.
"""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Mapping, Sequence

from offtrail.platform.broker.database import Database


class Records:
    """Metrics, evaluations, compute and remarks of one run; every public method is one transaction."""

    def __init__(self, database: Database) -> None:
        self.file = database

    def metrics(self) -> list[dict[str, float]]:
        """The rows of metrics.jsonl: "step" and the scalars of each learner step, in order."""
        return [
            {"step": s, **json.loads(m)} for s, m in self.file.rows("SELECT step, metrics FROM steps ORDER BY step")
        ]

    def mean_metric(self, name: str) -> float | None:
        """Mean of one scalar over all steps that have it."""
        value = self.file.one("SELECT AVG(json_extract(metrics, '$.\"' || ? || '\"')) FROM steps", name)
        return None if value is None else float(value)

    def edge_metrics(self, name: str) -> tuple[float | None, float | None]:
        """One scalar at the first and the last step."""
        found = [
            self.file.rows(
                f"SELECT json_extract(metrics, '$.\"' || ? || '\"') FROM steps ORDER BY step {way} LIMIT 1", name
            )
            for way in ("ASC", "DESC")
        ]
        first, last = (rows[0][0] if rows else None for rows in found)
        return first, last

    def evaluated(self, version: int, metrics: Mapping[str, float]) -> None:
        """The scores of one version."""
        with self.file.change() as db:
            db.execute("INSERT OR REPLACE INTO evals VALUES (?, ?)", (version, _json(metrics)))

    def evals(self) -> dict[int, dict[str, float]]:
        """Scores by version, in order."""
        return {v: json.loads(m) for v, m in self.file.rows("SELECT version, metrics FROM evals ORDER BY version")}

    def scored(self) -> set[int]:
        """The versions that have scores."""
        return {version for (version,) in self.file.rows("SELECT version FROM evals")}

    def life(self, role: str, place: int) -> int:
        """A number for a role's new process: its charges add to those of its earlier lives."""
        return int(
            self.file.one("SELECT COALESCE(MAX(life) + 1, 0) FROM charges WHERE role = ? AND place = ?", role, place)
        )

    def charge(self, entries: Sequence[tuple[str, int, int, Mapping[str, float]]]) -> None:
        """Cumulative charges of lives: (role, index, life, name → amount)."""
        with self.file.change() as db:
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
        for role, name, amount in self.file.rows("SELECT role, name, SUM(amount) FROM charges GROUP BY role, name"):
            totals.setdefault(role, {})[name] = amount
        return totals

    def get(self, key: str) -> str | None:
        """A remark about the run."""
        rows = self.file.rows("SELECT value FROM meta WHERE key = ?", key)
        return rows[0][0] if rows else None

    def put(self, remarks: Mapping[str, str]) -> None:
        """Set remarks about the run."""
        with self.file.change() as db:
            for key, value in remarks.items():
                put_remark(db, key, value)


def put_remark(db: sqlite3.Connection, key: str, value: str) -> None:
    """Within a transaction: set a remark about the run."""
    db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))


def put_metrics(db: sqlite3.Connection, version: int, metrics: Mapping[str, float]) -> None:
    """Within a transaction: the metrics of the step that made ``version``."""
    db.execute("INSERT OR REPLACE INTO steps VALUES (?, ?)", (version, _json(metrics)))


def _json(metrics: Mapping[str, float]) -> str:
    """Strict JSON, which SQLite can read: null for what is not finite."""
    return json.dumps({name: value if math.isfinite(value) else None for name, value in metrics.items()})
