"""Who comes first where cores are few: the evaluator is nice while the run trains, and no longer."""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import warm

from .conftest import PATIENCE_S


def ticks(pid: int) -> Counter[int]:
    """CPU time of a process by the niceness of its threads, as the kernel shows both."""
    found = Counter[int]()
    for stat in Path(f"/proc/{pid}/task").glob("*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            fields = stat.read_text().rpartition(")")[2].split()
            found[int(fields[16])] += int(fields[11]) + int(fields[12])
    return found


@pytest.mark.prove
def test_the_evaluator_is_nice_while_the_run_trains_and_no_longer(
    command: Any, environment: dict[str, str], tmp_path: Path
) -> None:
    keys = ("eval.nice=11", "eval.every=1", "learner.steps=3", "eval.prompts=512", "eval.samples=2")
    process = warm.Popen(command("nice", *keys), env=environment, cwd=tmp_path)
    log, rows = tmp_path / "nice" / "logs" / "evaluator-0.log", tmp_path / "nice" / "metrics.jsonl"

    def wait_until(condition: Any) -> None:
        limit = time.monotonic() + PATIENCE_S
        while not condition():
            assert process.poll() is None
            assert time.monotonic() < limit
            time.sleep(0.02)

    wait_until(lambda: log.is_file() and "loaded" in log.read_text())
    pid = evaluator(tmp_path / "nice")
    own = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[16])
    wait_until(lambda: ticks(pid)[own + 11] > 5)
    wait_until(lambda: "training has ended" in log.read_text())
    assert '"step": 3,' in rows.read_text()
    before = ticks(pid)
    wait_until(lambda: ticks(pid)[own] > before[own] + 20)
    assert ticks(pid)[own + 11] <= before[own + 11]  # a thread that has ended takes its ticks with it
    assert process.wait(PATIENCE_S) == 0
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [row["step"] for row in found if "eval/accuracy" in row] == [0, 1, 2, 3]
    assert json.loads((tmp_path / "nice" / "summary.json").read_text())["restarts"] == {}


def evaluator(run_dir: Path) -> int:
    """Its process, found by its command line."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"offtrail.platform.runtime.process" in words and b"evaluator" in words and str(run_dir).encode() in words:
            return int(entry.name)
    raise AssertionError(f"no evaluator of {run_dir} is running")
