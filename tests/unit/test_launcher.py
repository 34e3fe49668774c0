"""The launcher around its roles: what it removes, how it ends, and what it says. Fake processes, no torch in them."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from offtrail.platform.config.schema import Config
from offtrail.platform.launcher import local
from offtrail.platform.launcher.local import Role, Run, watch
from offtrail.platform.runtime.context import RoleContext, remove_shared_memory, weights_folder
from offtrail.platform.runtime.process import check_device
from offtrail.platform.tracking.recorder import read_rows
from offtrail.platform.tracking.summary import read_summary
from offtrail.platform.weights.store import Publisher
from offtrail.platform.wire.codec import WireError
from offtrail.platform.wire.messages import Acknowledged, Failure, Status
from offtrail.platform.wire.sockets import RefusedError, WaitError


@pytest.fixture
def config() -> Config:
    """Quiet."""
    config = Config()
    config.tracking.progress, config.tracking.tensorboard = "off", False
    return config


# What is removed


def test_weights_dir_keeps_everything_that_is_not_the_channels(config: Config, tmp_path: Path) -> None:
    place, run_dir = tmp_path / "place", tmp_path / "run"
    place.mkdir()
    (place / "thesis.tex").write_text("mine")
    config.weights.dir = str(place)
    folder = weights_folder(config, run_dir)
    assert folder.parent == place
    publisher = Publisher(folder)
    publisher.publish(3, {"w": torch.zeros(2)})
    publisher.pin(3)
    publisher.close()
    (folder / "writing" / ".tmpXYZ").write_text("unfinished")
    (folder / "notes.txt").write_text("mine too")
    remove_shared_memory(config, run_dir)
    assert sorted(path.name for path in place.rglob("*")) == sorted([folder.name, "notes.txt", "thesis.tex"])
    (folder / "notes.txt").unlink()
    remove_shared_memory(config, run_dir)
    assert [path.name for path in place.iterdir()] == ["thesis.tex"]
    remove_shared_memory(config, run_dir)  # nothing left is no error


@pytest.mark.parametrize("channel", ["ipc", "distributed"])
def test_what_a_channel_without_files_left_goes(config: Config, tmp_path: Path, channel: str) -> None:
    """A pinned version for the evaluator, and what a killed learner had open."""
    config.weights.channel, config.weights.dir = channel, str(tmp_path)  # type: ignore[assignment]
    folder = weights_folder(config, tmp_path / "run")
    publisher = Publisher(folder)
    publisher.publish(1, {"w": torch.zeros(2)})
    publisher.pin(1)
    publisher.close()
    for name in ("v00000002.json", "handles.sock"):
        (folder / name).write_text("{}")
    remove_shared_memory(config, tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_a_channel_on_disk_stays_for_a_resume(config: Config, tmp_path: Path) -> None:
    config.weights.channel = "disk"
    for place in ("", str(tmp_path / "place")):
        config.weights.dir = place
        folder = weights_folder(config, tmp_path / "run")
        Publisher(folder).publish(1, {"w": torch.zeros(2)})
        remove_shared_memory(config, tmp_path / "run")
        assert (folder / "v00000001.safetensors").is_file()


def test_two_runs_never_share_a_folder(config: Config, tmp_path: Path) -> None:
    for place in ("", str(tmp_path)):
        config.weights.dir = place
        folders = {weights_folder(config, tmp_path / name) for name in ("a", "b")}
        assert len(folders) == 2


# The end on a full disk


@pytest.mark.parametrize("function", ["write_summary", "learning_curve", "report"])
def test_a_full_disk_costs_a_line_and_hides_no_reason(
    function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    monkeypatch.setattr(local, function, full)
    assert local.finish(tmp_path, "failed", "learner-0 exited with status 1", 1.0) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "offtrail: error: learner-0 exited with status 1"
    assert len(lines) == (1 if function == "report" else 2)
    assert all("No space left on device" in line for line in lines[1:])


def test_a_summary_that_was_cut_is_no_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "summary.json").write_text('{"status": ')
    assert local.finish(tmp_path, "failed", "why", 1.0) == 1
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_a_disk_that_fills_at_the_start_is_a_failed_run(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "start"))

    monkeypatch.setattr(local, "prepare_start_model", full)
    assert local.launch(config, tmp_path) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert read_summary(tmp_path)["status"] == "failed"


# Answers that cannot be used


class Line:
    """A client whose every request is answered, or raises, in the same way."""

    def __init__(self, answer: object) -> None:
        self.answer, self.asked = answer, []  # type: ignore[var-annotated]

    def request(self, message: object, **_: object) -> tuple[object, list[object]]:
        self.asked.append(message)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer, []

    def close(self) -> None:
        """Nothing is open."""


def process(code: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code])


@pytest.fixture
def run(config: Config, tmp_path: Path) -> Iterator[Run]:
    """A run whose broker and learner sleep until they are ended."""
    run = Run(config, tmp_path)
    for name in ("broker-0", "learner-0"):
        run.roles.append(Role(name, process("import time; time.sleep(300)"), tmp_path / f"{name}.log"))
    yield run
    run.close()
    assert all(role.process.poll() is not None for role in run.roles)


@pytest.mark.parametrize("answer", [WireError("not a message"), RefusedError("a damaged ledger"), Acknowledged()])
def test_an_answer_that_cannot_be_used_fails_the_run_in_one_line(run: Run, answer: object) -> None:
    run.client = Line(answer)  # type: ignore[assignment]
    status, reason = watch(run, [])
    assert status == "failed"
    assert "\n" not in reason
    assert any(words in reason for words in ("not a message", "a damaged ledger", "answered Acknowledged"))
    if not isinstance(answer, Acknowledged):
        assert run.stop(status, reason) is False


def test_a_damaged_endpoint_fails_the_run(run: Run) -> None:
    (run.run_dir / "endpoint.json").write_text("{")
    status, reason = watch(run, [])
    assert status == "failed"
    assert "endpoint.json is not an endpoint" in reason
    assert run.stop(status, reason) is False


# Who is told of the end, and how long the rest may take


def test_before_the_broker_is_up_the_roles_are_terminated_at_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "LEAVE_SECONDS", 1e9)  # would run into the test's own limit
    status, reason = watch(run, [signal.SIGINT])
    assert (status, reason) == ("interrupted", "stopped by SIGINT")
    told = run.stop(status, reason)
    assert not told
    run.leave(told, completed=False)
    assert [role.process.returncode for role in run.roles] == [-signal.SIGTERM] * 2


def test_a_dead_broker_is_not_asked_and_the_others_are_terminated(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "LEAVE_SECONDS", 1e9)
    line = Line(WaitError("nobody there"))
    run.client = line  # type: ignore[assignment]
    run.roles[0].process.kill()
    run.roles[0].process.wait()
    status, reason = watch(run, [])
    assert status == "failed"
    assert "broker-0 was killed by SIGKILL" in reason
    told = run.stop(status, reason)
    run.leave(told, completed=False)
    assert (told, line.asked) == (False, [])
    assert run.roles[1].process.returncode == -signal.SIGTERM


def test_a_broker_that_dies_while_it_is_told_is_not_waited_for(run: Run) -> None:
    class Dying(Line):
        def request(self, message: object, **_: object) -> tuple[object, list[object]]:
            run.roles[0].process.kill()
            run.roles[0].process.wait()
            return super().request(message)

    line = Dying(WaitError("silent"))
    run.client = line  # type: ignore[assignment]
    assert run.stop("failed", "why") is False
    assert len(line.asked) == 1


def test_what_a_role_said_before_it_died_is_the_reason(run: Run) -> None:
    failure = Failure(role="learner", index=0, error="ValueError: no room")
    run.client = Line(Status({}, [], {}, [failure], finished=False))  # type: ignore[assignment]
    run.roles[1].process.kill()
    run.roles[1].process.wait()
    assert watch(run, []) == ("failed", "learner-0: ValueError: no room")


def test_a_completed_run_waits_for_its_archive_as_long_as_the_broker_answers(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broker needs several times LEAVE_SECONDS, and leaves by itself."""
    monkeypatch.setattr(local, "LEAVE_SECONDS", 0.2)
    monkeypatch.setattr(local, "STATUS_PERIOD_S", 0.05)
    turns = []

    class Sealing(Line):
        def request(self, message: object, **_: object) -> tuple[object, list[object]]:
            turns.append(message)
            if len(turns) == 20:
                (run.run_dir / "sealed").touch()
            return super().request(message)

    code = f"import pathlib, time\nwhile not pathlib.Path({str(run.run_dir / 'sealed')!r}).exists(): time.sleep(.01)"
    run.roles[0].process.kill()
    run.roles[0].process.wait()
    run.roles[0].process = process(code)
    run.client = Sealing(Status({}, [], {}, [], finished=False))  # type: ignore[assignment]
    run.leave(told=True, completed=True)
    assert run.roles[0].process.returncode == 0
    assert len(turns) >= 20


def test_a_broker_that_falls_silent_over_its_archive_is_ended(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "LEAVE_SECONDS", 0.2)
    run.client = Line(WaitError("silent"))  # type: ignore[assignment]
    run.leave(told=True, completed=True)
    assert run.roles[0].process.returncode == -signal.SIGTERM


# Signals


def test_the_first_signal_is_noted_and_said_and_the_second_ends_at_once(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def job(config: Config, run_dir: Path, interrupted: list[int]) -> tuple[str, str]:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupted == [signal.SIGINT]
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the second signal was lost")

    monkeypatch.setitem(local.JOBS, "rl", job)
    assert local.launch(config, tmp_path) == 130
    assert capfd.readouterr().err.startswith("stopping")
    assert read_summary(tmp_path)["reason"] == "stopped at once by a second signal, SIGTERM"


# job=sft


def supervised(config: Config, run_dir: Path, monkeypatch: pytest.MonkeyPatch, *, fails: bool = False) -> list[Path]:
    """Launch job=sft with a training that tells two rows; the targets that were asked for."""
    asked: list[Path] = []

    def train(
        run_dir: Path,
        target: Path,
        title: str,
        config: Config,
        interrupted: list[int],
        record: Callable[[dict[str, float]], None],
    ) -> None:
        asked.append(target)
        for step, loss in ((1, 3.5), (2, 3.0)):
            record({"step": step, "steps": 2, "loss": loss})
        if fails:
            raise KeyboardInterrupt("stopped by SIGINT in the sft, after step 2")
        target.mkdir(parents=True)

    monkeypatch.setattr(local, "run_sft", train)
    config.job, config.sft.steps = "sft", 2
    assert local.launch(config, run_dir) == (130 if fails else 0)
    return asked


def test_a_supervised_run_leaves_metrics_a_curve_and_a_summary(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.tracking.tensorboard = True
    supervised(config, tmp_path, monkeypatch)
    assert read_rows(tmp_path) == [{"step": 1, "loss/sft": 3.5}, {"step": 2, "loss/sft": 3.0}]
    summary = read_summary(tmp_path)
    assert (summary["status"], summary["steps"], summary["seed"]) == ("completed", 2, 0)
    assert (summary["loss/sft_first"], summary["loss/sft_last"]) == (3.5, 3.0)
    assert (tmp_path / "learning.png").stat().st_size > 1000
    assert list((tmp_path / "tb").iterdir())


def test_a_resumed_supervised_run_that_was_finished_is_completed_at_once(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(supervised(config, tmp_path, monkeypatch)) == 1
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert supervised(config, tmp_path, monkeypatch) == []
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert read_summary(tmp_path)["loss/sft_last"] == 3.0


def test_an_interrupted_supervised_run_begins_again_and_says_nothing_twice(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervised(config, tmp_path, monkeypatch, fails=True)
    summary = read_summary(tmp_path)
    assert (summary["status"], summary["steps"]) == ("interrupted", 2)
    assert summary["reason"] == "stopped by SIGINT in the sft, after step 2"
    supervised(config, tmp_path, monkeypatch)
    assert [row["step"] for row in read_rows(tmp_path)] == [1, 2]
    assert "reason" not in read_summary(tmp_path)


# Devices


@pytest.mark.parametrize(
    ("role", "key"),
    [("learner", "learner.device"), ("generator", "engine.device"), ("evaluator", "engine.device"), ("broker", "")],
)
def test_a_role_names_the_device_that_is_not_there(
    role: str, key: str, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.learner.device = config.engine.device = "cuda:1"
    context = RoleContext(config, tmp_path, role, 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if not key:
        check_device(context)
        return
    with pytest.raises(ValueError, match=rf"^{key}=cuda:1: torch .* finds no CUDA device .*; take {key}=cpu"):
        check_device(context)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=rf"^{key}=cuda:1: this machine has 1, counted from cuda:0"):
        check_device(context)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_device(context)
