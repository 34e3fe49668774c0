"""The broker's numbers: its part of a learner step's metrics, and the contents of summary.json.

Called by broker.py with what the ledger counts and the roster has heard.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from offtrail.platform.broker.admission import REASONS
from offtrail.platform.broker.roster import Roster
from offtrail.platform.ledger.ledger import Ledger
from offtrail.platform.ledger.rows import Ages, Audit, Tally
from offtrail.platform.tracking.summary import LOSSES
from offtrail.platform.wire.messages import Heartbeat

Metrics = dict[str, float]
LARGEST = 1e30
"""Above what any counter reaches (FLOPs of a year on 10⁵ GPUs: 10²⁷); sums of such stay finite."""


@dataclass
class RunMetrics:
    """Sums of one run, across its restarts: what was spent before stands in the ledger."""

    ledger: Ledger
    roster: Roster
    clock: Callable[[], float]
    cold_start: Metrics = field(default_factory=dict)
    """What the making of the start model cost: flops, busy_seconds, tokens. Empty: not known, or no cold start."""
    of_groups: bool = True
    """Whether the job trains groups: those of the numbers that speak of them are said only then."""
    sets: Sequence[str] = ()
    """Names of the held-out sets beside the task's own."""
    dropped: int = 0
    """Values of heartbeats and evaluations that were no numbers to count with."""

    def __post_init__(self) -> None:
        self._began = self._committed_at = self.clock()
        self._wall_before = float(self.ledger.records.get("wall_seconds") or 0.0)
        self._time: dict[str, float] = json.loads(self.ledger.records.get("time") or "{}")
        self._restarts_before = Counter[str](json.loads(self.ledger.records.get("restarts") or "{}"))
        self._shares: Metrics = {}
        self._tokens_at_commit = self.ledger.tally().tokens

    @property
    def wall_seconds(self) -> float:
        """Of all lives of the run's broker, up to now or (earlier lives) their last commit."""
        return self._wall_before + self.clock() - self._began

    @property
    def restarts(self) -> dict[str, int]:
        """Role process by name → how often it was started again, in all launches of the run."""
        return dict(self._restarts_before + Counter(self.roster.restarts))

    def mark(self) -> None:
        """The training clock starts now: the first version is out."""
        self._committed_at = self.clock()
        self._tokens_at_commit = self.ledger.tally().tokens
        for member in self.roster:
            member.mark = None  # the next heartbeat begins its window: this one's time is partly start-up

    def row(self, ages: Ages, samples: int, tokens: int) -> Metrics:
        """The broker's metrics of one commit; ``ages`` of its batch, ``samples`` in it (0: it is no batch of groups,
        and ``tokens`` says how many were trained). Moves the marks.
        """
        now, tally = self.clock(), self.ledger.tally()
        seconds = max(1e-9, now - self._committed_at)
        generated = tally.tokens - self._tokens_at_commit
        self._committed_at, self._tokens_at_commit = now, tally.tokens
        self._spend()
        of_groups = {
            **queue_row(tally),
            **staleness_row(ages),
            "staleness/in_flight_mean": ages.flight_sum / max(1, ages.tokens),
            "staleness/in_queue_mean": ages.queue_sum / max(1, ages.tokens),
            "throughput/generated_tokens_per_second": generated / seconds,
            "throughput/samples_per_second": samples / seconds,
        }
        return {
            **(of_groups if samples else {}),
            "throughput/trained_tokens_per_second": (ages.tokens or tokens) / seconds,
            "time/step_seconds": seconds,
            **self._shares,
            **self.mismatch(),
            **self.scores(),
            **self.compute(),
        }

    def remarks(self) -> dict[str, str]:
        """What the next life needs to go on with these sums."""
        return {
            "wall_seconds": str(self.wall_seconds),
            "time": json.dumps(self._time),
            "restarts": json.dumps(self.restarts),
        }

    def compute(self) -> Metrics:
        """compute/ROLE_NAME: the compute ledger's totals over all processes and lives, the cold start's, and the sums
        of FLOPs and of busy seconds over them all.
        """
        return {
            **{
                f"compute/{role}_{slug(name)}": amount
                for role, amounts in sorted(self.ledger.records.charges().items())
                for name, amount in sorted(amounts.items())
            },
            **{f"compute/cold_start_{name}": amount for name, amount in self.cold_start.items()},
            "compute/flops": self.flops,
            "compute/busy_seconds": self.busy_seconds,
        }

    @property
    def flops(self) -> float:
        """Of all roles, evaluator and cold start included."""
        return self.cold_start.get("flops", 0.0) + self._sum(lambda name: name == "flops" or name.endswith("_flops"))

    @property
    def busy_seconds(self) -> float:
        """Of all processes of all roles, and of the cold start."""
        return self.cold_start.get("busy_seconds", 0.0) + self._sum(lambda name: name.startswith("busy/"))

    @property
    def tokens(self) -> float:
        """Decoded by the generators, whatever became of them; trained ones where the job has no generators."""
        charges = self.ledger.records.charges()
        if decoded := charges.get("generator", {}).get("decoded_tokens", 0.0):
            return decoded
        return charges.get("learner", {}).get("trained_tokens", 0.0) if "generator" not in charges else 0.0

    def _sum(self, counts: Callable[[str], bool]) -> float:
        roles = self.ledger.records.charges().values()
        return sum(amount for charges in roles for name, amount in charges.items() if counts(name))

    def mismatch(self) -> Metrics:
        """mismatch/probe_*: the generators' last comparisons on the fixed text, the worst of them."""
        gauges = [m.beat.gauges for m in self.roster if m.beat is not None]
        found = sorted({name for gauge in gauges for name in gauge if name.startswith("mismatch/")})
        return {name: max(gauge[name] for gauge in gauges if name in gauge) for name in found}

    def scores(self) -> Metrics:
        """scores/MODEL/*: what the refresher has said last of the model that it trains."""
        gauges = [m.beat.gauges for m in self.roster if m.role == "refresher" and m.beat is not None]
        return {name: value for gauge in gauges for name, value in gauge.items() if name.startswith("scores/")}

    def busy_fraction(self, role: str) -> float | None:
        """Busy share of the time from the first version to the last commit, over all processes of a role; None where
        that was too short for two heartbeats of one of them.
        """
        total = self._time.get(f"{role}/window", 0.0)
        return self._time.get(f"{role}/busy", 0.0) / total if total else None

    def _spend(self) -> None:
        """Shares of time by role since the last commit; a role without a new heartbeat keeps its last ones."""
        for role in {m.role for m in self.roster}:
            windows = [m.window() for m in self.roster if m.role == role]
            total = sum(seconds for seconds, _ in windows)
            if total <= 0:
                continue
            spent: dict[str, float] = {}
            for _, parts in windows:
                for name, seconds in parts.items():
                    spent[name] = spent.get(name, 0.0) + seconds
            busy = sum(seconds for name, seconds in spent.items() if name.startswith("busy/"))
            self._time[f"{role}/window"] = self._time.get(f"{role}/window", 0.0) + total
            self._time[f"{role}/busy"] = self._time.get(f"{role}/busy", 0.0) + busy
            self._shares[f"time/{role}_busy"] = busy / total
            self._shares |= {f"time/{role}_{slug(name)}": seconds / total for name, seconds in spent.items()}

    def summary(self, status: str, reason: str, seed: int, version: int, audit: Audit) -> dict[str, Any]:
        """The contents of summary.json (versions and git_commit are added where it is written)."""
        ledger, tally, ages = self.ledger, self.ledger.tally(), self.ledger.ages()
        return {
            "status": status,
            **({"reason": reason} if reason else {}),
            "steps": max(0, version),
            "wall_seconds": self.wall_seconds,
            **(self._of_groups(tally, ages, audit) if self.of_groups else self._of_examples()),
            "tokens/trained": ages.tokens or int(ledger.records.charges().get("learner", {}).get("trained_tokens", 0)),
            "learner/busy_fraction": self.busy_fraction("learner"),
            **self.compute(),
            "restarts": self.restarts,
            **({"values_dropped": self.dropped} if self.dropped else {}),
            **({"set_aside": aside} if (aside := ledger.records.aside()) else {}),
            "lineage": ledger.lineage,
            "changes": json.loads(ledger.records.get("changes") or "[]"),
            "seed": seed,
        }

    def _of_examples(self) -> dict[str, Any]:
        """What a job that learns from examples has to say: its loss, and what its model is worth on held-out ones."""
        records = self.ledger.records
        edges = {name: records.edge_metrics(name) for name in LOSSES}
        scored = [*records.evals().values()]
        edges |= {name: (scored[0].get(name), scored[-1].get(name)) for name in (scored[-1] if scored else ())}
        return {
            f"{name}_{end}": value
            for name, both in edges.items()
            if both[1] is not None
            for end, value in zip(("first", "last"), both, strict=True)
        }

    def _of_groups(self, tally: Tally, ages: Ages, audit: Audit) -> dict[str, Any]:
        """What only a job that trains groups has to say: scores, counts, staleness, and what its generators did."""
        records = self.ledger.records
        scores = {
            f"{area}/accuracy_{end}": score
            for area in ("eval", *(f"eval/{label}" for label in self.sets))
            for end, score in zip(("first", "last"), records.edge_scores(f"{area}/accuracy"), strict=True)
        }
        first, last = records.edge_metrics("reward/accuracy")
        return {
            **scores,
            "reward/accuracy_first": first,
            "reward/accuracy_last": last,
            **group_counts(tally),
            # The counters are exact at every moment, the recount is as new as the last checkpoint.
            "groups/lost": max(audit.lost, tally.admitted - tally.accounted),
            "groups/duplicated": audit.duplicated,
            **staleness_row(ages),
            "archive/unsealed": len(self.ledger.shards.unsealed()),
            "tokens/generated": tally.tokens,
            "tokens/discarded": tally.discarded,
            "generator/busy_fraction": self.busy_fraction("generator"),
            "weights/publish_seconds_mean": records.mean_metric("weights/publish_seconds"),
        }


def plain(beat: Heartbeat) -> tuple[Heartbeat, int]:
    """A heartbeat with the counters that can be added up, and how many could not: a NaN or an infinity among them would
    make every later sum one.
    """
    kept = {
        name: {key: value for key, value in getattr(beat, name).items() if 0 <= value <= LARGEST}
        for name in ("seconds", "compute")
    }
    kept["gauges"] = {key: value for key, value in beat.gauges.items() if abs(value) <= LARGEST}
    dropped = sum(len(getattr(beat, name)) - len(values) for name, values in kept.items())
    since = beat.since if abs(beat.since) <= LARGEST else 0.0
    if not dropped and since == beat.since:
        return beat, 0
    return msgspec.structs.replace(beat, since=since, **kept), dropped


def staleness_row(ages: Ages) -> Metrics:
    """Staleness of tokens, in versions; ``staleness/stale_token_share``: of those one version old or more."""
    tokens = max(1, ages.tokens)
    return {
        "staleness/max": float(ages.age_max),
        "staleness/mean": ages.age_sum / tokens,
        "staleness/stale_token_share": ages.stale_tokens / tokens,
    }


def queue_row(tally: Tally) -> Metrics:
    """How many groups wait, are being made, and were ever refused (in all and by reason)."""
    return {
        "queue/groups": float(tally.queued),
        "queue/leased": float(tally.leased),
        "queue/refused": float(sum(tally.refused.values())),
        **{f"queue/refused_{reason}": float(n) for reason, n in tally.refused.items() if n},
    }


def group_counts(tally: Tally) -> dict[str, Any]:
    """The groups/… keys of summary.json but for the audit's."""
    return {
        "groups/admitted": tally.admitted,
        "groups/trained": tally.trained,
        "groups/refused": {reason: tally.refused.get(reason, 0) for reason in REASONS},
        "groups/in_flight": tally.leased + tally.queued + tally.training,
    }


def slug(name: str) -> str:
    """An activity's or charge's name as part of a metric's: "waiting/a version" → "waiting_a_version"."""
    return "_".join("".join(c if c.isalnum() else " " for c in name).split())
