"""job=sft as a run like any other: its rows, its FLOPs and its checkpoints, on two ranks and after a kill -9."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import warm
from safetensors.torch import load_file

from .conftest import PATIENCE_S

SMALL = (
    "job=sft", "sft.steps=24", "sft.warmup_steps=4", "sft.lr=1e-3", "sft.batch_size=8", "learner.checkpoint_every=8",
    "model.hidden_size=32", "model.layers=2", "model.mlp_size=48", "tracking.tensorboard=false",
)  # fmt: skip


def checksums(run_dir: Path) -> dict[int, str]:
    """Of the versions that have a checkpoint."""
    query = "SELECT version, checksum FROM versions WHERE checksum <> ''"
    with sqlite3.connect(run_dir / "ledger.sqlite") as db:
        return dict(db.execute(query).fetchall())


def charged(run_dir: Path, name: str) -> float:
    """Of the compute ledger: the learner's ranks and lives together."""
    with sqlite3.connect(run_dir / "ledger.sqlite") as db:
        return float(
            db.execute("SELECT SUM(amount) FROM charges WHERE role = 'learner' AND name = ?", [name]).fetchone()[0]
        )


@pytest.fixture
def whole(shared: Any) -> Any:
    """One rank to the end."""
    return shared("sft", *SMALL, "tracking.figures=true")


def test_a_run_has_a_row_for_every_update_its_flops_and_a_checkpoint(whole: Any) -> None:
    summary, rows = whole.summary, whole.rows
    assert (summary["status"], summary["steps"], summary["seed"]) == ("completed", 24, 0)
    assert [row["step"] for row in rows] == list(range(1, 25))
    assert summary["loss/sft_first"] == rows[0]["loss/sft"] > summary["loss/sft_last"] == rows[-1]["loss/sft"]
    assert rows[-1]["policy/lr"] == pytest.approx(1e-4)
    assert not [name for name in rows[-1] if name.startswith(("reward/", "staleness/", "queue/"))]
    assert summary["tokens/trained"] > 0
    # 6 operations a weight and input token, of which a sample has as many as output tokens and its prompt, less one
    weights = sum(
        t.numel() for t in load_file(whole.run_dir / "checkpoints" / "step_24" / "model.safetensors").values()
    )
    assert charged(whole.run_dir, "train_flops") > 6.0 * weights * charged(whole.run_dir, "trained_tokens")
    assert charged(whole.run_dir, "trained_tokens") == summary["tokens/trained"]
    assert sorted(checksums(whole.run_dir)) == [0, 8, 16, 24]
    assert sorted(path.name for path in (whole.run_dir / "checkpoints").iterdir()) == ["step_16", "step_24"]
    assert (whole.run_dir / "learning.png").stat().st_size > 1000


@pytest.mark.prove
def test_two_ranks_with_activation_checkpointing_train_what_one_does(whole: Any, launch: Any) -> None:
    two = launch("two", *SMALL, "learner.ranks=2", "learner.activation_checkpointing=true")
    assert two.code == 0, two.output
    one, other = (load_file(run.run_dir / "checkpoints" / "step_24" / "model.safetensors") for run in (whole, two))
    assert one.keys() == other.keys()
    assert max(float((one[name] - other[name]).abs().max()) for name in one) < 5e-6
    assert two.summary["tokens/trained"] == whole.summary["tokens/trained"]
    assert (two.run_dir / "logs" / "learner-1.log").is_file()


def test_a_killed_run_goes_on_with_the_same_bits(
    whole: Any, launch: Any, command: Any, environment: dict[str, str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "killed"
    process = warm.Popen(
        command("killed", *SMALL), env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    limit = time.monotonic() + PATIENCE_S
    while not (run_dir / "checkpoints" / "step_8").is_dir():
        assert time.monotonic() < limit
        assert process.poll() is None
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    steps = json.loads((run_dir / "summary.json").read_text())["steps"]
    resumed = launch("killed", *SMALL, "run.resume=true")
    assert resumed.code == 0, resumed.output
    assert steps < 24
    assert checksums(run_dir) == checksums(whole.run_dir)
    assert [row["step"] for row in resumed.rows] == list(range(1, 25))
    assert [row["loss/sft"] for row in resumed.rows] == [row["loss/sft"] for row in whole.rows]
    assert resumed.summary["lineage"] == 0


@pytest.mark.prove
def test_a_file_of_prompts_and_answers_is_learned_by_heart(launch: Any, tmp_path: Path) -> None:
    lines = [{"prompt": f"{i}+{i}=", "answer": f"{2 * i}"} for i in range(1, 9)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    longer = [option for option in SMALL if not option.startswith(("sft.steps", "sft.lr"))] + [
        "sft.steps=60",
        "sft.lr=1e-2",
    ]
    run = launch("file", *longer, f"sft.path={tmp_path / 'pairs.jsonl'}")
    assert run.code == 0, run.output
    assert run.summary["loss/sft_first"] > 3
    assert run.summary["loss/sft_last"] < 0.5
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "1+1="}')
    broken = launch("broken", *SMALL, f"sft.path={tmp_path / 'pairs.jsonl'}")
    assert broken.code == 2
    assert "pairs.jsonl, line 1: field 'answer' is missing" in broken.output
