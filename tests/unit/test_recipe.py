"""Recipes: stages as ordinary runs, each composed over the whole, handing on checkpoint and data, resumable."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from offtrail.platform.config.checkpoints import model_folder
from offtrail.platform.config.compose import compose, load_config, stage_config
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
        summary |= {"tokens/trained": 6} | ({"tokens/generated": 4} if config.job == "rl" else {})
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
    assert (summary["tokens/trained"], summary["tokens/generated"]) == (12, 4)


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


CHAIN = (
    "recipe.stages={made: {job: rl}, asked: {job: sample, start_from: made, sample: {prompts: 3}}, judged: {job: eval, "
    "start_from: made}, kept: {job: reject, data_from: [made, asked]}, student: {job: sft, data_from: kept}}"
)


def test_models_and_data_are_handed_to_the_jobs_that_make_data(tmp_path: Path) -> None:
    run_dir = tmp_path / "whole"
    run_dir.mkdir()
    config = compose([f"run.dir={tmp_path}", "run.name=whole", CHAIN])
    stages = stages_of(config)
    assert [stage.data_from for stage in stages] == [(), (), (), ("made", "asked"), ("kept",)]
    folders = [run_dir / "stages" / stage.folder for stage in stages]
    checkpoint = folders[0] / "checkpoints" / "step_7"

    def launch(config: Config, folder: Path, interrupted: list[int]) -> Outcome:
        if config.job in ("rl", "sample", "reject"):  # of job=rl the right answers, which are there already
            (folder / "data.jsonl").write_text('{"prompt": "1+1", "answer": "2"}\n')
        if config.job == "rl":
            checkpoint.mkdir(parents=True)
            (checkpoint / "config.json").write_text("{}")
        summary = {"status": "completed", "data/lines": 1, "unknown": 1}
        (folder / "summary.json").write_text(json.dumps(summary))
        return "completed", ""

    assert run_recipe(config, run_dir, [], launch) == ("completed", "")
    _, asked, judged, kept, student = [load_config(folder / "config.yaml") for folder in folders]
    assert (asked.checkpoint, judged.checkpoint) == (str(checkpoint), str(checkpoint))
    assert (asked.model.path, asked.sample.prompts, kept.checkpoint) == ("", 3, "")
    assert kept.reject.paths == [str(folders[0] / "data.jsonl"), str(folders[1] / "data.jsonl")]
    assert student.sft.path == str(folders[3] / "data.jsonl")
    told = json.loads((run_dir / "summary.json").read_text())["stages"]
    assert told["kept"] == {"status": "completed", "data/lines": 1}
    (run_dir / "config.yaml").touch()  # what is asked of the whole is the newest stage's that has a model
    assert model_folder(str(run_dir)) == checkpoint


def test_a_stage_that_asks_a_model_and_is_handed_none_asks_the_recipes_own(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    stages = "recipe.stages={asked: {job: sample}, trained: {job: rl}}"
    config = compose([stages, f"model.path={tmp_path}"])
    [asked, trained] = [stage_config(config, stage, {}) for stage in stages_of(config)]
    assert (asked.checkpoint, asked.model.path, trained.checkpoint) == (str(tmp_path), str(tmp_path), "")


def test_a_distillation_is_three_stages_and_two_where_the_samples_are_there(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    samples = tmp_path / "samples.jsonl"
    samples.write_text('{"prompt": "1+1", "answer": "2", "reward": 1}\n')
    whole = stages_of(compose(["job=distill", f"distill.teacher={tmp_path}"]))
    assert [(one.name, one.job, one.data_from) for one in whole] == [
        ("sample", "sample", ()), ("reject", "reject", ("sample",)), ("sft", "sft", ("reject",)),
    ]  # fmt: skip
    config = compose(["job=distill", f"distill.teacher={samples}", "reject.most=1"])
    [kept, _] = [stage_config(config, stage, {}) for stage in stages_of(config)]
    assert (kept.job, kept.reject.paths, kept.reject.most) == ("reject", [str(samples)], 1)
    with pytest.raises(ConfigError, match=r"^job=distill, stage sample: checkpoint=\S+: no such folder"):
        compose(["job=distill", f"distill.teacher={tmp_path / 'nothing'}"])
    with pytest.raises(ConfigError, match=r"^distill.teacher=: job=distill needs a model or a file"):
        compose(["job=distill"])
    with pytest.raises(ConfigError, match=r"^job=distill: is a recipe of its own; leave recipe=cold_start out"):
        compose(["job=distill", f"distill.teacher={samples}", "recipe=cold_start"])


@pytest.mark.parametrize(
    ("stages", "says"),
    [
        ("{a: {job: rll}}", "recipe.stages.a.job=rll: must be one of rl, sft, sample, reject, eval; nearest: rl"),
        ("{a: {}}", "recipe.stages.a: no such stage, or one without its job (rl, sft, sample, reject, eval)"),
        (
            "{polish: {job: rl}, polsh: {learner: {steps: 3}}}",
            "recipe.stages.polsh: no such stage, or one without its job (rl, sft, sample, reject, eval); nearest: ",
        ),
        ("{a: {job: rl, start_from: b}}", "recipe.stages.a.start_from=b: must be an earlier stage, none"),
        (
            "{a: {job: sft}, b: {job: rl, start_from: c}}",
            "recipe.stages.b.start_from=c: must be an earlier",
        ),
        (
            "{a: {job: rl}, b: {job: rl, data_from: a}}",
            "recipe.stages.b.data_from=a: job=rl reads no data; sft and reject do",
        ),
        (
            "{a: {job: sft}, b: {job: sft, data_from: a}}",
            "recipe.stages.b.data_from=a: must be a stage of job=rl, sample",
        ),
        ("{a: {job: sft}, b: {job: reject, start_from: a}}", "recipe.stages.b.start_from=a: job=reject has no model"),
        (
            "{a: {job: reject, reject: {paths: [/etc/hostname]}}, b: {job: rl, start_from: a}}",
            "recipe.stages.b.start_from=a: must be a stage of job=rl or sft",
        ),
        (
            "{a: {job: rl}, b: {job: rl}, c: {job: sft, data_from: [a, b]}}",
            "recipe.stages.c.data_from=[a, b]: job=sft reads one file; join them in a stage of job=reject",
        ),
        ("{a: {job: rl}, b: {job: reject, data_from: [a, {x: y}]}}", "recipe.stages.b.data_from={x: y}: must be the"),
        ("{a: {job: reject}}", "recipe.stages.a: reject.paths=: job=reject needs files of answers"),
        ("{a: {job: sample}}", "recipe.stages.a: checkpoint=: job=sample needs a run directory"),
        ("{a: {job: eval, eval: {promts: 3}}}", "recipe.stages.a: eval.promts=3: unknown key; nearest: eval.prompts"),
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
