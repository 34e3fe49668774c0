"""The README's first command, as it stands: from nothing to a model that has learnt, through the asynchronous path."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.dataset as ds
import pytest
import warm
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]


def demo(environment: dict[str, str], folder: Path, *keys: str) -> Path:
    """The README's first command, from nothing, and what every run of it shows; its run directory."""
    # eval.nice: the tests beside it would come before its evaluator, which it waits for.
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), "run.name=demo", "eval.nice=0", *keys],
        env=environment, cwd=folder, capture_output=True, text=True, timeout=880,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    run_dir = folder / "runs" / "demo"
    summary = json.loads((run_dir / "summary.json").read_text())
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert summary["status"] == "completed"
    # Some of what it learnt from was stale, and never staler than the bound (I2).
    assert 1 <= summary["staleness/max"] <= 2
    # Exactly once (I1).
    assert (summary["groups/lost"], summary["groups/duplicated"]) == (0, 0)
    assert summary["groups/trained"] == summary["steps"] * 16
    # Engine and learner agree on the same text under the same version (I5).
    assert max(row.get("mismatch/probe_abs_dlogp_max", 0.0) for row in rows) < 1e-4
    assert [row["step"] for row in rows] == list(range(summary["steps"] + 1))
    return run_dir


def test_the_first_command_trains_and_leaves_what_people_have_tools_for(
    environment: dict[str, str], tmp_path: Path
) -> None:
    run_dir = demo(environment, tmp_path, "sft.steps=150", "learner.steps=8", "eval.prompts=64")
    summary = json.loads((run_dir / "summary.json").read_text())
    checkpoint = run_dir / "checkpoints" / f"step_{summary['steps']}"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    assert model.config.vocab_size == len(tokenizer)
    table = ds.dataset(run_dir / "trajectories").to_table()
    assert table.num_rows == summary["groups/admitted"] * 8
    events = EventAccumulator(str(run_dir / "tb"), size_guidance={"scalars": 0}).Reload()
    assert len(events.Scalars("reward/accuracy")) == summary["steps"]
    assert (run_dir / "learning.png").stat().st_size > 20_000
    assert not (run_dir / "config.yaml").read_text().count("demo")


@pytest.mark.prove
@pytest.mark.timeout(900)
def test_the_embedded_default_learns_from_stale_data(environment: dict[str, str], tmp_path: Path) -> None:
    run_dir = demo(environment, tmp_path)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["eval/accuracy_first"] <= 0.65
    assert summary["eval/accuracy_last"] >= 0.90
    assert summary["staleness/stale_token_share"] >= 0.5
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert all(row["eval/prompts"] >= 512 for row in rows if "eval/accuracy" in row)


@pytest.mark.prove
def test_a_saved_config_repeats_and_a_model_directory_goes_through_the_same_code(
    launch: object, environment: dict[str, str], tmp_path: Path
) -> None:
    """job=sft makes a directory; model.path=DIR trains it; its config.yaml starts the same run again."""
    first = launch("made", "job=sft", "sft.steps=60")  # type: ignore[operator]
    assert first.code == 0, first.output
    model = first.run_dir / "checkpoints" / "step_60"
    second = launch("trained", f"model.path={model}", "staleness.mode=exact", "learner.steps=2")  # type: ignore[operator]
    assert second.code == 0, second.output
    assert (second.run_dir / "start").resolve() == model.resolve()
    line = [sys.executable, str(ROOT / "launch.py"), str(second.run_dir / "config.yaml"), "run.name=again"]
    again = warm.run(line, 280, env=environment, cwd=tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr

    def losses(run_dir: Path) -> list[float]:
        rows = [json.loads(row) for row in (run_dir / "metrics.jsonl").read_text().splitlines()]
        return [row["loss/policy"] for row in rows if row["step"] > 0]

    assert losses(tmp_path / "again") == losses(second.run_dir)
