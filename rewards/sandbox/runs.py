"""One run as its judge sees it. Not thread-safe, and nothing here knows of tests.

Invariants: every reply is bounded and every wait has an end; what a child writes is read as plain values or as its
death; a run that has died stays dead; when `close` returns its process has been reaped.
"""

from __future__ import annotations

import builtins
import json
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn

from offtrail.rewards.sandbox.values import pack, unpack

LONGEST_PROGRAM = LONGEST_REPLY = 1 << 20
"""Bytes."""
LONGEST_WORDS = 200
NO_ERRORS_OF_A_CALL = (StopIteration, StopAsyncIteration, UnicodeError)
"""Trap: a StopIteration would silently end a test's map() or zip(), and all() of nothing is true. UnicodeError's kinds
take more than words.
"""
KINDS = {"MemoryError": "memory", "SyntaxError": "syntax", "IndentationError": "syntax", "TabError": "syntax"}
Status = dict[str, Any]
"""How a run ended, in the server's words: `code`, its exit code or −signal, and `cpu`, its seconds."""


class SandboxError(RuntimeError):
    """No program can be run here; one line that says why and the way out."""


class Dead(BaseException):
    """A run is over before its time. ``kind``: syntax, raised (while loading), timeout, memory, died, reply; the text
    begins with it. Trap: not an Exception, so that no test swallows it.
    """

    def __init__(self, kind: str, words: str) -> None:
        super().__init__(f"{kind}: {words}"[:LONGEST_WORDS])
        self.kind = kind


@dataclass(frozen=True)
class Limits:
    """Of one run: ``seconds`` by the clock, ``cpu_seconds`` (whole), ``memory`` in bytes of address space."""

    seconds: float = 10.0
    cpu_seconds: int = 3
    memory: int = 512 << 20


class Run:
    """The judge's end of a run's wire. ``ended`` waits until the run of this number is over, and says how it ended.
    ``end``: its deadline by time.monotonic.
    """

    def __init__(
        self, number: int, wire: socket.socket, ended: Callable[[int], Status], limits: Limits, end: float
    ) -> None:
        self.number, self.wire, self.limits, self.end, self._ended = number, wire, limits, end, ended
        self._buffer = bytearray()
        self._status: Status | None = None

    def send(self, message: Any) -> None:
        """One line. Raises Dead."""
        try:
            self.wire.settimeout(self.left())
            self.wire.sendall(json.dumps(message).encode() + b"\n")
        except TimeoutError:
            self.out_of_time()
        except OSError:
            self.over()

    def receive(self) -> dict[str, Any]:
        """One line. Raises Dead."""
        while b"\n" not in self._buffer:
            self.wire.settimeout(self.left())
            try:
                piece = self.wire.recv(1 << 16)
            except TimeoutError:
                self.out_of_time()
            except OSError:
                piece = b""
            if not piece:
                self.over()
            self.take(piece)
        line, _, rest = self._buffer.partition(b"\n")
        self._buffer = rest
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            raise Dead("reply", "what it sent is none")
        return message

    def take(self, piece: bytes) -> None:
        """What has been read from the wire. Raises Dead."""
        self._buffer += piece
        if len(self._buffer) > LONGEST_REPLY:
            raise Dead("reply", f"more than {LONGEST_REPLY:,} bytes")

    def loaded(self) -> None:
        """The first reply: whether the program ran through. Raises Dead where it did not."""
        raised = self.receive().get("load", "nothing")
        if raised is not None:
            name, words = _said(raised)
            raise Dead(KINDS.get(name, "raised"), f"{name}: {words}")

    def left(self) -> float:
        """Seconds. Raises Dead where there are none."""
        left = self.end - time.monotonic()
        if left <= 0:
            self.out_of_time()
        return left

    def out_of_time(self) -> NoReturn:
        """Raise Dead."""
        raise Dead("timeout", f"ran past {self.limits.seconds:g} s")

    def over(self) -> NoReturn:
        """Raise Dead with how the process ended, as the server tells it."""
        status = self.close()
        code, cpu = status["code"], status["cpu"]
        if code == -signal.SIGXCPU or (code == -signal.SIGKILL and cpu >= self.limits.cpu_seconds):
            raise Dead("timeout", f"took more than {self.limits.cpu_seconds} s of CPU")
        if code < 0:
            raise Dead("died", f"signal {signal.Signals(-code).name}")
        raise Dead("died", f"ended by itself with code {code}")

    def close(self) -> Status:
        """End it and wait until it is gone. Raises SandboxError where the server is."""
        self.wire.close()
        if self._status is None:
            self._status = self._ended(self.number)
        return self._status


class Functions:
    """A loaded program whose functions can be called; a context manager. ``dead`` is how it died, None before."""

    def __init__(self, run: Run, program: str) -> None:
        self._run = run
        self.dead: Dead | None = None
        try:
            run.send(program)
            run.loaded()
        except BaseException:
            run.close()
            raise

    def call(self, name: str, *given: Any, **named: Any) -> Any:
        """What the program's function gives for plain values, or a builtin exception that it raises (RuntimeError for
        any other). Raises Dead, again and again once it is, and TypeError for an argument that is no plain value.
        """
        if self.dead is not None:
            raise self.dead
        asked = {"f": name, "a": pack(list(given)), "k": pack(named)}
        try:
            self._run.send(asked)
            answer = self._run.receive()
            value = _value(answer)
        except Dead as death:
            self.dead = death
            raise
        if "e" in answer:
            raise _exception(answer)
        return value

    def close(self) -> None:
        """End it."""
        self._run.close()

    def __enter__(self) -> Functions:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _value(answer: dict[str, Any]) -> Any:
    if "e" in answer:
        return None
    try:
        return unpack(answer["v"])
    except (Exception, RecursionError):
        raise Dead("reply", "what it sent is no value") from None


def _exception(answer: dict[str, Any]) -> Exception:
    name, words = _said(answer)
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, NO_ERRORS_OF_A_CALL):
        with suppress(TypeError):  # an ExceptionGroup takes more than words
            return kind(words)
    return RuntimeError(f"{name}: {words}")


def _said(message: Any) -> tuple[str, str]:
    told = message if isinstance(message, dict) else {}
    return str(told.get("e", "nothing"))[:80], str(told.get("m", ""))[:LONGEST_WORDS]
