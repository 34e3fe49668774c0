"""Cleans up after a launcher that was killed: `python -m offtrail.platform.launcher.reaper RUN_DIR ATTEMPT`, its child.

    launcher ── the pid of each role, at the end "done" ──► stdin; its end without "done": the launcher was killed

The kernel has told the roles to leave then (PR_SET_PDEATHSIG). Who has not left after GRACE_SECONDS, hung in native
code or stopped, is killed, and so is whatever they started; then what the attempt shared is removed. While there are
servers, it looks every LOOK_SECONDS for what they share under names of their own: the kernel may have ended them before
anybody could look.

Invariant: cleaning belongs to one attempt. This process has inherited the lock of the run directory, so that no later
launch begins before the last process of this one is gone; where it was killed too, names keep attempts apart.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from offtrail.platform.runtime import attempt

if TYPE_CHECKING:
    from offtrail.platform.config.schema import Config

GRACE_SECONDS = 5.0
"""Between the launcher's death and SIGKILL."""
LOOK_SECONDS = 2.0
"""Between two looks."""


class Reaper:
    """The launcher's side: an attempt begins, and is cleaned up after whatever becomes of this process."""

    def __init__(self, run_dir: Path) -> None:
        self.attempt = attempt.begin()
        self._roles: list[psutil.Process] = []
        # A session of its own: no signal of the terminal reaches it. Trap: close_fds=False hands it the one inheritable
        # file, the lock of the run directory, and is what keeps a successor out until it has cleaned up.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "offtrail.platform.launcher.reaper", str(run_dir), self.attempt],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=attempt.without(os.environ),
            close_fds=False,
            start_new_session=True,
        )

    def role(self, pid: int) -> None:
        """A role has begun."""
        note(self._roles, pid)
        self._tell(f"{pid}\n")

    def sweep(self) -> None:
        """The launcher cleans up itself: end what is left of the attempt."""
        attempt.sweep(self.attempt, self._roles)

    def close(self) -> None:
        """Nothing of the attempt is left, nor of what it shared: it is over."""
        attempt.over()
        self._tell("done\n")
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.wait()

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it was killed: then it can clean up nothing, and all else goes on
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()


@contextlib.contextmanager
def reaped(config: Config, run_dir: Path) -> Iterator[None]:
    """An attempt of its own: whatever ends it, nothing of it is left afterwards, nor of what it shared."""
    from offtrail.platform.runtime.context import remove_leftovers  # slow to import for the child

    reaper = Reaper(run_dir)
    try:
        yield
    finally:
        reaper.sweep()
        remove_leftovers(config, run_dir)
        reaper.close()


def note(roles: list[psutil.Process], pid: int) -> None:
    """A process by its number and the time that it began, so that it is never taken for another one."""
    with contextlib.suppress(psutil.Error):  # it has left already
        roles.append(psutil.Process(pid))


def main(run_dir: Path, name: str) -> int:
    """Until the launcher says that it is done, or is gone and everything is cleaned up."""
    roles: list[psutil.Process] = []
    shared, over = set[str](), threading.Event()

    def look() -> None:
        while not over.wait(LOOK_SECONDS):
            if any(Path(tempfile.gettempdir()).glob(f"offtrail-*-{name}-*")):  # a server's (context.make_temporary)
                shared.update(attempt.shared_files(attempt.members(name, tuple(roles))))

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    for line in sys.stdin.buffer:
        if line == b"done\n":
            return 0
        note(roles, int(line))
    over.set()
    looking.join()
    if sys.platform != "linux":  # elsewhere the kernel has told nobody
        for process in attempt.members(name, roles):
            process.terminate()
    attempt.sweep(name, roles, GRACE_SECONDS, shared)
    from offtrail.platform.config.compose import load_config  # slow to import, and rarely needed
    from offtrail.platform.runtime.context import remove_leftovers

    remove_leftovers(load_config(run_dir / "config.yaml"), run_dir, name)
    return 0


if __name__ == "__main__":
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, signal.SIG_IGN)  # a cluster ends all processes of a job: this one comes last
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
