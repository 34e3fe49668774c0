"""What a process asks of its host: to end with its parent, another name, descriptors, and a free port."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

PR_SET_PDEATHSIG, PR_SET_NAME, PR_SET_CHILD_SUBREAPER = 1, 15, 36


def die_with(parent: int, signum: int = signal.SIGKILL) -> None:
    """Have the kernel send ``signum`` to this process when its parent is gone, in the middle of anything (Linux); leave
    at once if it is gone already.

    Trap: the signal comes when the parent's *thread* that started this process ends, not only with the whole process.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signum, 0, 0, 0)
    if os.getppid() != parent:  # it was gone before the request took effect
        os._exit(1)


def adopt_orphans(whether: bool = True) -> None:
    """Have descendants whose parent has left become children of this process, or no more (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, int(whether), 0, 0, 0)


def rename_process(command: Sequence[str], name: str) -> None:
    """Show ``command`` as this process's command line, cut to the room that its own takes, and ``name`` as its name
    (Linux).
    """
    if sys.platform != "linux":
        return
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])  # arg_start, arg_end of proc(5), counted from the state
    words = b"".join(word.encode() + b"\0" for word in command)[: end - start - 1]
    ctypes.memmove(start, words.ljust(end - start, b"\0"), end - start)
    ctypes.CDLL(None).prctl(PR_SET_NAME, name.encode()[:15], 0, 0, 0)


def take_all_descriptors() -> None:
    """Raise this process's limit of open files, which is low for `select`'s sake, to what it may have."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def own_age() -> float:
    """Seconds since this process was started."""
    return max(0.0, time.time() - float(psutil.Process().create_time()))


def free_port(address: str = "127.0.0.1", port: int = 0) -> int:
    """``port``, or if that is 0 any that is free now; by the time that a server binds it, another process may have
    taken it. OSError when it is taken already, or the address is not this host's.
    """
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        if port:  # connections of the server that had it before may linger
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((address, port))
        return int(probe.getsockname()[1])
