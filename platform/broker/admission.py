"""The admission policy: how much may be in flight, which version a group needs, and whether it may be trained.

I2: no token older than η = ``staleness.max`` versions is trained.
I2b: in exact mode every token of batch k is of version max(0, k−η): what staleness happens does not depend on timing.

Who calls: scheduler.py, with counts that it reads from the ledger. Nothing here holds state, reads a clock or does I/O.

Why I2 holds in slot order (``wait``): batch k is slots kB…(k+1)B−1, and the lowest open slot s is filled first, so that
all slots below s are living and s ≤ their number. Capacity ≥ 1 means that fewer than (η+v+1)·B slots are living, hence
s < (η+v+1)·B and k = ⌊s/B⌋ ≤ η+v: the version that s needs, k−η, is at most v and is published. No token of it is
older than that version, so none is older than η when batch k trains from version k. In completion order (``drop``) the
same count only makes it likely that groups are young enough; the sweep at dequeue makes it certain.

Numbering: version v = the parameters after v learner steps; batch k trains v = k into k+1; a token's staleness is
k − its version.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from offtrail.algos.filtering import FilterRule, filtered
from offtrail.core.types import Group
from offtrail.platform.config.schema import Config
from offtrail.platform.ledger.rows import Tally
from offtrail.platform.runtime.roles import JOBS

REASONS = ("stale", "filtered", "failed", "unscored", "superseded", "run_ended")
STARVING = ("stale", "filtered", "failed", "unscored")
"""The refusals that a run can die of; the others are the broker's own doing."""


@dataclass(frozen=True, slots=True)
class AdmissionPolicy:
    """The numbers that admission goes by. B = ``batch``, η = ``staleness``; ``exact`` implies slot order. B = 0: the
    job has no groups, its learner has data of its own; a step's batch is then empty, and nothing is admitted.

    ValueError when no run could ever go on under them.
    """

    batch: int
    staleness: int
    max_in_flight: int
    exact: bool = False
    drop: bool = False
    max_refusals: int = 10_000
    filter: FilterRule = "none"
    main: str = "accuracy"

    def __post_init__(self) -> None:
        for key, value, low in (
            ("batch.groups", self.batch, 0),
            ("staleness.max", self.staleness, 0),
            ("generator.max_in_flight", self.max_in_flight, 1),
            ("staleness.max_refusals", self.max_refusals, 1),
        ):
            if value < low:
                raise ValueError(f"{key}={value}: must be ≥ {low}")
        if self.exact and self.max_in_flight < self.batch:
            raise ValueError(
                f"generator.max_in_flight={self.max_in_flight}: staleness.mode=exact leases a batch whole, "
                f"so it must be ≥ batch.groups={self.batch}"
            )

    @classmethod
    def of(cls, config: Config) -> AdmissionPolicy:
        """The policy of a run's configuration."""
        staleness = config.staleness
        return cls(
            batch=config.batch.groups if "generator" in JOBS[config.job] else 0,
            staleness=staleness.max,
            max_in_flight=config.generator.max_in_flight,
            exact=staleness.mode == "exact",
            drop=staleness.on_violation == "drop",
            max_refusals=staleness.max_refusals,
            filter=config.algo.filter_groups,
            main=config.reward.main,
        )

    @property
    def slots(self) -> bool:
        """Whether batches are made of slots (`wait`, `exact`) and not in completion order (`drop`)."""
        return self.exact or not self.drop

    def capacity(self, tally: Tally, version: int, last: int) -> int:
        """How many groups may be admitted now that ``version`` (v) is published; 0 before the first one. ``last``: the
        version that the run ends with, of as many steps.

        min(max_in_flight − leased, (η+v+1)·B − living, last·B − living), where living = leased + queued + training +
        trained: refused groups give their place back.
        Source: AReaL (arXiv:2505.24298, §5.1), with counts from the ledger so that a restart needs no special case.
        """
        if version < 0:
            return 0
        ahead = min(self.staleness + version + 1, last) * self.batch
        return max(0, min(self.max_in_flight - tally.leased, ahead - tally.living))

    def oldest(self, step: int) -> int:
        """The oldest version whose tokens may enter the batch of ``step``; in exact mode the only one."""
        return max(0, step - self.staleness)

    def needs(self, place: int) -> int:
        """The version that a group at ``place`` of the order of training must be made with, or a newer one."""
        return self.oldest(place // self.batch)

    def share(self, generators: int) -> int:
        """The most groups that one of ``generators`` may hold, so that the first to ask does not take all.

        In exact mode a multiple of B, because waves go out whole.
        """
        most = min(self.max_in_flight, (self.staleness + 1) * self.batch)
        fair = -(-most // max(1, generators))
        return -(-fair // self.batch) * self.batch if self.exact else fair

    def violation(self, needed: int, min_version: int, max_version: int, newest: int) -> tuple[str, str]:
        """Why a group that arrives may not be trained, as (reason, detail); ("", "") when it may.

        ``newest`` is the newest version that anybody can have.
        """
        if max_version > newest:
            return "superseded", f"a token of version {max_version}, but the newest version is {newest}"
        if min_version < needed:
            return "stale", f"a token of version {min_version}, but the lease needs {needed} or newer"
        if self.exact and max_version != needed:
            return "stale", f"a token of version {max_version}, but staleness.mode=exact needs version {needed} alone"
        return "", ""

    def without_signal(self, group: Group) -> str:
        """Why a group teaches nothing by ``algo.filter_groups``, or "" when it may be trained.

        It is refused as `filtered` and gives its place back (dynamic sampling; its rule: algos/filtering.py).
        """
        scores = group.components.get(self.main, group.rewards)
        if not filtered(self.filter, group.rewards, scores):
            return ""
        applies = ~np.isnan(scores)
        name, values = "rewards", group.rewards
        if self.filter == "accuracy" and applies.any():
            name, values = f"scores of {self.main}", scores[applies]
        return f"all {len(values)} {name} are {values[0]:g} (algo.filter_groups={self.filter})"

    def starved(self, refused_since_commit: Mapping[str, int]) -> str:
        """One line that says which filter starves the run, or "" while it does not."""
        counts = {reason: refused_since_commit.get(reason, 0) for reason in STARVING}
        total = sum(counts.values())
        if total < self.max_refusals:
            return ""
        worst = max(counts, key=lambda reason: counts[reason])
        way_out = {
            "stale": "raise staleness.max, lower generator.max_in_flight, or set staleness.on_violation=wait",
            "filtered": f"algo.filter_groups={self.filter} finds no signal in them: take a task that is neither too "
            "easy nor too hard, raise batch.group_size, or set algo.filter_groups=none",
            "failed": "see the generators' logs for what fails",
            "unscored": "see the generators' and the scorers' logs for what a model of scorer.models does not score",
        }[worst]
        return (
            f"staleness.max_refusals={self.max_refusals}: {total} groups were refused since the last learner step, "
            f"{counts[worst]} of them as {worst}; {way_out}"
        )
