"""Server and Client over real TCP: tickets, reconnects, refusals, hints, CURVE, heartbeats."""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import zmq

from offtrail.platform.runtime.activity import Activity
from offtrail.platform.runtime.heartbeat import HeartbeatThread
from offtrail.platform.wire import auth, sockets
from offtrail.platform.wire.auth import new_keys
from offtrail.platform.wire.bundle import bundle, unbundle
from offtrail.platform.wire.codec import WireError, decode, encode
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
SERVER, CLIENT = new_keys("127.0.0.1")
NOT_SERVED = (WaitError, RefusedError)


@contextmanager
def serving(answer: Answer, address: str = "127.0.0.1", keys: ServerKeys = SERVER) -> Iterator[Server]:
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
def dealer(endpoint: Endpoint, *, plain: tuple[bytes, bytes] | None = None) -> Iterator[zmq.Socket]:
    """A peer that is not a Client."""
    socket = zmq.Context.instance().socket(zmq.DEALER)
    socket.linger = 500  # with 0 libzmq may abort the process: see sockets.CLIENT_PARTS_MS
    if plain:
        socket.plain_username, socket.plain_password = plain
    socket.connect(endpoint.url)
    try:
        yield socket
    finally:
        socket.close()


def served(stranger: zmq.Socket, message: Message) -> bool:
    """Whether a request is answered. libzmq gives a refused connection up, and a send without a connection waits."""
    with suppress(zmq.Again):
        stranger.send_multipart(bundle([(1, encode(message))]), zmq.NOBLOCK)
    return bool(stranger.poll(500))


@contextmanager
def dialing(endpoint: Endpoint, identity: str = "generator-0", keys: ClientKeys = CLIENT) -> Iterator[Client]:
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
        ([b"garbage"], "without a table of letters"),
        ([b""], "without a table of letters"),
        ([b"\xff" * 8], f"a table of {(1 << 64) - 1} letters in a frame of 8 bytes"),
        ([bytes(4) + b"\1" + bytes(3)], f"a table of {1 << 32} letters in a frame of 8 bytes"),
        ([*bundle([(1, encode(ask(1)))]), b"more"], "1 letters of"),
        (bundle([(1, [b"garbage"])]), "a header of 7 bytes"),
        (bundle([(1, [b"x" * 40])]), "does not speak offtrail's protocol"),
        (bundle([(1, encode(Acknowledged()))]), "Acknowledged is not a request"),
        ([bytes(8)] + [b""] * 5000, "a message of 5001 frames; the broker reads 4096"),
    ],
)
def test_bytes_that_are_no_request_are_answered_and_the_server_lives(frames, says):
    with serving(echo) as server, dialing(server.endpoint, "honest") as client:
        with dealer(server.endpoint, plain=(b"x", CLIENT.password.encode())) as peer:
            peer.send_multipart(frames)
            assert peer.poll(20_000)
            assert says.encode() in b"".join(peer.recv_multipart())
        assert client.request(ask(4), what="an echo", deadline_s=20)[0].version == 4


def test_a_letter_that_is_no_request_leaves_the_others_of_its_frame_alone():
    with serving(echo) as server, dealer(server.endpoint, plain=(b"x", CLIENT.password.encode())) as peer:
        peer.send_multipart(bundle([(1, encode(ask(1))), (2, [b"garbage"]), (3, encode(ask(3)))]))
        found = {}
        while len(found) < 3:
            assert peer.poll(20_000)
            found |= {ticket: decode(frames)[0] for ticket, frames in unbundle(peer.recv_multipart())}
    assert [found[1].version, type(found[2]), found[3].version] == [1, Error, 3]


def test_requests_that_share_a_frame_are_answered_each_under_its_own_ticket():
    arrays = {3: [np.arange(9)], 7: [np.zeros(50_000)], 11: [np.ones(3), np.arange(40_000.0)]}
    with serving(echo) as server, dialing(server.endpoint) as client:
        tickets = {client.send(ask(room), arrays.get(room, []), share=True): room for room in range(50)}
        found = {}
        while len(found) < 50:
            found |= {ticket: (message.version, parts) for ticket, message, parts in client.poll(20)}
    assert {ticket: room for ticket, (room, _) in found.items()} == tickets
    for room, parts in found.values():
        assert all(np.array_equal(a, b) for a, b in zip(parts, arrays.get(room, []), strict=True))


def test_a_frame_that_the_broker_would_not_take_is_refused_before_it_is_sent():
    with serving(echo) as server, dialing(server.endpoint) as client:
        with pytest.raises(WireError, match="LeaseRequest has a frame of 67108872 bytes; the broker takes 67108864"):
            client.send(ask(1), [np.zeros((64 << 17) + 1)])
        assert client.request(ask(2), what="an echo", deadline_s=20)[0].version == 2


def test_a_request_of_more_frames_than_the_broker_reads_is_refused_before_it_is_sent():
    large = np.zeros(1 << 12)
    with serving(echo) as server, dialing(server.endpoint) as client:
        with pytest.raises(WireError, match="LeaseRequest has 4097 frames; the broker reads 4096"):
            client.send(ask(1), [large] * 4096)
        shared = [client.send(ask(i), share=True) for i in range(2)]
        message, arrays = client.request(ask(2), [large] * 4095, what="an echo", deadline_s=20)
        assert (message.version, len(arrays)) == (2, 4095)
        assert [ticket for ticket, _, _ in client.poll(20)] == shared


def test_a_client_whose_message_could_not_be_read_is_told_so():
    """No letter of it has a ticket that could be answered: without a word each would wait for ever."""
    with serving(echo) as server, dialing(server.endpoint) as client:
        client._requests.send_multipart([b"garbage"])
        with pytest.raises(WireError, match=r"could not read a message of generator-0: .*without a table of letters"):
            client.request(ask(1), what="an echo", deadline_s=20)


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


def test_the_clients_of_one_process_are_known_by_its_number_and_nobody_elses():
    seen: dict[int, bytes] = {}

    def answer(envelope: Envelope) -> tuple[Message, list[np.ndarray]]:
        seen[envelope.message.room] = envelope.process
        return echo(envelope)

    with serving(answer) as server:
        clients = [Client(server.endpoint, "generator-7", CLIENT, process) for process in ("a", "a", "", "")]
        for number, client in enumerate(clients):
            client.request(ask(number), what="an echo", deadline_s=20)
            client.close()
    assert seen[0] == seen[1] == b"a"
    assert len({*seen.values()}) == 3


def test_a_client_that_dials_before_the_server_is_up_is_served():
    with serving(echo) as server:
        endpoint = server.endpoint
    with dialing(endpoint) as client:
        ticket = client.send(ask(5))
        late = Server("127.0.0.1", int(endpoint.url.rsplit(":", 1)[1]), SERVER)
        try:
            envelopes: list[Envelope] = []
            assert eventually(lambda: bool(envelopes.extend(late.poll(0.1)) or envelopes))
            late.reply(envelopes[0], Acknowledged())
            late.flush()
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
from offtrail.platform.wire.sockets import Client, ClientKeys, Endpoint
client = Client(Endpoint(*sys.argv[1:3]), "learner-0", ClientKeys(sys.argv[3]))
while True:
    client.send(LeaseRequest(room=1), share=True)
"""


def test_a_killed_client_does_not_hurt_the_server():
    seen: list[Envelope] = []

    def answer(envelope: Envelope) -> tuple[Message, list[np.ndarray]] | None:
        seen.append(envelope)
        return echo(envelope)

    with serving(answer) as server:
        urls = [server.endpoint.url, server.endpoint.hints_url, CLIENT.password]
        path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        victim = subprocess.Popen([sys.executable, "-c", DIES_WHILE_WAITING, *urls], env=os.environ | path)
        try:
            assert eventually(lambda: bool(seen), 60)
        finally:
            victim.kill()
            victim.wait()
        with dialing(server.endpoint) as client:
            assert client.request(ask(2), what="an echo", deadline_s=20)[0].version == 2


def test_curve_lets_in_the_right_key_and_answers_no_other(tmp_path: Path):
    """0.0.0.0 with keys: the run's key is served; an unknown pair and a client without CURVE get no answer at all."""
    run, other = tmp_path / "run", tmp_path / "other"
    keys = make_keys(run, "0.0.0.0")
    make_keys(other, "0.0.0.0")
    seen: list[Envelope] = []

    def answer(envelope: Envelope) -> tuple[Message, list[np.ndarray]]:
        seen.append(envelope)
        return echo(envelope)

    with serving(answer, "0.0.0.0", keys) as server:
        endpoint = server.endpoint
        assert "0.0.0.0" not in endpoint.url
        with dialing(endpoint, "wrong", ClientKeys.read(other)) as client, pytest.raises(NOT_SERVED):
            client.request(ask(1), what="an echo", deadline_s=0.5)
        plain = Endpoint(endpoint.url, endpoint.hints_url)
        with dialing(plain, "plain") as client, pytest.raises(NOT_SERVED):
            client.request(ask(1), what="an echo", deadline_s=0.5)
        with dealer(endpoint) as stranger:
            assert not served(stranger, ask(1))
        assert seen == []
        with dialing(endpoint, "right", ClientKeys.read(run)) as client:
            assert client.request(ask(1), what="an echo", deadline_s=20)[0].version == 1

            def hinted() -> bool:
                server.hint(VersionHint(version=3))
                return client.newest_hint() == 3

            assert eventually(hinted)


@pytest.mark.parametrize("shown", [None, (b"role", b"guess"), (CLIENT.password.encode(), b"role")])
def test_on_loopback_too_nobody_without_the_runs_secret_is_served(shown):
    seen: list[Envelope] = []

    def answer(envelope: Envelope) -> tuple[Message, list[np.ndarray]]:
        seen.append(envelope)
        return echo(envelope)

    with serving(answer) as server:
        with dealer(server.endpoint, plain=shown) as stranger:
            assert not served(stranger, StatusRequest())
        assert seen == []
        with dialing(server.endpoint) as client:
            assert client.request(ask(1), what="an echo", deadline_s=20)[0].version == 1


def test_a_client_with_another_runs_secret_is_told_so():
    def refused() -> bool:
        client.send(ask(1))
        return False

    with (
        serving(echo) as server,
        dialing(server.endpoint, keys=new_keys("127.0.0.1")[1]) as client,
        pytest.raises(RefusedError, match="does not take this run's secret"),
    ):
        eventually(refused)


def test_a_heart_beats_learns_the_version_and_sends_its_last_counters():
    beats: list[Heartbeat] = []

    def answer(envelope: Envelope) -> tuple[Message, list[np.ndarray]]:
        assert isinstance(envelope.message, Heartbeat)
        beats.append(envelope.message)
        return Beat(version=len(beats), stop=len(beats) > 2, trained=len(beats) == 2), []

    activity = Activity()
    with serving(answer) as server:
        heartbeat = HeartbeatThread(lambda: Client(server.endpoint, "g", CLIENT), "generator", 1, activity, 0.02)
        with activity.waiting("lease", on="broker"):
            assert eventually(lambda: heartbeat.stop)
        assert heartbeat.version >= 3
        assert heartbeat.trained
        assert eventually(lambda: heartbeat.lost < 1)
        activity.charge("decoded_tokens", 41)
        heartbeat.close()
    assert (beats[0].role, beats[0].index) == ("generator", 1)
    assert any((beat.activity, beat.waiting_on) == ("waiting/lease", "broker") for beat in beats)
    assert beats[-1].compute == {"decoded_tokens": 41}
    assert beats[-1].seconds["waiting/lease"] > 0


def test_a_heart_measures_how_long_the_broker_is_silent_and_still_closes():
    with serving(lambda envelope: None) as server:
        heartbeat = HeartbeatThread(lambda: Client(server.endpoint, "e", CLIENT), "evaluator", 0, Activity(), 0.02)
        assert eventually(lambda: heartbeat.lost > 0.2)
        assert (heartbeat.version, heartbeat.stop) == (-1, False)
        heartbeat.close()


@pytest.mark.parametrize("broken", ["_answer", "_note"])
def test_a_server_whose_gate_has_broken_says_so_and_closes(broken: str, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise KeyError("of the gate")

    monkeypatch.setattr(auth.Gate, broken, fail)
    server = Server("127.0.0.1", 0, SERVER)
    with dialing(server.endpoint, "generator-0") as client, dialing(server.endpoint, "generator-1"), closing(server):
        client.send(ask(1))
        with pytest.raises(RuntimeError, match=r"nobody is let in any more: KeyError\('of the gate'\)"):
            eventually(lambda: server.poll(0.02) is None)  # it may hear a request before its gate has broken
        for _ in range(8):
            with dialing(server.endpoint, "generator-2") as late:
                late.send(ask(2))
                late.poll(0.01)


def test_a_server_that_cannot_close_says_so(monkeypatch: pytest.MonkeyPatch):
    server, free = Server("127.0.0.1", 0, SERVER), threading.Event()
    end = server._context.term
    monkeypatch.setattr(server._context, "term", lambda: free.wait(60) and end())
    monkeypatch.setattr(sockets, "CLOSE_SECONDS", 0.01)
    with pytest.raises(WaitError, match="the end of the broker's sockets from libzmq"):
        server.close()
    free.set()
    assert eventually(lambda: not any(thread.name == "wire-end" for thread in threading.enumerate()))


def test_closing_does_not_wait_for_unsent_frames():
    client = Client(Endpoint("tcp://127.0.0.1:9", "tcp://127.0.0.1:9"), "a", CLIENT)
    client.send(Checkpointed(step=1, path="x"), [np.zeros(1_000_000)])
    closer = threading.Thread(target=client.close, daemon=True)
    closer.start()
    closer.join(20)
    assert not closer.is_alive()


CLOSES_HALF_SENT = """
import random, threading, time
import numpy as np
from offtrail.platform.wire import auth, sockets
from offtrail.platform.wire.auth import new_keys
from offtrail.platform.wire.messages import LeaseRequest
from offtrail.platform.wire.sockets import Client, Server
random.seed(0)
arrays = [np.zeros(40_000)] * 3
for _ in range(400):
    keys, shown = new_keys("127.0.0.1")
    server = Server("127.0.0.1", 0, keys)
    client = Client(server.endpoint, "generator-0", shown)
    for room in range(16):
        client.send(LeaseRequest(room=room), arrays)
    server.poll(5)
    time.sleep(random.random() * 0.004)
    closing = threading.Thread(target=server.close)
    closing.start()
    client.close()
    closing.join()
print("ended well")
"""


def test_closing_while_the_other_end_hangs_up_does_not_abort_the_process():
    """It did, within libzmq, where a large message was half sent: a role died of SIGABRT at the end of a run."""
    path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", CLOSES_HALF_SENT], env=os.environ | path, capture_output=True, text=True, timeout=250
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "ended well\n", "")


GIVES_UP = """
import sys
import numpy as np
from offtrail.platform.wire.auth import new_keys
from offtrail.platform.wire.messages import LeaseRequest
from offtrail.platform.wire.sockets import Client, Endpoint
client = Client(Endpoint(sys.argv[1], sys.argv[1]), "generator-0", new_keys("127.0.0.1")[1])
for room in range(4):
    client.send(LeaseRequest(room=room), [np.zeros(400_000)] * 3)
sys.stdin.readline()
client.close()
print("closed", flush=True)
sys.stdin.readline()
print("ended well")
"""


def greeted(listener: socket.socket) -> socket.socket:
    """A connection of a client whose handshake is answered, and nothing after it read."""
    connection, _ = listener.accept()
    connection.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"PLAIN".ljust(20, b"\0") + b"\x01" + bytes(31))
    with connection.makefile("rb", buffering=0) as heard:

        def read(size: int) -> bytes:
            got = b""
            while len(got) < size:
                got += heard.read(size - len(got)) or pytest.fail("the client hung up")
            return got

        read(64)
        ready = b"\x05READY\x0bSocket-Type" + struct.pack(">I", 6) + b"ROUTER"
        for answer in (b"\x07WELCOME", ready):
            read(read(2)[1])
            connection.sendall(bytes([4, len(answer)]) + answer)
    return connection


@contextmanager
def without_a_core(pid: int, name: str) -> Iterator[None]:
    """The threads of that name of a child process stand still, as they do where others have all cores."""
    threads = [int(task.name) for task in Path(f"/proc/{pid}/task").iterdir() if (task / "comm").read_text() == name]
    assert threads
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
    for thread in threads:
        for request in (0x4206, 0x4207):  # PTRACE_SEIZE, PTRACE_INTERRUPT
            if libc.ptrace(request, thread, None, None) != 0:
                pytest.skip(f"this kernel lets no process trace its child: {os.strerror(ctypes.get_errno())}")
        os.waitpid(thread, 0x40000000)  # __WALL
    yield
    for thread in threads:
        if libc.ptrace(17, thread, None, None) != 0:  # PTRACE_DETACH: it has died, and waits for its tracer to see it
            os.waitpid(thread, 0x40000000)


def test_a_peer_that_hangs_up_when_a_closed_client_has_lingered_does_not_abort_its_process():
    """It did on a machine without a free core: the client gave a half sent message up after half a second, and its peer
    hung up before the thread that closes sockets had run.
    """
    path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        script = [sys.executable, "-c", GIVES_UP, f"tcp://127.0.0.1:{listener.getsockname()[1]}"]
        process = subprocess.Popen(script, env=os.environ | path, text=True, bufsize=1, **pipes)
        connection = greeted(listener)
    process.stdin.write("close\n")
    assert process.stdout.readline() == "closed\n"
    time.sleep(0.2)  # it lingers now
    with without_a_core(process.pid, "ZMQbg/Reaper\n"):
        time.sleep(sockets.LINGER_MS / 1000)
        connection.close()
        time.sleep(0.2)
    out, err = process.communicate("end\n", timeout=60)
    assert (process.returncode, out, err) == (0, "ended well\n", "")


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
