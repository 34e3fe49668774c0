"""What is durable and cannot be carried out: set aside and named, so that it ends no run twice.

The poison is planted in ledger.sqlite itself, as an older broker may have let it in or a disk may have made it.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fakes.run import B, G, Run
from offtrail.core.types import Channel, Problem
from offtrail.platform.broker.archive import ArchiveError, read_archive
from offtrail.platform.config.schema import Config
from offtrail.platform.launcher.jobs import report
from offtrail.platform.learner.role import BatchError
from offtrail.platform.ledger.database import LedgerError
from offtrail.platform.ledger.ledger import FILE
from offtrail.platform.runtime.context import RoleContext
from offtrail.platform.runtime.process import report_failure
from offtrail.platform.wire import sockets
from offtrail.platform.wire.groups import pack_group, unpack_group
from offtrail.platform.wire.messages import (
    Acknowledged,
    BatchReply,
    Checkpointed,
    EvalResult,
    Failure,
    Message,
    NextBatch,
)

from .test_broker_poison import vocabulary


@contextmanager
def planted(run: Run) -> Iterator[sqlite3.Connection]:
    """The file of a run whose broker is down."""
    run.broker.close()
    db = sqlite3.connect(run.run_dir / FILE)
    with db:
        yield db
    db.close()


def change(db: sqlite3.Connection, number: int, **changes: Any) -> None:
    """Another group in the place of one that is in the spool."""
    [(body,)] = db.execute("SELECT body FROM payloads WHERE id = ?", (number,))
    body = pack_group(replace(unpack_group(body), **changes))
    db.execute("UPDATE payloads SET body = ? WHERE id = ?", (body, number))


def again(run: Run, **changes: Any) -> Run:
    run.next = Run(run.run_dir, **changes)
    run.next.everybody()
    return run.next


def tell(run: Run, error: Exception, monkeypatch: pytest.MonkeyPatch, index: int = 0) -> None:
    """A learner's process reports as it dies: the real function, its line led to this broker."""

    class Line:
        def __init__(self, endpoint: object, identity: str, keys: object, process: str) -> None:
            self.identity = identity

        def request(self, message: Message, **_: object) -> None:
            run.ask(self.identity, message, Message)

        def close(self) -> None:
            pass

    monkeypatch.setattr(sockets, "Client", Line)
    monkeypatch.setattr(sockets.Endpoint, "read", lambda *_: None)
    monkeypatch.setattr(sockets.ClientKeys, "read", lambda *_: None)
    report_failure(RoleContext(run.config, run.run_dir, "learner", index), error)


def to_the_end(run: Run, steps: int = 3) -> dict[str, Any]:
    """With honest roles the run reaches its last step; its summary."""
    for step in range(run.broker.scheduler.version, steps):
        for _ in range(4):
            run.make()
            run.broker.serve_held()
            if run.ask("learner-0", NextBatch(step=step), BatchReply).headers:
                break
        run.commit(step, step + 1)
        run.ask("learner-0", Checkpointed(step=step + 1, path=""), Acknowledged)
    for version in range(steps + 1):
        run.ask("evaluator-0", EvalResult(version=version, metrics={"eval/accuracy": 0.5}), Acknowledged)
    assert run.broker.ending.status == "completed"
    run.finish_archive()
    run.broker.ending.write_last_summary()
    summary = run.summary()
    assert (summary["groups/trained"], summary["groups/lost"], summary["groups/duplicated"]) == (steps * B, 0, 0)
    assert summary["archive/unsealed"] == 0
    return summary


def archived(run: Run) -> list[int]:
    return sorted(row["group"] for shard in read_archive(run.run_dir) for row in shard.to_pylist())[::G]


# ---------------------------------------------------------------------- batches that cannot be trained


@pytest.mark.parametrize(
    ("poison", "why"),
    [
        (lambda db: change(db, 1, tokens=np.array([3, 4, 64], np.int32)), "token ids span 1…64, vocabulary is 64"),
        (lambda db: db.execute("UPDATE payloads SET body = x'0102' WHERE id = 1"), "a group's blob of 2 bytes"),
        (lambda db: db.execute("UPDATE payloads SET body = substr(body, 1, 200) WHERE id = 1"), "a group's blob of"),
        (lambda db: db.execute("UPDATE payloads SET body = 'text' WHERE id = 1"), "a group's blob of 4 bytes"),
        (lambda db: db.execute("DELETE FROM payloads WHERE id = 1"), "its payload is gone from the ledger"),
    ],
)
def test_a_group_of_a_logged_batch_that_cannot_be_trained_is_set_aside_and_the_run_goes_on(
    poison: Callable[[sqlite3.Connection], object], why: str, start: Callable[..., Run], tmp_path: Path
) -> None:
    vocabulary(tmp_path / "run", 64)
    run = start()
    run.everybody()
    run.make()
    assert run.ask("learner-0", NextBatch(step=0), BatchReply).headers
    with planted(run) as db:
        poison(db)
    run = again(run)
    # Of batch 0 group 1 is refused: its place is leased again, and nothing of the batch went to the learner.
    assert "batch 0: 1 of its 2 groups are here" in run.ask("learner-0", NextBatch(step=0), BatchReply).waiting
    assert [(lease.group, lease.slot) for lease in run.make()] == [(4, 1)]
    batch = run.ask("learner-0", NextBatch(step=0), BatchReply)
    assert [header.group for header in batch.headers] == [0, 4]
    summary = to_the_end(run)
    [line] = [line for line in summary["set_aside"] if line.startswith("group 1 of batch 0")]
    assert why in line
    assert summary["groups/refused"]["failed"] == 1


def test_a_group_without_the_channel_that_an_older_broker_let_in_is_set_aside(start: Callable[..., Run]) -> None:
    run = start()
    run.everybody()
    run.make()
    run.ask("learner-0", NextBatch(step=0), BatchReply)
    with planted(run) as db:
        change(db, 0, channels={"prm": Channel("token", np.zeros(3, np.float32))})
        db.execute("DELETE FROM meta WHERE key = 'begun_with'")
    config = Config()
    config.algo.process.channel = "prm"
    run = again(run, algo=config.algo)
    assert "1 of its 2 groups" in run.ask("learner-0", NextBatch(step=0), BatchReply).waiting
    run.broker.ending.write_summary()
    assert "algo.process.channel=prm: no such channel" in run.summary()["set_aside"][0]


def test_a_batch_on_which_the_learner_has_failed_is_set_aside_by_the_next_launch(start: Callable[..., Run]) -> None:
    run = start()
    run.everybody()
    run.train()
    run.make()
    run.ask("learner-0", NextBatch(step=1), BatchReply)
    failure = Failure(role="learner", index=0, error="BatchError: loss is nan", batch=1)
    run.ask("learner-0", failure, Acknowledged)
    assert run.broker.ending.status == "failed"
    run = run.restarted()
    assert run.broker.ledger.batch(1) is None
    assert "batch 1: 0 of its 2 groups are here" in run.ask("learner-0", NextBatch(step=1), BatchReply).waiting
    summary = to_the_end(run)
    assert summary["set_aside"] == [
        f"group {i} of batch 1: the learner failed on its batch: BatchError: loss is nan" for i in (2, 3)
    ]
    assert summary["groups/refused"]["failed"] == B
    assert run.restarted().broker.ending.status == "completed"  # once is enough


def test_a_learner_that_fails_erases_nothing_of_its_run(
    start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(learner__steps=6)
    run.everybody()
    for _ in range(4):
        run.train(checkpoint=False)
    assert run.ask("learner-0", NextBatch(step=4), BatchReply).headers
    rows, pinned = run.rows(), dict(run.broker.evaluations.kept)
    tell(run, BatchError(4, ValueError("x")), monkeypatch)
    for number in (1, 2):  # another process of it may begin before the broker has left
        assert run.broker.ending.status == "failed"
        assert (run.summary()["steps"], run.summary()["groups/trained"]) == (4, 4 * B)
        assert run.rows() == rows
        assert run.broker.evaluations.kept == pinned
        run.broker.roster.members["learner-0"].lost = True
        run.hello("learner", process=f"after {number} deaths")
        run.broker.ending.write_summary()


def test_a_batch_on_which_one_rank_has_failed_stays_for_another_try(
    start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All ranks report, and none of the reports, nor a learner that begins anew in this life, drops the batch."""
    run = start()
    run.everybody()
    run.hello("learner", 1)
    run.make()
    before = run.ask("learner-0", NextBatch(step=0), BatchReply)
    for index in (1, 0):
        tell(run, BatchError(0, ValueError("x")), monkeypatch, index)
    run.broker.scheduler.rewind()
    assert run.broker.ledger.batch(0) == [header.group for header in before.headers]
    config = Config()
    config.learner.optim.lr /= 10
    config.learner.steps = 3
    run = run.restarted(learner=config.learner)
    assert run.ask("learner-0", NextBatch(step=0), BatchReply).headers == before.headers


def test_a_batch_gets_another_try_under_another_learning_rate(start: Callable[..., Run]) -> None:
    run = start()
    run.everybody()
    run.make()
    before = run.ask("learner-0", NextBatch(step=0), BatchReply)
    run.ask("learner-0", Failure(role="learner", index=0, error="BatchError: nan", batch=0), Acknowledged)
    config = Config()
    config.learner.optim.lr /= 10
    config.learner.steps = 3
    run = run.restarted(learner=config.learner)
    assert run.ask("learner-0", NextBatch(step=0), BatchReply).headers == before.headers
    assert "set_aside" not in to_the_end(run)


def test_a_learner_that_dies_of_something_else_gets_its_batch_again(start: Callable[..., Run]) -> None:
    run = start()
    run.everybody()
    run.make()
    before = run.ask("learner-0", NextBatch(step=0), BatchReply)
    run.ask("learner-0", Failure(role="learner", index=0, error="OutOfMemoryError"), Acknowledged)
    run = run.restarted()
    assert run.ask("learner-0", NextBatch(step=0), BatchReply).headers == before.headers
    assert "set_aside" not in to_the_end(run)


@pytest.mark.parametrize(("mode", "dead"), [("bound", 4), ("exact", 2)])
def test_a_replay_that_meets_poison_makes_what_came_of_it_anew(mode: str, dead: int, start: Callable[..., Run]) -> None:
    """Batch 0 was trained before its payload was damaged; versions 1 and 2 were made of it, and are dead."""
    changes: dict[str, Any] = {"staleness__mode": mode, "learner__steps": 4}
    run = start(**changes)
    run.everybody()
    run.train(checkpoint=False)
    run.train(checkpoint=False)
    run.make()
    with planted(run) as db:
        db.execute("UPDATE payloads SET body = x'00' WHERE id = 0")
    run = again(run, **changes)
    assert run.ask("learner-0", NextBatch(step=0), BatchReply).waiting
    tally = run.broker.ledger.tally()
    # Batches 0 and 1 were of version 0: three of their four groups queue again; what was made of 1 and 2 is refused.
    assert (tally.refused["failed"], tally.queued) == (1, 3)
    assert tally.refused["superseded"] == dead  # in exact mode those of batch 3 are not leased yet
    assert [lease.slot for lease in run.make()] == [0]
    assert run.ask("learner-0", NextBatch(step=0), BatchReply).headers
    assert not run.commit(0, 1, checksum="another").diverged  # nothing living differs from it
    assert run.broker.ledger.lineage == 1
    assert run.broker.ledger.checksum(1) == "another"
    summary = to_the_end(run, 4)
    assert summary["groups/refused"]["superseded"] == dead


# ---------------------------------------------------------------------- shards that cannot be written


def test_a_group_that_no_shard_can_hold_is_left_out_and_named_and_its_payload_stays(start: Callable[..., Run]) -> None:
    """As brokers let in before they compared with the lease: bytes in the problem, a slot beyond 64 bits."""
    run = start()
    run.everybody()
    for lease, version in zip(run.lease().leases, (0, 0, 0, 1), strict=True):
        run.submit(lease, version)  # the last one is refused, and its payload kept
    with planted(run) as db:
        change(db, 0, problem=Problem("t", 0, "p", "a", {"raw": b"\xff"}))
        change(db, 3, slot=2**63)
    run = again(run)
    summary = to_the_end(run)
    assert [line.partition(":")[0] for line in summary["set_aside"]] == [
        "group 0 in 000000_batches_000000-000000.parquet",
        "group 3 in 000001_refused_00000003-00000003.parquet",
    ]
    assert "the archive cannot hold it (" in summary["set_aside"][0]
    assert archived(run) == [1, 2, 4, 5, 6]
    assert set(run.broker.ledger.payloads([0, 1, 2, 3])) == {0, 3}
    later = run.restarted()
    assert later.summary()["set_aside"] == summary["set_aside"]


def test_a_shard_that_cannot_be_made_at_all_is_set_aside_whole(
    start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise TypeError("no such type")

    run = start()
    run.everybody()
    with monkeypatch.context() as patch:
        patch.setattr("offtrail.platform.broker.archive.pq.write_table", broken)
        run.train()
        run.finish_archive()
    summary = to_the_end(run)
    why = "000000_batches_000000-000000.parquet: no file can be made of it (TypeError: no such type)"
    assert summary["set_aside"] == [why]
    assert archived(run) == [2, 3, 4, 5]
    assert set(run.broker.ledger.payloads(range(6))) == {0, 1}


# ---------------------------------------------------------------------- rows that cannot be read


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        ("UPDATE batches SET ids = '[0, ' WHERE step = 0", "the log of batch 0"),
        ("UPDATE batches SET ids = '[0, \"x\"]' WHERE step = 1", "the log of batch 1"),
        ("UPDATE steps SET metrics = 'x' WHERE step = 1", "steps, step 1"),
        ("UPDATE evals SET metrics = '{' WHERE version = 0", "evals, version 0"),
        ("UPDATE batches SET ids = '{\"a\": 1}' WHERE step = 1", "the log of batch 1"),
        ("UPDATE steps SET metrics = '[1]' WHERE step = 1", "steps, step 1"),
        ("UPDATE steps SET metrics = '{\"a\": NaN}' WHERE step = 1", "steps, step 1"),
        ('UPDATE steps SET metrics = \'{"a": "x"}\' WHERE step = 1', "steps, step 1"),
        ("UPDATE steps SET metrics = '{\"step\": null}' WHERE step = 1", "steps, step 1"),
        ("UPDATE steps SET metrics = CAST(x'ff' AS TEXT) WHERE step = 1", "steps, step 1"),
        ("UPDATE evals SET metrics = '3' WHERE version = 0", "evals, version 0"),
        ("UPDATE groups SET queued_version = 'x' WHERE id = 5", "group 5"),
        ("UPDATE meta SET value = '[1]' WHERE key = 'time'", "the run's sum 'time'"),
        ("UPDATE meta SET value = '{\"a\": null}' WHERE key = 'restarts'", "the run's sum 'restarts'"),
        ("INSERT OR REPLACE INTO meta VALUES ('unfit', '[1]')", "the run's sum 'unfit'"),
        ("INSERT OR REPLACE INTO meta VALUES ('given_up', '3')", "the run's sum 'given_up'"),
        ("UPDATE meta SET value = 'many' WHERE key = 'planned_bytes'", "the run's sum 'planned_bytes'"),
        ("UPDATE meta SET value = 'x' WHERE key = 'last'", "the run's sum 'last'"),
        ("UPDATE meta SET value = '[' WHERE key = 'time'", "the run's sum 'time'"),
        ("UPDATE meta SET value = 'x' WHERE key = 'wall_seconds'", "the run's sum 'wall_seconds'"),
    ],
)
def test_a_row_that_cannot_be_read_is_mended_or_set_aside(damage: str, named: str, start: Callable[..., Run]) -> None:
    run = start()
    run.everybody()
    run.ask("evaluator-0", EvalResult(version=0, metrics={"eval/accuracy": 0.5}), Acknowledged)
    run.train()
    run.train(checkpoint=False)
    with planted(run) as db:
        db.execute(damage)
    run = again(run)
    assert [line.partition(":")[0] for line in to_the_end(run)["set_aside"]] == [named]


@pytest.mark.parametrize("versions", ["{0:", '{"x": 3}', "[3]", '{"1": null}', '{"0": 4}', '{"0": 3}', "{}", "", None])
def test_versions_that_cannot_be_those_of_the_tokens_are_counted_anew(
    versions: str | None, start: Callable[..., Run]
) -> None:
    """The group waits, and was sampled by version 1; the ages of its batch are the true ones."""
    run = start()
    run.everybody()
    run.train()
    leases = run.make()
    with planted(run) as db:
        db.execute("UPDATE groups SET versions = ? WHERE id = ?", (versions, leases[-1].group))
    run = again(run)
    run.train()
    assert run.ask("learner-0", NextBatch(step=2), BatchReply).headers[-1].group == leases[-1].group
    ages = run.broker.ledger.ages(2)
    assert (ages.tokens, ages.stale_tokens, ages.age_sum, ages.flight_sum) == (3 * B, 3 * B, 3 * B, 0)
    run.broker.ending.write_summary()
    why = "the versions of its tokens could not be read and are counted anew"
    assert run.summary()["set_aside"] == [f"group {leases[-1].group}: {why}"]


@pytest.mark.parametrize("state", ["queued", "training"])
def test_a_group_of_which_neither_versions_nor_payload_can_be_read_is_refused(
    state: str, start: Callable[..., Run]
) -> None:
    run = start()
    run.everybody()
    run.make()
    if state == "training":
        run.ask("learner-0", NextBatch(step=0), BatchReply)
    with planted(run) as db:
        db.execute("UPDATE groups SET versions = '[3]' WHERE id IN (0, 1)")
        db.execute("UPDATE payloads SET body = x'00' WHERE id IN (0, 1)")
    run = again(run)
    assert to_the_end(run)["groups/refused"]["failed"] == 2


@pytest.mark.parametrize(
    ("key", "value"),
    [("checkpoint", "x"), ("checkpoint", "-1"), ("noted", "3"),
     ("changes", "{"), ("changes", "[3]"), ("inputs", "[]"),
     ("begun_with", "[1]"), ("begun_with", "{")],
)  # fmt: skip
def test_a_remark_that_the_run_cannot_go_on_without_is_told_by_its_key_and_the_way_out(
    key: str, value: str, start: Callable[..., Run]
) -> None:
    run = start()
    run.everybody()
    run.train()
    with planted(run) as db:
        db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))
    words = rf"ledger\.sqlite: '{key}' of its table meta is '{re.escape(value)}'; the file is damaged; put a copy of it"
    for _ in range(2):
        with pytest.raises(LedgerError, match=words):
            Run(run.run_dir)
    with sqlite3.connect(run.run_dir / FILE) as db:  # nothing of it was changed
        assert db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchall() == [(value,)]
    db.close()


# ---------------------------------------------------------------------- shards that are damaged later


def test_a_damaged_or_missing_shard_is_told_by_name_and_with_the_way_out(start: Callable[..., Run]) -> None:
    run = start()
    run.everybody()
    to_the_end(run)
    shard = sorted((run.run_dir / "trajectories").iterdir())[0]
    whole, groups = shard.read_bytes(), archived(run)
    place = len(whole) // 8
    for damaged in (bytes([*whole[:place], whole[place] ^ 1, *whole[place + 1 :]]), whole[: len(whole) // 2], b""):
        shard.write_bytes(damaged)
        with pytest.raises(ArchiveError, match=rf"{shard.name}: is damaged \(.*\); put a copy of it back"):
            archived(run)
    shard.unlink()
    with pytest.raises(ArchiveError, match=rf"{shard.name}: is gone, though it was sealed; put a copy of it back"):
        archived(run)
    later = run.restarted()
    assert later.summary()["set_aside"] == [f"{shard.name}: its file is gone, though it was sealed"]
    shard.write_bytes(whole)
    assert archived(run) == groups
    assert "set_aside" not in later.restarted().summary()  # its file stands again


def test_the_terminal_shows_the_first_of_what_was_set_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report(tmp_path, {"status": "completed", "set_aside": ["group 3: why", "group 5: why"]})
    assert "set aside  group 3: why, and 1 more in summary.json" in " ".join(capsys.readouterr().out.split(" " * 4))
