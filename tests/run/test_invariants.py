"""I3, I2b and I1 through the real command: broker, wire and processes, against plain loops and across kills."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import warm
from safetensors.torch import load_file

from leftovers import alive, words
from offtrail.platform.config.compose import load_config
from offtrail.platform.learner.checkpoint import gather
from offtrail.platform.learner.synchronous import Synchronous
from offtrail.platform.runtime.context import weights_folder
from offtrail.platform.runtime.host import adopt_orphans

from .conftest import EXACT, PATIENCE_S, UNDISTURBED

ROLE_NAMES = ("broker", "learner", "generator", "evaluator")
NUMBERS = ("loss/policy", "policy/grad_norm", "policy/entropy", "reward/mean", "reward/accuracy", "length/mean")


def checksums(run_dir: Path) -> list[tuple[int, str]]:
    """(version, checksum) of every version that the ledger logged, in order."""
    with sqlite3.connect(f"file:{run_dir / 'ledger.sqlite'}?mode=ro", uri=True) as ledger:
        return ledger.execute("SELECT version, checksum FROM versions ORDER BY version").fetchall()


def numbers(rows: list[dict[str, Any]]) -> list[list[float]]:
    return [[row[name] for name in NUMBERS] for row in rows if row["step"] > 0]


def wait_until(what: str, condition: Any, seconds: float = PATIENCE_S) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, f"{what} did not come true in {seconds} s"
        time.sleep(0.02)


def test_staleness_zero_is_the_synchronous_loop_bit_for_bit(launch: Any) -> None:
    run = launch("i3", "staleness.max=0")
    assert run.code == 0, run.output
    assert run.summary["staleness/max"] == 0
    config = load_config(run.run_dir / "config.yaml")
    plain = Synchronous(config, run.run_dir / "start")
    steps = list(plain.run(config.learner.steps))
    assert checksums(run.run_dir)[1:] == [(i + 1, step.checksum) for i, step in enumerate(steps)]
    trained = load_file(run.run_dir / "checkpoints" / "step_4" / "model.safetensors")
    for name, tensor in gather(plain.trainer.module).items():
        assert (trained[name] == tensor).all(), name
    rows = [row for row in run.rows if row["step"] > 0]
    assert [row["loss/policy"] for row in rows] == [step.report.metrics["loss/policy"] for step in steps]
    # The comparison means something: every step moved the weights.
    assert len({digest for _, digest in checksums(run.run_dir)}) == config.learner.steps + 1


@pytest.mark.prove
def test_an_exact_run_repeats_bit_for_bit(launch: Any, shared: Any) -> None:
    first, second = shared(*UNDISTURBED), launch("second", *EXACT)
    assert second.code == 0, second.output
    assert checksums(first.run_dir) == checksums(second.run_dir)
    assert numbers(first.rows) == numbers(second.rows)
    assert first.summary["staleness/max"] == 2


def test_an_exact_run_whose_learner_is_killed_between_checkpoints_makes_the_same_versions(
    launch: Any, shared: Any, command: Any, environment: dict[str, str], tmp_path: Path
) -> None:
    """Between checkpoints 3 and 6, resumed from the one before: nothing lost or twice."""
    first = shared(*UNDISTURBED)
    process = warm.Popen(command("killed", *EXACT), env=environment, cwd=tmp_path, stderr=subprocess.PIPE)
    wait_until("step 4", lambda: reached(tmp_path / "killed", 4))
    os.kill(pid_of("learner", tmp_path / "killed"), signal.SIGKILL)
    _, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert b"learner-0 was killed by SIGKILL" in stderr
    resumed = launch("killed", "run.resume=true", *EXACT)
    assert resumed.code == 0, resumed.output
    assert checksums(resumed.run_dir) == checksums(first.run_dir)
    assert numbers(resumed.rows) == numbers(first.rows)
    for name in ("groups/trained", "groups/lost", "groups/duplicated", "tokens/trained", "staleness/mean"):
        assert resumed.summary[name] == first.summary[name], name
    assert resumed.summary["groups/trained"] == 8 * 4
    assert resumed.summary["lineage"] == 0


@pytest.mark.prove
def test_an_exact_run_whose_generator_is_killed_in_the_middle_of_a_wave_makes_the_same_versions(
    shared: Any, command: Any, environment: dict[str, str], tmp_path: Path
) -> None:
    first = shared(*UNDISTURBED)
    process = warm.Popen(command("again", *EXACT), env=environment, cwd=tmp_path)
    for step in (2, 5):
        wait_until(f"step {step}", lambda step=step: reached(tmp_path / "again", step))
        os.kill(pid_of("generator", tmp_path / "again"), signal.SIGKILL)
    assert process.wait(PATIENCE_S) == 0
    assert checksums(tmp_path / "again") == checksums(first.run_dir)
    assert json.loads((tmp_path / "again" / "summary.json").read_text())["restarts"] == {"generator-0": 2}


def test_every_wait_drop_and_rank_goes_through_two_of_each(launch: Any) -> None:
    run = launch(
        "many",
        "generator.count=2",
        "learner.ranks=2",
        "staleness.on_violation=drop",
        "staleness.max=1",
        "learner.steps=6",
    )
    assert run.code == 0, run.output
    summary = run.summary
    assert summary["staleness/max"] <= 1
    assert (summary["groups/trained"], summary["groups/lost"], summary["groups/duplicated"]) == (24, 0, 0)
    refused = sum(summary["groups/refused"].values())
    assert summary["groups/admitted"] == summary["groups/trained"] + summary["groups/in_flight"] + refused


def test_a_killed_generator_and_evaluator_are_started_again_and_the_run_completes(
    command: Any, environment: dict[str, str], tmp_path: Path
) -> None:
    line = command("killed", "learner.steps=8", "eval.every=2", "eval.prompts=64", "tracking.progress=plain")
    process = warm.Popen(line, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    run_dir, killed = tmp_path / "killed", []
    for role, step in (("generator", 2), ("evaluator", 4)):
        wait_until(f"step {step}", lambda step=step: reached(run_dir, step))
        killed.append(pid_of(role, run_dir))
        os.kill(killed[-1], signal.SIGKILL)
    stdout, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, stderr
    assert not [pid for pid in killed if alive(pid)]
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["status"], summary["restarts"]) == ("completed", {"generator-0": 1, "evaluator-0": 1})
    for role in ("generator", "evaluator"):
        assert f"{role}-0 was killed by SIGKILL" in stdout.decode()
    assert [summary[f"groups/{name}"] for name in ("trained", "lost", "duplicated")] == [8 * 4, 0, 0]
    rows = [json.loads(row) for row in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "eval/accuracy" in row] == [0, 2, 4, 6, 8]
    assert not shared_memory(run_dir)


@pytest.mark.parametrize("role", [pytest.param("learner", marks=pytest.mark.prove), "broker"])
def test_a_dead_broker_or_learner_ends_the_run_with_its_name_and_how_it_died(
    role: str, command: Any, environment: dict[str, str], tmp_path: Path
) -> None:
    line = command("dead", "learner.steps=100000", "sft.steps=150")
    process = warm.Popen(line, env=environment, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    run_dir = tmp_path / "dead"
    wait_until(
        "step 1",
        lambda: (run_dir / "metrics.jsonl").is_file() and '"step": 1,' in (run_dir / "metrics.jsonl").read_text(),
    )
    pids = [pid_of(name, run_dir) for name in ("broker", "learner", "generator", "evaluator")]
    os.kill(pid_of(role, run_dir), signal.SIGKILL)
    _, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert f"{role}-0 was killed by SIGKILL" in stderr.decode()
    assert "Traceback" not in stderr.decode()
    assert not [pid for pid in pids if alive(pid)]
    assert not shared_memory(run_dir)


def test_nothing_outlives_a_killed_launcher_not_even_a_role_that_hears_no_signal(
    launch: Any, command: Any, environment: dict[str, str], tmp_path: Path
) -> None:
    """One role is stopped (it stands for one that hangs in native code) when the launcher is killed, and resumed after
    the next launch has begun: by then it is gone, so that it can take nothing of its successor's.
    """
    process = warm.Popen(command("orphan", "learner.steps=6"), env=environment, cwd=tmp_path)
    run_dir = tmp_path / "orphan"
    wait_until("step 1", lambda: reached(run_dir, 1))
    everybody = psutil.Process(process.pid).children(recursive=True)
    assert {pid_of(name, run_dir) for name in ROLE_NAMES} < {child.pid for child in everybody}
    (run_dir / "servers").mkdir()
    (run_dir / "servers" / "generator-0.json").write_text("{}")
    stopped = psutil.Process(pid_of("learner", run_dir))
    stopped.suspend()
    process.kill()
    process.wait()
    resumed = launch("orphan", "run.resume=true", "learner.steps=6")  # waits for what the first one left
    assert resumed.code == 0, resumed.output
    assert not [child for child in everybody if alive(child)]
    assert (resumed.summary["groups/trained"], resumed.summary["groups/lost"]) == (24, 0)

    process = warm.Popen(command("orphan2", "learner.steps=100000"), env=environment, cwd=tmp_path)
    run_dir = tmp_path / "orphan2"
    wait_until("step 1", lambda: reached(run_dir, 1))
    everybody = psutil.Process(process.pid).children(recursive=True)
    stopped = psutil.Process(pid_of("generator", run_dir))
    stopped.suspend()
    assert shared_memory(run_dir)
    process.kill()
    process.wait()
    wait_until("an end of every process", lambda: not [c for c in everybody if alive(c)])
    wait_until("shared memory given back", lambda: not shared_memory(run_dir))
    assert not (run_dir / "servers").exists()


@pytest.mark.prove
def test_a_role_of_a_killed_attempt_that_leaves_late_takes_nothing_of_the_resumed_runs(
    shared: Any, command: Any, environment: dict[str, str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Its reaper was killed too, so that the next launch begins while a learner and a generator still stand.

    Trap: the kernel wakes stopped processes whose new parent is of another session; this one takes them in.
    """
    undisturbed = shared(*UNDISTURBED)
    process = warm.Popen(command("late", *EXACT), env=environment, cwd=tmp_path)
    request.addfinalizer(lambda: adopt_orphans(False))
    adopt_orphans()
    run_dir = tmp_path / "late"
    wait_until("step 1", lambda: reached(run_dir, 1))
    late = [psutil.Process(pid_of(role, run_dir)) for role in ("learner", "generator")]
    for role in late:
        role.suspend()
    for child in psutil.Process(process.pid).children():
        if "reaper" in " ".join(words(child)):
            child.kill()
    process.kill()
    process.wait()
    resumed = warm.Popen(command("late", "run.resume=true", *EXACT), env=environment, cwd=tmp_path)
    wait_until("step 4", lambda: reached(run_dir, 4))
    assert len(shared_memory(run_dir)) == 1
    for role in late:
        assert role.is_running()
        role.resume()
    psutil.wait_procs(late, timeout=PATIENCE_S)
    assert not [role for role in late if alive(role)]
    assert resumed.wait(PATIENCE_S) == 0
    assert checksums(run_dir) == checksums(undisturbed.run_dir)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert [summary[f"groups/{name}"] for name in ("trained", "lost", "duplicated")] == [8 * 4, 0, 0]
    assert not shared_memory(run_dir)


def test_an_interrupted_run_says_so_and_goes_on(
    launch: Any, command: Any, environment: dict[str, str], tmp_path: Path
) -> None:
    keys = ("learner.steps=16",)
    process = warm.Popen(command("stop", *keys), env=environment, cwd=tmp_path)
    wait_until("step 2", lambda: reached(tmp_path / "stop", 2))
    for role in ROLE_NAMES:  # a cluster that ends a job signals all of its processes
        os.kill(pid_of(role, tmp_path / "stop"), signal.SIGUSR1)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(PATIENCE_S) == 130
    summary = json.loads((tmp_path / "stop" / "summary.json").read_text())
    assert (summary["status"], summary["reason"]) == ("interrupted", "stopped by SIGUSR1")
    resumed = launch("stop", "run.resume=true", *keys)
    assert resumed.code == 0, resumed.output
    assert resumed.summary["status"] == "completed"
    assert [row["step"] for row in resumed.rows] == list(range(17))
    assert (
        resumed.summary["groups/trained"],
        resumed.summary["groups/lost"],
        resumed.summary["groups/duplicated"],
    ) == (64, 0, 0)


@pytest.mark.prove
def test_what_had_no_score_yet_when_a_run_was_stopped_gets_the_one_of_an_undisturbed_run(
    launch: Any, shared: Any, command: Any, environment: dict[str, str], tmp_path: Path
) -> None:
    """Its evaluator stands still in the first launch: version 0, those of checkpoints, which the second launch keeps no
    longer than they wait, and the one that it goes on from all wait.
    """
    undisturbed = shared(*UNDISTURBED)
    _, *keys = UNDISTURBED
    process = warm.Popen(command("stop", "learner.keep_checkpoints=4", *keys), env=environment, cwd=tmp_path)
    run_dir = tmp_path / "stop"
    wait_until("an evaluator", lambda: running("evaluator", run_dir))
    evaluator = psutil.Process(pid_of("evaluator", run_dir))
    evaluator.suspend()
    wait_until("a checkpoint", lambda: (run_dir / "checkpoints" / "step_4").is_dir())
    process.send_signal(signal.SIGINT)
    wait_until("an end", lambda: '"reason"' in (run_dir / "summary.json").read_text())
    evaluator.kill()  # it would hear nothing
    assert process.wait(PATIENCE_S) == 130
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["status"], summary["eval/accuracy_first"]) == ("interrupted", None)
    resumed = launch("stop", "run.resume=true", "learner.keep_checkpoints=1", *keys)
    assert resumed.code == 0, resumed.output
    assert scores(resumed) == scores(undisturbed)
    assert list(scores(resumed)) == [0, 2, 4, 6, 8]
    assert all("eval/sums/accuracy" in row for row in scores(resumed).values())
    assert resumed.summary["eval/accuracy_first"] == undisturbed.summary["eval/accuracy_first"]
    assert "eval/unscored" not in resumed.summary


def scores(run: Any) -> dict[int, dict[str, float]]:
    """Version → all that its evaluation said."""
    found = {row["step"]: {k: v for k, v in row.items() if k.startswith("eval/")} for row in run.rows}
    return {step: row for step, row in found.items() if row}


def test_an_interrupt_in_the_cold_start_and_one_before_the_endpoint_end_the_run(
    launch: Any, command: Any, environment: dict[str, str], tmp_path: Path
) -> None:
    environment = environment | {"OFFTRAIL_CACHE": str(tmp_path / "cache")}
    line = command("early", "learner.steps=100000", "sft.steps=100000")
    process = warm.Popen(line, env=environment, cwd=tmp_path, stderr=subprocess.PIPE)
    stage = tmp_path / "early" / "stages" / "1_cold_start"
    wait_until("a cold start", lambda: reached(stage, 1))
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, stderr.decode().startswith("stopping")) == (130, True)
    assert "SIGINT in the cold start" in json.loads((tmp_path / "early" / "summary.json").read_text())["reason"]

    line = command("late", "learner.steps=100000", "sft.steps=1", "sft.warmup_steps=0")
    process = warm.Popen(line, env=environment, cwd=tmp_path, stderr=subprocess.PIPE)
    run_dir = tmp_path / "late"
    wait_until("a broker", (run_dir / "logs" / "broker-0.log").exists)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    assert "Traceback" not in stderr.decode()
    assert json.loads((run_dir / "summary.json").read_text())["reason"] == "stopped by SIGINT"
    assert not [entry for entry in ("broker", "learner", "generator", "evaluator") if running(entry, run_dir)]


@pytest.mark.prove
@pytest.mark.parametrize(
    "options",
    [
        ("correction=none", "algo.kl=k3", "algo.kl_coef=0.01"),
        ("correction=none",),
        ("algo.kl=k3", "algo.kl_coef=0.01"),
    ],
)
def test_without_a_correction_and_with_a_kl_penalty_all_is_finite(launch: Any, options: tuple[str, ...]) -> None:
    run = launch("few", *options, "learner.steps=2")
    assert run.code == 0, run.output
    assert run.summary["status"] == "completed"
    rows = [row for row in run.rows if row["step"] > 0]
    assert len(rows) == 2
    for row in rows:
        found = {name: value for name, value in row.items() if name.startswith(("loss/", "policy/"))}
        assert {"loss/policy", "policy/grad_norm"} <= set(found)
        assert not [name for name, value in found.items() if value is None]


def shared_memory(run_dir: Path) -> list[Path]:
    """The folders that any attempt of the run has in shared memory."""
    folder = weights_folder(load_config(run_dir / "config.yaml"), run_dir)
    return list(folder.parent.glob(f"{folder.name}*"))


def reached(run_dir: Path, step: int) -> bool:
    metrics = run_dir / "metrics.jsonl"
    return metrics.is_file() and f'"step": {step},' in metrics.read_text()


def running(role: str, run_dir: Path) -> bool:
    try:
        return alive(pid_of(role, run_dir))
    except AssertionError:
        return False


def pid_of(role: str, run_dir: Path) -> int:
    """The process of a role of this run, found by its command line."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"offtrail.platform.runtime.process" in words and role.encode() in words and str(run_dir).encode() in words:
            return int(entry.name)
    raise AssertionError(f"no {role} of {run_dir} is running")
