"""The demo task with real SGLang servers on the CPU: asynchronous, weights swapped in flight, a server killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import warm

ROOT = Path(__file__).resolve().parents[2]
SERVER = "offtrail.platform.engines.sglang.serve"


def servers_of(run_dir: Path) -> list[psutil.Process]:
    """The first process of every server of this run."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if SERVER in line and any(str(run_dir) in part for part in line):
            found.append(process)
    return found


@pytest.mark.prove
@pytest.mark.timeout(900)
def test_the_demo_learns_with_an_sglang_server(environment: dict[str, str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), "engine=sglang", "eval.engine=local", "run.name=demo", "eval.nice=0"],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=880,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    run_dir = tmp_path / "runs" / "demo"
    summary = json.loads((run_dir / "summary.json").read_text())
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert summary["eval/accuracy_first"] <= 0.65
    assert summary["eval/accuracy_last"] >= 0.90
    assert summary["staleness/stale_token_share"] >= 0.5
    assert 1 <= summary["staleness/max"] <= 2
    assert (summary["groups/lost"], summary["groups/duplicated"]) == (0, 0)
    assert summary["groups/trained"] == summary["steps"] * 16
    # In flight: some answers hold tokens of two versions, and the server's numbers are the learner's (I5).
    assert max(row.get("staleness/mixed_sample_share", 0.0) for row in rows) > 0
    probes = [row["mismatch/probe_abs_dlogp_max"] for row in rows if "mismatch/probe_abs_dlogp_max" in row]
    assert probes
    assert max(probes) < 1e-4
    assert max(row.get("mismatch/abs_dlogp_max", 0.0) for row in rows) < 1e-4
    assert servers_of(run_dir) == []


@pytest.mark.parametrize("steps", [12, pytest.param(50, marks=pytest.mark.prove)])
def test_two_ranks_push_to_two_servers_of_which_one_is_killed(
    steps: int, command: Any, environment: dict[str, str], tmp_path: Path
) -> None:
    """FSDP2 on gloo, weights.channel=distributed: updates without a deadlock, nothing lost, nothing twice."""
    keys = (
        "engine=sglang", "engine.servers=2", "weights.channel=distributed", "learner.ranks=2", f"learner.steps={steps}",
        "eval.engine=local", "broker.deadline_seconds=200", "weights.probe_every=5",
    )  # fmt: skip
    process = warm.Popen(
        command("pushed", *keys),
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    run_dir = tmp_path / "pushed"
    limit = time.monotonic() + 400
    while not (run_dir / "metrics.jsonl").is_file() or len((run_dir / "metrics.jsonl").read_text().splitlines()) < 5:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < limit
        time.sleep(0.1)
    victim = servers_of(run_dir)[0]
    os.kill(victim.pid, signal.SIGKILL)
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output
    summary = json.loads((run_dir / "summary.json").read_text())
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert (summary["status"], summary["steps"], summary["groups/trained"]) == ("completed", steps, 4 * steps)
    assert (summary["groups/lost"], summary["groups/duplicated"]) == (0, 0)
    assert sum(count for reason, count in summary["groups/refused"].items() if reason != "run_ended") == 0
    probes = [row["mismatch/probe_abs_dlogp_max"] for row in rows if "mismatch/probe_abs_dlogp_max" in row]
    assert max(probes) < 1e-4
    assert servers_of(run_dir) == []
