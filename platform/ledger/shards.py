"""The ledger's side of the archive: which payloads may leave the spool, in which shard, and whether its file stands.

    plan ──► the archive's thread: read_shard, write, rename ──► sealed

The plan is durable before a file is written, so that a crash between the file's rename and `sealed` writes the same
file again. What no file can hold is set aside: its payload stays in the ledger, and the run goes on without it.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from offtrail.platform.ledger.database import Database, LedgerError
from offtrail.platform.ledger.records import put_aside, put_remark

GROWTH = 16
"""A shard is planned once what waits for it is this part of what was planned before, or a shard's full size: the files
of a long run are few, and those of a short one come soon.
"""


class Shards:
    """The planned shards of one run; every public method is one transaction."""

    def __init__(self, database: Database) -> None:
        self.file = database

    def plan(self, shard_bytes: int, checkpoint: int, *, everything: bool = False) -> None:
        """Assign the payloads that may leave the spool to shards of about ``shard_bytes``, durably; where they are too
        few for a file (GROWTH), only if ``everything`` is to go.

        May leave: groups of batches before the version ``checkpoint``, and refused groups.
        """
        # CROSS JOIN: by the payloads, which are few, not by the groups, which are all that ever were.
        kept = "FROM payloads p CROSS JOIN groups g ON g.id = p.id WHERE g.shard IS NULL"
        trained = self.file.rows(
            f"SELECT batch, g.id, length(body) {kept} AND state = 'trained' AND batch < ? ORDER BY batch, position",
            checkpoint,
        )
        refused = self.file.rows(f"SELECT NULL, g.id, length(body) {kept} AND state = 'refused' ORDER BY g.id")
        planned = int(self.file.one("SELECT COALESCE(MAX(value), '0') FROM meta WHERE key = 'planned_bytes'"))
        enough = 0 if everything else min(shard_bytes, planned // GROWTH)
        kinds = [rows for rows in (trained, refused) if rows and sum(size for _, _, size in rows) >= enough]
        if not kinds:
            return
        with self.file.change() as db:
            last = self.file.one("SELECT MAX(name) FROM shards")
            number = int(last.partition("_")[0]) + 1 if last else 0
            for part in (part for rows in kinds for part in _cut(rows, shard_bytes)):
                name = _shard_name(number, part)
                db.execute("INSERT INTO shards (name) VALUES (?)", (name,))
                db.executemany("UPDATE groups SET shard = ? WHERE id = ?", [(name, i) for _, i, _ in part])
                number += 1
                planned += sum(size for _, _, size in part)
            put_remark(db, "planned_bytes", str(planned))

    def unsealed(self) -> list[str]:
        """Planned shards whose file may not stand yet."""
        return [name for (name,) in self.file.rows("SELECT name FROM shards WHERE sealed = 0 ORDER BY name")]

    def sealed(self, name: str, left_out: Mapping[int, str] | None = None) -> None:
        """The shard's file stands: its payloads leave the spool, but for those of the groups that it could not hold."""
        left_out = left_out or {}
        with self.file.change() as db:
            ids = [(i,) for (i,) in db.execute("SELECT id FROM groups WHERE shard = ?", (name,)) if i not in left_out]
            db.executemany("DELETE FROM payloads WHERE id = ?", ids)
            db.execute("UPDATE shards SET sealed = 1 WHERE name = ?", (name,))
            for group, why in left_out.items():
                put_aside(db, f"group {group} in {name}", why)

    def set_aside(self, name: str, why: str) -> None:
        """No file can be made of the shard: its payloads stay in the ledger."""
        with self.file.change() as db:
            db.execute("UPDATE shards SET sealed = 2 WHERE name = ?", (name,))
            put_aside(db, name, why)

    def take_back(self, step: int, payloads: Callable[[str, set[int]], Iterable[tuple[int, bytes]]]) -> None:
        """Make ``step`` the version to restart from. Shards that hold batches from it on are given up, whole; of those
        that were sealed, ``payloads`` gives what has left the spool, as (group, payload) of the groups of a file.
        """
        touched = self.file.fetch(
            "SELECT DISTINCT name, sealed FROM shards JOIN groups ON shard = name WHERE batch >= ?", step
        )
        names = [name for name, _ in touched]
        left = "SELECT id FROM groups WHERE shard = ? AND id NOT IN (SELECT id FROM payloads)"
        with self.file.change() as db:
            for name in [name for name, sealed in touched if sealed == 1]:
                missing = {group for (group,) in self.file.fetch(left, name)}
                db.executemany("INSERT INTO payloads VALUES (?, ?)", payloads(name, missing))
            db.executemany("UPDATE groups SET shard = NULL WHERE shard = ?", [(name,) for name in names])
            db.executemany("DELETE FROM shards WHERE name = ?", [(name,) for name in names])
            put_remark(db, "given_up", json.dumps(names))
            put_remark(db, "checkpoint", str(step))

    def given_up(self) -> list[str]:
        """Of the shards that were taken back, those whose file may stand still and means nothing."""
        standing = {name for (name,) in self.file.fetch("SELECT name FROM shards")}
        rows = self.file.rows("SELECT value FROM meta WHERE key = 'given_up'")
        return [name for (names,) in rows for name in json.loads(names or "[]") if name not in standing]

    def name_missing(self, folder: Path) -> None:
        """Name the shards that were sealed and whose file is not in ``folder`` any more, for as long as it is not."""
        sealed = self.file.rows("SELECT name FROM shards WHERE sealed = 1")
        with self.file.change() as db:
            for (name,) in sealed:
                if (folder / name).is_file():
                    db.execute("DELETE FROM aside WHERE what = ?", (name,))
                else:
                    put_aside(db, name, "its file is gone, though it was sealed")


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


def names_standing(path: Path) -> list[str]:
    """The shards whose file must stand, by a ledger that perhaps another process writes; none where there is none."""
    if not path.is_file():
        return []
    db = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        return [name for (name,) in db.execute("SELECT name FROM shards WHERE sealed = 1 ORDER BY name")]
    except sqlite3.Error as error:
        raise LedgerError(f"{path}: {error}") from error
    finally:
        db.close()


def read_shard(path: Path, name: str) -> list[tuple[dict[str, Any], bytes]]:
    """The groups of a planned shard, as (what the ledger says of it, payload): for another thread, read only."""
    db = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    db.text_factory = lambda text: text.decode(errors="replace")
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
