"""What a peer sends that nobody could work with: refused where it enters, and nothing durable is the worse for it."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fakes.run import B, G, Run, group
from offtrail.core.types import Channel, Problem
from offtrail.platform.broker.problems import ProblemError, Problems
from offtrail.platform.config.schema import Config
from offtrail.platform.ledger.database import LedgerError, UnfitError
from offtrail.platform.ledger.ledger import FILE, Ledger
from offtrail.platform.wire.groups import group_frames
from offtrail.platform.wire.messages import (
    Acknowledged,
    BatchReply,
    Checkpointed,
    Commit,
    Error,
    EvalResult,
    FailGroup,
    LeaseRequest,
    Leases,
    NextBatch,
    ReturnLeases,
    StopRun,
    SubmitGroup,
)

HUGE = (2**63, 2**64 - 1, -(2**63))


def vocabulary(run_dir: Path, size: int) -> None:
    """A start model's config.json, as far as the broker reads it."""
    (run_dir / "start").mkdir(parents=True)
    (run_dir / "start" / "config.json").write_text(json.dumps({"vocab_size": size}))


def payloads(run: Run) -> int:
    return int(run.broker.ledger.file.one("SELECT COUNT(*) FROM payloads"))


# ---------------------------------------------------------------------- groups that are not what was leased


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"slot": 2**63}, "slot is 9223372036854775808, the lease says 0"),
        ({"problem": Problem("t", 0, "another question", "0")}, "its problem is not problem 0 of the task"),
        ({"problem": Problem("t", 0, "0+0", "0", {"raw": b"\\xff"})}, "its problem is not problem 0 of the task"),
        ({"problem": Problem("t", 0, "0+0", "0", {"n": 1})}, "its problem is not problem 0 of the task"),
        ({"temperature": math.nan}, "sampled at temperature nan, not sampling.temperature=1.0"),
        ({"tokens": np.array([3, 4, 64], np.int32)}, "token ids span 1…64, vocabulary is 64"),
        ({"prompt_tokens": np.array([1, 64], np.int32)}, "token ids span 1…64, vocabulary is 64"),
        ({"prompt_tokens": np.ones(127, np.int32)}, "take 129 tokens, above model.max_length=128"),
        ({"times": np.full((G, 3), np.inf)}, "a time is not finite"),
        ({"rewards": np.array([np.inf, 0], np.float32)}, "not finite"),
    ],
)
def test_a_group_that_is_not_what_was_leased_is_refused_and_nothing_of_it_is_kept(
    changes: dict[str, Any], reason: str, start: Callable[..., Run], tmp_path: Path
) -> None:
    vocabulary(tmp_path / "run", 64)
    run = start(model__max_length=128)
    run.everybody()
    first, second, *_ = run.lease().leases
    ack = run.submit(first, 0, **changes)
    assert not ack.accepted
    assert ack.reason.startswith("failed: ")
    assert reason in ack.reason
    assert run.broker.ledger.tally().refused == {"failed": 1}
    assert payloads(run) == 0
    assert run.submit(second, 0).accepted
    assert run.broker.ending.status == ""


def test_the_problem_of_a_group_is_the_tasks_and_its_generator_is_who_sent_it(start: Callable[..., Run]) -> None:
    run = start()
    run.everybody()
    leases = run.lease(B).leases
    for lease in leases:
        assert run.submit(lease, 0, generator="somebody").accepted
    batch = run.ask("learner-0", NextBatch(step=0), BatchReply)
    assert [header.problem for header in batch.headers] == [lease.problem for lease in leases]
    assert {header.generator for header in batch.headers} == {"generator-0"}


def test_a_group_without_the_channel_that_the_algorithm_reads_is_refused(start: Callable[..., Run]) -> None:
    config = Config()
    config.algo.process.channel = "prm"
    run = start(algo=config.algo)
    run.everybody()
    none, wrong, right, *_ = run.lease().leases
    per_sample = {"prm": Channel("sample", np.zeros(G, np.float32))}
    per_token = {"prm": Channel("token", np.zeros(3, np.float32))}
    assert "algo.process.channel=prm: no such channel of axis step or token, but none" in run.submit(none, 0).reason
    assert "but {'prm': 'sample'}" in run.submit(wrong, 0, channels=per_sample).reason
    assert run.submit(right, 0, channels=per_token).accepted


def test_a_run_of_which_every_group_fails_ends_and_says_why(start: Callable[..., Run]) -> None:
    run = start()
    run.everybody()
    for _ in range(8):
        for lease in run.lease(B).leases:
            assert run.broker.ending.status == ""
            run.submit(lease, 0, temperature=0.5)
        run.broker.tick()
    assert run.broker.ending.status == "failed"
    assert "all 16 groups that were made have failed" in run.broker.ending.reason
    assert "the last: failed: sampled at temperature 0.5, not sampling.temperature=1.0" in run.broker.ending.reason


# ---------------------------------------------------------------------- problems that cannot be leased


def broken_task(index: int) -> Problem:
    if index == 1:
        raise KeyError("answer")
    return Problem("t", index, "p", "a", {2: {"raw": b"x"}, 3: {"n": 2**70}, 4: {"x": math.nan}}.get(index, {}))


@pytest.mark.parametrize(
    ("index", "error"), [(1, "KeyError"), (2, "TypeError"), (3, "OverflowError"), (4, "ValueError")]
)
def test_a_problem_that_neither_lease_nor_archive_can_carry_is_named(index: int, error: str) -> None:
    problems = Problems(broken_task)
    with pytest.raises(ProblemError, match=rf"problem {index} of the task cannot be leased \({error}"):
        problems(index)
    assert problems.same(0, broken_task(0))


@pytest.mark.parametrize(
    "changes", [{"meta": {1: "x"}}, {"messages": [{"role": 3}]}, {"task": None}, {"index": "x"}, {"answer": 5}]
)
def test_a_problem_that_no_generator_can_decode_is_named(changes: dict[str, Any]) -> None:
    with pytest.raises(ProblemError, match=r"problem 0 of the task cannot be leased \(ValidationError"):
        Problems(lambda i: Problem(**({"task": "t", "index": i, "prompt": "p", "answer": "a"} | changes)))(0)


def test_text_that_is_no_unicode_is_no_problem_to_lease() -> None:
    with pytest.raises(ProblemError, match="UnicodeEncodeError"):
        Problems(lambda i: Problem("t", i, "\ud800", "a"))(0)


def test_a_problem_that_cannot_be_leased_costs_its_group_and_not_the_run(start: Callable[..., Run]) -> None:
    run = start()
    run.broker.scheduler.problems = Problems(broken_task)
    run.everybody()
    assert [lease.group for lease in run.lease().leases] == [0]
    # The three places are open again: with the next problems, of which the fifth is the first that is none of these.
    assert [(lease.group, lease.slot) for lease in run.lease().leases] == [(5, 2), (6, 3)]
    assert run.broker.ledger.tally().refused == {"failed": 4}


# ---------------------------------------------------------------------- numbers beyond 64 bits


@pytest.mark.parametrize("number", HUGE)
def test_a_number_that_no_group_can_have_is_answered_and_changes_nothing(
    number: int, start: Callable[..., Run]
) -> None:
    run = start()
    run.everybody()
    lease = run.lease(1).leases[0]
    before = run.broker.ledger.tally()
    header, arrays = group_frames(group(lease, 0, group=number))
    never = f"group {number} was never admitted by this run"
    assert run.ask("generator-0", SubmitGroup(header=header), Error, arrays).error == never
    header, _ = group_frames(group(lease, 0, group=number))
    assert run.ask("generator-0", SubmitGroup(header=header), Error, arrays[:1]).error == never
    failed = FailGroup(group=number, attempt=1, reason="failed")
    assert run.ask("generator-0", failed, Error).error == never
    run.ask("generator-0", ReturnLeases(leases=[(number, number)], detail=""), Acknowledged)
    for message in (
        NextBatch(step=number),
        Commit(step=number - 1, version=number, checksum="x"),
        Checkpointed(step=number, path=""),
        EvalResult(version=number, metrics={}),
    ):
        run.send("learner-0", message)
    assert run.submit(lease, 0, attempt=number).reason.startswith("late")
    assert run.broker.ledger.tally() == before
    assert run.broker.ending.status == ""
    assert run.submit(lease, 0).accepted


def test_what_sqlite_cannot_hold_is_rolled_back_and_told(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / FILE)

    def half(then: Callable[[sqlite3.Connection], object]) -> None:
        with ledger.file.change() as db:
            db.execute("INSERT INTO meta VALUES ('half', 'done')")
            then(db)

    for value in (2**63, "\ud800", object()):
        with pytest.raises(UnfitError, match=r"ledger\.sqlite: .*; nothing was written"):
            half(lambda db, value=value: db.execute("INSERT INTO meta VALUES ('whole', ?)", (value,)))
        with pytest.raises(UnfitError):
            ledger.file.rows("SELECT * FROM groups WHERE id = ?", value)
    with pytest.raises(ZeroDivisionError):
        half(lambda _: 1 / 0)
    assert ledger.records.get("half") is None
    ledger.records.put({"it": "goes on"})
    ledger.close()


def test_what_sqlite_cannot_hold_does_not_keep_a_run_from_ending(
    start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(run__budget_seconds=1.0)
    run.everybody()
    run.make()
    run.clock.now += 2.0
    monkeypatch.setattr(run.broker.numbers, "remarks", lambda: {"time": "\ud800"})
    run.broker.tick()
    assert run.broker.ending.status == "failed"
    assert "nothing was written" in run.broker.ending.reason
    run.broker.ending.write_last_summary()
    assert run.summary()["status"] == "failed"


# ---------------------------------------------------------------------- numbers that are none


def test_counters_that_are_no_numbers_are_dropped_and_counted_and_every_later_commit_goes_on(
    start: Callable[..., Run],
) -> None:
    run = start()
    run.everybody()
    run.beat("generator", compute={"decoded_tokens": math.nan, "flops": 5.0}, seconds={"busy/x": math.inf})
    run.beat("generator", compute={"decoded_tokens": math.inf})
    run.beat("learner", compute={"decoded_tokens": -math.inf, "flops": 1e308}, gauges={"mismatch/x": math.nan})
    assert run.broker.ending.status == ""
    run.train()
    run.train()
    assert run.summary()["values_dropped"] == 6
    assert run.summary()["compute/flops"] == 5.0
    assert run.broker.ledger.records.charges() == {"generator": {"flops": 5.0}}
    again = run.restarted()
    again.train()
    assert again.broker.ending.status == ""


def test_scores_that_are_no_numbers_are_dropped_and_counted(start: Callable[..., Run]) -> None:
    run = start()
    run.everybody()
    scores = {"eval/accuracy": math.nan, "eval/length_mean": math.inf, "eval/prompts": 8.0}
    run.ask("evaluator-0", EvalResult(version=0, metrics=scores), Acknowledged)
    assert run.rows() == [{"step": 0, "eval/prompts": 8.0}]
    assert run.summary()["values_dropped"] == 2
    assert run.summary()["eval/accuracy_first"] is None


# ---------------------------------------------------------------------- the ledger's file


def test_a_ledger_that_is_gone_beside_checkpoints_is_refused(start: Callable[..., Run], tmp_path: Path) -> None:
    run = start()
    run.everybody()
    run.train()
    rows = run.rows()
    run.close()
    (tmp_path / "run" / "checkpoints" / "step_1").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / ".step_2.writing").mkdir()
    start().close()  # the ledger is there
    for emptied in (True, False):
        for path in (tmp_path / "run").glob(f"{FILE}*"):
            path.unlink()
        if emptied:
            (tmp_path / "run" / FILE).touch()
        with pytest.raises(ValueError, match=r"holds no step of this run, but checkpoints/step_1 is there; put a copy"):
            start()
        assert [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()] == rows


def test_a_damaged_ledger_is_called_damaged(start: Callable[..., Run], tmp_path: Path) -> None:
    run = start()
    run.everybody()
    run.train()
    run.close()
    path = tmp_path / "run" / FILE
    whole = path.read_bytes()
    path.write_bytes(whole[:8192] + bytes(8192) + whole[16384:])
    with pytest.raises(LedgerError, match=r"ledger\.sqlite: .*; the file is damaged; put a copy of it back"):
        start()
    path.write_bytes(b"SQLite format 3\0" + bytes(4096))
    with pytest.raises(LedgerError, match=r"ledger\.sqlite: .*; the file is damaged; put a copy of it back"):
        start()


def test_a_move_that_the_schema_refuses_is_not_called_a_full_disk(start: Callable[..., Run]) -> None:
    run = start()
    run.everybody()
    run.make()
    with pytest.raises(LedgerError, match="this is a fault of the program: please report it") as raised:
        run.broker.ledger.log_batch(0, [0, 1, 0])
    assert "free space" not in str(raised.value)


def test_a_ledger_that_another_program_holds_is_called_busy(start: Callable[..., Run], tmp_path: Path) -> None:
    run = start()
    run.everybody()
    run.broker.ledger.file.rows("PRAGMA busy_timeout = 0")
    other = sqlite3.connect(tmp_path / "run" / FILE, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    error = run.ask("generator-0", LeaseRequest(room=1), Error).error
    assert "another program holds the file; end it and go on with run.resume=true" in error
    other.close()
    again = run.restarted()
    assert again.ask("generator-0", LeaseRequest(room=1), Leases).leases
    again.ask("launcher-0", StopRun(status="interrupted"), Acknowledged)
