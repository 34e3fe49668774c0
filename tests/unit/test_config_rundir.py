"""The run directory: one launch makes it, one launch holds it, its config.yaml repeats the run."""

import fcntl
import os
import re
import subprocess
import sys
import threading

import pytest

from offtrail.platform.config import rundir
from offtrail.platform.config.compose import compose, load_config
from offtrail.platform.config.errors import ConfigError
from offtrail.platform.config.rundir import default_name, prepare, save


@pytest.fixture
def where(tmp_path):
    return f"run.dir={tmp_path / 'runs'}"


def launched(*argv):
    """The run directory of a launch that is over."""
    run_dir, lock = prepare(compose(argv))
    save(run_dir)
    lock.close()
    return run_dir


def test_it_holds_a_configuration_that_repeats_the_run(where, tmp_path):
    run_dir = launched(where, "run.name=a", "run.seed=5")
    assert run_dir == tmp_path / "runs" / "a"
    again = compose([str(run_dir / "config.yaml")])
    assert (again.run.name, again.run.resume, again.run.seed) == ("", False, 5)
    assert load_config(run_dir / "config.yaml") == again
    assert sorted(path.name for path in run_dir.iterdir()) == [".lock", "config.yaml"]


def test_default_name():
    stamp = r"\d{8}-\d{6}"
    assert re.fullmatch(f"rl-chain-grpo-{stamp}", default_name(compose([])))
    assert re.fullmatch(f"sft-addition-{stamp}", default_name(compose(["job=sft", "task=addition"])))


def test_default_names_get_a_suffix_when_taken(where, monkeypatch):
    monkeypatch.setattr(rundir, "default_name", lambda config: "rl-x")
    config = compose([where])
    assert launched(where).name == "rl-x"
    assert launched(where).name == "rl-x-2"
    run_dir, lock = prepare(config)
    lock.close()
    assert config.run.name == run_dir.name == "rl-x-3"


def test_a_name_that_exists_is_refused(where):
    launched(where, "run.name=a")
    with pytest.raises(ConfigError, match=r"^run\.name=a: .*runs/a exists; go on with it by run\.resume=true"):
        launched(where, "run.name=a")


def test_of_launches_at_once_one_gets_the_name(where):
    config = [where, "run.name=a"]
    gate, outcomes = threading.Barrier(8), []

    def launch():
        mine = compose(config)
        gate.wait()
        try:
            outcomes.append(prepare(mine)[1])
        except ConfigError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=launch) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused = [outcome for outcome in outcomes if isinstance(outcome, ConfigError)]
    assert len(refused) == 7
    for outcome in outcomes:
        if not isinstance(outcome, ConfigError):
            outcome.close()


def test_resume_keeps_the_directory_and_saves_what_changed(where):
    run_dir = launched(where, "run.name=a", "learner.steps=4")
    assert launched(where, "run.name=a", "run.resume=true", "learner.steps=8") == run_dir
    assert load_config(run_dir / "config.yaml").learner.steps == 8


def test_settings_of_a_resume_that_is_refused_are_not_the_runs(where):
    """Of a recipe and its stage they are saved together, so that neither is ahead of the other."""
    whole = launched(where, "run.name=a", "learner.steps=4")
    place = f"run.dir={whole / 'stages'}"
    stage = launched(place, "run.name=1_rl", "learner.steps=4")
    resumed = ("run.resume=true", "learner.steps=8")
    for argv in ((where, "run.name=a"), (place, "run.name=1_rl")):
        prepare(compose([*argv, *resumed]))[1].close()
    assert [load_config(run_dir / "config.yaml").learner.steps for run_dir in (whole, stage)] == [4, 4]
    save(stage)
    assert [load_config(run_dir / "config.yaml").learner.steps for run_dir in (whole, stage)] == [8, 8]


def test_a_run_that_is_still_going_is_not_resumed(where):
    _, lock = prepare(compose([where, "run.name=a"]))
    with pytest.raises(ConfigError, match=r"^run\.name=a: .* is still running"):
        prepare(compose([where, "run.name=a", "run.resume=true"]))
    lock.close()
    launched(where, "run.name=a", "run.resume=true")


def test_an_unwritable_directory_is_named(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "runs", "/proc/runs"):
        with pytest.raises(ConfigError, match=rf"^run\.dir={folder}: cannot be written \("):
            prepare(compose([f"run.dir={folder}"]))


def test_a_full_disk_leaves_no_half_run(where, monkeypatch, tmp_path):
    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rundir.os, "replace", full)
    with pytest.raises(ConfigError, match=r"cannot be written \(No space left on device\)"):
        prepare(compose([where, "run.name=a"]))
    assert list((tmp_path / "runs").iterdir()) == []


def test_what_a_killed_launch_left_is_waited_for_and_a_living_one_is_not(where, tmp_path, monkeypatch):
    """The reaper of a killed launch holds the lock under the pid of a process that is gone."""
    launched(where, "run.name=a")
    path = tmp_path / "runs" / "a" / ".lock"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    again = compose([where, "run.name=a", "run.resume=true"])
    with path.open("w") as reaper:
        fcntl.flock(reaper, fcntl.LOCK_EX)
        reaper.write(str(gone.pid))
        reaper.flush()
        waits = []
        monkeypatch.setattr(rundir.time, "sleep", lambda seconds: waits.append(fcntl.flock(reaper, fcntl.LOCK_UN)))
        _, lock = prepare(again)
    assert len(waits) == 1
    assert path.read_text() == str(os.getpid())
    with pytest.raises(ConfigError, match="is still running"):
        prepare(again)
    lock.close()
