"""The fork server: clean, warm, one fork per run; and what the child does. Started by box.py, never imported there.

Over the control socket (SEQPACKET) comes one JSON object a run, with its descriptors; one goes back when it is over.
Over a run's own socket, its wire, the child gets first the program, a line of JSON, and then its calls.

Traps: a test, or any text of one, in this module's memory would be readable to every program; nothing that comes from
a child may be read here. The server ends a run, by SIGKILL, at its deadline or as soon as the judge closes the wire.
"""

from __future__ import annotations

import builtins
import fcntl
import gc
import io
import json
import os
import resource
import select
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from offtrail.rewards.sandbox import filter as seccomp
from offtrail.rewards.sandbox.values import pack, unpack
from offtrail.rewards.sandbox.walls import FIRST_UID, UIDS, enclose, free_uids, landlock_abi, ruleset

WARM = (
    "array bisect calendar cmath collections copy dataclasses datetime decimal enum fractions functools hashlib heapq "
    "itertools json math numbers operator queue random re statistics string textwrap threading typing unicodedata"
)
"""What programs import most: read once, by the server."""
LONGEST_REQUEST = 1 << 12
MOST_DESCRIPTORS = 1024
RECURSION = 3000
SAID = 200
_HANGUP = select.POLLRDHUP | select.POLLHUP | select.POLLERR


@dataclass
class Running:
    """A child that has not been reaped: ``process`` is its pidfd, ``wire`` the server's copy of its socket."""

    run: int
    pid: int
    process: int
    wire: int
    end: float


def main(control: int, folders: Sequence[str]) -> NoReturn:
    """Serve until the control socket ends. ``folders``: what programs may read."""
    most = min(MOST_DESCRIPTORS, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    for name in WARM.split():
        __import__(name)
    compile("def f(x):\n return [i for i in range(x)]", "warm", "exec")
    seccomp.program_for(1)
    server = Server(socket.socket(fileno=control), ruleset(folders), free_uids(os.path.dirname(os.__file__)))
    gc.collect()
    gc.freeze()
    gc.disable()
    server.tell({"landlock": landlock_abi()})
    while True:
        server.turn()


class Server:
    """See the module's docstring. ``rules``: a Landlock ruleset or −1; ``own_uids``: each run gets a user id."""

    def __init__(self, control: socket.socket, rules: int, own_uids: bool) -> None:
        self.control, self.rules, self.own_uids = control, rules, own_uids
        self.by_process: dict[int, Running] = {}
        self.by_wire: dict[int, Running] = {}
        self.begun = 0
        self.poller = select.poll()
        self.poller.register(control, select.POLLIN)

    def tell(self, message: dict[str, Any]) -> None:
        """To the judge's side; without one there is nothing to do."""
        try:
            self.control.send(json.dumps(message).encode())
        except OSError:
            os._exit(0)

    def turn(self) -> None:
        """Wait for what happens next and act on it."""
        end = min((one.end for one in self.by_process.values()), default=None)
        left = None if end is None else max(0.0, end - time.monotonic()) * 1000
        for descriptor, _ in self.poller.poll(left):
            if descriptor == self.control.fileno():
                self.begin()
            elif one := self.by_process.get(descriptor):
                self.reap(one)
            elif one := self.by_wire.get(descriptor):
                self.kill(one)
        now = time.monotonic()
        for one in self.by_process.values():
            if one.end <= now:
                self.kill(one)

    def begin(self) -> None:
        """One request, one fork."""
        data, descriptors, _, _ = socket.recv_fds(self.control, LONGEST_REQUEST, 3)
        if not data:
            os._exit(0)  # and with it, by their parent-death signal, all children
        asked = json.loads(data)
        self.begun += 1
        pid = os.fork()
        if pid == 0:
            try:
                child(descriptors, self.rules, FIRST_UID + self.begun % UIDS if self.own_uids else 0, asked)
            finally:
                os._exit(1)
        wire, *others = descriptors
        for other in others:
            os.close(other)
        one = Running(asked["run"], pid, os.pidfd_open(pid), wire, time.monotonic() + asked["seconds"])
        self.by_process[one.process] = self.by_wire[wire] = one
        self.poller.register(one.process, select.POLLIN)
        self.poller.register(wire, _HANGUP)

    def kill(self, one: Running) -> None:
        """Our own child that has not been reaped: its number cannot be another's."""
        os.kill(one.pid, signal.SIGKILL)
        one.end = time.monotonic() + 1
        if self.by_wire.pop(one.wire, None):
            self.poller.unregister(one.wire)

    def reap(self, one: Running) -> None:
        """It has ended: its wire ends with it, and the judge hears how."""
        _, status, usage = os.wait4(one.pid, 0)
        self.poller.unregister(one.process)
        if self.by_wire.pop(one.wire, None):
            self.poller.unregister(one.wire)
        del self.by_process[one.process]
        os.close(one.process)
        os.close(one.wire)
        code = os.waitstatus_to_exitcode(status)
        self.tell({"run": one.run, "code": code, "cpu": usage.ru_utime + usage.ru_stime})


def child(descriptors: list[int], rules: int, uid: int, asked: dict[str, Any]) -> None:
    """The run itself. 0: its input or nothing, 1: its output or nothing, 2: nothing, 3: the wire."""
    nothing = os.open(os.devnull, os.O_RDWR)
    wire, *streams = descriptors
    source, sink = streams or (nothing, nothing)
    high = [fcntl.fcntl(one, fcntl.F_DUPFD, 64) for one in (source, sink, nothing, wire, *([rules] * (rules >= 0)))]
    for number, one in enumerate(high):
        os.dup2(one, number)
    os.closerange(len(high), MOST_DESCRIPTORS)
    os.setsid()
    peer = socket.socket(fileno=3)
    try:
        enclose(4 if rules >= 0 else -1, memory=asked["memory"], cpu_seconds=asked["cpu_seconds"], uid=uid)
    except Exception as error:
        reply(peer, {"load": said(error)})
        os._exit(1)
    if rules >= 0:
        os.close(4)
    gc.enable()
    sys.setrecursionlimit(RECURSION)
    sys.stdin, sys.stdout, sys.stderr = (
        io.TextIOWrapper(open(number, mode), encoding="utf-8", errors="replace")  # noqa: SIM115
        for number, mode in ((0, "rb"), (1, "wb"), (2, "wb"))
    )
    lines = peer.makefile("rb")
    program = json.loads(lines.readline())
    if streams:
        run_program(program, peer)
    else:
        answer_calls(program, peer, lines)


def run_program(text: str, peer: socket.socket) -> None:
    """As `python program.py`; what it has written is flushed before its end is told."""
    sys.argv = ["program.py"]
    raised = execute(text, {"__name__": "__main__", "__builtins__": builtins})
    if raised is not None and raised["e"] == "SystemExit" and raised["m"] in ("", "None", "0"):
        raised = None
    try:
        sys.stdout.flush()
    except Exception as error:
        raised = raised or said(error)
    reply(peer, {"load": raised})
    os._exit(0)


def answer_calls(text: str, peer: socket.socket, lines: io.BufferedIOBase) -> None:
    """Load the program, then call its functions as asked."""
    space: dict[str, Any] = {"__name__": "candidate", "__builtins__": builtins}
    raised = execute(text, space)
    reply(peer, {"load": raised})
    if raised:
        os._exit(0)
    for line in lines:
        try:
            asked = json.loads(line)
            if asked["f"] not in space:
                raise NameError(f"name {asked['f']!r} is not defined")
            given = space[asked["f"]](*unpack(asked["a"]), **unpack(asked["k"]))
            reply(peer, {"v": pack(given)})
        except BaseException as error:
            reply(peer, said(error))


def execute(text: str, space: dict[str, Any]) -> dict[str, str] | None:
    """What was raised, None where nothing was."""
    try:
        exec(compile(text, "<program>", "exec"), space)
    except BaseException as error:
        return said(error)
    return None


def said(error: BaseException) -> dict[str, str]:
    """An exception as its name and its words."""
    try:
        words = str(error)[:SAID]
    except BaseException:
        words = ""
    return {"e": type(error).__name__, "m": words}


def reply(peer: socket.socket, message: dict[str, Any]) -> None:
    """One line to the judge."""
    peer.sendall(json.dumps(message).encode() + b"\n")
