"""The long proofs, run by `make prove`: a series of kills, and the demo over seeds."""

from __future__ import annotations

import os
import random
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import warm

from .test_invariants import ROLE_NAMES, checksums, numbers, pid_of, reached, running, wait_until

pytestmark = [pytest.mark.prove, pytest.mark.timeout(3600)]


def test_a_run_killed_again_and_again_ends_as_if_it_never_was(
    launch: Any, command: Any, environment: dict[str, str], tmp_path: Path
) -> None:
    """Ten kills of the launcher and of each role, at random steps: the same versions as an undisturbed run, nothing
    lost or twice. A killed generator or evaluator is started again; what ends the run is resumed.
    """
    exact = (
        "staleness.mode=exact", "staleness.max=2", "learner.steps=120", "learner.checkpoint_every=4",
        "generator.max_restarts=10", "eval.max_restarts=10",
    )  # fmt: skip
    whole = launch("whole", *exact)
    assert whole.code == 0, whole.output
    rng, run_dir = random.Random(5), tmp_path / "killed"
    victims = [*ROLE_NAMES, "launcher"] * 2
    rng.shuffle(victims)
    process = None
    for step, victim in zip(sorted(rng.sample(range(4, 116), len(victims))), victims, strict=True):
        if process is None:
            resumed = ("run.resume=true",) if run_dir.exists() else ()
            process = warm.Popen(command("killed", *exact, *resumed), env=environment, cwd=tmp_path)
        wait_until(f"step {step}", partial(reached, run_dir, step))
        if victim == "launcher":
            process.kill()
        else:
            wait_until(f"a {victim}", partial(running, victim, run_dir))
            os.kill(pid_of(victim, run_dir), signal.SIGKILL)
        if victim not in ("generator", "evaluator"):
            assert process.wait(120) == (-signal.SIGKILL if victim == "launcher" else 1)
            process = None
    if process is not None:
        assert process.wait(240) == 0
    end = launch("killed", "run.resume=true", *exact)
    assert end.code == 0, end.output
    assert checksums(end.run_dir) == checksums(whole.run_dir)
    assert numbers(end.rows) == numbers(whole.rows)
    assert (end.summary["groups/trained"], end.summary["groups/lost"], end.summary["groups/duplicated"]) == (480, 0, 0)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_demo_learns_whatever_the_seed(seed: int, environment: dict[str, str], tmp_path: Path, launch: Any) -> None:
    defaults = ("sft.steps=1000", "batch.groups=16", "batch.group_size=8", "learner.steps=40", "eval.prompts=512")
    run = launch("demo", *defaults, f"run.seed={seed}", f"sft.seed={seed}")
    assert run.code == 0, run.output
    assert run.summary["eval/accuracy_first"] <= 0.65
    assert run.summary["eval/accuracy_last"] >= 0.90
    assert run.summary["staleness/stale_token_share"] >= 0.5
