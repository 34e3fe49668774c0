"""From settings to a driver: the one place that knows every kind. A lease names the driver that it wants."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from offtrail.core.plugins import is_plugin, load
from offtrail.core.protocols import Driver
from offtrail.core.types import Lease, Sampling
from offtrail.search.config import OutsideConfig, SearchConfig
from offtrail.search.sample import SampleDriver


class SearchError(ValueError):
    """A driver that cannot be made; one line that names the key, the value and the way out."""


def make_driver(config: SearchConfig, lease: Lease, sampling: Sampling, generator: str) -> Driver:
    """The driver of a lease. ``sample`` has no settings and is always there; any other must be the one of ``config``.

    Raises PluginError and SearchError.
    """
    if lease.driver == "sample":
        return SampleDriver(lease, sampling, generator)
    if lease.driver == config.name and isinstance(config, OutsideConfig):
        driver: Driver = maker(config)(lease, sampling, generator, **config.settings)
        return driver
    raise SearchError(
        f"search.name={config.name}: the lease asks for driver {lease.driver}, of which there are no settings here; "
        "start it with the run's own config.yaml"
    )


def maker(config: OutsideConfig) -> Callable[..., Driver]:
    """The user's function, with which the settings agree. Raises PluginError and SearchError."""
    made: Callable[..., Driver] = load(config.name, what="search.name")
    if not callable(made):
        raise SearchError(f"search.name={config.name}: is {made!r}, which cannot be called; name a function or a class")
    try:
        inspect.signature(made).bind(None, None, None, **config.settings)
    except TypeError as error:
        raise SearchError(
            f"search.settings={config.settings}: {config.name} is called with (lease, sampling, generator) and the "
            f"settings by name: {error}"
        ) from None
    return made


def check(config: SearchConfig) -> None:
    """Raise PluginError or SearchError where no driver could be made: asked before anything starts."""
    if is_plugin(config.name) and isinstance(config, OutsideConfig):
        maker(config)
