"""What the broker's loop pays at each commit, checkpoint and late evaluation, by the age of the run.

    python benchmarks/broker.py [--groups 1000 10000 100000] [--steps 30]

For each age a run directory is made whose ledger has held so many groups (GROUPS a batch, written as the broker itself
writes them, archived but for the last checkpoint's), and a broker is opened on it. Then it goes on for some steps, and
each call is timed in the loop's own process: no sockets, no other process, no archive thread. Beside it, in the same
run, stand what the same would cost if it were counted anew: the whole audit, the sums over all batches and metrics, all
of metrics.jsonl; and what each start pays for comparing the ledger's tables and indexes (`integrity_check_ms`, of
`ledger_mb`). The last line of stdout is one JSON object: `growth` is a call's cost at the greatest age over that at
the least, for the worst of the calls; goal ≤ 1.5.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from offtrail.core.types import Group, Lease, Problem
from offtrail.platform.broker.broker import Broker
from offtrail.platform.config.schema import Config
from offtrail.platform.ledger.ledger import FILE, Ledger
from offtrail.platform.ledger.records import put_metrics
from offtrail.platform.tracking.recorder import Recorder
from offtrail.platform.wire.groups import group_frames, pack_group
from offtrail.platform.wire.messages import (
    Checkpointed,
    Commit,
    EvalResult,
    Hello,
    LeaseRequest,
    Message,
    NextBatch,
    SubmitGroup,
    VersionHint,
)
from offtrail.platform.wire.sockets import Envelope

GROUPS, SAMPLES, CHECKPOINT = 16, 8, 10
"""Groups a batch, samples a group, steps between two checkpoints."""
METRICS = {f"area/name_{i}": i / 7 for i in range(60)} | {"reward/accuracy": 0.5, "weights/publish_seconds": 0.01}


class Silent:
    """Takes replies, sends nothing; ``last`` is the newest one."""

    last: Any = None

    def poll(self, timeout_s: float) -> list[Envelope]:
        """Nobody asks."""
        return []

    def reply(self, envelope: Envelope, message: Message, arrays: Any = ()) -> None:
        """The newest one counts."""
        self.last = message

    def hint(self, message: VersionHint) -> None:
        """To nobody."""


def make_group(lease: Lease, version: int) -> Group:
    """A group of 8 samples of 16 tokens."""
    T = SAMPLES * 16
    return Group(
        group=lease.group, slot=lease.slot, attempt=lease.attempt, problem=lease.problem, generator="generator-0",
        temperature=1.0, prompt_tokens=np.arange(9, dtype=np.int32), lengths=np.full(SAMPLES, 16, np.int32),
        tokens=np.arange(T, dtype=np.int32) % 60, logprobs=-np.ones(T, np.float32),
        versions=np.full(T, version, np.int32), finish=np.zeros(SAMPLES, np.uint8),
        rewards=np.ones(SAMPLES, np.float32), components={"accuracy": np.ones(SAMPLES, np.float32)},
        times=np.zeros((SAMPLES, 3)),
    )  # fmt: skip


def config_of(steps: int) -> Config:
    """A run of so many steps."""
    config = Config()
    config.learner.steps, config.batch.groups, config.batch.group_size = steps, GROUPS, SAMPLES
    config.staleness.max, config.eval.every, config.tracking.tensorboard = 1, 5, False
    return config


def problem(index: int) -> Problem:
    """The same of every place."""
    return Problem("chain", index, "1+1=", "2", {"start": 1})


def aged(run_dir: Path, groups: int) -> int:
    """A ledger as a run of so many groups leaves it, and its metrics; how many steps it has done."""
    steps = groups // GROUPS
    ledger = Ledger(run_dir / FILE)
    body = pack_group(make_group(Lease(0, 0, 1, problem(0), SAMPLES, 0), 0))
    versions = json.dumps({"0": SAMPLES * 16})
    with ledger.file.change() as db:
        db.execute("INSERT INTO shards VALUES ('000000_batches_000000.parquet', 1)")
        db.execute("INSERT INTO versions VALUES (0, 0, 'c0', 0)")
        for step in range(steps):
            ids = range(step * GROUPS, (step + 1) * GROUPS)
            db.executemany(
                "INSERT INTO groups (id, slot, state, needs, arrival, queued_version, min_version, max_version, "
                "versions, samples, tokens, queued_at) VALUES (?, ?, 'leased', 0, ?, ?, ?, ?, ?, ?, ?, 0)",
                [(i, i, i, step, step, step, versions, SAMPLES, SAMPLES * 16) for i in ids],
            )
            shard = "000000_batches_000000.parquet"
            for state, batch in (("queued", None), ("training", step), ("trained", step)):
                db.execute(
                    "UPDATE groups SET state = ?, batch = ?, position = id % ?, shard = ? WHERE id >= ? AND id <= ?",
                    (state, batch, GROUPS, shard, ids[0], ids[-1]),
                )
            db.execute("INSERT INTO batches VALUES (?, ?, 2048, 0, 0, 0, 0, 0, 1)", (step, json.dumps(list(ids))))
            db.execute("INSERT INTO versions VALUES (?, 0, ?, 0)", (step + 1, f"c{step + 1}"))
            put_metrics(db, step + 1, METRICS)
            if step % 5 == 0:
                db.execute("INSERT INTO evals VALUES (?, '{\"eval/accuracy\": 0.5}')", (step,))
        db.execute("INSERT INTO meta VALUES ('checkpoint', ?)", (str(steps),))
    assert len(body) > 0
    ledger.close()
    return steps


class Bench:
    """A broker on an aged run, and the seconds of each kind of call."""

    def __init__(self, run_dir: Path, steps: int, more: int) -> None:
        self.wire, self.seconds = Silent(), dict[str, list[float]]()
        started = time.perf_counter()
        self.broker = Broker(config_of(steps + more + 2), run_dir, self.wire, problem)
        self.opened = time.perf_counter() - started
        for role in ("learner", "generator", "evaluator"):
            self.ask("hello", f"{role}-0", Hello(role=role, index=0, pid=1, run=run_dir.name))
        self.ask("start", "learner-0", Commit(step=-1, version=steps, checksum=f"c{steps}"))

    def ask(self, kind: str, peer: str, message: Message, arrays: Any = ()) -> Any:
        """One request, timed."""
        self.timed(kind, lambda: self.broker.handle(Envelope(peer.encode(), 0, message, list(arrays))))
        return self.wire.last

    def timed(self, kind: str, call: Callable[[], object]) -> None:
        """A call of the loop."""
        started = time.perf_counter()
        call()
        self.seconds.setdefault(kind, []).append(time.perf_counter() - started)

    def go_on(self, first: int, more: int) -> None:
        """So many steps, with a late evaluation of each fifth version and a checkpoint of each tenth."""
        for step in range(first, first + more):
            leases = self.ask("lease", "generator-0", LeaseRequest(room=2 * GROUPS)).leases
            for lease in leases:
                header, arrays = group_frames(make_group(lease, max(step, lease.min_version)))
                self.ask("submit", "generator-0", SubmitGroup(header=header), arrays)
            assert self.ask("batch", "learner-0", NextBatch(step=step)).headers
            commit = Commit(step=step, version=step + 1, checksum=f"c{step + 1}", metrics=METRICS)
            self.ask("commit", "learner-0", commit)
            if step % 5 == 3:
                scores = {"eval/accuracy": 0.5}
                self.ask("late evaluation", "evaluator-0", EvalResult(version=step - step % 5, metrics=scores))
            if step % CHECKPOINT == CHECKPOINT - 1:
                self.ask("checkpoint", "learner-0", Checkpointed(step=step + 1, path=""))
            self.timed("tick", self.broker.tick)

    def anew(self, run_dir: Path) -> dict[str, float]:
        """Milliseconds of what the calls would cost if they counted everything again."""
        ledger = self.broker.ledger

        def forgetful() -> None:
            ledger._forget()
            self.broker.ending.write_summary()

        rows = [{"step": i, **METRICS} for i in range(len(self.broker.recorder.rows))]
        recorder = Recorder(run_dir, config_of(1))
        found = {}
        for name, call in (
            ("audit", ledger.audit), ("summary", forgetful), ("metrics.jsonl", lambda: recorder.restore(rows)),
        ):  # fmt: skip
            started = time.perf_counter()
            call()
            found[name] = 1e3 * (time.perf_counter() - started)
        recorder.close()
        return found


def measure(groups: int, more: int) -> dict[str, Any]:
    """Medians in milliseconds at one age."""
    folder = Path(tempfile.mkdtemp(prefix="offtrail-broker-"))
    try:
        run_dir, other = folder / "run", folder / "other"
        (run_dir / "trajectories").mkdir(parents=True)
        other.mkdir()
        (run_dir / "trajectories" / "000000_batches_000000.parquet").touch()
        steps = aged(run_dir, groups)
        size = (run_dir / FILE).stat().st_size
        bench = Bench(run_dir, steps, more)
        for _ in range(3):
            bench.timed("integrity check", bench.broker.ledger.file.check_integrity)
        bench.go_on(steps, more)
        found = {kind: 1e3 * statistics.median(times) for kind, times in bench.seconds.items()}
        whole = bench.anew(other)
        bench.broker.close()
    finally:
        shutil.rmtree(folder)
    kept = {kind: round(found[kind], 3) for kind in KINDS}
    counted = {name: round(value, 2) for name, value in whole.items()}
    return {
        "groups": groups, "steps": steps, "ms": kept, "anew_ms": counted, "open_s": round(bench.opened, 2),
        "integrity_check_ms": round(found["integrity check"], 2), "ledger_mb": round(size / 1e6, 1),
    }  # fmt: skip


KINDS = ("lease", "submit", "batch", "commit", "late evaluation", "checkpoint", "tick")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--groups", type=int, nargs="+", default=[1_000, 10_000, 100_000], help="ages of the run")
    parser.add_argument("--steps", type=int, default=40, help="timed at each age")
    options = parser.parse_args()
    ages = []
    for groups in sorted(options.groups):
        ages.append(measure(groups, options.steps))
        print(json.dumps(ages[-1]), file=sys.stderr, flush=True)
    growth = {kind: round(ages[-1]["ms"][kind] / ages[0]["ms"][kind], 3) for kind in KINDS}
    print(json.dumps({"growth": max(growth.values()), "by_call": growth, "ages": ages, "goal": 1.5}))


if __name__ == "__main__":
    main()
