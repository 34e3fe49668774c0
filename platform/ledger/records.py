"""What the ledger remembers beside its groups: metrics of steps, scores of versions, charges, remarks about the run.

On the ledger's own connection, so that a commit writes its metrics in the transaction that makes its groups trained.
"""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Mapping, Sequence

from offtrail.platform.ledger.database import Database

SHOWN = 20
"""Of what was set aside, in the summary."""


class Records:
    """Metrics, evaluations, compute and remarks of one run; every public method is one transaction."""

    def __init__(self, database: Database) -> None:
        self.file = database
        self._means: dict[str, tuple[float, int]] = {}
        """Sum and number of a metric over all steps, for those that were asked for."""

    def metrics(self) -> list[dict[str, float]]:
        """The rows of metrics.jsonl: "step" and the scalars of each learner step, in order."""
        return [
            {"step": s, **json.loads(m)} for s, m in self.file.rows("SELECT step, metrics FROM steps ORDER BY step")
        ]

    def mean_metric(self, name: str) -> float | None:
        """Mean of one scalar over all steps that have it. All of them are read once, then each as it comes."""
        if name not in self._means:
            values = f"SELECT {_metric('steps')} AS value FROM steps"
            self._means[name] = self.file.rows(f"SELECT TOTAL(value), COUNT(value) FROM ({values})", name)[0]
        total, count = self._means[name]
        return total / count if count else None

    def trained(self, metrics: Mapping[str, float]) -> None:
        """These metrics of one more step are in the ledger now."""
        for name, (total, count) in self._means.items():
            if math.isfinite(value := metrics.get(name, math.nan)):
                self._means[name] = total + value, count + 1

    def forget(self) -> None:
        """Steps were taken back: what is remembered of them is read anew."""
        self._means.clear()

    def edge_metrics(self, name: str) -> tuple[float | None, float | None]:
        """One scalar at the first and the last step."""
        first, last = (
            self.file.rows(f"SELECT {_metric('steps')} FROM steps ORDER BY step {way} LIMIT 1", name)
            for way in ("ASC", "DESC")
        )
        return (first[0][0] if first else None), (last[0][0] if last else None)

    def edge_scores(self, name: str) -> tuple[float | None, float | None]:
        """One score of the first and the last version that have it."""
        value = _metric("evals")
        first, last = (
            self.file.rows(
                f"SELECT {value} FROM evals WHERE {value} IS NOT NULL ORDER BY version {way} LIMIT 1", name, name
            )
            for way in ("ASC", "DESC")
        )
        return (first[0][0] if first else None), (last[0][0] if last else None)

    def evaluated(self, version: int, metrics: Mapping[str, float]) -> None:
        """The scores of one version."""
        with self.file.change() as db:
            db.execute("INSERT OR REPLACE INTO evals VALUES (?, ?)", (version, _json(metrics)))

    def evals(self) -> dict[int, dict[str, float]]:
        """Scores by version, in order."""
        return {v: json.loads(m) for v, m in self.file.rows("SELECT version, metrics FROM evals ORDER BY version")}

    def scored(self, version: int) -> bool:
        """Whether a version has scores."""
        return bool(self.file.rows("SELECT 1 FROM evals WHERE version = ?", version))

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

    def aside(self) -> list[str]:
        """What cannot be read, trained or archived and was set aside, and why: SHOWN of it, and how many more."""
        rows = self.file.rows("SELECT what, why FROM aside ORDER BY what LIMIT ?", SHOWN)
        more = int(self.file.one("SELECT COUNT(*) FROM aside")) - len(rows)
        return [f"{what}: {why}" for what, why in rows] + ([f"and {more} more"] if more else [])

    def put(self, remarks: Mapping[str, str]) -> None:
        """Set remarks about the run."""
        with self.file.change() as db:
            for key, value in remarks.items():
                put_remark(db, key, value)


def put_remark(db: sqlite3.Connection, key: str, value: str) -> None:
    """Within a transaction: set a remark about the run."""
    db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))


def put_aside(db: sqlite3.Connection, what: str, why: str) -> None:
    """Within a transaction: name what was set aside, and why."""
    db.execute("INSERT OR REPLACE INTO aside VALUES (?, ?)", (what, why))


def put_metrics(db: sqlite3.Connection, version: int, metrics: Mapping[str, float]) -> None:
    """Within a transaction: the metrics of the step that made ``version``."""
    db.execute("INSERT OR REPLACE INTO steps VALUES (?, ?)", (version, _json(metrics)))


def _metric(table: str) -> str:
    """One scalar of a row, named by the query's next value."""
    return f"json_extract({table}.metrics, '$.\"' || ? || '\"')"


def _json(metrics: Mapping[str, float]) -> str:
    """Strict JSON, which SQLite can read: null for what is not finite."""
    return json.dumps({name: value if math.isfinite(value) else None for name, value in metrics.items()})
