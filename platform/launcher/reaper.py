"""Cleans up after a launcher that was killed: `python -m offtrail.platform.launcher.reaper RUN_DIR`, its child.

    launcher ── the pid of each role, at the end "done" ──► stdin; its end without "done": the launcher was killed

The kernel has told the roles to leave then (PR_SET_PDEATHSIG). Who has not left after GRACE_SECONDS, hung in native
code or stopped, is killed with its children; then what the run shared is removed.

Invariant: cleaning belongs to one launch. This process has inherited the lock of the run directory, so that no later
launch begins before the last process of this one is gone; no role removes anything shared by itself.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

GRACE_SECONDS = 5.0
"""Between the launcher's death and SIGKILL; as long again may the kernel take."""


def main(run_dir: Path) -> int:
    """Until the launcher says that it is done, or is gone and everything is cleaned up."""
    roles: list[psutil.Process] = []
    for line in sys.stdin.buffer:
        if line == b"done\n":
            return 0
        with contextlib.suppress(psutil.NoSuchProcess):  # it has left already
            roles.append(psutil.Process(int(line)))
    end_all(roles)
    from offtrail.platform.config.compose import load_config  # slow to import, and rarely needed
    from offtrail.platform.runtime.context import remove_leftovers

    remove_leftovers(load_config(run_dir / "config.yaml"), run_dir)
    return 0


def end_all(roles: Sequence[psutil.Process]) -> None:
    """Wait until every role has left by itself, then kill the rest, whole trees."""
    if sys.platform != "linux":  # elsewhere the kernel has told nobody
        for role in living(roles):
            role.terminate()
    wait(roles)
    trees = [process for role in living(roles) for process in tree(role)]
    for process in trees:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    wait(trees)


def wait(processes: Sequence[psutil.Process]) -> None:
    """Until all are gone, at most GRACE_SECONDS."""
    deadline = time.monotonic() + GRACE_SECONDS
    while living(processes) and time.monotonic() < deadline:
        time.sleep(0.02)


def living(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """The processes that have not ended; a zombie, which its new parent may never reap, holds nothing."""
    alive = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                alive.append(process)
    return alive


def tree(process: psutil.Process) -> list[psutil.Process]:
    """A process and its descendants."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return [process, *process.children(recursive=True)]
    return []


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
