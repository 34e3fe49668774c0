"""The archive: what leaves the spool is in a sealed shard, whole, once, whatever happens in between."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from offtrail.core.types import Channel, Group, Problem, ScoredBy
from offtrail.platform.broker import older
from offtrail.platform.broker.archive import SCHEMA, Archive, Sealed, tables, write_shard
from offtrail.platform.broker.older import go_back
from offtrail.platform.ledger.database import LedgerError
from offtrail.platform.ledger.ledger import FILE, Ledger
from offtrail.platform.ledger.rows import Arrival, Audit, Grant
from offtrail.platform.wire.groups import pack_group


def group(number: int, versions: list[int], **changes: object) -> Group:
    """Two samples: the first has one token, the second the rest."""
    T = len(versions)
    fields = {
        "group": number,
        "slot": number,
        "attempt": 1,
        "problem": Problem("chain", number, "3+4=", "7", {"start": 3}),
        "generator": "generator-0",
        "temperature": 0.5,
        "prompt_tokens": np.array([5, 6, 7], np.int32),
        "lengths": np.array([1, T - 1], np.int32),
        "tokens": np.arange(T, dtype=np.int32) + 10,
        "logprobs": -np.arange(T, dtype=np.float32),
        "versions": np.array(versions, np.int32),
        "finish": np.array([0, 1], np.uint8),
        "rewards": np.array([1.1, 0.0], np.float32),
        "components": {"accuracy": np.array([1, 0], np.float32), "format": np.array([1, 0], np.float32)},
        "times": np.array([[1, 2, 3], [1, 2, 4]], np.float64),
        "queued_version": 1,
        "queued_at": 9.5,
    }
    return Group(**(fields | changes))  # type: ignore[arg-type]


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    """Batch 0 (groups 1, 0) is trained and checkpointed, batch 1 (2, 3) trained since; 4 and 5 are refused, 5 empty."""
    ledger = Ledger(tmp_path / FILE)
    ledger.grant("generator-0", [Grant(slot, 0) for slot in range(6)], 0.0)
    # Three tokens, of which the first is sample 0's: its one step ends with it, the other sample has two.
    scored = {
        "step_ends": np.array([1, 2, 3], np.int32),
        "channels": {
            "prm": Channel("step", np.array([0.5, 0.25, -1], np.float32)),
            "value": Channel("token", np.array([7, 8, 9], np.float32)),
            "leaf": Channel("sample", np.array([1, 2], np.int32)),
            "parent": Channel("node", np.array([-1, 0, 0], np.int32)),
        },
        "scored_by": {"prm": ScoredBy("prm-7b", 12)},
    }
    for number in range(4):
        versions = [0, 0, number % 2]
        whole = group(number, versions, **(scored if number == 1 else {}))
        ledger.submit(number, Arrival(pack_group(whole), 2, {0: 3}, 1, 9.5), 0)
    ledger.refuse(4, "stale", "a token of version 0", Arrival(pack_group(group(4, [0, 0])), 2, {0: 2}, 1, 9.5))
    ledger.refuse(5, "failed", "no room")
    for step, groups in enumerate([[1, 0], [2, 3]]):
        ledger.log_batch(step, groups)
        ledger.commit(step, f"c{step + 1}", {})
    ledger.checkpointed(1)
    yield ledger
    ledger.close()


def seal(ledger: Ledger, tmp_path: Path) -> list[str]:
    """Through the thread, as the broker does it."""
    ledger.shards.plan(1 << 20, ledger.checkpoint)
    names, done = ledger.shards.unsealed(), list[Sealed]()
    archive = Archive(ledger.file.path, tmp_path / "trajectories", "run")
    archive.seal(names)
    archive.seal(names)  # asked for twice, written once
    limit = time.monotonic() + 30
    while len(done) < len(names) and time.monotonic() < limit:
        done += archive.done()
        time.sleep(0.005)
    archive.close()
    for shard in done:
        ledger.shards.sealed(shard.name, shard.left_out)
    return [shard.name for shard in done]


def test_a_shard_holds_every_sample_of_its_groups_in_training_order(ledger: Ledger, tmp_path: Path) -> None:
    batches, refused = seal(ledger, tmp_path)
    assert (batches, refused) == ("000000_batches_000000-000000.parquet", "000001_refused_00000004-00000004.parquet")
    table = pq.read_table(tmp_path / "trajectories" / batches)
    assert table.schema.names == [*SCHEMA.names, "step/prm", "token/value", "sample/leaf", "node/parent"]
    rows = table.to_pylist()
    assert [(row["group"], row["sample"], row["batch"], row["position"]) for row in rows] == [
        (1, 0, 0, 0), (1, 1, 0, 0), (0, 0, 0, 1), (0, 1, 0, 1),
    ]  # fmt: skip
    row = rows[1]
    assert (row["tokens"], row["logprobs"], row["versions"]) == ([11, 12], [-1.0, -2.0], [0, 1])
    assert (row["finish"], row["reward"], dict(row["rewards"])) == ("length", 0.0, {"accuracy": 0.0, "format": 0.0})
    assert (row["submitted_at"], row["last_token_at"], row["queued_at"], row["queued_version"]) == (1.0, 4.0, 9.5, 1)
    assert (row["run"], row["state"], row["reason"], row["attempt"], row["temperature"]) == (
        "run",
        "trained",
        "",
        1,
        0.5,
    )
    assert (row["prompt"], row["prompt_tokens"], row["generator"]) == ("3+4=", [5, 6, 7], "generator-0")
    problem = {"task": "chain", "index": 1, "prompt": "3+4=", "answer": "7", "meta": {"start": 3}, "messages": []}
    assert json.loads(row["problem"]) == problem
    assert rows[0]["reward"] == pytest.approx(1.1)


def test_channels_are_columns_cut_by_sample_and_say_who_made_them(ledger: Ledger, tmp_path: Path) -> None:
    batches, _ = seal(ledger, tmp_path)
    table = pq.read_table(tmp_path / "trajectories" / batches)
    types = {name: str(table.schema.field(name).type) for name in ("token/value", "sample/leaf", "node/parent")}
    assert types == {
        "token/value": "list<element: float>",
        "sample/leaf": "int32",
        "node/parent": "list<element: int32>",
    }
    first, second, *others = table.to_pylist()
    assert (first["step/prm"], second["step/prm"]) == ([0.5], [0.25, -1.0])
    assert (first["step_ends"], second["step_ends"]) == ([1], [1, 2])
    assert (first["token/value"], second["token/value"]) == ([7.0], [8.0, 9.0])
    assert (first["sample/leaf"], second["sample/leaf"]) == (1, 2)
    assert (first["node/parent"], second["node/parent"]) == ([-1, 0, 0], None)
    made_by = [("prm", {"model": "prm-7b", "version": 12})]
    assert (first["scored_by"], second["scored_by"]) == (made_by, made_by)
    for row in others:
        assert [row[name] for name in row if "/" in name] == [None] * 4
        assert (row["step_ends"], row["scored_by"]) == ([], [])


def test_refused_groups_are_kept_with_their_reason(ledger: Ledger, tmp_path: Path) -> None:
    _, refused = seal(ledger, tmp_path)
    rows = pq.read_table(tmp_path / "trajectories" / refused).to_pylist()
    told = [(row["group"], row["state"], row["reason"], row["detail"], row["batch"]) for row in rows]
    assert told == [(4, "refused", "stale", "a token of version 0", None)] * 2


def test_payloads_leave_the_spool_only_when_a_checkpoint_covers_them_and_their_shard_stands(
    ledger: Ledger, tmp_path: Path
) -> None:
    def spooled() -> set[int]:
        return {i for (i,) in ledger.file.rows("SELECT id FROM payloads")}

    ledger.shards.plan(1 << 20, ledger.checkpoint)
    assert spooled() == {0, 1, 2, 3, 4}
    seal(ledger, tmp_path)
    assert spooled() == {2, 3}  # batch 1 is replayed if the run is restarted
    assert ledger.audit() == Audit(6, 0, 0)


def test_a_crash_between_the_rename_and_the_clearing_writes_the_same_shard_again(
    ledger: Ledger, tmp_path: Path
) -> None:
    ledger.shards.plan(1 << 20, ledger.checkpoint)
    for name in ledger.shards.unsealed():
        write_shard(ledger.file.path, tmp_path / "trajectories", "run", name)
    before = {path.name: pq.read_table(path) for path in (tmp_path / "trajectories").iterdir()}
    ledger.close()  # the ledger never learned that they stand
    again = Ledger(ledger.file.path)
    again.checkpointed(2)
    done = seal(again, tmp_path)
    after = {path.name: pq.read_table(path) for path in (tmp_path / "trajectories").iterdir()}
    assert sorted(done) == sorted(after) == [*sorted(before), "000002_batches_000001-000001.parquet"]
    assert all(after[name].equals(table) for name, table in before.items())
    groups = [row["group"] for table in after.values() for row in table.to_pylist()]
    assert sorted(groups) == sorted(2 * [0, 1, 2, 3, 4])  # two samples each, nothing twice
    assert again.audit() == Audit(6, 0, 0)
    again.close()


# Back out of the archive


def bodies(ledger: Ledger) -> dict[int, bytes]:
    return dict(ledger.file.fetch("SELECT id, body FROM payloads"))


def test_a_run_that_goes_back_has_the_payloads_of_its_later_batches_again_bit_for_bit(
    ledger: Ledger, tmp_path: Path
) -> None:
    before, archive = bodies(ledger), tmp_path / "trajectories"
    ledger.checkpointed(2)
    assert len(seal(ledger, tmp_path)) == 2  # both batches in one shard, and the refused group
    assert bodies(ledger) == {}
    go_back(ledger, archive, 1)
    assert ledger.checkpoint == 1
    assert bodies(ledger) == {group: before[group] for group in range(4)}
    assert [path.name for path in archive.iterdir()] == ["000001_refused_00000004-00000004.parquet"]
    assert ledger.audit() == Audit(6, 0, 0)
    go_back(ledger, archive, 1)  # nothing more
    ledger.rewind()
    assert [ledger.row(group).state for group in range(4)] == ["trained", "trained", "training", "training"]  # type: ignore[union-attr]
    ledger.commit(1, "c2", {})
    ledger.checkpointed(2)
    seal(ledger, tmp_path)
    rows = [row for path in archive.iterdir() for row in pq.read_table(path).to_pylist()]
    assert sorted(row["group"] for row in rows) == sorted(2 * [0, 1, 2, 3, 4])
    assert bodies(ledger) == {}
    assert ledger.audit() == Audit(6, 0, 0)


def test_a_run_that_goes_back_holds_one_group_of_its_archive_in_memory(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger.checkpointed(2)
    ledger.shards.plan(1, ledger.checkpoint)  # a shard for each batch
    assert len(seal(ledger, tmp_path)) == 3
    back: list[int] = []

    def counted(group: Group) -> bytes:
        back.append(len(bodies(ledger)))
        return pack_group(group)

    monkeypatch.setattr(older, "pack_group", counted)
    go_back(ledger, tmp_path / "trajectories", 0)
    assert back == [0, 1, 2, 3]  # what was read before is in the ledger already
    assert len(bodies(ledger)) == 4


def test_batches_that_another_version_unlogs_are_archived_as_what_they_became(ledger: Ledger, tmp_path: Path) -> None:
    ledger.checkpointed(2)
    seal(ledger, tmp_path)
    go_back(ledger, tmp_path / "trajectories", 0)
    ledger.rewind()
    assert ledger.commit(0, "another", {})  # batch 1 is no batch any more
    assert [ledger.row(group).state for group in range(4)] == ["trained", "trained", "queued", "queued"]  # type: ignore[union-attr]
    ledger.refuse(3, "stale", "a token of version 0")
    ledger.checkpointed(1)
    seal(ledger, tmp_path)
    rows = [row for path in (tmp_path / "trajectories").iterdir() for row in pq.read_table(path).to_pylist()]
    told = {(row["group"], row["state"], row["batch"]) for row in rows}
    assert told == {(0, "trained", 0), (1, "trained", 0), (3, "refused", None), (4, "refused", None)}
    assert ledger.audit() == Audit(6, 0, 0)


@pytest.mark.parametrize("damage", ["gone", "cut", "of another run"])
def test_batches_that_are_nowhere_are_named_and_nothing_changes(ledger: Ledger, tmp_path: Path, damage: str) -> None:
    ledger.checkpointed(2)
    batches, _ = seal(ledger, tmp_path)
    file = tmp_path / "trajectories" / batches
    if damage == "of another run":
        pq.write_table(SCHEMA.empty_table(), file)
    else:
        whole = file.read_bytes()
        file.unlink()
        if damage == "cut":
            file.write_bytes(whole[:-100])
    with pytest.raises(LedgerError, match=rf"{batches}: .*cannot be trained again"):
        go_back(ledger, file.parent, 1)
    assert (ledger.checkpoint, bodies(ledger), ledger.audit()) == (2, {}, Audit(6, 0, 0))


def test_a_crash_before_the_given_up_files_are_gone_leaves_nothing_twice(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger.checkpointed(2)
    batches, _ = seal(ledger, tmp_path)
    archive = tmp_path / "trajectories"
    with monkeypatch.context() as patch:
        patch.setattr(older, "_remove_given_up", lambda *_: None)
        go_back(ledger, archive, 1)
    assert (archive / batches).is_file()
    go_back(ledger, archive, 1)
    assert not (archive / batches).exists()


def test_a_folder_that_takes_no_file_is_named_and_nothing_is_lost(ledger: Ledger, tmp_path: Path) -> None:
    (tmp_path / "trajectories").write_text("a file stands in the way")
    with pytest.raises(OSError, match=r"trajectories/000000_batches_000000-000000\.parquet: .*File exists"):
        seal(ledger, tmp_path)
    assert len(ledger.shards.unsealed()) == 2
    assert ledger.payloads([0, 1])
    assert ledger.audit() == Audit(6, 0, 0)


def test_groups_of_one_shard_may_differ_in_channels_components_and_size_and_one_that_does_not_fit_is_named() -> None:
    """Each group's rows are as they are alone; a channel of two types is the wider one."""
    facts = {"state": "trained", "reason": None, "detail": None, "batch": 0, "position": 0, "lineage": 0}
    kinds = [np.float32, np.int32]
    groups = [
        group(i, [0] * (2 + i), channels={"leaf": Channel("sample", np.array([1, 2], kinds[i % 2]))} if i < 4 else {},
              components={} if i == 2 else {f"c{i % 2}": np.array([i, 0], np.float32)})
        for i in range(6)
    ]  # fmt: skip
    broken = group(6, [0, 0, 0], times=np.zeros((1, 3)))
    left_out: dict[int, str] = {}
    told = [(facts | {"group": one.group}, one) for one in (*groups[:3], broken, *groups[3:])]
    rows = [row for part in tables("run", told, left_out) for row in part.to_pylist()]
    assert list(left_out) == [6]
    assert [row["group"] for row in rows] == [g for g in range(6) for _ in range(2)]
    alone = [row for one in told if one[1] is not broken for row in tables("run", [one], {})[0].to_pylist()]
    for row, expected in zip(rows, alone, strict=True):
        assert {name: value for name, value in row.items() if value is not None} == {
            name: value for name, value in expected.items() if value is not None
        }
