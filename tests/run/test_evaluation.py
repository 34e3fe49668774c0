"""job=eval as a user runs it: what it says is what the answers in its files say, and a cut does not change it."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import warm

from fakes.scores import made
from offtrail.platform.config.compose import compose
from offtrail.platform.config.schema import Config

from .conftest import ROOT, TRAINED

SETS = "eval.sets={chain: {}, sums: {name: addition}}"


@pytest.fixture
def trained(shared: Any) -> Path:
    """A small run of the default task, whose answers may be 40 tokens long, with two held-out sets beside its own."""
    return Path(shared(*TRAINED).run_dir)


def asked(folder: Path, name: str) -> dict[str, Any]:
    return dict(json.loads((folder / name / "eval.json").read_text()))


def test_a_checkpoint_is_asked_as_it_was_trained_and_a_cut_changes_nothing(
    trained: Path, environment: dict[str, str], command: Any, tmp_path: Path
) -> None:
    copy = shutil.copytree(trained, tmp_path / "copy", symlinks=True)
    keys = (f"checkpoint={copy}", "eval.prompts=150", "eval.samples=2", "sampling.growth_step=2", SETS)

    def line(name: str, *more: str) -> list[str]:
        whole: list[str] = command(name, "job=eval", *keys, *more)
        return [word for word in whole if word.partition("=")[0] not in ("sft.steps", "batch.groups", "learner.steps")]

    whole = warm.run(line("whole"), 280, env=environment, cwd=tmp_path)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    assert "avg@2" in whole.stdout
    told = asked(tmp_path, "whole")
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert (summary["status"], told["config"]["max_new_tokens"]) == ("completed", 80)
    assert (tmp_path / "whole" / "eval.png").stat().st_size > 10_000
    assert summary["compute/evaluator_decoded_tokens"] > 300 * 2  # each answer has a token at least
    assert summary["compute/flops"] == summary["compute/evaluator_flops"] > 0
    assert summary["tokens/generated"] == summary["compute/evaluator_decoded_tokens"]
    assert 0 < summary["devices"][0]["seconds"] < summary["launch_seconds"]
    assert summary["cost/device_hours"] == summary["cost/evaluator_device_hours"] > 0
    for name in ("chain", "sums"):
        files = sorted((tmp_path / "whole" / "answers").glob(f"{name}-*.parquet"))
        rows = [row for file in files for row in pq.read_table(file).to_pylist()]
        assert len({row["prompt"] for row in rows}) == 150
        scores = np.array([dict(row["rewards"])["accuracy"] for row in rows]).reshape(150, 2)
        assert told["results"][name]["avg@2,none"] == pytest.approx(scores.mean())
        assert told["results"][name]["pass@2,none"] == pytest.approx(scores.max(1).mean())
        assert summary[f"eval/{name}/avg@2"] == told["results"][name]["avg@2,none"]

    process = warm.Popen(line("cut"), env=environment, cwd=tmp_path)
    limit = time.monotonic() + 240
    while not list((tmp_path / "cut" / "answers").glob("*.parquet")):
        assert process.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    sealed = len(list((tmp_path / "cut" / "answers").glob("*.parquet")))
    assert sealed < 6, "nothing was left to do: the test proves little"
    again = warm.run(line("cut", "run.resume=true"), 280, env=environment, cwd=tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert asked(tmp_path, "cut") == told

    other = warm.run(line("cut", "run.resume=true", "eval.temperature=0.5"), 280, env=environment, cwd=tmp_path)
    assert (other.returncode, "keeps what decides its numbers" in other.stderr) == (2, True), other.stderr
    shutil.copyfile(copy / "start" / "model.safetensors", copy / "checkpoints" / "step_2" / "model.safetensors")
    other = warm.run(line("cut", "run.resume=true"), 280, env=environment, cwd=tmp_path)
    assert other.returncode == 1
    assert other.stderr.startswith("offtrail: error: checkpoint: its files hold something else than when")
    assert asked(tmp_path, "cut") == told


def test_models_score_and_choose_among_the_answers_of_an_evaluation(
    trained: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    models = f"scorer.models={{prm: {{path: {made(tmp_path / 'prm', 'steps')}}}}}"
    keys = ["job=eval", f"checkpoint={trained}", "eval.prompts=70", "eval.samples=4", models]
    line = [sys.executable, str(ROOT / "launch.py"), "run.name=scored", f"run.dir={tmp_path}", *keys]
    done = warm.run(line, 280, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [row for file in sorted((tmp_path / "scored" / "answers").glob("*.parquet"))
            for row in pq.read_table(file).to_pylist()]  # fmt: skip
    assert len(rows) == 70 * 4
    column = {name: np.array([dict(row["rewards"])[name] for row in rows], np.float64) for name in ("prm", "accuracy")}
    scores, right = (column[name].reshape(70, 4) for name in ("prm", "accuracy"))
    for row, score in zip(rows, scores.ravel(), strict=True):
        steps = row["step/prm"] or []
        assert len(steps) == len(row["step_ends"])
        assert score == pytest.approx(min(steps), abs=1e-6) if steps else np.isnan(score)
        assert not steps or dict(row["scored_by"])["prm"] == {"model": "prm", "version": 0}
    told = asked(tmp_path, "scored")
    marks = np.where(np.isnan(scores), -1.0, scores)  # those of steps are probabilities
    best = (right * (marks == marks.max(1, keepdims=True))).sum(1) / (marks == marks.max(1, keepdims=True)).sum(1)
    best[marks.max(1) < 0] = 0
    assert told["results"]["chain"]["best_of_n/prm/min@4,none"] == pytest.approx(best.mean())
    assert told["results"]["chain"]["prm,none"] == pytest.approx(np.nanmean(scores))
    assert told["scored_by"]["chain"]["prm"]["unscored"] == np.isnan(scores).sum()
    difference = told["reranking"]["chain"]["best_of_n/prm/min@4"]["less_avg@4"]["mean"]
    assert difference == pytest.approx(
        told["results"]["chain"]["best_of_n/prm/min@4,none"] - told["results"]["chain"]["avg@4,none"]
    )
    summary = json.loads((tmp_path / "scored" / "summary.json").read_text())
    assert summary["compute/evaluator_scored_tokens"] > 0


def test_sets_are_scored_while_training_beside_the_tasks_own_prompts(trained: Path) -> None:
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((trained / "summary.json").read_text())
    scored = [row for row in rows if "eval/accuracy" in row]
    assert [row["eval/version"] for row in scored] == [0, 2]
    for row in scored:
        assert (row["eval/prompts"], row["eval/sums/prompts"], row["eval/long/prompts"]) == (16, 6, 16)
        assert 0 <= row["eval/long/accuracy"] <= 1
        assert row["eval/sums/accuracy"] * 12 == pytest.approx(round(row["eval/sums/accuracy"] * 12))
    trained_steps = [row for row in rows if "reward/format" in row]
    assert [row["behaviour/format_share"] for row in trained_steps] == [row["reward/format"] for row in trained_steps]
    for row in scored:
        assert row["eval/behaviour/format_share"] == pytest.approx(row["eval/format"])
        assert row["eval/sums/behaviour/format_share"] == pytest.approx(row["eval/sums/format"])
    for label in ("sums", "long"):
        ends = [summary[f"eval/{label}/accuracy_{end}"] for end in ("first", "last")]
        assert ends == [row[f"eval/{label}/accuracy"] for row in scored]


@pytest.mark.prove
@pytest.mark.timeout(900)
def test_a_server_says_of_a_checkpoint_what_the_embedded_engine_says(
    trained: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    """Greedy, so that neither draws: the same answers, token by token, and so the same numbers."""
    answers, told = [], []
    for engine in ("local", "sglang"):
        command = [sys.executable, str(ROOT / "launch.py"), "job=eval", f"run.name={engine}", f"run.dir={tmp_path}"]
        keys = [f"checkpoint={trained}", f"engine={engine}", "eval.temperature=0", "eval.prompts=60", SETS]
        done = warm.run(command + keys, 400, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        told.append(asked(tmp_path, engine))
        files = sorted((tmp_path / engine / "answers").glob("*.parquet"))
        rows = [row for file in files for row in pq.read_table(file).to_pylist()]
        answers.append([(row["prompt"], row["tokens"]) for row in rows])
    assert len(answers[0]) == 2 * 60
    assert answers[1] == answers[0]
    assert told[1]["results"] == told[0]["results"]
    assert told[0]["results"]["chain"]["avg@1,none"] > 0


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ((), "checkpoint=: job=eval needs a run directory, a checkpoint or a Hugging Face directory"),
        (("eval.sets={chain: {digits: 3}}",), "eval.sets.chain.digits=3: unknown key"),
        (("eval.sets={nobody: {}}",), "eval.sets.nobody"),
    ],
)
def test_what_cannot_be_asked_is_one_line(
    keys: tuple[str, ...], words: str, trained: Path, environment: dict[str, str], command: Any, tmp_path: Path
) -> None:
    given = [f"checkpoint={trained}", *keys] if keys else []
    done = warm.run([*command("wrong", "job=eval", *given)], 120, env=environment, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("offtrail: error: ")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_what_the_command_gives_stands_key_by_key_above_how_the_model_was_trained(trained: Path) -> None:
    def asked_with(*keys: str) -> Config:
        return compose(["job=eval", f"checkpoint={trained}", *keys])

    assert asked_with().sampling.max_new_tokens == 40
    assert asked_with("sampling.temperature=0.7").sampling.max_new_tokens == 40
    assert asked_with("sampling.max_new_tokens=30").sampling.max_new_tokens == 30
    assert asked_with("task=addition").task.name == "addition"
    step = trained / "checkpoints" / "step_2"
    assert compose(["job=eval", f"checkpoint={step}"]).sampling.max_new_tokens == 40


def test_examples_before_the_question_are_compared_with_none(
    trained: Path, environment: dict[str, str], command: Any, tmp_path: Path
) -> None:
    keys = (f"checkpoint={trained}", "eval.prompts=12", "eval.samples=2", "eval.few_shot=2")
    words = [
        word
        for word in command("few", "job=eval", *keys)
        if word.partition("=")[0] not in ("sft.steps", "batch.groups", "learner.steps")
    ]
    done = warm.run(words, 280, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "avg@2, less plain" in done.stdout
    told = asked(tmp_path, "few")
    assert told["n-shot"] == {"chain": 0, "chain.2shot": 2}
    results, comparison = told["results"], told["comparisons"]["chain.2shot"]
    assert (comparison["questions"], comparison["left_out"]) == (12, 0)
    assert comparison["differences"]["avg@2"]["mean"] == pytest.approx(
        results["chain.2shot"]["avg@2,none"] - results["chain"]["avg@2,none"]
    )
    [plain, shown] = [pq.read_table(tmp_path / "few" / "answers" / f"{name}-00000.parquet") for name in results]
    assert plain["prompt"].to_pylist() == shown["prompt"].to_pylist()  # what is verified stays the plain problem
    lengths = [np.array([len(tokens) for tokens in table["prompt_tokens"].to_pylist()]) for table in (plain, shown)]
    assert len({*(lengths[1] - lengths[0]).tolist()}) == 1  # the same two examples before every question
    assert lengths[1][0] - lengths[0][0] > 40
    assert (tmp_path / "few" / "few_shot.png").stat().st_size > 5_000
