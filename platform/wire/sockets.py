"""Server (the end of the broker, and of a scorer: they bind) and Client (every other role's end, dials).

    Client DEALER ── bundle of requests ──► ROUTER Server      a request is answered by exactly one reply
    Client DEALER ◄── bundle of replies ─── ROUTER Server      under the same ticket; several may be open
    Client SUB    ◄── [header] ──────────── PUB Server         hints: only the newest is kept, any may be lost

Invariants: bytes that are not a message never kill either end (the server answers Error, the client raises WireError);
a reply goes to the client that asked, under its ticket; whoever waits says for what, on whom, since
when, and ends at a deadline (I4). Sockets are not thread-safe: one thread per Client or Server.
"""

from __future__ import annotations

import ipaddress
import json
import secrets
import socket as net
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import zmq

from offtrail.platform.wire.auth import ClientKeys, Gate, ServerKeys, is_remote, make_keys, write_private
from offtrail.platform.wire.bundle import NO_TICKET, Letter, bundle, bytes_alone, unbundle
from offtrail.platform.wire.codec import Array, Frame, WireError, decode, encode
from offtrail.platform.wire.messages import Error, Message, RequestMessage, VersionHint

__all__ = [
    "Client", "ClientKeys", "Endpoint", "Envelope", "RefusedError", "Server", "ServerKeys", "WaitError", "make_keys",
]  # fmt: skip

REQUEST_FRAME_BYTES = 64 << 20
"""The broker drops a connection that announces a larger frame, before it allocates: 16 million tokens of a group."""
REQUEST_FRAMES = 4096
"""Frames of one message that the broker reads."""
PEER_MESSAGES = 64
"""Messages of one peer that the broker takes in ahead: then it reads that connection no further."""
PEER_REPLIES = 4096
"""Messages that wait for one peer to read them: above it, who does not read loses its replies."""
HINT_REQUEST_BYTES = 1024
"""To the hints' port come subscriptions only."""
SHARED_BYTES = 96 * 1024
"""Letters that may wait leave together before they are more bytes, or at the next poll: few frames, however many."""
LINGER_MS = 500
"""How long what is unsent may still leave after a close."""
CLIENT_PARTS_MS, SERVER_PARTS_MS = 60_000, 15_000
"""The same where messages of several frames were sent. Trap: where it runs out while one is half sent, and the other
end hangs up before the thread that closes sockets has had a core, libzmq 4.3.5 aborts the process (session_base.cpp,
clean_pipes). So a client has longer than a role may take to end, and a server longer than a peer may take to read on:
it hangs up when it ends, and only a host that has vanished does not.
"""
CLOSE_SECONDS = 20.0
"""How long a server may take to close."""
COPIED_BYTES = 256 * 1024
"""A frame below it costs less copied than sent from where it lies: pyzmq wakes a thread to let go of it."""
DRAIN = 256
"""Letters that one poll hands out, and a few more: a flood must not starve the caller's loop."""


def new_process() -> str:
    """The number by which the broker knows a process, all of its connections and no other's."""
    return secrets.token_hex(8)


_REQUESTS = frozenset(get_args(RequestMessage))
# Plain integers: pyzmq's are enums, and an operation with one costs half a microsecond.
_LAST, _MORE, _READABLE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE), int(zmq.POLLIN)


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
    """Where the broker listens, and its public key (empty on loopback, without CURVE): runs/NAME/endpoint.json."""

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
        """The name that the sender gave itself, for a log: who it is, the broker knows by ``process`` alone."""
        name = self.peer.partition(b"/")[0].decode(errors="replace")
        return name if name.isprintable() else self.peer.hex()

    @property
    def process(self) -> bytes:
        """The random number of the sender's process, which nobody but it and the broker ever sees."""
        return self.peer.split(b"/")[1] if self.peer.count(b"/") == 2 else self.peer


class Server:
    """Binds two ports (requests and hints) on ``address``; ``port`` 0 takes any free one.

    Raises ValueError, naming ``key``, when the address can be reached from other hosts and ``keys`` are not CURVE's, or
    cannot be bound.
    """

    def __init__(self, address: str, port: int, keys: ServerKeys, key: str = "broker.address") -> None:
        if not keys.public and is_remote(address):
            raise ValueError(
                f"{key}={address} can be reached from other hosts and needs CURVE keys, which a run has whose "
                f"broker.address can be too; or set {key}=127.0.0.1"
            )
        host = _numeric(address, key)
        # A context of its own: the gate answers for all sockets of a context.
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._gate = Gate(self._context, keys)
        self._requests = _open(self._context, zmq.ROUTER)
        self._requests.setsockopt(zmq.MAXMSGSIZE, REQUEST_FRAME_BYTES)
        self._requests.rcvhwm, self._requests.sndhwm = PEER_MESSAGES, PEER_REPLIES
        # A client that dials again comes back before its old connection is known to be dead.
        self._requests.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._hints = _open(self._context, zmq.PUB)
        self._hints.sndhwm = 16
        self._hints.setsockopt(zmq.MAXMSGSIZE, HINT_REQUEST_BYTES)
        for socket in (self._requests, self._hints):
            self._gate.guard(socket)
        self._gate.start()
        self._replies: dict[bytes, list[Letter]] = {}
        try:
            url, hints_url = _bind(self._requests, host, port), _bind(self._hints, host, 0)
        except zmq.ZMQError as error:
            self.close()
            named = f"{key}={address}" + (f", broker.port={port}" if port else "")
            raise ValueError(f"{named} cannot be bound: {error}") from None
        self.endpoint = Endpoint(url, hints_url, keys.public)

    def poll(self, timeout_s: float) -> list[Envelope]:
        """The requests at hand, about DRAIN at most; waits up to ``timeout_s`` for the first. Bad ones are answered
        here. What was replied until now leaves first. RuntimeError where no peer could be let in any more.
        """
        self._gate.check()
        self.flush()
        envelopes: list[Envelope] = []
        if not _readable(self._requests, timeout_s):
            return envelopes
        while len(envelopes) < DRAIN and (frames := _receive(self._requests)) is not None:
            envelopes += self._envelopes(frames[0].bytes, frames[1:])
        return envelopes

    def _envelopes(self, peer: bytes, frames: list[zmq.Frame]) -> list[Envelope]:
        envelopes = []
        try:
            if len(frames) > REQUEST_FRAMES:
                raise WireError(f"a message of {len(frames)} frames; the broker reads {REQUEST_FRAMES}")
            letters = unbundle(frames)
        except WireError as error:
            self._reply(peer, NO_TICKET, Error(error=str(error)))
            return []
        for ticket, parts in letters:
            try:
                message, arrays = decode(parts)
                if type(message) not in _REQUESTS:
                    raise WireError(f"{type(message).__name__} is not a request")
                envelopes.append(Envelope(peer, ticket, message, arrays))
            except WireError as error:
                self._reply(peer, ticket, Error(error=str(error)))
        return envelopes

    def reply(self, envelope: Envelope, message: Message, arrays: Sequence[Array] = ()) -> None:
        """Answer a request; the answer leaves with the next poll or flush. A peer that is gone is no error: its lease
        ends with its heartbeats.
        """
        self._reply(envelope.peer, envelope.ticket, message, arrays)

    def _reply(self, peer: bytes, ticket: int, message: Message, arrays: Sequence[Array] = ()) -> None:
        self._replies.setdefault(peer, []).append((ticket, encode(message, arrays)))

    def flush(self) -> None:
        """Send what was replied."""
        for peer, letters in self._replies.items():
            _send(self._requests, [peer, *bundle(letters)])
        self._replies.clear()

    def hint(self, message: VersionHint) -> None:
        """Publish a hint; it may be lost."""
        _send(self._hints, encode(message))

    def close(self) -> None:
        """Close the sockets; what is unsent has SERVER_PARTS_MS to leave, less where its reader hangs up. WaitError
        after CLOSE_SECONDS: libzmq itself would wait for a socket that is not closed for ever.
        """
        since = time.time()
        try:
            self.flush()
        finally:
            self._requests.close(SERVER_PARTS_MS)
            self._hints.close()
            ending = threading.Thread(target=self._context.term, name="wire-end", daemon=True)
            ending.start()
            ending.join(CLOSE_SECONDS)
        if ending.is_alive():
            raise WaitError.passed("the end of the broker's sockets", "libzmq", since, CLOSE_SECONDS)
        self._gate.join()


class Client:
    """Dials the broker and calls itself ``identity``; reconnects by itself. No other client gets its replies, even one
    that calls itself the same: each has a number of its own, which nobody else knows, behind its ``process``'s.
    """

    def __init__(self, endpoint: Endpoint, identity: str, keys: ClientKeys, process: str = "") -> None:
        self.endpoint, self.identity, self._keys = endpoint, identity, keys
        self._requests = self._socket(zmq.DEALER)
        self._requests.setsockopt(zmq.IDENTITY, f"{identity}/{process or new_process()}/{new_process()}".encode())
        self._requests.connect(endpoint.url)
        self._hints: zmq.Socket[bytes] | None = None
        # Random start: what another client was asked is told from it by its ticket.
        self._next = NO_TICKET + 1 + secrets.randbits(62)
        self._open: set[int] = set()
        self._early: list[tuple[int, Message, list[Array]]] = []
        self._letters: list[Letter] = []
        self._bytes = 0
        self._newest: int | None = None
        self._parts = False
        """Whether a message of several frames was sent."""

    def _socket(self, kind: int) -> zmq.Socket[bytes]:
        socket = _open(zmq.Context.instance(), kind)
        if self.endpoint.public_key:
            socket.curve_serverkey = self.endpoint.public_key.encode()
            socket.curve_publickey, socket.curve_secretkey = self._keys.public.encode(), self._keys.secret.encode()
        else:
            socket.plain_username, socket.plain_password = b"role", self._keys.password.encode()
        return socket

    def send(self, message: Message, arrays: Sequence[Array] = (), *, share: bool = False) -> int:
        """Send a request without waiting; its reply comes from ``poll`` under the returned ticket.

        Arrays may still be read after the call returns: leave them unchanged. ``share``: it may wait for others to
        share a frame with, until the next ``poll`` or unshared request. Raises WireError where it is more than the
        broker takes.
        """
        frames = encode(message, arrays)
        size = bytes_alone(frames[0]) + sum(map(len, frames[1:]))
        if size > REQUEST_FRAME_BYTES:  # perhaps a frame of it is, too
            largest = max(bytes_alone(frames[0]), *map(len, frames))
            if largest > REQUEST_FRAME_BYTES:
                raise WireError(
                    f"{type(message).__name__} has a frame of {largest} bytes; the broker takes {REQUEST_FRAME_BYTES}"
                )
        if len(frames) > REQUEST_FRAMES:
            raise WireError(f"{type(message).__name__} has {len(frames)} frames; the broker reads {REQUEST_FRAMES}")
        if self._bytes + size > SHARED_BYTES:
            self.flush()
        ticket = self._next
        self._next += 1
        self._open.add(ticket)
        self._letters.append((ticket, frames))
        self._bytes += size
        if not share or self._bytes >= SHARED_BYTES:
            self.flush()
        return ticket

    def flush(self) -> None:
        """Send what waits to share a frame. RefusedError where the broker has refused the run's secret."""
        if not self._letters:
            return
        frames = bundle(self._letters)
        self._parts = self._parts or len(frames) > 1
        try:
            _send(self._requests, frames)
        except zmq.Again:  # there is no mark to reach: libzmq has given the connection up
            raise RefusedError(
                f"the broker at {self.endpoint.url} does not take this run's secret: runs/NAME/keys is of another start"
            ) from None
        self._letters, self._bytes = [], 0

    def poll(self, timeout_s: float = 0.0) -> list[tuple[int, Message, list[Array]]]:
        """Replies at hand as (ticket, message, arrays); waits up to ``timeout_s`` for the first. Error replies too.

        About a microsecond when nothing is there and ``timeout_s`` is 0. Raises WireError on bytes that are no message,
        and where the broker could not read one of this client's.
        """
        self.flush()
        replies, self._early = self._early, []
        if not _readable(self._requests, 0.0 if replies else timeout_s):
            return replies
        while len(replies) < DRAIN and (frames := _receive(self._requests)) is not None:
            for ticket, parts in unbundle(frames):
                if ticket == NO_TICKET:
                    raise WireError(f"the broker could not read a message of {self.identity}: {decode(parts)[0]}")
                if ticket in self._open:
                    self._open.discard(ticket)
                    replies.append((ticket, *decode(parts)))
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
        """The newest version hinted since the first call, or None before the first hint. Never waits."""
        if self._hints is None:
            self._hints = self._socket(zmq.SUB)
            self._hints.setsockopt(zmq.CONFLATE, 1)
            self._hints.subscribe(b"")
            self._hints.connect(self.endpoint.hints_url)
        if _readable(self._hints, 0.0):
            message, _ = decode([self._hints.recv()])
            if isinstance(message, VersionHint):
                self._newest = message.version
        return self._newest

    def close(self) -> None:
        """Close the sockets, without waiting: what is unsent has LINGER_MS to leave, or CLIENT_PARTS_MS, if the process
        lives as long.
        """
        self._requests.close(CLIENT_PARTS_MS if self._parts else LINGER_MS)
        if self._hints is not None:
            self._hints.close()


def _open(context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
    """No high-water mark: a DEALER's send would stop the decode loop at it. What is in flight is bounded by leases, by
    one open request a role, and at the broker's end.
    """
    socket = context.socket(kind)
    socket.linger = LINGER_MS
    socket.set_hwm(0)
    socket.ipv6 = True
    # A host that vanishes says no goodbye: the kernel asks, and its descriptor is free again after two minutes.
    socket.tcp_keepalive, socket.tcp_keepalive_idle = 1, 60
    socket.tcp_keepalive_intvl, socket.tcp_keepalive_cnt = 15, 4
    return socket


def _send(socket: zmq.Socket[bytes], frames: Sequence[Frame]) -> None:
    """Large frames are sent from where they lie."""
    *first, last = frames
    for frame in first:
        socket.send(frame, _MORE, copy=len(frame) < COPIED_BYTES)
    socket.send(last, _LAST, copy=len(last) < COPIED_BYTES)


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
    if int(socket.getsockopt(zmq.EVENTS)) & _READABLE:
        return True
    return timeout_s > 0 and bool(zmq.zmq_poll([(socket, _READABLE)], max(1, round(timeout_s * 1000))))


def _bind(socket: zmq.Socket[Any], host: str, port: int) -> str:
    """Bind and return the URL under which others reach it."""
    socket.bind(f"tcp://{_bracket(host)}:{port or '*'}")
    bound = socket.getsockopt_string(zmq.LAST_ENDPOINT)
    reachable = _own_address() if ipaddress.ip_address(host).is_unspecified else host
    return f"tcp://{_bracket(reachable)}:{bound.rsplit(':', 1)[1]}"


def _numeric(address: str, key: str) -> str:
    """The address as a number, the only form that libzmq binds."""
    plain = address.strip("[]")
    try:
        return str(net.getaddrinfo(plain, None, type=net.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise ValueError(f"{key}={address} is not an address of this host: {error}") from None


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
