"""From settings to a task: the one place that knows every family."""

from __future__ import annotations

from typing import Any

from offtrail.tasks.addition import AdditionTask
from offtrail.tasks.base import Task, TaskError
from offtrail.tasks.chain import ChainTask
from offtrail.tasks.config import (
    TASKS,
    AdditionConfig,
    ChainConfig,
    CountdownConfig,
    JsonlConfig,
    MixtureConfig,
    TaskConfig,
)
from offtrail.tasks.countdown import CountdownTask
from offtrail.tasks.jsonl import JsonlTask
from offtrail.tasks.mixture import MixtureTask


def make_task(config: TaskConfig, seed: int, *, load: bool = True) -> Task:
    """The task of ``config``, its data order keyed by ``seed``. Files are read and checked here, so that a mistake in
    them shows before anything starts; ``load=False`` reads none and makes a task that only verifies and checks steps.

    Raises TaskError.
    """
    match config:
        case ChainConfig():
            return ChainTask(config, seed)
        case AdditionConfig():
            return AdditionTask(config, seed)
        case CountdownConfig():
            return CountdownTask(config, seed)
        case JsonlConfig():
            return JsonlTask(config, seed, load=load)
        case MixtureConfig():
            families = {name: make_task(family_config(name, config), seed, load=load) for name in config.weights}
            return MixtureTask(config, seed, families)
        case _:
            raise TaskError(f"task={config.name}: no such task; choose one of {', '.join(TASKS)}")


def family_config(name: str, config: MixtureConfig) -> TaskConfig:
    """A family's settings within a mixture; the mixture's held_out_share holds for all. Raises TaskError."""
    settings: dict[str, Any] = {"held_out_share": config.held_out_share, **config.settings.get(name, {})}
    known = TASKS[name].__dataclass_fields__
    for key in settings:
        if key not in known or key == "name":
            allowed = ", ".join(k for k in known if k != "name")
            raise TaskError(f"task.settings.{name}.{key}: no such key; choose one of {allowed}")
    try:
        return TASKS[name](**settings)
    except (TypeError, ValueError) as error:
        raise TaskError(f"task.settings.{name}: {error}") from error
