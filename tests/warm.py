"""The real command, and SGLang's servers, forked from a process that has already imported what they import.

torch and transformers take four CPU seconds and sglang seven, which every run and every server of the suite would pay
again. Here a worker of pytest pays them once. `Popen` and `run` are subprocess's for a command line of launch.py, or of
another script that ends by sys.exit (fsdp_worker.py), and what they start is a child of the caller, which runs it from
its first line. It has its fork server (runtime/forkserver.py) beside it from the start, forked too, and that makes its
broker, besides the roles that compute; all else is as in a process of its own. `ServerPopen` is subprocess's for what
engines/sglang/child.py starts: a server is a child of the caller, too, and runs serve.py, or fake_sglang.py, from its
first line; anything else is started as ever. Whoever wants other imports than the worker's, or to see the command from
nothing, takes subprocess (test_learning's demo, test_serving's pipe, test_wheel); so do the servers of runs.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow

from offtrail.platform.config.compose import compose
from offtrail.platform.launcher import forks, hosts
from offtrail.platform.runtime import forkserver
from offtrail.platform.runtime.host import adopt_orphans, die_with, rename_process
from offtrail.platform.runtime.roles import RoleSpec

ALSO = ("offtrail.platform.launcher.jobs", "offtrail.platform.broker.role", "rich.progress", "matplotlib.pyplot")
"""What launchers and brokers import, besides what the other roles do."""
SERVERS = ("offtrail.platform.engines.sglang.serve", "fake_sglang")
"""The modules that a server is, the real one and what stands in for it."""
OF_SERVERS = ("sglang.launch_server", "sglang.srt.entrypoints.http_server", "sglang.srt.managers.scheduler")
READY = b"ready"
"""What is said when the imports are done."""
STARTER = ThreadPoolExecutor(1, thread_name_prefix="warm")
"""The thread that starts them, for it lives as long as the worker: a child dies with its parent's thread (die_with)."""


class Warm:
    """A warm process of one worker, and the line to it; ``kind``: what it becomes, `launch` or `serve`."""

    def __init__(self, kind: str) -> None:
        self.line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, __file__, str(os.getpid()), kind, forks.PADDING]
        self._process = subprocess.Popen(command, stdin=theirs.fileno())
        self._ready = False
        theirs.close()

    def ready(self) -> socket.socket:
        """The line, once it has imported. Trap: whoever adopts orphans that long adopts those of others, too."""
        if not self._ready:
            assert self.line.recv(32) == READY, "the warm process has died: its words stand above"
            self._ready = True
        return self.line

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    @property
    def ended(self) -> int | None:
        """Its exit status, once it has died; None while it lives."""
        return self._process.poll()

    def close(self) -> None:
        """What it has started stays."""
        self.line.close()
        self._process.kill()
        self._process.wait()


RUNNING: dict[str, Warm] = {}


def warm(kind: str = "launch") -> Warm:
    """The first call starts it; whoever starts a run first waits for its imports. AssertionError, once, for one that
    has died: the next call starts another.
    """
    if kind in RUNNING and (status := RUNNING[kind].ended) is not None:
        RUNNING.pop(kind).close()
        raise AssertionError(f"the warm process `{kind}` has died with exit status {status}")
    if kind not in RUNNING:
        RUNNING[kind] = STARTER.submit(Warm, kind).result()
    return RUNNING[kind]


class Server(forks.Forked):
    """What forks.ForkServer asks of its process."""

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self) -> None:
        while self.poll() is None:
            time.sleep(0.01)


class Popen(subprocess.Popen[Any]):
    """As subprocess.Popen([sys.executable, LAUNCH_PY, …])."""

    kind = "launch"

    def _execute_child(self, args: Sequence[str], *rest: Any) -> None:
        _, _, _, _, cwd, env, _, _, _, *pipes = rest
        theirs, _, _, out, _, err = pipes[:6]
        standard = [own if fd == -1 else fd for own, fd in enumerate((theirs, out, err))]
        request = json.dumps([list(args), str(cwd or os.getcwd()), dict(os.environ if env is None else env)])
        line = warm(self.kind).ready()
        adopt_orphans()
        try:
            socket.send_fds(line, [request.encode()], standard)
            self.pid = int(line.recv(32))
        finally:
            adopt_orphans(False)
            self._close_pipe_fds(*pipes[:6])
        self._child_created = True


class ServerPopen(Popen):
    """As subprocess.Popen([sys.executable, "-P", "-m", MODULE, …], process_group=0)."""

    kind = "serve"

    def _execute_child(self, args: Sequence[str], *rest: Any) -> None:
        if set(SERVERS) & set(args):
            super()._execute_child(args, *rest)
        else:
            subprocess.Popen._execute_child(self, args, *rest)  # type: ignore[attr-defined]


def run(command: Sequence[str], timeout: float, input: str = "", **given: Any) -> subprocess.CompletedProcess[str]:
    """As subprocess.run(…, capture_output=True, text=True)."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with Popen(command, text=True, **pipes, **given) as process:
        try:
            out, err = process.communicate(input, timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def main(worker: int, kind: str) -> int:
    """Fork until the worker is gone; in a fork, the exit status of what it has become."""
    die_with(worker)
    line = socket.socket(fileno=0)
    if kind == "serve":
        import_servers()
    else:
        for module in (*forkserver.PRELOADED, *ALSO):
            importlib.import_module(module)
        compose([])  # the tree of the schema
        pyarrow.array([0])  # imports pandas
    gc.collect()
    gc.freeze()
    line.send(READY)
    while True:
        message, standard, _, _ = socket.recv_fds(line, forkserver.MOST_BYTES, 3)
        if not message:
            return 0
        if not (pid := forkserver.fork()):
            line.detach()
            arguments, folder, environment = json.loads(message)
            become(arguments, folder, environment, standard)
            return serve(arguments) if kind == "serve" else command(arguments)
        for fd in standard:
            os.close(fd)
        line.send(b"%d" % pid)


def import_servers() -> None:
    """As serve.py does before it reads its flags. Trap: some of sglang's settings are read when it is imported."""
    os.environ["SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION"] = "false"
    from offtrail.platform.engines.sglang import cpu

    cpu.install()
    for module in OF_SERVERS:
        importlib.import_module(module)


def become(arguments: list[str], folder: str, environment: dict[str, str], standard: list[int]) -> None:
    """Be the process that ``arguments`` would start, as far as the kernel is asked."""
    for own, fd in enumerate(standard):
        os.dup2(fd, own)
        os.close(fd)
    os.chdir(folder)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None
    sys.path[:0] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path not in sys.path]
    rename_process(arguments, "python")


def serve(arguments: list[str]) -> int:
    """An SGLang server, or the fake one."""
    os.setpgid(0, 0)
    sys.argv = arguments[arguments.index("-m") + 1 :]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    return 0


def command(arguments: list[str]) -> int:
    """launch.py; and, in a fork of it, its fork server."""
    line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    launcher = os.getpid()
    if not (server := os.fork()):
        return fork_server(launcher, line, theirs)
    theirs.close()

    def begun(self: forks.ForkServer) -> None:
        self._line, self._process = line, Server(server)

    def forked(self: hosts.LocalHosts, spec: RoleSpec, words: list[str], env: dict[str, str], out: int) -> Any:
        made = forks.fork_server()
        return made.fork(words, env, out) if made is not None else None

    forks.ForkServer.__init__ = begun
    hosts.LocalHosts._forked = forked
    _, *sys.argv = arguments
    runpy.run_path(arguments[1], run_name="__main__")
    raise AssertionError(f"{arguments[1]} ends by sys.exit")


def fork_server(launcher: int, line: socket.socket, theirs: socket.socket) -> int:
    """As forks.ForkServer starts it."""
    line.close()
    os.setpgid(0, 0)
    nothing = os.open(os.devnull, os.O_RDWR)
    for own, fd in enumerate((theirs.detach(), nothing, nothing)):
        os.dup2(fd, own)
    os.closerange(3, 64)
    os.environ.update({"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"})
    return forkserver.main([str(launcher)])


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2]))
