"""The cold-start cache: one checkpoint for each thing that decides the weights, and for nothing else."""

import dataclasses
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from offtrail.platform.config.schema import Config, ModelConfig, SftConfig
from offtrail.platform.launcher import start
from offtrail.platform.launcher.start import (
    cache_dir,
    cache_key,
    cold_start,
    prepare_start_model,
    run_sft,
)
from offtrail.platform.model.start import StartError, resolve
from offtrail.tasks.addition import AdditionConfig


def test_cache_key_is_decided_by_what_decides_the_weights():
    base = Config()
    changed = [
        dataclasses.replace(base, model=ModelConfig(layers=4)),
        dataclasses.replace(base, task=AdditionConfig()),
        dataclasses.replace(base, sft=SftConfig(lr=1e-3)),
    ]
    assert len({cache_key(c) for c in [base, *changed]}) == 4
    unrelated = [
        dataclasses.replace(base, model=ModelConfig(path="elsewhere")),
        dataclasses.replace(base, run=dataclasses.replace(base.run, name="x", seed=1)),
        dataclasses.replace(base, learner=dataclasses.replace(base.learner, steps=7)),
    ]
    assert {cache_key(c) for c in unrelated} == {cache_key(base)}


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("OFFTRAIL_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("OFFTRAIL_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_dir() == tmp_path / "home" / ".cache" / "offtrail"


def test_a_relative_cache_folder_makes_no_dangling_link(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OFFTRAIL_CACHE", "cache")
    assert cache_dir() == tmp_path / "cache"
    (tmp_path / "cache" / cache_key(Config())).mkdir(parents=True)
    (tmp_path / "runs" / "a").mkdir(parents=True)
    prepare_start_model(Config(), Path("runs/a"), [])
    assert (tmp_path / "runs" / "a" / "start").is_dir()


# The name of a model


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hugging Face cache that holds one model, and no network."""

    def refused(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(socket, "create_connection", refused)
    monkeypatch.setattr(socket.socket, "connect", refused)
    commit = "0" * 40
    snapshot = tmp_path / "models--some--model" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text(commit)
    return snapshot


def test_a_name_is_looked_up_in_the_local_cache_alone(hub):
    assert resolve("some/model") == hub
    with pytest.raises(StartError, match=r"model\.path=some/other: neither .* hf download some/other"):
        resolve("some/other")


def test_a_directory_is_taken_as_it_is(tmp_path):
    assert resolve(str(tmp_path)) == tmp_path


# The process of the cold start


def fake_sft(monkeypatch, code):
    """Let run_sft start this code instead of the module: its arguments are CONFIG and TARGET."""

    def popen(command, **settings):
        return POPEN([sys.executable, "-c", code, *command[3:]], **settings)

    monkeypatch.setattr(start.subprocess, "Popen", popen)


POPEN = subprocess.Popen
MAKES = "import os, sys; os.makedirs(sys.argv[2]); "
TELLS = 'print(\'{"step": 1, "steps": 2, "loss": 3.5}\'); print(\'{"step": 2, "steps": 2, "loss": 3.0}\'); '


def quiet():
    config = Config()
    config.tracking.progress = "off"
    return config


def test_rows_of_progress_are_recorded(monkeypatch, tmp_path):
    fake_sft(monkeypatch, TELLS)
    rows = []
    run_sft(tmp_path, tmp_path / "target", "training", quiet(), [], rows.append)
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 3.5), (2, 3.0)]


def test_a_signal_is_noticed_before_the_first_line(monkeypatch, tmp_path):
    """The process would print nothing for longer than the test may take."""
    fake_sft(monkeypatch, "import time; time.sleep(3000)")
    interrupted = []
    timer = threading.Timer(0.5, interrupted.append, [signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt, match="stopped by SIGINT in the cold start, after step 0"):
        run_sft(tmp_path, tmp_path / "target", "cold start", quiet(), interrupted)
    timer.join()


def test_a_cold_start_that_another_launch_finished_meanwhile_is_used(monkeypatch, tmp_path):
    monkeypatch.setenv("OFFTRAIL_CACHE", str(tmp_path / "cache"))
    fake_sft(monkeypatch, MAKES + "raise FileExistsError(sys.argv[2])")
    assert cold_start(quiet(), tmp_path, []) == tmp_path / "cache" / cache_key(quiet())
    fake_sft(monkeypatch, "raise SystemExit('out of memory')")
    config = quiet()
    config.sft.seed = 1
    with pytest.raises(StartError, match="cold start failed: out of memory"):
        cold_start(config, tmp_path, [])


def test_of_two_launches_at_once_one_makes_the_start_model(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("OFFTRAIL_CACHE", str(tmp_path / "cache"))
    fake_sft(monkeypatch, "import time; time.sleep(1); " + MAKES)
    target = tmp_path / "cache" / cache_key(quiet())
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    threads = [threading.Thread(target=cold_start, args=(quiet(), tmp_path / name, [])) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert target.is_dir()
    assert len(list(tmp_path.glob("*/logs/sft-0.log"))) == 1
    assert "waiting for another run" in capsys.readouterr().out


def test_waiting_for_another_launch_can_be_interrupted(tmp_path):
    target = tmp_path / "key"
    with (
        start.only_one(target, []),
        pytest.raises(KeyboardInterrupt, match="stopped by SIGTERM while another run"),
        start.only_one(target, [signal.SIGTERM]),
    ):
        pass
