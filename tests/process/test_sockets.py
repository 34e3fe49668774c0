"""Server and Client over real TCP: tickets, reconnects, refusals, hints, CURVE, heartbeats."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import zmq

from offtrail.platform.runtime.activity import Activity
from offtrail.platform.runtime.heartbeat import HeartbeatThread
from offtrail.platform.wire.codec import encode
from offtrail.platform.wire.messages import (
    Acknowledged,
    Beat,
    Checkpointed,
    Committed,
    Error,
    Heartbeat,
    LeaseRequest,
    Leases,
    Message,
    StatusRequest,
    VersionHint,
)
from offtrail.platform.wire.sockets import (
    Client,
    ClientKeys,
    Endpoint,
    Envelope,
    RefusedError,
    Server,
    ServerKeys,
    WaitError,
    make_keys,
)

Answer = Callable[[Envelope], tuple[Message, list[np.ndarray]] | None]


@contextmanager
def serving(answer: Answer, address: str = "127.0.0.1", keys: ServerKeys | None = None) -> Iterator[Server]:
    """A server on a thread that answers each request with ``answer``; None leaves it unanswered."""
    ready: list[Server] = []
    bound, stop = threading.Event(), threading.Event()

    def loop() -> None:
        server = Server(address, 0, keys)
        ready.append(server)
        bound.set()
        while not stop.is_set():
            for envelope in server.poll(0.02):
                if (reply := answer(envelope)) is not None:
                    server.reply(envelope, *reply)
        server.close()

    thread = threading.Thread(target=loop)
    thread.start()
    assert bound.wait(20)
    try:
        yield ready[0]
    finally:
        stop.set()
        thread.join()


@contextmanager
def dialing(endpoint: Endpoint, identity: str = "generator-0", keys: ClientKeys | None = None) -> Iterator[Client]:
    client = Client(endpoint, identity, keys)
    try:
        yield client
    finally:
        client.close()


def echo(envelope: Envelope) -> tuple[Message, list[np.ndarray]]:
    """Leases with the room as version, and the arrays that came."""
    assert isinstance(envelope.message, LeaseRequest)
    return Leases(leases=[], version=envelope.message.room), envelope.arrays


def ask(room: int) -> LeaseRequest:
    return LeaseRequest(room=room)


def eventually(true: Callable[[], bool], seconds: float = 20.0) -> bool:
    limit = time.monotonic() + seconds
    while not true():
        if time.monotonic() > limit:
            return False
        time.sleep(0.01)
    return True


def test_a_request_is_answered_with_its_arrays():
    arrays = [np.arange(5, dtype=np.int32), np.random.default_rng(0).random(200_000)]
    with serving(echo) as server, dialing(server.endpoint) as client:
        message, found = client.request(ask(3), arrays, what="an echo", deadline_s=20)
    assert message == Leases(leases=[], version=3)
    assert all(np.array_equal(a, b) for a, b in zip(found, arrays, strict=True))


def test_open_tickets_are_answered_each_under_its_own():
    with serving(echo) as server, dialing(server.endpoint) as client:
        tickets = {client.send(ask(room)): room for room in range(50)}
        found = {}
        while len(found) < 50:
            found |= {ticket: message.version for ticket, message, _ in client.poll(20)}
        assert found == tickets
        assert client.poll() == []


def test_a_request_leaves_the_replies_of_other_tickets_for_poll():
    with serving(echo) as server, dialing(server.endpoint) as client:
        early = client.send(ask(1))
        message, _ = client.request(ask(2), what="an echo", deadline_s=20)
        assert isinstance(message, Leases)
        assert message.version == 2
        assert [ticket for ticket, _, _ in client.poll(20)] == [early]


def test_a_request_waits_through_a_reply_that_was_kept():
    """The kept reply of another ticket must neither be lost nor end the wait, nor make it spin."""
    slow = threading.Event()

    def answer(envelope: Envelope) -> tuple[Message, list[np.ndarray]]:
        if envelope.message == ask(2):
            slow.wait(0.3)
        return echo(envelope)

    with serving(answer) as server, dialing(server.endpoint) as client:
        early = client.send(ask(1))
        assert client.request(ask(2), what="an echo", deadline_s=20)[0].version == 2
        assert client.request(ask(3), what="an echo", deadline_s=20)[0].version == 3
        assert [ticket for ticket, _, _ in client.poll(0)] == [early]


def test_an_unanswered_request_is_a_named_wait():
    with (
        serving(lambda envelope: None) as server,
        dialing(server.endpoint) as client,
        pytest.raises(WaitError, match=r"waited for a batch from the broker \(tcp://.*\) since .* deadline of 0\.2 s"),
    ):
        client.request(ask(1), what="a batch", deadline_s=0.2)


def test_a_late_reply_to_a_given_up_request_is_dropped():
    gate = threading.Event()

    def answer(envelope: Envelope) -> tuple[Message, list[np.ndarray]]:
        gate.wait(20)
        return echo(envelope)

    with serving(answer) as server, dialing(server.endpoint) as client:
        with pytest.raises(WaitError):
            client.request(ask(1), what="a lease", deadline_s=0.05)
        gate.set()
        assert client.request(ask(2), what="a lease", deadline_s=20)[0].version == 2
        assert client.poll(0.05) == []


def test_a_refusal_is_raised_with_the_servers_words():
    refusal = Error(error="run.name=x is another run")
    with (
        serving(lambda envelope: (refusal, [])) as server,
        dialing(server.endpoint) as client,
        pytest.raises(RefusedError, match=r"run\.name=x is another run"),
    ):
        client.request(ask(1), what="a welcome", deadline_s=20)


@pytest.mark.parametrize(
    ("frames", "says"),
    [
        ([b"12345678", b"garbage"], "header"),
        ([b"12345678"], "without frames"),
        ([b"short", b"garbage"], "a ticket of 5 bytes"),
        ([b"12345678", *encode(Acknowledged())], "Acknowledged is not a request"),
    ],
)
def test_bytes_that_are_no_request_are_answered_and_the_server_lives(frames, says):
    with serving(echo) as server, dialing(server.endpoint, "honest") as client:
        stranger = zmq.Context.instance().socket(zmq.DEALER)
        stranger.linger = 0
        stranger.connect(server.endpoint.url)
        stranger.send_multipart(frames)
        assert stranger.poll(20_000)
        assert says.encode() in b"".join(stranger.recv_multipart())
        stranger.close()
        assert client.request(ask(4), what="an echo", deadline_s=20)[0].version == 4


def test_two_clients_of_one_name_get_each_their_own_replies():
    held: list[Envelope] = []

    def answer(envelope: Envelope) -> tuple[Message, list[np.ndarray]] | None:
        if envelope.message == ask(1):
            held.append(envelope)
            return None
        return echo(envelope)

    with serving(answer) as server, dialing(server.endpoint, "generator-7") as old:
        old.send(ask(1))
        assert eventually(lambda: bool(held))
        with dialing(server.endpoint, "generator-7") as new:
            assert new.request(ask(2), what="an echo", deadline_s=20)[0].version == 2
            assert old.request(ask(3), what="an echo", deadline_s=20)[0].version == 3
            assert new.poll(0.05) == []
    assert held[0].peer_name == "generator-7"


def test_a_client_that_dials_before_the_server_is_up_is_served():
    with serving(echo) as server:
        endpoint = server.endpoint
    with dialing(endpoint) as client:
        ticket = client.send(ask(5))
        late = Server("127.0.0.1", int(endpoint.url.rsplit(":", 1)[1]))
        try:
            envelopes: list[Envelope] = []
            assert eventually(lambda: bool(envelopes.extend(late.poll(0.1)) or envelopes))
            late.reply(envelopes[0], Acknowledged())
            assert client.poll(20)[0][:2] == (ticket, Acknowledged())
        finally:
            late.close()


def test_only_the_newest_hint_is_kept():
    with serving(echo) as server, dialing(server.endpoint) as client:
        assert client.newest_hint() is None

        def seen(version: int) -> bool:
            server.hint(VersionHint(version=version))
            return client.newest_hint() == version

        assert eventually(lambda: seen(6))
        assert eventually(lambda: seen(9))
        assert client.newest_hint() == 9


DIES_WHILE_WAITING = """
import sys
from offtrail.platform.wire.messages import LeaseRequest
from offtrail.platform.wire.sockets import Client, Endpoint
client = Client(Endpoint(*sys.argv[1:]), "learner-0")
client.send(LeaseRequest(room=1))
client.poll(600)
"""


def test_a_killed_client_does_not_hurt_the_server():
    seen: list[Envelope] = []

    def answer(envelope: Envelope) -> tuple[Message, list[np.ndarray]] | None:
        seen.append(envelope)
        return None if envelope.peer_name == "learner-0" else echo(envelope)

    with serving(answer) as server:
        urls = [server.endpoint.url, server.endpoint.hints_url]
        path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        victim = subprocess.Popen([sys.executable, "-c", DIES_WHILE_WAITING, *urls], env=os.environ | path)
        try:
            assert eventually(lambda: bool(seen), 60)
        finally:
            victim.kill()
            victim.wait()
        with dialing(server.endpoint) as client:
            assert client.request(ask(2), what="an echo", deadline_s=20)[0].version == 2
        server.reply(seen[0], Acknowledged())  # to nobody: not an error


def test_curve_lets_in_the_right_key_and_answers_no_other(tmp_path: Path):
    """0.0.0.0 with keys: the run's key is served; an unknown pair and a client without CURVE get no answer at all."""
    run, other = tmp_path / "run", tmp_path / "other"
    served = make_keys(run, "0.0.0.0")
    make_keys(other, "0.0.0.0")
    seen: list[Envelope] = []

    def answer(envelope: Envelope) -> tuple[Message, list[np.ndarray]]:
        seen.append(envelope)
        return echo(envelope)

    with serving(answer, "0.0.0.0", served) as server:
        endpoint = server.endpoint
        assert "0.0.0.0" not in endpoint.url
        with dialing(endpoint, "wrong", ClientKeys.read(other)) as client, pytest.raises(WaitError):
            client.request(ask(1), what="an echo", deadline_s=0.5)
        plain = Endpoint(endpoint.url, endpoint.hints_url)
        with dialing(plain, "plain") as client, pytest.raises(WaitError):
            client.request(ask(1), what="an echo", deadline_s=0.5)
        assert seen == []
        with dialing(endpoint, "right", ClientKeys.read(run)) as client:
            assert client.request(ask(1), what="an echo", deadline_s=20)[0].version == 1

            def hinted() -> bool:
                server.hint(VersionHint(version=3))
                return client.newest_hint() == 3

            assert eventually(hinted)


def test_a_heart_beats_learns_the_version_and_sends_its_last_counters():
    beats: list[Heartbeat] = []

    def answer(envelope: Envelope) -> tuple[Message, list[np.ndarray]]:
        assert isinstance(envelope.message, Heartbeat)
        beats.append(envelope.message)
        return Beat(version=len(beats), stop=len(beats) > 2), []

    activity = Activity()
    with serving(answer) as server:
        heartbeat = HeartbeatThread(server.endpoint, "generator", 1, None, activity, 0.02)
        with activity.waiting("lease", on="broker"):
            assert eventually(lambda: heartbeat.stop)
        assert heartbeat.version >= 3
        assert eventually(lambda: heartbeat.lost < 1)
        activity.charge("decoded_tokens", 41)
        heartbeat.close()
    assert (beats[0].role, beats[0].index, beats[0].pid) == ("generator", 1, os.getpid())
    assert any((beat.activity, beat.waiting_on) == ("waiting/lease", "broker") for beat in beats)
    assert beats[-1].compute == {"decoded_tokens": 41}
    assert beats[-1].seconds["waiting/lease"] > 0


def test_a_heart_measures_how_long_the_broker_is_silent_and_still_closes():
    with serving(lambda envelope: None) as server:
        heartbeat = HeartbeatThread(server.endpoint, "evaluator", 0, None, Activity(), 0.02)
        assert eventually(lambda: heartbeat.lost > 0.2)
        assert (heartbeat.version, heartbeat.stop) == (-1, False)
        heartbeat.close()


def test_closing_does_not_wait_for_unsent_frames():
    client = Client(Endpoint("tcp://127.0.0.1:9", "tcp://127.0.0.1:9"), "a")
    client.send(Checkpointed(step=1, path="x"), [np.zeros(1_000_000)])
    closer = threading.Thread(target=client.close, daemon=True)
    closer.start()
    closer.join(20)
    assert not closer.is_alive()


def test_replies_are_not_dropped_when_they_pile_up():
    """A ROUTER at its high-water mark drops silently; there is none here."""
    count = 3000
    with serving(lambda envelope: (Committed(lineage=0), [])) as server, dialing(server.endpoint) as client:
        for _ in range(count):
            client.send(StatusRequest())
        got = 0
        while got < count:
            replies = client.poll(20)
            assert replies
            got += len(replies)
