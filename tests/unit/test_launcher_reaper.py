"""What the process beside the launcher does when its input ends: nothing after "done", else it ends who is left."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from offtrail.platform.config.compose import to_yaml
from offtrail.platform.config.schema import Config
from offtrail.platform.launcher import reaper
from offtrail.platform.launcher.hosts import LocalHosts
from offtrail.platform.runtime.roles import RoleSpec

# Hears no SIGTERM, as a role that hangs in native code; says so once its child is there too.
HANGS = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
print(child.pid, flush=True)
time.sleep(300)
"""


@pytest.fixture
def hung() -> Iterator[tuple[psutil.Process, psutil.Process]]:
    """A hung role and its child."""
    with subprocess.Popen([sys.executable, "-c", HANGS], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        child = psutil.Process(int(process.stdout.readline()))
        yield psutil.Process(process.pid), child
        for left in (child, process):
            if left.is_running() if isinstance(left, psutil.Process) else left.poll() is None:
                left.kill()


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run whose server addresses are there."""
    config = Config()
    config.weights.channel = "disk"
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    (tmp_path / "servers").mkdir()
    (tmp_path / "servers" / "generator-0.json").write_text("{}")
    return tmp_path


def feed(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


def test_without_a_last_word_of_the_launcher_a_hung_role_and_its_child_are_killed(
    hung: tuple[psutil.Process, psutil.Process], run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reaper, "GRACE_SECONDS", 0.2)
    feed(monkeypatch, f"{hung[0].pid}\n")
    assert reaper.main(run_dir) == 0
    assert reaper.living(hung) == []
    assert not (run_dir / "servers").exists()


def test_after_done_it_touches_nothing(
    hung: tuple[psutil.Process, psutil.Process], run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed(monkeypatch, f"{hung[0].pid}\ndone\n")
    assert reaper.main(run_dir) == 0
    assert len(reaper.living(hung)) == 2
    assert (run_dir / "servers").exists()


def test_hosts_that_are_closed_leave_no_reaper_and_ranks_know_their_world(tmp_path: Path) -> None:
    """As torchrun tells it: rank, local rank, size, and one rendezvous for all."""
    hosts = LocalHosts(tmp_path)
    said = "import os; print(*(os.environ.get(k) for k in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR')))"
    for spec in (RoleSpec("learner", 1, world=2), RoleSpec("broker")):
        handle = hosts.start(spec, [sys.executable, "-c", said], tmp_path / spec.name)
        assert handle.process.wait(30) == 0
    assert (tmp_path / "learner-1").read_text() == "1 1 2 127.0.0.1\n"
    assert (tmp_path / "broker-0").read_text() == "None None None None\n"
    before = [child.pid for child in psutil.Process().children() if "reaper" in " ".join(child.cmdline())]
    hosts.close()
    assert len(before) == 1
    assert not psutil.pid_exists(before[0])
