"""A recipe: its stages one after another, each an ordinary run in runs/NAME/stages/.

    stage 1 ── checkpoint, data ──► stage 2 ──► … ──► summary.json of the whole

A stage is done when its own summary.json says `completed`; a resumed recipe passes over those, goes on with the one
that was interrupted, and begins the rest. Invariant: a stage begins only from stages that are done, so that what it is
handed is whole. ``start_from`` hands on the newest checkpoint, ``data_from`` the right answers (right_answers.py).
Where stages of job=eval have asked the models there is a table of them at the end (stage_table.py).
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from offtrail.platform.config.checkpoints import model_folder
from offtrail.platform.config.compose import load_config, refuse_new_science, stage_config
from offtrail.platform.config.errors import ConfigError
from offtrail.platform.config.recipe import DATA_FILE, DATA_KEYS, MODEL_KEYS, Stage, stages_of
from offtrail.platform.config.rundir import prepare
from offtrail.platform.config.schema import Config
from offtrail.platform.evaluator.report import RESULTS
from offtrail.platform.launcher.right_answers import write_right_answers
from offtrail.platform.launcher.stage_cost import spent
from offtrail.platform.launcher.stage_table import as_table, in_short, rows_of, write_table
from offtrail.platform.launcher.stage_view import here, plan
from offtrail.platform.launcher.verdict import compared, shares_of
from offtrail.platform.tracking.compute import counted_once
from offtrail.platform.tracking.progress import PLACE
from offtrail.platform.tracking.summary import read_summary, write_summary

Handed = dict[str, Any]
"""Key → value."""
Outcome = tuple[str, str]
"""How a run ended (completed, failed, interrupted), and why."""
Launch = Callable[[Config, Path, list[int]], Outcome]
"""Runs one job to its end, its summary.json included."""

HANDED_UP = ("eval/accuracy_first", "eval/accuracy_last", "loss/sft_first", "loss/sft_last", "steps", "wall_seconds")
AREAS = ("sample/", "data/")
"""What the recipe's summary repeats of each stage."""
SUMMED = ("compute/", "tokens/")
"""… and of what it is the sum."""


def run_recipe(config: Config, run_dir: Path, interrupted: list[int], launch: Launch) -> Outcome:
    """Every stage that is not done yet; how the recipe ended, and why."""
    stages = stages_of(config)
    outcome: Outcome = ("completed", "")
    done = seconds_of(run_dir, stages)
    print(plan(config.recipe.name if config.recipe.stages else config.job, stages, done), flush=True)
    for stage in stages:
        if stage.name not in done:
            print(here(stage, stages, done), flush=True)
            status, reason = run_stage(config, run_dir, stage, interrupted, launch)
            if status != "completed":
                outcome = status, f"stage {stage.name}: {reason}"
                break
            done = seconds_of(run_dir, stages)
    PLACE.set("")
    write_summary(run_dir, whole_summary(run_dir, stages) | compare_models(config, run_dir, stages))
    return outcome


def seconds_of(run_dir: Path, stages: list[Stage]) -> dict[str, float]:
    """Stage → seconds, of those that are done."""
    folders = {stage.name: folder_of(run_dir, stage) for stage in stages}
    return {name: spent(read_summary(folder))["seconds"] for name, folder in folders.items() if is_done(folder)}


def compare_models(config: Config, run_dir: Path, stages: list[Stage]) -> dict[str, Any]:
    """The table of the models that were asked so far, and of two arms what their difference is once both are; what
    summary.json says of them.
    """
    folders = {stage.name: folder_of(run_dir, stage) for stage in stages}
    done = (stage for stage in stages if stage.job == "eval" and is_done(folders[stage.name]))
    asked = [stage for stage in done if (folders[stage.name] / RESULTS).is_file()]
    if not asked:
        return {}
    summaries = {name: read_summary(folder) for name, folder in folders.items()}
    evaluations = {s.name: json.loads((folders[s.name] / RESULTS).read_text(encoding="utf-8")) for s in asked}
    rows, arms = rows_of(stages, evaluations, summaries), config.recipe.compare
    by_model = {stage.start_from: folders[stage.name] for stage in asked}
    verdict: dict[str, Any] = {}
    if arms and all(name in by_model for models in arms.values() for name in models):
        answers = {name: shares_of(by_model[name]) for models in arms.values() for name in models}
        verdict = compared(arms, stages, summaries, answers)
    write_table(run_dir, config.recipe.name, rows, verdict)
    Console().print(as_table(rows), highlight=False)
    for line in verdict.get("lines", []):
        print(line, flush=True)
    return {"dev": in_short(rows)} | ({"verdict": verdict["lines"]} if verdict else {})


def run_stage(config: Config, run_dir: Path, stage: Stage, interrupted: list[int], launch: Launch) -> Outcome:
    """One stage from the start, or from where it was interrupted."""
    folder = folder_of(run_dir, stage)
    begun = (folder / "config.yaml").is_file()
    try:
        place = {"run.dir": str(folder.parent), "run.name": folder.name, "run.resume": begun}
        stages = stages_of(config)
        keys = handed_on(run_dir, stage, stages)
        settings = stage_config(config, stage, place | keys | known_now(config, run_dir, stage, stages, keys))
        if begun:
            refuse_new_science(load_config(folder / "config.yaml"), settings)
        _, lock = prepare(settings)
    except ConfigError as error:
        return "failed", str(error)
    with lock:
        return launch(settings, folder, interrupted)


def handed_on(run_dir: Path, stage: Stage, stages: list[Stage]) -> Handed:
    """The keys that lead this stage to what earlier ones have made. ConfigError when there is nothing."""
    by_name = {other.name: folder_of(run_dir, other) for other in stages}
    keys = Handed()
    if stage.start_from:
        keys[MODEL_KEYS[stage.job]] = str(model_folder(str(by_name[stage.start_from])))
    if stage.data_from:
        data = [str(data_of(by_name[name])) for name in stage.data_from]
        keys[DATA_KEYS[stage.job]] = data if stage.job == "reject" else data[0]
    return keys


def known_now(config: Config, run_dir: Path, stage: Stage, stages: list[Stage], keys: Handed) -> Handed:
    """The keys that follow from what earlier stages have made and spent (config/stage_keys.py). ConfigError where they
    leave nothing.
    """
    by_name = {other.name: folder_of(run_dir, other) for other in stages}
    extra, found = stage.extra, Handed()
    if extra.budget_of:
        cost = {name: spent(read_summary(folder))["flops"] for name, folder in by_name.items()}
        left = cost[extra.budget_of] - sum(cost[name] for name in extra.charged)
        if left <= 0:
            whole, charged = cost[extra.budget_of], " and ".join(extra.charged)
            raise ConfigError(
                f"{stage.key}.budget: {charged} alone spent {whole - left:.3g} FLOPs, and {extra.budget_of} "
                f"{whole:.3g}; sample less, or train {extra.budget_of} longer"
            )
        found["run.budget_flops"] = left
    if extra.mix:
        paths = {name: str(data_of(by_name[name])) for name, _ in extra.mix}
        found["reject.mix"] = {name: {"path": paths[name], "share": share, "repeat": True} for name, share in extra.mix}
    if extra.epochs:
        with Path(str(keys["sft.path"])).open("rb") as file:
            rows = sum(1 for _ in file)
        size = stage_config(config, stage, {}).sft.batch_size
        found["sft.steps"] = max(1, math.ceil(extra.epochs * rows / size))
    return found


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
    """summary.json of a recipe: each stage's end in short, and the compute and tokens of all."""
    told: dict[str, Any] = {}
    total: dict[str, float] = {}
    summaries = counted_once(read_summary(folder_of(run_dir, stage)) for stage in stages)
    for stage, summary in zip(stages, summaries, strict=True):
        named = [key for key in summary if key in HANDED_UP or key.startswith(AREAS)]
        told[stage.name] = {key: summary[key] for key in ("status", *named) if summary.get(key) is not None}
        for key, value in summary.items():
            if key.startswith(SUMMED) and isinstance(value, (int, float)):
                total[key] = total.get(key, 0) + value
    return {"stages": told, **dict(sorted(total.items()))}
