"""What a test session has left on this machine: processes, shared memory, folders; conftest.py fails it for any.

A process is the session's when it has the session's mark in its environment, which every child inherits; shared memory
when it bears the name of one of its run directories. Others name theirs at random: what of SGLang or of Python's
multiprocessing came during the session is its own when no process has it open or mapped, unless others work here.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
import uuid
from pathlib import Path

import psutil

from offtrail.platform.runtime.context import own_name

MARK = "OFFTRAIL_TEST_SESSION"
SHARED = Path("/dev/shm")
FOREIGN = re.compile(r"sgl.*|sem\.mp-.*|psm_.*")
"""Names that others give to shared memory, in processes of ours."""
WORKING = re.compile(r"\b(pytest|offtrail|launch\.py)\b")
LEAVE_SECONDS = 15.0
"""The longest that a process which has been told to end may take."""


class Session:
    """One session: made before its first test, asked after its last. ``temporary``: its TMPDIR."""

    def __init__(self, temporary: Path) -> None:
        self.mark = os.environ[MARK] = uuid.uuid4().hex
        self.temporary = temporary
        self._before = foreign()

    def left(self, runs: Path) -> list[str]:
        """A line for each thing that is left, of the runs anywhere under ``runs`` too; all is removed. Processes have a
        moment to be gone first.
        """
        deadline = time.monotonic() + LEAVE_SECONDS
        while (processes := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.05)
        lines = [f"process {process.pid}: {said(process)}" for process in processes]
        for process in processes:
            with contextlib.suppress(psutil.Error):
                process.kill()
        named = [path for file in runs.rglob("config.yaml") for path in SHARED.glob(f"{own_name(file.parent)}*")]
        paths = named + self._unheld() + list(self.temporary.glob("offtrail-*"))
        for path in paths:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        return lines + [str(path) for path in paths]

    def processes(self) -> list[psutil.Process]:
        """All but this one and those that it descends from."""
        me = psutil.Process()
        mine = {me, *me.parents()}
        return [process for process in psutil.process_iter() if process not in mine and self._marked(process)]

    def _marked(self, process: psutil.Process) -> bool:
        """Zombies have no environment."""
        try:
            return f"{MARK}={self.mark}".encode() in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
        except OSError:
            return False

    def _unheld(self) -> list[Path]:
        """Looked at twice: what was being made at the first look is held at the second."""
        new = set() if self._others_work() else foreign() - self._before
        for _ in range(2 if new else 0):
            time.sleep(0.5)
            names = "\n".join(held(process.pid) for process in psutil.process_iter())
            new = {path for path in new & foreign() if str(path) not in names}
        return sorted(new)

    def _others_work(self) -> bool:
        """Whether another session, or a run that is none of ours, may be what makes and leaves things."""
        me = psutil.Process()
        others = [process for process in psutil.process_iter() if process not in {me, *me.parents()}]
        return any(WORKING.search(said(process)) for process in others if not self._marked(process))


def foreign() -> set[Path]:
    """Shared memory under names that others give."""
    return {path for path in SHARED.glob("*") if FOREIGN.fullmatch(path.name)}


def held(pid: int) -> str:
    """The names of files that a process has mapped or open."""
    names, process = [], Path(f"/proc/{pid}")
    with contextlib.suppress(OSError):
        names.append((process / "maps").read_text())
        for link in (process / "fd").iterdir():
            with contextlib.suppress(OSError):  # closed meanwhile
                names.append(os.readlink(link))
    return "\n".join(names)


def alive(process: psutil.Process | int) -> bool:
    """Whether it has not ended; a zombie has, and whoever is gone between two looks."""
    try:
        process = psutil.Process(process) if isinstance(process, int) else process
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def words(process: psutil.Process) -> list[str]:
    """Its command line; none where it has ended."""
    with contextlib.suppress(psutil.Error):
        return [word for word in process.cmdline() if word]
    return []


def said(process: psutil.Process) -> str:
    """The command line's beginning."""
    return " ".join(words(process))[:200] or "?"
