"""The scheduler: the admission policy applied to the ledger. No sockets, no clock of its own: broker.py calls it.

I1 (ledger.py) and I2, I2b (admission.py) hold after every call, whatever the order of calls: that is the property test.

    grant    open slots and returned leases ──► a holder
    arrive   a finished group ──► queued, or refused by the admission policy, or discarded because its attempt is late
    batch    queued groups ──► the durable batch of a step, after a sweep for stale ones
    commit   the batch is trained; the version it made is out
"""

from __future__ import annotations

import itertools
import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from operator import attrgetter
from typing import Literal

from offtrail.core.types import Group, Lease, Problem
from offtrail.platform.broker.admission import AdmissionPolicy
from offtrail.platform.broker.problems import ProblemError, Problems
from offtrail.platform.broker.rules import GroupRules
from offtrail.platform.ledger.ledger import Ledger
from offtrail.platform.ledger.rows import Arrival, Grant, GroupRow, counted
from offtrail.platform.wire.groups import pack_group, unpack_group

log = logging.getLogger("offtrail.broker")

Outcome = Literal["new", "repeated", "diverged"]
"""What became of a publication; diverged: the log holds another checksum for the same version."""

GIVEN_UP = ("failed", "filtered", "stale", "unscored")
"""Reasons that a holder may give."""
HOPELESS = 8
"""So many batches' worth of groups that failed, before the first that did not, end the run."""


class RequestError(ValueError):
    """A request that makes no sense where the run stands; one line for the role that sent it."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a finished group. ``changed`` is false for a repetition or a late attempt."""

    accepted: bool
    reason: str = ""
    changed: bool = False


class Scheduler:
    """Grants, arrivals, batches and commits of one run.

    ``samples``: those that a lease expects of its group; its ``driver`` may give it another number where it is
    ``flexible``. ``rules``: what else a group must be.
    ``version``: the newest one published in this life (−1: none yet). ``handed``: the newest step whose batch was
    handed out in this life.
    """

    def __init__(
        self,
        ledger: Ledger,
        admission: AdmissionPolicy,
        problems: Callable[[int], Problem],
        samples: int,
        *,
        driver: str = "sample",
        flexible: bool = False,
        rules: GroupRules | None = None,
    ) -> None:
        self.ledger, self.admission, self.problems = ledger, admission, Problems(problems)
        self.samples, self.driver, self.flexible, self.rules = samples, driver, flexible, rules or GroupRules()
        self.version = -1
        self.replay_until = 0
        self.handed = -1
        self._at_commit = dict(ledger.tally().refused)

    @property
    def training(self) -> bool:
        """Whether the newest version's batch was handed out: its successor may be out before its commit arrives."""
        return self.handed >= self.version >= 0

    @property
    def complete(self) -> bool:
        """Whether the batch of the last step is logged: no group is needed any more."""
        return self.ledger.logged() >= self.ledger.last

    # ------------------------------------------------------------------ leases

    def grant(self, holder: str, room: int, generators: int, now: float) -> list[Lease]:
        """Up to ``room`` leases: returned ones first, then open slots as far as capacity and the holder's share go.

        In exact mode one whole wave, or nothing: there ``room`` only says whether any is wanted. A group whose problem
        the task cannot give is refused as `failed`, and its place is open again.
        """
        room = min(room, self.admission.share(generators) - self.ledger.held(holder))
        if room < 1 or self.complete:
            return []
        wave, grants = self._wave() if self.admission.exact else (-1, self._next(room))
        rows = self.ledger.grant(holder, grants, now) if grants else []
        leases = []
        for row in rows:
            try:
                leases.append(self._lease(row, wave))
            except ProblemError as error:
                log.warning("group %d: %s", row.id, error)
                self.ledger.refuse(row.id, "failed", str(error))
        return leases

    def _next(self, room: int) -> list[Grant]:
        admission, ledger = self.admission, self.ledger
        # A returned lease may need a version that the replay after a restart has yet to publish again.
        returned = [Grant(r.slot, r.needs, r.id) for r in ledger.returned() if r.needs <= self.version]
        fresh = min(admission.capacity(ledger.tally(), self.version, ledger.last), room - len(returned))
        return (returned + self._open(fresh))[:room]

    def _open(self, count: int) -> list[Grant]:
        """The next ``count`` fresh places: open slots from the lowest, or the next numbers in completion order."""
        if count < 1:
            return []
        admission, ledger = self.admission, self.ledger
        if admission.slots:
            floor = ledger.logged() * admission.batch  # slots below belong to logged batches, which are living
            taken = ledger.taken(floor)
            slots = islice((s for s in itertools.count(floor) if s not in taken), count)
            return [Grant(slot, admission.needs(slot)) for slot in slots]
        first, living = ledger.admitted, ledger.tally().living
        return [Grant(first + i, admission.needs(living + i)) for i in range(count)]

    def _wave(self) -> tuple[int, list[Grant]]:
        """Exact mode: all of the lowest batch that is open and of which nothing is in flight, in slot order.

        Where a part of a wave was returned, all that was granted with it goes out again together, arrived or not: who
        decodes together decides the rounding, and a run that was disturbed repeats the numbers of one that was not.
        Refused slots of a wave are refilled together, once the rest of it has arrived: which problems a wave gets does
        not depend on when its refusals came. Where a filter refuses as a matter of course, no wave goes out before the
        ones below it are full: problems are numbered in the order of grants, which timing must not decide.
        """
        admission, B = self.admission, self.admission.batch
        last = self.ledger.last
        capacity = admission.capacity(self.ledger.tally(), self.version, last)
        first = self.ledger.logged()
        taken, leased = self.ledger.taken(first * B), self.ledger.leased()
        for wave in range(first, min(self.version + admission.staleness + 1, last)):
            slots = range(wave * B, (wave + 1) * B)
            mine = [row for row in leased if row.slot in slots]
            fresh = [Grant(slot, admission.needs(slot)) for slot in slots if slot not in taken]
            in_flight = any(row.holder for row in mine)
            if in_flight and admission.filter != "none":
                break
            if in_flight or not (mine or fresh):
                continue
            if mine:
                beside = [row for row in self.ledger.queued_beside([row.id for row in mine]) if row.slot in slots]
                again = sorted([*mine, *beside], key=attrgetter("slot"))
                if sum(row.holder != "" for row in leased) + len(again) > admission.max_in_flight:
                    break
                return wave, [Grant(row.slot, row.needs, row.id) for row in again]
            if len(fresh) > capacity:
                break
            return wave, fresh
        return -1, []

    def _lease(self, row: GroupRow, wave: int) -> Lease:
        exact = self.admission.exact
        return Lease(
            group=row.id,
            slot=row.slot,
            attempt=row.attempt,
            problem=self.problems(row.id),
            samples=self.samples,
            min_version=row.needs,
            exact_version=row.needs if exact else -1,
            wave=wave,
            driver=self.driver,
        )

    def why_no_lease(self, holder: str, generators: int) -> str:
        """What a holder that got nothing waits for, and on whom (I4)."""
        admission, tally, version = self.admission, self.ledger.tally(), self.version
        if version < 0:
            return f"version {self.ledger.checkpoint} from learner-0"
        if self.complete or tally.living >= self.ledger.last * admission.batch:
            return f"the end of the run: all groups of its {self.ledger.last} steps are admitted"
        if tally.living >= (admission.staleness + version + 1) * admission.batch:
            why = f"staleness.max={admission.staleness}: {tally.living} groups are admitted at version {version}"
            return f"version {version + 1} from learner-0 ({why})"
        held, share = self.ledger.held(holder), admission.share(generators)
        if held >= share:
            why = f"its share of generator.max_in_flight={admission.max_in_flight} is {share}"
            return f"one of its own {held} groups to finish ({why})"
        return f"one of {tally.leased} groups in flight ({self._holders()}) to finish"

    def _holders(self) -> str:
        counts = Counter(row.holder or "to be issued again" for row in self.ledger.leased())
        return ", ".join(f"{name}: {n}" for name, n in sorted(counts.items())) or "nobody"

    # ------------------------------------------------------------------ arrivals

    def arrive(self, group: Group, holder: str, now: float) -> Verdict:
        """Queue a finished group, or refuse it by the policy; durable when this returns. Stamps the group.

        RequestError when it was never admitted. A late attempt is discarded and changes nothing; a repetition (its
        acknowledgement was lost) gets the same answer again. Of a group that is not what its lease says nothing is
        kept: neither the learner nor the archive need be able to read it.
        """
        row = self._row(group.group)
        if (known := self._known(row, group.attempt, holder)) is not None:
            return known
        if detail := self._misfit(row, group):
            self.ledger.refuse(row.id, "failed", detail)
            return Verdict(False, f"failed: {detail}", changed=True)
        group.generator = holder
        versions = counted(group.versions)
        low, high = min(versions, default=row.needs), max(versions, default=row.needs)
        # A generator may apply a version before its commit arrives here: it was queued under that version.
        group.queued_version, group.queued_at = max(self.version, high), now
        reason, detail = self.admission.violation(row.needs, low, high, self.newest)
        if not reason:
            detail = self.admission.without_signal(group)
            reason = "filtered" if detail else ""
        arrival = Arrival(pack_group(group), group.size, versions, group.queued_version, now)
        if reason:
            self.ledger.refuse(row.id, reason, detail, arrival, self.ledger.lineage)
            return Verdict(False, f"{reason}: {detail}", changed=True)
        self.ledger.submit(row.id, arrival, self.ledger.lineage)
        return Verdict(True, changed=True)

    def fail(self, group: int, attempt: int, holder: str, reason: str, detail: str) -> Verdict:
        """The holder gives the group up: refused as ``reason``, and its place is open again."""
        row = self._row(group)
        if (known := self._known(row, attempt, holder)) is not None:
            return known
        if reason not in GIVEN_UP:
            reason, detail = "failed", f"{reason}: {detail}"
        self.ledger.refuse(group, reason, detail)
        return Verdict(False, reason, changed=True)

    @property
    def newest(self) -> int:
        """The newest version that a generator can have applied. While a batch is in training its version may be out
        before its commit arrives here.
        """
        return max(self.ledger.newest, self.version + 1 if self.training else self.version)

    def _row(self, group: int) -> GroupRow:
        row = self.ledger.row(group) if 0 <= group < self.ledger.admitted else None
        if row is None:
            raise RequestError(f"group {group} was never admitted by this run")
        return row

    @staticmethod
    def _known(row: GroupRow, attempt: int, holder: str) -> Verdict | None:
        """The answer to a repetition or a late attempt; None when the group is this holder's to give."""
        if row.state != "leased" and row.attempt == attempt:
            return Verdict(row.state != "refused", row.reason)
        if row.state != "leased" or row.attempt != attempt or row.holder != holder:
            return Verdict(False, f"late: attempt {attempt} of group {row.id} is over, attempt {row.attempt} counts")
        return None

    def _misfit(self, row: GroupRow, group: Group) -> str:
        """Why a group is not what its lease and the rules say, or ""."""
        for name, got, expected in (
            ("slot", group.slot, row.slot),
            ("problem", group.problem.index, row.id),
            ("samples", group.size, group.size if self.flexible else self.samples),
        ):
            if got != expected:
                return f"{name} is {got}, the lease says {expected}"
        if not self.problems.same(row.id, group.problem):
            return f"its problem is not problem {row.id} of the task, which was leased"
        return self.rules.broken_by(group)

    # ------------------------------------------------------------------ batches and commits

    def batch(self, step: int) -> list[int] | None:
        """The durable ordered ids of the batch of ``step``; None while there are not enough groups.

        A batch trains from the version of its number. The next one may be asked for while this one trains, so that it
        is at the learner when the version is out; RequestError on any other step. What is handed out ahead can never be
        taken back: not in a replay, which may diverge, and no token of a version that is not committed.
        """
        ahead = step == self.version + 1 and self.training
        if step != self.version and not ahead:
            raise RequestError(f"the batch of step {step} was asked for, but the newest version is {self.version}")
        if ahead and self.version < self.ledger.newest:
            return None
        groups = self.ledger.batch(step)
        if groups is None:
            groups = self._form(step, self.version if ahead else None)
        if groups is not None:
            self.handed = step
        return groups

    def trained(self, first: int, end: int, most: int) -> list[int]:
        """The ids of at most ``most`` groups of the batches ``first`` … ``end`` − 1, the newest, in their order."""
        found: list[int] = []
        for step in reversed(range(first, end)):
            if len(found) >= most:
                break
            found = [*(self.ledger.batch(step) or []), *found]
        return found[max(0, len(found) - most) :]

    def contents(self, step: int, ids: Sequence[int]) -> list[Group] | None:
        """The groups of a logged batch. None where one of them cannot be read or trained: it is set aside, and the
        batch is to be formed anew.
        """
        bodies, groups, unfit = self.ledger.payloads(ids), list[Group](), dict[int, str]()
        for group in ids:
            try:
                groups.append(self._trainable(bodies, group))
            except ValueError as error:
                unfit[group] = str(error)
        if not unfit:
            return groups
        self.set_aside(step, unfit)
        return None

    def _trainable(self, bodies: dict[int, bytes], group: int) -> Group:
        if group not in bodies:
            raise ValueError("its payload is gone from the ledger")
        found = unpack_group(bodies[group], self.rules.vocab_size)
        if detail := self.rules.without_channel(found):
            raise ValueError(detail)
        return found

    def set_aside(self, step: int, unfit: dict[int, str]) -> None:
        """Groups of a logged batch that cannot be trained are refused, whatever the log says; nothing after the batch
        is logged any more, and the open slots are filled again.
        """
        for group, why in unfit.items():
            log.warning("group %d of batch %d is set aside: %s", group, step, why)
        self.ledger.unlog(step, unfit)
        self.handed, self.replay_until = min(self.handed, step - 1), min(self.replay_until, step)

    def blame(self, step: int, error: str) -> None:
        """The learner has failed on the batch of ``step``: durable, for the next launch to go on without it."""
        noted = self.ledger.records.get("noted")
        self.ledger.records.put({"unfit": json.dumps({"step": step, "error": error, "noted": noted})})

    def _drop_blamed(self) -> None:
        """A batch that the learner of an earlier launch has failed on is set aside whole: nobody knows which group of
        it was to blame, and the replay would end in the same way. It gets another try where the settings that decide
        numbers have changed, such as a learning rate.
        """
        if not (found := self.ledger.records.get("unfit")):
            return
        unfit = json.loads(found)
        step, same = unfit["step"], unfit["noted"] == self.ledger.records.get("noted")
        if same and (groups := self.ledger.batch(step)) and step >= self.ledger.checkpoint:
            self.set_aside(step, dict.fromkeys(groups, f"the learner failed on its batch: {unfit['error']}"))
        self.ledger.records.put({"unfit": ""})

    def _form(self, step: int, newest: int | None) -> list[int] | None:
        """Log the batch of ``step``; None while a group is missing, or has a token of a version above ``newest``."""
        rows = self._without_stale(step)[: self.admission.batch]
        if len(rows) < self.admission.batch:
            return None
        if newest is not None and any((row.max_version or 0) > newest for row in rows):
            return None
        groups = [row.id for row in rows]
        self.ledger.log_batch(step, groups)
        return groups

    def _without_stale(self, step: int) -> list[GroupRow]:
        """The queue that the batch may be made of, its stale groups refused (in slot order there are none)."""
        B, oldest = self.admission.batch, self.admission.oldest(step)
        rows = self.ledger.queued_slots(step * B, B) if self.admission.slots else self.ledger.queued()
        kept: list[GroupRow] = []
        for row in rows:
            if row.min_version is not None and row.min_version < oldest:
                self.ledger.refuse(row.id, "stale", f"a token of version {row.min_version} at step {step}")
            else:
                kept.append(row)
        return kept

    def why_no_batch(self, step: int) -> str:
        """What the learner waits for, and on whom (I4)."""
        B = self.admission.batch
        queued = self.ledger.queued_slots(step * B, B) if self.admission.slots else self.ledger.queued()
        flying = f"{self.ledger.tally().leased} in flight ({self._holders()})"
        return f"batch {step}: {len(queued)} of its {B} groups are here, {flying}"

    def start(self, version: int, checksum: str) -> Outcome:
        """The learner published its start: version 0, or the checkpoint's again."""
        if self.version >= version >= 0:
            return "repeated"
        if version != self.ledger.checkpoint:
            raise RequestError(
                f"version {version} was published at the start, but the checkpoint is {self.ledger.checkpoint}"
            )
        diverged = self.ledger.publish(version, checksum)
        self.version = version
        return "diverged" if diverged else "new"

    def commit(self, step: int, checksum: str, metrics: dict[str, float]) -> Outcome:
        """The batch of ``step`` is trained and version step+1 is out.

        A repetition (its reply was lost) changes nothing. RequestError when the step is not the one in training.
        """
        if step < self.version and self.ledger.checksum(step + 1) == checksum:
            return "repeated"
        if step != self.version:
            raise RequestError(f"step {step} was committed, but step {self.version} is the one to train")
        if not self.training:
            raise RequestError(f"step {step} was committed, but nobody has asked for its batch")
        diverged = self.ledger.commit(step, checksum, metrics)
        self.version = step + 1
        self._at_commit = dict(self.ledger.tally().refused)
        return "diverged" if diverged else "new"

    def begin(self) -> None:
        """A broker's life begins: the learner does too, without the batch that an earlier launch has failed on."""
        self.rewind()
        self._drop_blamed()

    def rewind(self) -> None:
        """The learner begins anew from its checkpoint: nothing is published until it says so."""
        self.ledger.rewind()
        self.version = self.handed = -1
        self.replay_until = self.ledger.logged()

    def end_here(self, why: str) -> None:
        """The run ends with what was begun: with the newest version, or with the one that the last logged batch makes.

        Nothing in training is orphaned; what else is queued or in flight is refused as `run_ended` at the end.
        """
        self.ledger.records.put({"last": str(self.ledger.logged()), "last_why": why})

    def starved(self) -> str:
        """One line when refusals starve the run, else "": also once its last batch is logged."""
        if self.complete:
            return ""
        tally = self.ledger.tally()
        refused = tally.refused
        failed = refused.get("failed", 0) + refused.get("unscored", 0)
        if tally.living == tally.leased and failed >= HOPELESS * max(1, self.admission.batch):
            detail = self.ledger.refusal()
            return f"all {failed} groups that were made have failed, so that nothing can be trained; the last: {detail}"
        return self.admission.starved({reason: n - self._at_commit.get(reason, 0) for reason, n in refused.items()})
