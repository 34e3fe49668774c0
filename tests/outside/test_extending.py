"""Code from outside the tree, through the real command: the examples of docs/extending/, in a folder of their own."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
import yaml

from offtrail.algos.advantages import estimate
from offtrail.algos.config import GrpoConfig
from offtrail.algos.correction_config import CorrectionConfig
from offtrail.algos.loss import LossInput, policy_loss
from offtrail.platform.config.compose import compose
from offtrail.platform.launcher.command import main
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


def from_nothing(command: list[str], **given: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, **given)


def command(
    folder: Path, *arguments: str, run: Callable[..., subprocess.CompletedProcess[str]] = from_nothing
) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["OFFTRAIL_CACHE"] = str(folder / "cache")
    return run([sys.executable, str(ROOT / "launch.py"), *arguments], cwd=folder, env=environment)


def test_a_tasks_settings_are_keys_like_any_other_and_are_saved(folder: Path):
    first = command(folder, "task=my_tasks:Largest", "task.digits=5", "--dry-run")
    assert yaml.safe_load(first.stdout)["task"] == {
        "name": "my_tasks:Largest", "held_out_share": 0.1, "worked_share": 0.5, "tagged_share": 1.0, "noise": 0.0,
        "digits": 5,
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
        ("algo.loss=my_losses:soft_clap", "my_losses has no soft_clap; nearest: soft_clip"),
        ("algo.loss=clip", "algo.loss=clip: must be package.module:attribute"),
        ("algo.loss_settings.width=3", "algo.loss_settings: nothing reads them"),
        (
            "algo.loss=my_losses:soft_clip algo.loss_settings.widht=3",
            "algo.loss_settings.widht=3: no such setting; my_lo",
        ),
        (
            "algo.advantage=my_advantages:bounded algo.advantage_settings.limt=3",
            "algo.advantage_settings.limt=3: no such setting; my_advantages:bounded takes limit; nearest: limit",
        ),
        ("algo.advantage=my_advantages:bound", "my_advantages has no bound; nearest: bounded"),
        ("algo.advantage=grup", "algo.advantage=grup: must be one of group, rloo"),
        ("reward.weights.wrong:happy=1", "reward.weights=wrong:happy: wrong has no happy"),
        (
            "search=my_drivers:SecndTry",
            "search.name=my_drivers:SecndTry: my_drivers has no SecndTry; nearest:",
        ),
        (
            "search=my_drivers:SecondTry search.settings.mroe=2",
            "search.settings.mroe=2: no such setting; my_drivers:Sec",
        ),
    ],
)
def test_a_mistake_is_one_line_before_anything_starts(folder: Path, argument: str, line: str):
    (folder / "wrong.py").write_text(WRONG)
    done = command(folder, *argument.split(), "model.path=")
    assert done.returncode == 2
    assert line in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["algo.loss=my_losses:soft_clip", "algo.loss_settings.widht=3"],
        ["algo.advantage=my_advantages:bounded", "algo.advantage_settings.limt=3"],
        ["reward.weights.my_rewards:brevity=1", "reward.settings.my_rewards:brevity.longst=3"],
        ["search=my_drivers:SecondTry", "search.settings.mroe=2"],
    ],
)
def test_a_misspelt_setting_shows_in_a_dry_run_which_loads_no_code(
    arguments: list[str], importable: None, capsys: pytest.CaptureFixture[str]
):
    before = set(sys.modules)
    assert main([*arguments, "--dry-run"]) == 2
    assert f"{arguments[1]}: no such setting" in capsys.readouterr().err
    assert not {name for name in set(sys.modules) - before if name.startswith("my_")}


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


@pytest.fixture
def importable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pages' modules, found from the current directory."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_the_pages_loss_is_used_by_the_policy_loss(importable: None):
    """R = 1.1 and .9, A = 2 and −1, width .3: the mean of −2·.3·tanh(1/3) and 1·.3·tanh(−1/3); no token is clipped."""
    algo = GrpoConfig(loss="my_losses:soft_clip", loss_settings={"width": 0.3})
    logprobs = torch.tensor([1.1, 0.9]).log().requires_grad_()
    inputs = LossInput(logprobs, torch.zeros(2), torch.tensor([2.0, -1.0]), torch.full((2,), 0.5), torch.tensor([0, 1]))
    loss, metrics = policy_loss(inputs, algo, CorrectionConfig())
    assert loss.item() == pytest.approx((-2 * 0.3 * math.tanh(1 / 3) + 0.3 * math.tanh(-1 / 3)) / 2, rel=1e-5)
    loss.backward()
    assert logprobs.grad is not None
    assert metrics.means()["policy/clip_high_fraction"] == 0


def test_the_pages_advantage_is_used_by_the_estimate(importable: None):
    """Rewards 1 0 0 | 2 2: leave-one-out 1 −.5 −.5 | 0 0, within ±.4: .4 −.4 −.4; spread over 1 2 1 | 1 1 tokens."""
    algo = GrpoConfig(advantage="my_advantages:bounded", advantage_settings={"limit": 0.4})
    rewards, group_of = torch.tensor([1.0, 0, 0, 2, 2]), torch.tensor([0, 0, 0, 1, 1])
    made = estimate(algo, rewards, group_of, torch.tensor([1, 2, 1, 1, 1]))
    torch.testing.assert_close(made.tokens, torch.tensor([0.4, -0.4, -0.4, -0.4, 0, 0]))


SHAPELESS = """
def loss(tokens): return tokens.logprobs.sum()
def detached(tokens): return tokens.logprobs.detach()
def advantage(rewards, group_of, lengths): return rewards[:1]
def infinite(rewards, group_of, lengths): return rewards / 0
"""


def test_what_is_no_loss_and_no_advantage_is_named(importable: None):
    Path("shapeless.py").write_text(SHAPELESS)
    x = LossInput(torch.zeros(2).requires_grad_(), *[torch.zeros(2)] * 3, torch.tensor([0, 1]))
    for settings, line in (
        (
            {"loss": "shapeless:loss"},
            r"gave shape \(\), must give a loss of each token, \(2,\)",
        ),
        ({"loss": "shapeless:detached"}, "gave a loss without a gradient"),
        ({"loss": "shapeless:loss", "loss_settings": {"width": 1}}, r"algo\.loss_settings\.width=1: no such setting"),
    ):
        with pytest.raises(ValueError, match=line):
            policy_loss(x, GrpoConfig(**settings), CorrectionConfig())
    for name, line in (("advantage", r"must give a number for each sample, \[2\]"), ("infinite", "not finite")):
        with pytest.raises(ValueError, match=line):
            estimate(GrpoConfig(advantage=f"shapeless:{name}"), torch.ones(2), torch.zeros(2), torch.tensor([1, 1]))


def test_a_run_with_task_reward_loss_and_advantage_from_outside_completes(folder: Path, warmed: None):
    """Three steps through every process. Format counts from step 1 on, so that the first batch earns less."""
    done = command(
        folder, "task=my_tasks:Largest", "task.digits=3", "algo.loss=my_losses:soft_clip",
        "algo.advantage=my_advantages:bounded", "algo.advantage_settings={limit: 0.5}",
        "reward.weights={accuracy: 1, my_rewards:brevity: 0.5, my_rewards:shortest_right: 0.1, format: 10}",
        "reward.settings.my_rewards:brevity.longest=10", "reward.only.format.from_step=1", "run.name=outside",
        "learner.steps=3", "eval.prompts=16", "batch.groups=4", "batch.group_size=4", "sft.steps=60",
        "sft.warmup_steps=5", "staleness.mode=exact", "staleness.max=0", "tracking.progress=off",
        run=partial(warm.run, timeout=280),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run = folder / "runs" / "outside"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "reward/mean" in row]
    assert len(trained) == 3
    for row, shape in zip(trained, (0, 10, 10), strict=True):
        brevity, best = (row.get(f"reward/my_rewards:{name}", 0.0) for name in ("brevity", "shortest_right"))
        assert 0 <= brevity <= 1
        # Brevity applies to well-formed answers only, the best to prompts with a right one: at most their means count.
        least = row["reward/accuracy"] + shape * row["reward/format"]
        assert least - 1e-4 <= row["reward/mean"] <= least + 0.5 * brevity + 0.1 * best + 1e-4
    assert any("eval/my_rewards:brevity" in row for row in rows)
    assert json.loads((run / "summary.json").read_text())["status"] == "completed"
