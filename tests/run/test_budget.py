"""A budget ends a real run: completed, its last version checkpointed and scored, and a larger budget goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

TRACKER = """
class Steps:
    def __init__(self, run_dir):
        self.file = (run_dir / "steps.txt").open("a", buffering=1)

    def start(self, config, run_id, resume_step):
        print("start", resume_step, file=self.file)

    def write(self, step, scalars):
        print(*(["scores"] if "eval/accuracy" in scalars else ["step"]), step, file=self.file)

    def text(self, step, name, text):
        pass

    def close(self):
        print("close", file=self.file)
"""


@pytest.mark.prove
def test_a_budget_ends_a_run_as_completed_and_a_larger_one_goes_on(launch: Any, tmp_path: Path) -> None:
    # A step trains 4·4 answers of about 22 tokens: 4,000 decoded tokens are about 11 steps.
    (tmp_path / "my_sinks.py").write_text(TRACKER)
    sink = "tracking.sinks=[my_sinks:Steps]"
    long = (sink, "learner.steps=60", "learner.checkpoint_every=100", "broker.heartbeat_seconds=0.1")
    run = launch("spent", *long, "run.budget_tokens=4000")
    assert run.code == 0, run.output
    summary, rows = run.summary, run.rows
    last = summary["steps"]
    assert 0 < last < 60
    assert summary["status"] == "completed"
    assert summary["reason"].startswith("run.budget_tokens=4000: ")
    assert summary["reason"].endswith(f"tokens are spent, the last step is {last}")
    assert summary["budget/tokens"] >= 1
    assert rows[-1]["step"] == last
    assert "eval/accuracy" in rows[-1]
    assert (run.run_dir / "checkpoints" / f"step_{last}" / "model.safetensors").is_file()
    assert (summary["groups/lost"], summary["groups/duplicated"], summary["groups/in_flight"]) == (0, 0, 0)
    assert summary["groups/trained"] == 4 * last
    refused = sum(summary["groups/refused"].values())
    assert summary["groups/admitted"] == summary["groups/trained"] + refused
    # The cold start's FLOPs stand beside its model, and in the sum over all roles.
    flops = [value for name, value in summary.items() if name.startswith("compute/") and name.endswith("_flops")]
    assert summary["compute/cold_start_flops"] > 0
    assert summary["compute/flops"] == pytest.approx(sum(flops))

    # What was held: this host once, by three roles, and by the cold start, longer than by the broker's own clock.
    (host,) = summary["devices"]
    assert (host["count"], host["roles"]) == (1, {"evaluator": 1, "generator": 1, "learner": 1})
    assert summary["wall_seconds"] <= host["seconds"] <= summary["launch_seconds"]
    (made,) = summary["cold_start_devices"]
    assert summary["cost/device_hours"] == pytest.approx((host["seconds"] + made["seconds"]) / 3600)
    assert "cost/money" not in summary
    assert "| learner | 1 × CPU" in (run.run_dir / "cost.md").read_text()

    priced = ("cost.prices={CPU: 3600}", "cost.date=2026-11-01")
    more = launch("spent", *long, *priced, "run.resume=true", "run.budget_tokens=0", "run.budget_seconds=1")
    assert host["seconds"] < more.summary["devices"][0]["seconds"]
    assert more.summary["cost/money"] == pytest.approx(3600 * more.summary["cost/device_hours"])
    assert more.code == 0, more.output  # the seconds of the first launch are counted: spent at once
    assert more.summary["steps"] == last
    more = launch("spent", *long, "run.resume=true", "run.budget_tokens=8000", "run.budget_seconds=0")
    assert more.code == 0, more.output
    assert last < more.summary["steps"] < 60
    assert (more.summary["groups/lost"], more.summary["groups/trained"]) == (0, 4 * more.summary["steps"])
    assert more.summary["status"] == "completed"

    # A tracker had each row once, over three launches, and its end each time.
    told = (run.run_dir / "steps.txt").read_text().splitlines()
    assert [line for line in told if line.startswith("start")] == ["start 0", f"start {last}", f"start {last}"]
    steps = range(1, more.summary["steps"] + 1)
    assert [line for line in told if line.startswith("step")] == [f"step {step}" for step in steps]
    scored = [row["step"] for row in more.rows if "eval/accuracy" in row]
    assert sorted(line for line in told if line.startswith("scores")) == sorted(f"scores {step}" for step in scored)
    assert told.count("close") == 3
    assert more.summary["sinks"]["my_sinks:Steps"]["dropped"] == 0
