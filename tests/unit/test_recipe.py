"""Recipes: stages as ordinary runs, each composed over the whole, handing on checkpoint and data, resumable."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from offtrail.platform.config.compose import compose, load_config
from offtrail.platform.config.errors import ConfigError
from offtrail.platform.config.recipe import stages_of
from offtrail.platform.config.schema import Config
from offtrail.platform.launcher import recipe
from offtrail.platform.launcher.recipe import Outcome, run_recipe

TWO = "recipe.stages={first: {job: sft, sft: {steps: 60}}, second: {job: rl, start_from: first, algo: cispo}}"


def launches(ends: list[str]) -> tuple[list[str], Callable[[Config, Path, list[int]], Outcome]]:
    """A launch that leaves a checkpoint and a summary, ending as told, and the log of what it was given."""
    log: list[str] = []

    def launch(config: Config, run_dir: Path, interrupted: list[int]) -> Outcome:
        log.append(f"{config.job} {run_dir.name} resume={config.run.resume} from={Path(config.model.path).parent.name}")
        status = ends.pop(0)
        checkpoint = run_dir / "checkpoints" / "step_7"
        checkpoint.mkdir(parents=True, exist_ok=True)
        (checkpoint / "config.json").write_text("{}")
        summary = {"status": status, "steps": 7, "compute/flops": 100.0 if config.job == "sft" else 11.0}
        (run_dir / "summary.json").write_text(json.dumps(summary))
        return status, "" if status == "completed" else "stopped by SIGINT"

    return log, launch


def composed(tmp_path: Path, *more: str) -> Config:
    return compose([f"run.dir={tmp_path}", "run.name=whole", TWO, *more])


def test_every_stage_is_a_run_of_its_own_and_hands_its_checkpoint_on(tmp_path: Path) -> None:
    run_dir = tmp_path / "whole"
    run_dir.mkdir()
    log, launch = launches(["completed", "completed"])
    assert run_recipe(composed(tmp_path, "staleness.max=5"), run_dir, [], launch) == ("completed", "")
    assert log == ["sft 1_first resume=False from=", "rl 2_second resume=False from=checkpoints"]
    first = load_config(run_dir / "stages" / "1_first" / "config.yaml")
    second = load_config(run_dir / "stages" / "2_second" / "config.yaml")
    assert (first.job, first.sft.steps, first.algo.name) == ("sft", 60, "grpo")
    assert (second.job, second.sft.steps, second.algo.name) == ("rl", 1000, "cispo")
    assert (first.staleness.max, second.staleness.max) == (5, 5)  # the command line holds for all
    assert first.recipe.stages == {}
    assert second.model.path == str(run_dir / "stages" / "1_first" / "checkpoints" / "step_7")
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["stages"] == {name: {"status": "completed", "steps": 7} for name in ("first", "second")}
    assert summary["compute/flops"] == 111.0


def test_a_resumed_recipe_passes_over_what_is_done_and_goes_on_with_what_was_interrupted(tmp_path: Path) -> None:
    run_dir = tmp_path / "whole"
    run_dir.mkdir()
    config = composed(tmp_path)
    log, launch = launches(["completed", "interrupted", "completed"])
    assert run_recipe(config, run_dir, [], launch) == ("interrupted", "stage second: stopped by SIGINT")
    assert run_recipe(config, run_dir, [], launch) == ("completed", "")
    assert run_recipe(config, run_dir, [], launch) == ("completed", "")  # nothing is left to do
    assert [line.split(" from")[0] for line in log] == [
        "sft 1_first resume=False",
        "rl 2_second resume=False",
        "rl 2_second resume=True",
    ]


def test_a_stage_does_not_go_on_under_other_settings(tmp_path: Path) -> None:
    run_dir = tmp_path / "whole"
    run_dir.mkdir()
    _, launch = launches(["interrupted"])
    run_recipe(composed(tmp_path), run_dir, [], launch)
    status, reason = run_recipe(composed(tmp_path, "sft.warmup_steps=7"), run_dir, [], launch)
    assert status == "failed"
    assert "stage first: sft.warmup_steps=7: differs from 50" in reason


def test_data_is_handed_on_or_its_absence_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = tmp_path / "whole"
    run_dir.mkdir()
    stages = "recipe.stages={made: {job: rl}, used: {job: sft, data_from: made}}"
    config = compose([f"run.dir={tmp_path}", "run.name=whole", stages])
    _, launch = launches(["completed", "completed"])

    def nothing_right(folder: Path) -> Path:
        raise ConfigError(f"{folder.name}: none of its trained answers is right")

    monkeypatch.setattr(recipe, "write_right_answers", nothing_right)
    status, reason = run_recipe(config, run_dir, [], launch)
    assert (status, reason) == ("failed", "stage used: 1_made: none of its trained answers is right")
    data = run_dir / "stages" / "1_made" / "data.jsonl"
    data.write_text('{"prompt": "1+1", "answer": "2"}\n')
    assert run_recipe(config, run_dir, [], launch) == ("completed", "")
    assert load_config(run_dir / "stages" / "2_used" / "config.yaml").sft.path == str(data)


@pytest.mark.parametrize(
    ("stages", "says"),
    [
        ("{a: {job: rll}}", "recipe.stages.a.job=rll: must be one of rl, sft; nearest: rl"),
        ("{a: {}}", "recipe.stages.a: no such stage, or one without its job (rl or sft)"),
        (
            "{polish: {job: rl}, polsh: {learner: {steps: 3}}}",
            "recipe.stages.polsh: no such stage, or one without its job (rl or sft); nearest: polish",
        ),
        ("{a: {job: rl, start_from: b}}", "recipe.stages.a.start_from=b: must be an earlier stage, none"),
        (
            "{a: {job: sft}, b: {job: rl, start_from: c}}",
            "recipe.stages.b.start_from=c: must be an earlier",
        ),
        ("{a: {job: rl}, b: {job: rl, data_from: a}}", "recipe.stages.b.data_from=a: job=rl reads no data; sft does"),
        ("{a: {job: sft}, b: {job: sft, data_from: a}}", "recipe.stages.b.data_from=a: must be a stage of job=rl"),
        ("{A/b: {job: rl}}", "recipe.stages=A/b: a stage's name is a folder's"),
        (
            "{a: {job: rl, learner: {stepz: 3}}}",
            "recipe.stages.a: learner.stepz=3: unknown key; nearest",
        ),
        ("{a: {job: rl, run: {seed: 3}}}", "recipe.stages.a.run={seed: 3}: belongs to the whole recipe"),
        ("{a: {job: rl, algo: grpoo}}", "recipe.stages.a: algo=grpoo: unknown option"),
    ],
)
def test_a_mistake_in_any_stage_is_one_line_before_the_first_begins(stages: str, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        compose([f"recipe.stages={stages}"])
    assert str(error.value).startswith(says)


def test_a_key_of_one_stage_from_the_command_line() -> None:
    config = compose(["recipe=cold_start", "recipe.stages.sft.sft.steps=60", "learner.steps=7"])
    [sft, rl] = stages_of(config)
    assert (sft.name, sft.job, sft.settings) == ("sft", "sft", {"sft": {"steps": 60}})
    assert (rl.name, rl.job, rl.start_from, rl.settings) == ("rl", "rl", "sft", {})
    assert config.learner.steps == 7


def test_a_recipe_is_repeated_from_its_saved_configuration(tmp_path: Path) -> None:
    from offtrail.platform.config.compose import to_yaml

    config = compose(["recipe=cold_start", "recipe.stages.rl.algo=cispo"])
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(config))
    assert compose([str(saved)]) == config
