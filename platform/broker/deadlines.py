"""What time brings to a run: lost holders, starvation, and the end of one that stands still (I4).

broker: progress(), whenever something moves ──► tick(), four times a second ──► leases go back | the run fails
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from offtrail.platform.broker.ending import Ending
from offtrail.platform.broker.polls import Polls
from offtrail.platform.broker.roster import Roster
from offtrail.platform.broker.scheduler import Scheduler
from offtrail.platform.config.schema import Config
from offtrail.platform.runtime.roles import roles_of

log = logging.getLogger("offtrail.broker")

TICK_SECONDS = 0.25


class Deadlines:
    """When the run last moved, and what follows from it; ``ending`` is told of a run that cannot go on."""

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        scheduler: Scheduler,
        roster: Roster,
        polls: Polls,
        ending: Ending,
        clock: Callable[[], float],
    ) -> None:
        self.config, self.run_dir, self.scheduler, self.roster = config, run_dir, scheduler, roster
        self.polls, self.ending, self.clock = polls, ending, clock
        self.expected = [spec.name for spec in roles_of(config) if spec.role != "broker"]
        self.moved = self.ticked = clock()
        self._loading: dict[str, tuple[float, float]] = {}
        """Who loads a version: since when, by its own clock, and since when that is known, by this one."""

    def progress(self) -> None:
        """Something in the run has moved."""
        self.moved = self.clock()

    def tick(self) -> None:
        """Does nothing once the run has ended. Raises LedgerError."""
        now = self.clock()
        # A broker that was stopped itself must not blame the others for it.
        gap, self.ticked = now - self.ticked, now
        if gap > self.config.broker.heartbeat_seconds + TICK_SECONDS:
            for member in self.roster:
                member.heard = min(now, member.heard + gap)
            self.moved = min(now, self.moved + gap)
            self._loading = {name: (since, min(now, known + gap)) for name, (since, known) in self._loading.items()}
        if not self.ending.status:
            self._expire(now)
            self._check(now)
            self._check_loads(now)

    def _expire(self, now: float) -> None:
        """Leases of a holder whose heartbeats are lost go back; a long answer alone never loses one."""
        limit = self.config.broker.heartbeat_seconds * self.config.broker.lease_heartbeats
        for member in self.roster:
            if member.lost or now - member.heard <= limit:
                member.lost = member.lost and now - member.heard > limit
                continue
            member.lost = self.polls.dirty = True
            returned = self.scheduler.ledger.return_leases(member.name)
            log.warning(
                "%s: no heartbeat for %.1f s, %d leases returned", member.name, now - member.heard, len(returned)
            )

    def _check(self, now: float) -> None:
        """End a run that starves or stands still, with the sentence that says why (I4)."""
        if line := self.scheduler.starved():
            self.ending.fail(line)
            return
        deadline = self.config.broker.deadline_seconds
        if now - self.moved <= deadline:
            return
        if missing := [name for name in self.expected if name not in self.roster]:
            self.ending.fail(
                f"the broker waits for {', '.join(missing)} to dial {self.run_dir / 'endpoint.json'}; "
                f"nothing has moved for broker.deadline_seconds={deadline:g}; see their logs in {self.run_dir / 'logs'}"
            )
            return
        waiting = self.polls.longest()
        if waiting is not None and now - waiting[1] > deadline:
            peer = waiting[0]
            self.ending.fail(
                f"{peer} waits for {self.polls.sentence(peer)}; nothing has moved for "
                f"broker.deadline_seconds={deadline:g} ({self._doings(now, peer)})"
            )

    def _check_loads(self, now: float) -> None:
        """End a run in which somebody has loaded one version for longer than the deadline: its process lives, is busy,
        and does nothing else meanwhile.
        """
        deadline = self.config.broker.deadline_seconds
        for member in self.roster:
            beat = member.beat
            if beat is None or beat.activity != "busy/load_weights":
                self._loading.pop(member.name, None)
                continue
            since, known = self._loading.get(member.name, (beat.since, now))
            self._loading[member.name] = beat.since, known if since == beat.since else now
            if not self.ending.status and now - self._loading[member.name][1] > deadline:
                self.ending.fail(
                    f"{member.name} loads weights (version {self.scheduler.version} is the newest), for longer than "
                    f"broker.deadline_seconds={deadline:g}; see its log in {self.run_dir / 'logs'}, and whether "
                    f"weights.channel={self.config.weights.channel} can be read there"
                )

    def _doings(self, now: float, but: str) -> str:
        others = [m for m in self.roster if m.name != but]
        return ", ".join(
            f"{m.name} {m.beat.activity if m.beat else 'silent'}, heard {now - m.heard:.0f} s ago" for m in others
        )
