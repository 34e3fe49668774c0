"""Who may speak: the run's secret, made anew at each start, and the gate that lets in nobody without it.

The launcher calls `make_keys`; the broker reads ServerKeys, every other role ClientKeys, from runs/NAME/keys (directory
0700, files 0600). On loopback the secret is a password (ZMTP's PLAIN: checked once a connection, at no cost a message);
on any other address it is a pair of CURVE keys, and everything is encrypted. The server's public key travels in
endpoint.json. Trap: a password is shown to whoever listens, also to a stranger on a dead broker's port.

Invariants: a peer without the secret gets no answer but a refusal, and its bytes never reach the codec. Strangers and
connections are bounded: who shows a wrong secret is let go at once, who shows none within HANDSHAKE_SECONDS, and the
descriptors are never used up.
"""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import json
import math
import os
import resource
import secrets
import socket as net
import struct
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import zmq
from zmq.utils import z85

HANDSHAKE_SECONDS = 10.0
"""How long a connection may take to show the secret."""
STRANGERS = 64
"""Connections at a time that have not shown it yet; above it, the one that is here longest is closed."""
GREETING_BYTES, CURVE_WELCOME_BYTES, REFUSAL_BYTES = 64, 170, (11, 12)
"""What ZMTP sends to a peer that has shown nothing, and then to one that has shown a wrong secret (ERROR "400", which
libzmq 4.3.5 spells with a byte too few in PLAIN). To who is let in it has sent more than all of it, and first 10 bytes
of PLAIN's WELCOME. libzmq's own word on a handshake does not say whose.
"""
REFUSAL_SECONDS = 0.05
"""Within how long a refusal is on its way, unless the machine is busy: then they are looked for again, ever later."""
CONNECTIONS = 4096
"""Connections at a time, if half of the process's descriptors are as many."""

_ZAP = "inproc://zeromq.zap.01"
_MONITOR = "inproc://monitor-{}"
_EVENT = struct.Struct("<HI")
_EVENTS = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED
_BYTES_SENT = 200
"""Where tcpi_bytes_sent and tcpi_bytes_retrans stand in Linux's struct tcp_info."""


@dataclass(frozen=True, slots=True)
class ClientKeys:
    """What a role shows: the password, or a CURVE key pair in Z85 text."""

    password: str = ""
    public: str = ""
    secret: str = ""

    @classmethod
    def read(cls, run_dir: Path) -> ClientKeys:
        """The run's. ValueError where they cannot be read: they are made when the run starts, for its roles alone."""
        return cls(**_read(run_dir / "keys" / "client.json"))


@dataclass(frozen=True, slots=True)
class ServerKeys:
    """What the broker checks: the password, or its CURVE pair and the client keys that it lets in."""

    password: str = ""
    public: str = ""
    secret: str = ""
    allowed: tuple[str, ...] = ()

    @classmethod
    def read(cls, run_dir: Path) -> ServerKeys:
        """The run's; ValueError where they cannot be read."""
        found = _read(run_dir / "keys" / "server.json")
        return cls(**found | {"allowed": tuple(found["allowed"])})


def make_keys(run_dir: Path, address: str) -> ServerKeys:
    """Make a fresh secret below run_dir/keys for a broker on ``address``, and return the server's half."""
    server, client = new_keys(address)
    folder = run_dir / "keys"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_private(folder / "client.json", json.dumps(asdict(client)))
    write_private(folder / "server.json", json.dumps(asdict(server)))
    return server


def new_keys(address: str) -> tuple[ServerKeys, ClientKeys]:
    """A fresh secret for a broker on ``address``: what it checks, and what its roles show."""
    if not is_remote(address):
        password = secrets.token_hex(32)
        return ServerKeys(password), ClientKeys(password)
    client = ClientKeys("", *_pair())
    return ServerKeys("", *_pair(), (client.public,)), client


def is_remote(address: str) -> bool:
    """Whether a broker on this address can be reached from another host, and therefore requires CURVE."""
    if address == "localhost":
        return False
    try:
        return not ipaddress.ip_address(address.strip("[]")).is_loopback
    except ValueError:
        return True


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read, whole or not at all (mode 0600, renamed into place)."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    partial.replace(path)


def _pair() -> tuple[str, str]:
    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}): the run's start makes it, for the run's user") from None
    return found


class Gate:
    """Lets connections in, and counts them, for all sockets of one context, on a thread of its own.

    It answers libzmq's question "may this peer come in?" (RFC 27); without a handler, libzmq lets every client in. Open
    it before the server's sockets, `guard` each before it is bound, then `start`.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], keys: ServerKeys) -> None:
        self._context, self._keys = context, keys
        self._allowed = {z85.decode(key) for key in keys.allowed}
        self._zap = context.socket(zmq.REP)
        self._zap.bind(_ZAP)
        self._monitors: list[zmq.Socket[bytes]] = []
        self._open: set[int] = set()
        self._strangers: dict[int, None] = {}
        """Descriptors that may be strangers', the longest here first."""
        self._greeting = GREETING_BYTES + (CURVE_WELCOME_BYTES if keys.public else 0)
        self._look_at, self._patience = math.inf, REFUSAL_SECONDS
        """When refusals are on their way, and who was sent one is let go (monotonic seconds)."""
        self._most = min(CONNECTIONS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
        self._thread = threading.Thread(target=self._run, name="gate", daemon=True)
        self._error: Exception | None = None

    def guard(self, socket: zmq.Socket[bytes]) -> None:
        """Ask every peer of the socket for the secret, and count its connections."""
        if self._keys.public:
            socket.curve_server = True
            socket.curve_publickey = self._keys.public.encode()
            socket.curve_secretkey = self._keys.secret.encode()
        else:
            socket.plain_server = True
        socket.handshake_ivl = round(1000 * HANDSHAKE_SECONDS)
        url = _MONITOR.format(len(self._monitors))
        socket.monitor(url, _EVENTS)
        monitor = self._context.socket(zmq.PAIR)
        monitor.connect(url)
        self._monitors.append(monitor)

    def start(self) -> None:
        """From now on peers are answered."""
        self._thread.start()

    def check(self) -> None:
        """RuntimeError where the thread has ended before its time."""
        if self._error is not None:
            raise RuntimeError(f"nobody is let in any more: {self._error!r}") from self._error

    def join(self) -> None:
        """Wait for the thread to end; call after the context's termination has begun."""
        self._thread.join()

    def _run(self) -> None:
        """Trap: the context ends only once all of its sockets are closed."""
        try:
            with contextlib.suppress(zmq.ContextTerminated):
                self._serve()
        except Exception as error:
            self._error = error
        finally:
            for socket in (self._zap, *self._monitors):
                socket.close()

    def _serve(self) -> None:
        poller = zmq.Poller()
        for socket in (self._zap, *self._monitors):
            socket.linger = 0
            poller.register(socket, zmq.POLLIN)
        while True:
            left = self._look_at - time.monotonic()
            if left <= 0:
                self._let_refused_go()
                continue
            for socket, _ in poller.poll(None if math.isinf(left) else 1 + round(1000 * left)):
                if socket is self._zap:
                    self._zap.send_multipart(self._answer(self._zap.recv_multipart()))
                else:
                    self._note(*_EVENT.unpack(socket.recv_multipart()[0]))

    def _answer(self, request: list[bytes]) -> list[bytes]:
        """Request: version, id, domain, address, identity, mechanism, credentials…; reply: version, id, status, …"""
        request_id, mechanism, shown = request[1], request[5], request[6:]
        if self._keys.public:
            known = mechanism == b"CURVE" and shown[0] in self._allowed
        else:
            known = mechanism == b"PLAIN" and hmac.compare_digest(shown[1], self._keys.password.encode())
        if not known:
            self._patience = REFUSAL_SECONDS
            self._look_at = min(self._look_at, time.monotonic() + self._patience)
        status, text = (b"200", b"OK") if known else (b"400", b"not the run's secret")
        return [b"1.0", request_id, status, text, b"role" if known else b"", b""]

    def _note(self, event: int, descriptor: int) -> None:
        """Of a connection. Above a bound the stranger that is here longest is let go, or if there is none the newest
        connection: who has the secret shows it within milliseconds.
        """
        if event == zmq.EVENT_DISCONNECTED:
            self._open.discard(descriptor)
            self._strangers.pop(descriptor, None)
            return
        self._open.add(descriptor)
        self._strangers[descriptor] = None
        if len(self._strangers) > STRANGERS or len(self._open) > self._most:
            self._strangers = {
                fd: None for fd in self._strangers if _sent_bytes(fd) - self._greeting <= max(REFUSAL_BYTES)
            }
        if len(self._strangers) > STRANGERS or len(self._open) > self._most:
            longest = next(iter(self._strangers), descriptor)
            self._strangers.pop(longest, None)
            _shut(longest)

    def _let_refused_go(self) -> None:
        """Trap: libzmq would keep them until HANDSHAKE_SECONDS are over, and says that it refused one but not whom."""
        self._patience *= 2
        self._look_at = time.monotonic() + self._patience if self._patience < HANDSHAKE_SECONDS else math.inf
        for descriptor in [fd for fd in self._strangers if _sent_bytes(fd) - self._greeting in REFUSAL_BYTES]:
            self._strangers.pop(descriptor)
            _shut(descriptor)


def _sent_bytes(descriptor: int) -> int:
    """How much was sent on a connection that libzmq owns, each byte once however often the peer does not acknowledge
    it; endlessly much where it is closed by now.
    """
    with contextlib.suppress(OSError), net.fromfd(descriptor, net.AF_INET, net.SOCK_STREAM) as connection:
        info = connection.getsockopt(net.IPPROTO_TCP, net.TCP_INFO, _BYTES_SENT + 16)
        sent, again = struct.unpack_from("=QQ", info, _BYTES_SENT)
        return int(sent - again)
    return sys.maxsize


def _shut(descriptor: int) -> None:
    """End a connection that libzmq owns: it sees that the peer has gone, and closes it. Trap: by now the descriptor may
    be another file's, which `shutdown` leaves alone.
    """
    with contextlib.suppress(OSError), net.fromfd(descriptor, net.AF_INET, net.SOCK_STREAM) as connection:
        connection.shutdown(net.SHUT_RDWR)
