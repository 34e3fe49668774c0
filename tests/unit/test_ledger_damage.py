"""A byte of a ledger that has changed on the disk: what the run is told, and what is never taken for whole."""

from __future__ import annotations

import random
import shutil
import sqlite3
from collections import Counter
from pathlib import Path

import pytest

from fakes.run import Run
from offtrail.platform.broker.resume import check_settings
from offtrail.platform.config.errors import ConfigError
from offtrail.platform.config.schema import Config
from offtrail.platform.ledger.database import LedgerError
from offtrail.platform.ledger.ledger import FILE, Ledger
from offtrail.platform.wire.codec import WireError
from offtrail.platform.wire.groups import unpack_group


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run with trained, logged and queued groups that has ended, its ledger in one file."""
    run = Run(tmp_path / "run", learner__steps=12)
    run.everybody()
    for step in range(4):
        run.train(checkpoint=step == 2)
    run.make()
    run.close()
    db = sqlite3.connect(run.run_dir / FILE)
    db.execute("PRAGMA journal_mode = DELETE")
    db.close()
    return run


@pytest.fixture
def closed(run: Run) -> Path:
    """Its ledger."""
    return run.run_dir / FILE


def test_no_flipped_bit_of_a_payload_is_taken_for_whole(closed: Path, tmp_path: Path) -> None:
    """Anywhere in the file; the ledger opens, or is refused by name."""
    data, rng, copy = closed.read_bytes(), random.Random(0), tmp_path / "copy" / FILE
    db = sqlite3.connect(closed)
    whole = {body: unpack_group(body) for (body,) in db.execute("SELECT body FROM payloads")}
    db.close()
    damaged = 0
    for turn in range(60):
        flipped, at = bytearray(data), rng.randrange(len(data))
        if turn % 2:
            body = rng.choice(list(whole))
            at = data.index(body[:200]) + rng.randrange(200)
        flipped[at] ^= 1 << rng.randrange(8)
        shutil.rmtree(copy.parent, ignore_errors=True)
        copy.parent.mkdir()
        copy.write_bytes(flipped)
        try:
            ledger = Ledger(copy)
        except LedgerError:
            continue
        for (body,) in ledger.file.fetch("SELECT CAST(body AS BLOB) FROM payloads"):
            if body not in whole:
                damaged += 1
                with pytest.raises(WireError):
                    unpack_group(body)
        ledger.close()
    assert damaged >= 20


TABLES = "meta groups payloads batches versions steps evals charges shards aside tally"


def contents(path: Path) -> dict[str, list[tuple[bytes, ...]]]:
    """All rows, table by table; a table that cannot be read has none."""
    db, found = sqlite3.connect(path), {}
    db.text_factory = bytes
    for table in TABLES.split():
        try:
            found[table] = db.execute(f"SELECT * FROM {table}").fetchall()
        except (sqlite3.Error, UnicodeError):
            found[table] = []
    db.close()
    return found


def outcome(path: Path, whole: dict[str, list[tuple[bytes, ...]]], config: Config) -> str:
    """What is told at a resume of a ledger, or what of it has changed without a word."""
    now = contents(path)
    try:
        ledger = Ledger(path)
    except LedgerError:
        return "refused"
    try:
        check_settings(ledger, config, path.parent)
        audit = ledger.audit()
        for (body,) in ledger.file.fetch("SELECT CAST(body AS BLOB) FROM payloads"):
            unpack_group(body)
        if audit.lost or audit.duplicated or ledger.records.aside():
            return "told"
    except LedgerError:
        return "refused"
    except ConfigError:
        return "settings"
    except WireError:
        return "payload"
    finally:
        ledger.close()
    changed = [table for table in whole if now[table] != whole[table]]
    return f"silent in {changed[0]}" if changed else "harmless"


@pytest.mark.prove
def test_what_of_a_thousand_flipped_bits_is_told(run: Run, closed: Path, tmp_path: Path) -> None:
    """With -s it prints the figures of docs/invariants.md."""
    data, whole, rng, copy = closed.read_bytes(), contents(closed), random.Random(0), tmp_path / "copy" / FILE
    found: Counter[str] = Counter()
    for _ in range(1000):
        flipped = bytearray(data)
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        shutil.rmtree(copy.parent, ignore_errors=True)
        copy.parent.mkdir()
        copy.write_bytes(flipped)
        found[outcome(copy, whole, run.config)] += 1
    print(dict(found))
    assert "silent in payloads" not in found
    silent = sum(count for what, count in found.items() if what.startswith("silent"))
    assert found["refused"] + found["payload"] + found["settings"] + found["told"] > 3 * silent


def test_an_index_that_disagrees_with_its_table_is_refused(closed: Path) -> None:
    db = sqlite3.connect(closed)
    db.execute("PRAGMA writable_schema = ON")
    db.execute("UPDATE sqlite_master SET sql = replace(sql, 'arrival', 'attempt') WHERE name = 'queued'")
    db.commit()
    db.close()
    with pytest.raises(LedgerError, match="missing from index queued; the file is damaged"):
        Ledger(closed)
