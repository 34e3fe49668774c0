"""The launcher's end of the fork server (runtime/forkserver.py): one a process, that serves every run it starts."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache

from offtrail.platform.runtime import attempt
from offtrail.platform.runtime.host import adopt_orphans

PADDING = " " * 5000
"""Room in the command line for those of the roles."""
IMPORT_SECONDS = 180.0
"""The longest that the imports may take; after that roles are started by themselves, and say where they hang."""


class ForkServer:
    """Starts importing when it is made; ``fork`` waits until it has."""

    def __init__(self) -> None:
        self._line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # Its own words are of no use: where it cannot import, a role started by itself says so in its log.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "offtrail.platform.runtime.forkserver", str(os.getpid()), PADDING],
            stdin=theirs.fileno(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=attempt.without(os.environ) | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
            process_group=0,
        )
        theirs.close()
        self._line.settimeout(IMPORT_SECONDS)

    def fork(self, command: Sequence[str], environment: Mapping[str, str], log: int) -> Forked | None:
        """The role that ``command`` names, a child of this process; None where the server is gone.

        Trap: a process is adopted only by one that is its subreaper when its parent leaves. For that long this one is.
        """
        adopt_orphans()
        try:
            socket.send_fds(self._line, [json.dumps([list(command), dict(environment)]).encode()], [log])
            pid = self._line.recv(32)
        except OSError:  # TimeoutError too
            self.close()
            return None
        finally:
            adopt_orphans(False)
        return Forked(int(pid)) if pid else None

    def close(self) -> None:
        """Let it go; what it has become stays."""
        self._line.close()
        self._process.kill()
        self._process.wait()


class Forked:
    """A child of this process that another one has made: of Popen, what a handle uses."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit status, −N where signal N ended it; None while it runs."""
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode

    def send_signal(self, signum: int) -> None:
        """Nothing where it has ended."""
        if self.poll() is None:
            os.kill(self.pid, signum)


@cache
def fork_server() -> ForkServer | None:
    """The one of this process, started by the first call; None where a child cannot be handed over (Linux can)."""
    return ForkServer() if sys.platform == "linux" else None
