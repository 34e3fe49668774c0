"""What a tracker is here, and which there are. A new one is a class in a module of this folder and a line of SINKS."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from offtrail.core.plugins import bind, is_plugin, load
from offtrail.platform.config.schema import SINKS


class Sink(Protocol):
    """One tracker of one run. All calls come from one thread; what they raise costs that row, or that text, and a line.

    It is made by its class or function with the run directory and its settings (`tracking.sink_settings.NAME`).
    """

    def start(self, config: Mapping[str, Any], run_id: str, resume_step: int) -> None:
        """Begin, or go on with the run that had this ``run_id``. ``config``: dotted key → value; ``resume_step``: the
        last learner step that stands (0: a new run). A step that was written in an earlier launch does not come again.
        """

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Finite numbers of one learner step, by the names of docs/metrics.md. Scores of a version (`eval/…`) come by
        themselves, and may come behind later steps.
        """

    def text(self, step: int, name: str, text: str) -> None:
        """Sample answers of that step."""

    def close(self) -> None:
        """Bring everything to where it goes; a run waits for it worker.CLOSE_SECONDS at most."""


def label_of(run_dir: Path) -> str:
    """A run's name for people: of a recipe's stage with the recipe's."""
    folder = run_dir.resolve()
    staged = folder.parent.name == "stages"
    return f"{folder.parent.parent.name}-{folder.name}" if staged else folder.name


def maker_of(name: str, settings: Mapping[str, Any], run_dir: Path) -> Callable[[], Sink]:
    """How the sink of that name is made, later and in its own thread: its package is imported only then.

    The maker raises PluginError for what cannot be loaded, or has no such setting.
    """

    def make() -> Sink:
        source = name if is_plugin(name) else SINKS[name]
        target = load(source, what="tracking.sinks")
        # A class has the folder among its settings, which a function has as its first argument.
        known = bind(partial(target, run_dir), settings, name=name, what=f"tracking.sink_settings.{name}", given=0)
        sink: Sink = known()
        return sink

    return make
