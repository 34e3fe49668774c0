"""Summary, progress view and learning curve."""

from __future__ import annotations

import io
import json
import math
import struct
import time
from importlib.metadata import version

import numpy as np
import pytest
from rich.console import Console

from offtrail.platform.config.schema import Config
from offtrail.platform.tracking import summary as summary_module
from offtrail.platform.tracking.plot import _free_corner, curve, learning_curve
from offtrail.platform.tracking.progress import Progress
from offtrail.platform.tracking.recorder import Recorder
from offtrail.platform.tracking.summary import PACKAGES, read_summary, write_summary
from offtrail.platform.wire.messages import Failure, Heartbeat, Status


def beat(role: str, activity: str, on: str = "", ago: float = 1.0) -> Heartbeat:
    return Heartbeat(role=role, index=0, activity=activity, waiting_on=on, since=time.time() - ago,
                     seconds={"busy/x": 3.0, "waiting/y": 1.0}, compute={})  # fmt: skip


def status(step: int = 7, roles: list[Heartbeat] | None = None, failures: list[Failure] | None = None) -> Status:
    metrics = {
        "step": step,
        "reward/accuracy": 0.8125,
        "length/mean": 31.25,
        "staleness/mean": 1.375,
        "staleness/max": 2.0,
        "throughput/trained_tokens_per_second": 8123.4,
        "queue/groups": 5,
        "queue/leased": 33,
    }
    held_out = {"eval/accuracy_first": 0.553, "eval/accuracy_last": 0.902}
    return Status(summary=held_out, roles=roles or [], metrics=metrics, failures=failures or [], finished=False)


def shown(mode: str, *states: Status, terminal: bool = False) -> str:
    config = Config()
    config.tracking.progress = mode  # type: ignore[assignment]
    console = Console(record=True, width=80, force_terminal=terminal, file=io.StringIO())
    with Progress(config, console) as progress:
        for state in states:
            progress.update(state)
    return console.export_text()


def test_summary_holds_versions_and_strict_json(tmp_path):
    write_summary(
        tmp_path, {"status": "failed", "a": math.nan, "b": np.float32(0.5), "c": {"d": [math.inf, np.int64(3)]}}
    )
    found = json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail)
    assert found == read_summary(tmp_path)
    assert (found["a"], found["b"], found["c"]) == (None, 0.5, {"d": [None, 3]})
    assert set(found["versions"]) == set(PACKAGES)
    assert found["versions"]["torch"] == version("torch")
    assert "git_commit" in found
    assert [file.name for file in tmp_path.iterdir()] == ["summary.json"]


def test_summary_keeps_what_it_is_given(tmp_path):
    write_summary(tmp_path, {"versions": {"torch": "1"}, "git_commit": "abc"})
    assert read_summary(tmp_path) == {"versions": {"torch": "1"}, "git_commit": "abc"}


def test_no_summary_reads_as_empty(tmp_path):
    assert read_summary(tmp_path) == {}


def test_the_commit_is_none_outside_a_checkout(tmp_path, monkeypatch):
    summary_module.git_commit.cache_clear()
    monkeypatch.setattr(summary_module, "__file__", str(tmp_path / "a" / "b" / "c.py"))
    assert summary_module.git_commit() is None
    summary_module.git_commit.cache_clear()


def test_plain_mode_prints_one_line_for_each_step():
    text = shown("plain", status(0), status(1), status(1), status(2), status(2))
    lines = text.strip().splitlines()
    assert len(lines) == 2
    assert lines[1].startswith(
        "step  2/40 · accuracy 0.812 · eval 0.553 → 0.902 · length 31.2 · staleness 1.38 (max 2) · 8,123 tokens/s"
        " · queue 5, leased 33"
    )


def test_auto_is_plain_where_there_is_no_terminal_and_live_on_one():
    assert shown("auto", status(1)).startswith("step  1/40")
    assert "role" in shown("auto", status(1), terminal=True)


def test_off_prints_nothing():
    assert shown("off", status(1), status(2)) == ""


@pytest.mark.parametrize("mode", ["plain", "live"])
def test_a_restart_is_told_once_and_stays(mode):
    console = Console(width=120, record=True, file=io.StringIO(), force_terminal=mode == "live")
    config = Config()
    config.tracking.progress = mode
    with Progress(config, console) as progress:
        progress.update(status(1))
        progress.tell("generator-0 was killed by SIGKILL; started again (1 of generator.max_restarts=3)")
        progress.update(status(2))
    assert console.export_text().count("started again (1 of generator.max_restarts=3)") == 1


def test_the_live_view_says_what_each_role_does_or_waits_for():
    roles = [
        beat("learner", "busy/update"),
        beat("generator", "waiting/lease", "broker", ago=14),
        beat("evaluator", "waiting/version 30", "learner", ago=75),
        beat("broker", "idle"),
        beat("trainer", "waiting/batch", "batch 3: 1 of its 2 groups are here, 2 in flight (generator-0: 2)"),
    ]
    text = shown("live", status(7, roles), terminal=True)
    assert "step 7/40" in text
    assert "0.553 → 0.902" in text
    assert "mean 1.38, max 2 of 2" in text
    assert "33 in flight, 5 queued" in text
    rows = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert "● update" in rows["learner-0"]
    assert "75%" in rows["learner-0"]
    assert "waits for lease on broker" in rows["generator-0"]
    assert "0:14" in rows["generator-0"]
    assert "waits for version 30 on learner" in rows["evaluator-0"]
    assert "1:15" in rows["evaluator-0"]
    assert "waits for batch: batch 3: 1 of its" in rows["trainer-0"]
    assert "(generator-0: 2)" in text  # a sentence is wrapped, never cut, and squeezes no other column


def test_the_live_view_fits_80_columns():
    config = Config()
    config.run.name = "chain-grpo-20250101-120000"
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(
        Progress(config, console).view(status(7, [beat("generator", "waiting/verdicts", "verifiers", ago=4000)]))
    )
    assert max(len(line.rstrip()) for line in console.export_text().splitlines()) <= 80


@pytest.mark.parametrize("mode", ["live", "plain"])
def test_a_warning_is_said_once(mode):
    states = [status(step) for step in (7, 8, 9)]
    for state in states[1:]:
        state.summary["warnings"] = ["steps 1 to 8: no answer ends"]
    assert shown(mode, *states, terminal=mode == "live").count("warning: steps 1 to 8: no answer ends") == 1


def test_the_live_view_shows_failures_and_lives_without_metrics():
    empty = Status(
        summary={},
        roles=[],
        metrics={},
        failures=[Failure(role="learner", index=0, error="out of memory")],
        finished=False,
    )
    text = shown("live", empty, terminal=True)
    assert "step 0/40" in text
    assert "learner-0 failed: out of memory" in text


def png_size(path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def test_the_learning_curve_is_drawn_from_the_rows(tmp_path):
    config = Config()
    config.tracking.tensorboard = False
    recorder = Recorder(tmp_path, config)
    recorder.evaluation(0, {"eval/accuracy": 0.5, "eval/length_mean": 20.0})
    for step in range(1, 6):
        recorder.step({"step": step, "reward/accuracy": 0.5 + step / 20, "length/mean": 20.0 + step, "length/max": 40,
                       "staleness/mean": 1.0, "staleness/max": 2, "policy/ratio_mean": 1.0 + step / 1000,
                       "policy/clip_low_fraction": 0.01, "policy/clip_high_fraction": math.nan})  # fmt: skip
    recorder.evaluation(5, {"eval/accuracy": 0.9})
    path = learning_curve(tmp_path)
    assert path == tmp_path / "learning.png"
    assert png_size(path) == (1430, 936)
    assert not (tmp_path / ".learning.png").exists()
    rows = recorder.rows
    assert curve(rows, "eval/accuracy") == ([0, 5], [0.5, 0.9])
    assert curve(rows, "policy/clip_high_fraction") == ([], [])


@pytest.mark.parametrize(
    ("values", "corner"),
    [([], "lower right"), ([0.5, 0.95], "lower right"), ([0.05, 0.24], "upper right"), ([0.1, 0.9], "best")],
)
def test_the_legend_leaves_the_last_label_free(values, corner):
    assert _free_corner(values) == corner


@pytest.mark.parametrize("text", ["", '{"step": 0, "eval/accuracy": 0.5}\n', '{"step": 1, "reward/accuracy": null}\n'])
def test_a_run_that_ended_early_is_drawn_too(tmp_path, text):
    (tmp_path / "metrics.jsonl").write_text(text)
    assert png_size(learning_curve(tmp_path)) == (1430, 936)
