"""A recipe: its stages one after another, each an ordinary run in runs/NAME/stages/.

    stage 1 ── checkpoint, data ──► stage 2 ──► … ──► summary.json of the whole

A stage is done when its own summary.json says `completed`; a resumed recipe passes over those, goes on with the one
that was interrupted, and begins the rest. Invariant: a stage begins only from stages that are done, so that what it is
handed is whole. ``start_from`` hands on the newest checkpoint, ``data_from`` the right answers (right_answers.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from offtrail.platform.config.checkpoints import model_folder
from offtrail.platform.config.compose import load_config, refuse_new_science, stage_config
from offtrail.platform.config.errors import ConfigError
from offtrail.platform.config.recipe import DATA_FILE, DATA_KEYS, MODEL_KEYS, Stage, stages_of
from offtrail.platform.config.rundir import prepare
from offtrail.platform.config.schema import Config
from offtrail.platform.launcher.right_answers import write_right_answers
from offtrail.platform.tracking.summary import read_summary, write_summary

Outcome = tuple[str, str]
"""How a run ended (completed, failed, interrupted), and why."""
Launch = Callable[[Config, Path, list[int]], Outcome]
"""Runs one job to its end, its summary.json included."""

HANDED_UP = ("eval/accuracy_first", "eval/accuracy_last", "loss/sft_first", "loss/sft_last", "steps", "wall_seconds")
AREAS = ("sample/", "data/")
"""What the recipe's summary repeats of each stage."""


def run_recipe(config: Config, run_dir: Path, interrupted: list[int], launch: Launch) -> Outcome:
    """Every stage that is not done yet; how the recipe ended, and why."""
    stages = stages_of(config)
    outcome: Outcome = ("completed", "")
    for stage in stages:
        folder = folder_of(run_dir, stage)
        if not is_done(folder):
            print(f"stage {stage.number}/{len(stages)}: {stage.name} (job={stage.job})", flush=True)
            status, reason = run_stage(config, run_dir, stage, interrupted, launch)
            if status != "completed":
                outcome = status, f"stage {stage.name}: {reason}"
                break
    write_summary(run_dir, whole_summary(run_dir, stages))
    return outcome


def run_stage(config: Config, run_dir: Path, stage: Stage, interrupted: list[int], launch: Launch) -> Outcome:
    """One stage from the start, or from where it was interrupted."""
    folder = folder_of(run_dir, stage)
    begun = (folder / "config.yaml").is_file()
    try:
        place = {"run.dir": str(folder.parent), "run.name": folder.name, "run.resume": begun}
        settings = stage_config(config, stage, place | handed_on(run_dir, stage, stages_of(config)))
        if begun:
            refuse_new_science(load_config(folder / "config.yaml"), settings)
        _, lock = prepare(settings)
    except ConfigError as error:
        return "failed", str(error)
    with lock:
        return launch(settings, folder, interrupted)


def handed_on(run_dir: Path, stage: Stage, stages: list[Stage]) -> dict[str, str | list[str]]:
    """The keys that lead this stage to what earlier ones have made. ConfigError when there is nothing."""
    by_name = {other.name: folder_of(run_dir, other) for other in stages}
    keys: dict[str, str | list[str]] = {}
    if stage.start_from:
        keys[MODEL_KEYS[stage.job]] = str(model_folder(str(by_name[stage.start_from])))
    if stage.data_from:
        data = [str(data_of(by_name[name])) for name in stage.data_from]
        keys[DATA_KEYS[stage.job]] = data if stage.job == "reject" else data[0]
    return keys


def data_of(folder: Path) -> Path:
    """What a stage has made: its file, or the right answers of its training, which are written now."""
    data = folder / DATA_FILE
    return data if data.is_file() else write_right_answers(folder)


def folder_of(run_dir: Path, stage: Stage) -> Path:
    """The run directory of a stage."""
    return (run_dir / "stages" / stage.folder).absolute()


def is_done(folder: Path) -> bool:
    """Whether a stage has completed."""
    with contextlib.suppress(OSError, ValueError):
        return read_summary(folder).get("status") == "completed"
    return False


def whole_summary(run_dir: Path, stages: list[Stage]) -> dict[str, Any]:
    """summary.json of a recipe: each stage's end in short, and the compute of all."""
    told: dict[str, Any] = {}
    compute: dict[str, float] = {}
    for stage in stages:
        summary = read_summary(folder_of(run_dir, stage))
        named = [key for key in summary if key in HANDED_UP or key.startswith(AREAS)]
        told[stage.name] = {key: summary[key] for key in ("status", *named) if summary.get(key) is not None}
        for key, value in summary.items():
            if key.startswith("compute/") and isinstance(value, (int, float)):
                compute[key] = compute.get(key, 0.0) + value
    return {"stages": told, **dict(sorted(compute.items()))}
