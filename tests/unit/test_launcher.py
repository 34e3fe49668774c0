"""The launcher around its roles: what it removes, how it ends, and what it says. Fake processes, no torch in them."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from offtrail.platform.config.errors import ConfigError
from offtrail.platform.config.rundir import prepare
from offtrail.platform.config.schema import Config
from offtrail.platform.engines.sglang.lifecycle import ServerError
from offtrail.platform.launcher import jobs
from offtrail.platform.launcher import run as running
from offtrail.platform.launcher.hosts import Handle, LocalHandle
from offtrail.platform.launcher.run import Role, Run, watch
from offtrail.platform.runtime.context import RoleContext, remove_shared_memory, weights_folder
from offtrail.platform.runtime.process import FINAL_STATUS, check_device, is_final
from offtrail.platform.runtime.roles import RoleSpec
from offtrail.platform.tracking.summary import read_summary
from offtrail.platform.weights.probe import MismatchError
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
    monkeypatch.setattr(jobs, function, full)
    jobs.finish(tmp_path, "failed", "learner-0 exited with status 1", 1.0)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "offtrail: error: learner-0 exited with status 1"
    assert len(lines) == (1 if function == "report" else 2)
    assert all("No space left on device" in line for line in lines[1:])


def test_the_last_words_say_where_to_look(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def seen(name: str) -> list[str]:
        Path(name).touch()
        jobs.report(Path(), {"status": "completed"})
        return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()[1:]]

    assert seen("summary.json") == ["see summary.json"]
    assert seen("eval.png") == ["see eval.png", "summary.json"]
    assert seen("learning.png") == ["see learning.png", "eval.png", "summary.json"]


def test_the_last_words_are_those_of_the_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sft = {"status": "completed", "steps": 3, "loss/sft_first": 2.0, "loss/sft_last": 0.5, "tokens/trained": 1234}
    jobs.report(tmp_path, {**sft, "learner/busy_fraction": 0.5})
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "status completed", "learner steps 3", "loss 2.000 → 0.500", "tokens trained 1,234", "busy learner 0.50"
    ]  # fmt: skip
    refused = {"groups/refused": {"stale": 0, "failed": 3, "filtered": 2, "run_ended": 9}, "groups/admitted": 40}
    busy = {"learner/busy_fraction": 0.5, "generator/busy_fraction": None}
    jobs.report(tmp_path, {"status": "completed", **refused, **busy})
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "status completed",
        "groups refused 3 failed, 2 filtered, of 40",
        "busy learner / generator 0.50 / –",
    ]


def test_a_summary_that_was_cut_is_no_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "summary.json").write_text('{"status": ')
    jobs.finish(tmp_path, "failed", "why", 1.0)
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_a_disk_that_fills_at_the_start_is_a_failed_run(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "start"))

    monkeypatch.setattr(jobs, "prepare_start_model", full)
    assert jobs.launch(config, tmp_path) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert read_summary(tmp_path)["status"] == "failed"


def test_a_resume_that_is_refused_leaves_the_settings_of_the_run(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: object) -> None:
        raise ConfigError("the checkpoint is damaged")

    config.run.dir, config.run.name = str(tmp_path), "run"
    run_dir, lock = prepare(config)
    lock.close()
    before = (run_dir / "config.yaml").read_text()
    config.run.resume, config.learner.optim.lr = True, 0.125
    _, lock = prepare(config)
    monkeypatch.setattr(jobs, "prepare_start_model", lambda *_: None)
    monkeypatch.setattr(jobs, "check_what_is_there", refuses)
    with lock, pytest.raises(ConfigError):
        jobs.launch(config, run_dir)
    assert (run_dir / "config.yaml").read_text() == before


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


class Scripts:
    """Hosts on which every role is a Python script, that sleeps unless ``scripts`` says otherwise."""

    def __init__(self) -> None:
        self.scripts: list[str] = []
        self.started: list[str] = []
        self.closed = False

    def start(self, spec: RoleSpec, command: Sequence[str], log: Path) -> Handle:
        self.started.append(spec.name)
        code = self.scripts.pop(0) if self.scripts else "import time; time.sleep(300)"
        with log.open("ab") as out:
            return LocalHandle(spec.name, subprocess.Popen([sys.executable, "-c", code], stderr=out), log)

    def sweep(self) -> None:
        """They start nothing."""

    def close(self) -> None:
        self.closed = True


def child(role: Role) -> subprocess.Popen[bytes]:
    """The process of a role that these hosts started."""
    assert isinstance(role.handle, LocalHandle)
    return role.handle.process


@pytest.fixture
def hosts() -> Scripts:
    return Scripts()


@pytest.fixture
def run(config: Config, tmp_path: Path, hosts: Scripts) -> Iterator[Run]:
    """A run whose broker and learner sleep until they are ended."""
    run = Run(config, tmp_path, hosts)
    for spec in (RoleSpec("broker"), RoleSpec("learner")):
        run.roles.append(Role(spec, hosts.start(spec, [], tmp_path / f"{spec.name}.log")))
    yield run
    run.close()
    assert hosts.closed
    assert all(role.handle.poll() is not None for role in run.roles)


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
    monkeypatch.setattr(running, "LEAVE_SECONDS", 1e9)  # would run into the test's own limit
    status, reason = watch(run, [signal.SIGINT])
    assert (status, reason) == ("interrupted", "stopped by SIGINT")
    told = run.stop(status, reason)
    assert not told
    run.leave(told, completed=False)
    assert [child(role).returncode for role in run.roles] == [-signal.SIGTERM] * 2


def test_a_dead_broker_is_not_asked_and_the_others_are_terminated(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "LEAVE_SECONDS", 1e9)
    line = Line(WaitError("nobody there"))
    run.client = line  # type: ignore[assignment]
    child(run.roles[0]).kill()
    child(run.roles[0]).wait()
    status, reason = watch(run, [])
    assert status == "failed"
    assert "broker-0 was killed by SIGKILL" in reason
    told = run.stop(status, reason)
    run.leave(told, completed=False)
    assert (told, line.asked) == (False, [])
    assert child(run.roles[1]).returncode == -signal.SIGTERM


def test_a_broker_that_dies_while_it_is_told_is_not_waited_for(run: Run) -> None:
    class Dying(Line):
        def request(self, message: object, **_: object) -> tuple[object, list[object]]:
            child(run.roles[0]).kill()
            child(run.roles[0]).wait()
            return super().request(message)

    line = Dying(WaitError("silent"))
    run.client = line  # type: ignore[assignment]
    assert run.stop("failed", "why") is False
    assert len(line.asked) == 1


def test_what_a_role_said_before_it_died_is_the_reason(run: Run) -> None:
    failure = Failure(role="learner", index=0, error="ValueError: no room")
    run.client = Line(Status({}, [], {}, [failure], finished=False))  # type: ignore[assignment]
    child(run.roles[1]).kill()
    child(run.roles[1]).wait()
    assert watch(run, []) == ("failed", "learner-0: ValueError: no room")


def test_a_completed_run_waits_for_its_archive_as_long_as_the_broker_answers(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broker needs several times LEAVE_SECONDS, and leaves by itself."""
    monkeypatch.setattr(running, "LEAVE_SECONDS", 0.2)
    monkeypatch.setattr(running, "STATUS_PERIOD_S", 0.05)
    turns = []

    class Sealing(Line):
        def request(self, message: object, **_: object) -> tuple[object, list[object]]:
            turns.append(message)
            if len(turns) == 20:
                (run.run_dir / "sealed").touch()
            return super().request(message)

    code = f"import pathlib, time\nwhile not pathlib.Path({str(run.run_dir / 'sealed')!r}).exists(): time.sleep(.01)"
    child(run.roles[0]).kill()
    child(run.roles[0]).wait()
    run.roles[0].handle = LocalHandle("broker-0", process(code), run.run_dir / "broker-0.log")
    run.client = Sealing(Status({}, [], {}, [], finished=False))  # type: ignore[assignment]
    run.leave(told=True, completed=True)
    assert child(run.roles[0]).returncode == 0
    assert len(turns) >= 20


def test_a_broker_that_falls_silent_over_its_archive_is_ended(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "LEAVE_SECONDS", 0.2)
    run.client = Line(WaitError("silent"))  # type: ignore[assignment]
    run.leave(told=True, completed=True)
    assert child(run.roles[0]).returncode == -signal.SIGTERM


# Restarts

GENERATOR = RoleSpec("generator", restarts=2, restarts_key="generator.max_restarts")


def dead_generator(run: Run, code: str) -> Role:
    """A generator that has ended by ``code``, in the run."""
    log = run.run_dir / "generator-0.log"
    run.hosts.scripts.append(code)  # type: ignore[attr-defined]
    role = Role(GENERATOR, run.hosts.start(GENERATOR, [], log))
    child(role).wait()
    run.roles.append(role)
    return role


def script(code: int) -> str:
    return f"raise SystemExit({code})"


def test_a_killed_generator_is_started_again_and_the_broker_hears_of_it_first(
    run: Run, hosts: Scripts, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(running, "STATUS_PERIOD_S", 0.0)
    run.config.tracking.progress = "plain"
    role = dead_generator(run, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    before, dead = len(hosts.started), role.handle.pid

    class Broker(Line):
        def request(self, message: object, **_: object) -> tuple[object, list[object]]:
            if isinstance(message, Failure):
                assert len(hosts.started) == before  # its leases are back before another process can ask for any
            super().request(message)
            return Status({}, [], {}, [], finished=role.restarts == 1), []

    line = Broker(None)
    run.client = line  # type: ignore[assignment]
    assert watch(run, []) == ("completed", "")
    [death] = [message for message in line.asked if isinstance(message, Failure)]
    assert (death.role, death.index, death.final, death.pid) == ("generator", 0, False, dead)
    assert death.error.startswith("generator-0 was killed by SIGKILL")
    assert (hosts.started[before:], role.handle.poll()) == (["generator-0"], None)
    assert "started again (1 of generator.max_restarts=2)" in capsys.readouterr().out


def test_a_generator_that_always_dies_ends_the_run_after_its_restarts_with_its_last_words(
    run: Run, hosts: Scripts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "STATUS_PERIOD_S", 0.05)
    dies = "raise RuntimeError('no memory left')"
    role = dead_generator(run, dies)
    hosts.scripts += [dies] * 5
    run.client = Line(Status({}, [], {}, [], finished=False))  # type: ignore[assignment]
    status, reason = watch(run, [])
    assert (status, role.restarts, hosts.started.count("generator-0")) == ("failed", 2, 3)
    assert "last words: RuntimeError: no memory left" in reason
    assert reason.endswith("after 2 restarts (generator.max_restarts=2)")


@pytest.mark.parametrize("code", [0, FINAL_STATUS])
def test_who_leaves_before_the_end_or_by_a_mistake_of_the_user_is_not_started_again(
    code: int, run: Run, hosts: Scripts
) -> None:
    dead_generator(run, script(code))
    run.client = Line(Status({}, [], {}, [], finished=False))  # type: ignore[assignment]
    status, reason = watch(run, [])
    assert (status, hosts.started.count("generator-0")) == ("failed", 1)
    assert reason.startswith(f"generator-0 exited with status {code}")


def test_a_dead_broker_ends_the_run_though_a_generator_could_be_started_again(run: Run, hosts: Scripts) -> None:
    dead_generator(run, script(1))
    child(run.roles[0]).kill()
    child(run.roles[0]).wait()
    status, reason = watch(run, [])
    assert (status, hosts.started.count("generator-0")) == ("failed", 1)
    assert reason.startswith("broker-0 was killed by SIGKILL")


@pytest.mark.parametrize(
    ("error", "final"),
    [
        (ValueError("engine.device=cuda: no such device"), True),
        (MismatchError("the probe alarms"), True),
        (ServerError("a server does not start"), True),
        (ImportError("no module named sglang"), True),
        (ConfigError("scorer.models.rm.path=DIR: holds no tokenizer"), True),
        (RuntimeError("out of memory"), False),
        (OSError("a disk that went away"), False),
    ],
)
def test_what_would_come_again_in_every_process_is_final(error: Exception, final: bool) -> None:
    assert is_final(error) is final


# Signals


def test_the_first_signal_is_noted_and_said_and_the_second_ends_at_once(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def job(config: Config, run_dir: Path, interrupted: list[int]) -> tuple[str, str]:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupted == [signal.SIGINT]
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the second signal was lost")

    monkeypatch.setitem(jobs.JOBS, "rl", job)
    assert jobs.launch(config, tmp_path) == 130
    assert capfd.readouterr().err.startswith("stopping")
    assert read_summary(tmp_path)["reason"] == "stopped at once by a second signal, SIGTERM"


@pytest.mark.parametrize("signum", jobs.STOPS)
def test_every_signal_that_ends_a_job_ends_the_run_as_interrupted(
    signum: signal.Signals, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a closed terminal and of a cluster may come several times, and cut nothing short."""

    def job(config: Config, run_dir: Path, interrupted: list[int]) -> tuple[str, str]:
        os.kill(os.getpid(), signum)
        if signum not in jobs.URGENT:
            os.kill(os.getpid(), signum)
        return "interrupted", f"stopped by {signal.Signals(interrupted[0]).name}"

    monkeypatch.setitem(jobs.JOBS, "rl", job)
    before = signal.signal(signum, signal.SIG_DFL)  # the suite itself may have been started by nohup
    try:
        assert jobs.launch(config, tmp_path) == 130
        assert signal.getsignal(signum) == signal.SIG_DFL
    finally:
        signal.signal(signum, before)
    summary = read_summary(tmp_path)
    assert (summary["status"], summary["reason"]) == ("interrupted", f"stopped by {signum.name}")


def test_what_the_launcher_was_started_to_ignore_stays_ignored(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def job(config: Config, run_dir: Path, interrupted: list[int]) -> tuple[str, str]:
        os.kill(os.getpid(), signal.SIGHUP)
        return "completed", f"{interrupted}"

    monkeypatch.setitem(jobs.JOBS, "rl", job)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        assert jobs.launch(config, tmp_path) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert read_summary(tmp_path)["reason"] == "[]"


@pytest.mark.parametrize("follows", [True, False])
def test_a_role_that_heard_a_signal_before_the_launcher_did_is_no_failure(
    follows: bool, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a cluster sends SIGTERM to all processes of a job, one by one."""
    monkeypatch.setattr(running, "STATUS_PERIOD_S", 0.0)
    monkeypatch.setattr(running, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(running, "SIGNAL_SECONDS", 1e9 if follows else 0.0)
    run.client = Line(Status({}, [], {}, [], finished=False))  # type: ignore[assignment]
    child(run.roles[1]).terminate()
    child(run.roles[1]).wait()
    interrupted: list[int] = []
    if follows:
        timer = threading.Timer(0.2, lambda: interrupted.append(signal.SIGTERM))
        timer.start()
    status, reason = watch(run, interrupted)
    if follows:
        timer.join()
        assert (status, reason) == ("interrupted", "stopped by SIGTERM")
    else:
        assert (status, reason.partition(" (")[0]) == ("failed", "learner-0 was killed by SIGTERM")


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
