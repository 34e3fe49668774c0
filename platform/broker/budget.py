"""What a run may spend: run.budget_flops, run.budget_tokens, run.budget_seconds. The first to be spent ends it.

    ending.check, at each commit and tick: spent() ──► scheduler.end_here ──► the last version is scored ──► completed

A batch that was handed out is still trained: a run ends up to one step after its budget (a replay with all of its
steps), and with what its last version's evaluation costs. FLOPs and tokens are as new as the last heartbeats.
"""

from __future__ import annotations

from dataclasses import dataclass

from offtrail.platform.broker.run_metrics import Metrics, RunMetrics
from offtrail.platform.config.schema import RunConfig


@dataclass(frozen=True)
class Budget:
    """The limits of a run, and what it has spent of them in all its lives. A limit of 0 is none."""

    limits: RunConfig
    numbers: RunMetrics

    def spent(self) -> str:
        """One line that names the first limit that is reached, or ""."""
        for key, limit, used, unit in self._accounts():
            if 0 < limit <= used:
                return f"run.budget_{key}={limit:g}: {used:g} {unit} are spent"
        return ""

    def row(self) -> Metrics:
        """budget/<what>: each limit's spent share, for summary.json."""
        return {f"budget/{key}": used / limit for key, limit, used, _ in self._accounts() if limit > 0}

    def _accounts(self) -> tuple[tuple[str, float, float, str], ...]:
        limits, numbers = self.limits, self.numbers
        return (
            ("flops", limits.budget_flops, numbers.flops, "FLOPs"),
            ("tokens", limits.budget_tokens, numbers.tokens, "tokens"),
            ("seconds", limits.budget_seconds, numbers.wall_seconds, "seconds"),
        )
