"""The cold-start cache: one checkpoint for each thing that decides the weights, and for nothing else."""

import contextlib
import dataclasses
import shutil
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from offtrail.platform.config.compose import load_config
from offtrail.platform.config.schema import Config, ModelConfig, SftConfig
from offtrail.platform.launcher import start
from offtrail.platform.launcher.start import (
    cache_dir,
    cache_key,
    cold_start,
    cold_start_config,
    prepare_start_model,
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


def test_cache_key_follows_what_stands_in_the_file_of_examples(tmp_path):
    config = Config(sft=SftConfig(path=str(tmp_path / "f")))
    (tmp_path / "f").write_text("one")
    first = cache_key(config)
    (tmp_path / "f").write_text("other")
    assert cache_key(config) != first


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
    prepare_start_model(Config(), Path("runs/a"), [], fails)
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


# The run of the cold start


def quiet():
    config = Config()
    config.tracking.progress = "off"
    return config


def trains(config, folder, interrupted):
    """A run of job=sft that leaves its last checkpoint at once."""
    assert load_config(folder / "config.yaml").job == config.job == "sft"
    checkpoint = folder / "checkpoints" / f"step_{config.sft.steps}"
    (checkpoint / "trainer").mkdir(parents=True)
    for name in ("model.safetensors", "config.json", "trainer.json", "trainer/optimizer.safetensors"):
        (checkpoint / name).write_text(name)
    return "completed", ""


def test_the_cold_start_is_a_run_of_its_own_whose_model_is_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("OFFTRAIL_CACHE", str(tmp_path / "cache"))
    target = cold_start(quiet(), tmp_path / "run", [], trains)
    assert target == tmp_path / "cache" / cache_key(quiet())
    assert sorted(file.name for file in target.iterdir()) == ["config.json", "manifest.json", "model.safetensors"]
    assert (tmp_path / "run" / "stages" / "1_cold_start" / "config.yaml").is_file()
    assert cold_start(quiet(), tmp_path / "other", [], fails) == target
    assert not (tmp_path / "other").exists()


def test_a_cold_start_that_was_damaged_in_the_cache_is_named_with_the_folder_to_delete(monkeypatch, tmp_path):
    monkeypatch.setenv("OFFTRAIL_CACHE", str(tmp_path / "cache"))
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    prepare_start_model(quiet(), tmp_path / "a", [], trains)
    target = tmp_path / "cache" / cache_key(quiet())
    (target / "model.safetensors").write_text("model.safetensorz")
    for run_dir in (tmp_path / "a", tmp_path / "b"):  # resumed, and new
        with pytest.raises(
            StartError, match=rf"safetensors is not as it was written: .*; delete {target}, and it is made"
        ):
            prepare_start_model(quiet(), run_dir, [], fails)
    shutil.rmtree(target)
    prepare_start_model(quiet(), tmp_path / "c", [], trains)


def fails(config, folder, interrupted):
    return "failed", "learner-0: out of memory"


def test_a_cold_start_that_fails_or_is_interrupted_says_so_and_keeps_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("OFFTRAIL_CACHE", str(tmp_path / "cache"))
    with pytest.raises(StartError, match="cold start failed: learner-0: out of memory"):
        cold_start(quiet(), tmp_path / "run", [], fails)
    with pytest.raises(KeyboardInterrupt, match="stopped by SIGINT in the cold start"):
        cold_start(quiet(), tmp_path / "run", [], lambda *_: ("interrupted", "stopped by SIGINT"))
    assert not (tmp_path / "cache" / cache_key(quiet())).exists()


def test_the_settings_of_reinforcement_learning_do_not_reach_the_cold_start():
    config = quiet()
    config.learner.optim.grad_clip, config.learner.ranks, config.learner.threads = 0.1, 4, 2
    stage = cold_start_config(config)
    assert (stage.learner.optim.grad_clip, stage.learner.ranks, stage.learner.threads) == (1.0, 1, 2)
    assert stage.learner.checkpoint_every == stage.steps == config.sft.steps


def test_job_sft_without_a_model_leaves_its_start_to_the_learner(tmp_path):
    config = quiet()
    config.job = "sft"
    prepare_start_model(config, tmp_path, [], fails)
    assert not (tmp_path / "start").exists()


def test_of_two_launches_at_once_one_makes_the_start_model(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("OFFTRAIL_CACHE", str(tmp_path / "cache"))
    began, waiting = [], threading.Event()

    def slow(config, folder, interrupted):
        began.append(folder)
        waiting.wait(20)
        return trains(config, folder, interrupted)

    def other():
        with contextlib.suppress(KeyboardInterrupt):
            cold_start(quiet(), tmp_path / "b", [], slow)

    threads = [threading.Thread(target=cold_start, args=(quiet(), tmp_path / "a", [], slow))]
    threads[0].start()
    while not began:
        time.sleep(0.01)
    threads.append(threading.Thread(target=other))
    threads[1].start()
    told = ""
    while "waiting for another run" not in told:
        told += capsys.readouterr().out
        time.sleep(0.01)
    waiting.set()
    for thread in threads:
        thread.join()
    assert began == [tmp_path / "a" / "stages" / "1_cold_start"]


def test_waiting_for_another_launch_can_be_interrupted(tmp_path):
    target = tmp_path / "key"
    with (
        start.only_one(target, []),
        pytest.raises(KeyboardInterrupt, match="stopped by SIGTERM while another run"),
        start.only_one(target, [signal.SIGTERM]),
    ):
        pass
