"""The ledger file: durable through kill -9, whole or not at all, legal moves only, an audit that can find fault."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from offtrail.platform.ledger.database import LedgerError
from offtrail.platform.ledger.ledger import FILE, Ledger
from offtrail.platform.ledger.rows import Arrival, Audit, Grant, Tally

ROOT = Path(__file__).resolve().parents[2]


def arrival(versions: dict[int, int] | None = None, *, queued_version: int = 0, body: bytes = b"payload") -> Arrival:
    return Arrival(body, 2, versions if versions is not None else {0: 3}, queued_version, 1.0)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    ledger = Ledger(tmp_path / FILE)
    yield ledger
    ledger.close()


def queue(ledger: Ledger, count: int, **changes: object) -> list[int]:
    slot = ledger.admitted
    rows = ledger.grant("generator-0", [Grant(slot + i, 0) for i in range(count)], 0.0)
    for row in rows:
        ledger.submit(row.id, arrival(**changes), 0)  # type: ignore[arg-type]
    return [row.id for row in rows]


def train(ledger: Ledger, step: int, checksum: str | None = None, **changes: object) -> list[int]:
    groups = queue(ledger, 2, **changes)
    ledger.log_batch(step, groups)
    ledger.commit(step, checksum or f"c{step + 1}", {"loss": float(step)})
    return groups


CHILD = """
import os, sys
from pathlib import Path
from offtrail.platform.ledger.ledger import Ledger
from offtrail.platform.ledger.rows import Arrival, Grant
ledger = Ledger(Path(sys.argv[1]))
for i in range(int(sys.argv[2])):
    [row] = ledger.grant("generator-0", [Grant(ledger.admitted, 0)], 0.0)
    ledger.submit(row.id, Arrival(os.urandom(1000) + b"%d" % row.id, 2, {0: 3}, 0, 1.0), 0)
    print(row.id, flush=True)
sys.stdin.read()
"""


def child(path: Path, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, str(path), str(count)]
    env = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)


def test_an_acknowledged_group_survives_kill_9_right_after_the_acknowledgement(tmp_path: Path) -> None:
    with child(tmp_path / FILE, 1) as process:
        assert process.stdout is not None
        acknowledged = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
    ledger = Ledger(tmp_path / FILE)
    assert ledger.tally() == Tally(admitted=1, queued=1, tokens=3)
    assert ledger.payloads([acknowledged])[acknowledged].endswith(b"0")
    ledger.close()


def test_every_acknowledged_group_survives_kill_9_in_the_middle_of_work(tmp_path: Path) -> None:
    for life in range(3):
        with child(tmp_path / FILE, 100_000) as process:
            assert process.stdout is not None
            acknowledged = [int(process.stdout.readline()) for _ in range(50 + 7 * life)]
            process.send_signal(signal.SIGKILL)
            acknowledged += [
                int(line) for line in process.stdout.read().splitlines(keepends=True) if line.endswith("\n")
            ]
        ledger = Ledger(tmp_path / FILE)
        bodies = ledger.payloads(acknowledged)
        for group in acknowledged:
            assert bodies[group].endswith(b"%d" % group)
        # At most the one group in the works at each kill was admitted and not submitted.
        assert ledger.tally().leased <= life + 1
        assert ledger.audit() == Audit(ledger.admitted, 0, 0)
        ledger.close()


def test_a_transaction_is_all_or_nothing(ledger: Ledger) -> None:
    groups = queue(ledger, 2)
    before = ledger.tally()
    with pytest.raises(LedgerError, match="illegal move"):
        ledger.log_batch(0, [*groups, *groups[:1]])  # the second move of groups[0] is training → training
    assert ledger.tally() == before
    assert ledger.batch(0) is None


@pytest.mark.parametrize(
    "move",
    [
        "UPDATE groups SET state = 'trained' WHERE state = 'queued'",  # never trained without a batch
        "UPDATE groups SET state = 'leased' WHERE state = 'queued'",  # never made twice
        "UPDATE groups SET state = 'refused' WHERE state = 'queued'",  # never refused without a reason
        "UPDATE groups SET state = 'refused', reason = 'stale' WHERE state = 'trained'",  # never refused once trained
        "UPDATE groups SET state = 'queued', reason = '' WHERE state = 'refused'",  # a refusal is final
        "INSERT INTO groups (id, slot, state, needs) VALUES (99, 99, 'queued', 0)",  # nothing comes from nowhere
        "INSERT INTO groups (id, slot, state, needs) VALUES (99, 0, 'leased', 0)",  # one living group a slot
        "UPDATE groups SET state = 'lost' WHERE state = 'queued'",
    ],
)
def test_the_schema_itself_refuses_illegal_moves(ledger: Ledger, move: str) -> None:
    train(ledger, 0)
    refused, _ = queue(ledger, 2)
    ledger.refuse(refused, "stale")
    other = sqlite3.connect(ledger.file.path)
    with pytest.raises(sqlite3.IntegrityError):
        other.execute(move)
    other.close()


def test_the_counts_of_a_small_history_by_hand(ledger: Ledger) -> None:
    train(ledger, 0)  # 2 trained, 6 tokens
    queue(ledger, 1)  # 1 queued, 3 tokens
    rows = ledger.grant("generator-1", [Grant(slot, 0) for slot in (3, 4, 5)], 0.0)
    ledger.refuse(rows[0].id, "failed", "no room")
    ledger.refuse(rows[1].id, "stale", "too old", arrival({0: 1, 1: 4}))
    assert ledger.tally() == Tally(
        admitted=6,
        leased=1,
        queued=1,
        training=0,
        trained=2,
        refused={"failed": 1, "stale": 1},
        tokens=6 + 3 + 5,
        discarded=5,
    )
    assert ledger.tally().accounted == 6


def test_ages_by_hand(ledger: Ledger) -> None:
    # Step 3: 2 tokens of version 1 and 1 of version 3 queued at 3; 4 of version 2 queued at 2.
    # ages 2, 2, 0 and 1 ×4: sum 8, oldest 2, stale 6. In flight 2·(3−1) = 4, in the queue 4·(3−2) = 4.
    first, second = ledger.grant("generator-0", [Grant(0, 0), Grant(1, 0)], 0.0)
    ledger.submit(first.id, arrival({1: 2, 3: 1}, queued_version=3), 0)
    ledger.submit(second.id, arrival({2: 4}, queued_version=2), 0)
    ledger.log_batch(3, [first.id, second.id])
    ages = ledger.ages(3)
    assert (ages.tokens, ages.stale_tokens, ages.age_sum, ages.age_max) == (7, 6, 8, 2)
    assert (ages.flight_sum, ages.queue_sum) == (4, 4)
    assert ledger.ages().tokens == 0  # not trained yet


def test_a_version_without_a_checksum_is_told_its_own_at_the_restart_and_has_not_diverged(ledger: Ledger) -> None:
    ledger.publish(0, "c0")
    ledger.log_batch(0, [])
    ledger.commit(0, "", {})
    ledger.checkpointed(1)
    ledger.rewind()
    assert not ledger.publish(1, "c1")
    assert not ledger.publish(1, "")
    assert (ledger.checksum(1), ledger.lineage) == ("c1", 0)
    assert ledger.publish(1, "another")


def test_a_rewind_trains_the_same_batches_again_and_forgets_later_rows(ledger: Ledger) -> None:
    logged = [train(ledger, step) for step in range(3)]
    ledger.records.evaluated(1, {"eval/accuracy": 0.5})
    ledger.records.evaluated(3, {"eval/accuracy": 0.7})
    ledger.checkpointed(1)
    ledger.rewind()
    assert (ledger.tally().trained, ledger.tally().training) == (2, 4)
    assert [ledger.batch(step) for step in range(3)] == logged
    assert [row["step"] for row in ledger.records.metrics()] == [1]
    assert list(ledger.records.evals()) == [1]
    assert not ledger.commit(1, "c2", {"loss": 9.0})
    assert [row["step"] for row in ledger.records.metrics()] == [1, 2]
    assert ledger.lineage == 0


def test_a_replay_that_differs_supersedes_what_dead_versions_made(ledger: Ledger) -> None:
    for step in range(3):
        train(ledger, step, versions={step: 3})
    alive, dead = queue(ledger, 1, versions={0: 3})[0], queue(ledger, 1, versions={0: 2, 2: 1})[0]
    young, old = ledger.grant("generator-0", [Grant(8, 1), Grant(9, 3)], 0.0)
    ledger.checkpointed(1)
    ledger.rewind()
    assert ledger.commit(1, "another", {})  # version 2 is made anew: 2 and 3 of the first lineage are dead
    assert ledger.lineage == 1
    assert ledger.batch(2) is None
    state = {i: ledger.row(i) for i in (alive, dead, young.id, old.id)}
    assert [row.state for row in state.values() if row] == ["queued", "refused", "leased", "refused"]
    assert ledger.row(young.id).attempt == 2  # type: ignore[union-attr]
    assert ledger.tally().refused == {"superseded": 4}  # batch 2 (its tokens are of version 2), dead, old
    assert (ledger.checksum(1), ledger.checksum(2), ledger.checksum(3)) == ("c1", "another", None)
    assert ledger.audit() == Audit(10, 0, 0)


@pytest.mark.parametrize(
    ("damage", "lost", "duplicated"),
    [
        ("DELETE FROM groups WHERE id = 1", 2, 0),  # a number with no row, and a counter that does not fit
        ("DELETE FROM payloads WHERE id = 5", 1, 0),  # queued without what it holds
        ("DELETE FROM payloads WHERE id = 0", 1, 0),  # trained, not archived, gone
        ("UPDATE batches SET ids = '[2, 2]' WHERE step = 1", 1, 1),  # 2 trained twice, 3 in no batch
        ("UPDATE batches SET ids = '[2, 0]' WHERE step = 1", 1, 1),  # 0 trained in both, 3 in none
        ("UPDATE tally SET n = n - 1 WHERE state = 'queued'", 1, 0),  # a counter that drifted
    ],
)
def test_the_audit_finds_damage(ledger: Ledger, damage: str, lost: int, duplicated: int) -> None:
    train(ledger, 0)
    train(ledger, 1)
    queue(ledger, 2)
    assert ledger.audit() == Audit(6, 0, 0)
    other = sqlite3.connect(ledger.file.path)
    with other:
        other.execute(damage)
    other.close()
    for audit in (ledger.audit(), ledger.auditor.recent(0), ledger.auditor.recent(2)):
        assert (audit.lost, audit.duplicated) == (lost, duplicated)


@pytest.mark.parametrize(
    ("damage", "lost", "duplicated"),
    [
        ("UPDATE batches SET ids = '[2, 0]' WHERE step = 1", 1, 1),  # 0 stands in a batch that was counted before
        ("DELETE FROM payloads WHERE id = 3", 1, 0),
        ("DELETE FROM groups WHERE id = 3", 2, 0),
    ],
)
def test_an_audit_of_what_came_since_the_last_one_finds_what_came_since(
    ledger: Ledger, damage: str, lost: int, duplicated: int
) -> None:
    train(ledger, 0)
    assert ledger.auditor.recent(1) == Audit(2, 0, 0)
    train(ledger, 1)
    queue(ledger, 1)
    assert (ledger.auditor.batches, ledger.auditor.groups) == (1, 2)
    other = sqlite3.connect(ledger.file.path)
    with other:
        other.execute(damage)
    other.close()
    for audit in (ledger.audit(), ledger.auditor.recent(2), ledger.auditor.recent(2)):  # until it is mended
        assert (audit.lost, audit.duplicated) == (lost, duplicated)


def test_sums_over_all_steps_are_right_after_commits_rewinds_and_what_was_taken_back(ledger: Ledger) -> None:
    def sums() -> tuple[int, float | None, tuple[float | None, float | None]]:
        return ledger.ages().tokens, ledger.records.mean_metric("loss"), ledger.records.edge_metrics("loss")

    assert sums() == (0, None, (None, None))
    train(ledger, 0)
    train(ledger, 1)
    train(ledger, 2)
    assert sums() == (18, 1.0, (0.0, 2.0))
    ledger.checkpointed(1)
    ledger.rewind()
    assert sums() == (6, 0.0, (0.0, 0.0))
    ledger.commit(1, "c2", {"loss": 5.0})
    assert sums() == (12, 2.5, (0.0, 5.0))
    ledger.unlog(2, {})
    assert sums() == (12, 2.5, (0.0, 5.0))
    ledger.rewind()
    ledger.commit(1, "another", {"loss": float("nan")})
    assert sums() == (12, 0.0, (0.0, None))


def test_a_full_disk_keeps_what_was_acknowledged_and_names_path_cause_and_way_out(ledger: Ledger) -> None:
    groups = queue(ledger, 3)
    [row] = ledger.grant("generator-0", [Grant(3, 0)], 0.0)
    pages = ledger.file.one("PRAGMA page_count")
    ledger.file.rows(f"PRAGMA max_page_count = {pages + 2}")
    with pytest.raises(LedgerError, match=r"ledger\.sqlite: database or disk is full; .*free space.*run\.resume=true"):
        ledger.submit(row.id, arrival(body=b"x" * 1_000_000), 0)
    assert ledger.row(row.id).state == "leased"  # type: ignore[union-attr]
    assert ledger.payloads(groups) == dict.fromkeys(groups, b"payload")
    ledger.file.rows("PRAGMA max_page_count = 4294967294")
    ledger.submit(row.id, arrival(body=b"x" * 1_000_000), 0)  # space was made: it goes on
    assert ledger.tally().queued == 4


def test_a_second_broker_is_refused(ledger: Ledger) -> None:
    with pytest.raises(LedgerError, match="another broker holds this run"):
        Ledger(ledger.file.path)


def test_a_path_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match=r"missing/ledger\.sqlite: .*No such file"):
        Ledger(tmp_path / "missing" / FILE)


def test_another_schema_and_another_file_are_refused(tmp_path: Path) -> None:
    Ledger(tmp_path / FILE).close()
    other = sqlite3.connect(tmp_path / FILE)
    other.execute("PRAGMA user_version = 7")
    other.close()
    with pytest.raises(LedgerError, match="written by ledger schema 7, this is 5; go on with the version of offtrail"):
        Ledger(tmp_path / FILE)
    (tmp_path / "other.sqlite").write_bytes(b"not a database, but long enough to be taken for one" * 100)
    with pytest.raises(LedgerError, match=r"other\.sqlite: file is not a database"):
        Ledger(tmp_path / "other.sqlite")


def test_charges_of_several_lives_add_up(ledger: Ledger) -> None:
    assert ledger.records.life("generator", 0) == 0
    ledger.records.charge([("generator", 0, 0, {"decoded_tokens": 5.0})])
    ledger.records.charge([("generator", 0, 0, {"decoded_tokens": 7.0})])  # cumulative: replaces
    assert ledger.records.life("generator", 0) == 1
    ledger.records.charge([("generator", 0, 1, {"decoded_tokens": 2.0}), ("generator", 1, 0, {"decoded_tokens": 10.0})])
    assert ledger.records.charges() == {"generator": {"decoded_tokens": 19.0}}


def test_metrics_at_the_edges_and_their_mean(ledger: Ledger) -> None:
    for step, value in enumerate([0.25, 0.5, 1.0]):
        groups = queue(ledger, 1)
        ledger.log_batch(step, groups)
        ledger.commit(
            step, f"c{step}", {"reward/accuracy": value} if step != 1 else {"reward/accuracy": value, "x": 3.0}
        )
    assert ledger.records.edge_metrics("reward/accuracy") == (0.25, 1.0)
    assert ledger.records.mean_metric("reward/accuracy") == pytest.approx(1.75 / 3)
    assert ledger.records.mean_metric("x") == 3.0
    assert ledger.records.mean_metric("y") is None


def test_shards_are_planned_by_size_and_a_batch_is_never_cut(ledger: Ledger) -> None:
    for step in range(3):
        train(ledger, step, body=b"x" * 100)
    refused = queue(ledger, 1, body=b"x" * 100)
    ledger.refuse(refused[0], "stale")
    ledger.checkpointed(2)
    ledger.shards.plan(150, ledger.checkpoint)
    assert ledger.shards.unsealed() == [
        "000000_batches_000000-000000.parquet",
        "000001_batches_000001-000001.parquet",
        "000002_refused_00000006-00000006.parquet",
    ]
    ledger.shards.plan(150, ledger.checkpoint)  # nothing is planned twice
    assert len(ledger.shards.unsealed()) == 3
    ledger.shards.sealed(ledger.shards.unsealed()[0])
    assert ledger.audit() == Audit(7, 0, 0)
    assert list(ledger.payloads([0, 1, 2])) == [2]


def test_the_batch_log_is_plain_json_in_training_order(ledger: Ledger) -> None:
    groups = queue(ledger, 3)
    ledger.log_batch(0, [groups[2], groups[0], groups[1]])
    reader = sqlite3.connect(ledger.file.path)
    [(ids,)] = reader.execute("SELECT ids FROM batches").fetchall()
    positions = reader.execute("SELECT id FROM groups ORDER BY position").fetchall()
    reader.close()
    assert json.loads(ids) == [2, 0, 1]
    assert [i for (i,) in positions] == [2, 0, 1]
