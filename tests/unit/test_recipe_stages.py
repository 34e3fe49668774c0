"""What a stage may say beside its job, the options that a recipe brings along, R1's recipes as they are composed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from offtrail.platform.config.compose import compose, load_config, stage_config
from offtrail.platform.config.errors import ConfigError
from offtrail.platform.config.recipe import stages_of
from offtrail.platform.config.schema import Config
from offtrail.platform.launcher.recipe import Outcome, run_recipe


def model_in(folder: Path) -> str:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return str(folder)


def settings(config: Config) -> dict[str, Config]:
    """Stage → its configuration as far as it is known before the first begins."""
    return {stage.name: stage_config(config, stage, {}) for stage in stages_of(config)}


BOTH = (
    "recipe.stages={base: {job: sft, only: made, sft: {steps: 60}}, "
    "on: {job: rl, start_from: base, learner: {steps: 7}, made: {learner: {optim: {lr: 0.5}}}}}"
)


def test_a_made_model_has_a_base_stage_and_keys_of_its_own(tmp_path: Path) -> None:
    small = compose([BOTH])
    assert [(s.number, s.name, s.start_from) for s in stages_of(small)] == [(1, "base", ""), (2, "on", "base")]
    assert (settings(small)["on"].learner.steps, settings(small)["on"].learner.optim.lr) == (7, 0.5)
    large = compose([BOTH, f"model.path={model_in(tmp_path / 'large')}"])
    assert [(s.number, s.name, s.start_from) for s in stages_of(large)] == [(1, "on", "")]
    on = settings(large)["on"]
    assert (on.learner.steps, on.learner.optim.lr, on.model.path) == (7, 1e-6, str(tmp_path / "large"))


def test_a_stage_of_another_task_has_nothing_of_the_recipes() -> None:
    stages = "recipe.stages={a: {job: sft, task: {name: mixture, weights: {chain: 1.0}}}, b: {job: sft}}"
    found = settings(compose([stages, "task.max_operations=4"]))
    assert (found["a"].task.name, found["b"].task.max_operations) == ("mixture", 4)  # type: ignore[attr-defined]


def test_a_stage_has_its_own_seed() -> None:
    found = settings(compose(["recipe.stages={a: {job: rl, seed: 3}, b: {job: rl}}", "run.seed=1"]))
    assert (found["a"].run.seed, found["b"].run.seed) == (3, 1)


def test_a_recipe_brings_options_along_and_any_other_replaces_them() -> None:
    """R1's algorithm has a learning rate and 16 updates of its own; the small model's stages say other ones."""
    zero = compose(["recipe=r1_zero"])
    assert (zero.algo.clip_high, zero.learner.minibatches, zero.learner.optim.lr) == (10.0, 16, 3e-6)
    assert (settings(zero)["r1_zero"].learner.minibatches, settings(zero)["r1_zero"].learner.optim.lr) == (2, 2e-4)
    other = compose(["recipe=r1_zero", "algo=dapo", "learner.minibatches=4"])
    assert (other.algo.name, other.algo.kl, other.learner.optim.lr) == ("grpo", "none", 2e-4)
    assert other.learner.minibatches == 4
    assert compose(["recipe=r1_zero", "algo.name=ppo"]).algo.name == "ppo"


def test_the_whole_of_r1_on_the_small_model() -> None:
    found = settings(compose(["recipe=r1"]))
    asked = [stage.start_from for stage in stages_of(compose(["recipe=r1"])) if stage.job == "eval"]
    assert asked == ["base", "r1_zero", "dev1", "dev2", "dev3", "r1"]
    rewards = {name: found[name].reward.weights["language"] for name in ("r1_zero", "dev2", "r1")}
    assert rewards == {"r1_zero": 0.0, "dev2": 1.0, "r1": 0.1}
    assert found["base"].task.settings["chain"]["tagged_share"] == 0.04  # type: ignore[attr-defined]
    assert found["r1"].sampling.temperature == 0.7
    assert set(found["ask_r1"].eval.sets) == {"chain", "words"}
    [kept, dev3] = [s for s in stages_of(compose(["recipe=r1"])) if s.name in ("kept", "dev3")]
    assert (kept.extra.mix, dev3.extra.epochs, dev3.start_from) == ((("general", 0.25),), 2, "base")


def test_the_same_stages_on_a_real_model(tmp_path: Path) -> None:
    problems = tmp_path / "gsm8k.jsonl"
    problems.write_text('{"question": "1+1?", "answer": "#### 2"}\n')
    real = [f"model.path={model_in(tmp_path / 'm')}", "task=gsm8k", f"task.path={problems}", "engine=sglang"]
    config = compose(["recipe=r1", *real])
    found, stages = settings(config), {stage.name: stage for stage in stages_of(config)}
    assert "base" not in stages
    assert "general" not in stages
    assert (stages["dev1"].start_from, stages["dev3"].start_from, stages["kept"].extra.mix) == ("", "", ())
    assert {one.task.name for one in found.values()} == {"jsonl"}
    assert {one.engine.name for one in found.values()} == {"sglang"}
    assert (found["dev2"].learner.minibatches, found["dev2"].learner.optim.lr) == (16, 3e-6)
    assert found["ask_base"].checkpoint == str(tmp_path / "m")
    with pytest.raises(ConfigError, match=r"^distill\.teacher=: with model\.path no recipe\.stages\.teacher is made"):
        compose(["recipe=distill_vs_rl", *real])
    arms = compose(["recipe=distill_vs_rl", *real, f"distill.teacher={model_in(tmp_path / 't')}"])
    assert settings(arms)["samples_1"].checkpoint == str(tmp_path / "t")
    assert settings(arms)["distil_1"].model.path == str(tmp_path / "m")


@pytest.mark.parametrize(
    ("stages", "says"),
    [
        ("{a: {job: rl, only: path}}", "recipe.stages.a.only=path: must be made: the stage is left out where"),
        ("{a: {job: rl, made: 3}}", "recipe.stages.a.made=3: must be a mapping of keys"),
        ("{a: {job: rl, epochs: 2}}", "recipe.stages.a.epochs=2: only job=sft goes through its data in epochs"),
        ("{a: {job: sft, epochs: 2}}", "recipe.stages.a.epochs=2: goes with data_from"),
        ("{a: {job: rl}, b: {job: sft, data_from: a, epochs: no}}", "recipe.stages.b.epochs=no: must be a whole"),
        ("{a: {job: rl, budget: 3}}", "recipe.stages.a.budget=3: must be {flops_of: STAGE, less: [STAGE, …]}"),
        ("{a: {job: rl, budget: {flops_of: b}}}", "recipe.stages.a.budget=b: must be an earlier stage, one of none"),
        ("{a: {job: sft, mix_from: {b: 0.5}}}", "recipe.stages.a.mix_from={b: 0.5}: only job=reject mixes data"),
        (
            "{a: {job: reject, mix_from: {b: 0.5}}}",
            "recipe.stages.a.mix_from=b: must be an earlier stage of job=sample",
        ),
        (
            "{a: {job: sample}, b: {job: reject, mix_from: {a: 1}}}",
            "recipe.stages.b.mix_from.a=1: must be a share of the result, in (0, 1)",
        ),
        ("{a: {job: rl, only: made, instead: x}}", None),
    ],
)
def test_a_mistake_is_one_line_before_the_first_stage_begins(stages: str, says: str | None) -> None:
    if says is None:  # it is read where the stage is left out
        compose([f"recipe.stages={stages}"])
        return
    with pytest.raises(ConfigError) as error:
        compose([f"recipe.stages={stages}"])
    assert str(error.value).startswith(says)


@pytest.mark.parametrize(
    ("compare", "says"),
    [
        ("{a: [x]}", "recipe.compare={a: [x]}: must be two arms of as many stages"),
        ("{a: [x], b: [x, x]}", "recipe.compare={a: [x], b: [x, x]}: must be two arms of as many stages"),
        ("{a: [x], b: [y]}", "recipe.compare.b=y: no stage of job=eval starts from it"),
    ],
)
def test_arms_are_stages_that_are_asked(compare: str, says: str) -> None:
    stages = "recipe.stages={x: {job: sft}, y: {job: sft}, ask: {job: eval, start_from: x}}"
    with pytest.raises(ConfigError) as error:
        compose([stages, f"recipe.compare={compare}"])
    assert str(error.value).startswith(says)


THREE = (
    "recipe.stages={rl: {job: rl}, samples: {job: sample, start_from: rl}, "
    "sft: {job: sft, data_from: samples, epochs: 2, sft: {batch_size: 4, warmup_steps: 0}, "
    "budget: {flops_of: rl, less: samples}}}"
)
Run = Callable[[Config, Path, list[int]], Outcome]


def launch_with(flops: dict[str, float], rows: int) -> Run:
    """A launch that leaves a checkpoint, data and a summary."""

    def launch(config: Config, run_dir: Path, interrupted: list[int]) -> Outcome:
        made = run_dir / "checkpoints" / "step_1"
        made.mkdir(parents=True)
        (made / "config.json").write_text("{}")
        (run_dir / "data.jsonl").write_text('{"prompt": "1", "answer": "1"}\n' * rows)
        name = run_dir.name.partition("_")[2]
        (run_dir / "summary.json").write_text(json.dumps({"status": "completed", "compute/flops": flops[name]}))
        return "completed", ""

    return launch


def test_epochs_and_budget_are_known_once_earlier_stages_are_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run_dir = compose([f"run.dir={tmp_path}", "run.name=whole", THREE]), tmp_path / "whole"
    run_dir.mkdir()
    assert run_recipe(config, run_dir, [], launch_with({"rl": 9.0, "samples": 2.5, "sft": 6.5}, rows=7)) == (
        "completed",
        "",
    )
    last = load_config(run_dir / "stages" / "3_sft" / "config.yaml")
    assert last.sft.steps == 4  # 2 epochs of 7 rows, 4 an update: 14 / 4, rounded up
    assert last.run.budget_flops == 6.5
    said = capsys.readouterr().out
    assert (
        "recipe none: 3 stages\n  · 1 rl (rl)\n  · 2 samples (sample, from rl)\n  · 3 sft (sft, data of samples)"
        in said
    )
    assert "stage 2/3: samples (job=sample) · 1 done in 0 s · then sft\n" in said


def test_a_launch_that_goes_on_says_what_is_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, run_dir = compose([f"run.dir={tmp_path}", "run.name=whole", THREE]), tmp_path / "whole"
    run_dir.mkdir()
    whole = launch_with({"rl": 9.0, "samples": 2.5, "sft": 6.5}, rows=7)

    def stop_at_the_second(config: Config, folder: Path, interrupted: list[int]) -> Outcome:
        return whole(config, folder, interrupted) if config.job == "rl" else ("interrupted", "stopped by SIGINT")

    assert run_recipe(config, run_dir, [], stop_at_the_second)[0] == "interrupted"
    capsys.readouterr()
    assert run_recipe(config, run_dir, [], whole) == ("completed", "")
    said = capsys.readouterr().out.splitlines()
    assert said[:3] == [
        "recipe none: 3 stages, 1 done before", "  ✓ 1 rl (rl, 0 s)", "  · 2 samples (sample, from rl)",
    ]  # fmt: skip


def test_a_teacher_that_costs_more_than_there_is_to_spend_is_said(tmp_path: Path) -> None:
    config, run_dir = compose([f"run.dir={tmp_path}", "run.name=whole", THREE]), tmp_path / "whole"
    run_dir.mkdir()
    status, reason = run_recipe(config, run_dir, [], launch_with({"rl": 2.0, "samples": 2.5, "sft": 0.0}, rows=7))
    assert status == "failed"
    assert reason.startswith(
        "stage sft: recipe.stages.sft.budget: samples alone spent 2.5 FLOPs, and rl 2; sample less"
    )


def test_a_mistake_in_a_recipes_own_file_would_show() -> None:
    """Every option of configs/recipe is composed whole."""
    names: list[Any] = [["recipe=r1"], ["recipe=r1_zero"], ["recipe=distill_vs_rl"], ["recipe=r1_small"]]
    assert all(stages_of(compose(name)) for name in names)
