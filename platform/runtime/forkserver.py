"""The fork server: a process that has imported what roles need, and becomes each of them by a fork.

    launcher ── command, environment, log ──► fork server ──fork──► (a child) ──fork──► the role: process.main
             ◄───────────── its pid ──────────────┘                    └─ leaves: the launcher adopts the role

torch and transformers take four CPU seconds to import, which a run of four roles pays once. `python -m
offtrail.platform.runtime.forkserver PARENT PADDING`, its standard input a Unix socket of the launcher (forks.py).

Invariants: a role is the launcher's own child, as if it had started it (its parent's death signal, its exit status),
and outlives this process; what is imported here starts no thread, for a fork has only one, and touches no GPU.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import socket
import sys
from typing import NamedTuple

from offtrail.platform.runtime import process
from offtrail.platform.runtime.host import die_with, rename_process
from offtrail.platform.runtime.roles import ROLES

PRELOADED = (
    "transformers.models.auto.tokenization_auto",
    *(f"offtrail.platform.{r.role}.role" for r in ROLES if r.device),
)
"""The modules of all roles that compute, and the slowest of what they import later."""
MOST_BYTES = 1 << 17


class Request(NamedTuple):
    """A role to become: ``command`` as it would have been started, what its environment has besides, and its log."""

    command: list[str]
    environment: dict[str, str]
    log: int


def main(argv: list[str]) -> int:
    """Fork until the launcher is gone; in a fork, the exit status of the role."""
    die_with(int(argv[0]))
    rename_process([sys.executable, "-m", "offtrail.platform.runtime.forkserver", argv[0]], "forkserver")
    line = socket.socket(fileno=0)
    for module in PRELOADED:
        importlib.import_module(module)
    if threads() != 1:
        raise RuntimeError(f"the imports of roles have started {threads() - 1} threads: they cannot be forked")
    gc.collect()
    gc.freeze()  # a collection in a fork would copy the pages of everything that is shared
    while (request := receive(line)) is not None:
        if not (pid := fork()):
            line.detach()
            return process.main(become(request))
        os.close(request.log)
        line.send(b"%d" % pid)
    return 0


def threads() -> int:
    """Of this process, those of libraries included."""
    return len(os.listdir("/proc/self/task"))


def receive(line: socket.socket) -> Request | None:
    """The next request; None when the launcher has closed the line."""
    message, descriptors, _, _ = socket.recv_fds(line, MOST_BYTES, 1)
    return Request(*json.loads(message), *descriptors) if message else None


def fork() -> int:
    """0 in the new process, which the launcher has adopted; its pid in this one. OSError where it cannot be made.

    Trap: the end of a pipe is heard only where nobody, oneself included, holds the side that is written to.
    """
    (hears, tells), (waits, lets) = os.pipe(), os.pipe()
    if middle := os.fork():
        os.close(tells)
        os.close(waits)
        os.waitpid(middle, 0)  # from here on the role is the launcher's
        if not (pid := os.read(hears, 32)):
            raise ChildProcessError("the process that was to fork a role has died")
        os.write(lets, b"1")
        os.close(hears)
        os.close(lets)
        return int(pid)
    os.close(hears)
    os.close(lets)
    try:
        role = os.fork()
    except OSError:  # no room for it
        os._exit(1)
    if role:
        os.write(tells, b"%d" % role)
        os._exit(0)
    os.close(tells)
    if not os.read(waits, 1):  # nobody has heard of this process
        os._exit(1)
    os.close(waits)
    return 0


def become(request: Request) -> list[str]:
    """Make this fork what a process of its own would be; the arguments of the role."""
    os.setpgid(0, 0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, standard in ((nothing, 0), (request.log, 1), (request.log, 2)):
        os.dup2(descriptor, standard)
    os.close(nothing)
    os.close(request.log)
    os.environ.update(request.environment)
    _, _, _, *arguments = request.command
    rename_process(request.command, "-".join(arguments[:2]))
    sys.argv = ["", *arguments]
    return arguments


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
