"""The settings of a mixture's families: keys like those of a task alone, with its types, ranges and rules."""

from __future__ import annotations

from offtrail.platform.config.build import build
from offtrail.platform.config.errors import ConfigError, refuse, renamed
from offtrail.platform.config.validate import files_of_lines_are_here, numbers_are_in_range
from offtrail.tasks.mixture import MixtureConfig


def check_families(mixture: MixtureConfig, where: str, job: str) -> None:
    """Raise ConfigError for the first setting that cannot be in a run of ``job``. ``where``: the key of the settings,
    which a message begins with.
    """
    for name in mixture.weights:
        given = {f"task.{key}": value for key, value in mixture.settings.get(name, {}).items()}
        inside = f"{where}.{name}"
        if "task.name" in given:
            raise refuse(f"{inside}.name", given["task.name"], "the family is named by its place; leave it out")
        try:
            member = build({"job": job, "task.name": name, **given})
            numbers_are_in_range(member)
            files_of_lines_are_here(member)
        except ConfigError as error:
            raise ConfigError(renamed(str(error), "task", inside)) from None
