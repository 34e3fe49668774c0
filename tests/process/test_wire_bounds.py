"""What a stranger, or a peer that never ends, can make the broker hold: connections, descriptors, memory, time."""

from __future__ import annotations

import os
import resource
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from offtrail.platform.wire import auth, sockets
from offtrail.platform.wire.auth import new_keys
from offtrail.platform.wire.messages import LeaseRequest, Leases
from offtrail.platform.wire.sockets import Client, Endpoint, Server

SERVER, CLIENT = new_keys("127.0.0.1")
MORE = 1


@contextmanager
def serving() -> Iterator[Server]:
    """A server that answers every lease request with its room, on a thread."""
    server, over = Server("127.0.0.1", 0, SERVER), threading.Event()

    def loop() -> None:
        while not over.is_set():
            for envelope in server.poll(0.02):
                assert isinstance(envelope.message, LeaseRequest)
                server.reply(envelope, Leases(leases=[], version=envelope.message.room))

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield server
    finally:
        over.set()
        thread.join()
        server.close()


def ask(client: Client, room: int) -> int:
    reply, _ = client.request(LeaseRequest(room=room), what="an answer", deadline_s=30)
    assert isinstance(reply, Leases)
    return reply.version


@contextmanager
def dialing(server: Server) -> Iterator[Client]:
    client = Client(server.endpoint, "generator-0", CLIENT)
    try:
        yield client
    finally:
        client.close()


def connect(url: str) -> socket.socket:
    """A TCP connection, with nothing said on it."""
    host, port = url.removeprefix("tcp://").rsplit(":", 1)
    return socket.create_connection((host, int(port)), 20)


def greeting(mechanism: bytes) -> bytes:
    """What a peer of ZMTP 3.1 says first."""
    return b"\xff" + bytes(8) + b"\x7f\x03\x01" + mechanism.ljust(20, b"\0") + bytes(32)


def frame(flags: int, size: int) -> bytes:
    """The head of a long frame."""
    return struct.pack(">BQ", 2 | flags, size)


def command(name: bytes, body: bytes) -> bytes:
    """A short command frame."""
    return bytes([4, len(name) + 1 + len(body), len(name)]) + name + body


def text(value: bytes) -> bytes:
    return bytes([len(value)]) + value


def closes(stranger: socket.socket, seconds: float) -> bool:
    """Whether the other side ends the connection."""
    stranger.settimeout(seconds)
    try:
        while stranger.recv(4096):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        pass
    return True


def copy(source: socket.socket, target: socket.socket) -> int:
    """What comes from one connection goes to the other, until the first one's end; its bytes."""
    source.settimeout(20)
    copied = 0
    with suppress(ConnectionError):
        while data := source.recv(4096):
            copied += len(data)
            with suppress(OSError):
                target.sendall(data)
    return copied


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def resident() -> int:
    """MiB of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 20


def eventually(true: Callable[[], bool], seconds: float = 30.0) -> bool:
    limit = time.monotonic() + seconds
    while not true():
        if time.monotonic() > limit:
            return False
        time.sleep(0.01)
    return True


@pytest.mark.parametrize("said", [b"", b"\xff", greeting(b"PLAIN"), greeting(b"PLAIN") + frame(4, 1 << 20)])
@pytest.mark.parametrize("port", ["url", "hints_url"])
def test_a_stranger_that_does_not_go_on_is_let_go(said: bytes, port: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "HANDSHAKE_SECONDS", 0.2)
    with serving() as server, connect(getattr(server.endpoint, port)) as stranger:
        stranger.sendall(said)
        assert closes(stranger, 20)


@pytest.mark.parametrize("mechanism", [b"NULL", b"CURVE", b"PLAIN"])
def test_parts_of_a_stranger_are_not_kept(mechanism: bytes) -> None:
    """1,500 parts of 1 MiB of one message that never ends."""
    part = frame(MORE, 1 << 20) + bytes(1 << 20)
    with serving() as server, dialing(server) as client:
        assert ask(client, 1) == 1
        before = resident()
        with connect(server.endpoint.url) as stranger:
            stranger.sendall(greeting(mechanism))
            if mechanism == b"NULL":
                stranger.sendall(command(b"READY", b"\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER"))
            if mechanism == b"PLAIN":
                stranger.sendall(command(b"HELLO", text(b"role") + text(b"guess")))
            with pytest.raises(ConnectionError):
                deque((stranger.sendall(part) for _ in range(1500)), maxlen=0)
        assert ask(client, 2) == 2
        assert resident() - before < 64


@pytest.mark.parametrize("size", [(1 << 26) + 1, (1 << 32) - 1, 1 << 40, (1 << 63) - 1])
def test_a_connection_that_announces_more_than_a_frame_may_have_is_dropped(size: int) -> None:
    with serving() as server, dialing(server) as client:
        with connect(server.endpoint.url) as stranger:
            stranger.sendall(greeting(b"PLAIN") + frame(4, size))
            assert closes(stranger, 20)
        assert ask(client, 1) == 1


def test_of_strangers_beyond_a_few_the_longest_here_are_closed_and_roles_come_and_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(auth, "STRANGERS", 8)
    with serving() as server, dialing(server) as client, ExitStack() as held:
        assert ask(client, 1) == 1
        before = descriptors()
        strangers = [held.enter_context(connect(server.endpoint.url)) for _ in range(200)]
        # Of those of this process 200 are the strangers' own ends.
        assert eventually(lambda: descriptors() <= before + 200 + 8)
        assert all(closes(stranger, 20) for stranger in strangers[:-8])
        assert ask(client, 2) == 2
        for room in range(3, 20):  # each dials while there are as many strangers as may be
            with dialing(server) as late:
                assert ask(late, room) == room
        assert ask(client, 20) == 20


def test_who_shows_a_wrong_secret_is_let_go_and_roles_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is sent a refusal, more than a stranger that shows nothing: that makes it no role."""
    monkeypatch.setattr(auth, "HANDSHAKE_SECONDS", 600.0)
    monkeypatch.setattr(auth, "CONNECTIONS", 100)
    with serving() as server, dialing(server) as client, ExitStack() as held:
        assert ask(client, 1) == 1
        strangers = []
        for _ in range(200):
            strangers.append(stranger := held.enter_context(connect(server.endpoint.url)))
            stranger.sendall(greeting(b"PLAIN") + command(b"HELLO", text(b"role") + text(b"guess")))
        assert all(closes(stranger, 20) for stranger in strangers)
        assert ask(client, 2) == 2


def test_who_is_sent_the_refusal_late_is_let_go_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine nothing was sent yet when the gate looks first."""
    monkeypatch.setattr(auth, "HANDSHAKE_SECONDS", 600.0)
    sent, looks = auth._sent_bytes, []

    def late(descriptor: int) -> int:
        looks.append(descriptor)
        return 0 if len(looks) < 3 else sent(descriptor)

    monkeypatch.setattr(auth, "_sent_bytes", late)
    with serving() as server, connect(server.endpoint.url) as stranger:
        stranger.sendall(greeting(b"PLAIN") + command(b"HELLO", text(b"role") + text(b"guess")))
        assert closes(stranger, 20)


def test_a_peer_with_a_wrong_key_is_let_go_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """CURVE's refusal, through a relay that keeps the broker's end of the connection open when the peer's has gone."""
    monkeypatch.setattr(auth, "HANDSHAKE_SECONDS", 600.0)
    keys, _ = new_keys("0.0.0.0")
    server = Server("0.0.0.0", 0, keys)
    with socket.create_server(("127.0.0.1", 0)) as front, connect(server.endpoint.url) as back:
        url = f"tcp://127.0.0.1:{front.getsockname()[1]}"
        endpoint = Endpoint(url, url, keys.public)
        client = Client(endpoint, "generator-0", new_keys("0.0.0.0")[1])
        peer, _ = front.accept()
        with peer:
            copying = threading.Thread(target=copy, args=(peer, back))
            copying.start()
            sent = copy(back, peer)
            peer.shutdown(socket.SHUT_RDWR)
            copying.join(20)
        client.close()
    server.close()
    assert sent - auth.GREETING_BYTES - auth.CURVE_WELCOME_BYTES in auth.REFUSAL_BYTES


def test_connections_end_well_before_the_descriptors_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers that have the secret too: a broker without descriptors could not write its own files any more."""
    monkeypatch.setattr(auth, "CONNECTIONS", 10)
    with serving() as server, ExitStack() as held:
        clients = [held.enter_context(dialing(server)) for _ in range(10)]
        assert [ask(client, i) for i, client in enumerate(clients)] == [*range(10)]
        before = descriptors()
        with connect(server.endpoint.url) as eleventh:
            assert closes(eleventh, 20)
        assert eventually(lambda: descriptors() == before)
        clients[0].close()
        with dialing(server) as late:
            assert ask(late, 11) == 11


def test_what_one_peer_sends_ahead_is_bounded_by_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broker that is busy takes in a few messages of a peer and then reads no further: the sender keeps the rest."""
    monkeypatch.setattr(sockets, "PEER_MESSAGES", 4)
    server = Server("127.0.0.1", 0, SERVER)
    with dialing(server) as client:
        for room in range(100):
            client.send(LeaseRequest(room=room), [np.zeros(1 << 17)])
        rooms: list[int] = []
        while len(rooms) < 100:
            time.sleep(0.002)
            envelopes = server.poll(5)
            assert 0 < len(envelopes) < 32
            rooms += [e.message.room for e in envelopes if isinstance(e.message, LeaseRequest)]
    server.close()
    assert rooms == [*range(100)]
