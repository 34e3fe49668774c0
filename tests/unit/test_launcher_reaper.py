"""What becomes of an attempt: nothing of it is left, whatever it started, and nothing of another one goes."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from leftovers import alive, words
from offtrail.platform.config.compose import to_yaml
from offtrail.platform.config.schema import Config
from offtrail.platform.launcher import reaper, run
from offtrail.platform.launcher.hosts import LocalHosts
from offtrail.platform.runtime import attempt
from offtrail.platform.runtime.context import (
    make_temporary,
    remove_earlier,
    remove_leftovers,
    servers_folder,
    weights_folder,
)
from offtrail.platform.runtime.roles import RoleSpec
from offtrail.platform.weights.store import Publisher

# Hears no SIGTERM, as a role that hangs in native code; holds a semaphore that nobody else removes, and has a child in
# a session of its own. Says so once they are there.
HANGS = """
import multiprocessing, os, signal, subprocess, sys, time
from multiprocessing import resource_tracker
signal.signal(signal.SIGTERM, signal.SIG_IGN)
lock = multiprocessing.get_context("spawn").Lock()
name = lock._semlock.name
resource_tracker.unregister(name, "semaphore")
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], start_new_session=True)
print(child.pid, "/dev/shm/sem." + name[1:], flush=True)
time.sleep(300)
"""


class Hung:
    """A role of the attempt that is current, its child and its semaphore."""

    def __init__(self, environment: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", HANGS], stdout=subprocess.PIPE, env=environment)
        assert self.process.stdout is not None
        pid, self.semaphore = self.process.stdout.readline().decode().split()
        self.child = psutil.Process(int(pid))

    @property
    def left(self) -> list[bool]:
        """Whether the process, its child and its semaphore are still there."""
        return [self.process.poll() is None, alive(self.child), Path(self.semaphore).exists()]

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        with contextlib.suppress(psutil.NoSuchProcess):
            self.child.kill()
        Path(self.semaphore).unlink(missing_ok=True)


@pytest.fixture
def name() -> Iterator[str]:
    yield attempt.begin()
    attempt.over()


@pytest.fixture
def hung(name: str) -> Iterator[Hung]:
    hung = Hung()
    yield hung
    hung.end()


@pytest.fixture
def config(tmp_path: Path) -> Config:
    config = Config()
    (tmp_path / "channel").mkdir()
    config.weights.dir = str(tmp_path / "channel")
    return config


@pytest.fixture
def run_dir(config: Config, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose attempt has published a version, listed a server and made a temporary folder."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(to_yaml(config))
    publisher = Publisher(weights_folder(config, run_dir))
    publisher.publish(0, {})
    publisher.close()
    (weights_folder(config, run_dir) / "offtrail-v1-half").mkdir()
    servers_folder(run_dir).mkdir(parents=True)
    (servers_folder(run_dir) / "generator-0.json").write_text("{}")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    make_temporary(run_dir, "sglang")
    return run_dir


def shared(config: Config, run_dir: Path, tmp_path: Path) -> list[str]:
    """What an attempt shares, as far as it is there."""
    places = (weights_folder(config, run_dir), servers_folder(run_dir), *(tmp_path / "tmp").iterdir())
    return [str(place) for place in places if place.exists()]


def feed(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


def test_without_a_last_word_of_the_launcher_nothing_of_the_attempt_is_left(
    hung: Hung, name: str, config: Config, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reaper, "GRACE_SECONDS", 0.2)
    assert hung.left == [True, True, True]
    assert len(shared(config, run_dir, tmp_path)) == 3
    feed(monkeypatch, "")
    assert reaper.main(run_dir, name) == 0
    assert hung.left == [False, False, False]
    assert shared(config, run_dir, tmp_path) == []
    assert list((tmp_path / "channel").iterdir()) == []
    assert not (run_dir / "servers").exists()


def test_what_a_server_shared_is_given_back_also_where_it_has_died_before_anybody_could_look(
    hung: Hung, name: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the launcher the kernel ends the servers that it has started, and what they had mapped is no more told."""
    monkeypatch.setattr(reaper, "GRACE_SECONDS", 0.2)
    monkeypatch.setattr(reaper, "LOOK_SECONDS", 0.01)
    seen, look = threading.Event(), attempt.shared_files

    def looked(processes: list[psutil.Process]) -> set[str]:
        if hung.semaphore in (found := look(processes)):
            seen.set()
        return found

    monkeypatch.setattr(attempt, "shared_files", looked)
    hears, tells = os.pipe()
    with open(hears) as stdin, open(tells, "w") as launcher:
        monkeypatch.setattr(sys, "stdin", stdin)
        main = threading.Thread(target=reaper.main, args=(run_dir, name))
        main.start()
        assert seen.wait(60)
        for process in (hung.process, hung.child):
            process.kill()
            process.wait()
        assert hung.left == [False, False, True]
        launcher.close()
        main.join()
    assert hung.left == [False, False, False]


def test_a_role_that_a_fork_has_made_is_known_by_its_number_and_what_it_started_by_its_parent(
    name: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its environment is, for all that the system tells, that of the process that it is a fork of."""
    monkeypatch.setattr(reaper, "GRACE_SECONDS", 0.2)
    forked = Hung(attempt.without(os.environ))
    try:
        assert attempt.members(name) == []
        feed(monkeypatch, f"{forked.process.pid}\n")
        assert reaper.main(run_dir, name) == 0
        assert forked.left == [False, False, False]
    finally:
        forked.end()


def test_after_done_it_touches_nothing(
    hung: Hung, name: str, config: Config, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed(monkeypatch, "done\n")
    assert reaper.main(run_dir, name) == 0
    assert hung.left == [True, True, True]
    assert len(shared(config, run_dir, tmp_path)) == 3


def test_an_attempt_takes_nothing_of_its_successor_nor_a_successor_a_name_that_it_still_uses(
    hung: Hung, name: str, config: Config, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reaper was killed too, and comes late: as a role that leaves late would."""
    monkeypatch.setattr(reaper, "GRACE_SECONDS", 0.2)
    before = weights_folder(config, run_dir)
    attempt.begin()
    remove_earlier(config, run_dir)
    assert not before.exists()
    other = Hung()
    try:
        folder = weights_folder(config, run_dir)
        assert folder != before
        publisher = Publisher(folder)
        publisher.publish(0, {})
        servers_folder(run_dir).mkdir(parents=True)
        feed(monkeypatch, "")
        assert reaper.main(run_dir, name) == 0
        assert (hung.left, other.left) == ([False] * 3, [True] * 3)
        assert (folder / "v00000000.safetensors").is_file()
        assert servers_folder(run_dir).is_dir()
        publisher.close()
    finally:
        other.end()


def test_who_belongs_to_no_attempt_is_nobodys_member(hung: Hung, name: str) -> None:
    assert {process.pid for process in attempt.members(name)} >= {hung.process.pid, hung.child.pid}
    assert os.getpid() not in {process.pid for process in attempt.members(name)}
    assert attempt.members("") == []
    attempt.sweep("")
    assert hung.left == [True, True, True]


def test_hosts_that_are_closed_leave_no_reaper_and_ranks_know_their_world(tmp_path: Path) -> None:
    """As torchrun tells it: rank, local rank, size, and one rendezvous for all. Roles belong to the attempt."""
    hosts = LocalHosts(tmp_path)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", attempt.VARIABLE)
    said = f"import os; print(*(os.environ.get(k) for k in {names}))"
    for spec in (RoleSpec("learner", 1, world=2), RoleSpec("broker")):
        handle = hosts.start(spec, [sys.executable, "-c", said], tmp_path / spec.name)
        assert handle.process.wait(30) == 0
    name = attempt.current()
    assert (tmp_path / "learner-1").read_text() == f"1 1 2 127.0.0.1 {name}\n"
    assert (tmp_path / "broker-0").read_text() == f"None None None None {name}\n"
    before = [child.pid for child in psutil.Process().children() if "reaper" in " ".join(words(child))]
    hosts.close()
    assert len(before) == 1
    assert not psutil.pid_exists(before[0])
    assert attempt.VARIABLE not in os.environ


def test_a_job_without_roles_leaves_nothing_however_it_ends(config: Config, run_dir: Path) -> None:
    with contextlib.suppress(KeyError), reaper.reaped(config, run_dir):
        name, hung, channel = attempt.current(), Hung(), weights_folder(config, run_dir)
        channel.mkdir()
        raise KeyError
    assert (hung.left, channel.exists(), attempt.current()) == ([False, False, False], False, "")
    assert not any(name in " ".join(words(child)) for child in psutil.Process().children())
    hung.end()


def test_a_run_that_ends_gives_back_what_it_shared_when_the_last_process_is_gone(
    config: Config, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a role has left running may still write where the run shares."""
    at_the_time: list[list[bool]] = []

    def watched(config: Config, run_dir: Path, attempt: str = "") -> None:
        at_the_time.append(hung.left)
        remove_leftovers(config, run_dir, attempt)

    monkeypatch.setattr(run, "remove_leftovers", watched)
    ending = run.Run(config, run_dir, LocalHosts(run_dir))
    channel, hung = weights_folder(config, run_dir), Hung()
    channel.mkdir()
    try:
        ending.close()
    finally:
        hung.end()
    assert at_the_time == [[False, False, False]]
    assert not channel.exists()


def test_a_launcher_that_is_killed_takes_its_attempt_along(tmp_path: Path, config: Config) -> None:
    """The real launcher side and the real reaper, which the kernel's end of the pipe wakes, and no signal of a cluster
    before.
    """
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    code = (
        "import subprocess, sys, time; from pathlib import Path; from offtrail.platform.launcher.reaper import Reaper; "
        f"Reaper(Path({str(tmp_path)!r})); child = subprocess.Popen([sys.executable, '-c', 'import time; "
        "time.sleep(300)'], start_new_session=True); print(child.pid, flush=True); time.sleep(300)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as launcher:
        assert launcher.stdout is not None
        role = psutil.Process(int(launcher.stdout.readline()))
        [beside] = [child for child in psutil.Process(launcher.pid).children() if child.pid != role.pid]
        until(lambda: ignored(beside.pid) >> (signal.SIGTERM - 1) & 1)
        for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            beside.send_signal(signum)
        launcher.kill()
        launcher.wait()
    until(lambda: not alive(role))


def ignored(pid: int) -> int:
    """The signals that a process ignores, a bit each."""
    [mask] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigIgn")]
    return int(mask.split()[1], 16)


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
