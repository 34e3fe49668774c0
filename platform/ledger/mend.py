"""Rows of an old ledger that cannot be read, in syntax or in shape: mended or set aside when it is opened, so that none
of them ends a run in its middle, or every launch of it.

What is set aside stays where it is, is named in summary.json (`set_aside`), and is not touched again. Without what is
in NEEDED nobody can say what the run is: there a LedgerError names the key, the path and the way out.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from typing import Any

from offtrail.platform.ledger.database import ADVICE, Database, LedgerError
from offtrail.platform.ledger.records import put_aside
from offtrail.platform.ledger.rows import counted
from offtrail.platform.wire.groups import unpack_group

LARGEST = 1 << 31
"""Above every step, version and count of one group."""


def _whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < LARGEST


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < float("inf")


def _map_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda found: isinstance(found, dict) and all(map(fits, found.values()))


def _list_of(kind: type) -> Callable[[Any], bool]:
    return lambda found: isinstance(found, list) and all(type(value) is kind for value in found)


def _metrics(found: Any) -> bool:
    """Of a step or a version: "step" is the row's own number."""
    return _map_of(lambda value: value is None or _number(value))(found) and "step" not in found


def _blame(found: Any) -> bool:
    return isinstance(found, dict) and found.keys() == {"step", "error", "noted"} and _whole(found["step"])


SUMS = {
    "time": _map_of(_number),
    "restarts": _map_of(_whole),
    "wall_seconds": _number,
    "unfit": _blame,
    "given_up": _list_of(str),
    "planned_bytes": lambda found: type(found) is int and found >= 0,
    "last": _whole,
}
"""Remarks about the run that can be begun anew, and what each must be."""
NEEDED = {
    "checkpoint": _whole,
    "begun_with": _map_of(lambda _: True),
    "noted": _map_of(lambda _: True),
    "changes": _list_of(dict),
    "inputs": _map_of(lambda value: isinstance(value, dict)),
}
"""Remarks that the run cannot go on without."""


def mend(file: Database) -> None:
    """One transaction. A logged batch is read off its groups, which hold it too; the versions of a group are counted
    anew from its payload, and where that cannot be read either, a queued group is refused; metrics, scores and sums
    that cannot be read are begun anew. Raises LedgerError for a remark in NEEDED.
    """
    with file.change() as db:
        for key, value in db.execute("SELECT key, CAST(value AS BLOB) FROM meta").fetchall():
            if not value:
                continue
            if key in NEEDED and not _is(NEEDED[key], value):
                shown = value[:60].decode(errors="replace")
                raise LedgerError(f"{file.path}: {key!r} of its table meta is {shown!r}; {ADVICE['SQLITE_CORRUPT']}")
            if key in SUMS and not _is(SUMS[key], value):
                db.execute("DELETE FROM meta WHERE key = ?", (key,))
                put_aside(db, f"the run's sum {key!r}", "it cannot be read and is begun anew")
        _mend_batches(db)
        _mend_versions(db)
        for table, place in (("steps", "step"), ("evals", "version")):
            for number, text in db.execute(f"SELECT {place}, CAST(metrics AS BLOB) FROM {table}").fetchall():
                if not _is(_metrics, text):
                    db.execute(f"UPDATE {table} SET metrics = '{{}}' WHERE {place} = ?", (number,))
                    put_aside(db, f"{table}, {place} {number}", "its metrics cannot be read")


def _is(fits: Callable[[Any], bool], text: bytes) -> bool:
    """Whether it is strict JSON of that shape."""

    def refused(constant: str) -> None:
        raise ValueError(constant)  # NaN and Infinity, which Python reads and SQLite does not

    try:
        return fits(json.loads(text.decode(), parse_constant=refused))
    except (ValueError, RecursionError):
        return False


def _mend_batches(db: sqlite3.Connection) -> None:
    for step, text in db.execute("SELECT step, CAST(ids AS BLOB) FROM batches").fetchall():
        if not _is(_list_of(int), text):
            rows = db.execute("SELECT id FROM groups WHERE batch = ? ORDER BY position", (step,))
            db.execute("UPDATE batches SET ids = ? WHERE step = ?", (json.dumps([i for (i,) in rows]), step))
            put_aside(db, f"the log of batch {step}", "it cannot be read; its groups say which they are")


def _mend_versions(db: sqlite3.Connection) -> None:
    """Of the groups that wait for a batch, or may do so again: those that no checkpoint covers."""
    rows = db.execute(
        "SELECT id, state, CAST(COALESCE(versions, '') AS BLOB), tokens, queued_version, min_version, max_version "
        "FROM groups WHERE state IN ('queued', 'training') OR state = 'trained' AND batch >= "
        "(SELECT CAST(COALESCE(MAX(value), '0') AS INTEGER) FROM meta WHERE key = 'checkpoint')"
    ).fetchall()
    for group, state, text, *row in rows:
        if _is(_versions_beside(*row), text):
            continue
        try:
            [(body,)] = db.execute("SELECT CAST(body AS BLOB) FROM payloads WHERE id = ?", (group,)).fetchall()
            found = unpack_group(body)
        except ValueError:
            why = "the versions of its tokens cannot be read"
            # Trap: a batch that is taken back queues its groups unseen; the learner is never given this one.
            refused = ", state = 'refused', reason = 'failed'" if state == "queued" else ""
            db.execute(
                f"UPDATE groups SET versions = '{{}}', queued_version = needs, detail = ?{refused} WHERE id = ?",
                (why if refused else "", group),
            )
            put_aside(db, f"group {group}", why)
            continue
        versions, queued = counted(found.versions), found.queued_version
        low, high = min(versions, default=queued), max(versions, default=queued)
        db.execute(
            "UPDATE groups SET versions = ?, tokens = ?, queued_version = ?, min_version = ?, max_version = ? "
            "WHERE id = ?",
            (json.dumps(versions), len(found.versions), queued, low, high, group),
        )
        put_aside(db, f"group {group}", "the versions of its tokens could not be read and are counted anew")


def _versions_beside(tokens: Any, queued: Any, low: Any, high: Any) -> Callable[[Any], bool]:
    """Whether they are {version: tokens}, and what the rest of their row says of them."""

    def fits(found: Any) -> bool:
        if not (_map_of(_whole)(found) and all(name.isdecimal() and name.isascii() for name in found)):
            return False
        names = [int(name) for name in found] or [queued]
        return _whole(queued) and (sum(found.values()), min(names), max(names)) == (tokens, low, high)

    return fits
