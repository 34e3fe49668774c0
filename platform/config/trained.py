"""Settings that job=eval takes from the run whose checkpoint it asks."""

from __future__ import annotations

from offtrail.platform.config.checkpoints import run_folder
from offtrail.platform.config.compose import load_config
from offtrail.platform.config.schema import Config

INHERITED = ("task", "reward", "prompt", "sampling", "model")


def inherit(config: Config) -> None:
    """Of a checkpoint of a run: sections that the command leaves at their defaults are those that it was trained with.
    Raises ConfigError where the run's settings cannot be read.
    """
    run = run_folder(config.checkpoint)
    if run is None:
        return
    trained, plain = load_config(run / "config.yaml"), Config()
    for name in INHERITED:
        if getattr(config, name) == getattr(plain, name):
            setattr(config, name, getattr(trained, name))
    config.model.path = ""
