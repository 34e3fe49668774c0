"""eval.sets: what is asked of each, with which reward, and what is refused before anything starts."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from offtrail.platform.config.compose import compose, to_yaml
from offtrail.platform.config.errors import ConfigError
from offtrail.platform.config.sets import sets_of
from offtrail.platform.launcher.command import require_inputs
from offtrail.tasks.base import TaskError
from offtrail.tasks.jsonl import JsonlConfig, JsonlTask
from offtrail.tasks.programs import ProgramsConfig, ProgramsTask


def write(path: Path, *rows: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def aime(tmp_path: Path) -> Path:
    return write(tmp_path / "aime24.jsonl", *({"problem": f"{i} and {i}?", "answer": str(2 * i)} for i in range(30)))


def test_a_run_asks_its_own_task_first_and_then_the_sets_with_their_own_numbers(aime: Path) -> None:
    line = ["eval.prompts=40", f"eval.sets={{aime: {{eval_path: {aime}, prompts: 30, samples: 4}}, chain: {{}}}}"]
    own, aime_set, chain = sets_of(compose(line))
    assert (own.area, own.prompts, own.samples, own.config.task.name) == ("eval", 40, 1, "chain")
    assert (aime_set.area, aime_set.prompts, aime_set.samples) == ("eval/aime", 30, 4)
    assert (chain.area, chain.prompts, chain.config.task) == ("eval/chain", 40, own.config.task)
    problems = aime_set.problems()
    assert sorted(int(problem.answer) for problem in problems) == [2 * i for i in range(30)]
    assert "<answer>" in problems[0].prompt  # the template of configs/task/aime.yaml


def test_a_sets_reward_is_the_runs_below_its_own_keys_or_an_option() -> None:
    line = ["reward.weights={accuracy: 1, format: 0.5}", "reward.workers=3",
            "eval.sets={boxed: {name: chain, reward: {answer: boxed, weights: {accuracy: 2}}}}"]  # fmt: skip
    own, boxed = sets_of(compose(line))
    assert own.config.reward.weights == {"accuracy": 1.0, "format": 0.5}
    reward = boxed.config.reward
    assert (reward.weights, reward.answer, reward.workers) == ({"accuracy": 2.0}, "boxed", 3)


def test_programs_take_the_option_that_runs_them(tmp_path: Path) -> None:
    row = {"text": "Double.", "code": "def f(x):\n return 2*x", "test_list": ["assert f(1) == 2"]}
    path = write(tmp_path / "mbpp.jsonl", row)
    line = [f"eval.sets={{mbpp: {{eval_path: {path}, prompts: 1, reward: code}}}}"]
    [_, mbpp] = sets_of(compose(line))
    assert (mbpp.config.reward.main, mbpp.config.reward.deadline_seconds) == ("code", 120)
    with pytest.raises(ConfigError, match=r"^eval\.sets\.mbpp\.reward\.weights=.*judged by running: reward=code"):
        compose([line[0].replace(", reward: code", "")])
    with pytest.raises(ConfigError, match=r"^eval\.sets\.mbpp\.reward\.deadline_seconds=120.*eval\.samples=64 times"):
        compose([line[0].replace("prompts", "samples: 64, prompts")])


def test_what_is_saved_needs_no_option_and_no_folder_to_stand_in(aime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(aime.parent)
    config = compose(["eval.sets={aime: {eval_path: aime24.jsonl, prompts: 3}}"])
    assert config.eval.sets["aime"]["name"] == "jsonl"
    assert config.eval.sets["aime"]["eval_path"] == str(aime)
    saved = aime.parent / "config.yaml"
    saved.write_text(to_yaml(config))
    os.chdir("/")
    assert compose([str(saved)]) == config


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ("{chain: {digits: 3}}", r"eval\.sets\.chain\.digits=3: unknown key$"),
        (
            "{chain: {generator: gcd}}",
            r"eval\.sets\.chain\.generator=gcd: not a key of eval\.sets\.chain\.name=chain, but of eval\.sets\.chain\.",
        ),
        (
            "{chain: {max_operation: 3}}",
            r"eval\.sets\.chain\.max_operation=3: unknown key; nearest: eval\.sets\.chain\.max_operations",
        ),
        ("{chain: {promts: 3}}", r"eval\.sets\.chain\.promts=3: unknown key; nearest: eval\.sets\.chain\.prompts$"),
        ("{chain: {zzzzzz: 3}}", r"eval\.sets\.chain\.zzzzzz=3: unknown key$"),
        ("{chain: {noise: 2}}", r"eval\.sets\.chain\.noise=2\.0: must be in \[0, 1\]"),
        (
            "{chain: {reward: {answr: tags}}}",
            r"eval\.sets\.chain\.reward\.answr=tags: unknown key; nearest: eval\.sets\.chain\.reward\.answer",
        ),
        ("{chain: {reward: {answer: tag}}}", r"eval\.sets\.chain\.reward\.answer=tag: must be one of tags"),
        (
            "{mixture: {weights: {chain: 1}, settings: {chain: {nois: 0.1}}}}",
            r"eval\.sets\.mixture\.settings\.chain\.nois=0\.1: unknown key; nearest: eval\.sets\.mixture\.settings\.",
        ),
        ("{nobody: {}}", r"eval\.sets\.nobody\.name=nobody: must be one of .*; or say .*\{name: jsonl"),
        ("{nobody: 3}", r"eval\.sets"),
        ("{chain: {prompts: 0}}", r"eval\.sets\.chain\.prompts=0: must be a whole number ≥ 1"),
        ("{chain: {samples: many}}", r"eval\.sets\.chain\.samples=many: must be a whole number"),
        ("{chain: {reward: cod}}", r"eval\.sets\.chain\.reward=cod: unknown option; options: code, rule"),
        ("{chain: {reward: {weights: {acuracy: 1}}}}", r"eval\.sets\.chain\.reward\.weights\.acuracy: unknown"),
        ("{'a/b': {name: chain}}", r"eval\.sets\.a/b: a set's name is letters"),
        ("{behaviour: {name: chain}}", r"eval\.sets\.behaviour: a set's name is"),
        ("{chain: {held_out_share: 0.5}}", r"eval\.sets\.chain: held_out_share=0\.5 is more than task\.held_out_share"),
        ("{chain: {}} eval.few_shot=3", r"eval\.few_shot=3: is for job=eval, not job=rl"),
        (f"{{chain: {{}}}} eval.few_shot_path={__file__}", r"eval\.few_shot_path=.*: needs eval\.few_shot=k"),
        ("{gsm8k: {}}", r"eval\.sets\.gsm8k\.path=: problems are needed: eval\.sets\.gsm8k\.path=FILE"),
        ("{gsm8k: {eval_path: none.jsonl}}", r"eval\.sets\.gsm8k\.eval_path=.*none\.jsonl: no such file"),
        (
            "{gsm8k: {eval_path: here/task.path/x.jsonl}}",
            r"eval\.sets\.gsm8k\.eval_path=/.*/here/task\.path/x\.jsonl: no such file",
        ),
    ],
)
def test_what_cannot_be_asked_names_the_set(keys: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"^{words}"):
        compose(f"eval.sets={keys}".replace("} eval", "}|eval").split("|"))


def test_a_set_that_no_main_component_scores_is_refused() -> None:
    only = "reward.only={accuracy: {tasks: [chain]}}"
    with pytest.raises(ConfigError, match=r"^eval\.sets\.addition: reward\.only\.accuracy\.tasks leaves task=addition"):
        compose([only, "eval.sets={addition: {}}"])
    compose([only, "eval.sets={addition: {reward: {weights: {accuracy: 1}, only: {}}}}"])


def test_too_few_questions_are_told_before_the_start_with_the_set(aime: Path) -> None:
    with pytest.raises(ConfigError, match=r"^eval\.sets\.aime: 31 held-out prompts were asked of .*which holds 30"):
        require_inputs(compose([f"eval.sets={{aime: {{eval_path: {aime}, prompts: 31}}}}"]))


def test_prompts_of_a_set_that_leave_no_room_are_told_before_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"question": "1" * n, "answer": "#### 1"} for n in (10, 20, 240)]
    path = write(tmp_path / "long.jsonl", *rows)
    line = f"eval.sets={{long: {{name: jsonl, eval_path: {path}, prompts: 3}}}}"
    require_inputs(compose([line, "eval.prompts=5"]))
    assert "eval.sets.long: 1 of 3 prompts leave no room for sampling.max_new_tokens=64" in capsys.readouterr().err
    path.write_text(json.dumps(rows[2]))
    with pytest.raises(ConfigError, match=r"^eval\.sets\.long: 1 of 1 prompts leave no room"):
        require_inputs(compose([line.replace("prompts: 3", "prompts: 1"), "eval.prompts=5"]))


def test_questions_that_are_trained_on_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = write(tmp_path / "train.jsonl", *({"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(40)))
    asked = write(tmp_path / "asked.jsonl", *({"question": f"{i}  + 1?", "answer": f"#### {i + 1}"} for i in (3, 77)))
    held = write(tmp_path / "held.jsonl", {"question": "9 + 9?", "answer": "#### 18"})
    line = ["task=jsonl", f"task.path={train}", f"task.eval_path={held}", "eval.prompts=1", "task.template=q {prompt}"]
    require_inputs(compose([*line, f"eval.sets={{other: {{name: jsonl, eval_path: {asked}, prompts: 2}}}}"]))
    told = capsys.readouterr().err
    assert "eval.sets.other: 1 of its 2 questions are training problems, such as '3 + 1?'" in told


@pytest.mark.parametrize("kind", ["jsonl", "programs"])
def test_a_test_only_set_needs_no_training_file_and_trains_nothing(kind: str, tmp_path: Path) -> None:
    row = {"question": "Double.", "answer": "#### 2", "tests": ["assert f(1) == 2"]}
    path = str(write(tmp_path / "test.jsonl", row))
    task = (
        JsonlTask(JsonlConfig(eval_path=path), 0)
        if kind == "jsonl"
        else ProgramsTask(ProgramsConfig(eval_path=path, prompt_field="question"), 0)
    )
    assert [problem.prompt for problem in task.held_out(1)] == ["Double."]
    with pytest.raises(TaskError, match=r"^task\.path is empty: task\.eval_path=.* alone is for evaluation only"):
        task.train(0)
    with pytest.raises(ConfigError, match=r"^task\.path=: problems are needed"):
        compose(["task=jsonl", f"task.eval_path={path}"])


def test_what_an_option_of_the_command_says_of_the_reward_stands_above_how_the_model_was_trained(
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    (run / "checkpoints" / "step_3").mkdir(parents=True)
    (run / "checkpoints" / "step_3" / "config.json").write_text("{}")
    (run / "config.yaml").write_text(
        to_yaml(compose(["reward.answer=boxed", "reward.workers=3", "model.max_length=99"]))
    )
    path = write(tmp_path / "set.jsonl", {"prompt": "?", "label": "safe"})
    line = ["job=eval", f"checkpoint={run}", "task=xstest", f"task.eval_path={path}"]
    config = compose(line)
    assert (config.reward.answer, config.reward.weights) == ("text", {"accuracy": 1.0})
    assert (config.reward.workers, config.model.max_length) == (3, 99)
    assert compose([*line, "reward.answer=tags"]).reward.answer == "tags"
    assert compose(line[:2]).reward.answer == "boxed"


def test_a_votes_weight_that_no_answer_will_have_is_told_before_the_start(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    line = ["job=eval", f"checkpoint={tmp_path}", "eval.vote_weight=formt"]
    with pytest.raises(
        ConfigError, match=r"^eval\.vote_weight=formt: must be one of logprob, accuracy, format; nearest: format"
    ):
        compose(line)
    compose([*line[:2], "eval.vote_weight=format"])


@pytest.mark.parametrize("job", ["eval", "sample"])
def test_a_run_that_began_with_a_model_of_somebodys_is_asked_without_that_model(job: str, tmp_path: Path) -> None:
    """Of `model` it is asked with what bounds the answers; where it began, and under which option, is the run's."""
    start = tmp_path / "start"
    start.mkdir()
    (start / "config.json").write_text("{}")
    run = tmp_path / "run"
    (run / "checkpoints" / "step_3").mkdir(parents=True)
    (run / "checkpoints" / "step_3" / "config.json").write_text("{}")
    (run / "config.yaml").write_text(to_yaml(compose([f"model.path={start}", "model.max_length=99"])))
    shutil.rmtree(start)
    for checkpoint in (run, run / "checkpoints" / "step_3"):
        config = compose([f"job={job}", f"checkpoint={checkpoint}"])
        assert (config.model.path, config.model.name, config.model.max_length) == ("", "tiny", 99)
