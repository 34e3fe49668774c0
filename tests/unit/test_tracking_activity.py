"""Activity: the innermost span counts, nothing counts twice, any thread may look."""

from __future__ import annotations

import contextlib
import threading
import time

import pytest

from offtrail.platform.runtime import activity as module
from offtrail.platform.runtime.activity import Activity


class Clock:
    """A clock that only moves when told: seconds in these tests are exact."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now + 1e9


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_seconds_are_booked_by_name(clock):
    activity = Activity()
    for seconds in (2, 3):
        with activity.busy("decode"):
            clock.now += seconds
        clock.now += 10
    with activity.waiting("batch", on="broker"):
        clock.now += 4
    assert activity.snapshot().seconds == {"busy/decode": 5, "waiting/batch": 4}


def test_the_inner_span_counts_and_not_both(clock):
    activity = Activity()
    with activity.busy("step"):
        clock.now += 1
        with activity.busy("forward"):
            clock.now += 2
            with activity.waiting("weights", on="learner"):
                clock.now += 4
            clock.now += 8
        clock.now += 16
    assert activity.snapshot().seconds == {"busy/step": 17, "busy/forward": 10, "waiting/weights": 4}


def test_the_same_name_inside_itself_counts_once(clock):
    activity = Activity()
    with activity.busy("decode"), activity.busy("decode"):
        clock.now += 3
    assert activity.snapshot().seconds == {"busy/decode": 3}


def test_a_snapshot_books_the_open_span_and_says_what_it_is(clock):
    activity = Activity()
    with activity.busy("step"), activity.waiting("batch", on="broker"):
        clock.now += 5
        first = activity.snapshot()
        clock.now += 2
        second = activity.snapshot()
    assert (first.activity, first.waiting_on, first.since) == ("waiting/batch", "broker", 1e9 + 100)
    assert first.seconds["waiting/batch"] == 5
    assert second.seconds["waiting/batch"] == 7
    assert activity.snapshot().seconds["waiting/batch"] == 7


def test_between_spans_a_role_is_idle_since_the_last_one(clock):
    activity = Activity()
    assert activity.snapshot().activity == "idle"
    with activity.busy("decode"):
        clock.now += 5
    clock.now += 1
    assert (activity.snapshot().activity, activity.snapshot().since) == ("idle", 1e9 + 105)


def test_a_wait_taken_up_at_once_keeps_its_since(clock):
    activity = Activity()

    def since(what: str = "leases", on: str = "broker") -> float:
        with activity.waiting(what, on=on):
            clock.now += 1
            return activity.snapshot().since - 1e9

    assert [since(), since()] == [100, 100]
    clock.now += module.RESUMED_SECONDS / 2
    assert since() == 100
    clock.now += module.RESUMED_SECONDS * 2
    began = clock.now
    assert since() == since() == began
    assert since(on="learner") == began + 2  # another wait
    with activity.busy("decode"):
        clock.now += 0.01
    assert since(on="learner") == pytest.approx(began + 3.01)  # it did something in between
    assert activity.snapshot().seconds["waiting/leases"] == 7


def test_an_error_closes_the_span(clock):
    activity = Activity()
    with contextlib.suppress(RuntimeError), activity.busy("decode"):
        clock.now += 1
        raise RuntimeError
    clock.now += 50
    assert activity.snapshot().seconds == {"busy/decode": 1}
    assert activity.snapshot().activity == "idle"


def test_charges_add_up_and_gauges_replace():
    activity = Activity()
    activity.charge("decoded_tokens", 3)
    activity.charge("decoded_tokens", 4)
    activity.gauge("running", 9)
    activity.gauge("running", 2)
    snapshot = activity.snapshot()
    assert (snapshot.compute, snapshot.gauges) == ({"decoded_tokens": 7}, {"running": 2})


def test_a_snapshot_is_a_copy():
    activity = Activity()
    activity.charge("a", 1)
    activity.snapshot().compute["a"] = 99
    assert activity.snapshot().compute == {"a": 1}


def test_the_present_activity_is_the_owners_and_other_threads_are_booked_beside_it(clock):
    activity = Activity()
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with activity.busy("copy"):
            inside.set()
            leave.wait(20)

    thread = threading.Thread(target=other)
    with activity.busy("update"):
        thread.start()
        assert inside.wait(20)
        clock.now += 3
        assert activity.snapshot().activity == "busy/update"
        leave.set()
        thread.join()
    assert activity.snapshot().seconds == {"busy/update": 3, "busy/copy": 3}


def test_threads_lose_no_charge_and_no_span():
    activity = Activity()

    def work() -> None:
        for _ in range(500):
            with activity.busy("a"), activity.waiting("b"):
                activity.charge("tokens", 1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        activity.snapshot()
    wall = time.monotonic() - began
    snapshot = activity.snapshot()
    assert snapshot.compute == {"tokens": 2000}
    assert snapshot.activity == "idle"
    assert 0 < sum(snapshot.seconds.values()) <= 4 * wall
