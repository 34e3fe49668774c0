"""Server (the broker's end, the only one that binds) and Client (every other role's end, dials).

    Client DEALER ── [ticket, header, arrays…] ──► ROUTER Server      a request is answered by exactly one reply
    Client DEALER ◄── [ticket, header, arrays…] ── ROUTER Server      under the same ticket; several may be open
    Client SUB    ◄── [header] ─────────────────── PUB Server         hints: only the newest is kept, any may be lost

Invariants: bytes that are not a message never kill either end (the server answers Error, the client raises WireError);
a reply goes to the client that asked, under its ticket; whoever waits says for what, on whom, since
when, and ends at a deadline (I4). Sockets are not thread-safe: one thread per Client or Server.
"""

from __future__ import annotations

import ipaddress
import json
import secrets
import socket as net
import struct
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import zmq

from offtrail.platform.wire.auth import ClientKeys, ServerKeys, ZapGate, is_remote, make_keys, write_private
from offtrail.platform.wire.codec import Array, Frame, WireError, decode, encode
from offtrail.platform.wire.messages import Error, Message, RequestMessage, VersionHint

__all__ = [
    "Client", "ClientKeys", "Endpoint", "Envelope", "RefusedError", "Server", "ServerKeys", "WaitError", "make_keys",
]  # fmt: skip

MAX_FRAME_BYTES = 1 << 32
"""libzmq drops a connection that announces a larger frame, before it allocates."""
DRAIN = 256
"""Messages that one poll hands out at most, so that a flood cannot starve the caller's loop."""

_TICKET = struct.Struct("<Q")
_REQUESTS = frozenset(get_args(RequestMessage))


class WaitError(RuntimeError):
    """A wait that passed its deadline: says for what, on whom, since when, how long (I4)."""

    @classmethod
    def passed(cls, what: str, on: str, since: float, deadline_s: float) -> WaitError:
        """The error of a wait that began at ``since`` (epoch seconds) and had ``deadline_s`` seconds."""
        began = time.strftime("%H:%M:%S", time.localtime(since))
        return cls(f"waited for {what} from {on} since {began}; the deadline of {deadline_s:g} s has passed")


class RefusedError(RuntimeError):
    """The other side answered Error: the message is its line."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the broker listens, and its public key (empty on loopback without keys): runs/NAME/endpoint.json."""

    url: str
    hints_url: str
    public_key: str = ""

    def write(self, path: Path) -> None:
        """Write the file with mode 0600, atomically: a reader sees all of it or none."""
        write_private(path, json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path, deadline_s: float) -> Endpoint:
        """Read the file, waiting for it to appear; WaitError after ``deadline_s``.

        The launcher removes the file of an earlier start first: a role that reads it would dial a dead broker.
        """
        since, limit = time.time(), time.monotonic() + deadline_s
        while True:
            try:
                return cls(**json.loads(path.read_text()))
            except FileNotFoundError:
                if time.monotonic() >= limit:
                    raise WaitError.passed("the endpoint file", f"the broker ({path})", since, deadline_s) from None
                time.sleep(0.02)
            except (TypeError, ValueError) as error:
                raise WireError(f"{path} is not an endpoint of this version of offtrail ({error}); remove it") from None


@dataclass(slots=True)
class Envelope:
    """One request: from whom, under which ticket, what."""

    peer: bytes
    ticket: int
    message: Message
    arrays: list[Array] = field(default_factory=list)

    @property
    def peer_name(self) -> str:
        """The name that the sender gave itself: whose connection it is, the broker knows by ``peer`` alone."""
        return self.peer.partition(b"/")[0].decode(errors="replace")


class Server:
    """Binds two ports (requests and hints) on ``address``; ``port`` 0 takes any free one.

    Raises ValueError when the address can be reached from other hosts and there are no keys, or cannot be bound.
    """

    def __init__(self, address: str, port: int = 0, keys: ServerKeys | None = None) -> None:
        if keys is None and is_remote(address):
            raise ValueError(
                f"broker.address={address} can be reached from other hosts and needs CURVE keys: "
                "make them with make_keys(run_dir, address), or set broker.address=127.0.0.1"
            )
        host = _numeric(address)
        # A context of its own: the ZAP gate answers for all sockets of a context.
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._gate = ZapGate(self._context, keys.allowed) if keys else None
        self._requests = self._socket(zmq.ROUTER, keys)
        # A client that dials again comes back before its old connection is known to be dead.
        self._requests.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._hints = self._socket(zmq.PUB, keys)
        try:
            url, hints_url = _bind(self._requests, host, port), _bind(self._hints, host, 0)
        except zmq.ZMQError as error:
            self.close()
            raise ValueError(f"broker.address={address}, broker.port={port} cannot be bound: {error}") from None
        self.endpoint = Endpoint(url, hints_url, keys.public if keys else "")

    def _socket(self, kind: int, keys: ServerKeys | None) -> zmq.Socket[bytes]:
        socket = _open(self._context, kind)
        if keys:
            socket.curve_server = True
            socket.curve_publickey = keys.public.encode()
            socket.curve_secretkey = keys.secret.encode()
        return socket

    def poll(self, timeout_s: float) -> list[Envelope]:
        """The requests at hand, at most DRAIN; waits up to ``timeout_s`` for the first. Bad ones are answered here."""
        envelopes: list[Envelope] = []
        if not _readable(self._requests, timeout_s):
            return envelopes
        while len(envelopes) < DRAIN and (frames := _receive(self._requests)) is not None:
            if (envelope := self._open_envelope(frames)) is not None:
                envelopes.append(envelope)
        return envelopes

    def _open_envelope(self, frames: list[zmq.Frame]) -> Envelope | None:
        peer, ticket = frames[0].bytes, frames[1].bytes if len(frames) > 1 else b""
        try:
            if len(ticket) != _TICKET.size:
                raise WireError(f"a ticket of {len(ticket)} bytes")
            message, arrays = decode(frames[2:])
            if type(message) not in _REQUESTS:
                raise WireError(f"{type(message).__name__} is not a request")
        except WireError as error:
            _send(self._requests, [peer, ticket, *encode(Error(error=str(error)))])
            return None
        return Envelope(peer, _TICKET.unpack(ticket)[0], message, arrays)

    def reply(self, envelope: Envelope, message: Message, arrays: Sequence[Array] = ()) -> None:
        """Answer a request. A peer that is gone is no error: its lease ends with its heartbeats."""
        _send(self._requests, [envelope.peer, _TICKET.pack(envelope.ticket), *encode(message, arrays)])

    def hint(self, message: VersionHint) -> None:
        """Publish a hint; it may be lost."""
        _send(self._hints, encode(message))

    def close(self) -> None:
        """Close the sockets without waiting for unsent frames."""
        self._requests.close()
        self._hints.close()
        self._context.term()
        if self._gate:
            self._gate.join()


class Client:
    """Dials the broker and calls itself ``identity``; reconnects by itself. No other client gets its replies, even one
    that calls itself the same: each has a number of its own, which nobody else knows.

    Raises ValueError when the endpoint wants CURVE and there are no keys.
    """

    def __init__(self, endpoint: Endpoint, identity: str, keys: ClientKeys | None = None) -> None:
        if endpoint.public_key and keys is None:
            raise ValueError(f"the broker at {endpoint.url} requires CURVE keys: run where runs/NAME/keys can be read")
        self.endpoint, self.identity = endpoint, identity
        self._requests = self._socket(zmq.DEALER, keys)
        self._requests.setsockopt(zmq.IDENTITY, f"{identity}/{secrets.token_hex(8)}".encode())
        self._requests.connect(endpoint.url)
        self._hints = self._socket(zmq.SUB, keys)
        self._hints.setsockopt(zmq.CONFLATE, 1)
        self._hints.subscribe(b"")
        self._hints.connect(endpoint.hints_url)
        # Random start: a late reply to a former process of this identity is told by its ticket.
        self._next = secrets.randbits(62)
        self._open: set[int] = set()
        self._early: list[tuple[int, Message, list[Array]]] = []
        self._newest: int | None = None

    def _socket(self, kind: int, keys: ClientKeys | None) -> zmq.Socket[bytes]:
        socket = _open(zmq.Context.instance(), kind)
        if self.endpoint.public_key and keys:
            socket.curve_serverkey = self.endpoint.public_key.encode()
            socket.curve_publickey = keys.public.encode()
            socket.curve_secretkey = keys.secret.encode()
        return socket

    def send(self, message: Message, arrays: Sequence[Array] = ()) -> int:
        """Send a request without waiting; its reply comes from ``poll`` under the returned ticket.

        Arrays may still be read after the call returns: leave them unchanged.
        """
        ticket = self._next
        self._next += 1
        _send(self._requests, [_TICKET.pack(ticket), *encode(message, arrays)])
        self._open.add(ticket)
        return ticket

    def poll(self, timeout_s: float = 0.0) -> list[tuple[int, Message, list[Array]]]:
        """Replies at hand as (ticket, message, arrays); waits up to ``timeout_s`` for the first. Error replies too.

        About a microsecond when nothing is there and ``timeout_s`` is 0. Raises WireError on bytes that are no message.
        """
        replies, self._early = self._early, []
        if not _readable(self._requests, 0.0 if replies else timeout_s):
            return replies
        while len(replies) < DRAIN and (frames := _receive(self._requests)) is not None:
            ticket = _TICKET.unpack(frames[0].bytes)[0] if len(frames[0]) == _TICKET.size else -1
            if ticket in self._open:
                self._open.discard(ticket)
                replies.append((ticket, *decode(frames[1:])))
        return replies

    def request(
        self, message: Message, arrays: Sequence[Array] = (), *, what: str, deadline_s: float
    ) -> tuple[Message, list[Array]]:
        """Send and wait for the reply; see ``wait``."""
        return self.wait(self.send(message, arrays), what=what, deadline_s=deadline_s)

    def wait(self, ticket: int, *, what: str, deadline_s: float) -> tuple[Message, list[Array]]:
        """The reply to what was sent under ``ticket``; replies to other tickets are kept for ``poll`` and ``wait``.

        Raises WaitError after ``deadline_s`` from now and RefusedError on an Error reply.
        """
        since, limit = time.time(), time.monotonic() + deadline_s
        others: list[tuple[int, Message, list[Array]]] = []
        try:
            while True:
                replies = self.poll(max(0.0, limit - time.monotonic()))
                others += [reply for reply in replies if reply[0] != ticket]
                for _, message, arrays in (reply for reply in replies if reply[0] == ticket):
                    if isinstance(message, Error):
                        raise RefusedError(message.error)
                    return message, arrays
                if time.monotonic() >= limit:
                    self._open.discard(ticket)
                    raise WaitError.passed(what, f"the broker ({self.endpoint.url})", since, deadline_s)
        finally:
            self._early = others + self._early

    def newest_hint(self) -> int | None:
        """The newest version hinted so far, or None before the first hint. Never waits."""
        if _readable(self._hints, 0.0):
            message, _ = decode([self._hints.recv()])
            if isinstance(message, VersionHint):
                self._newest = message.version
        return self._newest

    def close(self) -> None:
        """Close the sockets without waiting for unsent frames."""
        self._requests.close()
        self._hints.close()


def _open(context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
    """No high-water mark: a ROUTER at its mark drops replies silently, a DEALER's send would stop the decode loop.

    What is in flight is bounded elsewhere, by leases and by one open request a role.
    """
    socket = context.socket(kind)
    socket.linger = 0
    socket.set_hwm(0)
    socket.ipv6 = True
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
    return socket


def _send(socket: zmq.Socket[bytes], frames: Sequence[Frame]) -> None:
    """Frames of zmq.COPY_THRESHOLD (64 KiB) or more are sent from where they lie; smaller ones cost less copied."""
    last = len(frames) - 1
    for i, frame in enumerate(frames):
        socket.send(frame, zmq.SNDMORE if i < last else 0, copy=len(frame) < zmq.COPY_THRESHOLD)


def _receive(socket: zmq.Socket[bytes]) -> list[zmq.Frame] | None:
    """All frames of the next message, not copied; None when there is none. A message arrives whole or not at all."""
    try:
        frame = socket.recv(zmq.NOBLOCK, copy=False)
    except zmq.Again:
        return None
    frames = [frame]
    while frame.more:
        frame = socket.recv(copy=False)
        frames.append(frame)
    return frames


def _readable(socket: zmq.Socket[bytes], timeout_s: float) -> bool:
    if int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
        return True
    return timeout_s > 0 and bool(socket.poll(max(1, round(timeout_s * 1000))))


def _bind(socket: zmq.Socket[Any], host: str, port: int) -> str:
    """Bind and return the URL under which others reach it."""
    socket.bind(f"tcp://{_bracket(host)}:{port or '*'}")
    bound = socket.getsockopt_string(zmq.LAST_ENDPOINT)
    reachable = _own_address() if ipaddress.ip_address(host).is_unspecified else host
    return f"tcp://{_bracket(reachable)}:{bound.rsplit(':', 1)[1]}"


def _numeric(address: str) -> str:
    """The address as a number, the only form that libzmq binds."""
    plain = address.strip("[]")
    try:
        return str(net.getaddrinfo(plain, None, type=net.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise ValueError(f"broker.address={address} is not an address of this host: {error}") from None


def _own_address() -> str:
    """Address of this host towards others: connecting a datagram socket picks the route and sends nothing."""
    with net.socket(net.AF_INET, net.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"


def _bracket(host: str) -> str:
    return f"[{host}]" if ":" in host else host
