"""Who may speak: CURVE keys made per run, and the ZAP handler that refuses every other key.

The launcher calls `make_keys`; the broker reads ServerKeys, every other role
ClientKeys, from runs/NAME/keys (directory 0700, files 0600). The server's public key travels in endpoint.json.
Invariant: a peer whose public key is not in ServerKeys.allowed gets no answer, and its bytes never reach the codec.
"""

from __future__ import annotations

import ipaddress
import json
import os
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq
from zmq.utils import z85

_ZAP = "inproc://zeromq.zap.01"


@dataclass(frozen=True, slots=True)
class ClientKeys:
    """A key pair in Z85 text."""

    public: str
    secret: str

    @classmethod
    def read(cls, run_dir: Path) -> ClientKeys | None:
        """The run's client pair, or None where the run has no keys (a broker on loopback)."""
        found = _read(run_dir / "keys" / "client.json")
        return None if found is None else cls(found["public"], found["secret"])


@dataclass(frozen=True, slots=True)
class ServerKeys:
    """The broker's key pair and the client public keys that it lets in."""

    public: str
    secret: str
    allowed: frozenset[str]

    @classmethod
    def read(cls, run_dir: Path) -> ServerKeys | None:
        """The run's server pair, or None where the run has no keys."""
        found = _read(run_dir / "keys" / "server.json")
        return None if found is None else cls(found["public"], found["secret"], frozenset(found["allowed"]))


def make_keys(run_dir: Path, address: str) -> ServerKeys | None:
    """Make fresh pairs for server and clients below run_dir/keys and return the server's.

    On a loopback ``address`` there are none: keys of an earlier start are removed, and the result is None.
    """
    folder = run_dir / "keys"
    if not is_remote(address):
        shutil.rmtree(folder, ignore_errors=True)
        return None
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    client_public, client_secret = _pair()
    public, secret = _pair()
    write_private(folder / "client.json", json.dumps({"public": client_public, "secret": client_secret}))
    allowed = [client_public]
    write_private(folder / "server.json", json.dumps({"public": public, "secret": secret, "allowed": allowed}))
    return ServerKeys(public, secret, frozenset(allowed))


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


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    return found


class ZapGate:
    """Answers libzmq's question "may this key come in?" (RFC 27) for every socket of one context, on a thread.

    Bind it before the server's sockets: without a handler, libzmq lets every CURVE client in.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], allowed: frozenset[str]) -> None:
        self._allowed = {z85.decode(key) for key in allowed}
        self._socket = context.socket(zmq.REP)
        self._socket.linger = 0
        self._socket.bind(_ZAP)
        self._thread = threading.Thread(target=self._serve, name="zap", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        try:
            while True:
                self._socket.send_multipart(self._answer(self._socket.recv_multipart()))
        except zmq.ContextTerminated:
            self._socket.close()

    def _answer(self, request: list[bytes]) -> list[bytes]:
        """Request: version, id, domain, address, identity, mechanism, key. Reply: version, id, status, …"""
        version, request_id = request[0], request[1]
        allowed = version == b"1.0" and len(request) > 6 and request[5] == b"CURVE" and request[6] in self._allowed
        status, text = (b"200", b"OK") if allowed else (b"400", b"unknown key")
        return [b"1.0", request_id, status, text, b"role" if allowed else b"", b""]

    def join(self) -> None:
        """Wait for the thread to end; call after the context's termination has begun."""
        self._thread.join()
