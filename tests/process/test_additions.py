"""What an addition touches, counted on real drafts in a copy of the tree: a reward component, a task, a role."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("ablations", "algos", "configs", "core", "platform", "rewards", "search", "tasks")

BRIEF = '''"""Brevity: 1 for an answer of at most ``longest`` characters."""

from offtrail.rewards.base import Answered


def score(answered: Answered, longest: int = 10) -> float:
    """1 where it is short."""
    return float(len(answered.text) <= longest)
'''
PARITY = '''"""Parity: is the sum of two digits even?"""

import random
from dataclasses import dataclass

from offtrail.core.problem import Problem
from offtrail.tasks.base import Draw, GeneratedTask
from offtrail.tasks.config import GeneratedConfig


@dataclass
class ParityConfig(GeneratedConfig):
    """Even or odd."""

    name: str = "parity"


class ParityTask(GeneratedTask[ParityConfig]):
    """1 for odd, 0 for even."""

    Config = ParityConfig

    def draw(self, rng: random.Random) -> Draw:
        """Two numbers below 100."""
        a, b = rng.randrange(100), rng.randrange(100)
        return Draw(f"{a}+{b}%2=?", str((a + b) % 2), f"{a}+{b}", {"numbers": [a, b]})

    def work(self, problem: Problem, rng: random.Random) -> tuple[list[str], str]:
        """At once."""
        return [], problem.answer

    def check(self, problem: Problem, steps: list[str]) -> list[bool]:
        """There are none."""
        return []


TASK = ParityTask
'''
WATCHER = '''"""A role that only looks on until the end of the run, and keeps the newest version that it heard of."""

import time

from offtrail.platform.runtime.context import RoleContext


def main(context: RoleContext) -> None:
    """Run until the broker says stop."""
    connection = context.connect()
    with connection.activity.waiting("the end", on="learner"):
        while not connection.heartbeat.stop:
            time.sleep(0.02)
    (context.run_dir / "watched.txt").write_text(str(connection.heartbeat.version))
    connection.close()
'''


class Tree:
    """A copy of the packages, as real folders, and what was done to it."""

    def __init__(self, folder: Path) -> None:
        self.source, self.touched = folder / "src", list[str]()
        (self.source / "offtrail").mkdir(parents=True)
        for file in (ROOT / "src" / "offtrail").glob("*.py"):
            shutil.copy(file, self.source / "offtrail")
        for room in ROOMS:
            hidden = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / room, self.source / "offtrail" / room, ignore=hidden)

    def add(self, path: str, text: str) -> None:
        file = self.source / "offtrail" / path
        assert not file.exists()
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        self.touched.append(f"new {path}")

    def edit(self, path: str, old: str, new: str) -> None:
        file = self.source / "offtrail" / path
        text = file.read_text()
        assert text.count(old) == 1
        file.write_text(text.replace(old, new))
        self.touched.append(f"one line of {path}")

    def offtrail(self, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        env = os.environ | {"PYTHONPATH": str(self.source), "OFFTRAIL_CACHE": str(cwd / "cache")}
        command = [sys.executable, "-m", "offtrail", f"run.dir={cwd / 'runs'}", *arguments]
        return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=240)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


SMALL = (
    *("run.name=one", "learner.steps=1", "learner.minibatches=1", "batch.groups=2", "batch.group_size=2"),
    *("eval.prompts=4", "sft.steps=2", "sft.warmup_steps=1", "tracking.progress=off", "tracking.tensorboard=false"),
)


@pytest.mark.prove
def test_a_component_and_a_task_are_a_module_and_a_line_of_yaml_and_a_role_is_a_row_and_its_module(
    tree: Tree, tmp_path: Path
) -> None:
    """All three in one run."""
    tree.add("rewards/components/brief.py", BRIEF)
    tree.add("configs/reward/brief.yaml", "weights: {accuracy: 1.0, brief: 0.2}\n")
    assert tree.touched == ["new rewards/components/brief.py", "new configs/reward/brief.yaml"]

    tree.add("tasks/parity.py", PARITY)
    tree.add("configs/task/parity.yaml", "# Parity: the defaults of ParityConfig.\n")
    assert tree.touched[2:] == ["new tasks/parity.py", "new configs/task/parity.yaml"]

    first = 'ROLES = (\n    RoleRow("broker"),'
    tree.edit("platform/runtime/roles.py", first, f'{first} RoleRow("watcher"),')
    tree.edit("platform/runtime/roles.py", '"rl": ("broker", ', '"rl": ("broker", "watcher", ')
    tree.add("platform/watcher/__init__.py", '"""Looks on."""\n')
    tree.add("platform/watcher/role.py", WATCHER)
    assert len(tree.touched[4:]) == 4  # the row, its job, the module in its room

    done = tree.offtrail(tmp_path, "task=parity", "reward=brief", "reward.settings.brief.longest=0", *SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    run_dir = tmp_path / "runs" / "one"
    [row] = [line for line in (run_dir / "metrics.jsonl").read_text().splitlines() if '"step": 1,' in line]
    assert json.loads(row)["reward/brief"] == 0.0  # its setting reached the worker: no answer has 0 characters
    assert (run_dir / "watched.txt").read_text() == "1"
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["status"], summary["groups/lost"]) == ("completed", 0)
