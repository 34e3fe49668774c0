"""The real command in a process of its own (warm.py), and a start model that is made once for all runs."""

from __future__ import annotations

import fcntl
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import warm

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Finished:
    """What one launch came to."""

    code: int
    output: str
    run_dir: Path

    @property
    def summary(self) -> dict[str, Any]:
        return dict(json.loads((self.run_dir / "summary.json").read_text()))

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run_dir / "metrics.jsonl").read_text().splitlines()]


PATIENCE_S = 240.0
"""The longest wait for anything: a loaded machine is no failure."""
TRAINED = (
    "trained", "learner.steps=2", "sampling.max_new_tokens=40",
    "eval.sets={sums: {name: addition, prompts: 6, samples: 2}, long: {name: chain, min_operations: 6}}",
)  # fmt: skip
"""A shared run and its settings, for whoever asks a checkpoint."""

EXACT = ("staleness.mode=exact", "learner.steps=8")
UNDISTURBED = (
    "exact", *EXACT, "learner.checkpoint_every=2", "eval.every=2",
    "eval.sets={sums: {name: addition, prompts: 8, samples: 2}}",
)  # fmt: skip
"""A shared run in exact mode and its settings: a run with EXACT that is disturbed makes the same versions, whenever it
takes checkpoints and scores them.
"""

Command = Callable[..., list[str]]
Launch = Callable[..., Finished]


@pytest.fixture(autouse=True)
def nothing_goes_on(warmed: None) -> Iterator[None]:
    """A run that its test left by a failed assertion ends with it."""
    before = set(psutil.Process().children())
    yield
    for child in set(psutil.Process().children()) - before:
        child.kill()
        child.wait()


@pytest.fixture(scope="session")
def environment(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One cache of start models for all workers: of launches that want the same one at once, one makes it."""
    mine = tmp_path_factory.getbasetemp()
    session = mine.parent if hasattr(request.config, "workerinput") else mine
    return os.environ | {"OFFTRAIL_CACHE": str(session / "cache"), "COLUMNS": "100"}


def command_in(folder: Path) -> Command:
    """The command line of a run named ``name`` in ``folder``: a small, quick run of the default task unless told
    otherwise. Its evaluator is as nice as others: behind the tests beside it it would come last.
    """

    def make(name: str, *overrides: str) -> list[str]:
        small = [
            "sft.steps=150", "batch.groups=4", "batch.group_size=4", "learner.steps=4", "learner.checkpoint_every=3",
            "eval.prompts=16", "eval.every=0", "broker.deadline_seconds=60", "broker.lease_heartbeats=10",
            "eval.nice=0", "tracking.tensorboard=false", "tracking.figures=false",
        ]  # fmt: skip
        given = {override.split("=")[0] for override in overrides}
        kept = [override for override in small if override.split("=")[0] not in given]
        run = [f"run.name={name}", f"run.dir={folder}"]
        return [sys.executable, str(ROOT / "launch.py"), *run, *kept, *overrides]

    return make


def launcher(environment: dict[str, str], folder: Path) -> Launch:
    """Run the command to its end, in a folder."""

    def run(name: str, *overrides: str, seconds: float = 280) -> Finished:
        command = command_in(folder)(name, *overrides)
        done = warm.run(command, seconds, env=environment, cwd=folder)
        return Finished(done.returncode, done.stdout + done.stderr, folder / name)

    return run


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """The command line of a run in the test's own folder."""
    return command_in(tmp_path)


@pytest.fixture
def launch(environment: dict[str, str], tmp_path: Path) -> Launch:
    """Run the command to its end, in the test's own folder."""
    return launcher(environment, tmp_path)


@pytest.fixture(scope="session")
def shared(environment: dict[str, str]) -> Launch:
    """Called with a name of its own and its settings: a run to its end that nothing disturbs, made by the first of all
    workers that asks for it. Whoever wants to change its folder copies it.
    """
    folder = Path(environment["OFFTRAIL_CACHE"]).with_name("shared")
    folder.mkdir(exist_ok=True)

    def run(name: str, *overrides: str, seconds: float = 280) -> Finished:
        told = folder / f"{name}.json"
        with (folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not told.exists():
                made = launcher(environment, folder)(name, *overrides, seconds=seconds)
                told.write_text(json.dumps([made.code, made.output, overrides]))
        code, output, settings = json.loads(told.read_text())
        assert (code, settings) == (0, list(overrides)), output
        return Finished(code, output, folder / name)

    return run
