"""The stages of a recipe as configurations: what a stage sets lies over what the whole recipe has.

    the recipe's configuration < the stage's own keys and options < what earlier stages hand on (start_from, data_from)

Called by compose.py, which checks every stage before the first one starts, and by launcher/recipe.py, which runs them.
job=distill is a recipe of three stages that nobody has to write.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from offtrail.platform.config.errors import ConfigError, nearest_text, refuse
from offtrail.platform.config.schema import Config
from offtrail.platform.config.stage_keys import NOTHING, Extra, is_there, stands_for_it, taken

Raw = Any

JOBS = ("rl", "sft", "sample", "reject", "eval")
"""The jobs that a stage can have: those that end by themselves."""
MODEL_KEYS = {"rl": "model.path", "sft": "model.path", "sample": "checkpoint", "eval": "checkpoint"}
"""Where a job takes the model that an earlier stage has made."""
MODEL_JOBS = ("rl", "sft")
"""The jobs that make a model."""
DATA_KEYS = {"sft": "sft.path", "reject": "reject.paths"}
"""Where a job reads the data that earlier stages have made."""
DATA_JOBS = ("rl", "sample", "reject")
"""The jobs that make data: the right answers of a training, the answers of a sampling, those that are kept of any."""
DATA_FILE = "data.jsonl"
"""Such data, in the run directory of their stage: one JSON object a line."""


@dataclass(frozen=True)
class Stage:
    """One stage: ``number`` counts from 1, ``settings`` are its own keys and options as a tree, ``key`` is where they
    stand, ``extra`` what is known once earlier stages are done.
    """

    number: int
    name: str
    job: str
    start_from: str
    data_from: tuple[str, ...]
    settings: Mapping[str, Raw]
    key: str
    extra: Extra = NOTHING

    @property
    def folder(self) -> str:
        """Its run directory below runs/NAME/stages/."""
        return f"{self.number}_{self.name}"


def stages_of(config: Config) -> list[Stage]:
    """The stages in their order. ConfigError, one line, on a name, a job or a reference that cannot be."""
    if config.job == "distill":
        return stages_of_distillation(config)
    stages: list[Stage] = []
    absent = dict[str, str]()
    for name, given in config.recipe.stages.items():
        key = f"recipe.stages.{name}"
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", name):
            raise refuse("recipe.stages", name, "a stage's name is a folder's: small letters, digits, _ and - only")
        if not isinstance(given, dict):
            raise refuse(key, given, "must be a mapping of keys, such as {job: sft}")
        if not is_there(given, key, config.model.path):
            absent[name] = stands_for_it(given, key, config.distill.teacher)
            continue
        own = dict(given)
        job, start_from, data_from = own.pop("job", ""), own.pop("start_from", ""), own.pop("data_from", "")
        if isinstance(start_from, str) and start_from in absent:
            if teacher := absent[start_from]:
                if MODEL_KEYS.get(job) != "checkpoint":
                    raise refuse(f"{key}.start_from", start_from, "is a teacher: it is asked, and not trained further")
                own.setdefault("checkpoint", teacher)
            start_from = ""  # model.path is what it would have made
        if not job:
            near = nearest_text(name, config.recipe.stages.keys() - {name})
            raise ConfigError(f"{key}: no such stage, or one without its job ({', '.join(JOBS)}){near}")
        if job not in JOBS:
            raise refuse(f"{key}.job", job, f"must be one of {', '.join(JOBS)}{nearest_text(job, JOBS)}")
        sources = data_from if isinstance(data_from, list) else [data_from] if data_from else []
        _check_references(key, job, start_from, sources, stages)
        extra = taken(own, key, job, {stage.name: stage.job for stage in stages}, absent, config.model.path)
        if extra.epochs and not sources:
            raise refuse(
                f"{key}.epochs", extra.epochs, "goes with data_from, whose rows it counts; sft.steps does else"
            )
        stages.append(Stage(len(stages) + 1, name, job, start_from, tuple(sources), own, key, extra))
    check_arms(config.recipe.compare, stages)
    return stages


def check_arms(arms: Mapping[str, list[str]], stages: list[Stage]) -> None:
    """That recipe.compare names two arms of as many models, each of which a stage of job=eval asks."""
    if not arms:
        return
    asked = {stage.start_from for stage in stages if stage.job == "eval" and stage.start_from}
    if len(arms) != 2 or len({len(models) for models in arms.values()}) != 1 or not all(arms.values()):
        raise refuse("recipe.compare", arms, "must be two arms of as many stages, as {rl: [rl], distil: [distil]}")
    for arm, models in arms.items():
        for name in models:
            if name not in asked:
                raise refuse(f"recipe.compare.{arm}", name, "no stage of job=eval starts from it")


def _check_references(key: str, job: str, start_from: Raw, data_from: list[Raw], stages: list[Stage]) -> None:
    """That they are earlier stages, which make what is wanted of them."""
    made = {stage.name: stage.job for stage in stages}
    for reference, name in (("start_from", start_from), *(("data_from", name) for name in data_from)):
        if not isinstance(name, str):
            raise refuse(f"{key}.{reference}", name, "must be the name of an earlier stage")
        if name and name not in made:
            near = f"one of {', '.join(made)}" if made else "none: it is the first"
            raise refuse(f"{key}.{reference}", name, f"must be an earlier stage, {near}")
    if start_from and job not in MODEL_KEYS:
        raise refuse(f"{key}.start_from", start_from, f"job={job} has no model; leave it out")
    if start_from and made[start_from] not in MODEL_JOBS:
        raise refuse(f"{key}.start_from", start_from, f"must be a stage of job={' or '.join(MODEL_JOBS)}")
    if not data_from:
        return
    if job not in DATA_KEYS:
        raise refuse(f"{key}.data_from", data_from[0], f"job={job} reads no data; {' and '.join(DATA_KEYS)} do")
    if other := next((name for name in data_from if made[name] not in DATA_JOBS), ""):
        raise refuse(f"{key}.data_from", other, "must be a stage of job=rl, sample or reject")
    if job == "sft" and len(data_from) > 1:
        raise refuse(f"{key}.data_from", data_from, "job=sft reads one file; join them in a stage of job=reject")


def stages_of_distillation(config: Config) -> list[Stage]:
    """job=distill: the teacher is sampled, where it is no file of samples already; what is kept is imitated."""
    if config.recipe.stages:
        raise refuse("job", "distill", f"is a recipe of its own; leave recipe={config.recipe.name} out")
    teacher, stages = config.distill.teacher, list[Stage]()
    given = os.path.isfile(teacher)

    def add(job: str, data_from: str, settings: Mapping[str, Raw]) -> None:
        sources = (data_from,) if data_from else ()
        stages.append(Stage(len(stages) + 1, job, job, "", sources, settings, f"job=distill, stage {job}"))

    if not given:
        add("sample", "", {"checkpoint": teacher} if teacher else {})
    add("reject", "" if given else "sample", {"reject": {"paths": [teacher]}} if given else {})
    add("sft", "reject", {})
    return stages


def handed_keys(stage: Stage) -> frozenset[str]:
    """The keys that earlier stages set for this one."""
    keys = {MODEL_KEYS[stage.job]} if stage.start_from else set()
    return frozenset(keys | ({DATA_KEYS[stage.job]} if stage.data_from else set())) | stage.extra.keys
