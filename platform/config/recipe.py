"""The stages of a recipe as configurations: what a stage sets lies over what the whole recipe has.

    the recipe's configuration < the stage's own keys and options < what earlier stages hand on (start_from, data_from)

Called by compose.py, which checks every stage before the first one starts, and by launcher/recipe.py, which runs them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from offtrail.platform.config.errors import ConfigError, nearest_text, refuse
from offtrail.platform.config.schema import Config

Raw = Any

JOBS = ("rl", "sft")
"""The jobs that a stage can have: those that end by themselves with a checkpoint or data."""
DATA_KEYS = {"sft": "sft.path"}
"""Where a job reads the data that an earlier stage has made."""
DATA_JOBS = ("rl",)
"""The jobs that make data: the right answers of their training."""
DATA_FILE = "data.jsonl"
"""Such data, in the run directory of their stage: one JSON object a line."""


@dataclass(frozen=True)
class Stage:
    """One stage: ``number`` counts from 1, ``settings`` are its own keys and options as a tree."""

    number: int
    name: str
    job: str
    start_from: str
    data_from: str
    settings: Mapping[str, Raw]

    @property
    def folder(self) -> str:
        """Its run directory below runs/NAME/stages/."""
        return f"{self.number}_{self.name}"


def stages_of(config: Config) -> list[Stage]:
    """The stages in their order. ConfigError, one line, on a name, a job or a reference that cannot be."""
    stages: list[Stage] = []
    for number, (name, given) in enumerate(config.recipe.stages.items(), 1):
        key = f"recipe.stages.{name}"
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", name):
            raise refuse("recipe.stages", name, "a stage's name is a folder's: small letters, digits, _ and - only")
        if not isinstance(given, dict):
            raise refuse(key, given, "must be a mapping of keys, such as {job: sft}")
        own = dict(given)
        job, start_from, data_from = own.pop("job", ""), own.pop("start_from", ""), own.pop("data_from", "")
        if not job:
            near = nearest_text(name, config.recipe.stages.keys() - {name})
            raise ConfigError(f"{key}: no such stage, or one without its job ({' or '.join(JOBS)}){near}")
        if job not in JOBS:
            raise refuse(f"{key}.job", job, f"must be one of {', '.join(JOBS)}{nearest_text(job, JOBS)}")
        for reference, stage in (("start_from", start_from), ("data_from", data_from)):
            earlier = [stage.name for stage in stages]
            if stage and stage not in earlier:
                near = f"one of {', '.join(earlier)}" if earlier else "none: it is the first"
                raise refuse(f"{key}.{reference}", stage, f"must be an earlier stage, {near}")
        if data_from and job not in DATA_KEYS:
            raise refuse(f"{key}.data_from", data_from, f"job={job} reads no data; {' and '.join(DATA_KEYS)} does")
        if data_from and next(stage.job for stage in stages if stage.name == data_from) not in DATA_JOBS:
            raise refuse(f"{key}.data_from", data_from, f"must be a stage of job={' or '.join(DATA_JOBS)}")
        for section in ("run", "recipe"):
            if section in own:
                raise refuse(f"{key}.{section}", own[section], "belongs to the whole recipe; leave it out of the stage")
        stages.append(Stage(number, name, job, start_from, data_from, own))
    return stages


def handed_keys(stage: Stage) -> frozenset[str]:
    """The keys that earlier stages set for this one."""
    keys = {"model.path"} if stage.start_from else set()
    return frozenset(keys | ({DATA_KEYS[stage.job]} if stage.data_from else set()))
