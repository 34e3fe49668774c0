"""Random deaths of roles and launcher: real launcher, broker, ledger, archive and wire, roles without a model.

After every death the ledger is counted anew by plain SQL, without offtrail's own audit; at the end the archive is too.
In exact mode every version is the one that an undisturbed run makes.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from leftovers import alive

from .conftest import PATIENCE_S, ROOT
from .test_invariants import ROLE_NAMES, checksums, pid_of

B = 4
BLOWS = ("one", "one", "several", "all", "launcher")


class Storm:
    """One run that is killed again and again, and goes on."""

    def __init__(self, launch: Any, run_dir: Path, seed: str, more: int) -> None:
        """``more``: learner steps that a launch may take; if it ends before a blow, the next goes on."""
        self.launch, self.run_dir, self.rng, self.more = launch, run_dir, random.Random(seed), more
        self.kills: Counter[str] = Counter()
        self.process: subprocess.Popen[bytes] | None = None
        self.steps = 0

    def run(self, kills: int) -> None:
        """Until so many processes were killed."""
        while sum(self.kills.values()) < kills:
            self.process = self.process or self.start()
            if not self.moment():
                assert self.process.wait(PATIENCE_S) == 0, "it ended by itself, and not well"
                self.process = None
                continue
            if self.blow() & {"broker", "learner"}:
                self.wait_for_the_end()
            elif self.process.poll() is None:
                self.wait_for_a_step()
            if self.process.poll() is not None:
                self.process = None
            recount(self.run_dir)

    def rows(self) -> int:
        """Steps that were ever written down, the living ones."""
        metrics = self.run_dir / "metrics.jsonl"
        return metrics.read_bytes().count(b"\n") if metrics.is_file() else 0

    def start(self) -> subprocess.Popen[bytes]:
        """Go on, to some steps more."""
        self.steps = max(self.steps, self.rows() + self.more)
        return self.launch(self.steps, (self.run_dir / "config.yaml").is_file())

    def moment(self) -> bool:
        """Some steps on, or in the middle of a start; False when the run ends first."""
        assert self.process is not None
        early, limit = self.rng.random() < 0.25, time.monotonic() + PATIENCE_S
        wanted = self.rows() + self.rng.randint(1, 8)
        time.sleep(self.rng.uniform(0.2, 1.5) if early else 0.0)
        while not early and self.rows() < wanted and self.process.poll() is None:
            assert time.monotonic() < limit, f"no {wanted} rows within {PATIENCE_S:g} s"
            time.sleep(0.005)
        return self.process.poll() is None

    def blow(self) -> set[str]:
        """SIGKILL to a role, several, all, or the launcher; the roles."""
        assert self.process is not None
        roles = self.roles()
        self.rng.shuffle(roles)
        blow = self.rng.choice(BLOWS) if roles else "launcher"
        if blow == "launcher":
            self.process.kill()
            self.process.wait()
            self.kills["launcher"] += 1
            return set()
        killed, count = set(), {"one": 1, "several": self.rng.randint(2, 3), "all": len(roles)}[blow]
        for role, pid in roles[:count]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            self.kills[role] += 1
            killed.add(role)
        return killed

    def roles(self) -> list[tuple[str, int]]:
        """Those that are up."""
        found = []
        for role in ROLE_NAMES:
            try:
                pid = pid_of(role, self.run_dir)
            except AssertionError:
                continue
            found += [(role, pid)] if alive(pid) else []
        return found

    def wait_for_a_step(self) -> None:
        """The launcher starts generators and evaluators again, and the run goes on, or has got to its end."""
        assert self.process is not None
        before, limit = self.rows(), time.monotonic() + PATIENCE_S
        while self.process.poll() is None and self.rows() <= before:
            assert time.monotonic() < limit, f"no step within {PATIENCE_S:g} s"
            time.sleep(0.02)
        assert self.process.poll() in (None, 0)

    def wait_for_the_end(self) -> None:
        """Of a run whose broker or learner was killed: exit status 1, and nothing of it is left."""
        assert self.process is not None
        assert self.process.wait(PATIENCE_S) in (0, 1)
        assert not self.roles()


def recount(run_dir: Path) -> None:
    """I1 by plain SQL."""
    if not (run_dir / "ledger.sqlite").is_file():
        return
    db = sqlite3.connect(run_dir / "ledger.sqlite")  # not read-only: what a killed writer has left is taken up
    try:
        db.execute("BEGIN")  # a run that goes on writes meanwhile: all that is read is of one moment
        if not db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]:
            return
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        groups = db.execute("SELECT id, slot, state, reason, batch, position, shard FROM groups ORDER BY id").fetchall()
        batches = {step: json.loads(ids) for step, ids in db.execute("SELECT step, ids FROM batches ORDER BY step")}
        kept = {i for (i,) in db.execute("SELECT id FROM payloads")}
        sealed = {name for (name,) in db.execute("SELECT name FROM shards WHERE sealed = 1")}
        tally = {(s, r): n for s, r, n in db.execute("SELECT state, reason, n FROM tally WHERE n <> 0")}
        lineage = db.execute("SELECT COALESCE(MAX(lineage), 0) FROM versions").fetchone()[0]
    finally:
        db.close()
    assert [group for group, *_ in groups] == list(range(len(groups)))
    assert tally == Counter((state, reason) for _, _, state, reason, *_ in groups)
    assert list(batches) == list(range(len(batches)))
    assert all(len(ids) == B for ids in batches.values())
    logged = Counter(i for ids in batches.values() for i in ids)
    assert not [i for i, n in logged.items() if n > 1]
    living = Counter(slot for _, slot, state, *_ in groups if state != "refused")
    assert not [slot for slot, n in living.items() if n > 1]
    for group, _, state, _, batch, position, shard in groups:
        if state in ("training", "trained"):
            assert batches[batch][position] == group
        if state in ("queued", "training") or (state == "trained" and shard not in sealed):
            assert group in kept
    assert lineage == 0, "a replay was not what was logged"
    assert not [name for name in sealed if not (run_dir / "trajectories" / name).is_file()]


def archived(run_dir: Path) -> list[int]:
    """The trained groups of the archive, as often as they stand there."""
    found: list[int] = []
    for path in run_dir.glob("trajectories/*"):
        rows = pq.read_table(path, columns=["group", "sample", "state"]).to_pylist()
        found += [row["group"] for row in rows if row["sample"] == 0 and row["state"] == "trained"]
    return sorted(found)


@pytest.fixture
def light(command: Any, environment: dict[str, str], start_dir: Path, tmp_path: Path) -> Any:
    """Called with (name, mode, steps, resume=False): a launch whose roles are the fakes."""
    paths = [str(ROOT / "tests" / "fakes" / "site"), str(ROOT / "tests")]
    env = environment | {"PYTHONPATH": os.pathsep.join(paths)}

    def start(name: str, mode: str, steps: int, resume: bool = False) -> subprocess.Popen[bytes]:
        line = command(
            name, f"model.path={start_dir}", f"staleness.mode={mode}", "staleness.max=2", f"learner.steps={steps}",
            "eval.every=5", "generator.max_restarts=1000", "eval.max_restarts=1000", "tracking.tensorboard=false",
            "broker.heartbeat_seconds=0.5", *(["generator.count=2"] if mode == "bound" else []),
            *(["run.resume=true"] if resume else []),
        )  # fmt: skip
        return subprocess.Popen(line, env=env, cwd=tmp_path, stdout=subprocess.DEVNULL)

    return start


def weather(light: Any, tmp_path: Path, mode: str, kills: int) -> Storm:
    """A storm, and a last launch that takes the run to an end."""
    storm = Storm(partial(light, "killed", mode), tmp_path / "killed", f"{mode} {kills}", min(10 + kills, 40))
    storm.run(kills)
    if storm.process is not None:
        storm.process.kill()
        storm.process.wait()
    assert storm.start().wait(PATIENCE_S) == 0
    steps = storm.steps
    recount(storm.run_dir)
    summary = json.loads((storm.run_dir / "summary.json").read_text())
    counts = [summary[f"groups/{name}"] for name in ("trained", "lost", "duplicated", "in_flight")]
    assert (summary["status"], summary["steps"], counts) == ("completed", steps, [steps * B, 0, 0, 0])
    assert "set_aside" not in summary
    db = sqlite3.connect(storm.run_dir / "ledger.sqlite")
    trained = [i for (i,) in db.execute("SELECT id FROM groups WHERE state = 'trained' ORDER BY id")]
    db.close()
    assert archived(storm.run_dir) == trained
    rows = [json.loads(line)["step"] for line in (storm.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert rows == list(range(steps + 1))
    return storm


def show_that_it_loses_nothing(light: Any, tmp_path: Path, mode: str, kills: int) -> None:
    storm = weather(light, tmp_path, mode, kills)
    assert sum(storm.kills.values()) >= kills, storm.kills
    if mode == "exact":
        assert light("whole", mode, storm.steps).wait(PATIENCE_S + storm.steps) == 0
        assert checksums(storm.run_dir) == checksums(tmp_path / "whole")
        assert len(set(checksums(storm.run_dir))) == storm.steps + 1


@pytest.mark.parametrize("mode", ["bound", pytest.param("exact", marks=pytest.mark.prove)])
def test_kills_lose_nothing_and_train_nothing_twice(mode: str, light: Any, tmp_path: Path) -> None:
    show_that_it_loses_nothing(light, tmp_path, mode, kills=4)


@pytest.mark.prove
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("mode", ["bound", "exact"])
def test_a_storm_of_kills_loses_nothing_and_trains_nothing_twice(mode: str, light: Any, tmp_path: Path) -> None:
    show_that_it_loses_nothing(light, tmp_path, mode, kills=100)
