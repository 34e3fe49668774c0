"""A process tree of a server: what it leaves in shared memory is removed with it."""

from __future__ import annotations

import os
import time
from pathlib import Path

from leftovers import alive
from offtrail.platform.engines.sglang.child import Child

LEAVES = """
import multiprocessing, os, time
from multiprocessing import resource_tracker

resource_tracker.ensure_running()
if os.fork() == 0:  # gone before anybody looks, without a word to the tracker
    lost = multiprocessing.get_context("spawn").Lock()
    print(lost._semlock.name, flush=True)
    os._exit(0)
held = multiprocessing.get_context("spawn").Lock()
print(held._semlock.name, flush=True)
time.sleep(600)
"""


def test_semaphores_of_the_tree_are_gone_after_its_end_those_of_its_dead_too(tmp_path: Path) -> None:
    (tmp_path / "leaves.py").write_text(LEAVES)
    log = tmp_path / "log"
    child = Child("leaves", [], os.environ | {"PYTHONPATH": str(tmp_path)}, log)
    try:
        deadline = time.monotonic() + 60
        while len(names := log.read_text().replace("/", " /").split()) < 2:  # two may write at once
            assert time.monotonic() < deadline
            time.sleep(0.01)
        left = [Path("/dev/shm", f"sem.{name.removeprefix('/')}") for name in names]
        assert all(path.exists() for path in left)
        family = child.remember()
        assert len(family) >= 2
    finally:
        how = child.end()
    assert "was killed by SIGKILL" in how
    assert not any(path.exists() for path in left)
    assert not any(alive(member) for member in family)
