"""One process tree that lifecycle.py starts: a server of serve.py, or the router. Its words go to a log file.

Invariant: after `end` no process of the tree is left, whatever state it was in, nor what they held in shared memory:
all are in the process group of the first, which is killed as a whole before the first is reaped, so that its number
cannot belong to another. Python's own keeper of semaphores (multiprocessing.resource_tracker) goes last: it removes
those of processes that are gone, which nothing else knows by name.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from offtrail.platform.runtime.attempt import shared_files, which

TRACKER = "multiprocessing.resource_tracker"
TRACKER_SECONDS = 5.0
"""The longest that it may take, once nobody is left to keep for."""
END_SECONDS = 10.0
"""The longest that a killed process may take to leave; one that the kernel holds longer is left to it."""
TAIL_BYTES = 32_768
_ERROR = re.compile(r"^(sglang serve: error: .+|[\w.]*(Error|Exception|Interrupt)\b.*)")


class Child:
    """``python -m MODULE PID_OF_THIS_PROCESS ARGUMENTS``, in a process group of its own.

    Trap: it is killed when the *thread* that made it ends (PR_SET_PDEATHSIG), not only with the process.
    """

    def __init__(self, module: str, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.log = log
        self._killed_here = False  # sglang kills itself by SIGKILL too, when it cannot start
        self._shared: set[str] = set()
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-P", "-m", module, str(os.getpid()), *arguments]
        # 0600: sglang logs all its settings, the keys among them
        with open(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600), "ab") as out:
            self._log_start = out.seek(0, os.SEEK_END)
            # a process group of its own: Ctrl-C on the terminal is the launcher's alone
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=dict(environment), process_group=0
            )

    @property
    def pid(self) -> int:
        """The number of the first process, and so of the group."""
        return self._process.pid

    @property
    def exited(self) -> bool:
        """Whether the first process has ended. It is not reaped here."""
        if self._process.returncode is not None:
            return True
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def remember(self) -> list[psutil.Process]:
        """The tree's processes: the group's, for they may have lost their parent. What they hold of shared memory is
        removed at the end, also if they die before it: sglang leaves it behind.
        """
        members = list(which(psutil.process_iter(), lambda process: os.getpgid(process.pid) == self.pid))
        self._shared |= shared_files(members)
        return members

    def end(self) -> str:
        """Kill the whole tree with SIGKILL, wait for its end, and say how the first process ended. Once is enough."""
        if self._process.returncode is None:
            members = self.remember()
            self._killed_here = not self.exited
            _end_but_trackers(members)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()
            _wait_for(members, END_SECONDS)
            for path in self._shared:
                with contextlib.suppress(OSError):
                    os.unlink(path)
        return self.exit_report()

    def exit_report(self) -> str:
        """How it ended, in one line: exit status or signal, its last words, and where the log is."""
        code = self._process.returncode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"
        words = f"; last words: {said}" if not self._killed_here and (said := self._last_words()) else ""
        return f"{how}{words} (log: {self.log})"

    @property
    def port_was_taken(self) -> bool:
        """Whether it ended because another process had taken a port that was free before."""
        return "address already in use" in self._said().lower()

    def _last_words(self) -> str:
        """The last line that names an error, else the last line."""
        said = (line.strip() for line in self._said().splitlines() if "resource_tracker" not in line)
        lines = [line for line in said if line]
        errors = [line for line in lines if _ERROR.match(line)]
        return (errors or lines or [""])[-1]

    def _said(self) -> str:
        """The end of the log, of this process only."""
        with contextlib.suppress(OSError), self.log.open("rb") as log:
            log.seek(max(self._log_start, log.seek(0, os.SEEK_END) - TAIL_BYTES))
            return log.read().decode(errors="replace")
        return ""


def _end_but_trackers(members: Sequence[psutil.Process]) -> None:
    """Kill all but the trackers, and let these end by themselves, which they do when the last of the others is gone."""
    trackers = list(which(members, _is_tracker))
    for member in set(members) - set(trackers):
        with contextlib.suppress(psutil.Error):
            member.kill()
    _wait_for(trackers, TRACKER_SECONDS)


def _is_tracker(member: psutil.Process) -> bool:
    return any(TRACKER in argument for argument in member.cmdline())


def _wait_for(members: Sequence[psutil.Process], seconds: float) -> None:
    """Wait until the killed processes are gone; those without a parent may stay as zombies, which hold nothing."""
    deadline = time.monotonic() + seconds
    for member in members:
        with contextlib.suppress(psutil.Error):
            while member.is_running() and member.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
                time.sleep(0.005)
