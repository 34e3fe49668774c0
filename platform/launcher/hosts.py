"""Where roles run: the protocol that run.py starts them by, and its first backend, the processes of this host.

    Run ── start(spec, command, log) ──► Hosts ──► Handle: poll, end, exit_report
                                           └─ local: a fork of the fork server or Popen, and a reaper that outlives
                                                     a killed launcher

A backend knows processes and addresses and nothing of a run: neither order, nor restarts, nor the broker.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from offtrail.platform.launcher.forks import Forked, fork_server
from offtrail.platform.launcher.memory import Watched
from offtrail.platform.launcher.reaper import Reaper
from offtrail.platform.runtime import attempt
from offtrail.platform.runtime.host import free_port
from offtrail.platform.runtime.roles import RoleSpec


class Handle(Protocol):
    """One role process that was started."""

    @property
    def pid(self) -> int:
        """Its process id on its host, the one that it tells the broker."""

    def poll(self) -> int | None:
        """Its exit status, −N where signal N ended it; None while it runs."""

    def end(self, kill: bool) -> None:
        """Ask it to leave (SIGTERM), or ``kill`` it; nothing where it has left. Does not wait."""

    def exit_report(self) -> str:
        """How it died, in one line: its exit status or signal, and the last line of its log."""


class Hosts(Protocol):
    """A place where roles can be started."""

    def start(self, spec: RoleSpec, command: Sequence[str], log: Path) -> Handle:
        """Start a role by ``command``, its output appended to ``log``; where the kernel can, it ends with its starter,
        whose pid the backend appends to the command.
        """

    def sweep(self) -> None:
        """End whatever the roles have started and left."""

    def close(self) -> None:
        """Every role has left, and what the run shared is gone."""


@dataclass
class LocalHandle:
    """A child process."""

    name: str
    process: subprocess.Popen[bytes] | Forked
    log: Path

    def __post_init__(self) -> None:
        self._memory = Watched(self.process.pid)

    @property
    def pid(self) -> int:
        """See Handle."""
        return self.process.pid

    def poll(self) -> int | None:
        """See Handle."""
        self._memory.look()
        return self.process.poll()

    def end(self, kill: bool) -> None:
        """See Handle."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)

    def exit_report(self) -> str:
        """See Handle."""
        code = self.process.poll()
        assert code is not None
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"
        lines = self.log.read_text(errors="replace").strip().splitlines() if self.log.is_file() else []
        words = f"; last words: {lines[-1].strip()}" if lines and code >= 0 else ""
        if code == -signal.SIGKILL:
            words = f": {self._memory.why_killed(self.name.rpartition('-')[0])}"
        return f"{self.name} {how}{words} (log: {self.log})"


class LocalHosts:
    """Processes of this host; a reaper beside them cleans up after a launcher that was killed (reaper.py)."""

    def __init__(self, run_dir: Path) -> None:
        self._rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self._reaper = Reaper(run_dir)

    def start(self, spec: RoleSpec, command: Sequence[str], log: Path) -> LocalHandle:
        """See Hosts. A process group of its own: Ctrl-C on the terminal is the launcher's alone."""
        # Two busy processes on two cores: more threads than asked for make both several times slower.
        threads = {"OMP_NUM_THREADS": str(spec.threads), "TOKENIZERS_PARALLELISM": "false"}
        env = threads | self._rank(spec) | attempt.marked()
        words = [*command, str(os.getpid())]
        with log.open("ab") as out:
            process = self._forked(spec, words, env, out.fileno()) or subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=os.environ | env, process_group=0
            )
        self._reaper.role(process.pid)
        return LocalHandle(spec.name, process, log)

    def sweep(self) -> None:
        """See Hosts."""
        self._reaper.sweep()

    def close(self) -> None:
        """See Hosts."""
        self._reaper.close()

    def _forked(self, spec: RoleSpec, words: Sequence[str], env: Mapping[str, str], out: int) -> Forked | None:
        """None where it cannot be, and is started as a process of its own."""
        server = fork_server() if spec.forks else None
        return server.fork(words, env, out) if server is not None else None

    def _rank(self, spec: RoleSpec) -> dict[str, str]:
        """What torch.distributed asks of the environment, as torchrun sets it."""
        if not spec.world:
            return {}
        rank = str(spec.index)
        return self._rendezvous | {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(spec.world)}
