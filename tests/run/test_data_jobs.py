"""job=sample, reject and distill as a user runs them: what is kept is right, and a kill changes nothing."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import warm

from fake_sglang import FakeServer
from offtrail.tasks.chain import ChainConfig
from offtrail.tasks.registry import make_task

from .conftest import PATIENCE_S, TRAINED


@pytest.fixture
def trained(shared: Any) -> Path:
    """A small run of the default task."""
    return Path(shared(*TRAINED).run_dir)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


SHARED = ("sft.steps", "batch.groups", "learner.steps")


def test_a_sampling_that_is_killed_goes_on_and_makes_the_same_data(
    trained: Path, environment: dict[str, str], command: Any, tmp_path: Path
) -> None:
    shots = ("sample.prompting=few_shot", "sample.shots=2")
    keys = ("job=sample", f"checkpoint={trained}", "sample.prompts=150", "sample.samples=3", *shots)

    def line(name: str, *more: str) -> list[str]:
        whole: list[str] = command(name, *keys, *more)
        return [word for word in whole if word.partition("=")[0] not in SHARED]

    whole = warm.run(line("whole"), 280, env=environment, cwd=tmp_path)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    made = lines(tmp_path / "whole" / "data.jsonl")
    files = sorted((tmp_path / "whole" / "answers").glob("*.parquet"))
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    assert len(rows) == 450
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert summary["tokens/generated"] == sum(len(row["tokens"]) for row in rows)
    assert summary["compute/flops"] == summary["compute/generator_flops"] > 0
    about = json.loads((tmp_path / "whole" / "data.json").read_text())
    assert about["counts"]["answers"] == 450
    assert about["counts"]["right"] == sum(dict(row["rewards"])["accuracy"] for row in rows)
    assert (about["data"]["lines"], about["model"]["run"]) == (len(made), str(trained))
    plain = {row["prompt"] for row in rows}
    assert {one["prompt"] for one in made} <= plain  # what is learnt is the plain prompt …
    assert min(len(row["prompt_tokens"]) - len(row["prompt"]) for row in rows) > 40  # … and what was asked is longer

    process = warm.Popen(line("cut"), env=environment, cwd=tmp_path)
    limit = time.monotonic() + PATIENCE_S
    while not list((tmp_path / "cut" / "answers").glob("*.parquet")):
        assert process.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut" / "data.jsonl").exists()
    again = warm.run(line("cut", "run.resume=true"), 280, env=environment, cwd=tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert (tmp_path / "cut" / "data.jsonl").read_bytes() == (tmp_path / "whole" / "data.jsonl").read_bytes()

    other = warm.run(line("cut", "run.resume=true", "sample.temperature=0.5"), 280, env=environment, cwd=tmp_path)
    assert (other.returncode, "keeps what decides its numbers" in other.stderr) == (2, True), other.stderr


@pytest.mark.prove
def test_a_labelling_that_is_killed_goes_on_and_makes_the_same_data(
    trained: Path, environment: dict[str, str], command: Any, tmp_path: Path
) -> None:
    """A search, whose later questions follow from the answers to the first ones."""
    task = make_task(ChainConfig(worked_share=1.0, noise=0.3), 0)
    problems = [task.train(i) for i in range(120)]
    rows = [
        {
            "prompt": one.prompt,
            "answer": task.trace(one, random.Random(one.index)),
            "gold": one.answer,
            "index": one.index,
        }
        for one in problems
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cut = 'label.cut={by: separator, separator: ";", within: thought}'
    given = (f"label.paths=[{tmp_path / 'rows.jsonl'}]", cut, "label.rollouts=3", "label.noise=0.1")

    def line(name: str, *more: str) -> list[str]:
        asked: list[str] = command(name, "job=label", f"checkpoint={trained}", "label.method=search", *given, *more)
        return [word for word in asked if word.partition("=")[0] not in SHARED]

    whole = warm.run(line("whole"), 280, env=environment, cwd=tmp_path)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    made = lines(tmp_path / "whole" / "data.jsonl")
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert len(made) == summary["label/answers"] == 120
    assert summary["label/phases"] > 1
    answers = (tmp_path / "whole" / "answers").glob("*.parquet")
    rollouts = [row for file in answers for row in pq.read_table(file).to_pylist()]
    assert len(rollouts) == summary["label/rollouts"] > 0
    assert summary["label/tokens"] == summary["tokens/generated"] == sum(len(row["tokens"]) for row in rollouts)
    assert summary["label/flipped"] == sum(len(one.get("turned", [])) for one in made) > 0
    about = json.loads((tmp_path / "whole" / "data.json").read_text())
    assert (about["settings"]["label"]["noise"], about["model"]["run"]) == (0.1, str(trained))

    process = warm.Popen(line("cut"), env=environment, cwd=tmp_path)
    limit = time.monotonic() + 240
    while not list((tmp_path / "cut" / "answers").glob("*.parquet")):
        assert process.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut" / "data.jsonl").exists()
    again = warm.run(line("cut", "run.resume=true"), 280, env=environment, cwd=tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert (tmp_path / "cut" / "data.jsonl").read_bytes() == (tmp_path / "whole" / "data.jsonl").read_bytes()

    learnt = [f"prm.path={tmp_path / 'whole' / 'data.jsonl'}", cut.replace("label.", "prm."), "prm.held_out_share=0"]
    prm = command("prm", "job=prm", *learnt, "prm.steps=2", "prm.warmup_steps=1", "prm.batch_size=4")
    prm = [word for word in prm if word.partition("=")[0] not in SHARED and not word.startswith("learner.")]
    done = warm.run(prm, 280, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.prove
def test_a_server_that_runs_already_is_asked_as_it_is(
    trained: Path, environment: dict[str, str], command: Any, tmp_path: Path
) -> None:
    """It has no keys, knows no version, and its weights are where they are: here is its tokenizer alone."""
    model, here = (trained / "start").resolve(), tmp_path / "tokenizer"
    here.mkdir()
    for file in model.iterdir():
        if file.suffix == ".json":
            shutil.copy(file, here)
    with FakeServer("--model-path", str(model), "--incremental-streaming-output") as server:
        given = ("job=sample", "engine=sglang", f"engine.urls=[{server.url}]", "sample.prompts=5", "sample.samples=2")
        for name, more, wanted in (("alone", (), model), ("named", (f"checkpoint={here}",), here)):
            done = warm.run(command(name, *given, *more), 280, env=environment, cwd=tmp_path)
            assert done.returncode == 0, done.stdout + done.stderr
            about = json.loads((tmp_path / name / "data.json").read_text())
            assert (about["counts"]["answers"], about["model"]["folder"]) == (10, str(wanted))
            assert about["model"]["servers"] == {server.url: str(model)}
        assert not server.died
    assert lines(tmp_path / "alone" / "data.jsonl")[0]["version"] == 0


STAGES = (
    "recipe.stages={asked: {job: sample, sample: {prompts: 40}}, kept: {job: reject, data_from: asked}, "
    "student: {job: sft, data_from: kept}, judged: {job: eval, start_from: student}}"
)


def test_a_model_learns_from_the_right_ones_of_its_own_samples(trained: Path, launch: Any) -> None:
    keys = (f"model.path={trained / 'start'}", "reject.most=1", "reject.choose=shortest", "sft.steps=3")
    done = launch("whole", STAGES, *keys, "sft.warmup_steps=1", "sft.batch_size=4")
    assert done.code == 0, done.output
    stages = done.run_dir / "stages"
    made, kept = lines(stages / "1_asked" / "data.jsonl"), lines(stages / "2_kept" / "data.jsonl")
    shortest: dict[str, int] = {}
    for one in made:
        if one["rewards"]["accuracy"] == 1 and one["finish"] == "stop":
            shortest[one["prompt"]] = min(len(one["answer"]), shortest.get(one["prompt"], 1 << 30))
    assert {one["prompt"]: len(one["answer"]) for one in kept} == shortest
    assert 0 < len(kept) < len(made)
    about = json.loads((stages / "2_kept" / "data.json").read_text())
    rejected = lines(stages / "2_kept" / "rejected.jsonl")
    assert {one["reason"] for one in rejected} == set(about["counts"]["rejected"])
    assert sum(about["counts"]["rejected"].values()) == len(made) - len(kept)
    assert done.summary["compute/generator_decoded_tokens"] > 160  # an answer has a token at least
    stage = {folder.name: json.loads((folder / "summary.json").read_text()) for folder in stages.iterdir()}
    for name in ("compute/flops", "tokens/generated"):
        counted = {folder: told[name] for folder, told in stage.items() if name in told}
        assert {"1_asked", "4_judged"} <= counted.keys()
        assert done.summary[name] == pytest.approx(sum(counted.values()))
    told = done.summary["stages"]
    assert (told["kept"]["data/kept"], told["student"]["steps"]) == (len(kept), 3)
    assert (stages / "4_judged" / "start").resolve() == (stages / "3_student" / "checkpoints" / "step_3").resolve()


def test_a_distillation_from_a_file_is_the_same_two_stages(trained: Path, launch: Any, tmp_path: Path) -> None:
    """Rows without a reward are judged by their gold answer."""
    row = {"prompt": "1;+1;%10=?", "answer": "<think>1+1=2</think><answer>2</answer>"}
    given = (
        {"reward": 1.1},
        {"reward": 0.1},
        {"gold": "2", "prompt": "0;+2;%10=?"},
        {"gold": 3},
        {"gold": 2, "answer": "2"},
    )
    samples = tmp_path / "samples.jsonl"
    samples.write_text("".join(json.dumps(row | more) + "\n" for more in given))
    keys = ("job=distill", f"distill.teacher={samples}", f"model.path={trained / 'start'}", "reject.unscored=verify")
    done = launch("whole", *keys, "sft.steps=2", "sft.warmup_steps=1", "sft.batch_size=2")
    assert done.code == 0, done.output
    assert list(done.summary["stages"]) == ["reject", "sft"]
    assert done.summary["stages"]["reject"]["data/rejected"] == {"wrong": 3}
    kept = lines(done.run_dir / "stages" / "1_reject" / "data.jsonl")
    assert [one["from"].rpartition(", ")[2] for one in kept] == ["line 1", "line 3"]
    assert kept[1]["rewards"] == {"accuracy": 1.0, "format": 1.0}


def test_a_signal_is_heard_within_a_part(
    trained: Path, environment: dict[str, str], command: Any, tmp_path: Path
) -> None:
    keys = ("job=sample", f"checkpoint={trained}", "sample.prompts=64", "sample.samples=512")
    process = warm.Popen(command("stopped", *keys), env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL)
    limit = time.monotonic() + PATIENCE_S
    while not (tmp_path / "stopped" / "begun_with.json").exists():
        assert process.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE_S) == 130
    told = json.loads((tmp_path / "stopped" / "summary.json").read_text())
    assert told["reason"] == f"stopped by signal {signal.SIGINT}; run.resume=true goes on"
    assert not list((tmp_path / "stopped" / "answers").glob("*.parquet"))
    assert told["devices"][0]["seconds"] > 0  # what was held counts, though nothing is whole


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (("job=sample",), "checkpoint=: job=sample needs a run directory"),
        (("job=sample", "checkpoint=TRAINED", "sample.prompts=0"), "sample.prompts=0: task=chain has no last problem"),
        (("job=sample", "checkpoint=TRAINED", "sample.instruction=think"), "sample.instruction='think': must contain"),
        (
            ("job=reject", "reject.paths=[ROWS]", "reject.unscored=verify"),
            "line 2: has neither a reward nor a gold answer in field 'gold'",
        ),
        (("job=label", "checkpoint=TRAINED"), "label.paths=: job=label needs files of answers"),
        (("job=label", "checkpoint=TRAINED", "label.paths=[/no/such]"), "label.paths=/no/such: no such file or folder"),
        (("job=label", "label.paths=[ROWS]"), "checkpoint=: job=label needs a run directory"),
        (("job=label", "checkpoint=TRAINED", "label.paths=[ROWS]"), "line 1: has no gold answer in field 'gold'"),
        (("job=label", "label.paths=[ROWS]", "label.method=exact", "label.gold_field=answer"), "none of 2 answers has"),
        (("job=reject",), "reject.paths=: job=reject needs files of answers"),
        (("job=reject", "reject.paths=[ROWS]"), "line 2: has no reward ('accuracy' in `rewards`, or `reward`)"),
        (("job=reject", "reject.paths=[ROWS]", "reject.language=xx"), "reject.language_settings: xx is not known"),
        (
            ("job=reject", "reject.paths=[ROWS]", "reject.mix={more: {path: ROWS, share: 2}}"),
            "reject.mix.more.share=2: must be a share of the result",
        ),
        (("job=distill", "distill.teacher=/no/such"), "job=distill, stage sample: checkpoint=/no/such: no such folder"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    keys: tuple[str, ...], words: str, trained: Path, environment: dict[str, str], command: Any, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "1", "answer": "2", "reward": 1}\n{"prompt": "1", "answer": "2"}\n')
    given = [key.replace("TRAINED", str(trained)).replace("ROWS", str(rows)) for key in keys]
    done = warm.run([*command("wrong", *given)], 120, env=environment, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, ""), done.stdout
    assert done.stderr.startswith("offtrail: error: ")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
