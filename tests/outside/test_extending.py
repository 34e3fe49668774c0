"""Code from outside the tree, through the real command: the examples of docs/extending/, in a folder of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from offtrail.platform.config.compose import compose
from offtrail.tasks.registry import make_task

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "extending"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The modules of every page of docs/extending/, each named by its first line, and nothing else."""
    for page in PAGES.glob("*.md"):
        for code in re.findall(r"```python\n(# (\w+\.py)\n.*?)```", page.read_text(), re.DOTALL):
            (tmp_path / code[1]).write_text(code[0])
    return tmp_path


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, ROOT / "launch.py", *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("page", sorted(PAGES.glob("*.md")), ids=lambda page: page.stem)
def test_every_command_of_a_page_is_composed(folder: Path, page: Path):
    commands = re.findall(r"^python launch\.py (.*)$", page.read_text(), re.MULTILINE)
    assert commands
    for line in commands:
        done = command(folder, *line.split(), "--dry-run")
        assert done.returncode == 0, done.stderr


def test_a_tasks_settings_are_keys_like_any_other_and_are_saved(folder: Path):
    first = command(folder, "task=my_tasks:Largest", "task.digits=5", "--dry-run")
    assert yaml.safe_load(first.stdout)["task"] == {
        "name": "my_tasks:Largest", "held_out_share": 0.1, "worked_share": 0.5, "noise": 0.0, "digits": 5,
    }  # fmt: skip
    (folder / "saved.yaml").write_text(first.stdout)
    assert command(folder, "saved.yaml", "--dry-run").stdout == first.stdout


WRONG = """
from offtrail.core.types import Problem
from offtrail.tasks.config import TaskConfig
class Bare: ...
class Leaks:
    Config = TaskConfig
    def __init__(self, config, seed, load=True): self.name = config.name
    def train(self, index): return Problem(self.name, index, f"{index}=?", "1")
    def held_out(self, n): return [Problem(self.name, i, f"{i + 200}=?", "1") for i in range(n)]
    def trace(self, problem, rng): return "<think></think><answer>1</answer>"
    def verify(self, problem, text): return True
    def check_steps(self, problem, text): return []
class Restless(Leaks):
    calls = 0
    def train(self, index):
        Restless.calls += 1
        return Problem(self.name, index, f"-{Restless.calls}=?", "1")
class Shrinking(Leaks):
    def held_out(self, n): return [Problem(self.name, i, f"{i + 200 + n}=?", "1") for i in range(n)]
def grumpy(answered, *, mood): return 1.0
"""


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("task=my_task:Largest", "task=my_task:Largest: no module my_task in this Python"),
        ("task=my_tasks:Large", "task=my_tasks:Large: my_tasks has no Large; nearest: Largest"),
        ("task=wrong:Bare", "task=wrong:Bare: needs `Config = …` in the class"),
        ("task=my_tasks:Largest task.digit=3", "task.digit=3: unknown key; nearest: task.digits"),
        ("task=my_tasks:Largest task.digits=1", "task.digits=1: must be in [2, 9]"),
        ("task=wrong:Leaks", "task=wrong:Leaks: train(200) is a held-out prompt, '200=?'"),
        ("task=wrong:Restless", "task=wrong:Restless: train(0) changes from call to call"),
        ("task=wrong:Shrinking", "must be 512 distinct prompts that begin as held_out(511)"),
        ("reward.weights.wrong:grumpy=1", "reward.settings.wrong:grumpy.mood: is needed by wrong:grumpy; set it"),
        ("reward.weights.wrong:happy=1", "reward.weights=wrong:happy: wrong has no happy"),
        (
            "search=my_drivers:SecndTry",
            "search.name=my_drivers:SecndTry: my_drivers has no SecndTry; nearest:",
        ),
        ("search=my_drivers:SecondTry search.settings.mroe=2", "search.settings={'mroe': 2}: my_drivers:SecondTry is"),
    ],
)
def test_a_mistake_is_one_line_before_anything_starts(folder: Path, argument: str, line: str):
    (folder / "wrong.py").write_text(WRONG)
    done = command(folder, *argument.split(), "model.path=")
    assert done.returncode == 2
    assert line in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (folder / "runs").exists()


def test_a_mixture_holds_a_family_from_outside(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """A third of the places, its settings its own, its problems verified by it with partial credit."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    mixed = ("task=mixture", "task.weights={chain: 2, my_tasks:Largest: 1}", "task.settings.my_tasks:Largest.digits=3")
    task = make_task(compose([*mixed]).task, 0)
    problems = [problem for problem in map(task.train, range(300)) if problem.task == "my_tasks:Largest"]
    assert abs(len(problems) - 100) <= 3
    assert {problem.prompt.count("+") for problem in problems} == {2}
    nine = next(problem for problem in problems if problem.answer == "9")
    assert [task.verify(nine, text) for text in ("9", "8", "7")] == [1.0, 0.5, 0.0]
