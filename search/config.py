"""Settings of the drivers. No torch here: `launch.py --help` imports this."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from offtrail.core.plugins import OUTSIDE


@dataclass
class SearchConfig:
    """What turns a lease into the samples of one group. sample: batch.group_size independent answers to the prompt."""

    flexible: ClassVar[bool] = False
    """Whether a group may have another number of samples than batch.group_size."""

    name: str = "sample"
    """The driver."""


@dataclass
class OutsideConfig(SearchConfig):
    """A driver from outside the tree: what `function(lease, sampling, generator, **settings)` of the module returns."""

    name: str = OUTSIDE
    """Where it is."""
    flexible: bool = False  # type: ignore[misc]  # here it is for the user to say
    """Whether it makes groups of another number of samples than batch.group_size."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Passed to the function by name."""


SEARCHES: dict[str, type[SearchConfig]] = {"sample": SearchConfig, OUTSIDE: OutsideConfig}
