"""Every algorithm and correction through the real command; the main ones learn the embedded default."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from offtrail.platform.config.compose import options_of

ROOT = Path(__file__).resolve().parents[2]

LEARNERS = ("grpo", "dr_grpo", "dapo", "rloo", "gspo", "cispo", "ppo")


@pytest.mark.prove
@pytest.mark.parametrize(
    "option",
    [f"algo={algo}" for algo in options_of("algo")] + [f"correction={name}" for name in options_of("correction")],
)
def test_every_option_runs_a_few_learner_steps(launch: Any, option: str) -> None:
    sixteen = ("batch.groups=16", "generator.max_in_flight=32") if "r1" in option else ()
    run = launch("few", option, "learner.steps=3", *sixteen)
    assert run.code == 0, run.output
    rows = [row for row in run.rows if row["step"] > 0]
    assert len(rows) == 3
    assert all(math.isfinite(row["loss/policy"]) and row["policy/grad_norm"] >= 0 for row in rows)
    summary = run.summary
    assert (summary["status"], summary["groups/lost"], summary["groups/duplicated"]) == ("completed", 0, 0)
    if option == "algo=dapo":
        assert summary["groups/refused"]["filtered"] > 0
        assert all(row["reward/std_in_group"] > 0 for row in rows)


@pytest.mark.prove
def test_dynamic_sampling_repeats_in_exact_mode(launch: Any) -> None:
    """Which problems fill the refused places does not depend on timing."""
    exact = ("algo=dapo", "staleness.mode=exact", "staleness.max=1")
    first, second = launch("first", *exact), launch("second", *exact)
    assert (first.code, second.code) == (0, 0), first.output + second.output
    assert first.summary["groups/refused"] == second.summary["groups/refused"]
    assert first.summary["groups/refused"]["filtered"] > 0
    for name in ("loss/policy", "policy/grad_norm", "reward/mean", "policy/entropy"):
        assert [row.get(name) for row in first.rows] == [row.get(name) for row in second.rows], name


@pytest.mark.prove
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("algo", LEARNERS)
def test_the_main_algorithms_learn_the_embedded_default(
    algo: str, environment: dict[str, str], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    keys = [f"algo={algo}", f"run.dir={tmp_path}", "run.name=learns", "eval.nice=0"]
    command = [sys.executable, str(ROOT / "launch.py"), *keys]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "learns" / "summary.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "learns" / "metrics.jsonl").read_text().splitlines()]
    first, last = summary["eval/accuracy_first"], summary["eval/accuracy_last"]
    peak = rows[-1]["memory/learner_peak_bytes"] / 2**20
    record_property("told", f"{algo}: held-out accuracy {first:.3f} → {last:.3f}, learner's peak {peak:.0f} MiB")
    assert first < 0.7
    assert last >= 0.90
