"""The table of roles: what a job starts and in which order, on which device, and how often it may be started again.

    ROLES, JOBS ──► roles_of(config) ──► launcher (starts, restarts, ends)
                                     ├─► broker (whom to expect, whose failure ends the run)
                                     └─► process.py (whether the device is there)

A new role is one row here and its module, platform/ROLE/role.py with `main(context)`. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter

from offtrail.platform.config.schema import Config


@dataclass(frozen=True)
class RoleRow:
    """One role; the fields but ``role`` and ``world`` name keys of the configuration, empty = its default."""

    role: str
    count: str = ""
    """How many processes; 1."""
    threads: str = ""
    """torch threads of each; 1."""
    device: str = ""
    """Where it computes; none is needed."""
    restarts: str = ""
    """How often one of its processes may be started again; never: its death ends the run."""
    world: bool = False
    """Whether its processes are the ranks of one torch.distributed world."""
    needed: str = ""
    """There is none where this is empty; always."""


ROLES = (
    RoleRow("broker"),
    RoleRow("learner", count="learner.ranks", threads="learner.threads", device="learner.device", world=True),
    RoleRow(
        "scorer",
        count="scorer.count",
        threads="scorer.threads",
        device="scorer.device",
        restarts="scorer.max_restarts",
        needed="scorer.models",
    ),
    RoleRow(
        "refresher",
        threads="scorer.refresh.threads",
        device="scorer.refresh.device",
        restarts="scorer.refresh.max_restarts",
        needed="scorer.refresh_every",
    ),
    RoleRow(
        "generator",
        count="generator.count",
        threads="generator.threads",
        device="engine.device",
        restarts="generator.max_restarts",
    ),
    RoleRow(
        "evaluator",
        threads="eval.threads",
        device="engine.device",
        restarts="eval.max_restarts",
    ),
)
JOBS = {
    "rl": ("broker", "learner", "scorer", "refresher", "generator", "evaluator"),
    **dict.fromkeys(("sft", "reward_model", "prm"), ("broker", "learner")),
}
"""Job → its roles in the order in which they start: the broker first, for every other one dials it."""


@dataclass(frozen=True)
class RoleSpec:
    """One process. ``device`` and ``restarts_key`` are keys; ``world``: how many ranks its world has, 0 = no world.
    ``forks``: it computes, and on a CPU, so that a fork server can become it (CUDA outlives no fork).
    """

    role: str
    index: int = 0
    threads: int = 1
    device: str = ""
    restarts: int = 0
    restarts_key: str = ""
    world: int = 0
    forks: bool = False

    @property
    def name(self) -> str:
        """Such as generator-0: under which it dials, logs and is spoken of."""
        return f"{self.role}-{self.index}"


def roles_of(config: Config) -> tuple[RoleSpec, ...]:
    """The processes of the configuration's job, in the order in which they start; none where it has no roles."""
    rows = {row.role: row for row in ROLES}
    return tuple(spec for role in JOBS.get(config.job, ()) for spec in _specs(rows[role], config))


def role_of(config: Config, role: str, index: int) -> RoleSpec:
    """The process of that name. ValueError when the job has none."""
    for spec in roles_of(config):
        if (spec.role, spec.index) == (role, index):
            return spec
    raise ValueError(
        f"job={config.job} has no role {role}-{index}: its roles are {', '.join(JOBS.get(config.job, ()))}"
    )


def _specs(row: RoleRow, config: Config) -> list[RoleSpec]:
    if row.needed and not attrgetter(row.needed)(config):
        return []
    count, threads = _number(config, row.count, 1), _number(config, row.threads, 1)
    restarts = _number(config, row.restarts, 0)
    forks = bool(row.device) and attrgetter(row.device)(config) == "cpu"
    world = count if row.world else 0
    return [
        RoleSpec(row.role, index, threads, row.device, restarts, row.restarts, world, forks) for index in range(count)
    ]


def _number(config: Config, key: str, default: int) -> int:
    return int(attrgetter(key)(config)) if key else default
