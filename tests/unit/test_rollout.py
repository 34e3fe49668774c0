"""The generator's rules between a lease and its acknowledgement, without sockets and without a model."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from offtrail.core.protocols import Completion, Request
from offtrail.core.types import Lease, Problem, Sampling
from offtrail.platform.config.schema import Config
from offtrail.platform.engines.limits import MOST_LOST
from offtrail.platform.generator.judges import Judges
from offtrail.platform.generator.rollout import Rollout
from offtrail.platform.runtime.activity import Activity
from offtrail.platform.weights.probe import MismatchError
from offtrail.platform.weights.store import Published
from offtrail.platform.wire.messages import (
    Error,
    FailGroup,
    GroupAck,
    LeaseRequest,
    Leases,
    Message,
    ReturnLeases,
    SubmitGroup,
)
from offtrail.platform.wire.sockets import WaitError
from offtrail.rewards.total import total
from offtrail.search.config import SearchConfig
from offtrail.search.registry import make_driver
from offtrail.search.sample import SampleDriver
from outside.two_rounds import TwoRounds

SAMPLING = Sampling(max_new_tokens=4)


@dataclass
class FakeClient:
    """Keeps what is sent; replies are put into ``inbox`` by the test."""

    sent: list[tuple[int, Message]] = field(default_factory=list)
    inbox: list[tuple[int, Message, list[Any]]] = field(default_factory=list)

    def flush(self) -> None:
        pass

    def send(self, message: Message, arrays: Sequence[Any] = (), *, share: bool = False) -> int:
        self.sent.append((len(self.sent), message))
        return len(self.sent) - 1

    def poll(self, timeout_s: float = 0.0) -> list[tuple[int, Message, list[Any]]]:
        replies, self.inbox = self.inbox, []
        return replies

    def newest_hint(self) -> int | None:
        return None


@dataclass
class FakeHeart:
    version: int = -1
    stop: bool = False
    lost: float = 0.0


@dataclass
class FakeEngine:
    """Every sample is three tokens 7, 8, 9 of the engine's version and finishes in one step."""

    version: int = -1
    vocab_size: int = 16
    counters: dict[str, float] = field(default_factory=lambda: {"decoded_tokens": 0.0})
    queue: list[Request] = field(default_factory=list)
    seen: list[int] = field(default_factory=list)
    capacity: int = 256
    replicas: int = 1
    waiting_for: str = ""
    dead: list[int] = field(default_factory=list)
    scores: dict[int, float] = field(default_factory=dict)

    @property
    def unfinished(self) -> int:
        return sum(request.samples for request in self.queue)

    def generate(self, requests: Sequence[Request]) -> None:
        if any(len(request.prompt_tokens) > 3 for request in requests):
            raise ValueError("prompt of 4 tokens: model.max_length is 7")
        self.queue += requests
        self.seen += [request.random_key for request in requests]

    def step(self) -> list[Completion]:
        done = [(request, i) for request in self.queue for i in range(request.samples)]
        self.queue = []
        versions = np.full(3, self.version, np.int32)
        return [
            Completion(
                request.id, i, np.array([7, 8, 9], np.int32), np.zeros(3, np.float32), versions, "stop", (1.0, 2.0, 3.0)
            )
            for request, i in reversed(done)
        ]

    def lost(self) -> list[int]:
        dead, self.dead = self.dead, []
        return dead

    def cancel(self, requests: Sequence[int]) -> None:
        self.queue = [request for request in self.queue if request.id not in requests]

    def die(self) -> None:
        """Its server dies with all that runs on it."""
        self.dead, self.queue = [request.id for request in self.queue], []

    def logprobs(self, prompts: Any, outputs: Any, temperature: float, replica: int = 0) -> list[Any]:
        assert temperature == 1.0
        return [np.full(len(output), self.scores.get(replica, -1.0), np.float32) for output in outputs]

    def load_weights(self, version: int, weights: object) -> None:
        self.version = version


@dataclass
class FakeWeights:
    learner: list[float] = field(default_factory=list)

    def open(self, version: int) -> Published:
        return Published(version, Path(), "", {}, lambda: None)

    def probe(self, version: int) -> list[float]:
        return self.learner


@dataclass
class FakeVerifiers:
    verdict: dict[str, Any] | None = field(
        default_factory=lambda: {"accuracy": np.array([1, 0], np.float32), "format": np.array([1, 1], np.float32)}
    )
    pending: list[int] = field(default_factory=list)
    counters: dict[str, float] = field(default_factory=lambda: {"verifier_seconds": 0.0})

    def submit(self, key: int, problem: Problem, texts: list[str], finished: list[bool]) -> None:
        assert texts == ["789", "789"]
        assert finished == [True, True]
        self.pending.append(key)

    def poll(self, timeout_s: float = 0.0) -> list[tuple[int, dict[str, Any] | None]]:
        done, self.pending = self.pending, []
        return [(key, self.verdict) for key in done]

    def reason(self, key: int) -> str:
        return "no verdict: killed"


@dataclass
class FakeConnection:
    client: FakeClient = field(default_factory=FakeClient)
    heartbeat: FakeHeart = field(default_factory=FakeHeart)
    activity: Activity = field(default_factory=Activity)


def lease(group: int, **fields: Any) -> Lease:
    problem = Problem("chain", group, "1+1=", "2")
    return Lease(
        **({"group": group, "slot": group, "attempt": 1, "problem": problem, "samples": 2, "min_version": 0} | fields)
    )


@dataclass
class Patient(FakeVerifiers):
    """Answers what it was asked, all right, once it is ``open``."""

    sizes: dict[int, int] = field(default_factory=dict)
    open: bool = False

    def submit(self, key: int, problem: Problem, texts: list[str], finished: list[bool]) -> None:
        self.sizes[key] = len(texts)

    def poll(self, timeout_s: float = 0.0) -> list[tuple[int, dict[str, Any] | None]]:
        if not self.open:
            return []
        sizes, self.sizes = self.sizes, {}
        return [
            (key, {name: np.ones(size, np.float32) for name in ("accuracy", "format")}) for key, size in sizes.items()
        ]


def two_rounds(config: Config | None = None) -> tuple[Rollout, Patient]:
    """A rollout whose leases ask for the two-round driver, and its verifiers."""
    rollout, verifiers = make(config), Patient()
    rollout.judges = Judges(verifiers, {}, lambda problem, tokens: "", rewards)
    rollout.make_driver = lambda lease: TwoRounds(lease, SAMPLING, "generator-0", more=1)
    rollout.__post_init__()
    return rollout, verifiers


def make(config: Config | None = None, prompt: int = 2) -> Rollout:
    return Rollout(
        config=config or Config(),
        connection=FakeConnection(),  # type: ignore[arg-type]
        engine=FakeEngine(),  # type: ignore[arg-type]
        weights=FakeWeights(),  # type: ignore[arg-type]
        judges=Judges(FakeVerifiers(), {}, lambda problem, tokens: "".join(str(t) for t in tokens), rewards),
        make_driver=lambda lease: SampleDriver(lease, SAMPLING, "generator-0"),
        encode=lambda lease: np.ones(prompt, np.int32),
    )


def rewards(components: Mapping[str, Any], task: str, slot: int) -> Any:
    return total(Config().reward, components, task=task, step=0)


def exact(groups: int = 2, staleness: int = 1) -> Config:
    config = Config()
    config.staleness.mode, config.staleness.max = "exact", staleness
    config.batch.groups, config.batch.group_size = groups, 2
    return config


def sent(rollout: Rollout, kind: type[Message]) -> list[Any]:
    return [message for _, message in rollout.connection.client.sent if isinstance(message, kind)]  # type: ignore[attr-defined]


def grant(rollout: Rollout, *leases: Lease, version: int = 0, **fields: Any) -> None:
    rollout.connection.client.inbox.append((0, Leases(leases=list(leases), version=version, **fields), []))  # type: ignore[attr-defined]
    rollout.take_replies()


def turn(rollout: Rollout) -> None:
    rollout.take_replies()
    rollout.ask_for_leases()
    rollout.apply_weights()
    rollout.start_ready()
    if rollout.engine.unfinished:
        rollout.decode()
    rollout.submit_judged()


def test_a_group_waits_for_its_version_and_then_carries_it() -> None:
    rollout = make()
    grant(rollout, lease(5, min_version=3), version=2)
    turn(rollout)
    assert rollout.engine.version == 2
    assert sent(rollout, SubmitGroup) == []
    rollout.connection.heartbeat.version = 3
    turn(rollout)
    [submitted] = sent(rollout, SubmitGroup)
    assert (submitted.header.group, submitted.header.attempt) == (5, 1)


def test_rewards_are_the_weighted_total_of_the_verdict() -> None:
    rollout = make()
    grant(rollout, lease(1))
    rollout.apply_weights()
    rollout.start_ready()
    rollout.decode()
    [(group, refused)] = rollout.judges.poll()[1]
    assert refused is None
    assert group.rewards.tolist() == pytest.approx([1.1, 0.1])  # 1.0·accuracy + 0.1·format
    assert group.tokens.tolist() == [7, 8, 9, 7, 8, 9]
    assert group.versions.tolist() == [0] * 6


def test_one_lease_request_is_open_at_a_time_and_none_once_the_engine_is_twice_full() -> None:
    config = Config()
    config.batch.group_size = 2
    rollout = make(config)
    rollout.engine.capacity = 4  # type: ignore[misc]
    rollout.ask_for_leases()
    rollout.ask_for_leases()
    assert [r.room for r in sent(rollout, LeaseRequest)] == [4]  # 2·4 samples / 2 a group
    grant(rollout, *(lease(i, min_version=9) for i in range(4)))
    rollout.ask_for_leases()
    assert len(sent(rollout, LeaseRequest)) == 1


def test_a_wave_enters_whole_in_slot_order_under_its_exact_version() -> None:
    rollout = make(exact())
    late, early = lease(3, slot=3, wave=1, exact_version=0), lease(2, slot=2, wave=1, exact_version=0)
    grant(rollout, late, early, version=4)
    turn(rollout)
    assert rollout.engine.seen == [2, 3]  # type: ignore[attr-defined]
    assert rollout.engine.version == 0  # not the newest, 4: the one that the wave names


def test_the_next_wave_waits_until_the_engine_is_empty() -> None:
    rollout = make(exact())
    waves = [lease(i, wave=i // 2, exact_version=max(0, i // 2 - 1)) for i in range(4)]
    grant(rollout, *waves, version=1)
    rollout.apply_weights()
    rollout.start_ready()
    assert rollout.engine.seen == [0, 1]  # type: ignore[attr-defined]
    rollout.apply_weights()
    rollout.start_ready()
    assert rollout.engine.seen == [0, 1]  # type: ignore[attr-defined]
    rollout.decode()
    rollout.start_ready()
    assert rollout.engine.seen == [0, 1, 2, 3]  # type: ignore[attr-defined]


def test_a_group_leased_again_goes_on_under_the_new_attempt() -> None:
    rollout = make()
    grant(rollout, lease(1))
    rollout.apply_weights()
    rollout.start_ready()
    grant(rollout, lease(1, attempt=2))
    turn(rollout)
    assert rollout.engine.seen == [1]  # type: ignore[attr-defined]
    assert [m.header.attempt for m in sent(rollout, SubmitGroup)] == [2]


def test_a_wave_leased_again_while_half_of_it_runs_is_neither_doubled_nor_stuck() -> None:
    """Heartbeats were lost for a while: the broker took the wave back and granted it again, to us."""
    rollout = make(exact())
    wave = [lease(i, wave=0, exact_version=0) for i in range(2)]
    grant(rollout, *wave)
    grant(rollout, *(lease(i, attempt=2, wave=0, exact_version=0) for i in range(2)))
    rollout.apply_weights()
    rollout.start_ready()
    grant(rollout, *(lease(i, attempt=3, wave=0, exact_version=0) for i in range(2)))
    turn(rollout)
    assert rollout.engine.seen == [0, 1]  # type: ignore[attr-defined]
    assert [m.header.attempt for m in sent(rollout, SubmitGroup)] == [3, 3]


def test_a_group_is_forgotten_only_when_acknowledged() -> None:
    rollout = make()
    grant(rollout, lease(1))
    turn(rollout)
    turn(rollout)
    assert rollout.held == 1
    ticket = next(t for t, m in rollout.connection.client.sent if isinstance(m, SubmitGroup))  # type: ignore[attr-defined]
    rollout.connection.client.inbox.append((ticket, GroupAck(group=1, accepted=True), []))  # type: ignore[attr-defined]
    rollout.take_replies()
    assert rollout.held == 0


def test_a_prompt_that_does_not_fit_fails_its_group_with_the_numbers() -> None:
    rollout = make(prompt=4)
    grant(rollout, lease(1))
    turn(rollout)
    [failed] = sent(rollout, FailGroup)
    assert (failed.group, failed.reason) == (1, "failed")
    assert "model.max_length is 7" in failed.detail


def test_a_killed_verifier_fails_the_group_where_the_config_says_refuse() -> None:
    rollout = make()
    rollout.judges._verifiers.verdict = None  # type: ignore[attr-defined]
    grant(rollout, lease(1))
    turn(rollout)
    assert [(m.group, m.detail) for m in sent(rollout, FailGroup)] == [(1, "no verdict: killed")]


def test_a_refused_request_ends_the_generator_with_the_brokers_words() -> None:
    rollout = make()
    rollout.connection.client.inbox.append((0, Error(error="protocol 2 is not 1"), []))  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="protocol 2 is not 1"):
        rollout.take_replies()


def test_a_silent_broker_ends_the_wait_with_what_on_whom_and_how_long() -> None:
    rollout = make()
    rollout.connection.heartbeat.lost = 601.0  # type: ignore[misc]
    with pytest.raises(WaitError, match=r"leases from .*broker"):
        rollout.wait()


def test_the_fixed_text_probe_is_a_gauge_and_an_alarm() -> None:
    rollout = make()
    rollout.weights.learner = [-1.0] * 23 + [-1.24]  # type: ignore[attr-defined]
    grant(rollout, lease(1))
    turn(rollout)
    gauges = rollout.connection.activity.snapshot().gauges
    assert gauges["mismatch/probe_abs_dlogp_mean"] == pytest.approx(0.01)  # .24 over 24 tokens
    assert gauges["mismatch/probe_abs_dlogp_max"] == pytest.approx(0.24)
    assert gauges["mismatch/probe_k3"] == pytest.approx((math.exp(-0.24) - 1 + 0.24) / 24)
    rollout.weights.learner = [-1.0] * 12 + [-1.2] * 12  # type: ignore[attr-defined]
    rollout.connection.heartbeat.version = 1
    rollout.take_replies()
    with pytest.raises(MismatchError, match=r"disagree by 0\.1 nats .* version 1; weights\.probe_alarm=0\.05"):
        rollout.apply_weights()


@pytest.mark.parametrize(
    ("engine", "learner", "differs", "alarms"),
    [
        ("float32", "float32", 0.06, True),  # .05 nats
        ("bfloat16", "bfloat16", 0.1, False),  # a trained model of 135M parameters, both sides in one dtype
        ("float32", "bfloat16", 0.5, False),
        ("bfloat16", "bfloat16", 0.7, True),  # .05 · 12.7 nats
    ],
)
def test_what_rounding_does_to_unlikely_tokens_is_no_alarm(
    engine: Any, learner: Any, differs: float, alarms: bool
) -> None:
    """To a trained model the fixed text is nonsense: logits are large, and so is bfloat16's error."""
    config = Config()
    config.engine.dtype, config.learner.dtype = engine, learner
    rollout = make(config)
    rollout.engine.logprobs = lambda *asked: [np.full(24, -12.0, np.float32)]  # type: ignore[method-assign]
    rollout.weights.learner = [-12.0 - differs] * 24  # type: ignore[attr-defined]
    grant(rollout, lease(1))
    with pytest.raises(MismatchError, match="disagree by") if alarms else contextlib.nullcontext():
        turn(rollout)


def test_engine_and_verifiers_charge_what_was_added_since_the_last_time() -> None:
    rollout = make()
    charged = rollout.connection.activity
    for decoded, seconds in ((10.0, 0.5), (10.0, 0.5), (25.0, 0.75)):
        rollout.engine.counters["decoded_tokens"] = decoded
        rollout.judges._verifiers.counters["verifier_seconds"] = seconds
        rollout.charge()
        assert charged.snapshot().compute == {"decoded_tokens": decoded, "verifier_seconds": seconds}


def test_leases_whose_server_died_go_back_and_may_come_again() -> None:
    rollout = make()
    grant(rollout, lease(1), lease(2))
    rollout.apply_weights()
    rollout.start_ready()
    rollout.engine.die()  # type: ignore[attr-defined]
    rollout.decode()
    assert [m.leases for m in sent(rollout, ReturnLeases)] == [[(1, 1), (2, 1)]]
    assert rollout.held == 0
    grant(rollout, lease(1, attempt=2))
    turn(rollout)
    assert [(m.header.group, m.header.attempt) for m in sent(rollout, SubmitGroup)] == [(1, 2)]
    assert sent(rollout, FailGroup) == []


def test_a_group_that_every_server_dies_of_fails_after_some_attempts() -> None:
    rollout = make()
    for attempt in range(1, MOST_LOST + 2):
        assert sent(rollout, FailGroup) == []
        grant(rollout, lease(1, attempt=attempt))
        rollout.apply_weights()
        rollout.start_ready()
        rollout.engine.die()  # type: ignore[attr-defined]
        rollout.decode()
    [failed] = sent(rollout, FailGroup)
    assert (failed.group, failed.attempt, failed.reason) == (1, MOST_LOST + 1, "failed")
    assert f"servers have lost it {MOST_LOST + 1} times" in failed.detail
    assert len(sent(rollout, ReturnLeases)) == MOST_LOST


def test_an_answer_of_a_lost_group_counts_for_nothing() -> None:
    rollout = make()
    grant(rollout, lease(1), lease(2))
    rollout.apply_weights()
    rollout.start_ready()
    rollout.engine.dead = [rollout.engine.queue[0].id]  # type: ignore[attr-defined]  # and yet its samples are among the finished ones
    rollout.decode()
    rollout.submit_judged()
    assert [m.header.group for m in sent(rollout, SubmitGroup)] == [2]


def test_while_no_server_is_up_nothing_is_asked_for_and_the_wait_names_it() -> None:
    rollout = make()
    rollout.engine.waiting_for = "server 0 of generator-0 to start"  # type: ignore[misc]
    rollout.ask_for_leases()
    assert sent(rollout, LeaseRequest) == []
    waits = []
    rollout.take_replies = lambda timeout_s=0.0: waits.append(rollout.connection.activity.snapshot().waiting_on)  # type: ignore[method-assign]
    rollout.wait()
    assert waits == ["server 0 of generator-0 to start"]


def test_every_server_is_probed_and_the_worst_counts() -> None:
    rollout = make()
    rollout.engine.replicas, rollout.engine.scores = 2, {1: -1.01}  # type: ignore[misc, attr-defined]
    rollout.weights.learner = [-1.0] * 24  # type: ignore[attr-defined]
    grant(rollout, lease(1))
    rollout.apply_weights()
    gauges = rollout.connection.activity.snapshot().gauges
    assert gauges["mismatch/probe_abs_dlogp_mean"] == pytest.approx(0.01, rel=1e-3)
    rollout.engine.scores = {1: -2.0}  # type: ignore[attr-defined]
    rollout.connection.heartbeat.version = 1
    rollout.take_replies()
    with pytest.raises(MismatchError):
        rollout.apply_weights()


def test_in_exact_mode_weights_and_the_next_wave_wait_for_a_driver_that_waits_for_its_verdict() -> None:
    rollout, verifiers = two_rounds(exact())
    grant(rollout, *(lease(i, wave=i // 2, exact_version=i // 2) for i in range(4)), version=1)
    turn(rollout)
    turn(rollout)
    assert rollout.engine.unfinished == 0
    assert rollout.engine.version == 0  # the next wave wants version 1
    assert rollout.engine.seen == [0, 1]  # type: ignore[attr-defined]
    verifiers.open = True
    turn(rollout)
    again = 2 << 40  # ask 2 of either group
    assert rollout.engine.seen == [0, 1, again, 1 + again]  # type: ignore[attr-defined]
    turn(rollout)
    assert sorted(m.header.group for m in sent(rollout, SubmitGroup)) == [0, 1]
    turn(rollout)
    assert rollout.engine.version == 1
    assert rollout.engine.seen[4:6] == [2, 3]  # type: ignore[attr-defined]


def test_a_lease_that_waits_for_its_version_holds_up_none_behind_it() -> None:
    rollout = make()
    grant(rollout, lease(1, min_version=9), lease(2), lease(3))
    turn(rollout)
    assert rollout.engine.seen == [2, 3]  # type: ignore[attr-defined]
    assert [driver.lease.group for driver in rollout._waiting] == [1]


def test_a_server_lost_in_the_second_round_gives_the_lease_back_and_the_next_attempt_finishes() -> None:
    rollout, verifiers = two_rounds()
    verifiers.open = True
    grant(rollout, lease(1))
    turn(rollout)
    assert rollout.engine.unfinished == 1
    rollout.engine.die()  # type: ignore[attr-defined]
    rollout.decode()
    assert [m.leases for m in sent(rollout, ReturnLeases)] == [[(1, 1)]]
    assert rollout.held == 0
    grant(rollout, lease(1, attempt=2))
    turn(rollout)
    turn(rollout)
    [submitted] = sent(rollout, SubmitGroup)
    assert (submitted.header.group, submitted.header.attempt) == (1, 2)


@pytest.mark.parametrize("mode", ["bound", "exact"])
def test_a_second_round_waits_until_a_server_that_was_started_anew_has_the_weights_again(mode: str) -> None:
    rollout, verifiers = two_rounds(exact(groups=1) if mode == "exact" else None)
    grant(rollout, lease(1, min_version=3, exact_version=3, wave=0), version=3)
    turn(rollout)
    rollout.engine.version = 0  # started anew while the driver waits for its verdict
    verifiers.open = True
    rollout.submit_judged()
    assert rollout.engine.unfinished == 0
    rollout.apply_weights()
    assert rollout.engine.version == 3
    rollout.start_ready()
    assert rollout.engine.unfinished == 1
    rollout.decode()
    rollout.submit_judged()
    assert [m.header.group for m in sent(rollout, SubmitGroup)] == [1]


def test_a_second_round_that_does_not_fit_fails_its_group_and_the_generator_goes_on() -> None:
    rollout, verifiers = two_rounds()
    verifiers.open = True
    rollout.encode = lambda lease: np.ones(3 if lease.group == 1 else 2, np.int32)  # and one more token in round 2
    grant(rollout, lease(1), lease(2))
    turn(rollout)
    turn(rollout)
    assert [(m.group, m.detail) for m in sent(rollout, FailGroup)] == [(1, "prompt of 4 tokens: model.max_length is 7")]
    assert [m.header.group for m in sent(rollout, SubmitGroup)] == [2]


def test_a_lease_whose_driver_is_not_there_fails_with_the_way_out() -> None:
    rollout = make()
    rollout.make_driver = lambda lease: make_driver(SearchConfig(), lease, SAMPLING, "generator-0")
    grant(rollout, lease(1, driver="tree"))
    [failed] = sent(rollout, FailGroup)
    assert "the lease asks for driver tree" in failed.detail
    assert rollout.held == 1  # until it is acknowledged


def test_leases_are_asked_for_by_the_width_of_their_driver() -> None:
    config = Config()
    config.batch.group_size = 8
    rollout, _ = two_rounds(config)
    rollout.engine.capacity = 8  # type: ignore[misc]
    grant(rollout, lease(1, samples=8))  # which keeps 4 samples in flight
    turn(rollout)
    assert rollout.engine.unfinished == 0  # all wait for the verdict, and come back
    assert [m.room for m in sent(rollout, LeaseRequest)] == [3]  # (2·8 − 4) / 4


def test_the_wait_for_a_verdict_names_the_verifiers() -> None:
    rollout, _ = two_rounds()
    grant(rollout, lease(1))
    turn(rollout)
    waits = []
    rollout.take_replies = lambda timeout_s=0.0: waits.append(rollout.connection.activity.snapshot())  # type: ignore[method-assign]
    rollout.wait()
    assert [(one.activity, one.waiting_on) for one in waits] == [("waiting/verdicts", "verifiers")]
