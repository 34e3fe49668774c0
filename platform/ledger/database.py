"""The ledger's file: one connection, one writer, every change one transaction. ledger.py, records.py and shards.py
share it.

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
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from offtrail.platform.ledger.tables import LEDGER_SCHEMA, TABLES


class LedgerError(RuntimeError):
    """The ledger cannot go on; one line that names the path, the cause and the way out."""


class UnfitError(ValueError):
    """A value that SQLite cannot hold, of a request: nothing of it was written. One line for its sender."""


UNFIT = (OverflowError, TypeError, UnicodeError, sqlite3.InterfaceError, sqlite3.ProgrammingError, sqlite3.DataError)
"""What sqlite3 raises where a value cannot be bound: an integer beyond 64 bits, text that is no Unicode, an object."""
ADVICE = {
    "SQLITE_CONSTRAINT": "nothing of the request was written; this is a fault of the program: please report it",
    "SQLITE_CORRUPT": "the file is damaged; put a copy of it back, or begin a new run.name, with model.path at the "
    "newest checkpoint if there is one",
    "SQLITE_BUSY": "another program holds the file; end it and go on with run.resume=true",
}
ADVICE |= dict.fromkeys(("SQLITE_NOTADB", "SQLITE_ERROR"), ADVICE["SQLITE_CORRUPT"])
ADVICE |= {"SQLITE_LOCKED": ADVICE["SQLITE_BUSY"]}
NO_SPACE = "nothing acknowledged is lost: free space (or make it writable) and go on with run.resume=true"


class Database:
    """The connection that the parts of one ledger share. One process writes the file.

    LedgerError on a file that another broker holds, that another schema wrote, that is damaged, that cannot be written,
    or on a full disk; UnfitError on a value that it cannot hold.
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
        self.check_integrity()

    def check_integrity(self) -> None:
        """Compare tables and indexes. Raises LedgerError where they disagree."""
        (found,) = self._db.execute("PRAGMA integrity_check(1)").fetchone()
        if found != "ok":
            raise LedgerError(f"{self.path}: {' '.join(found.split())}; {ADVICE['SQLITE_CORRUPT']}")

    def close(self) -> None:
        """Give the file back; what was acknowledged stays."""
        self._db.close()
        self._lock.close()

    def _broken(self, error: Exception) -> LedgerError:
        name = getattr(error, "sqlite_errorname", "")  # such as SQLITE_CONSTRAINT_TRIGGER
        return LedgerError(f"{self.path}: {error}; {ADVICE.get('_'.join(name.split('_')[:2]), NO_SPACE)}")

    @contextmanager
    def change(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all of it or nothing, whatever is raised in it, also through kill -9."""
        self.forget()
        try:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")
        except UNFIT as error:
            raise UnfitError(f"{self.path}: {error}; nothing was written") from error
        except sqlite3.Error as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise self._broken(error) from error

    def forget(self) -> None:
        """The next reading of each query reaches the file."""
        self._read.clear()

    def rows(self, query: str, *values: Any) -> list[Any]:
        """The rows of a query. Between two changes each query reaches the file once: do not change the list."""
        rows = self._read.get((query, *values))
        if rows is None:
            rows = self.fetch(query, *values)
            if not self._db.in_transaction:
                self._read[query, *values] = rows
        return rows

    def fetch(self, query: str, *values: Any) -> list[Any]:
        """The rows of a query that are not worth keeping."""
        try:
            return self._db.execute(query, values).fetchall()
        except UNFIT as error:
            raise UnfitError(f"{self.path}: {error}") from error
        except sqlite3.Error as error:
            raise self._broken(error) from error

    def one(self, query: str, *values: Any) -> Any:
        """The first column of the first row."""
        return self.rows(query, *values)[0][0]
