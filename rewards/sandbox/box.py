"""Box: the trusted side of the fork server. It chooses the walls, starts the server behind them and asks it for runs.

Nothing here knows of tests.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Literal, get_args

import offtrail
from offtrail.rewards.sandbox import bubblewrap
from offtrail.rewards.sandbox.filter import MACHINES
from offtrail.rewards.sandbox.runs import LONGEST_PROGRAM, Dead, Functions, Limits, Run, SandboxError, Status
from offtrail.rewards.sandbox.streams import run_to_its_end
from offtrail.rewards.sandbox.walls import landlock_abi

Wall = Literal["auto", "bwrap", "landlock"]
START_SECONDS = 60.0
END_SECONDS = 10.0
"""The longest that the server may take to tell that a run is over."""
GRACE_SECONDS = 2.0
"""The server's deadline stands so far behind the judge's, who closes the wire and so ends the run at its own."""
BOOT = (
    "import sys; sys.path.append(sys.argv[1]); from offtrail.rewards.sandbox import server; sys.path.pop(); "
    "_, _, control, *folders = sys.argv; sys.argv = ['']; server.main(int(control), folders)"
)
"""Trap: at the end of sys.path, or a package beside ours could take the place of one of Python's own."""


class Box:
    """A fork server behind walls; a context manager. ``walls`` says which stand.

    ``wall``: landlock (Landlock, seccomp and limits), bwrap (bubblewrap around them, with Landlock where the kernel has
    it), auto: bwrap where it works, else landlock. Raises SandboxError where none of those asked for stands. The server
    ends with the process that has the box.
    """

    def __init__(self, wall: Wall = "auto", limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        if wall not in get_args(Wall):
            raise SandboxError(f"wall={wall}: must be one of {', '.join(get_args(Wall))}")
        if sys.platform != "linux" or os.uname().machine not in MACHINES:
            raise SandboxError(f"programs can be run on Linux on {' or '.join(MACHINES)} alone, which this is not")
        own = resource.getrlimit(resource.RLIMIT_AS)[1]
        if own != resource.RLIM_INFINITY and own < self.limits.memory:
            raise SandboxError(
                f"memory_mb={self.limits.memory >> 20}: is more than the {own >> 20} MB that this process may have "
                "itself; lower it, or raise reward.memory_mb"
            )
        self._wall, self._runs = wall, 0
        self._start()

    @property
    def server(self) -> int:
        """The process that everything of the box is below."""
        return self._server.pid

    def functions(self, program: str) -> Functions:
        """Load a program to call its functions. Raises Dead where it does not load."""
        _check_length(program)
        ours, theirs = socket.socketpair()
        with theirs:
            run = self._begin(ours, [theirs.fileno()], self.limits.seconds)
        return Functions(run, program)

    def program(self, program: str, given: bytes, seconds: float | None = None) -> bytes:
        """What a program writes to stdout until its end when it is ``given`` this on stdin. Raises Dead where it does
        not come to a good end, ``seconds`` (the limits' own at most) included.
        """
        _check_length(program)
        most = self.limits.seconds if seconds is None else min(seconds, self.limits.seconds)
        ours, theirs = socket.socketpair()
        (source, feed), (drain, sink) = os.pipe(), os.pipe()
        with theirs:
            try:
                run = self._begin(ours, [theirs.fileno(), source, sink], most)
            except BaseException:
                os.close(feed)
                os.close(drain)
                raise
            finally:
                os.close(source)
                os.close(sink)
        return run_to_its_end(run, program, given, feed, drain)

    def close(self) -> None:
        """End the server and every run."""
        self._server.close()

    def __enter__(self) -> Box:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self, ours: socket.socket, descriptors: Sequence[int], seconds: float) -> Run:
        number = self._runs = self._runs + 1
        asked = {
            "run": number, "seconds": seconds + GRACE_SECONDS, "cpu_seconds": self.limits.cpu_seconds,
            "memory": self.limits.memory,
        }  # fmt: skip
        request = json.dumps(asked).encode()
        try:
            try:
                socket.send_fds(self._server.control, [request], descriptors)
            except OSError:  # somebody has killed the server
                self._start()
                socket.send_fds(self._server.control, [request], descriptors)
        except BaseException:
            ours.close()
            raise
        return Run(number, ours, self._server.ended, self.limits, time.monotonic() + seconds)

    def _start(self) -> None:
        reasons: list[str] = []
        if self._wall in ("auto", "bwrap"):
            program = bubblewrap.found()
            if program is None:
                reasons.append("bubblewrap is not installed (its program bwrap is not on PATH)")
            elif self._stands(bubblewrap.jail(program, python_prefix()), bubblewrap.INSIDE, reasons):
                self.walls = "bubblewrap, seccomp" + ", Landlock" * (landlock_abi() >= 1)
                return
        if self._wall in ("auto", "landlock"):
            if landlock_abi() < 1:
                reasons.append("the kernel has no Landlock (Linux 5.13 or later, with landlock among its lsm=)")
            elif self._stands([], str(Path(offtrail.__file__).parents[1]), reasons):
                self.walls = "Landlock, seccomp"
                return
        raise SandboxError(
            f"wall={self._wall}: no sandbox stands here, and programs are not run without one: {'; '.join(reasons)}"
        )

    def _stands(self, jail: list[str], source: str, reasons: list[str]) -> bool:
        """Whether a server comes up in the jail and a program runs in it; if not, why."""
        self._server = _Server(jail, source)
        try:
            self._server.greet()
            with self.functions("def f(x): return x + 1") as probe:
                if probe.call("f", 1) == 2:
                    return True
                why = "a program gave a wrong answer"
        except (OSError, SandboxError, Dead) as error:
            why = str(error)
        last_words = self._server.close()
        reasons.append(f"{'bubblewrap' if jail else 'Landlock'} does not work: {last_words or why}")
        return False


class _Server:
    """The server's process and the control socket to it; it ends with this object at the latest."""

    def __init__(self, jail: list[str], source: str) -> None:
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        said = tempfile.TemporaryFile()  # noqa: SIM115 (read once it has ended)
        python = [os.path.realpath(sys.executable), "-I", "-S", "-B", "-X", "utf8", "-c", BOOT]
        with theirs:
            self._process = subprocess.Popen(
                [*jail, *python, source, str(theirs.fileno()), *library_folders()], pass_fds=[theirs.fileno()], env={},
                cwd="/", start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said,
            )  # fmt: skip
        self.pid = self._process.pid
        self._statuses: dict[int, Status] = {}
        self.close = weakref.finalize(self, _end, self._process, self.control, said)
        """End it; the last line that it wrote to stderr."""

    def greet(self) -> None:
        """Wait until it serves. Raises OSError where it does not."""
        self.control.settimeout(START_SECONDS)
        if not self.control.recv(1 << 12):
            raise ConnectionError("its process ended at the start")

    def ended(self, run: int) -> Status:
        """Wait until a run is over. Raises SandboxError where the server is."""
        end = time.monotonic() + END_SECONDS
        while run not in self._statuses:
            try:
                self.control.settimeout(max(0.001, end - time.monotonic()))
                told = self.control.recv(1 << 12)
            except OSError:
                told = b""
            if not told:
                raise SandboxError("the sandbox's server has ended; the next program starts another")
            status: Status = json.loads(told)
            self._statuses[status["run"]] = status
        return self._statuses.pop(run)


def _end(process: subprocess.Popen[bytes], control: socket.socket, said: IO[bytes]) -> str:
    control.close()
    process.kill()
    process.wait()
    with said:
        said.seek(0)
        lines = said.read().decode(errors="replace").split("\n")
    return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "")


def python_prefix() -> str:
    """Where this Python is installed, beneath any environment."""
    return os.path.realpath(sys.base_prefix)


def library_folders() -> list[str]:
    """What programs may read: Python's own library, and the machine's."""
    own = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), f"{python_prefix()}/lib"]
    return list(dict.fromkeys(os.path.realpath(path) for path in ("/usr/lib", "/usr/lib64", "/lib", "/lib64", *own)))


def _check_length(program: str) -> None:
    if len(program) > LONGEST_PROGRAM:
        raise Dead("syntax", f"more than {LONGEST_PROGRAM:,} characters")
