"""What the benchmarks of whole runs share: a run by the real command, its batches, and arms in pinned processes."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging as transformers_logging

from offtrail.core.types import FINISH_REASONS, Batch, Group, Problem
from offtrail.platform.broker.archive import read_archive
from offtrail.platform.config.compose import load_config
from offtrail.platform.config.schema import Config

ROOT = Path(__file__).resolve().parents[1]


def say(text: str) -> None:
    """One line of progress."""
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Run:
    """A completed run."""

    folder: Path

    @property
    def config(self) -> Config:
        """As it was saved."""
        return load_config(self.folder / "config.yaml")

    @property
    def start(self) -> Path:
        """The model of version 0."""
        return (self.folder / "start").resolve()

    def rows(self) -> list[dict[str, Any]]:
        """metrics.jsonl, with row k at place k."""
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def seconds(self, first: int, last: int) -> float:
        """From the commit of version ``first`` to that of version ``last``, by the broker's clock."""
        return float(sum(row["time/step_seconds"] for row in self.rows()[first + 1 : last + 1]))

    def mean(self, name: str, first: int, last: int) -> float:
        """A metric's mean over the same steps, weighted by their seconds; absent counts as 0."""
        rows = self.rows()[first + 1 : last + 1]
        return float(sum(row.get(name, 0.0) * row["time/step_seconds"] for row in rows)) / self.seconds(first, last)

    def batches(self, first: int, last: int) -> list[Batch]:
        """The batches that trained version ``first`` into version ``last``, out of the archive."""
        groups: dict[int, list[tuple[int, Group]]] = {step: [] for step in range(first, last)}
        wanted = [("state", "==", "trained"), ("batch", ">=", first), ("batch", "<", last)]
        for shard in read_archive(self.folder, filters=wanted):
            table = shard.to_pandas(ignore_metadata=True)
            for (step, place, _), samples in table.groupby(["batch", "position", "group"], sort=True):
                groups[int(step)].append((int(place), _group(samples)))
        return [
            Batch(step, tuple(group for _, group in sorted(found, key=lambda f: f[0])))
            for step, found in groups.items()
        ]

    def remove(self) -> None:
        """Make room."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _group(samples: Any) -> Group:
    """A group out of its rows of the archive."""
    samples = samples.sort_values("sample")
    one = samples.iloc[0]
    told = json.loads(one["problem"])
    components = [dict(pairs) for pairs in samples["rewards"]]
    return Group(
        group=int(one["group"]), slot=int(one["slot"]), attempt=int(one["attempt"]), problem=Problem(**told),
        generator=one["generator"], temperature=float(one["temperature"]),
        prompt_tokens=np.asarray(one["prompt_tokens"], np.int32),
        lengths=np.array([len(t) for t in samples["tokens"]], np.int32),
        tokens=np.concatenate(list(samples["tokens"])).astype(np.int32),
        logprobs=np.concatenate(list(samples["logprobs"])).astype(np.float32),
        versions=np.concatenate(list(samples["versions"])).astype(np.int32),
        finish=np.array([FINISH_REASONS.index(f) for f in samples["finish"]], np.uint8),
        rewards=samples["reward"].to_numpy(np.float32),
        components={name: np.array([c[name] for c in components], np.float32) for name in components[0]},
        times=samples[["submitted_at", "first_token_at", "last_token_at"]].to_numpy(np.float64),
        queued_version=int(one["queued_version"]), queued_at=float(one["queued_at"]),
    )  # fmt: skip


def launch(folder: Path, name: str, overrides: Sequence[str]) -> Run:
    """One run by the real command, to its end. Raises RuntimeError with its last words when it does not complete."""
    command = [
        sys.executable,
        str(ROOT / "launch.py"),
        f"run.dir={folder}",
        f"run.name={name}",
        "tracking.progress=plain",
    ]
    done = subprocess.run([*command, *overrides], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(overrides)}: exit status {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    return Run(folder / name)


class Arm:
    """A process of its own, pinned to ``cores``, that keeps what ``make(*args)`` gives and measures when it is asked.

    Between two measurements it sleeps. ``make`` is a function of the script; what it returns is called with the
    arguments of ``measure``.
    """

    def __init__(self, make: Callable[..., Callable[..., Any]], *args: Any, cores: set[int], threads: int = 1) -> None:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # read by torch when the process imports it
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, args, cores), daemon=True)
        self._process.start()
        theirs.close()
        self._pipe.recv()  # it is warm

    def measure(self, *args: Any) -> Any:
        """What the arm's function returns. Raises EOFError when it died; its traceback stands on stderr."""
        self._pipe.send(args)
        return self._pipe.recv()

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.join()


def _serve(pipe: Connection, make: Callable[..., Callable[..., Any]], args: Sequence[Any], cores: set[int]) -> None:
    os.sched_setaffinity(0, cores)
    os.dup2(2, 1)  # stdout is the script's alone: its last line is the result
    transformers_logging.disable_progress_bar()
    measure = make(*args)
    pipe.send(None)
    with contextlib.suppress(EOFError):  # the script is gone
        while True:
            pipe.send(measure(*pipe.recv()))


def cores() -> tuple[int, int]:
    """The first two cores that this process may use. Raises RuntimeError where there is only one."""
    found = sorted(os.sched_getaffinity(0))
    if len(found) < 2:
        raise RuntimeError("two cores are needed: one trains while the other generates")
    return found[0], found[1]


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "",
    )
    return {"cpu": model, "cores": len(os.sched_getaffinity(0)), "load_before": round(os.getloadavg()[0], 2)}


class Stopwatch:
    """Wall and CPU seconds of this process."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        """Seconds since the start."""
        return {"seconds": time.perf_counter() - self.wall, "cpu_seconds": time.process_time() - self.cpu}
