"""I1, I2 and I2b as properties: the policy's numbers, and random histories of a run through scheduler and ledger."""

from __future__ import annotations

import json
import shutil
import sqlite3
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from offtrail.core.types import Group, Lease, Problem
from offtrail.platform.broker.admission import AdmissionPolicy
from offtrail.platform.broker.scheduler import RequestError, Scheduler
from offtrail.platform.ledger.ledger import FILE, Ledger
from offtrail.platform.ledger.rows import Tally
from offtrail.platform.wire.groups import unpack_group

G, STEPS = 2, 7


def admission(**changes: object) -> AdmissionPolicy:
    settings_ = {"batch": 4, "staleness": 0, "max_in_flight": 1000} | changes
    return AdmissionPolicy(**settings_)  # type: ignore[arg-type]


def begun(ledger: Ledger, policy: AdmissionPolicy) -> Scheduler:
    """Of a run of STEPS, as the configuration has it at each beginning."""
    ledger.records.put({"last": str(STEPS)})
    return Scheduler(ledger, policy, lambda i: Problem("t", i, "p", "a"), G)


# ---------------------------------------------------------------------- the policy, by hand


def test_capacity_of_the_synchronous_loop_is_one_batch() -> None:
    # (η+v+1)·B = (0+0+1)·4
    assert admission().capacity(Tally(), 0, 100) == 4


def test_capacity_is_what_the_bound_allows_less_what_is_admitted_and_living() -> None:
    # (2+3+1)·4 = 24; living 1+2+4+12 = 19, and the 7 refused gave their places back.
    tally = Tally(admitted=26, leased=1, queued=2, training=4, trained=12, refused={"stale": 7})
    assert admission(staleness=2).capacity(Tally(), 3, 100) == 24
    assert admission(staleness=2).capacity(tally, 3, 100) == 5


def test_capacity_never_passes_max_in_flight_nor_the_end_of_the_run_nor_zero() -> None:
    assert admission(staleness=2, max_in_flight=6).capacity(Tally(admitted=4, leased=4), 3, 100) == 2
    assert admission(staleness=2).capacity(Tally(admitted=8, trained=8), 2, 3) == 4  # 3·4 − 8
    trained = Tally(admitted=40, trained=40)
    assert admission(staleness=2).capacity(trained, 3, 100) == 0  # a restart behind what is trained
    assert admission(staleness=2).capacity(trained, 9, 9) == 0  # 9·4 − 40: the end came nearer than what is admitted
    assert admission().capacity(Tally(), -1, 100) == 0  # nothing is published yet


@pytest.mark.parametrize(("place", "needs"), [(0, 0), (11, 0), (12, 1), (15, 1), (16, 2)])
def test_a_slot_needs_the_version_that_is_eta_before_its_batch(place: int, needs: int) -> None:
    # B = 4, η = 2: slots 0…11 are batches 0, 1, 2; slot 12 begins batch 3, which needs version 1.
    assert admission(staleness=2).needs(place) == needs


def test_violations_are_named() -> None:
    bound, exact = admission(staleness=2), admission(staleness=2, exact=True)
    assert bound.violation(1, 1, 3, 3) == ("", "")
    assert bound.violation(1, 0, 3, 3)[0] == "stale"
    assert bound.violation(1, 1, 4, 3)[0] == "superseded"
    assert exact.violation(1, 1, 1, 3) == ("", "")
    assert exact.violation(1, 1, 2, 3)[0] == "stale"


def test_a_starving_run_names_the_filter_and_the_way_out() -> None:
    rule_ = admission(max_refusals=10)
    assert rule_.starved({"stale": 5, "failed": 4, "superseded": 50}) == ""
    line = rule_.starved({"stale": 7, "failed": 3})
    assert "staleness.max_refusals=10" in line
    assert "7 of them as stale" in line
    assert "raise staleness.max" in line


def test_a_generators_share_is_fair_and_whole_waves_in_exact_mode() -> None:
    # η = 1, B = 4: at most 8 are ever wanted at once.
    assert [admission(staleness=1).share(n) for n in (1, 2, 3)] == [8, 4, 3]
    assert [admission(staleness=1, exact=True).share(n) for n in (1, 2, 3)] == [8, 4, 4]


def test_a_law_that_cannot_work_names_its_keys() -> None:
    with pytest.raises(ValueError, match=r"generator\.max_in_flight=3: .* batch\.groups=4"):
        admission(exact=True, max_in_flight=3)
    with pytest.raises(ValueError, match=r"staleness\.max=-1"):
        admission(staleness=-1)


def test_in_completion_order_a_group_needs_the_version_of_the_batch_it_is_likely_to_enter(tmp_path: Path) -> None:
    # B = 2, η = 1, version 0: the four groups (1+0+1)·2 enter batches 0, 0, 1, 1, which need version 0 all.
    # At version 1 two more are admitted behind these four living ones: batch 2, version 1.
    ledger = Ledger(tmp_path / FILE)
    scheduler = begun(ledger, admission(batch=2, staleness=1, drop=True))
    scheduler.start(0, "c0")
    first = scheduler.grant("a", 9, 1, 0.0)
    assert [(lease.group, lease.slot, lease.min_version) for lease in first] == [(i, i, 0) for i in range(4)]
    for lease in first:
        assert scheduler.arrive(finished(lease, [0, 0]), "a", 1.0).accepted
    assert scheduler.batch(0) == [0, 1]
    scheduler.commit(0, "c1", {})
    assert [(lease.group, lease.min_version) for lease in scheduler.grant("a", 9, 1, 0.0)] == [(4, 1), (5, 1)]
    ledger.close()


# ---------------------------------------------------------------------- dynamic sampling


@pytest.mark.parametrize(
    ("filter_", "rewards", "accuracy", "refused"),
    [
        ("none", [1.0, 1.0], [1, 1], False),
        ("variance", [0.1, 0.1], [0, 1], True),
        ("variance", [0.1, 0.0], [0, 0], False),  # the format alone is a signal here …
        ("accuracy", [0.1, 0.0], [0, 0], True),  # … and not here
        ("accuracy", [1.1, 1.0], [1, 1], True),
        ("accuracy", [1.1, 0.1], [1, 0], False),
    ],
)
def test_a_group_without_signal_gives_its_place_back_and_is_kept(
    filter_: str, rewards: list[float], accuracy: list[float], refused: bool, tmp_path: Path
) -> None:
    ledger = Ledger(tmp_path / FILE)
    scheduler = begun(ledger, admission(batch=1, filter=filter_))
    scheduler.start(0, "c0")
    [lease] = scheduler.grant("a", 9, 1, 0.0)
    group = finished(lease, [0, 0])
    group.rewards, group.components = np.array(rewards, np.float32), {"accuracy": np.array(accuracy, np.float32)}
    verdict = scheduler.arrive(group, "a", 1.0)
    assert verdict.accepted == (not refused)
    if refused:
        assert "filtered: all 2" in verdict.reason
        assert f"algo.filter_groups={filter_}" in verdict.reason
        assert ledger.tally().refused == {"filtered": 1}
        assert unpack_group(ledger.payloads([lease.group])[lease.group]).rewards.tolist() == group.rewards.tolist()
        assert scheduler.batch(0) is None
        [again] = scheduler.grant("a", 9, 1, 2.0)
        assert (again.group, again.slot) == (1, lease.slot)  # another problem in the same place
        assert scheduler.arrive(group, "a", 3.0).accepted is False  # a repetition is answered alike
        assert ledger.tally().refused == {"filtered": 1}
    ledger.close()


def test_with_a_filter_exact_waves_go_out_one_by_one(tmp_path: Path) -> None:
    """Problems are numbered in the order of grants. Were wave 1 leased while wave 0 decodes, timing would decide
    whether wave 0's refill gets problem 2 or 4.
    """
    for filter_, early in (("none", [2, 3]), ("variance", [])):
        ledger = Ledger(tmp_path / f"{filter_}.sqlite")
        scheduler = begun(ledger, admission(batch=2, staleness=1, exact=True, filter=filter_))
        scheduler.start(0, "c0")
        first = scheduler.grant("a", 9, 1, 0.0)
        assert [lease.group for lease in first] == [0, 1]
        assert [lease.group for lease in scheduler.grant("a", 9, 1, 0.0)] == early
        if filter_ == "variance":
            for lease, rewards in zip(first, ([1, 0], [1, 1]), strict=True):
                group = finished(lease, [0, 0])
                group.rewards = np.array(rewards, np.float32)
                scheduler.arrive(group, "a", 1.0)
            [refill] = scheduler.grant("a", 9, 1, 2.0)
            assert (refill.group, refill.slot, refill.wave) == (2, 1, 0)
        ledger.close()


def test_a_filter_that_refuses_everything_is_named() -> None:
    line = admission(max_refusals=10, filter="accuracy").starved({"filtered": 10})
    assert "10 of them as filtered" in line
    assert "algo.filter_groups=accuracy finds no signal" in line
    assert "algo.filter_groups=none" in line


# ---------------------------------------------------------------------- random histories


def finished(lease: Lease, versions: list[int]) -> Group:
    """A group of G samples whose tokens have these versions."""
    T = len(versions)
    lengths = np.array([T // 2, T - T // 2], np.int32)
    return Group(
        group=lease.group,
        slot=lease.slot,
        attempt=lease.attempt,
        problem=lease.problem,
        generator="generator-0",
        temperature=1.0,
        prompt_tokens=np.array([1, 2], np.int32),
        lengths=lengths,
        tokens=np.arange(T, dtype=np.int32),
        logprobs=np.full(T, -1.0, np.float32),
        versions=np.array(versions, np.int32),
        finish=np.zeros(G, np.uint8),
        rewards=np.array([0, has_signal(lease)], np.float32),
        components={},
        times=np.zeros((G, 3)),
    )


def has_signal(lease: Lease) -> bool:
    """Every third problem is too hard: no answer of it is right."""
    return lease.group % 3 != 2


@dataclass
class Out:
    """A lease somebody has, perhaps one that was taken back since."""

    lease: Lease
    holder: str


class History(RuleBasedStateMachine):
    """Everything that can happen to groups, in any order: the invariants hold after every step, and the run ends."""

    @initialize(
        batch=st.integers(1, 3),
        eta=st.integers(0, 2),
        spare=st.integers(0, 6),
        mode=st.sampled_from(["wait", "drop", "exact"]),
        filters=st.booleans(),
    )
    def begin(self, batch: int, eta: int, spare: int, mode: str, filters: bool) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="offtrail-history-"))
        self.admission = AdmissionPolicy(
            batch=batch, staleness=eta, max_in_flight=batch + spare,
            exact=mode == "exact", drop=mode == "drop", filter="variance" if filters else "none",
        )  # fmt: skip
        self.spent = False
        self.out: list[Out] = []
        self.current: dict[int, Out] = {}  # group → who may submit it now
        self.accepted: list[tuple[Group, str]] = []
        self.tokens: dict[int, list[int]] = {}  # group → versions of its accepted tokens
        self.made_by: dict[int, set[tuple[int, str]]] = {}  # group → versions of its tokens, and their checksums then
        self.world = 0
        self.differs_from = 1 << 30
        self.made: dict[int, str] = {}
        self.handed: dict[int, list[int]] = {}  # step → batch that the living learner was given
        self.open()
        self.scheduler.start(0, self.checksum(0))

    def open(self) -> None:
        self.ledger = Ledger(self.folder / FILE)
        self.reader = sqlite3.connect(self.folder / FILE)
        self.scheduler = begun(self.ledger, self.admission)

    def mind_budget(self) -> None:
        """As the broker does after each commit, and now and then."""
        if self.spent:
            self.scheduler.end_here("spent")

    def checksum(self, version: int) -> str:
        """What the model's learner makes: the same as before, unless this world differs from there on."""
        if version >= self.differs_from or version not in self.made:
            self.made[version] = f"version {version} of world {self.world}"
        return self.made[version]

    def rows(self, query: str) -> list[tuple]:
        return self.reader.execute(query).fetchall()

    # --- what generators do

    @rule(holder=st.sampled_from(["a", "b"]), room=st.integers(1, 5))
    def grant(self, holder: str, room: int) -> None:
        before, version = self.ledger.tally(), self.scheduler.version
        capacity = self.admission.capacity(before, version, self.ledger.last)
        leases = self.scheduler.grant(holder, room, 2, 0.0)
        fresh = [lease for lease in leases if lease.group >= before.admitted]
        assert len(fresh) <= capacity
        assert sum(row.holder != "" for row in self.ledger.leased()) <= self.admission.max_in_flight
        assert all(lease.min_version <= version for lease in leases)
        if self.admission.exact and leases:
            [wave] = {lease.wave for lease in leases}
            assert {lease.exact_version for lease in leases} == {max(0, wave - self.admission.staleness)}
            assert [lease.slot for lease in leases] == sorted(lease.slot for lease in leases)
        else:
            assert len(leases) <= room
        for lease in leases:
            assert lease.group not in self.current
            self.current[lease.group] = Out(lease, holder)
            self.out.append(self.current[lease.group])

    @precondition(lambda self: self.out)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        out = self.out.pop(data.draw(st.integers(0, len(self.out) - 1)))
        self.submit(
            out, data.draw(st.lists(st.integers(0, max(0, self.scheduler.version) + 1), min_size=1, max_size=4))
        )

    @precondition(lambda self: self.out)
    @rule(data=st.data())
    def finish_well(self, data: st.DataObject) -> None:
        out = self.out.pop(data.draw(st.integers(0, len(self.out) - 1)))
        lease, newest = out.lease, max(out.lease.min_version, self.scheduler.version)
        some = st.just(lease.exact_version) if self.admission.exact else st.integers(lease.min_version, newest)
        self.submit(out, data.draw(st.lists(some, min_size=1, max_size=4)))

    def submit(self, out: Out, versions: list[int]) -> None:
        before = self.ledger.tally()
        verdict = self.scheduler.arrive(finished(out.lease, versions), out.holder, 1.0)
        if self.current.get(out.lease.group) is not out:
            assert not verdict.accepted
            assert self.ledger.tally() == before
            return
        del self.current[out.lease.group]
        needed = out.lease.min_version
        newest = max(self.ledger.newest, self.scheduler.version + self.scheduler.training)
        fine = min(versions) >= needed and max(versions) <= newest
        fine = fine and (not self.admission.exact or set(versions) == {needed})
        without = self.admission.filter == "variance" and not has_signal(out.lease)
        assert verdict.accepted == (fine and not without)
        assert self.ledger.tally().refused.get("filtered", 0) - before.refused.get("filtered", 0) == (fine and without)
        if verdict.accepted:
            self.accepted.append((finished(out.lease, versions), out.holder))
            self.tokens[out.lease.group] = versions
            self.made_by[out.lease.group] = {(v, self.ledger.checksum(v) or self.checksum(v)) for v in versions}

    @precondition(lambda self: self.accepted)
    @rule(data=st.data())
    def submit_again(self, data: st.DataObject) -> None:
        group, holder = data.draw(st.sampled_from(self.accepted))
        before, row = self.ledger.tally(), self.ledger.row(group.group)
        assert row is not None
        verdict = self.scheduler.arrive(group, holder, 2.0)
        assert verdict.accepted == (row.state != "refused" and row.attempt == group.attempt)
        assert self.ledger.tally() == before

    @precondition(lambda self: self.out)
    @rule(data=st.data(), reason=st.sampled_from(["failed", "filtered", "stale"]))
    def give_up(self, data: st.DataObject, reason: str) -> None:
        out = self.out.pop(data.draw(st.integers(0, len(self.out) - 1)))
        before = self.ledger.tally()
        verdict = self.scheduler.fail(out.lease.group, out.lease.attempt, out.holder, reason, "")
        mine = self.current.get(out.lease.group) is out
        assert verdict.changed == mine
        assert self.ledger.tally().refused.get(reason, 0) - before.refused.get(reason, 0) == mine
        if mine:
            del self.current[out.lease.group]

    @rule(holder=st.sampled_from(["a", "b"]))
    def lose_heartbeats(self, holder: str) -> None:
        self.ledger.return_leases(holder)
        self.current = {group: out for group, out in self.current.items() if out.holder != holder}

    @rule(holder=st.sampled_from(["a", "b"]), lag=st.integers(-1, 2))
    def work(self, holder: str, lag: int) -> None:
        """Everything that ``holder`` can get is made well, ``lag`` versions behind the newest where that is allowed.

        −1: the learner has published a version, and its commit is on the way.
        """
        self.lose_heartbeats(holder)
        self.grant(holder, 5)
        for out in [out for out in self.out if self.current.get(out.lease.group) is out and out.holder == holder]:
            self.out.remove(out)
            version = max(
                out.lease.min_version, self.scheduler.version - (lag if lag >= 0 or self.scheduler.training else 0)
            )
            self.submit(out, [out.lease.exact_version if self.admission.exact else version] * 2)

    # --- what the learner does

    @rule()
    def next_batch(self) -> None:
        step = self.scheduler.version
        if 0 <= step < self.ledger.last:
            self.handed |= {step: batch} if (batch := self.scheduler.batch(step)) else {}

    @rule()
    def ask_ahead(self) -> None:
        """The learner asks for the next batch while one trains."""
        step = self.scheduler.version + 1
        if not self.scheduler.training:
            with pytest.raises(RequestError):
                self.scheduler.batch(step)
        elif step < self.ledger.last and (batch := self.scheduler.batch(step)):
            self.handed[step] = batch
            event("ahead")

    @rule()
    def commit(self) -> None:
        self.next_batch()
        step = self.scheduler.version
        if self.ledger.batch(step) is None:
            with pytest.raises(RequestError):
                self.scheduler.commit(step, "x", {})
            return
        logged, lineage = self.ledger.checksum(step + 1), self.ledger.lineage
        outcome = self.scheduler.commit(step, self.checksum(step + 1), {"loss": 1.0})
        self.mind_budget()
        assert outcome == ("diverged" if logged not in (None, self.checksum(step + 1)) else "new")
        again = self.rows(f"SELECT 1 FROM versions WHERE version = {step + 1} AND lineage = {lineage} AND dead = 1")
        assert self.ledger.lineage == lineage + bool(again)
        if outcome == "diverged":
            self.current.clear()
            event("diverged")
        assert self.scheduler.commit(step, self.checksum(step + 1), {}) == "repeated"
        with pytest.raises(RequestError):
            self.scheduler.commit(step + 5, "x", {})

    @rule(steps=st.integers(1, 3), lag=st.integers(-1, 2), room=st.integers(1, 5))
    def learn(self, steps: int, lag: int, room: int) -> None:
        """Some whole learner steps, with work and leases left over."""
        for _ in range(steps):
            self.work("a", max(0, lag))
            self.ask_ahead()
            self.commit()
        self.next_batch()
        self.work("b", lag)
        self.grant("b", room)

    @rule()
    def spend_the_budget(self) -> None:
        self.spent = True
        self.mind_budget()

    @precondition(lambda self: self.scheduler.version > self.ledger.checkpoint)
    @rule(back=st.integers(0, 2), archived=st.booleans())
    def checkpoint(self, back: int, archived: bool) -> None:
        self.ledger.checkpointed(max(self.ledger.checkpoint, self.scheduler.version - back))
        self.ledger.shards.plan(1 << 20, self.ledger.checkpoint)
        for name in self.ledger.shards.unsealed() if archived else []:
            self.ledger.shards.sealed(name)

    def poison(self, ahead: int, data: st.DataObject) -> None:
        """Some groups of a logged batch that nobody was given yet cannot be read or trained."""
        step = self.scheduler.version + ahead
        groups = self.ledger.batch(step)
        if not groups or step <= self.scheduler.handed:
            return
        remade = self.ledger.newest > step
        unfit = data.draw(st.lists(st.sampled_from(groups), min_size=1, unique=True))
        self.scheduler.set_aside(step, dict.fromkeys(unfit, "poison"))
        self.mind_budget()
        event("set aside")
        if remade:
            event("set aside in a replay")
            self.current.clear()
            self.world += 1
            self.differs_from = step + 1
            self.made = {v: c for v, c in self.made.items() if v < self.differs_from}

    @rule(
        whole=st.booleans(),
        differs=st.sampled_from([True, True, False]),
        after=st.integers(0, 3),
        more=st.booleans(),
        poisoned=st.integers(-1, 2),
        data=st.data(),
    )
    def restart(self, whole: bool, differs: bool, after: int, more: bool, poisoned: int, data: st.DataObject) -> None:
        """Of everything, perhaps with a larger budget, or of the learner alone; in a world whose replay may differ some
        versions later, and may meet poison.
        """
        if whole:
            self.spent = self.spent and not more
            self.reader.close()
            self.ledger.close()
            self.open()
            self.ledger.release()
            self.current.clear()
        if differs:
            self.world += 1
            self.differs_from = self.ledger.checkpoint + after
            self.made = {v: c for v, c in self.made.items() if v < self.differs_from}
        self.scheduler.rewind()
        self.handed.clear()
        if self.scheduler.start(self.ledger.checkpoint, self.checksum(self.ledger.checkpoint)) == "diverged":
            self.current.clear()
        self.mind_budget()
        if poisoned >= 0:
            self.poison(poisoned, data)

    # --- what holds after every step

    @invariant()
    def everything_is_accounted_for(self) -> None:
        tally, audit = self.ledger.tally(), self.ledger.audit()
        assert (tally.admitted, tally.tokens) == self.rows("SELECT COUNT(*), COALESCE(SUM(tokens), 0) FROM groups")[0]
        assert tally.admitted == tally.accounted
        counted = dict(self.rows("SELECT state, COUNT(*) FROM groups GROUP BY state"))
        for state in ("leased", "queued", "training", "trained"):
            assert getattr(tally, state) == counted.get(state, 0)
        refused = dict(self.rows("SELECT reason, COUNT(*) FROM groups WHERE state = 'refused' GROUP BY reason"))
        assert {r: n for r, n in tally.refused.items() if n} == refused
        assert (audit.lost, audit.duplicated) == (0, 0)
        assert self.ledger.auditor.recent(self.ledger.checkpoint) == audit

    @invariant()
    def the_end_is_never_before_what_was_begun(self) -> None:
        assert self.scheduler.version <= self.ledger.logged() <= self.ledger.last <= STEPS

    @invariant()
    def nothing_is_trained_twice_or_late(self) -> None:
        B, eta, seen = self.admission.batch, self.admission.staleness, set()
        batches = {step: json.loads(ids) for step, ids in self.rows("SELECT step, ids FROM batches ORDER BY step")}
        assert list(batches) == list(range(len(batches)))
        slots = dict(self.rows("SELECT id, slot FROM groups"))
        assert self.handed == {step: batches.get(step) for step in self.handed}
        for step, ids in batches.items():
            assert len(ids) == B
            assert not seen & set(ids)
            seen |= set(ids)
            ages = {step - version for group in ids for version in self.tokens[group]}
            assert max(ages) <= eta
            if self.admission.exact:
                assert ages == {step - max(0, step - eta)}
            if self.admission.slots:
                assert [slots[group] for group in ids] == list(range(step * B, (step + 1) * B))
        for step in range(self.scheduler.version):
            made_by = set().union(*(self.made_by[group] for group in batches[step]))
            assert made_by <= {(version, self.ledger.checksum(version)) for version, _ in made_by}
        if self.scheduler.version >= 0:
            assert self.ledger.tally().trained == self.scheduler.version * B

    @invariant()
    def staleness_is_counted_right(self) -> None:
        ages = self.ledger.ages()
        trained = self.rows("SELECT batch, id FROM groups WHERE state = 'trained'")
        all_ = [step - version for step, group in trained for version in self.tokens[group]]
        assert (ages.tokens, ages.age_sum, ages.age_max) == (len(all_), sum(all_), max(all_, default=0))
        assert ages.stale_tokens == sum(age > 0 for age in all_)
        assert ages.flight_sum + ages.queue_sum == ages.age_sum

    def teardown(self) -> None:
        if hasattr(self, "scheduler"):
            try:
                self.goes_on_to_the_end()
            finally:
                self.reader.close()
                self.ledger.close()
                shutil.rmtree(self.folder)

    def goes_on_to_the_end(self) -> None:
        """No history is a dead end: with one honest generator the run reaches its last step."""
        self.lose_heartbeats("b")
        for _ in range(20 * STEPS):
            if self.scheduler.version == self.ledger.last:
                break
            self.work("a", 0)
            self.commit()
        last = self.ledger.last
        assert self.scheduler.version == last
        event("ended by its budget" if last < STEPS else "ended by its steps")
        self.ledger.end()
        tally = self.ledger.tally()
        assert (tally.leased, tally.queued, tally.training, tally.trained) == (0, 0, 0, last * self.admission.batch)
        self.everything_is_accounted_for()
        self.nothing_is_trained_twice_or_late()


TestHistory = History.TestCase
TestHistory.settings = settings(max_examples=100, stateful_step_count=30, deadline=None, database=None)
