"""metrics.jsonl and event files: one row a step, late evaluations in place, nothing twice after a restart."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from offtrail.platform.config.schema import Config
from offtrail.platform.tracking import recorder as module
from offtrail.platform.tracking.recorder import Recorder, read_rows


def config(tensorboard: bool = False) -> Config:
    made = Config()
    made.tracking.tensorboard = tensorboard
    return made


@pytest.fixture
def recorder(tmp_path):
    recorder = Recorder(tmp_path, config())
    yield recorder
    recorder.close()


def board(run_dir: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(run_dir / "tb"), size_guidance={"scalars": 0, "histograms": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def test_one_object_a_step_and_row_0_is_the_first_evaluation(tmp_path, recorder):
    recorder.evaluation(0, {"eval/accuracy": 0.5})
    recorder.step({"step": 1, "reward/accuracy": 0.6})
    recorder.step({"step": 2, "reward/accuracy": 0.7})
    assert read_rows(tmp_path) == [
        {"step": 0, "eval/accuracy": 0.5},
        {"step": 1, "reward/accuracy": 0.6},
        {"step": 2, "reward/accuracy": 0.7},
    ]
    assert recorder.last == {"step": 2, "reward/accuracy": 0.7}


def test_a_late_evaluation_goes_into_its_row(tmp_path, recorder):
    for step in (1, 2, 3):
        recorder.step({"step": step, "loss/total": float(step)})
    recorder.evaluation(2, {"eval/accuracy": 0.8})
    recorder.evaluation(0, {"eval/accuracy": 0.5})
    assert [row["step"] for row in read_rows(tmp_path)] == [0, 1, 2, 3]
    assert read_rows(tmp_path)[2] == {"step": 2, "loss/total": 2.0, "eval/accuracy": 0.8}


def test_a_late_evaluation_writes_no_row_before_its_own(tmp_path, recorder, monkeypatch):
    for step in range(1, 101):
        recorder.step({"step": step, "loss/total": 1.0})
    written = []
    line = module._line
    monkeypatch.setattr(module, "_line", lambda row: written.append(row["step"]) or line(row))
    inode = (tmp_path / "metrics.jsonl").stat().st_ino
    recorder.evaluation(98, {"eval/accuracy": 0.8})
    assert written == [98, 99, 100]
    recorder.step({"step": 99, "loss/total": 12345.0})
    recorder.step({"step": 99, "loss/total": 1.0})  # shorter than what was there
    assert [row["step"] for row in read_rows(tmp_path)] == list(range(1, 101))
    assert read_rows(tmp_path)[97] == {"step": 98, "loss/total": 1.0, "eval/accuracy": 0.8}
    assert (tmp_path / "metrics.jsonl").stat().st_ino == inode


@pytest.mark.parametrize("change", [lambda path: path.unlink(), lambda path: path.write_text("{}\n")])
def test_a_file_that_somebody_else_has_changed_is_written_anew(tmp_path, recorder, change):
    for step in (1, 2, 3):
        recorder.step({"step": step, "loss/total": 1.0})
    change(tmp_path / "metrics.jsonl")
    recorder.evaluation(2, {"eval/accuracy": 0.8})
    recorder.step({"step": 4})
    assert [row["step"] for row in read_rows(tmp_path)] == [1, 2, 3, 4]


def test_a_reader_that_meets_a_row_in_the_making_reads_again(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st')
    monkeypatch.setattr(module.time, "sleep", lambda _: path.write_text('{"step": 1}\n{"step": 2}\n'))
    assert [row["step"] for row in read_rows(tmp_path)] == [1, 2]


def test_an_evaluation_before_its_row_waits_for_it(tmp_path, recorder):
    recorder.evaluation(1, {"eval/accuracy": 0.8})
    assert not (tmp_path / "metrics.jsonl").read_text()
    recorder.step({"step": 1, "loss/total": 2.0})
    assert read_rows(tmp_path) == [{"step": 1, "eval/accuracy": 0.8, "loss/total": 2.0}]


def test_a_replayed_step_replaces_its_row_and_keeps_its_evaluation(tmp_path, recorder):
    recorder.step({"step": 1, "loss/total": 2.0, "policy/lr": 1.0})
    recorder.evaluation(1, {"eval/accuracy": 0.8})
    recorder.step({"step": 1, "loss/total": 3.0})
    assert read_rows(tmp_path) == [{"step": 1, "eval/accuracy": 0.8, "loss/total": 3.0}]


def test_numbers_that_json_cannot_hold_stand_as_null(tmp_path, recorder):
    recorder.step({"step": 1, "a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.5})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 1, "a": None, "b": None, "c": None, "d": 1.5}


@pytest.mark.parametrize("row", [{}, {"step": 1.5}, {"reward/total": 1.0}])
def test_a_row_without_its_step_is_refused(recorder, row):
    with pytest.raises(ValueError, match='needs "step"'):
        recorder.step(row)


def test_restored_rows_stand_once_and_later_ones_are_gone(tmp_path):
    first = Recorder(tmp_path, config())
    for step in range(1, 6):
        first.step({"step": step, "loss/total": float(step)})
    first.close()
    second = Recorder(tmp_path, config())
    second.restore([{"step": step, "loss/total": float(step)} for step in (3, 1, 2, 3)])
    assert [row["step"] for row in read_rows(tmp_path)] == [1, 2, 3]
    second.step({"step": 4, "loss/total": 40.0})
    assert read_rows(tmp_path)[-1] == {"step": 4, "loss/total": 40.0}
    second.close()


def test_a_line_that_is_not_json_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step"\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not a JSON object"):
        read_rows(tmp_path)


@settings(max_examples=40, deadline=None)
@given(st.permutations([("step", i) for i in range(1, 5)] + [("eval", i) for i in (0, 2, 4)]))
def test_any_order_of_steps_and_evaluations_gives_the_same_rows(tmp_path_factory, events):
    run_dir = tmp_path_factory.mktemp("run")
    recorder = Recorder(run_dir, config())
    for kind, version in events:
        if kind == "step":
            recorder.step({"step": version, "x": version})
        else:
            recorder.evaluation(version, {"eval/accuracy": version / 8})
        steps = [row["step"] for row in read_rows(run_dir)]
        assert steps == sorted(set(steps))
    recorder.close()
    assert read_rows(run_dir) == [
        {"step": 0, "eval/accuracy": 0.0},
        {"step": 1, "x": 1},
        {"step": 2, "x": 2, "eval/accuracy": 0.25},
        {"step": 3, "x": 3},
        {"step": 4, "x": 4, "eval/accuracy": 0.5},
    ]


def test_tensorboard_reads_scalars_histograms_and_texts(tmp_path):
    recorder = Recorder(tmp_path, config(tensorboard=True))
    recorder.evaluation(0, {"eval/accuracy": 0.5}, {"eval/samples": "first *look*"})
    recorder.step(
        {"step": 1, "reward/accuracy": 0.25, "policy/kl_ref": math.nan},
        {"staleness/tokens": [0, 0, 1, 2, 2, 2], "policy/ratio": [0.5, 1.0, 1.5], "empty": [], "odd": [math.inf]},
        {"samples": "**prompt**"},
    )
    recorder.evaluation(1, {"eval/accuracy": 0.75})
    recorder.close()
    found = board(tmp_path)
    assert [(e.step, e.value) for e in found.Scalars("eval/accuracy")] == [(0, 0.5), (1, 0.75)]
    assert [(e.step, e.value) for e in found.Scalars("reward/accuracy")] == [(1, 0.25)]
    assert "policy/kl_ref" not in found.Tags()["scalars"]
    assert sorted(found.Tags()["histograms"]) == ["policy/ratio", "staleness/tokens"]
    (event,) = found.Histograms("staleness/tokens")
    histogram = event.histogram_value
    assert (histogram.min, histogram.max, histogram.num, histogram.sum, histogram.sum_squares) == (0, 2, 6, 7, 13)
    assert list(histogram.bucket_limit) == [0.5, 1.5, 2.5]
    assert list(histogram.bucket) == [2, 1, 3]
    assert sum(found.Histograms("policy/ratio")[0].histogram_value.bucket) == 3
    assert found.Tensors("samples/text_summary")[0].tensor_proto.string_val == [b"**prompt**"]
    assert found.SummaryMetadata("samples/text_summary").plugin_data.plugin_name == "text"


def test_what_is_recorded_is_on_disk_at_once(tmp_path):
    recorder = Recorder(tmp_path, config(tensorboard=True))
    recorder.step({"step": 1, "reward/accuracy": 0.25})
    assert [e.value for e in board(tmp_path).Scalars("reward/accuracy")] == [0.25]
    recorder.close()


def test_tensorboard_shows_each_step_once_after_a_restart(tmp_path):
    first = Recorder(tmp_path, config(tensorboard=True))
    for step in range(1, 6):
        first.step({"step": step, "loss/total": float(step)})
    first.close()
    second = Recorder(tmp_path, config(tensorboard=True))
    second.restore([{"step": step, "loss/total": float(step)} for step in (1, 2)])
    for step in (3, 4):
        second.step({"step": step, "loss/total": 10.0 * step})
    second.close()
    assert [(e.step, e.value) for e in board(tmp_path).Scalars("loss/total")] == [(1, 1), (2, 2), (3, 30), (4, 40)]


def test_the_tracking_of_a_run_imports_no_torch():
    code = (
        "import sys, offtrail.platform.tracking.tensorboard, offtrail.platform.tracking.summary as s;"
        "import offtrail.platform.tracking.progress, offtrail.platform.tracking.plot;"
        "import offtrail.platform.runtime.heartbeat;"
        "s.package_versions();"
        "sys.exit(any(name.split('.')[0] in ('torch', 'transformers', 'tensorflow') for name in sys.modules))"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
