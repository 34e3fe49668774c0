"""One launch of a run is an attempt, and whatever it starts and shares carries its name.

    launcher: begin ─► $OFFTRAIL_ATTEMPT, inherited by roles, servers, verifiers and what these start
    at the end, by the launcher, or by its reaper where it was killed: sweep ─► no process, nothing in shared memory

Invariant: who leaves late touches nothing of a successor's: names of an attempt are of no other.
Trap: setproctitle, which SGLang uses, writes a title over the environment; SPT_NOENV keeps it from that.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import psutil

VARIABLE = "OFFTRAIL_ATTEMPT"
WAIT_SECONDS = 5.0
"""The longest that the kernel may take to end a killed process."""
_SHARED = re.compile(r"(sgl|sem\.mp-|torch_).+")


def begin() -> str:
    """A name for this launch, in the environment of all that this process starts from now on."""
    os.environ[VARIABLE], os.environ["SPT_NOENV"] = secrets.token_hex(4), "1"
    return current()


def over() -> None:
    """What is started from now on belongs to no attempt."""
    os.environ.pop(VARIABLE, None)


def marked() -> dict[str, str]:
    """What the environment of a process of this attempt has besides."""
    return {name: os.environ[name] for name in (VARIABLE, "SPT_NOENV") if name in os.environ}


def current() -> str:
    """The attempt that this process belongs to, or begins; "" where there is none."""
    return os.environ.get(VARIABLE, "")


def without(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that outlives the attempt."""
    return {name: value for name, value in environment.items() if name != VARIABLE}


def members(attempt: str, roles: Iterable[psutil.Process] = ()) -> list[psutil.Process]:
    """The living processes that were started, by whomever, within an attempt; a zombie holds nothing.

    ``roles``: those of them that a fork has made, whose environment the system does not tell.
    """
    found = {process.pid: process for process in which(roles, _lives)}
    living = list(which(psutil.process_iter(), _lives)) if attempt or found else []
    if attempt:
        found |= {process.pid: process for process in which(living, lambda p: p.environ().get(VARIABLE) == attempt)}
    # While a process begins a program, its environment cannot be read. In the order of their numbers: a parent before
    # its children, mostly.
    for process in which(living, lambda p: p.ppid() in found):
        found[process.pid] = process
    return list(found.values())


def which(processes: Iterable[psutil.Process], holds: Callable[[psutil.Process], bool]) -> Iterator[psutil.Process]:
    """Those of which ``holds`` is true; one that is gone meanwhile, or another user's, is none of them."""
    for process in processes:
        held = False
        with contextlib.suppress(psutil.Error, OSError):
            held = holds(process)
        if held:
            yield process


def _lives(process: psutil.Process) -> bool:
    return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)


def shared_files(processes: Iterable[psutil.Process]) -> set[str]:
    """What they have mapped of shared memory that nobody removes for them when they are killed."""
    mapped = set[int]()
    for process in processes:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{process.pid}/maps").read_text(errors="replace").splitlines():
                if " /dev/shm/" in line:
                    mapped.add(int(line.split()[4]))
    with contextlib.suppress(OSError), os.scandir("/dev/shm") as entries:
        # Trap: by number, for a semaphore's maker has it mapped under the name that it had before it was linked.
        return {entry.path for entry in entries if _SHARED.fullmatch(entry.name) and entry.inode() in mapped}
    return set()


def sweep(
    attempt: str, roles: Sequence[psutil.Process] = (), patience_s: float = 0.0, known: Iterable[str] = ()
) -> None:
    """Give every process of an attempt so long to leave by itself, kill the rest, and remove what they shared of memory
    that bears no name of the attempt's; ``known``: files of that kind that were seen before.
    """
    left = members(attempt, roles)
    shared = shared_files(left).union(known)
    deadline = time.monotonic() + patience_s
    while left and time.monotonic() < deadline:
        time.sleep(0.05)
        left = members(attempt, roles)
    shared |= shared_files(left)
    deadline = time.monotonic() + WAIT_SECONDS
    while left and time.monotonic() < deadline:
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        time.sleep(0.02)
        left = members(attempt, roles)  # what was started while the others were killed
    for file in shared:
        with contextlib.suppress(OSError):
            os.unlink(file)
