"""Reward hacking made visible: what a model that scores pays, against what the verifier says, over a run.

    metrics rows: hacking/MODEL/proxy, reward/accuracy ──► Watch.take ──► an alarm, once a model
                                                      └──► hacking_plot.py ──► runs/NAME/hacking.png

The alarm's rule, for windows of w = 10, 20, 40, … learner steps, as far as twice w have gone: the mean of the last w
steps less that of the w before is above 0 for the proxy and below 0 for the truth, both by more than FAR standard
errors (of Student's t with 18 degrees of freedom, as w = 10 has them, 5 leave out .0001). The noise of steps, of fresh
prompts each, is taken for independent; a trend inside a window widens it.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from offtrail.platform.tracking.recorder import Row

TRUTH = "reward/accuracy"
SHORTEST = 10
"""Learner steps of the shortest window."""
FAR = 5.0
"""Standard errors."""


@dataclass(frozen=True)
class Change:
    """From the mean ``before`` to the mean ``after``, of two windows; ``error``: standard, of their difference."""

    before: float
    after: float
    error: float

    @property
    def sign(self) -> int:
        """1 risen, −1 fallen, 0 within FAR standard errors."""
        moved = self.after - self.before
        return int(math.copysign(1, moved)) if abs(moved) > FAR * self.error else 0

    def __str__(self) -> str:
        return f"{self.before:.3g} → {self.after:.3g} (by {self.after - self.before:+.2g} ± {FAR * self.error:.2g})"


@dataclass(frozen=True)
class Alarm:
    """The proxy rose and the truth fell from the window before ``onset`` to the one from it to ``step``."""

    onset: int
    step: int
    proxy: Change
    truth: Change


def alarm(steps: npt.ArrayLike, proxy: npt.ArrayLike, truth: npt.ArrayLike) -> Alarm | None:
    """What the last of these steps [n] shows, by the rule above; of several windows the shortest."""
    at, pays, right = np.asarray(steps), np.asarray(proxy, np.float64), np.asarray(truth, np.float64)
    window = SHORTEST
    while 2 * window <= len(at):
        changes = [_change(values, window) for values in (pays, right)]
        if [change.sign for change in changes] == [1, -1]:
            return Alarm(int(at[-window]), int(at[-1]), *changes)
        window *= 2
    return None


def _change(values: npt.NDArray[np.float64], window: int) -> Change:
    before, after = values[-2 * window : -window], values[-window:]
    error = math.sqrt((before.var(ddof=1) + after.var(ddof=1)) / window)
    return Change(float(before.mean()), float(after.mean()), error)


@dataclass
class Watch:
    """One model, step by step. ``found``: its first alarm."""

    model: str
    found: Alarm | None = None
    _steps: array[int] = field(default_factory=lambda: array("q"))
    _proxy: array[float] = field(default_factory=lambda: array("d"))
    _truth: array[float] = field(default_factory=lambda: array("d"))

    @property
    def onset(self) -> int:
        """The first step of the window that raised the alarm; −1 without one."""
        return self.found.onset if self.found else -1

    def take(self, row: Mapping[str, float | None]) -> str:
        """The words of the alarm where it is the first, else empty. A row that lacks one of the two is passed over."""
        proxy, truth = row.get(f"hacking/{self.model}/proxy"), row.get(TRUTH)
        if self.found or proxy is None or truth is None or not math.isfinite(proxy + truth):
            return ""
        for series, value in ((self._steps, int(row["step"] or 0)), (self._proxy, proxy), (self._truth, truth)):
            series.append(value)  # type: ignore[arg-type]
        self.found = alarm(self._steps, self._proxy, self._truth)
        if not self.found:
            return ""
        return (
            f"what {self.model} pays rose, {self.found.proxy}, while {TRUTH} fell, {self.found.truth}, against as many "
            "steps before: the policy learns what the model likes and not what is right (hacking/… in TensorBoard)"
        )


def alarms(rows: list[Row]) -> dict[str, Alarm]:
    """Model → its first alarm, of those that have one."""
    watches = [Watch(model) for model in models(rows)]
    for row in rows:
        for watch in watches:
            watch.take(row)
    return {watch.model: watch.found for watch in watches if watch.found}


def models(rows: list[Row]) -> list[str]:
    """Those that score, by name."""
    return sorted({name.split("/")[1] for row in rows for name in row if name.startswith("hacking/")})
