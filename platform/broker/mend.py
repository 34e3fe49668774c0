"""Rows of an old ledger that cannot be read: mended or set aside when it is opened, so that none of them ends a run.

What is set aside stays where it is, is named in summary.json (`set_aside`), and is not touched again.
"""

from __future__ import annotations

import json
import sqlite3

from offtrail.platform.broker.database import Database
from offtrail.platform.broker.records import put_aside

UNREADABLE_LOG = "NOT json_valid(ids) OR EXISTS (SELECT 1 FROM json_each(ids) WHERE type <> 'integer')"


def mend(file: Database) -> None:
    """One transaction. A logged batch is read off its groups, which hold it too; a queued group whose versions cannot
    be read is refused; metrics, scores and sums that cannot be read are begun anew.
    """
    with file.change() as db:
        for (step,) in db.execute(f"SELECT step FROM batches WHERE {UNREADABLE_LOG}").fetchall():
            rows = db.execute("SELECT id FROM groups WHERE batch = ? ORDER BY position", (step,))
            db.execute("UPDATE batches SET ids = ? WHERE step = ?", (json.dumps([i for (i,) in rows]), step))
            put_aside(db, f"the log of batch {step}", "it cannot be read; its groups say which they are")
        unread = "state = 'queued' AND NOT json_valid(versions)"
        for (group,) in db.execute(f"SELECT id FROM groups WHERE {unread}").fetchall():
            why = "the versions of its tokens cannot be read"
            db.execute("UPDATE groups SET state = 'refused', reason = 'failed', detail = ? WHERE id = ?", (why, group))
            put_aside(db, f"group {group}", why)
        for table, key in (("steps", "step"), ("evals", "version")):
            for (place,) in db.execute(f"SELECT {key} FROM {table} WHERE NOT json_valid(metrics)").fetchall():
                db.execute(f"UPDATE {table} SET metrics = '{{}}' WHERE {key} = ?", (place,))
                put_aside(db, f"{table}, {key} {place}", "its metrics cannot be read")
        _mend_sums(db)


def _mend_sums(db: sqlite3.Connection) -> None:
    unread = "key IN ('time', 'restarts', 'unfit', 'wall_seconds') AND value <> '' AND NOT json_valid(value)"
    for (key,) in db.execute(f"SELECT key FROM meta WHERE {unread}").fetchall():
        db.execute("DELETE FROM meta WHERE key = ?", (key,))
        put_aside(db, f"the run's sum {key!r}", "it cannot be read and is begun anew")
