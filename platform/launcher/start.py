"""The model that version 0 comes from: runs/NAME/start, a link to a Hugging Face directory.

``model.path`` names it, a directory or a name in the local Hugging Face cache; without one the small model of
``model=tiny`` is made and cold-started once, kept in the cache, and found there by every later run of the same model,
task and sft settings. The cold start is an ordinary run of job=sft, in runs/NAME/stages/1_cold_start.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

from offtrail.platform.config.compose import to_yaml
from offtrail.platform.config.schema import Config, LearnerConfig
from offtrail.platform.launcher.inputs import data_of, hashes
from offtrail.platform.model.start import StartError, resolve
from offtrail.platform.runtime.contents import MANIFEST, damage_of, write_manifest
from offtrail.platform.tracking import compute
from offtrail.platform.tracking.summary import read_summary

LOOK_SECONDS = 0.25
"""Between two looks for a signal of the user."""
TRAINING_STATE = shutil.ignore_patterns("trainer", "trainer.json", "window", MANIFEST)
"""What a checkpoint has beside the model."""
RunJob = Callable[[Config, Path, list[int]], tuple[str, str]]
"""Runs a job in a run directory to its end, unless a signal is noted in the list: its status, and why."""
RECIPE = 2
"""Raise it when the code of the cold start changes what it makes: it is part of the cache key."""


def prepare_start_model(config: Config, run_dir: Path, interrupted: list[int], run: RunJob) -> None:
    """Make runs/NAME/start, with a cold start where the cache has none, which ``run`` runs. A resumed run keeps its
    link. A job that learns from examples, without a model.path, needs none: its learner makes random weights.

    Raises StartError when the model cannot be found or made, or is damaged in the cache, and KeyboardInterrupt when a
    signal is noted meanwhile.
    """
    link = run_dir / "start"
    if not link.exists():
        link.unlink(missing_ok=True)  # it may dangle: the cache was emptied
        if config.model.path:
            link.symlink_to(resolve(config.model.path))
        elif config.supervised is None:
            link.symlink_to(cold_start(config, run_dir, interrupted, run))
    if not config.model.path and config.supervised is None:
        refuse_damaged(link.resolve())


def refuse_damaged(cached: Path) -> None:
    """Raise StartError where a cold start in the cache is not as it was made."""
    if (cached / MANIFEST).is_file() and (damage := damage_of(cached)):
        raise StartError(f"{damage}: the cold start in the cache is damaged; delete {cached}, and it is made anew")


def cold_start(config: Config, run_dir: Path, interrupted: list[int], run: RunJob) -> Path:
    """The cold-started checkpoint of this configuration, made now if the cache lacks it; of several launches at once
    one makes it, and the others wait for it.
    """
    target = cache_dir() / cache_key(config)
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with only_one(target, interrupted):
        if not target.is_dir():
            try:
                run_cold_start(config, run_dir, target, interrupted, run)
            except (StartError, OSError):
                if not target.is_dir():  # it is there whole: a launch made it that the lock did not reach
                    raise
    return target


@contextlib.contextmanager
def only_one(target: Path, interrupted: list[int]) -> Iterator[None]:
    """Hold the lock on making ``target``; whoever dies lets go of it. A file system without locks has none."""
    with (target.parent / f".{target.name}.lock").open("a") as lock:
        waiting = False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not waiting:
                    print(f"waiting for another run, which makes the same start model: {target}", flush=True)
                waiting = True
                if interrupted:
                    raise interruption("while another run made its start model", interrupted) from None
                time.sleep(LOOK_SECONDS)
            except OSError:
                break
            else:
                break
        yield


def interruption(when: str, interrupted: list[int]) -> KeyboardInterrupt:
    """What a noted signal becomes where no role is up yet."""
    return KeyboardInterrupt(f"stopped by {signal.Signals(interrupted[0]).name} {when}")


def run_cold_start(config: Config, run_dir: Path, target: Path, interrupted: list[int], run: RunJob) -> None:
    """Train in runs/NAME/stages/1_cold_start, an ordinary run of job=sft, and put its model into the cache. What an
    interrupted launch has trained of it is gone on with.
    """
    stage, folder = cold_start_config(config), run_dir / "stages" / "1_cold_start"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(stage), encoding="utf-8")
    print(f"cold start: {folder}", flush=True)
    status, reason = run(stage, folder, interrupted)
    if status == "interrupted":
        raise KeyboardInterrupt(f"{reason} in the cold start")
    if status != "completed":
        raise StartError(f"cold start failed: {reason}")
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        model = Path(scratch) / "model"
        shutil.copytree(folder / "checkpoints" / f"step_{stage.steps}", model, ignore=TRAINING_STATE)
        compute.save(model, read_summary(folder))
        write_manifest(model)
        model.rename(target)


def cold_start_config(config: Config) -> Config:
    """The configuration of the cold start: what decides its weights (see cache_key), at the defaults of all else."""
    learner = LearnerConfig(device=config.learner.device, threads=config.learner.threads, dtype=config.learner.dtype)
    learner.checkpoint_every, learner.liger = config.sft.steps, config.learner.liger
    return Config(
        job="sft",
        model=config.model,
        prompt=config.prompt,
        task=config.task,
        sft=config.sft,
        learner=learner,
        broker=dataclasses.replace(config.broker, port=0),
        tracking=dataclasses.replace(config.tracking, sinks=[], sink_settings={}),
    )


def cache_dir() -> Path:
    """$OFFTRAIL_CACHE, or ~/.cache/offtrail; absolute, because links lead there."""
    return Path(os.environ.get("OFFTRAIL_CACHE") or "~/.cache/offtrail").expanduser().resolve()


def cache_key(config: Config) -> str:
    """Names the cold-start checkpoint of ``config``: a hash of everything that decides its weights."""
    model = dataclasses.asdict(config.model)
    del model["path"]
    decides = {
        "recipe": RECIPE,
        "model": model,
        "task": dataclasses.asdict(config.task),
        "sft": dataclasses.asdict(config.sft),
        "data": hashes(data_of(config)) or "",
        "dtype": config.learner.dtype,
        "torch": metadata.version("torch"),
    }
    digest = hashlib.blake2b(json.dumps(decides, sort_keys=True).encode(), digest_size=8).hexdigest()
    return f"{config.model.name}-{config.task.name}-{digest}"
