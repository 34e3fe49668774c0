"""A tracker in a thread of its own, so that the broker never waits for it.

    Recorder ── put ──► queue (bounded) ──► thread: make, start, write…, close ──► runs/NAME/sinks/NAME.jsonl

Invariants: `put` takes microseconds whatever the tracker does; a row that it cannot have is counted (``dropped``) and
said once; a step is written once over all launches, by the file of what was written (a kill -9 between a row and its
line writes that row again). A replayed step that differs from what the tracker has is said: no tracker here can take a
row back.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from offtrail.platform.config.keys import flatten
from offtrail.platform.config.schema import Config
from offtrail.platform.tracking.sinks.base import Sink, label_of, maker_of

log = logging.getLogger("offtrail.broker")

QUEUE = 256
"""Rows that wait for a tracker; further ones are dropped."""
CLOSE_SECONDS = 20.0
"""How long an ended run waits for its trackers: what they have not written then is lost to them."""
TIMED = ("time/", "throughput/", "compute/", "queue/", "memory/", "weights/", "staleness/")
"""Of a step's numbers those that a replay need not repeat."""
SCORES = "eval/"


@dataclass(frozen=True)
class Item:
    """What the tracker gets of one step, or of one version's scores."""

    kind: Literal["step", "scores"]
    step: int
    scalars: dict[str, float]
    texts: Mapping[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Of the numbers that a replay repeats."""
        told = sorted((name, value) for name, value in self.scalars.items() if not name.startswith(TIMED))
        return hashlib.blake2b(repr(told).encode(), digest_size=6).hexdigest()


class Written:
    """What a tracker has, in earlier launches too: a line each, the first with the run's id there."""

    def __init__(self, file: Path, name: str) -> None:
        self._file = file
        file.parent.mkdir(exist_ok=True)
        self.run_id, self.steps, self.scores = f"{name}-{secrets.token_hex(4)}", dict[int, str](), set[int]()
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        for line in lines:
            with contextlib.suppress(ValueError, KeyError, TypeError):  # cut where a launch was killed
                self._take(json.loads(line))
        if not lines:
            self._append({"run_id": self.run_id})

    def _take(self, found: dict[str, Any]) -> None:
        if "run_id" in found:
            self.run_id = str(found["run_id"])
        elif "scores" in found:
            self.scores.add(int(found["scores"]))
        else:
            self.steps[int(found["step"])] = str(found["digest"])

    def note(self, item: Item) -> None:
        """It is written now."""
        found = {"scores": item.step} if item.kind == "scores" else {"step": item.step, "digest": item.digest}
        self._append(found)

    def _append(self, found: dict[str, Any]) -> None:
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")


class Worker:
    """One tracker. ``written`` and ``dropped`` rows; ``lines``: what there is to say of it, each kind once."""

    def __init__(self, name: str, make: Callable[[], Sink], run_dir: Path, config: Mapping[str, Any]) -> None:
        self.name, self.written, self.dropped = name, 0, 0
        self.lines: list[str] = []
        self._make, self._config = make, config
        self._has = Written(run_dir / "sinks" / f"{name.replace(':', '.')}.jsonl", label_of(run_dir))
        self._sent, self._scored = dict(self._has.steps), set(self._has.scores)
        """What was put, written or not."""
        self._resume_step = 0
        self._items = deque[Item]()
        self._news = threading.Condition()
        self._closing, self._failed = False, False
        self._said = set[str]()
        self._thread = threading.Thread(target=self._work, name=f"sink-{name}", daemon=True)
        self._deadline: float | None = None

    def begin(self, resume_step: int) -> None:
        """Start the thread, once."""
        if not self._thread.ident:
            self._resume_step = resume_step
            self._thread.start()

    def put(self, item: Item, *, waits: bool = False) -> None:
        """Take a row for the tracker, unless it has it. ``waits``: of an earlier launch, beyond the queue's bound."""
        if item.kind == "step":
            if (before := self._sent.get(item.step)) is not None:
                if before != item.digest:
                    self._say(
                        "differs", f"step {item.step} was trained again and differs from what it has, which it keeps"
                    )
                return
            self._sent[item.step] = item.digest
        else:
            if item.step in self._scored:
                return
            self._scored.add(item.step)
        with self._news:
            if self._failed or (len(self._items) >= QUEUE and not waits):
                self.dropped += 1
                full = not self._failed
            else:
                self._items.append(item)
                full = False
                self._news.notify()
        if full:
            self._say("slow", f"{QUEUE} rows wait for it; further ones are dropped until it has caught up")

    def finish(self) -> None:
        """No more rows come; write those that wait, and close it. Does not wait."""
        with self._news:
            self._closing = True
            self._deadline = self._deadline or time.monotonic() + CLOSE_SECONDS
            self._news.notify()

    @property
    def finished(self) -> bool:
        """It is closed, or was given up."""
        late = self._deadline is not None and time.monotonic() > self._deadline
        if late and self._thread.is_alive():
            with self._news:
                self._drop_all()
            self._say("late", f"it was not closed after {CLOSE_SECONDS:g} s and was left as it is")
        return late or not self._thread.is_alive()

    def _work(self) -> None:
        try:
            sink = self._make()
            sink.start(self._config, self._has.run_id, self._resume_step)
        except BaseException as error:  # a tracker may end its thread, too
            self._say("start", f"it could not start ({_words(error)}); the run goes on without it")
            with self._news:
                self._failed = True
                self._drop_all()
            return
        while (item := self._next()) is not None:
            self._write(sink, item)
        try:
            sink.close()
        except BaseException as error:
            self._say("close", f"it could not be closed ({_words(error)})")

    def _next(self) -> Item | None:
        """The next row; None when no more come."""
        with self._news:
            while not self._items:
                if self._closing:
                    return None
                self._news.wait()
            return self._items.popleft()

    def _write(self, sink: Sink, item: Item) -> None:
        try:
            sink.write(item.step, item.scalars)
            self._has.note(item)
        except BaseException as error:
            with self._news:
                self.dropped += 1
            self._say("write", f"it did not take step {item.step} ({_words(error)}); such rows are dropped")
            return
        self.written += 1
        for name, text in item.texts.items():
            try:
                sink.text(item.step, name, text)
            except BaseException as error:
                self._say("text", f"it did not take {name!r} of step {item.step} ({_words(error)}); its row stands")

    def _drop_all(self) -> None:
        """What waits; the lock is held."""
        self.dropped += len(self._items)
        self._items.clear()

    def _say(self, kind: str, what: str) -> None:
        """Once for each kind."""
        with self._news:
            if kind in self._said:
                return
            self._said.add(kind)
            self.lines.append(f"tracking.sinks={self.name}: {what}")
        log.warning("%s", self.lines[-1])


class Sinks:
    """All trackers of a run."""

    def __init__(self, run_dir: Path, config: Config) -> None:
        tracking = config.tracking
        told = flatten(config) if tracking.sinks else {}
        self._workers = [
            Worker(name, maker_of(name, tracking.sink_settings.get(name, {}), run_dir), run_dir, told)
            for name in tracking.sinks
        ]

    def restore(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """The rows that stand at the start: what a tracker lacks of them it gets first."""
        if not self._workers:
            return
        kept = list(rows)
        last = max((int(row["step"]) for row in kept), default=0)
        for worker in self._workers:
            worker.begin(last)
        for row in kept:
            scores = {name: value for name, value in row.items() if name.startswith(SCORES)}
            others = {name: value for name, value in row.items() if name not in scores and name != "step"}
            if others:
                self._put(Item("step", int(row["step"]), _finite(others)), waits=True)
            if scores:
                self._put(Item("scores", int(row["step"]), _finite(scores)), waits=True)

    def step(self, version: int, scalars: Mapping[str, Any], texts: Mapping[str, str] | None = None) -> None:
        """One learner step."""
        if self._workers:
            self._put(Item("step", version, _finite(scalars), texts or {}))

    def scores(self, version: int, scalars: Mapping[str, Any], texts: Mapping[str, str] | None = None) -> None:
        """What the evaluator says of a version."""
        if self._workers:
            self._put(Item("scores", version, _finite(scalars), texts or {}))

    def _put(self, item: Item, *, waits: bool = False) -> None:
        for worker in self._workers:
            worker.put(item, waits=waits)

    def finish(self) -> bool:
        """The run has ended: whether all are closed, or given up."""
        for worker in self._workers:
            worker.finish()
        return all(worker.finished for worker in self._workers)

    @property
    def lines(self) -> list[str]:
        """What there is to say of them."""
        return [line for worker in self._workers for line in worker.lines]

    def summary(self) -> dict[str, Any]:
        """For summary.json; empty without trackers."""
        told = {worker.name: {"written": worker.written, "dropped": worker.dropped} for worker in self._workers}
        return {"sinks": told} if told else {}


def _finite(values: Mapping[str, Any]) -> dict[str, float]:
    return {n: float(v) for n, v in values.items() if isinstance(v, (int, float)) and math.isfinite(v)}


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
