"""Which model folder `checkpoint` means, and what is known of the run that it comes from. No torch."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from offtrail.platform.config.errors import ConfigError, refuse

_STEP = re.compile(r"step_(\d+)")


def model_folder(checkpoint: str, key: str = "checkpoint") -> Path | None:
    """The newest checkpoint of a run directory (of its last stage that has begun), or its start model before the first;
    a folder with a config.json as it is; None for anything else, which may be a name in the Hugging Face cache.

    Raises ConfigError, which names ``key``, for a run directory without a model.
    """
    given = Path(checkpoint)
    if os.path.isfile(given / "config.json"):
        return given
    if not os.path.isfile(given / "config.yaml"):
        return None
    candidates = [given / "checkpoints" / f"step_{step}" for step in reversed(steps_of(given))] + [given / "start"]
    found = next((path for path in candidates if (path / "config.json").is_file()), None)
    if found is not None:
        return found
    stages = sorted(given.glob("stages/*/config.yaml"), key=lambda path: int(path.parent.name.partition("_")[0]))
    for stage in reversed(stages):  # one of job=reject has no model
        with contextlib.suppress(ConfigError):
            return model_folder(str(stage.parent), key)
    raise refuse(key, checkpoint, "the run has neither a checkpoint nor a start model")


def steps_of(run_dir: Path) -> list[int]:
    """The steps of which a run directory has checkpoints, in order."""
    return sorted(int(match[1]) for path in run_dir.glob("checkpoints/*") if (match := _STEP.fullmatch(path.name)))


def step_of(checkpoint: str) -> int:
    """The learner step of the model that `checkpoint` means, by its folder's name; 0 of any other model."""
    folder = model_folder(checkpoint)
    match = _STEP.fullmatch(folder.resolve().name) if folder is not None else None
    return int(match[1]) if match else 0


def run_folder(checkpoint: str) -> Path | None:
    """The run directory that `checkpoint` is, or is a checkpoint of; None when it belongs to no run."""
    given = Path(checkpoint)
    candidates = [given] + ([given.parent.parent] if given.parent.name == "checkpoints" else [])
    return next((folder for folder in candidates if os.path.isfile(folder / "config.yaml")), None)
