"""The parent of a verifier process: nothing that a verifier starts outlives it, however far it has forked away.

    pool ── SIGTERM ──► keeper (takes in orphans) ──► verifier ──► whatever it starts, in any session
                           └─ when the verifier has ended: kills the rest, then ends as the verifier did

Invariants: a descendant stays below the keeper until it has ended, since the keeper is its subreaper (Linux); the
keeper runs no verifier's code; it ends when its own parent does. Who kills the keeper itself (a process of the same
user may) gets the verifier killed with it, and not what that had started.
"""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import suppress

from offtrail.platform.runtime.host import adopt_orphans, die_with

LOOK_SECONDS = 0.001


def keep() -> None:
    """Go on in a child of this process, which never returns from here: it becomes the keeper."""
    die_with(int(os.environ["OFFTRAIL_PARENT"]), signal.SIGTERM)
    adopt_orphans()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # it ends by the verifier's signal, which would dump it
    keeper, watched = os.getpid(), {signal.SIGTERM, signal.SIGCHLD}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    verifier = os.fork()
    if verifier == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        die_with(keeper)
        return
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):  # the pipes are the verifier's: they end with it
        os.dup2(nothing, descriptor)
    while signal.sigwait(watched) == signal.SIGCHLD:
        if (code := _reap(verifier)) is not None:
            break
    else:
        code = None
    rest = _end_all(verifier)
    _end_as(rest if code is None else code)


def _reap(verifier: int) -> int | None:
    """Take in what has ended: the verifier's exit code (−N: signal N) where it was among it."""
    code = None
    with suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            if found[0] == verifier:
                code = os.waitstatus_to_exitcode(found[1])
    return code


def _end_all(verifier: int) -> int:
    """Kill all descendants, stopped first so that none forks away; the verifier's exit code."""
    code = -signal.SIGKILL
    while True:
        ended = _reap(verifier)
        code = code if ended is None else ended
        below = list(descendants(os.getpid()))
        if not below:
            return code
        for signum in (signal.SIGSTOP, signal.SIGKILL):
            for pid in below:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signum)
        time.sleep(LOOK_SECONDS)


def _end_as(code: int) -> None:
    """Leave with this exit code, or by this signal."""
    if code < 0:
        with suppress(OSError, ValueError):  # SIGKILL has no handler, and needs none
            signal.signal(-code, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {-code})
        os.kill(os.getpid(), -code)
    os._exit(max(code, 0))


def descendants(root: int) -> Iterator[int]:
    """Processes below ``root`` that have not been reaped."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with suppress(OSError, IndexError):
                with open(f"/proc/{name}/stat", "rb") as file:
                    fields = file.read().rpartition(b")")[2].split()
                children.setdefault(int(fields[1]), []).append(int(name))
    waiting = [root]
    while waiting:
        found = children.get(waiting.pop(), [])
        waiting += found
        yield from found


def verifier_below(keeper: int) -> int:
    """The keeper's first child, which is its verifier: orphans come after it. The process itself before it has one."""
    with suppress(OSError, IndexError), open(f"/proc/{keeper}/task/{keeper}/children", "rb") as file:
        return int(file.read().split()[0])
    return keeper


def waited_for_a_core(pid: int) -> float:
    """Seconds that a process was ready to run and had no core (Linux counts them; 0 elsewhere)."""
    with suppress(OSError, IndexError), open(f"/proc/{pid}/schedstat", "rb") as file:
        return int(file.read().split()[1]) / 1e9
    return 0.0
