"""The registry of tasks, and what is asked of one before a run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from offtrail.platform.config.compose import compose
from offtrail.platform.config.errors import ConfigError
from offtrail.platform.launcher.command import require_inputs
from offtrail.tasks.base import TaskError
from offtrail.tasks.config import TaskConfig
from offtrail.tasks.jsonl import JsonlConfig
from offtrail.tasks.registry import families, make_task


def test_every_task_name_makes_a_task():
    for name, kind in families().items():
        assert make_task(kind.Config(), 0, load=False).name == name
    with pytest.raises(TaskError, match=r"task\.path is empty"):
        make_task(JsonlConfig(), 0)
    with pytest.raises(TaskError, match=r"task=chess: no such task; choose one of addition, chain"):
        make_task(TaskConfig(name="chess"), 0)


ROWS = {
    "ifeval": {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
    "xstest": {"label": "safe"},
    "programs": {"tests": ["assert f(1) == 2"]},
}
WITHOUT = {
    "ifeval": "task=ifeval has no worked answers",
    "xstest": "task=xstest has no worked answers",
    "programs": "task.solution_field=: names no field of solutions, so that there are no worked answers",
    "gym": "task.generator=graph_color has a verifier and no worked answers",
}
SFT, COLD = "; name a file of answers in sft.path", ", or a model to start from in model.path"


def keys_of(name: str, folder: Path) -> dict[str, str]:
    """Key → value of a task without worked answers."""
    if name == "gym":
        return {"generator": "graph_color"}
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Say {i}."} | ROWS[name]) + "\n" for i in range(40)))
    return {"path": str(path), "held_out_share": "0.3"}


@pytest.mark.parametrize("name", WITHOUT)
def test_a_task_without_worked_answers_is_refused_where_they_would_be_imitated(name: str, tmp_path: Path) -> None:
    given = keys_of(name, tmp_path)
    task = [f"task={name}", *(f"task.{key}={value}" for key, value in given.items()), "eval.prompts=1"]
    task += [{"programs": "reward=code", "gym": "reward.answer=tags"}.get(name, "reward.answer=text")]
    inner = ", ".join(f"{key}: {value}" for key, value in given.items())
    mixed = [
        "task=mixture",
        f"task.weights={{chain: 1, {name}: 1}}",
        f"task.settings={{{name}: {{{inner}}}}}",
        task[-1],
    ]
    for keys, says in (
        ([*task, "job=sft"], f"{WITHOUT[name]}{SFT}"),
        (task, f"{WITHOUT[name]}{SFT}{COLD}"),
        ([*mixed, "eval.prompts=1"], f"task.settings.{name}: {WITHOUT[name]}{SFT}{COLD}"),
        (
            [*task, "recipe.stages={a: {job: sft}, b: {job: rl, start_from: a}}"],
            f"recipe.stages.a: {WITHOUT[name]}{SFT}",
        ),
    ):
        with pytest.raises(ConfigError, match=f"^{re.escape(says)}$"):
            require_inputs(compose(keys))
    examples = tmp_path / "examples.jsonl"
    examples.write_text('{"prompt": "1+1=", "answer": "2"}\n')
    require_inputs(compose([*task, "job=sft", f"sft.path={examples}"]))
    require_inputs(
        compose([*task, f"recipe.stages={{a: {{job: sft, sft: {{path: {examples}}}}}, b: {{job: rl, start_from: a}}}}"])
    )


def test_a_cold_start_that_answers_elsewhere_than_is_looked_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sft.jsonl").write_text('{"prompt": "2;+2;%10=?", "answer": "4"}\n')
    for answer in ("boxed", "mark"):
        with pytest.raises(
            ConfigError, match=rf"^reward\.answer={answer}: the cold start .* task=chain, which have none"
        ):
            require_inputs(compose([f"reward.answer={answer}"]))
    for others in ("reward.weights={format: 1.0}", f"sft.path={tmp_path / 'sft.jsonl'}"):
        require_inputs(compose(["reward.answer=boxed", others]))
    for answer in ("tags", "last_number"):
        require_inputs(compose([f"reward.answer={answer}"]))
