"""What fails a session: each kind of thing that a test can leave behind, and nothing of anybody else's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import leftovers
from leftovers import MARK, Session, alive, words
from offtrail.platform.runtime.context import own_name

SLEEPS = [sys.executable, "-c", "import time; time.sleep(600)"]


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Session]:
    monkeypatch.setenv(MARK, "")
    monkeypatch.setattr(leftovers, "SHARED", tmp_path / "shm")
    monkeypatch.setattr(leftovers, "LEAVE_SECONDS", 0.1)
    monkeypatch.setattr(leftovers, "WORKING", re.compile("nobody else"))
    for name in ("shm", "tmp", "runs"):
        (tmp_path / name).mkdir()
    (tmp_path / "shm" / "sgl-old").touch()
    return Session(tmp_path / "tmp")


def test_a_session_that_cleaned_up_has_left_nothing(session: Session, tmp_path: Path) -> None:
    other = subprocess.Popen(SLEEPS, env=os.environ | {MARK: "another session's"})
    with open(tmp_path / "shm" / "sem.mp-held", "w"):
        (tmp_path / "shm" / "offtrail-0-another").mkdir()
        (tmp_path / "tmp" / "of-pytest").mkdir()
        left = session.left(tmp_path / "runs")
    assert (left, other.poll()) == ([], None)
    other.kill()
    other.wait()
    assert sorted(path.name for path in (tmp_path / "shm").iterdir()) == [
        "offtrail-0-another",
        "sem.mp-held",
        "sgl-old",
    ]


def test_processes_shared_memory_and_folders_are_named_and_removed(session: Session, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "test_x" / "run"
    run.mkdir(parents=True)
    (run / "config.yaml").touch()
    made = [tmp_path / "shm" / own_name(run), tmp_path / "shm" / "sgl-new", tmp_path / "tmp" / "offtrail-0-x-sglang-1"]
    for path in made:
        path.mkdir() if path.name.startswith("offtrail") else path.touch()
    process = subprocess.Popen(SLEEPS, start_new_session=True)
    lines = session.left(tmp_path / "runs")
    assert process.wait(30) == -9
    assert lines == [f"process {process.pid}: {' '.join(SLEEPS)}", *map(str, made)]
    assert not any(path.exists() for path in made)


def test_who_has_ended_is_not_alive_and_has_no_words() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    seen = psutil.Process(process.pid)
    while not words(seen):  # for a moment it has none
        time.sleep(0.001)
    assert (alive(seen), alive(process.pid), words(seen)[1:]) == (True, True, ["-c", "input()"])
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie from here on
    assert (alive(seen), alive(process.pid), words(seen)) == (False, False, [])
    assert process.stdin is not None
    process.stdin.close()
    process.wait()
    assert (alive(seen), alive(process.pid), words(seen)) == (False, False, [])


def test_while_others_work_here_what_has_a_random_name_may_be_theirs(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leftovers, "WORKING", re.compile("another run"))
    (tmp_path / "shm" / "sgl-new").touch()
    other = subprocess.Popen([*SLEEPS, "another run"], env=os.environ | {MARK: "another session's"})
    left = session.left(tmp_path / "runs")
    other.kill()
    other.wait()
    assert left == []
