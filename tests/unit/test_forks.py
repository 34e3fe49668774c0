"""The fork server: what it becomes is the launcher's own child, as if it had been started by itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import warm

from offtrail.platform.config.compose import to_yaml
from offtrail.platform.config.schema import Config
from offtrail.platform.launcher import forks, hosts
from offtrail.platform.launcher.forks import Forked, ForkServer
from offtrail.platform.launcher.hosts import LocalHandle, LocalHosts
from offtrail.platform.runtime.roles import RoleSpec, roles_of

GENERATOR = RoleSpec("generator", threads=3, forks=True)


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    """It has really imported what roles need, and has found itself with one thread."""
    server = ForkServer()
    yield server
    server.close()


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run without a broker, so that its roles wait for one."""
    config = Config()
    config.weights.channel = "disk"
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    return tmp_path


Start = Callable[[RoleSpec], LocalHandle]


@pytest.fixture
def start(server: ForkServer, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Start a role on hosts with this server; all are gone afterwards."""
    monkeypatch.setattr(hosts, "fork_server", lambda: server)
    local, started = LocalHosts(run_dir), list[LocalHandle]()

    def start(spec: RoleSpec) -> LocalHandle:
        command = [sys.executable, "-m", "offtrail.platform.runtime.process", spec.role, str(spec.index), str(run_dir)]
        started.append(local.start(spec, command, run_dir / f"{spec.name}.log"))
        return started[-1]

    yield start
    for handle in started:
        handle.end(kill=True)
        ended(handle)
    local.close()


def ended(handle: LocalHandle) -> int:
    while (code := handle.poll()) is None:
        time.sleep(0.005)
    return code


def logged(handle: LocalHandle, words: str) -> str:
    while words not in (text := handle.log.read_text()):
        assert handle.poll() is None, text
        time.sleep(0.005)
    return text


def test_a_fork_looks_and_ends_like_a_process_of_its_own(start: Start, run_dir: Path) -> None:
    handle = start(GENERATOR)
    assert isinstance(handle.process, Forked)
    process = psutil.Process(handle.process.pid)
    logged(handle, "INFO offtrail: imported")
    assert (process.ppid(), os.getpgid(process.pid), process.name()) == (os.getpid(), process.pid, "generator-0")
    words = ["-m", "offtrail.platform.runtime.process", "generator", "0", str(run_dir), str(os.getpid())]
    assert [word for word in process.cmdline() if word] == [sys.executable, *words]
    assert os.readlink(f"/proc/{process.pid}/fd/0") == os.devnull
    assert sorted(os.listdir(f"/proc/{process.pid}/fd"))[:3] == ["0", "1", "2"]
    handle.end(kill=False)
    assert ended(handle) == 128 + signal.SIGTERM  # its `finally` blocks have run
    assert handle.exit_report().startswith("generator-0 exited with status 143")


def test_a_fork_fails_in_its_own_log_with_its_own_status(start: Start, run_dir: Path) -> None:
    (run_dir / "config.yaml").write_text("broker: 5\n")
    handle = start(GENERATOR)
    assert ended(handle) == 1
    assert "ConfigError: broker=5" in handle.exit_report()


def test_roles_outlive_the_server_and_the_next_one_is_started_by_itself(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they do where it cannot import."""
    server = ForkServer()
    monkeypatch.setattr(hosts, "fork_server", lambda: server)
    local = LocalHosts(run_dir)
    command = [sys.executable, "-m", "offtrail.platform.runtime.process", "generator", "0", str(run_dir)]
    first = local.start(GENERATOR, command, run_dir / "first.log")
    server._process.kill()
    server._process.wait()
    code = "import os; print(os.environ['OMP_NUM_THREADS'])"
    second = local.start(GENERATOR, [sys.executable, "-c", code], run_dir / "second.log")
    assert ended(second) == 0
    assert (run_dir / "second.log").read_text() == "3\n"
    assert first.poll() is None
    first.end(kill=True)
    assert ended(first) == -signal.SIGKILL
    assert first.exit_report().startswith("generator-0 was killed by SIGKILL")
    local.close()
    server.close()


@pytest.mark.parametrize(
    "dies",
    [
        "real = os.fork; os.fork = lambda: real() if os.getpid() == server else os.kill(os.getpid(), 9)",
        "real = os.write; os.write = lambda *a: real(*a) if os.getpid() == server else os.kill(os.getpid(), 9)",
        "real = os.fork; os.fork = lambda: real() if os.getpid() == server else full()",
    ],
    ids=["killed before it", "killed after it", "no room for it"],
)
def test_a_fork_that_fails_is_told_at_once_and_leaves_no_role_that_nobody_knows(dies: str) -> None:
    code = (
        "import errno, os; from offtrail.platform.runtime import forkserver; server = os.getpid()\n"
        "def full(): raise BlockingIOError(errno.EAGAIN, 'no more processes')\n"
        f"{dies}\n"
        "try: print('a role' if forkserver.fork() == 0 else 'its pid')\n"
        "except OSError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (done.stdout, done.stderr) == ("the process that was to fork a role has died\n", "")


def test_a_server_that_hangs_is_not_waited_for(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forks, "IMPORT_SECONDS", 0.2)
    server = ForkServer()
    server._process.send_signal(signal.SIGSTOP)
    assert server.fork(["python", "-m", "module", "generator", "0"], {}, 1) is None
    assert server._process.returncode == -signal.SIGKILL
    assert server.fork(["python", "-m", "module", "generator", "0"], {}, 1) is None


def test_what_computes_on_a_cpu_is_forked_and_nothing_else() -> None:
    config = Config()
    assert [spec.name for spec in roles_of(config) if spec.forks] == ["learner-0", "generator-0", "evaluator-0"]
    config.engine.device, config.learner.device = "cuda", "cuda:1"
    assert not any(spec.forks for spec in roles_of(config))


def test_elsewhere_there_is_no_fork_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert forks.fork_server.__wrapped__() is None


IMPORTS = """
import os, socket, sys, time
sys.path[:0] = {paths}
from offtrail.platform.runtime import forkserver
forkserver.die_with(int(sys.argv[1]))
line, parent = socket.socket(fileno=0), os.getpid()
if not os.fork():
    middle = os.getpid()
    if os.fork():
        os._exit(0)
    while os.getppid() == middle:
        time.sleep(0.001)
    with open("orphan", "w") as file:
        file.write(str(os.getppid()))
    os._exit(0)
while not (os.path.exists("orphan") and open("orphan").read()):
    time.sleep(0.001)
line.send(b"ready")
socket.recv_fds(line, 1 << 16, 3)
if not (pid := forkserver.fork()):
    os._exit(7)
line.send(b"%d" % pid)
"""


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Warm processes that import next to nothing and become one that ends with status 7; what is asked of them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "imports.py").write_text(IMPORTS.format(paths=[path for path in sys.path if path]))
    monkeypatch.setattr(warm, "__file__", str(tmp_path / "imports.py"))
    monkeypatch.setattr(warm, "RUNNING", {})
    yield [sys.executable, "launch.py"]
    for process in warm.RUNNING.values():
        process.close()


def test_a_warm_process_is_imported_before_its_worker_adopts_anybody(quick: list[str], tmp_path: Path) -> None:
    """Who loses its parent meanwhile would be a child of the tests, and a zombie among them when it ends."""
    assert warm.Popen(quick).wait(60) == 7
    assert int((tmp_path / "orphan").read_text()) != os.getpid()


def test_a_warm_process_outlives_the_thread_that_was_first_to_want_it(quick: list[str]) -> None:
    """As an engine's does: it starts its servers in a thread of its own, which ends with it."""
    asking = threading.Thread(target=lambda: warm.warm().ready())
    asking.start()
    of_kernel = Path(f"/proc/self/task/{asking.native_id}")
    asking.join()
    while of_kernel.exists():  # Python says a little earlier that it has ended
        time.sleep(0.001)
    assert warm.Popen(quick).wait(60) == 7


def test_a_warm_process_that_has_died_is_told_once_and_replaced(quick: list[str]) -> None:
    died = warm.warm().ready() and warm.RUNNING["launch"]
    os.kill(died.pid, signal.SIGKILL)
    while died.ended is None:
        time.sleep(0.001)
    with pytest.raises(AssertionError, match="the warm process `launch` has died with exit status -9"):
        warm.Popen(quick)
    assert warm.Popen(quick).wait(60) == 7


@pytest.mark.parametrize("module", ["launcher.jobs", "launcher.reaper", "broker.role", "verifier.worker"])
def test_who_computes_nothing_imports_no_torch(module: str) -> None:
    code = f"import sys, offtrail.platform.{module}; print({{'torch', 'transformers'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
