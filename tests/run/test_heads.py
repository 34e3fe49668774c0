"""job=reward_model and job=prm as runs like any other: they learn what was planted, and what is measured
is in metrics.jsonl, TensorBoard and summary.json, also where a budget ends the run; ranks and a kill -9 change nothing.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import sqlite3
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import warm
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from offtrail.platform.config.checkpoints import model_folder
from offtrail.platform.model.reader import Reader

from .conftest import PATIENCE_S

SMALL = (
    "model.hidden_size=32", "model.layers=2", "model.mlp_size=48", "model.max_length=64",
    "learner.tokens_per_microbatch=1024", "learner.checkpoint_every=20",
)  # fmt: skip


def pairs(folder: Path, n: int = 400) -> Path:
    """The planted preference: of two answers the one with more of the letter a is better, whatever was thought."""
    rng = random.Random(1)
    rows = []
    for i in range(n):
        few, many = sorted(rng.sample(range(8), 2))
        better, worse = ("".join(rng.sample("a" * k + "bcdefghi"[: 8 - k], 8)) for k in (many, few))
        thoughts = ("<think>aaaa</think>", "<think>b</think>")
        flip = rng.random() < 0.5
        rows.append(
            {"prompt": f"{i}=?", "chosen": thoughts[flip] + better, "rejected": thoughts[not flip] + worse}
        )  # fmt: skip
    return write(folder / "pairs.jsonl", rows)


def steps(folder: Path, n: int = 400) -> Path:
    """The planted errors: a step that names another letter than the one before it."""
    rng = random.Random(2)
    rows = []
    for i in range(n):
        letters = [rng.choice("ab")]
        for _ in range(3):
            letters.append(letters[-1] if rng.random() < 0.6 else rng.choice("ab"))
        labels = [True, *(a == b for a, b in itertools.pairwise(letters))]
        rows.append({"prompt": f"{i}=?", "steps": [f"so {letter}." for letter in letters], "labels": labels})
    return write(folder / "steps.jsonl", rows)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def options(job: str, path: Path, updates: int, *more: str) -> list[str]:
    settings = [f"path={path}", f"steps={updates}", "warmup_steps=5", "batch_size=32", "lr=3e-3", "held_out_share=0.2"]
    return [f"job={job}", *SMALL, *(f"{job}.{setting}" for setting in settings), *more]


def checksums(run_dir: Path) -> dict[int, str]:
    """Of the versions that have a checkpoint."""
    with sqlite3.connect(run_dir / "ledger.sqlite") as db:
        return dict(db.execute("SELECT version, checksum FROM versions WHERE checksum <> ''").fetchall())


def test_a_reward_model_learns_a_planted_preference(launch: Any, tmp_path: Path) -> None:
    run = launch("rm", *options("reward_model", pairs(tmp_path), 60, "tracking.tensorboard=true"))
    assert run.code == 0, run.output
    summary, rows = run.summary, run.rows
    assert (summary["status"], summary["steps"]) == ("completed", 60)
    assert summary["eval/accuracy_first"] == 0.5  # a head of zeros orders nothing
    assert summary["eval/calibration_error_first"] == 0.0
    assert summary["eval/accuracy_last"] > 0.85
    assert summary["loss/preference_first"] > 2 * summary["loss/preference_last"]
    assert summary["compute/learner_held_out_flops"] > 0
    assert [row["step"] for row in rows if "eval/accuracy" in row] == [0, 20, 40, 60]
    events = EventAccumulator(str(run.run_dir / "tb"))
    events.Reload()
    assert [event.step for event in events.Scalars("eval/calibration_error")] == [0, 20, 40, 60]
    assert "held-out accuracy" in run.output
    folder = model_folder(str(run.run_dir))
    assert folder is not None
    assert Reader.open(folder, longest=64).spec.of == "answer"


def test_a_process_reward_model_finds_planted_errors_and_measures_what_a_budget_leaves(
    launch: Any, tmp_path: Path
) -> None:
    """After some 220 updates of 768 tokens, wherever the heartbeats have it end; before the 150th it finds nothing."""
    run = launch("prm", *options("prm", steps(tmp_path), 2000, "run.budget_tokens=170000"), "tracking.figures=true")
    assert run.code == 0, run.output
    summary = run.summary
    assert summary["status"] == "completed"
    assert "run.budget_tokens" in summary["reason"]
    assert 200 < summary["steps"] < 2000
    assert summary["eval/auc_last"] > 0.9
    assert summary["eval/first_error_f1_last"] > 0.7
    assert {f"eval/auc_depth_{depth}_last" for depth in (1, 2, 3)} <= summary.keys()
    last = run.rows[-1]
    assert last["step"] == summary["steps"]
    assert last["eval/auc"] == summary["eval/auc_last"]
    assert (run.run_dir / "learning.png").stat().st_size > 1000


@pytest.mark.prove
def test_an_implicit_process_reward_finds_errors_from_outcomes_alone(launch: Any, tmp_path: Path) -> None:
    more = ["prm.objective=implicit", "prm.beta=0.5"]
    run = launch("implicit", *options("prm", steps(tmp_path, 1500), 400, *more))
    assert run.code == 0, run.output
    assert run.summary["eval/outcome_auc_last"] > 0.85
    assert run.summary["eval/auc_last"] > 0.7


@pytest.mark.prove
@pytest.mark.parametrize("job", ["reward_model", "prm"])
def test_two_ranks_train_what_one_does_and_a_kill_changes_no_bit(
    job: str, launch: Any, command: Any, environment: dict[str, str], tmp_path: Path
) -> None:
    given = options(job, {"reward_model": pairs, "prm": steps}[job](tmp_path), 60)
    whole = launch("whole", *given)
    assert whole.code == 0, whole.output
    two = launch("two", *given, "learner.ranks=2")
    assert two.code == 0, two.output
    one, other = (load_file(run.run_dir / "checkpoints" / "step_60" / "model.safetensors") for run in (whole, two))
    assert one.keys() == other.keys()
    assert max(float((one[name] - other[name]).abs().max()) for name in one) < 1e-3
    measured = {name: value for name, value in whole.summary.items() if name.startswith("eval/")}
    assert {name: two.summary[name] for name in measured} == pytest.approx(measured, abs=0.02)

    run_dir = tmp_path / "killed"
    process = warm.Popen(
        command("killed", *given), env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    limit = time.monotonic() + PATIENCE_S
    while not (run_dir / "checkpoints" / "step_20").is_dir():
        assert time.monotonic() < limit
        assert process.poll() is None
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    resumed = launch("killed", *given, "run.resume=true")
    assert resumed.code == 0, resumed.output
    assert checksums(run_dir) == checksums(whole.run_dir)
    assert [(r["step"], r.get("eval/accuracy")) for r in resumed.rows] == [
        (r["step"], r.get("eval/accuracy")) for r in whole.rows
    ]


def test_what_is_wrong_with_the_labels_is_said_before_anything_starts(launch: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "bad.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "b"}])
    run = launch("bad", *options("reward_model", path, 60))
    assert run.code == 2
    assert run.output.count("\n") == 1
    assert "bad.jsonl, line 1: 'chosen' and 'rejected' are equal" in run.output
    path = write(tmp_path / "null.jsonl", [{"prompt": "a", "steps": ["b", "c"], "labels": [None, None]}])
    run = launch("null", *options("prm", path, 60))
    assert run.code == 2
    assert run.output.count("\n") == 1
    assert "null.jsonl: no step of its answers has a label" in run.output
