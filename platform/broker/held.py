"""What this launch holds, noted in the ledger: durable to the second, so that a kill -9 loses no device hours.

Called by broker.py: a Hello says which devices its process holds, each tick notes the seconds, and summary.json has the
sum of all launches.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable

from offtrail.platform.ledger.records import Records
from offtrail.platform.tracking.held import Launch, rows

log = logging.getLogger("offtrail.broker")

NOTE_SECONDS = 1.0
KEY = "launch/"
"""launch/N/devices and launch/N/seconds: the devices are many and change seldom."""


class Held:
    """The launches of one run, of which this is the newest. It began ``age`` seconds ago.

    ``cold_start``: rows of what the making of the start model has held.
    """

    def __init__(self, records: Records, clock: Callable[[], float], age: float = 0.0) -> None:
        self._records, self._clock = records, clock
        self._began = clock() - age
        self._noted = clock()
        self._before = self._read()
        self._now = Launch()
        self.cold_start: list[dict[str, object]] = []
        self._processes = set[str]()
        self._key = f"{KEY}{len(self._before)}"
        self.note(at_once=True)

    def holds(self, name: str, role: str, devices: dict[str, str]) -> None:
        """A role's process is here; one that is started again holds what the one before did."""
        if name in self._processes or not devices:
            return
        self._processes.add(name)
        self._now.holds(role, devices)
        self._records.put({f"{self._key}/devices": json.dumps(self._now.devices)})

    def note(self, *, at_once: bool = False) -> None:
        """Write down how long this launch has lasted, once a second."""
        if at_once or self._clock() - self._noted >= NOTE_SECONDS:
            self._noted = self._clock()
            self._records.put({f"{self._key}/seconds": str(self.seconds)})

    @property
    def seconds(self) -> float:
        """Of this launch."""
        return self._clock() - self._began

    def summary(self) -> dict[str, object]:
        """For summary.json, of all launches."""
        self._now.seconds = self.seconds
        made = {"cold_start_devices": self.cold_start} if self.cold_start else {}
        return {"devices": rows([*self._before, self._now]), **made}

    def _read(self) -> list[Launch]:
        """Those before. One that cannot be read is left out, and said."""
        launches: list[Launch] = []
        while (seconds := self._records.get(f"{KEY}{len(launches)}/seconds")) is not None:
            devices = self._records.get(f"{KEY}{len(launches)}/devices") or "{}"
            try:
                launches.append(Launch.of_plain({"seconds": float(seconds), "devices": json.loads(devices)}))
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                log.warning("what launch %d held cannot be read (%r) and is not counted", len(launches), error)
                launches.append(Launch())
        return launches
