"""A broker's run for the tests that talk with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fakes.run import Run


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Called with changes of the configuration (``learner__steps=3``): a broker in tmp_path/run."""
    runs: list[Run] = []

    def make(**changes: Any) -> Run:
        runs.append(Run(tmp_path / "run", **changes))
        return runs[-1]

    yield make
    for run in runs:
        run.close()
