"""benchmarks/gpu/sglang.py on a CPU with the fake server: every part runs, and finds what is right about the fake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import offtrail
from fake_sglang import FakeServer
from offtrail.platform.engines.sglang.serve import ADMIN_KEY_VARIABLE, KEY_VARIABLE

TESTS = Path(__file__).parents[1]
SCRIPT = TESTS.parent / "benchmarks" / "gpu" / "sglang.py"


def run(*arguments: str, **environment: str) -> tuple[int, dict[str, Any]]:
    """Exit status, and the object of the last line."""
    path = os.pathsep.join([str(Path(offtrail.__file__).parents[1]), str(TESTS)])
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--device", "cpu", "--prompt", "16", "--rounds", "1", *arguments],
        env=os.environ | {"PYTHONPATH": path} | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout, done.stderr
    return done.returncode, dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.prove
def test_parts_with_a_server_of_their_own(tmp_path: Path) -> None:
    """And one that fails is told, while the others go on."""
    status, found = run(
        "--model", "tiny", "--in-flight", "4", "--new", "48", "--updates", "1", "--channels", "ipc",
        "--command", "fake_sglang", "--flags=--step-seconds 0.01", "--folder", str(tmp_path),
        "--parts", "train", "generate", "updates", "mismatch", "--keys", "learner.steps=0",
    )  # fmt: skip
    assert status == 1
    assert len(found["failed"]) == 1, found["failed"]
    [failed] = found["failed"]
    assert failed.startswith("train: ")
    assert "learner.steps=0: must be ≥ 1" in failed  # so that every other key of the run is one
    assert found["generate"]["sglang"]["4"] < 4 / 0.01  # a step takes at least that long
    assert found["generate"]["embedded"]["4"] < found["generate"]["roofline"]["4"]

    update = found["updates"]["ipc"]
    assert update["samples"] == update["samples_across"] == 4
    assert update["tokens"] == 4 * 4 * 48
    assert update["tokens_told_apart"] > 200
    assert update["misplaced"] == 0
    assert update["bytes"] == 2 * found["parameters"]
    assert update["pause_seconds_longest"] >= update["pause_seconds"] > 0

    assert found["mismatch"]["tokens"] == 4 * 48
    for learner in ("float32", "head_float32", "head_bfloat16"):
        against_engine = found["mismatch"][learner]
        assert 0 < against_engine["k3"] < 1e-5  # bfloat16 rounds to 3 digits, of logits that differ by some tenths
        assert 0 < against_engine["abs"]["0.5"] < against_engine["abs"]["1.0"] < 0.02
    assert found["mismatch"]["learner_rounding"]["abs"]["1.0"] < 0.02


@pytest.mark.prove
def test_two_runs_of_the_real_command(start_dir: Path) -> None:
    with FakeServer(
        "--model-path", str(start_dir), "--dtype", "bfloat16", "--context-length", "200", "--stream-interval", "32",
        "--incremental-streaming-output", "--api-key", "k", "--admin-api-key", "a",
    ) as server:  # fmt: skip
        status, found = run(
            "--model", str(start_dir), "--in-flight", "16", "--new", "16", "--parts", "train", "--channels", "disk",
            "--steps", "2", "--groups", "4", "--staleness", "1", "--keys", f"engine.urls=[{server.url}]",
            **{KEY_VARIABLE: "k", ADMIN_KEY_VARIABLE: "a"},
        )  # fmt: skip
        assert not server.died
    assert (status, found["failed"]) == (0, [])
    runs = [found["train"][name] for name in ("synchronous", "asynchronous")]
    for one in runs:
        assert one["samples_per_second"] * one["step_seconds"] == pytest.approx(4 * 8, rel=0.05)
        assert 0 < one["probe_k3"] < 1e-3
    assert runs[0]["staleness_mean"] == 0
    assert 0 < runs[1]["staleness_mean"] <= 1
    assert found["train"]["speedup"] == pytest.approx(
        runs[1]["samples_per_second"] / runs[0]["samples_per_second"], rel=0.01
    )
