"""A recipe through the real command: killed in its second stage, it goes on there and leaves the first as it is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import warm

STAGES = (
    "recipe.stages={first: {job: sft}, second: {job: rl, start_from: first, learner: {steps: 8}}, "
    "third: {job: rl, start_from: second, learner: {steps: 1}}}"
)


def written(folder: Path) -> dict[str, int]:
    """When each file of a finished stage was written."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.prove
def test_a_recipe_killed_in_a_stage_goes_on_with_it_and_touches_no_earlier_one(
    command: Any, launch: Any, environment: dict[str, str], tmp_path: Path
) -> None:
    given = (STAGES, "sft.steps=30", "sft.warmup_steps=5", "learner.checkpoint_every=2")
    process = warm.Popen(command("whole", *given), env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL)
    stages = tmp_path / "whole" / "stages"
    metrics, limit = stages / "2_second" / "metrics.jsonl", time.monotonic() + 240
    while not (metrics.is_file() and '"step": 3,' in metrics.read_text()):
        assert process.poll() is None, "the recipe ended before it could be killed"
        assert time.monotonic() < limit
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    first = written(stages / "1_first")
    assert not (stages / "3_third").exists()

    resumed = launch("whole", *given, "run.resume=true")
    assert resumed.code == 0, resumed.output
    assert written(stages / "1_first") == first
    told = {name: stage["status"] for name, stage in resumed.summary["stages"].items()}
    assert told == {"first": "completed", "second": "completed", "third": "completed"}
    second = json.loads((stages / "2_second" / "summary.json").read_text())
    assert (second["steps"], second["groups/lost"], second["groups/duplicated"]) == (8, 0, 0)
    assert (stages / "3_third" / "start").resolve() == (stages / "2_second" / "checkpoints" / "step_8").resolve()
    compute = [json.loads((folder / "summary.json").read_text())["compute/flops"] for folder in stages.iterdir()]
    assert resumed.summary["compute/flops"] == sum(compute)
