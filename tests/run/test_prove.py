"""The long proofs, run by `make prove`: a series of kills, and the demo over seeds."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from .test_invariants import checksums, numbers, pid_of

pytestmark = [pytest.mark.prove, pytest.mark.timeout(3600)]

ROLES = ("broker", "learner", "generator", "evaluator")


def test_a_run_killed_again_and_again_ends_as_if_it_never_was(
    launch: Any, command: Any, environment: dict[str, str], tmp_path: Path
) -> None:
    """Random roles, random moments, ten kills: the same versions as an undisturbed run, nothing lost or twice."""
    exact = ("staleness.mode=exact", "staleness.max=2", "learner.steps=150", "learner.checkpoint_every=4")
    whole = launch("whole", *exact)
    assert whole.code == 0, whole.output
    rng, kills = random.Random(5), 0
    more: tuple[str, ...] = ()
    while kills < 10:
        process = subprocess.Popen(command("killed", *exact, *more), env=environment, cwd=tmp_path)
        more = ("run.resume=true",)
        deadline = time.monotonic() + rng.uniform(8.0, 25.0)
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        if process.poll() == 0:
            break
        try:
            os.kill(pid_of(rng.choice(ROLES), tmp_path / "killed"), signal.SIGKILL)
        except AssertionError:
            continue  # the role was not up yet
        code = process.wait(180)
        if code == 0:  # it had come to its end meanwhile
            break
        assert code == 1
        kills += 1
    assert kills >= 3
    end = launch("killed", "run.resume=true", *exact)
    assert end.code == 0, end.output
    assert checksums(end.run_dir) == checksums(whole.run_dir)
    assert numbers(end.rows) == numbers(whole.rows)
    assert (end.summary["groups/trained"], end.summary["groups/lost"], end.summary["groups/duplicated"]) == (600, 0, 0)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_demo_learns_whatever_the_seed(seed: int, environment: dict[str, str], tmp_path: Path, launch: Any) -> None:
    defaults = ("sft.steps=1000", "batch.groups=16", "batch.group_size=8", "learner.steps=40", "eval.prompts=512")
    run = launch("demo", *defaults, f"run.seed={seed}", f"sft.seed={seed}")
    assert run.code == 0, run.output
    assert run.summary["eval/accuracy_first"] <= 0.65
    assert run.summary["eval/accuracy_last"] >= 0.90
    assert run.summary["staleness/stale_token_share"] >= 0.5
