"""The ledger's side of the archive: which payloads may leave the spool, in which shard, and whether its file stands.

    plan ──► the archive's thread: read_shard, write, rename ──► sealed

The plan is durable before a file is written, so that a crash between the file's rename and `sealed` writes the same
file again.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from offtrail.platform.broker.database import Database, LedgerError


class Shards:
    """The planned shards of one run; every public method is one transaction."""

    def __init__(self, database: Database) -> None:
        self.file = database

    def plan(self, shard_bytes: int, checkpoint: int) -> None:
        """Assign every payload that may leave the spool to a shard of about ``shard_bytes``, durably.

        May leave: groups of batches before the version ``checkpoint``, and refused groups.
        """
        kept = "FROM groups g JOIN payloads p ON p.id = g.id WHERE g.shard IS NULL"
        trained = self.file.rows(
            f"SELECT batch, g.id, length(body) {kept} AND state = 'trained' AND batch < ? ORDER BY batch, position",
            checkpoint,
        )
        refused = self.file.rows(f"SELECT NULL, g.id, length(body) {kept} AND state = 'refused' ORDER BY g.id")
        with self.file.change() as db:
            number = int(self.file.one("SELECT COUNT(*) FROM shards"))
            for parts in _cut(trained, shard_bytes), _cut(refused, shard_bytes):
                for part in parts:
                    name = _shard_name(number, part)
                    db.execute("INSERT INTO shards (name) VALUES (?)", (name,))
                    db.executemany("UPDATE groups SET shard = ? WHERE id = ?", [(name, i) for _, i, _ in part])
                    number += 1

    def unsealed(self) -> list[str]:
        """Planned shards whose file may not stand yet."""
        return [name for (name,) in self.file.rows("SELECT name FROM shards WHERE sealed = 0 ORDER BY name")]

    def sealed(self, name: str) -> None:
        """The shard's file stands: its payloads leave the spool."""
        with self.file.change() as db:
            db.execute("DELETE FROM payloads WHERE id IN (SELECT id FROM groups WHERE shard = ?)", (name,))
            db.execute("UPDATE shards SET sealed = 1 WHERE name = ?", (name,))


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
