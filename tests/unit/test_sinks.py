"""Trackers beside TensorBoard: each row once over launches, no tracker that stops or slows a run, the real ones."""

from __future__ import annotations

import json
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from fakes.run import Run
from offtrail.platform.config.compose import compose
from offtrail.platform.config.errors import ConfigError
from offtrail.platform.config.schema import Config
from offtrail.platform.launcher.command import require_trackers
from offtrail.platform.tracking.recorder import Recorder
from offtrail.platform.tracking.sinks import worker
from offtrail.platform.tracking.sinks.base import label_of, maker_of
from offtrail.platform.tracking.sinks.worker import QUEUE, Item, Sinks, Worker

MINE = '''
class Lines:
    """Everything that it is told, in a file of its own."""

    def __init__(self, run_dir, name="lines.txt"):
        self.file = (run_dir / name).open("a", buffering=1)

    def start(self, config, run_id, resume_step):
        print("start", run_id, resume_step, config["learner.steps"], file=self.file)

    def write(self, step, scalars):
        print("write", step, *sorted(scalars.items()), file=self.file)

    def text(self, step, name, text):
        print("text", step, name, text, file=self.file)

    def close(self):
        print("close", file=self.file)
        self.file.close()
'''


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Config]:
    """A configuration with a tracker of the user's own, in the current directory."""
    (tmp_path / "my_sinks.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield compose(["tracking.sinks=[my_sinks:Lines]", "tracking.tensorboard=false", "learner.steps=9"])
    sys.modules.pop("my_sinks", None)


def ended(sinks: Any) -> None:
    limit = time.monotonic() + 30
    while not sinks.finish():
        assert time.monotonic() < limit
        time.sleep(0.002)


def lines_of(run_dir: Path) -> list[str]:
    return (run_dir / "lines.txt").read_text().splitlines()


# ---------------------------------------------------------------------- rows


def test_a_tracker_gets_rows_late_scores_and_texts_under_the_same_names(tmp_path: Path, mine: Config) -> None:
    recorder = Recorder(tmp_path, mine)
    recorder.restore([])
    recorder.evaluation(0, {"eval/accuracy": 0.5})
    recorder.step({"step": 1, "loss/policy": 2.0, "policy/kl_ref": float("nan")}, {"x": [1.0]}, {"samples": "1+1"})
    recorder.step({"step": 2, "loss/policy": 1.0})
    recorder.evaluation(1, {"eval/accuracy": 0.6})
    ended(recorder.sinks)
    recorder.close()
    start, *rest = lines_of(tmp_path)
    assert start.split()[0::2] == ["start", "0"] or start.split()[2:] == ["0", "9"]
    assert rest == [
        "write 0 ('eval/accuracy', 0.5)", "write 1 ('loss/policy', 2.0)", "text 1 samples 1+1",
        "write 2 ('loss/policy', 1.0)", "write 1 ('eval/accuracy', 0.6)", "close",
    ]  # fmt: skip
    assert recorder.sinks.summary() == {"sinks": {"my_sinks:Lines": {"written": 4, "dropped": 0}}}
    assert recorder.sinks.lines == []


def test_a_stage_has_its_recipes_name_too(tmp_path: Path) -> None:
    assert label_of(tmp_path / "r1" / "stages" / "2_reason") == "r1-2_reason"
    assert label_of(tmp_path / "r1") == "r1"


def test_after_a_resume_no_step_comes_twice_and_none_is_missing(tmp_path: Path, mine: Config) -> None:
    first = Recorder(tmp_path, mine)
    first.restore([])
    for step in (1, 2, 3):
        first.step({"step": step, "loss/policy": float(step), "time/step_seconds": 0.1 * step})
    ended(first.sinks)
    # Steps 4 and 5 were recorded while the tracker was away; the checkpoint is of step 2, and a line was cut.
    file = tmp_path / "sinks" / "my_sinks.Lines.jsonl"
    file.write_text(file.read_text() + '{"step": 4, "dig')
    rows = [{"step": n, "loss/policy": float(n), "eval/accuracy": 0.1 * n} for n in (1, 2)]
    second = Recorder(tmp_path, mine)
    second.restore(rows)
    second.step({"step": 3, "loss/policy": 3.0, "time/step_seconds": 9.0})  # the replay, at another pace
    second.step({"step": 4, "loss/policy": 4.0})
    second.restore([*rows, {"step": 3, "loss/policy": 3.0}, {"step": 4, "loss/policy": 4.0}])  # a learner came back
    ended(second.sinks)
    told = lines_of(tmp_path)
    starts = [line.split() for line in told if line.startswith("start")]
    assert starts[0][1] == starts[1][1]  # one run there
    assert [start[2] for start in starts] == ["0", "2"]
    assert sorted(line.split()[1] for line in told if "loss/policy" in line) == ["1", "2", "3", "4"]
    assert [line for line in told if "eval/" in line] == [
        "write 1 ('eval/accuracy', 0.1)", "write 2 ('eval/accuracy', 0.2)",
    ]  # fmt: skip
    assert second.sinks.lines == []


def test_a_step_that_was_trained_otherwise_is_said_and_not_written_again(tmp_path: Path, mine: Config) -> None:
    for loss in (1.0, 2.0):
        sinks = Sinks(tmp_path, mine)
        sinks.restore([])
        for step in (1, 2):
            sinks.step(step, {"loss/policy": loss})
        ended(sinks)
    assert sinks.lines == [
        "tracking.sinks=my_sinks:Lines: step 1 was trained again and differs from what it has, which it keeps"
    ]
    assert sum("write" in line for line in lines_of(tmp_path)) == 2


# ---------------------------------------------------------------------- trackers that fail or hang


class Odd:
    """Fails or waits where it is told to."""

    def __init__(self, **calls: Callable[..., Any]) -> None:
        self.calls, self.steps = calls, list[int]()

    def start(self, config: Any, run_id: str, resume_step: int) -> None:
        self.calls.get("start", lambda: None)()

    def write(self, step: int, scalars: Any) -> None:
        self.calls.get("write", lambda step: None)(step)
        self.steps.append(step)

    def text(self, step: int, name: str, text: str) -> None:
        self.calls.get("text", lambda: None)()

    def close(self) -> None:
        self.calls.get("close", lambda: None)()


def working(tmp_path: Path, odd: Odd) -> Worker:
    made = Worker("odd", lambda: odd, tmp_path, {})
    made.begin(0)
    return made


def all_of(made: Worker) -> None:
    made.finish()
    limit = time.monotonic() + 30
    while not made.finished:
        assert time.monotonic() < limit
        time.sleep(0.002)


def test_a_tracker_that_blocks_costs_its_rows_and_nobody_waits(tmp_path: Path) -> None:
    free, busy = threading.Event(), threading.Event()

    def wait(step: int) -> None:
        busy.set()
        assert free.wait(30)

    odd = Odd(write=wait)
    made = working(tmp_path, odd)
    made.put(Item("step", 1, {"a": 1.0}))
    assert busy.wait(30)  # it holds that row; the queue is empty
    for step in range(2, QUEUE + 12):
        made.put(Item("step", step, {"a": 1.0}))  # returns, or the test hangs here
    assert made.dropped == 10
    assert made.lines == [
        f"tracking.sinks=odd: {QUEUE} rows wait for it; further ones are dropped until it has caught up"
    ]
    free.set()
    all_of(made)
    assert odd.steps == list(range(1, QUEUE + 2))
    assert made.written == QUEUE + 1


def test_what_an_earlier_launch_has_recorded_is_not_bounded_by_the_queue(tmp_path: Path) -> None:
    free = threading.Event()
    odd = Odd(start=lambda: free.wait(30))
    made = working(tmp_path, odd)
    for step in range(1, 2 * QUEUE):
        made.put(Item("step", step, {}), waits=True)
    free.set()
    all_of(made)
    assert (len(odd.steps), made.dropped) == (2 * QUEUE - 1, 0)


@pytest.mark.parametrize("error", [OSError("no such host"), SystemExit(3)])
def test_a_tracker_that_cannot_start_is_said_once(tmp_path: Path, error: BaseException) -> None:
    def fail() -> None:
        raise error

    made = working(tmp_path, Odd(start=fail))
    made.put(Item("step", 1, {}))
    all_of(made)
    made.put(Item("step", 2, {}))
    assert (made.written, made.dropped) == (0, 2)
    (line,) = made.lines
    assert line.startswith(f"tracking.sinks=odd: it could not start ({type(error).__name__}: ")


def test_a_row_that_it_does_not_take_is_dropped_and_the_next_ones_are_not(tmp_path: Path) -> None:
    def fail(step: int) -> None:
        if step in (2, 3):
            raise ConnectionError("reset\nby peer")

    odd = Odd(write=fail)
    made = working(tmp_path, odd)
    for step in (1, 2, 3, 4):
        made.put(Item("step", step, {}))
    all_of(made)
    assert (odd.steps, made.written, made.dropped) == ([1, 4], 2, 2)
    assert made.lines == [
        "tracking.sinks=odd: it did not take step 2 (ConnectionError: reset by peer); such rows are dropped"
    ]
    # What it did not take is written by the next launch, if it stands in the ledger.
    again = working(tmp_path, later := Odd())
    for step in (1, 2, 3, 4):
        again.put(Item("step", step, {}), waits=True)
    all_of(again)
    assert later.steps == [2, 3]


def test_a_text_that_it_does_not_take_costs_the_text_and_its_row_comes_once(tmp_path: Path) -> None:
    asked = list[int]()

    def fail() -> None:
        asked.append(len(asked))
        if asked[-1] != 1:
            raise ConnectionError("too long")

    odd = Odd(text=fail)
    made = working(tmp_path, odd)
    for step in (1, 2):
        made.put(Item("step", step, {}, {"samples": "1+1", "worst": "1+2"}))
    all_of(made)
    assert (odd.steps, asked, made.written, made.dropped) == ([1, 2], [0, 1, 2, 3], 2, 0)
    assert made.lines == [
        "tracking.sinks=odd: it did not take 'samples' of step 1 (ConnectionError: too long); its row stands"
    ]
    again = working(tmp_path, later := Odd())
    for step in (1, 2, 3):
        again.put(Item("step", step, {}), waits=True)
    all_of(again)
    assert later.steps == [3]


def test_a_tracker_that_does_not_close_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "CLOSE_SECONDS", 0.05)
    free = threading.Event()
    made = working(tmp_path, Odd(close=lambda: free.wait(30)))
    all_of(made)
    assert made.lines == ["tracking.sinks=odd: it was not closed after 0.05 s and was left as it is"]
    free.set()


def test_a_run_waits_for_its_trackers_and_its_summary_counts_them(tmp_path: Path, mine: Config) -> None:
    run = Run(tmp_path / "run", tracking__sinks=["my_sinks:Lines", "my_sinks:Missing"])
    run.everybody()
    run.train(checkpoint=False)
    run.broker.ending.end("interrupted", "by a test")
    run.broker.roster.members.clear()
    run.broker.roster.launcher = None
    limit = time.monotonic() + 30
    while not run.broker.ending.may_leave():
        assert time.monotonic() < limit
    run.broker.ending.write_last_summary()
    summary = run.summary()
    assert summary["sinks"] == {
        "my_sinks:Lines": {"written": 1, "dropped": 0}, "my_sinks:Missing": {"written": 0, "dropped": 1}
    }  # fmt: skip
    (line,) = summary["warnings"]
    assert line.startswith("tracking.sinks=my_sinks:Missing: it could not start (PluginError: ")
    assert lines_of(tmp_path / "run")[-1] == "close"
    run.close()


# ---------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tracking.sinks=[wandbb]"], "must be of wandb, trackio, mlflow, or module:class; nearest: wandb"),
        (["tracking.sinks=[my_sinks:Linse]"], "my_sinks has no Linse"),
        (["tracking.sinks=[nowhere:X]"], "nowhere"),
        (["tracking.sinks=[mlflow]", "tracking.sink_settings={mlflow: {url: x}}"],
         "tracking.sink_settings.mlflow.url=x: no such setting; mlflow takes experiment, uri"),
        (["tracking.sinks=[my_sinks:Lines]", "tracking.sink_settings={'my_sinks:Lines': {file: x}}"],
         "no such setting; my_sinks:Lines takes name"),
        (["tracking.sink_settings={wandb: {project: x}}"], "is in no tracking.sinks=[]"),
    ],
)  # fmt: skip
def test_a_tracker_or_setting_that_there_is_not_is_refused(mine: Config, arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        compose(arguments)
    assert words in str(error.value)


def test_a_tracker_that_is_not_installed_is_refused_before_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose(["tracking.sinks=[trackio]"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"tracking\.sinks=trackio: is not installed: pip install"):
        require_trackers(config)
    require_trackers(Config())


# ---------------------------------------------------------------------- the three


def faked(name: str, **contents: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(contents)
    return module


def played(name: str, run_dir: Path, settings: dict[str, Any] | None = None, resume: int = 0) -> None:
    sink = maker_of(name, settings or {}, run_dir)()
    sink.start({"learner.steps": 9, "reward.weights": {"accuracy": 1.0}}, "run-0a1b", resume)
    sink.write(1, {"loss/policy": 2.0, "reward/a,b": 1.0, "policy/clip/stale_0": 0.0})
    sink.text(1, "samples", "1 < 2")
    sink.write(0, {"eval/accuracy": 0.5})
    sink.close()


def test_wandb_takes_scores_of_earlier_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class FakeRun:
        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *a, **k: calls.append((name, *a, k) if k else (name, *a))

    def init(**keywords: Any) -> FakeRun:
        calls.append(keywords)
        return FakeRun()

    end = lambda: calls.append("teardown")  # noqa: E731
    fake = faked("wandb", init=init, Settings=lambda **k: k, Html=lambda text: text, teardown=end)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    played("wandb", tmp_path, {"project": "r1", "mode": "offline"})
    begun, *rest = calls
    assert (begun["id"], begun["name"], begun["dir"]) == ("run-0a1b", tmp_path.name, str(tmp_path))
    assert (begun["project"], begun["mode"], begun["resume"]) == ("r1", "offline", "allow")
    assert "entity" not in begun  # wandb's own default
    assert rest == [
        ("define_metric", "step", {"hidden": True}), ("define_metric", "*", {"step_metric": "step"}),
        ("log", {"step": 1, "loss/policy": 2.0, "reward/a,b": 1.0, "policy/clip/stale_0": 0.0}),
        ("log", {"step": 1, "samples/text": "<pre>1 &lt; 2</pre>"}), ("log", {"step": 0, "eval/accuracy": 0.5}),
        ("finish",), "teardown",
    ]  # fmt: skip


def test_trackio_goes_on_under_the_runs_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    run = SimpleNamespace(log=lambda *a, **k: calls.append((*a, k)), finish=lambda: calls.append("finish"))

    def init(**keywords: Any) -> Any:
        calls.append(keywords)
        return run

    monkeypatch.setitem(sys.modules, "trackio", faked("trackio", init=init, Markdown=lambda text: text))
    played("trackio", tmp_path)
    begun, *rest = calls
    assert (begun["name"], begun["resume"], begun["space_id"]) == ("run-0a1b", "allow", None)
    assert rest == [
        ({"loss/policy": 2.0, "reward/a,b": 1.0, "policy/clip/stale_0": 0.0}, {"step": 1}),
        ({"samples/text": "1 < 2"}, {"step": 1}),
        ({"eval/accuracy": 0.5}, {"step": 0}), "finish",
    ]  # fmt: skip


def test_mlflow_finds_the_run_of_an_earlier_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    found: list[Any] = []

    class Client:
        def __init__(self, uri: str) -> None:
            calls.append(uri)

        def get_experiment_by_name(self, name: str) -> Any:
            return None

        def create_experiment(self, name: str) -> str:
            return name

        def search_runs(self, experiments: list[str], query: str, max_results: int) -> list[Any]:
            calls.append(query)
            return found

        def create_run(self, experiment: str, tags: dict[str, str], run_name: str) -> Any:
            calls.append((experiment, tags, run_name))
            return SimpleNamespace(info=SimpleNamespace(run_id="m1"))

        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *a, **k: calls.append((name, *a, k))

    entities = faked("mlflow.entities", Metric=lambda *a: (a[0], a[1], a[3]), Param=lambda *a: a)
    for fake in (faked("mlflow"), entities, faked("mlflow.tracking", MlflowClient=Client)):
        monkeypatch.setitem(sys.modules, fake.__name__, fake)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    played("mlflow", tmp_path)
    assert calls == [
        (tmp_path / "mlruns").as_uri(), "tags.`offtrail.run_id` = 'run-0a1b'",
        ("offtrail", {"offtrail.run_id": "run-0a1b"}, tmp_path.name),
        ("log_batch", "m1", {"params": [("learner.steps", "9"), ("reward.weights", "{'accuracy': 1.0}")]}),
        ("log_batch", "m1", {"metrics": [
            ("loss/policy", 2.0, 1), ("reward/a_b", 1.0, 1), ("policy/clip.stale_0", 0.0, 1),
        ]}),
        ("log_text", "m1", "1 < 2", "samples/1.md", {}),
        ("log_batch", "m1", {"metrics": [("eval/accuracy", 0.5, 0)]}), ("set_terminated", "m1", {}),
    ]  # fmt: skip
    calls.clear()
    found.append(SimpleNamespace(info=SimpleNamespace(run_id="m1")))
    played("mlflow", tmp_path, {"uri": "http://there"}, resume=1)
    assert (calls[0], calls[2]) == ("http://there", ("update_run", "m1", {"status": "RUNNING"}))
    assert not [call for call in calls if "params" in str(call)]


@pytest.mark.filterwarnings("default")  # other people's
@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_the_real_package_has_what_it_was_told(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is installed (the extra `trackers`): twice, as after a resume, offline."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip(name, reason=f"{name} is not installed: pip install 'offtrail[trackers]'")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    settings = {"mode": "offline"} if name == "wandb" else {}
    config = Config()
    config.tracking.sinks, config.tracking.tensorboard = [name], False
    config.tracking.sink_settings = {name: settings}
    by_age = {"policy/clip_fraction": 0.5, "policy/clip_fraction/stale_0": 0.25}
    for steps in ((1, 2), (2, 3)):  # step 2 is replayed
        recorder = Recorder(tmp_path, config)
        recorder.restore([{"step": 1, "loss/policy": 1.0, **by_age}] if steps[0] == 2 else [])
        for step in steps:
            recorder.step({"step": step, "loss/policy": float(step), **by_age}, None, {"samples": f"answer {step}"})
        recorder.evaluation(steps[0] - 1, {"eval/accuracy": 0.25 * steps[0]})
        ended(recorder.sinks)
        assert recorder.sinks.lines == []
    assert {"wandb": of_wandb, "trackio": of_trackio, "mlflow": of_mlflow}[name](tmp_path) == (
        [(1, 1.0), (2, 2.0), (3, 3.0)], [(0, 0.25), (1, 0.5)],
    )  # fmt: skip


Told = tuple[list[tuple[int, float]], list[tuple[int, float]]]


def of_wandb(folder: Path) -> Told:
    """Of its offline files, which `wandb sync` sends: records in LevelDB's log format, behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    found: list[dict[str, Any]] = []
    for file in sorted((folder / "wandb").glob("offline-run-*/*.wandb")):
        data, at, whole = file.read_bytes(), 7, b""
        while at + 7 <= len(data):
            if (left := 32768 - at % 32768) < 7:
                at += left
                continue
            size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
            whole, at = whole + data[at + 7 : at + 7 + size], at + 7 + size
            if kind not in (1, 4):  # whole, or the last piece
                continue
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                found.append({item.key or item.nested_key[0]: json.loads(item.value_json) for item in items})
    return tuple(sorted((row["step"], row[key]) for row in found if key in row) for key in KEYS)  # type: ignore[return-value]


def of_trackio(folder: Path) -> Told:
    (file,) = (folder / "trackio").glob("*.db")
    with sqlite3.connect(file) as db:
        rows = [(step, json.loads(told)) for step, told in db.execute("SELECT step, metrics FROM metrics")]
    return tuple(sorted((step, told[key]) for step, told in rows if key in told) for key in KEYS)  # type: ignore[return-value]


def of_mlflow(folder: Path) -> Told:
    from mlflow.tracking import MlflowClient

    client = MlflowClient((folder / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("offtrail")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    history = (client.get_metric_history(run.info.run_id, key) for key in KEYS)
    return tuple(sorted((metric.step, metric.value) for metric in metrics) for metrics in history)  # type: ignore[return-value]


KEYS = ("loss/policy", "eval/accuracy")


# ---------------------------------------------------------------------- TensorBoard's table


def test_tensorboard_has_the_settings_that_decide_numbers(tmp_path: Path) -> None:
    for _ in range(2):  # a resumed run says them again, and is one row of the table
        recorder = Recorder(tmp_path, compose(["learner.optim.lr=1e-3", "staleness.max=4"]))
        recorder.restore([{"step": 3, "loss/policy": 1.0}])
        recorder.close()
    board = EventAccumulator(str(tmp_path / "tb"))
    board.Reload()
    told = metadata.parse_session_start_info_plugin_data(
        board.PluginTagToContent("hparams")[metadata.SESSION_START_INFO_TAG]
    )
    assert told.group_name == tmp_path.name
    assert told.hparams["learner.optim.lr"].number_value == 1e-3
    assert told.hparams["staleness.max"].number_value == 4
    assert told.hparams["algo.name"].string_value == "grpo"
    assert "run.dir" not in told.hparams
    assert "tracking.sinks" not in told.hparams
