"""How long a run has held its devices: device seconds of all launches, which is what a cluster bills.

    broker/held.py            ── Launch ──► rows ──► summary.json "devices" ──► cost.py
    Meter (job=eval: no broker) ─┘

A launch holds each of its devices from its beginning to its end, whether a role works on it, waits or is being started
again. A device that two roles share is held once.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from offtrail.platform.tracking.summary import write_atomic

LAUNCHES = "launches.json"
NOTE_SECONDS = 5.0
"""Between two notes of a Meter, at least."""


@dataclass
class Launch:
    """One launch: how many seconds, and identity → (name, role → its processes there) of each device."""

    seconds: float = 0.0
    devices: dict[str, tuple[str, dict[str, int]]] = field(default_factory=dict)

    def holds(self, role: str, devices: dict[str, str]) -> None:
        """Note a process of a role, by the identities and names of its devices."""
        for identity, name in devices.items():
            _, roles = self.devices.setdefault(identity, (name, {}))
            roles[role] = roles.get(role, 0) + 1

    def to_plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {"seconds": self.seconds, "devices": self.devices}

    @classmethod
    def of_plain(cls, found: Any) -> Launch:
        """Raises ValueError, TypeError, KeyError or AttributeError for what ``to_plain`` has not made."""
        devices = {
            str(identity): (str(name), {str(role): int(n) for role, n in roles.items()})
            for identity, (name, roles) in found["devices"].items()
        }
        return cls(float(found["seconds"]), devices)


def rows(launches: Iterable[Launch]) -> list[dict[str, Any]]:
    """Devices of one name that the same roles share, together: ``name``, ``roles`` (role → processes), ``count`` (the
    most of any launch) and ``seconds`` (of all devices and launches). A device is its roles' of all launches: one that
    ended before every role was there makes no second device of it.
    """
    known = list(launches)
    shared: dict[str, set[str]] = {}
    for launch in known:
        for identity, (_, roles) in launch.devices.items():
            shared.setdefault(identity, set()).update(roles)
    found: dict[tuple[str, tuple[str, ...]], dict[str, Any]] = {}
    for launch in known:
        counts, processes = Counter[tuple[str, tuple[str, ...]]](), dict[tuple[str, tuple[str, ...]], Counter[str]]()
        for identity, (name, roles) in launch.devices.items():
            key = (name, tuple(sorted(shared[identity])))
            counts[key] += 1
            processes.setdefault(key, Counter()).update(roles)
        for key, count in counts.items():
            row = found.setdefault(key, {"name": key[0], "roles": dict.fromkeys(key[1], 0), "count": 0, "seconds": 0.0})
            row["seconds"] += count * launch.seconds
            row["count"] = max(row["count"], count)
            row["roles"] = {role: max(processes[key][role], n) for role, n in row["roles"].items()}
    return [found[key] for key in sorted(found)]


class Meter:
    """What one role of a job without a broker holds and spends: runs/NAME/launches.json, which every launch goes on
    with. ``note`` whenever it is ``due``: what a kill -9 takes is what came since the last one.
    """

    def __init__(
        self, run_dir: Path, role: str, devices: dict[str, str], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._file, self._role, self._clock, self._began = run_dir / LAUNCHES, role, clock, clock()
        self._before: list[Any] = []
        with contextlib.suppress(FileNotFoundError, ValueError):  # cut or damaged: it counts from here
            self._before = list(json.loads(self._file.read_text(encoding="utf-8")))
        self._now, self._charges = Launch(), dict[str, float]()
        self._now.holds(role, devices)

    @property
    def due(self) -> bool:
        """Whether the last note is NOTE_SECONDS old."""
        return self._clock() - self._began - self._now.seconds >= NOTE_SECONDS

    def note(self, charges: Mapping[str, float] | None = None) -> None:
        """Write down what this launch has held up to now, and its cumulative charges (None: as they were)."""
        self._now.seconds = self._clock() - self._began
        self._charges = self._charges if charges is None else dict(charges)
        write_atomic(self._file, json.dumps(self._all()))

    def summary(self) -> dict[str, Any]:
        """For summary.json: devices, compute/ROLE_CHARGE over all launches, and of these the sums that every job has
        (broker/run_metrics.py). Tokens are those that were decoded, also for answers that a cut part has lost.
        """
        launches = [Launch.of_plain(one) for one in self._all()]
        spent = Counter[str]()
        for one in self._all():
            spent.update(one["charges"])
        flops = sum(amount for name, amount in spent.items() if name == "flops" or name.endswith("_flops"))
        busy = sum(amount for name, amount in spent.items() if name.startswith("busy_"))
        return {
            "devices": rows(launches),
            **{f"compute/{self._role}_{name}": amount for name, amount in sorted(spent.items())},
            "compute/flops": flops,
            "compute/busy_seconds": busy,
            "tokens/generated": int(spent["decoded_tokens"]),
        }

    def _all(self) -> list[dict[str, Any]]:
        return [*self._before, self._now.to_plain() | {"charges": self._charges}]
