"""The run directory: made once, by mkdir, which is the lock between two launches with one name.

A launch holds `.lock` in it (flock) until it ends, so that a run that is still going cannot be resumed beside itself;
the system frees it when the process dies, however it dies.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from pathlib import Path
from typing import TextIO

from offtrail.platform.config.compose import to_yaml
from offtrail.platform.config.errors import ConfigError, refuse
from offtrail.platform.config.schema import Config

SAVED, WANTED = "config.yaml", ".config.yaml.new"
"""The settings of a run, and those of a launch that may be refused yet."""
REAP_SECONDS = 30.0
"""The longest that what a killed launch has left may take to go."""


def prepare(config: Config) -> tuple[Path, TextIO]:
    """(run directory, its lock to keep open); sets config.run.name when it is empty.

    A new run has its config.yaml. That of a resumed one stays until nothing can refuse the launch any more: see `save`.

    Raises ConfigError when run.dir cannot be written, the name exists, or the run to resume is still going.
    """
    run_dir = Path(config.run.dir) / config.run.name if config.run.resume else _make(config)
    try:
        lock = _lock(config, run_dir)
        try:
            (run_dir / WANTED).write_text(to_yaml(config), encoding="utf-8")
            if not config.run.resume:
                os.replace(run_dir / WANTED, run_dir / SAVED)
        except OSError:
            lock.close()
            raise
    except OSError as error:
        if not config.run.resume:
            shutil.rmtree(run_dir, ignore_errors=True)  # it holds nothing yet, and would keep the name
        raise _unwritable(config, error) from None
    return run_dir, lock


def save(run_dir: Path) -> None:
    """The settings of a resumed launch are the run's from now on, those of a recipe before its stage's. OSError where
    the disk does not take them.
    """
    for folder in (run_dir.parent.parent, run_dir):
        with contextlib.suppress(FileNotFoundError):  # new, or saved already
            os.replace(folder / WANTED, folder / SAVED)


def default_name(config: Config) -> str:
    """JOB-TASK-ALGO and the time; supervised jobs have no algorithm, and serving has no task either.

    A task from outside the tree, `my_code:Reverse`, becomes my_code.Reverse.
    """
    parts: list[str] = [config.job]
    parts += [config.task.name] if config.job in ("rl", "sft", "eval", "sample", "label", "distill") else []
    parts += [config.algo.name] if config.job == "rl" else []
    return "-".join([*parts, time.strftime("%Y%m%d-%H%M%S")]).replace(":", ".")


def _make(config: Config) -> Path:
    parent, given = Path(config.run.dir), config.run.name
    stem, turn = given or default_name(config), 1
    try:
        parent.mkdir(parents=True, exist_ok=True)
        while True:
            run_dir = parent / (stem if turn == 1 else f"{stem}-{turn}")
            try:
                run_dir.mkdir()
            except FileExistsError:
                if given:
                    raise refuse(
                        "run.name", given, f"{run_dir} exists; go on with it by run.resume=true, or take another name"
                    ) from None
                turn += 1
                continue
            config.run.name = run_dir.name
            return run_dir
    except OSError as error:
        raise _unwritable(config, error) from None


def _lock(config: Config, run_dir: Path) -> TextIO:
    """Held by the launcher, and where it was killed by its reaper, until nothing of its launch is left: that is waited
    for. The file holds the launcher's pid, and is inheritable, for the reaper.
    """
    lock = open(run_dir / ".lock", "a+", encoding="utf-8")  # noqa: SIM115  (held until the launch ends)
    deadline = time.monotonic() + REAP_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if _holder_lives(lock) or time.monotonic() > deadline:
                lock.close()
                raise refuse(
                    "run.name", config.run.name, f"{run_dir} is still running; wait for it or stop it first"
                ) from None
            time.sleep(0.1)
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    os.set_inheritable(lock.fileno(), True)
    return lock


def _holder_lives(lock: TextIO) -> bool:
    """Whether the launcher that took the lock is there: else only its reaper holds it, and not for long."""
    lock.seek(0)
    pid = lock.read().strip()
    if not pid:  # it has the lock, and has yet to say so
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _unwritable(config: Config, error: OSError) -> ConfigError:
    return refuse(
        "run.dir", config.run.dir, f"cannot be written ({error.strerror}); give a folder that can: run.dir=DIR"
    )
