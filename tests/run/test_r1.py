"""R1's whole recipe through the real command on a model that hardly learns: killed in its third stage, it goes on
there, and its table is that of a recipe that nobody disturbed.
"""

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

SMALL = (
    "recipe=r1", "staleness.mode=exact", "learner.checkpoint_every=2", "sft.warmup_steps=5", "eval.prompts=24",
    "batch.groups=4", "learner.minibatches=2",
    "recipe.stages.base.sft.steps=200",
    "recipe.stages.r1_zero.made={batch: {group_size: 4}, learner: {steps: 8, minibatches: 2}}",
    "recipe.stages.dev1.made={task: {worked_share: 1.0}, sft: {steps: 20, lr: 1e-3, warmup_steps: 5}}",
    "recipe.stages.dev2.made={batch: {group_size: 4}, learner: {steps: 2, minibatches: 2}}",
    "recipe.stages.samples.made={sample: {prompts: 64, samples: 2}}",
    "recipe.stages.general.sample={prompts: 96, samples: 2, keep: all}",
    "recipe.stages.kept.reject={min_reward: 0, drop_unfinished: false, max_repetition: 1}",
    "recipe.stages.dev3.made={sft: {warmup_steps: 1}}",
    "recipe.stages.r1.made={batch: {group_size: 4}, learner: {steps: 2, minibatches: 2}}",
)  # fmt: skip


def table(run_dir: Path) -> list[tuple[str, Any]]:
    """What was measured of each model; costs and seconds are what they were."""
    return [(row["stage"], row["sets"]) for row in json.loads((run_dir / "dev.json").read_text())["rows"]]


def end(command: list[str], environment: dict[str, str], folder: Path) -> str:
    done = warm.run(command, 1500, env=environment, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.prove
def test_r1_killed_in_its_third_stage_gives_the_same_table(
    command: Any, environment: dict[str, str], tmp_path: Path
) -> None:
    end(command("whole", *SMALL), environment, tmp_path)
    undisturbed = table(tmp_path / "whole")
    assert [name for name, _ in undisturbed] == ["base", "r1_zero", "dev1", "dev2", "dev3", "r1"]

    process = warm.Popen(command("killed", *SMALL), env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL)
    metrics = tmp_path / "killed" / "stages" / "3_r1_zero" / "metrics.jsonl"
    limit = time.monotonic() + 900
    while not (metrics.is_file() and '"step": 5,' in metrics.read_text()):
        assert process.poll() is None, "the recipe ended before it could be killed"
        assert time.monotonic() < limit
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    said = end(command("killed", *SMALL, "run.resume=true"), environment, tmp_path)
    assert "recipe r1: 15 stages, 2 done before" in said
    assert "stage 3/15: r1_zero (job=rl) · 2 done" in said
    assert table(tmp_path / "killed") == undisturbed
