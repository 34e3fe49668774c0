"""The broker's answers, request by request, on a clock of the test's own: no sockets, no sleeping."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from fakes.run import B, G, Run, group, three_samples
from offtrail.core.types import Channel, ScoredBy
from offtrail.platform.broker.polls import HOLD_SECONDS
from offtrail.platform.broker.role import main
from offtrail.platform.config.errors import ConfigError
from offtrail.platform.config.schema import Config
from offtrail.platform.ledger.database import LedgerError
from offtrail.platform.ledger.ledger import FILE
from offtrail.platform.runtime.context import RoleContext
from offtrail.platform.tracking import compute
from offtrail.platform.wire.auth import make_keys
from offtrail.platform.wire.codec import decode, encode
from offtrail.platform.wire.groups import group_frames, group_from
from offtrail.platform.wire.messages import (
    Acknowledged,
    BatchReply,
    Checkpointed,
    Commit,
    Committed,
    Error,
    EvalJob,
    EvalResult,
    FailGroup,
    Failure,
    GroupAck,
    Heartbeat,
    Hello,
    LeaseRequest,
    Leases,
    Message,
    NextBatch,
    NextEval,
    NextRefresh,
    ReturnLeases,
    Status,
    StatusRequest,
    StopRun,
    SubmitGroup,
    Welcome,
)

# ---------------------------------------------------------------------- who may speak


def test_a_role_of_another_run_or_protocol_or_without_hello_is_told_so(start: Callable[..., Run]) -> None:
    run = start()
    hello = Hello(role="generator", index=0, pid=1, run="other")
    assert "run 'other' was asked for, this broker serves another" in run.ask("generator-0", hello, Error).error
    hello = Hello(role="generator", index=0, pid=1, run="run", protocol=99)
    assert "protocol 99 was spoken" in run.ask("generator-0", hello, Error).error
    assert "generator-0 has not said Hello" in run.ask("generator-0", LeaseRequest(room=1), Error).error


OWN = {
    "generator": [LeaseRequest(room=1), FailGroup(group=0, attempt=1, reason="x"), ReturnLeases(leases=[], detail="")],
    "learner": [NextBatch(step=0), Commit(step=-1, version=0, checksum="evil"), Checkpointed(step=0, path="x")],
    "evaluator": [NextEval(), EvalResult(version=0, metrics={"eval/accuracy": 9.0})],
    "launcher": [StopRun(status="completed")],
    "refresher": [NextRefresh(after=0, groups=8)],
}  # fmt: skip


@pytest.mark.parametrize("message", [message for messages in OWN.values() for message in messages], ids=repr)
def test_a_message_is_taken_only_from_the_role_whose_it_is(message: Message, start: Callable[..., Run]) -> None:
    run = start()
    run.everybody()
    run.hello("learner", 1)
    before = run.ask("x", StatusRequest(), Status)
    for role in ("launcher", "learner", "generator", "evaluator"):
        if message not in OWN[role]:
            assert f"from {role}-0: it is the " in run.ask(f"{role}-0", message, Error).error
    assert "learner-1" in run.ask("learner-1", message, Error).error
    assert "x has not said Hello" in run.ask("x", message, Error).error
    assert run.ask("x", StatusRequest(), Status) == before


def test_a_failure_is_told_by_the_role_itself_or_by_the_launcher(start: Callable[..., Run]) -> None:
    run = start()
    run.everybody()
    failure = Failure(role="learner", index=0, error="says another")
    assert "stranger has not said Hello" in run.ask("stranger", failure, Error).error
    assert "has not said Hello" in run.ask("learner-0-failure/thief/1", failure, Error).error
    assert "has not said Hello" in run.ask("stranger", Failure(role="gardener", index=0, error="x"), Error).error
    assert "each tells its own" in run.ask("generator-0", failure, Error).error
    assert run.broker.ending.status == ""
    run.ask("learner-0-failure", Failure(role="learner", index=0, error="its own"), Acknowledged)
    assert run.broker.ending.reason == "learner-0: its own"


def test_a_role_that_dies_before_its_hello_is_heard(start: Callable[..., Run]) -> None:
    run = start()
    run.hello("launcher")
    failure = Failure(role="evaluator", index=0, error="ValueError: no cuda", final=True)
    run.ask("evaluator-0-failure", failure, Acknowledged)
    assert run.broker.ending.reason == "evaluator-0: ValueError: no cuda"


@pytest.mark.parametrize("pid", [os.getpid(), os.getppid()], ids=["its process id", "another"])
def test_a_second_peer_under_the_name_of_a_living_role_does_not_take_over(pid: int, start: Callable[..., Run]) -> None:
    run = start()
    run.everybody()
    held = run.lease().leases
    assert "generator-0 has not said Hello" in run.ask("generator-0/thief/1", LeaseRequest(room=8), Error).error
    hello = Hello(role="generator", index=0, pid=pid, run="run")
    refused = run.ask("generator-0/thief/1", hello, Error).error
    assert refused == f"generator-0 is process {os.getpid()}, which is there still: a name has one process"
    launcher = Hello(role="launcher", index=3, pid=pid, run="run")
    assert "launcher-0 is process" in run.ask("launcher-0/thief/1", launcher, Error).error
    assert run.submit(held[0], 0).accepted  # by its holder, as before
    run.beat("generator")
    stranger = Heartbeat(role="generator", index=0, activity="x", waiting_on="", since=0.0, seconds={"busy/x": 1e9},
                         compute={})  # fmt: skip
    assert "has not said Hello" in run.ask("generator-0-heartbeat/thief/1", stranger, Error).error
    assert "each tells its own" in run.ask("evaluator-0", stranger, Error).error
    assert "busy/x seconds" not in run.broker.ledger.records.charges().get("generator", {})


def test_a_process_has_one_name(start: Callable[..., Run]) -> None:
    run = start()
    run.everybody()
    run.ask("launcher-0", Failure(role="evaluator", index=0, error="was killed by SIGKILL"), Acknowledged)
    hello = Hello(role="evaluator", index=0, pid=os.getpid(), run="run")
    words = "generator-0 says Hello as evaluator-0: a process has one name"
    assert run.ask("generator-0", hello, Error).error == words
    run.hello("evaluator", process="second")
    assert run.ask("generator-0", LeaseRequest(room=1), Leases).leases


def test_a_killed_process_leaves_its_name_to_the_next_one_though_nobody_told_of_its_death(
    start: Callable[..., Run],
) -> None:
    run = start()
    run.everybody()
    with subprocess.Popen(["true"]) as killed:
        pass
    run.broker.roster.members["generator-0"].pid = killed.pid
    run.hello("generator", process="second")
    assert run.lease().leases


def test_a_death_that_is_told_late_leaves_the_next_process_its_name_and_its_leases(start: Callable[..., Run]) -> None:
    run = start()
    run.everybody()
    with subprocess.Popen(["true"]) as killed:
        pass
    run.broker.roster.members["generator-0"].pid = killed.pid
    run.hello("generator", process="second")
    held = run.lease().leases
    words = "was killed by SIGKILL"
    run.ask("launcher-0", Failure(role="generator", index=0, error=words, pid=killed.pid), Acknowledged)
    assert run.submit(held[0], 0).accepted
    run.ask("launcher-0", Failure(role="generator", index=0, error=words, pid=os.getpid()), Acknowledged)
    assert "has not said Hello" in run.ask("generator-0", LeaseRequest(room=1), Error).error


def test_a_name_is_free_once_its_process_is_lost(start: Callable[..., Run]) -> None:
    run = start(broker__address="0.0.0.0")  # elsewhere a process id says nothing, its heartbeats do
    run.everybody()
    hello = Hello(role="generator", index=0, pid=os.getpid() + 1, run="run")
    assert "there still" in run.ask("generator-0/new/1", hello, Error).error
    for _ in range(7):
        run.clock.now += 1.0
        run.beat("learner")
        run.broker.tick()
    run.ask("generator-0/new/1", hello, Welcome)
    assert "has not said Hello" in run.ask("generator-0", LeaseRequest(room=1), Error).error


def test_a_process_that_says_hello_again_goes_on_with_its_charges(start: Callable[..., Run]) -> None:
    run = start()
    run.everybody()
    run.beat("generator", compute={"decoded_tokens": 5.0})
    run.hello("generator")
    run.beat("generator", compute={"decoded_tokens": 7.0})
    assert run.broker.ledger.records.charges()["generator"]["decoded_tokens"] == 7.0


@pytest.mark.parametrize("error", [ValueError("no"), KeyError("x"), OverflowError("too large"), ZeroDivisionError()])
def test_whatever_a_handler_raises_is_its_senders_answer(
    error: Exception, start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start()
    run.everybody()

    def broken(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(run.broker.scheduler, "fail", broken)
        refused = run.ask("generator-0", FailGroup(group=0, attempt=1, reason="failed"), Error).error
        assert f"{type(error).__name__}: {error}" in refused
        patch.setattr(run.broker.scheduler, "batch", broken)
        assert type(error).__name__ in run.ask("learner-0", NextBatch(step=0), Error).error
    assert run.lease().leases


@pytest.mark.parametrize("message", [
    EvalResult(version=0, metrics={"step": 7.0}),
    EvalResult(version=0, metrics={"reward/accuracy": 1.0}),
    Commit(step=0, version=1, checksum="c1", metrics={"step": 7.0}),
], ids=repr)  # fmt: skip
def test_a_row_of_metrics_keeps_its_own_names(message: Message, start: Callable[..., Run]) -> None:
    run = start()
    run.everybody()
    run.make()
    run.ask("learner-0", NextBatch(step=0), BatchReply)
    peer = "learner-0" if isinstance(message, Commit) else "evaluator-0"
    assert "named" in run.ask(peer, message, Error).error
    assert run.broker.scheduler.version == 0


def test_nobody_gets_a_lease_before_the_first_version_is_out(start: Callable[..., Run]) -> None:
    run = start()
    run.hello("generator")
    assert run.lease().waiting.startswith("version 0 from learner-0, since ")
    run.hello("learner")
    run.commit(-1, 0)
    assert run.wire.hints == [0]
    # (η+v+1)·B = 4 groups; the batches that slots 0…3 enter, 0 and 1, need version 0.
    leases = run.lease().leases
    assert [(lease.group, lease.slot, lease.min_version, lease.attempt) for lease in leases] == [
        (i, i, 0, 1) for i in range(4)
    ]
    assert [lease.problem.prompt for lease in leases] == ["0+0", "1+0", "2+0", "3+0"]
    assert {lease.samples for lease in leases} == {G}


def test_a_held_request_is_answered_by_the_event_it_waits_for(start: Callable[..., Run]) -> None:
    run = start()
    run.hello("generator")
    ticket = run.send("generator-0", LeaseRequest(room=1))
    assert ticket not in run.wire.replies
    run.hello("learner")
    run.commit(-1, 0)
    run.broker.serve_held()
    assert len(run.reply(ticket, Leases).leases) == 1


# ---------------------------------------------------------------------- groups


def test_a_batch_carries_its_groups_bit_for_bit_with_the_brokers_stamp(start: Callable[..., Run]) -> None:
    run = start()
    run.everybody()
    leases = run.lease().leases
    for lease in reversed(leases):
        assert run.submit(lease, 0) == GroupAck(group=lease.group, accepted=True)
    ticket = run.send("learner-0", NextBatch(step=0))
    reply, arrays = run.wire.replies[ticket]
    assert isinstance(reply, BatchReply)
    assert [header.slot for header in reply.headers] == [0, 1]  # slot order, though they came in reverse
    first = group_from(reply.headers[0], [np.asarray(a) for a in arrays[: len(arrays) // 2]])
    np.testing.assert_array_equal(first.tokens, [3, 4, 5])
    assert (first.queued_version, first.problem) == (0, leases[0].problem)
    assert first.queued_at > 0
    again = run.ask("learner-0", NextBatch(step=0), BatchReply)  # its reply was lost
    assert again == reply


def test_the_next_batch_may_be_asked_for_while_one_trains(start: Callable[..., Run]) -> None:
    run = start()
    run.everybody()
    leases = run.make()  # batches 0 and 1, of version 0
    ask = {step: NextBatch(step=step) for step in range(3)}
    assert "newest version is 0" in run.ask("learner-0", ask[1], Error).error  # batch 0 does not train yet
    run.ask("learner-0", ask[0], BatchReply)
    ahead = run.ask("learner-0", ask[1], BatchReply)
    assert [header.group for header in ahead.headers] == [lease.group for lease in leases[B:]]
    assert "newest version is 0" in run.ask("learner-0", ask[2], Error).error
    run.commit(0, 1)
    # Batch 2 is asked for while batch 1 trains; a token of version 2, which is not committed yet, keeps it waiting.
    for lease, version in zip(run.lease().leases, (1, 2), strict=True):
        assert run.submit(lease, version).accepted
    ticket = run.send("learner-0", ask[2])
    run.broker.serve_held()
    assert ticket not in run.wire.replies
    run.commit(1, 2)
    run.broker.serve_held()
    assert len(run.reply(ticket, BatchReply).headers) == B


def test_who_asks_ahead_waits_only_once_it_has_nothing_to_train(start: Callable[..., Run]) -> None:
    run = start()
    run.everybody()
    run.make(B)
    run.ask("learner-0", NextBatch(step=0), BatchReply)
    ahead = run.ask("learner-0", NextBatch(step=1), BatchReply)  # held for a second while batch 0 trains
    assert "batch 1: 0 of its 2 groups are here" in ahead.waiting
    assert "since" not in ahead.waiting
    run.send("learner-0", NextBatch(step=1))
    assert "learner-0" not in run.broker.polls.waits
    run.clock.now += 0.5
    run.commit(0, 1)
    run.broker.serve_held()
    assert run.broker.polls.waits["learner-0"].since == run.clock.now
    run.clock.now += HOLD_SECONDS
    assert "since" in run.ask("learner-0", NextBatch(step=1), BatchReply).waiting


def test_a_replay_is_not_handed_out_ahead(start: Callable[..., Run]) -> None:
    run = start()
    run.everybody()
    run.train(checkpoint=False)
    run.train(checkpoint=False)
    run = run.restarted()
    assert run.ask("learner-0", NextBatch(step=0), BatchReply).replay
    ticket = run.send("learner-0", NextBatch(step=1))
    run.broker.serve_held()
    assert ticket not in run.wire.replies
    run.commit(0, 1, "another")  # it differs: what was logged after it is logged anew
    run.broker.serve_held()
    assert len(run.reply(ticket, BatchReply).headers) == B


def test_late_repeated_and_wrong_submissions(start: Callable[..., Run]) -> None:
    run = start()
    run.everybody()
    first, second = run.lease().leases[:2]
    assert run.submit(first, 0).accepted
    assert run.submit(first, 0).accepted  # its acknowledgement was lost
    run.hello("generator")  # restarted: what it had goes back
    assert "late: attempt 1 of group 1 is over" in run.submit(second, 0).reason
    again = run.lease().leases
    assert [(lease.group, lease.slot, lease.attempt) for lease in again] == [(1, 1, 2), (2, 2, 2), (3, 3, 2)]
    assert not run.submit(second, 0).accepted  # still the old attempt
    assert run.submit(again[0], 0).accepted
    assert "failed: samples is 3" in run.submit(again[1], 0, **three_samples()).reason
    assert "failed: sampled at temperature 0.7" in run.submit(again[2], 0, temperature=0.7).reason
    ack = run.ask("generator-0", FailGroup(group=99, attempt=1, reason="failed"), Error)
    assert "group 99 was never admitted" in ack.error
    tally = run.broker.ledger.tally()
    assert (tally.queued, tally.leased, dict(tally.refused)) == (2, 0, {"failed": 2})
    # The refused slots 2 and 3 are filled again, with new groups and the next problems.
    fresh = run.lease().leases
    assert [(lease.group, lease.slot, lease.problem.index) for lease in fresh] == [(4, 2, 4), (5, 3, 5)]
    for lease, reason in zip(fresh, ("filtered", "bored"), strict=True):
        message = FailGroup(group=lease.group, attempt=1, reason=reason, detail="why")
        assert not run.ask("generator-0", message, GroupAck).accepted
    # A reason that is not one of the named ones counts as failed.
    assert run.broker.ledger.tally().refused == {"failed": 3, "filtered": 1}


def test_broken_arrays_refuse_the_group_and_not_the_run(start: Callable[..., Run]) -> None:
    run = start()
    run.everybody()
    lease = run.lease(1).leases[0]
    header, arrays = group_frames(group(lease, 0))
    arrays[3] = np.full(3, np.nan, np.float32)
    ack = run.ask("generator-0", SubmitGroup(header=header), GroupAck, arrays)
    assert not ack.accepted
    assert "log-probability is not finite" in ack.reason
    assert run.broker.ending.status == ""
    assert run.broker.ledger.tally().refused == {"failed": 1}


def test_tokens_older_than_the_bound_are_refused_as_stale_on_arrival(start: Callable[..., Run]) -> None:
    run = start()
    run.everybody()
    run.train()
    leases = run.lease().leases  # slots 4, 5 of batch 2, which needs version 1
    assert [(lease.slot, lease.min_version) for lease in leases] == [(4, 1), (5, 1)]
    assert run.submit(leases[0], 0).reason == "stale: a token of version 0, but the lease needs 1 or newer"
    assert run.submit(leases[1], 1).accepted


def test_completion_order_drops_stale_groups_at_dequeue_and_starving_fails_by_name(start: Callable[..., Run]) -> None:
    run = start(staleness__on_violation="drop", staleness__max=1, staleness__max_refusals=2, learner__steps=9)
    run.everybody()
    old = run.lease().leases
    for lease in old[:2]:
        run.submit(lease, 0)
    for step in (0, 1):
        assert len(run.ask("learner-0", NextBatch(step=step), BatchReply).headers) == B
        run.commit(step, step + 1)
        for lease in run.lease(2).leases:
            run.submit(lease, step + 1)
    for lease in old[2:]:
        run.submit(lease, 0)  # two versions old by now: batch 2 takes 1 or newer
    run.ask("learner-0", NextBatch(step=2), BatchReply)
    assert run.broker.ledger.tally().refused == {"stale": 2}
    run.broker.tick()
    assert run.broker.ending.status == "failed"
    assert (
        "staleness.max_refusals=2: 2 groups were refused since the last learner step, 2 of them as stale"
        in run.broker.ending.reason
    )
    assert run.summary()["status"] == "failed"


def test_exact_mode_grants_whole_waves_in_slot_order(start: Callable[..., Run]) -> None:
    run = start(staleness__mode="exact", staleness__max=1)
    run.everybody()
    first, second = run.lease(1).leases, run.lease(1).leases
    assert [[(lease.slot, lease.wave, lease.exact_version) for lease in leases] for leases in (first, second)] == [
        [(0, 0, 0), (1, 0, 0)], [(2, 1, 0), (3, 1, 0)],
    ]  # fmt: skip
    assert run.submit(first[0], 0).accepted
    run.ask("generator-0", FailGroup(group=first[1].group, attempt=1, reason="failed"), GroupAck)
    [refill] = run.lease().leases
    assert (refill.group, refill.slot, refill.wave, refill.exact_version) == (4, 1, 0, 0)
    assert run.submit(refill, 0).accepted
    run.ask("learner-0", NextBatch(step=0), BatchReply)
    run.commit(0, 1)
    assert run.submit(second[0], 1).reason.startswith("stale: a token of version 1, but staleness.mode=exact needs")
    third = run.lease().leases
    assert {(lease.wave, lease.exact_version) for lease in third} == {(2, 1)}


def test_exact_mode_makes_an_interrupted_wave_again_whole(start: Callable[..., Run]) -> None:
    """Of wave 0 one group had arrived when its generator was killed: it is made again too, as another attempt."""
    run = start(staleness__mode="exact", staleness__max=1)
    run.everybody()
    wave, other = run.lease().leases, run.lease().leases
    assert run.submit(wave[0], 0).accepted
    run.ask("launcher-0", Failure(role="generator", index=0, error="was killed by SIGKILL"), Acknowledged)
    run.hello("generator", process="second")
    again = run.lease().leases
    assert [(lease.group, lease.slot, lease.wave, lease.attempt) for lease in again] == [(0, 0, 0, 2), (1, 1, 0, 2)]
    assert [(lease.group, lease.attempt) for lease in run.lease().leases] == [(lease.group, 2) for lease in other]
    assert not run.submit(wave[0], 0).accepted  # of the attempt that is over
    assert all(run.submit(lease, 0).accepted for lease in again)
    batch = run.ask("learner-0", NextBatch(step=0), BatchReply)
    assert [header.attempt for header in batch.headers] == [2, 2]
    audit = run.broker.ledger.audit()
    assert (audit.admitted, audit.lost, audit.duplicated) == (4, 0, 0)


def test_exact_mode_never_cuts_a_wave_in_two(start: Callable[..., Run]) -> None:
    run = start(staleness__mode="exact", staleness__max=1, generator__max_in_flight=3)
    run.everybody()
    first = run.lease().leases
    assert [lease.slot for lease in first] == [0, 1]
    # Room for one more in flight, but wave 1 is two groups.
    assert run.lease().waiting.startswith("one of 2 groups in flight (generator-0: 2) to finish")
    run.submit(first[0], 0)
    assert [lease.slot for lease in run.lease().leases] == [2, 3]


# ---------------------------------------------------------------------- lost roles and deadlines


def test_what_comes_back_from_a_lost_generator_does_not_go_to_the_poll_that_it_left(start: Callable[..., Run]) -> None:
    run = start()
    run.everybody()
    leased = run.lease(room=8).leases
    held = run.send("generator-0", LeaseRequest(room=8))
    for _ in range(6):
        run.clock.now += 1.0
        run.broker.tick()
    assert {row.holder for row in run.broker.ledger.leased()} == {""}
    run.broker.serve_held()
    assert not run.reply(held, Leases).leases
    assert [lease.group for lease in run.lease(room=8).leases] == [lease.group for lease in leased]  # it is here again


def test_a_lease_outlives_a_long_answer_and_ends_with_lost_heartbeats(start: Callable[..., Run]) -> None:
    run = start(generator__count=2)
    run.everybody()
    run.hello("generator", 1)
    mine = run.lease().leases
    assert len(mine) == 2  # its share of 4
    for _ in range(60):  # an hour of decoding, heartbeats all the while
        run.clock.now += 1.0
        run.beat("generator", 0)
        run.beat("generator", 1)
        run.broker.tick()
    assert {row.holder for row in run.broker.ledger.leased()} == {"generator-0"}
    for _ in range(6):
        run.clock.now += 1.0
        run.beat("generator", 1)
        run.broker.tick()
    other = run.lease(peer="generator-1").leases
    assert [(lease.group, lease.attempt) for lease in other[:2]] == [(0, 2), (1, 2)]
    assert not run.submit(mine[0], 0).accepted
    assert run.submit(other[0], 0, peer="generator-1").accepted


def test_leases_that_their_holder_returns_are_issued_again_and_nothing_is_refused(start: Callable[..., Run]) -> None:
    run = start()
    run.everybody()
    first, *others = run.lease().leases
    late = (others[0].group, others[0].attempt - 1)
    run.ask("generator-0", ReturnLeases(leases=[(first.group, 1), late], detail="its server died"), Acknowledged)
    assert [row.id for row in run.broker.ledger.returned()] == [first.group]
    again = run.lease().leases[0]
    assert (again.group, again.slot, again.attempt) == (first.group, first.slot, 2)
    assert not run.submit(first, 0).accepted
    assert run.submit(again, 0).accepted
    assert run.broker.ledger.tally().refused == {}


def test_a_broker_that_was_stopped_itself_blames_nobody(start: Callable[..., Run]) -> None:
    run = start()
    run.everybody()
    run.lease()
    run.broker.tick()
    run.clock.now += 3600.0
    run.broker.tick()
    assert {row.holder for row in run.broker.ledger.leased()} == {"generator-0"}
    assert run.broker.ending.status == ""


def stand_still(run: Run, seconds: float, *roles: str) -> None:
    for _ in range(int(seconds)):
        run.clock.now += 1.0
        for role in roles:
            run.beat(role)
        run.broker.tick()


def test_a_wait_with_no_progress_fails_the_run_with_who_what_whom_and_since_when(start: Callable[..., Run]) -> None:
    run = start(broker__deadline_seconds=20.0)
    run.everybody()
    run.beat("generator")
    run.lease()
    run.send("learner-0", NextBatch(step=0))
    stand_still(run, 19, "learner", "generator", "evaluator")
    assert run.broker.ending.status == ""
    run.send("learner-0", NextBatch(step=0))  # a role asks again and again: the wait is one
    stand_still(run, 4, "learner", "generator", "evaluator")
    assert run.broker.ending.status == "failed"
    assert (
        "learner-0 waits for batch 0: 0 of its 2 groups are here, 4 in flight (generator-0: 4), since "
        in run.broker.ending.reason
    )
    assert "broker.deadline_seconds=20" in run.broker.ending.reason
    assert "generator-0 busy/x" in run.broker.ending.reason
    assert run.ask("learner-0", NextBatch(step=0), BatchReply).stop


def test_tokens_that_flow_are_progress(start: Callable[..., Run]) -> None:
    run = start(broker__deadline_seconds=20.0)
    run.everybody()
    run.lease()
    run.send("learner-0", NextBatch(step=0))
    for tokens in range(60):
        run.clock.now += 1.0
        run.beat("generator", compute={"decoded_tokens": float(tokens)})
        run.beat("learner")
        run.broker.tick()
    assert run.broker.ending.status == ""


def test_a_version_that_is_loaded_for_ever_fails_the_run_though_its_reader_beats_and_others_move(
    start: Callable[..., Run],
) -> None:
    run = start(broker__deadline_seconds=20.0, generator__count=2)
    run.everybody()
    run.hello("generator", 1)

    def seconds(count: int, since: float) -> None:
        for second in range(count):
            run.clock.now += 1.0
            run.beat("generator", 0, activity="busy/load_weights", since=since)
            run.beat("generator", 1, compute={"decoded_tokens": since + second})  # progress all the time
            run.broker.tick()

    seconds(19, since=100.0)
    seconds(19, since=200.0)  # another version: its deadline begins anew
    run.beat("generator", 0, activity="busy/decode", since=300.0)
    run.broker.tick()
    seconds(19, since=200.0)
    assert run.broker.ending.status == ""
    seconds(3, since=200.0)
    assert run.broker.ending.status == "failed"
    assert run.broker.ending.reason.startswith(
        "generator-0 loads weights (version 0 is the newest), for longer than broker.deadline_seconds=20; see its log"
    )
    assert "weights.channel=shm" in run.broker.ending.reason


def test_a_role_that_never_dials_is_named(start: Callable[..., Run]) -> None:
    run = start(broker__deadline_seconds=20.0)
    run.hello("learner")
    run.hello("generator")
    stand_still(run, 22, "learner", "generator")
    assert "the broker waits for evaluator-0 to dial" in run.broker.ending.reason


def test_a_killed_generators_leases_go_to_the_next_one_and_its_restart_is_counted(start: Callable[..., Run]) -> None:
    run = start()
    run.everybody()
    first = run.lease().leases
    assert len(first) == 4
    run.ask("launcher-0", Failure(role="generator", index=0, error="was killed by SIGKILL"), Acknowledged)
    assert (run.broker.ending.status, run.broker.ending.failures) == ("", [])
    assert "has not said Hello" in run.ask("generator-0", LeaseRequest(room=1), Error).error
    for _ in range(2):  # its welcome was lost: the same process says Hello again
        run.hello("generator", process="second")
    second = run.lease().leases
    assert [(lease.group, lease.attempt) for lease in second] == [(lease.group, 2) for lease in first]
    assert run.submit(second[0], 0).accepted
    late = run.submit(first[1], 0)
    assert not late.accepted
    assert late.reason.startswith("late: attempt 1")
    run.ask("launcher-0", StopRun(status="interrupted", reason=""), Acknowledged)
    assert run.summary()["restarts"] == {"generator-0": 1}
    again = run.again()
    again.everybody()
    again.ask("launcher-0", Failure(role="evaluator", index=0, error="was killed by SIGKILL"), Acknowledged)
    again.hello("evaluator", process="second")
    again.ask("launcher-0", StopRun(status="interrupted", reason=""), Acknowledged)
    assert again.summary()["restarts"] == {"generator-0": 1, "evaluator-0": 1}


def test_a_killed_evaluators_version_is_given_to_the_next_one(start: Callable[..., Run]) -> None:
    run = start()
    run.everybody()
    assert run.ask("evaluator-0", NextEval(), EvalJob).version == 0
    run.ask("launcher-0", Failure(role="evaluator", index=0, error="was killed by SIGKILL"), Acknowledged)
    run.hello("evaluator", process="second")
    assert run.ask("evaluator-0", NextEval(), EvalJob).version == 0


def test_what_waited_for_a_score_when_a_run_was_stopped_waits_on_where_it_lies(start: Callable[..., Run]) -> None:
    run = start(learner__steps=6)  # eval.every = 2
    run.everybody()
    for _ in range(5):
        run.train(checkpoint=run.broker.scheduler.version < 3)
    run.ask("evaluator-0", EvalResult(version=4, metrics={"eval/accuracy": 0.4}), Acknowledged)
    run = run.again(learner__steps=6)
    run.hello("evaluator")
    assert run.ask("evaluator-0", NextEval(), EvalJob).version == -1  # the weight channel is not there yet
    run.everybody()  # the learner begins from version 3 again, and makes version 4 again
    for version, left in ((0, [0, 2]), (2, [2])):
        expected = EvalJob(version=version, stored=f"c{version}")
        assert run.ask("evaluator-0", NextEval(), EvalJob) == expected
        again = run.ask("learner-0", Commit(step=-1, version=3, checksum="c3"), Committed)
        assert again.spared == left  # no checkpoint of these is pruned
        run.ask("evaluator-0", EvalResult(version=version, metrics={"eval/accuracy": 0.1 * version}), Acknowledged)
    assert run.ask("evaluator-0", NextEval(), EvalJob).waiting.startswith("version 4 from learner-0")
    assert run.summary()["eval/accuracy_first"] == 0.0
    assert "eval/unscored" not in run.summary()
    assert run.ask("learner-0", NextBatch(step=3), BatchReply).replay
    run.commit(3, 4)
    assert run.ask("evaluator-0", NextEval(), EvalJob) == EvalJob(version=4)


def test_a_version_that_no_checkpoint_holds_any_more_is_named_and_holds_nobody_up(start: Callable[..., Run]) -> None:
    run = start(learner__steps=4)
    run.everybody()
    for _ in range(3):
        run.train()
    run = run.restarted(eval__waiting_mb=1, learner__steps=4)
    assert run.broker.evaluations.behind(3, 3) == ""  # what lies in a checkpoint takes none of eval.waiting_mb
    run.train()
    held = run.ask("evaluator-0", EvalResult(version=4, metrics={}, lost="cut"), Error).error
    assert held == "version 4 was given up, but it is none that lies in a checkpoint"
    for version in (0, 4):
        assert run.broker.ending.status == ""
        run.ask("evaluator-0", EvalResult(version=version, metrics={"eval/accuracy": 0.5}), Acknowledged)
    assert run.broker.ending.status == ""
    assert run.ask("evaluator-0", NextEval(), EvalJob).version == 2
    run.ask("evaluator-0", EvalResult(version=2, metrics={}, lost="checkpoints/step_2 is not there"), Acknowledged)
    assert (run.broker.ending.status, run.summary()["eval/unscored"]) == ("completed", [2])
    assert [row["step"] for row in run.rows() if "eval/accuracy" in row] == [0, 4]


@pytest.mark.parametrize(
    ("role", "final", "restarts"), [("generator", True, 3), ("generator", False, 0), ("learner", False, 3)]
)
def test_a_role_that_no_start_would_cure_or_that_has_none_ends_the_run_with_its_words(
    role: str, final: bool, restarts: int, start: Callable[..., Run]
) -> None:
    run = start(generator__max_restarts=restarts)
    run.everybody()
    run.make()
    run.ask(f"{role}-0", Failure(role=role, index=0, error="ValueError: no", final=final), Acknowledged)
    assert run.beat("learner").stop
    status = run.ask("launcher-0", StatusRequest(), Status)
    assert (status.failures[0].error, status.finished) == ("ValueError: no", False)
    summary = run.summary()
    assert (summary["status"], summary["reason"], summary["groups/in_flight"]) == (
        "failed",
        f"{role}-0: ValueError: no",
        4,
    )


# ---------------------------------------------------------------------- a whole run


def test_every_role_hears_when_the_last_version_is_out(start: Callable[..., Run]) -> None:
    run = start()
    run.everybody()
    for _ in range(3):
        assert not run.beat("evaluator").trained
        run.train()
    assert (run.beat("evaluator").trained, run.beat("evaluator").stop) == (True, False)  # three wait for their score


def test_a_run_completes_when_its_last_version_is_trained_checkpointed_and_scored(start: Callable[..., Run]) -> None:
    run = start()
    run.everybody()
    for step in range(3):
        run.train(**{"reward/accuracy": 0.25 * step, "weights/publish_seconds": 0.5})
    over = run.ask("learner-0", NextBatch(step=3), BatchReply)
    assert (over.finished, over.stop) == (True, False)  # the last checkpoint and evaluation are still to come
    assert "all groups of its 3 steps are admitted" in run.lease().waiting
    assert run.broker.ending.status == ""
    for version in (0, 2, 3):  # eval.every = 2, and the last
        assert run.broker.ending.status == ""
        assert run.ask("evaluator-0", NextEval(), EvalJob).version == version
        result = EvalResult(version=version, metrics={"eval/accuracy": 0.1 * version})
        run.ask("evaluator-0", result, Acknowledged)
    assert run.broker.ending.status == "completed"
    assert run.ask("evaluator-0", NextEval(), EvalJob).stop
    assert run.lease().stop
    assert run.ask("learner-0", NextBatch(step=3), BatchReply).stop
    run.finish_archive()
    assert run.ask("launcher-0", StatusRequest(), Status).finished
    summary = run.summary()
    expected: dict[str, Any] = {
        "status": "completed", "steps": 3, "eval/accuracy_first": 0.0, "eval/accuracy_last": pytest.approx(0.3),
        "reward/accuracy_first": 0.0, "reward/accuracy_last": 0.5, "groups/admitted": 6, "groups/trained": 6,
        "groups/in_flight": 0, "groups/lost": 0, "groups/duplicated": 0, "staleness/max": 1.0,
        # Batch 0 is fresh; slots 2, 3 were made at version 0 and 4, 5 at version 1: one version old when trained.
        "staleness/mean": pytest.approx(2 / 3), "staleness/stale_token_share": pytest.approx(2 / 3),
        "tokens/generated": 18, "tokens/trained": 18, "weights/publish_seconds_mean": 0.5, "seed": 0,
    }  # fmt: skip
    assert {key: summary[key] for key in expected} == expected
    assert summary["groups/refused"] == dict.fromkeys(
        ("stale", "filtered", "failed", "unscored", "superseded", "run_ended"), 0
    )
    for key in ("wall_seconds", "learner/busy_fraction", "generator/busy_fraction", "versions", "git_commit"):
        assert key in summary
    assert [(row["step"], row.get("eval/accuracy")) for row in run.rows()] == [
        (0, 0.0), (1, None), (2, pytest.approx(0.2)), (3, pytest.approx(0.3)),
    ]  # fmt: skip
    shards = [pq.read_table(path).to_pylist() for path in (run.run_dir / "trajectories").iterdir()]
    assert sorted(row["group"] for rows in shards for row in rows) == [i for i in range(6) for _ in range(G)]


# ---------------------------------------------------------------------- budgets


def test_a_spent_budget_ends_the_run_after_the_batch_in_training_with_its_checkpoint_and_evaluation(
    start: Callable[..., Run],
) -> None:
    run = start(learner__steps=9, run__budget_flops=100.0, staleness__max=2, eval__every=0)
    run.everybody()
    leases = run.lease().leases  # (η+v+1)·B = 6: batches 0, 1 and 2
    for lease in leases[:5]:
        run.submit(lease, 0)
    for step in (0, 1):  # batch 1 is handed out ahead
        assert run.ask("learner-0", NextBatch(step=step), BatchReply).headers
    run.beat("generator", compute={"flops": 60.0, "decoded_tokens": 15.0})
    run.beat("learner", compute={"train_flops": 30.0, "prox_flops": 9.0, "trained_tokens": 6.0})
    run.broker.tick()
    assert run.broker.ledger.last == 9  # 99 of 100
    run.beat("evaluator", compute={"flops": 1.0}, seconds={"busy/evaluate": 2.0})
    assert run.commit(0, 1).evaluate  # the version of the batch in training is the last one: to be pinned
    assert run.broker.ledger.last == 2
    assert run.lease().waiting.startswith("the end of the run: all groups of its 2 steps are admitted, since ")
    run.commit(1, 2)
    over = run.ask("learner-0", NextBatch(step=2), BatchReply)
    assert (over.finished, over.stop) == (True, False)
    for version in (0, 2):
        assert run.ask("evaluator-0", NextEval(), EvalJob).version == version
        result = EvalResult(version=version, metrics={"eval/accuracy": 0.1 * version})
        run.ask("evaluator-0", result, Acknowledged)
    assert run.broker.ending.status == ""
    run.ask("learner-0", Checkpointed(step=2, path="step_2"), Acknowledged)
    run.finish_archive()
    summary = run.summary()
    expected: dict[str, Any] = {
        "status": "completed", "reason": "run.budget_flops=100: 100 FLOPs are spent, the last step is 2", "steps": 2,
        "groups/admitted": 6, "groups/trained": 4, "groups/in_flight": 0, "groups/lost": 0, "groups/duplicated": 0,
        "budget/flops": 1.0, "compute/flops": 100.0, "compute/busy_seconds": 2.0, "compute/learner_train_flops": 30.0,
        "eval/accuracy_last": pytest.approx(0.2),
    }  # fmt: skip
    assert {key: summary[key] for key in expected} == expected
    assert summary["groups/refused"]["run_ended"] == 2  # one queued, one leased
    assert not {"budget/tokens", "budget/seconds", "compute/cold_start_flops"} & summary.keys()


def test_a_budget_that_is_spent_while_the_learner_waits_ends_the_run_with_the_newest_version(
    start: Callable[..., Run],
) -> None:
    """Nobody knew at its commit that it is the last: it reaches the evaluator once it is pinned."""
    run = start(learner__steps=9, run__budget_tokens=40, eval__every=0)
    run.everybody()
    run.train(checkpoint=False)  # slots 0…3 are made, 0 and 1 trained: batch 1 is there
    assert run.ask("learner-0", NextBatch(step=1), BatchReply).headers
    run.commit(1, 2)
    held = run.send("learner-0", NextBatch(step=2))
    run.ask("evaluator-0", EvalResult(version=0, metrics={"eval/accuracy": 0.0}), Acknowledged)
    waiting = run.send("evaluator-0", NextEval())
    run.beat("generator", compute={"decoded_tokens": 41.0})
    run.broker.tick()
    run.clock.now += HOLD_SECONDS
    run.broker.serve_held()
    assert run.reply(held, BatchReply).finished
    assert run.reply(waiting, EvalJob).waiting.startswith("version 2 from learner-0, since ")
    run.evaluate = True
    run.commit(1, 2)  # again, pinned
    assert run.ask("evaluator-0", NextEval(), EvalJob).version == 2
    run.ask("learner-0", Checkpointed(step=2, path="step_2"), Acknowledged)
    run.ask("evaluator-0", EvalResult(version=2, metrics={"eval/accuracy": 0.5}), Acknowledged)
    summary = run.summary()
    assert (summary["status"], summary["steps"], summary["groups/trained"]) == ("completed", 2, 2 * B)
    assert summary["reason"] == "run.budget_tokens=40: 41 tokens are spent, the last step is 2"
    assert summary["groups/in_flight"] == 0


def test_a_run_that_is_killed_after_its_budget_was_spent_ends_at_the_same_step(start: Callable[..., Run]) -> None:
    changes = {"learner__steps": 9, "run__budget_seconds": 50.0, "eval__every": 0}
    run = start(**changes)
    run.everybody()
    run.train(checkpoint=True)
    assert run.ask("learner-0", NextBatch(step=1), BatchReply).headers
    run.clock.now += 60.0
    run.broker.tick()
    assert run.broker.ledger.last == 2
    run = run.restarted(**changes)  # killed: no second of this life has passed, those of the last one are counted
    assert run.broker.ledger.last == 2
    assert run.ask("learner-0", NextBatch(step=1), BatchReply).replay
    run.commit(1, 2)
    assert run.ask("learner-0", NextBatch(step=2), BatchReply).finished
    run.ask("learner-0", Checkpointed(step=2, path="step_2"), Acknowledged)
    for version in (0, 2):
        run.ask("evaluator-0", EvalResult(version=version, metrics={"eval/accuracy": 0.5}), Acknowledged)
    assert run.summary()["reason"] == "run.budget_seconds=50: 60 seconds are spent, the last step is 2"
    run.finish_archive()
    again = run.restarted(**changes)
    assert again.broker.ending.status == "completed"  # there is nothing left to spend
    more = again.restarted(**(changes | {"run__budget_seconds": 500.0}))
    assert (more.broker.ending.status, more.broker.ledger.last) == ("", 9)
    more.train()
    summary = more.summary()
    assert (summary["groups/trained"], summary["groups/lost"], "reason" in summary) == (3 * B, 0, False)


def test_a_replay_that_differs_under_a_spent_budget_ends_with_what_is_still_logged(start: Callable[..., Run]) -> None:
    """Else the run would wait for batches that nobody makes any more."""
    changes = {"learner__steps": 9, "run__budget_tokens": 10, "eval__every": 0}
    run = start(**changes)
    run.everybody()
    run.make()
    for step in (0, 1):
        run.ask("learner-0", NextBatch(step=step), BatchReply)
        run.commit(step, step + 1)
        run.make()
    run.ask("learner-0", NextBatch(step=2), BatchReply)
    run.beat("generator", compute={"decoded_tokens": 10.0})
    run.broker.tick()
    assert run.broker.ledger.last == 3
    run = run.restarted(**changes)
    run.ask("learner-0", NextBatch(step=0), BatchReply)
    assert run.commit(0, 1, checksum="another").diverged
    assert run.broker.ledger.last == 1
    assert run.ask("learner-0", NextBatch(step=1), BatchReply).finished


def test_the_cold_start_is_counted_where_its_compute_is_written_down(tmp_path: Path) -> None:
    start_dir = tmp_path / "run" / "start"
    start_dir.mkdir(parents=True)
    compute.save(start_dir, {"compute/flops": 70.0, "compute/busy_seconds": 3.0, "tokens/trained": 11, "status": "x"})
    run = Run(tmp_path / "run", learner__steps=9, run__budget_flops=100.0)
    run.everybody()
    run.beat("learner", compute={"train_flops": 29.0})
    run.broker.tick()
    assert run.broker.ledger.last == 9
    run.beat("learner", compute={"train_flops": 30.0})
    run.broker.tick()
    assert run.broker.ledger.last == 0  # no batch was begun
    run.broker.ending.write_summary()
    summary = run.summary()
    assert (summary["compute/flops"], summary["compute/busy_seconds"]) == (100.0, 3.0)
    assert (summary["compute/cold_start_flops"], summary["compute/cold_start_tokens"]) == (70.0, 11.0)
    run.close()
    (start_dir / compute.FILE).write_text('{"flops": 1}')
    with pytest.raises(
        ValueError, match=r"start/compute\.json: is not what a cold start writes \(KeyError\('busy_seconds"
    ):
        Run(tmp_path / "run")


def test_a_cold_start_that_nobody_counted_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "run" / "start").mkdir(parents=True)
    run = Run(tmp_path / "run")
    assert "start/compute.json is missing: the cold start is not counted in compute/*" in caplog.text
    assert "compute/cold_start_flops" not in run.broker.ending.summary
    run.close()


def test_the_brokers_part_of_a_steps_metrics_by_hand(start: Callable[..., Run]) -> None:
    run = start()
    run.everybody()
    for role in ("learner", "generator"):
        run.beat(role, seconds={"busy/train": 1.0, "waiting/batch": 1.0})
    run.make()
    run.clock.now += 4.0
    run.commit(-1, 0)  # a repetition: the clock of the step goes on
    run.beat("learner", seconds={"busy/train": 4.0, "waiting/batch": 2.0}, compute={"trained_tokens": 6.0})
    run.beat("generator", seconds={"busy/train": 3.0, "waiting/batch": 1.0}, compute={"decoded_tokens": 12.0})
    run.ask("learner-0", NextBatch(step=0), BatchReply)
    run.commit(0, 1, loss=2.0)
    [row] = run.rows()
    expected = {
        "step": 1, "loss": 2.0, "queue/groups": 2.0, "queue/leased": 0.0, "queue/refused": 0.0,
        # 2 groups of 3 tokens trained and 4 of 3 made, in 4 seconds
        "throughput/trained_tokens_per_second": 1.5, "throughput/generated_tokens_per_second": 3.0,
        "throughput/samples_per_second": 1.0, "time/step_seconds": 4.0,
        "time/learner_busy": 0.75, "time/learner_waiting_batch": 0.25, "time/generator_busy": 0.5,
        "staleness/max": 0.0, "staleness/in_flight_mean": 0.0, "staleness/in_queue_mean": 0.0,
        "compute/learner_trained_tokens": 6.0, "compute/generator_decoded_tokens": 12.0,
        "compute/learner_busy_train_seconds": 4.0,
    }  # fmt: skip
    assert {key: row[key] for key in expected} == expected
    assert run.summary()["learner/busy_fraction"] == 0.75
    run.make()
    run.ask("learner-0", NextBatch(step=1), BatchReply)
    run.clock.now += 2.0
    run.commit(1, 2)
    # Slots 2 and 3 were made and queued at version 0: one version old, all of it in the queue.
    row = run.rows()[-1]
    assert (row["staleness/in_flight_mean"], row["staleness/in_queue_mean"], row["staleness/mean"]) == (0.0, 1.0, 1.0)
    assert row["time/learner_busy"] == 0.75  # no heartbeat since: the last shares stand
    # 2 groups of 3 tokens trained, and 2 made (slots 4, 5), in 2 seconds
    assert row["throughput/trained_tokens_per_second"] == row["throughput/generated_tokens_per_second"] == 3.0


def test_a_run_that_does_not_move_says_so_in_its_status_and_summary_also_after_a_restart(
    start: Callable[..., Run], caplog: pytest.LogCaptureFixture
) -> None:
    run = start(learner__steps=3)
    run.everybody()
    assert run.summary()["warnings"] == []
    for _ in range(2):
        run.train(**{"policy/lr": 0.0})
    run = run.again(learner__steps=3)
    run.everybody()
    assert run.summary()["warnings"] == []
    run.train(**{"policy/lr": 0.0})
    [line] = run.summary()["warnings"]
    assert line == "steps 1 to 3: policy/lr was 0 (learner.optim.lr): the policy does not move"
    assert run.ask("launcher-0", StatusRequest(), Status).summary["warnings"] == [line]
    assert caplog.text.count(line) == 1
    run = run.again(learner__steps=3)
    assert run.summary()["warnings"] == [line]


def test_a_group_of_another_size_is_taken_where_the_driver_may_make_one_and_counts_as_it_is(
    start: Callable[..., Run],
) -> None:
    run = start(search__name="my_code:Tree", search__flexible=True)
    run.everybody()
    first, second, *_ = run.lease().leases
    assert first.driver == "my_code:Tree"
    assert run.submit(first, 0, **three_samples()).accepted
    assert run.submit(second, 0).accepted
    run.ask("learner-0", NextBatch(step=0), BatchReply)
    run.clock.now += 4.0
    run.commit(0, 1)
    assert run.rows()[-1]["throughput/samples_per_second"] == (3 + 2) / 4


def test_a_group_whose_scores_mix_versions_is_refused_and_its_place_is_leased_again(start: Callable[..., Run]) -> None:
    run = start()
    run.everybody()
    lease = run.lease(1).leases[0]
    channels = {"prm": Channel("sample", np.zeros(G, np.float32))}
    mixed = {"accuracy": ScoredBy("prm", 2), "prm": ScoredBy("prm", 3)}
    ack = run.submit(lease, 0, channels=channels, scored_by=mixed)
    assert not ack.accepted
    assert ack.reason == "failed: group 0: versions 2 and 3 of prm scored it, and a group never mixes versions"
    assert run.broker.ledger.tally().refused == {"failed": 1}
    again = run.lease(1).leases[0]
    assert (again.group, again.slot) == (1, lease.slot)
    assert run.submit(again, 0, channels=channels, scored_by={"prm": ScoredBy("prm", 3)}).accepted


def test_what_a_scorer_made_reaches_the_learner_as_it_was(start: Callable[..., Run]) -> None:
    run = start()
    run.everybody()
    channels = {"prm": Channel("step", np.array([0.5, -1.0], np.float32))}
    scored = {
        "channels": channels, "step_ends": np.array([1, 3], np.int32), "scored_by": {"prm": ScoredBy("prm-7b", 9)},
    }  # fmt: skip
    for lease in run.lease(B).leases:
        assert run.submit(lease, 0, **scored).accepted
    message, arrays = run.wire.replies[run.send("learner-0", NextBatch(step=0))]
    assert isinstance(message, BatchReply)
    arrived = group_from(message.headers[0], [np.asarray(a) for a in arrays[: len(arrays) // B]])
    assert (arrived.channels["prm"].axis, arrived.channels["prm"].values.tolist()) == ("step", [0.5, -1.0])
    assert (arrived.step_ends.tolist(), arrived.scored_by) == ([1, 3], {"prm": ScoredBy("prm-7b", 9)})


def test_a_busy_share_is_of_time_after_the_first_version_only(start: Callable[..., Run]) -> None:
    run = start()
    for role in ("learner", "generator"):
        run.hello(role)
    run.beat("generator", seconds={"busy/decode": 0.0})
    run.clock.now += 10.0  # the generator loads its model
    run.commit(-1, 0)
    run.clock.now += 0.5
    run.beat("generator", seconds={"busy/decode": 0.4})
    run.train()
    assert run.summary()["generator/busy_fraction"] is None  # one heartbeat ends no window
    assert "time/generator_busy" not in run.rows()[-1]
    run.clock.now += 1.0
    run.beat("generator", seconds={"busy/decode": 1.15})
    run.train()
    assert run.summary()["generator/busy_fraction"] == pytest.approx(0.75)


def test_a_run_that_leaves_shards_behind_counts_them(
    start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(learner__steps=2)
    monkeypatch.setattr(run.broker.archive, "seal", lambda names: None)  # its thread never comes to them
    run.everybody()
    run.train(checkpoint=True)
    run.ask("launcher-0", StopRun(status="interrupted"), Acknowledged)
    run.clock.now += 1000.0
    run.broker.run()
    assert run.summary()["archive/unsealed"] == 1
    again = run.restarted()  # which asks for them first of all
    again.finish_archive()
    again.ask("launcher-0", StopRun(status="interrupted"), Acknowledged)
    again.clock.now += 1000.0
    again.broker.run()
    assert again.summary()["archive/unsealed"] == 0


def test_a_completed_run_waits_for_its_last_shards_longer_than_for_its_roles(
    start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(learner__steps=2)
    monkeypatch.setattr(run.broker.archive, "seal", lambda names: None)
    run.everybody()
    run.train(checkpoint=True)
    run.broker.ending.end("completed", "")
    run.clock.now += 100.0  # every role is long gone
    assert not run.broker.ending.may_leave()
    run.clock.now += 501.0  # but not for ever
    assert run.broker.ending.may_leave()


def test_a_stopped_run_keeps_its_groups_and_goes_on(start: Callable[..., Run], tmp_path: Path) -> None:
    run = start()
    run.everybody()
    run.train(checkpoint=True)
    run.make()
    run.ask("launcher-0", StopRun(status="interrupted", reason="stopped by SIGINT"), Acknowledged)
    run.ask("launcher-0", StopRun(status="completed"), Acknowledged)  # only the first end counts
    assert (run.summary()["status"], run.summary()["groups/in_flight"]) == ("interrupted", 4)
    again = run.restarted()
    assert again.broker.scheduler.version == 1
    assert [header.slot for header in again.ask("learner-0", NextBatch(step=1), BatchReply).headers] == [2, 3]


# ---------------------------------------------------------------------- restarts


def test_a_restart_replays_the_logged_batches_and_keeps_one_row_a_step(start: Callable[..., Run]) -> None:
    run = start(learner__steps=4)
    run.everybody()
    run.train(checkpoint=True, loss=1.0)
    logged = [run.train(checkpoint=False, loss=2.0)]
    half_done = run.lease().leases
    assert [(lease.slot, lease.min_version) for lease in half_done] == [(6, 2), (7, 2)]
    logged.append(run.ask("learner-0", NextBatch(step=2), BatchReply))
    run.commit(2, 3, loss=3.0)
    run = run.again(learner__steps=4)
    welcome = run.hello("learner")
    assert welcome.step == 1
    run.hello("generator")
    run.commit(-1, 1)
    # They need version 2 (batch 3, η = 1), which the replay has yet to publish again.
    assert run.lease().leases == []
    for step, before in zip((1, 2), logged, strict=True):
        replay = run.ask("learner-0", NextBatch(step=step), BatchReply)
        assert replay.replay
        assert [h.group for h in replay.headers] == [h.group for h in before.headers]
        assert not run.commit(step, step + 1, loss=2.5).diverged
    again = run.lease().leases
    assert [(lease.group, lease.attempt) for lease in again] == [(lease.group, 2) for lease in half_done]
    for lease in again:
        assert run.submit(lease, 3).accepted
    fresh = run.ask("learner-0", NextBatch(step=3), BatchReply)
    assert not fresh.replay
    run.commit(3, 4)
    assert [(row["step"], row.get("loss")) for row in run.rows()] == [(1, 1.0), (2, 2.5), (3, 2.5), (4, None)]
    assert (run.summary()["groups/lost"], run.summary()["groups/duplicated"]) == (0, 0)


def test_a_replay_that_differs_starts_a_new_lineage(start: Callable[..., Run]) -> None:
    run = start(learner__steps=6)
    run.everybody()
    for _ in range(3):
        run.train(checkpoint=False)
    run = run.restarted(learner__steps=6)
    run.ask("learner-0", NextBatch(step=0), BatchReply)
    reply = run.commit(0, 1, checksum="another")
    assert (reply.diverged, reply.lineage) == (True, 1)
    # Batch 1 (slots 2, 3) was made at version 0: its groups are queued again. Slots 4, 5 of batch 2 were made at
    # version 1 and the queued slots 6, 7 at version 2, which are dead.
    assert run.broker.ledger.tally().refused == {"superseded": 4}
    assert [h.slot for h in run.ask("learner-0", NextBatch(step=1), BatchReply).headers] == [2, 3]
    run.commit(1, 2)
    assert [lease.slot for lease in run.lease().leases] == [4, 5, 6, 7]
    assert run.summary()["lineage"] == 1


def test_a_version_that_was_out_before_its_commit_may_make_tokens_but_not_outlive_a_restart(
    start: Callable[..., Run],
) -> None:
    run = start()
    run.everybody()
    leases = run.lease().leases
    assert not run.submit(leases[3], 1).accepted  # version 1 cannot exist: batch 0 was never handed out
    for lease in leases[:2]:
        run.submit(lease, 0)
    run.ask("learner-0", NextBatch(step=0), BatchReply)
    assert run.submit(leases[2], 1).accepted  # published, and its commit is on the way
    assert run.broker.ledger.tally().queued == 1
    # No commit came: nobody can tell whether the replay makes the same version 1.
    assert run.restarted().broker.ledger.tally().refused == {"superseded": 2}


def test_a_learner_waits_where_the_versions_without_a_score_keep_as_much_as_they_may(start: Callable[..., Run]) -> None:
    """Two of one MiB each; a version that nobody scores is made all the same."""
    run = start(learner__steps=9, eval__every=1, eval__waiting_mb=2)
    run.everybody()
    run.train()
    waits = run.ask("learner-0", NextBatch(step=1), BatchReply)
    assert not waits.headers
    assert waits.waiting.startswith(
        "a score of version 0 from evaluator-0: 2 wait, as many as eval.waiting_mb lets, since "
    )
    held = run.send("learner-0", NextBatch(step=1))
    run.ask("evaluator-0", EvalResult(version=0, metrics={"eval/accuracy": 0.5}), Acknowledged)
    run.broker.serve_held()
    assert run.reply(held, BatchReply).headers
    ahead = run.ask("learner-0", NextBatch(step=2), BatchReply)  # version 2 is on its way, and will wait too
    assert ahead.waiting.startswith("a score of version 1 from evaluator-0: 1 wait")


def test_one_version_may_wait_whatever_it_keeps_and_others_are_made_meanwhile(start: Callable[..., Run]) -> None:
    run = start(learner__steps=9, eval__every=3, eval__waiting_mb=0)
    run.everybody()
    run.train()
    run.train()
    assert run.ask("learner-0", NextBatch(step=2), BatchReply).waiting.startswith("a score of version 0 from evaluator")


def test_settings_that_the_ledger_depends_on_cannot_change(start: Callable[..., Run]) -> None:
    run = start()
    run.broker.close()
    with pytest.raises(ConfigError, match=r"batch\.groups=7: .*config\.yaml was edited, the run began with 2, and one"):
        Run(run.run_dir, batch__groups=7)
    run.again(learner__steps=99)  # a longer run may go on


def test_what_may_save_a_diverged_run_may_change_and_is_noted_with_its_step(start: Callable[..., Run]) -> None:
    run = start(learner__steps=6)
    run.everybody()
    run.train()
    assert run.summary()["changes"] == []
    run = run.restarted(learner__steps=6, learner__optim__lr=1e-5)
    change = {"step": 1, "key": "learner.optim.lr", "from": 2e-4, "to": 1e-5}
    run.train()
    assert run.summary()["changes"] == [change]
    run = run.restarted(learner__steps=6, learner__optim__lr=1e-5)  # the same value is no change
    run.train()
    assert run.summary()["changes"] == [change]


def test_a_completed_run_completes_again_and_can_be_made_longer_but_not_shorter(start: Callable[..., Run]) -> None:
    run = start(learner__steps=2)
    run.everybody()
    run.train()
    run.train()
    for version in (0, 2):
        run.ask("evaluator-0", EvalResult(version=version, metrics={"eval/accuracy": 0.5}), Acknowledged)
    assert run.broker.ending.status == "completed"
    run.finish_archive()
    run.close()
    with pytest.raises(ValueError, match=r"learner\.steps=1: the run run is at step 2 already; raise it"):
        Run(run.run_dir, learner__steps=1)
    assert run.restarted(learner__steps=2).broker.ending.status == "completed"
    longer = run.restarted(learner__steps=3)
    assert longer.broker.ending.status == ""
    longer.train()
    assert (longer.summary()["groups/trained"], longer.summary()["groups/lost"]) == (3 * B, 0)


def test_a_metric_that_is_not_finite_is_null_and_breaks_nothing(start: Callable[..., Run]) -> None:
    run = start()
    run.everybody()
    run.train(**{"loss": float("nan"), "weights/publish_seconds": float("inf")})
    run.train(**{"loss": 1.0, "weights/publish_seconds": 2.0})
    assert [row["loss"] for row in run.rows()] == [None, 1.0]
    assert run.summary()["weights/publish_seconds_mean"] == 2.0
    run.train(**{"loss": float("nan"), "policy/lr": 0.5})
    status = run.ask("launcher-0", StatusRequest(), Status)
    # Over the wire, where Status.metrics is checked: a null there would end the launcher.
    received = decode(encode(status))[0]
    assert isinstance(received, Status)
    assert (received.metrics["step"], received.metrics["policy/lr"]) == (3, 0.5)
    assert "loss" not in received.metrics
    assert [row["loss"] for row in run.restarted().rows()] == [None, 1.0, None]


def test_a_run_is_not_complete_before_its_last_checkpoint(start: Callable[..., Run]) -> None:
    run = start(learner__steps=1)
    run.everybody()
    run.train(checkpoint=False)
    for version in (0, 1):
        run.ask("evaluator-0", EvalResult(version=version, metrics={"eval/accuracy": 0.5}), Acknowledged)
    assert run.broker.ending.status == ""
    run.ask("learner-0", Checkpointed(step=1, path="step_1"), Acknowledged)
    assert run.broker.ending.status == "completed"


def test_after_a_restart_leases_go_to_whoever_asks(start: Callable[..., Run]) -> None:
    run = start()
    run.everybody()
    run.lease(2)
    run = run.again()
    run.hello("learner")
    run.hello("generator", 1)
    run.commit(-1, 0)
    leases = run.lease(2, peer="generator-1").leases
    assert [(lease.group, lease.attempt) for lease in leases] == [(0, 2), (1, 2)]


def test_a_ledger_that_fails_at_a_heartbeat_still_says_stop(
    start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start()
    run.everybody()

    def full(*_: object) -> None:
        raise LedgerError("disk is full")

    monkeypatch.setattr(run.broker.ledger.records, "charge", full)
    assert run.beat("generator").stop
    assert run.broker.ending.reason == "disk is full"


def test_a_full_disk_fails_the_run_in_one_line_and_every_beat_says_stop(start: Callable[..., Run]) -> None:
    run = start()
    run.everybody()
    leases = run.lease().leases
    assert run.submit(leases[0], 0).accepted
    ledger = run.broker.ledger
    ledger.file.rows(f"PRAGMA max_page_count = {ledger.file.one('PRAGMA page_count')}")
    header, arrays = group_frames(group(leases[1], 0, channels={"big": Channel("node", np.zeros(1 << 20, np.float32))}))
    error = run.ask("generator-0", SubmitGroup(header=header), Error, arrays).error
    assert f"{run.run_dir / FILE}: database or disk is full; nothing acknowledged is lost: free space" in error
    assert "\n" not in error
    assert run.broker.ending.status == "failed"
    assert run.beat("generator", compute={"decoded_tokens": 1.0}).stop
    assert run.ask("launcher-0", StatusRequest(), Status).failures[0].error == error
    assert run.again().broker.ledger.tally().queued == 1


def test_a_metrics_file_that_cannot_be_written_fails_the_run_and_names_the_directory(
    start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start()
    run.everybody()
    run.make()
    run.ask("learner-0", NextBatch(step=0), BatchReply)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run.broker.recorder, "step", full)
    run.commit(0, 1, loss=1.0)  # the commit itself is durable
    [failure] = run.broker.ending.failures
    assert failure.role == "broker"
    assert str(run.run_dir) in failure.error
    assert "No space left on device" in failure.error
    assert run.beat("learner").stop
    assert [row["loss"] for row in run.broker.ledger.records.metrics()] == [1.0]


def test_another_broker_on_the_same_run_is_refused(start: Callable[..., Run]) -> None:
    run = start()
    with pytest.raises(LedgerError, match="another broker holds this run"):
        Run(run.run_dir)


def test_the_broker_leaves_when_the_roles_are_gone(start: Callable[..., Run]) -> None:
    run = start()
    run.everybody()
    run.broker.ending.end("interrupted", "")
    assert not run.broker.ending.may_leave()
    run.clock.now += 2.0
    run.beat("generator")
    assert not run.broker.ending.may_leave()
    run.clock.now += 3.5  # silent for more than three heartbeats
    assert run.broker.ending.may_leave()


# ---------------------------------------------------------------------- the real wire


def generate(context: RoleContext) -> None:
    connection = context.connect()
    while not connection.heartbeat.stop:
        request = LeaseRequest(room=8)
        reply, _ = connection.client.request(request, what="leases", deadline_s=20)
        assert isinstance(reply, Leases)
        for lease in reply.leases:
            header, arrays = group_frames(group(lease, reply.version))
            connection.client.request(SubmitGroup(header=header), arrays, what="an acknowledgement", deadline_s=20)
    connection.close()


def learn(context: RoleContext) -> None:
    connection = context.connect()

    def ask(message: Message) -> Message:
        return connection.client.request(message, what="a reply", deadline_s=20)[0]

    step, pinned = connection.welcome.step, connection.welcome.evaluate

    def commit(step: int, version: int) -> bool:
        return ask(Commit(step=step, version=version, checksum=f"c{version}", pinned_bytes=int(pinned))).evaluate  # type: ignore[attr-defined]

    pinned = commit(-1, step)
    while not (batch := ask(NextBatch(step=step))).stop:  # type: ignore[attr-defined]
        if batch.headers:  # type: ignore[attr-defined]
            step += 1
            pinned = commit(step - 1, step)
            ask(Checkpointed(step=step, path=""))
    connection.close()


def evaluate(context: RoleContext) -> None:
    connection = context.connect()
    while True:
        job, _ = connection.client.request(NextEval(), what="a version", deadline_s=20)
        assert isinstance(job, EvalJob)
        if job.stop:
            break
        if job.version >= 0:
            result = EvalResult(version=job.version, metrics={"eval/accuracy": 0.5})
            connection.client.request(result, what="an acknowledgement", deadline_s=20)
    connection.close()


def test_the_role_serves_a_whole_run_over_sockets_and_leaves(tmp_path: Path) -> None:
    config = Config()
    config.learner.steps, config.batch.groups, config.batch.group_size, config.tracking.tensorboard = 4, B, G, False
    config.broker.heartbeat_seconds = 0.05
    make_keys(tmp_path, config.broker.address)
    with ThreadPoolExecutor() as roles:
        done = [
            roles.submit(work, RoleContext(config, tmp_path, role, 0))
            for role, work in (("learner", learn), ("generator", generate), ("evaluator", evaluate))
        ]
        main(RoleContext(config, tmp_path, "broker", 0))
        for role in done:
            role.result()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["status"], summary["groups/trained"], summary["groups/lost"]) == ("completed", 4 * B, 0)
    assert summary["eval/accuracy_last"] == 0.5
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5
    assert (tmp_path / "endpoint.json").stat().st_mode & 0o777 == 0o600


def test_a_job_without_groups_is_paced_by_empty_batches_and_completes_with_its_checkpoint(
    start: Callable[..., Run],
) -> None:
    run = start(sft__steps=2, sft__seed=7, job="sft")
    assert run.broker.deadlines.expected == ["learner-0"]
    assert run.hello("learner") == Welcome(run="run", step=0, evaluate=False)
    run.commit(-1, 0)
    for step in (0, 1):
        reply = run.ask("learner-0", NextBatch(step=step), BatchReply)
        assert (reply.headers, reply.waiting, reply.finished, reply.stop) == ([], "", False, False)
        run.clock.now += 2.0
        commit = Commit(step=step, version=step + 1, checksum="", metrics={"loss/sft": 2.0 - step}, tokens=6)
        assert not run.ask("learner-0", commit, Committed).evaluate
    assert run.ask("learner-0", NextBatch(step=2), BatchReply).finished
    rows = run.rows()
    assert [(row["step"], row["throughput/trained_tokens_per_second"]) for row in rows] == [(1, 3.0), (2, 3.0)]
    assert not [name for name in rows[0] if name.startswith(("queue/", "staleness/"))]
    run.ask("learner-0", Checkpointed(step=2, path="x"), Acknowledged)
    summary = run.summary()
    assert (summary["status"], summary["steps"], summary["seed"]) == ("completed", 2, 7)
    assert (summary["loss/sft_first"], summary["loss/sft_last"]) == (2.0, 1.0)
    assert "tokens/trained" in summary
    of_groups = ("groups/", "staleness/", "eval/", "reward/", "generator/", "archive/", "tokens/generated")
    assert not [name for name in summary if name.startswith(of_groups)]


def test_groups_that_keep_failing_are_in_the_warnings_with_the_reason(start: Callable[..., Run]) -> None:
    run = start(learner__steps=2, learner__checkpoint_every=2)
    run.everybody()
    for lease in run.lease().leases:
        why = f"request {lease.group}: above model.max_length=256"
        run.ask("generator-0", FailGroup(group=lease.group, attempt=1, reason="failed", detail=why), GroupAck)
    run.train()
    run.train()
    [line] = run.summary()["warnings"]
    assert "groups so far were refused as failed" in line
    assert line.endswith("the last: request 3: above model.max_length=256")
