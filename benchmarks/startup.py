"""How long `python launch.py` takes to the first leased group, and what each of its processes does meanwhile.

    python benchmarks/startup.py [--repeats 5] [--plot FILE.png] [KEY=VALUE …]

The demo with its start model in the cache (a run before the first repeat makes it), started by the real command and
interrupted after its first group. Times are seconds after the command was started: of a process's start from the
system, of its steps from its log, of the first lease and the first whole group from the ledger. ``cpu`` is what a
process has computed when the first group was leased; on a machine that does other work, compare those, not seconds.
The last line of stdout is one JSON object, with medians over the repeats.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
from common import ROOT, launch, machine, say

STEPS = {
    "imported": "imported",
    "welcomed": "Hello",
    "listening": "listening",
    "loaded": "loaded",
    "version 0 is out": "v0",
}
"""Words in a role's log, and the name of the step here."""
LINE = re.compile(r"(\d{4}-\S+ \S+) INFO offtrail\S*: (.*)")
LOOK_SECONDS = 0.02
LIMIT_SECONDS = 120.0


@dataclass
class Timeline:
    """One start: by process, the seconds of its steps and what it had computed at the first lease."""

    steps: dict[str, dict[str, float]] = field(default_factory=dict)
    cpu: dict[str, float] = field(default_factory=dict)
    first_lease: float = 0.0
    first_group: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--plot", type=Path, help="draw the median repeat into this PNG")
    parser.add_argument("keys", nargs="*", help="keys of the run, as launch.py takes them")
    args = parser.parse_args()
    about = machine()
    with tempfile.TemporaryDirectory(prefix="startup-") as folder:
        launch(Path(folder), "warm", ["learner.steps=1", "eval.prompts=16", *args.keys])
        found = [start(Path(folder), f"run-{i}", args.keys) for i in range(args.repeats)]
    median = sorted(found, key=lambda one: one.first_lease)[len(found) // 2]
    say(text_of(median))
    if args.plot:
        draw(median, args.plot)
    print(json.dumps(summary(found) | {"repeats": args.repeats, "keys": args.keys, **about}))


def start(folder: Path, name: str, keys: Sequence[str]) -> Timeline:
    """Start the command, watch its processes until it has a whole group, and interrupt it."""
    command = [sys.executable, str(ROOT / "launch.py"), f"run.dir={folder}", f"run.name={name}", *keys]
    began, run_dir, timeline = time.time(), folder / name, Timeline()
    names: dict[psutil.Process, str] = {}
    with subprocess.Popen([*command, "tracking.progress=off"], cwd=folder, stdout=subprocess.DEVNULL) as process:
        launcher = psutil.Process(process.pid)
        while not timeline.first_group:
            if process.poll() is not None or time.time() - began > LIMIT_SECONDS:
                raise RuntimeError(f"{name}: no group; see {run_dir / 'logs'}")
            names |= named(launcher)
            leased, queued = asked(run_dir)
            if leased and not timeline.first_lease:
                timeline.first_lease = leased - began
                for child, what in names.items():  # of one name: the fork server, and what it was on its way to a role
                    timeline.cpu[what] = timeline.cpu.get(what, 0.0) + seconds_of(child)
            timeline.first_group = queued and queued - began
            time.sleep(LOOK_SECONDS)
        for child, what in names.items():  # the system's clock of starts is not that of logs: the launcher's is 0
            steps = timeline.steps.setdefault(what, {})
            steps["started"] = min(steps.get("started", LIMIT_SECONDS), child.create_time() - launcher.create_time())
        process.send_signal(signal.SIGINT)
    for what, steps in timeline.steps.items():
        steps |= logged(run_dir / "logs" / f"{what}.log", began)
    return timeline


def named(launcher: psutil.Process) -> dict[psutil.Process, str]:
    """The launcher and its descendants, by name: a role's, or what its command line says that it is."""
    found = {launcher: "launcher"}
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in launcher.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if name := name_of([word for word in child.cmdline() if word]):
                    found[child] = name
    return found


def name_of(words: Sequence[str]) -> str:
    """Empty where a process has not become what it will be."""
    if "-m" not in words or len(words) < 3:
        return ""
    module, *rest = words[words.index("-m") + 1 :]
    last = module.rpartition(".")[2]
    return "-".join(rest[:2]) if last == "process" else last


def asked(run_dir: Path) -> tuple[float, float]:
    """When the ledger's first group was leased, and when the first one was whole; 0 while there is none."""
    with contextlib.suppress(sqlite3.Error):
        file = sqlite3.connect(f"file:{run_dir / 'ledger.sqlite'}?mode=ro", uri=True)
        with contextlib.closing(file):
            query = "SELECT coalesce(min(leased_at), 0), coalesce(min(queued_at), 0) FROM groups"
            leased, whole = file.execute(query).fetchone()
            return float(leased), float(whole)
    return 0.0, 0.0


def seconds_of(process: psutil.Process) -> float:
    """CPU seconds so far."""
    with contextlib.suppress(psutil.NoSuchProcess):
        times = process.cpu_times()
        return float(times.user + times.system)
    return 0.0


def logged(log: Path, began: float) -> dict[str, float]:
    """The steps that a role's log tells."""
    steps: dict[str, float] = {}
    for line in log.read_text().splitlines() if log.is_file() else ():
        if (told := LINE.match(line)) and told[2] in STEPS:
            steps[STEPS[told[2]]] = datetime.strptime(told[1], "%Y-%m-%d %H:%M:%S,%f").timestamp() - began
    return steps


def text_of(timeline: Timeline) -> str:
    """A table: a process a line."""
    lines = []
    for name, steps in sorted(timeline.steps.items(), key=lambda item: item[1]["started"]):
        told = " · ".join(f"{step} {seconds:.2f}" for step, seconds in sorted(steps.items(), key=lambda s: s[1]))
        lines.append(f"{name:16}cpu {timeline.cpu.get(name, 0.0):5.2f}   {told}")
    end = f"first lease {timeline.first_lease:.2f} s, first group {timeline.first_group:.2f} s after the command"
    return "\n".join([*lines, f"{end}; {sum(timeline.cpu.values()):.2f} CPU seconds to the first lease"])


def draw(timeline: Timeline, file: Path) -> None:
    """A bar a process, cut at its steps."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 3.5), layout="constrained")
    ordered = sorted(timeline.steps.items(), key=lambda item: -item[1]["started"])
    for row, (_, steps) in enumerate(ordered):
        marks = sorted(steps.items(), key=lambda step: step[1])
        ends = [seconds for _, seconds in marks[1:]] + [timeline.first_group]
        for (step, left), right, shade in zip(marks, ends, ("0.55", "0.7", "0.8", "0.88", "0.94"), strict=False):
            axes.barh(row, max(0.0, right - left), left=left, color=shade, edgecolor="white")
            axes.text(left, row, f" {step}", va="center", fontsize=7, clip_on=True)
    axes.set_yticks(range(len(ordered)), [name for name, _ in ordered])
    for moment, words in ((timeline.first_lease, "first lease"), (timeline.first_group, "first group")):
        axes.axvline(moment, color="black", linewidth=0.8)
        axes.text(moment, len(ordered) - 0.4, words, ha="center", fontsize=8)
    axes.set_xlabel("seconds after the command")
    figure.savefig(file, dpi=150)


def summary(found: Sequence[Timeline]) -> dict[str, Any]:
    """Medians, and the range of the goal's figure."""
    leases = [one.first_lease for one in found]
    names = found[0].steps
    return {
        "benchmark": "startup",
        "first_lease_seconds": round(statistics.median(leases), 2),
        "first_lease_range": [round(min(leases), 2), round(max(leases), 2)],
        "first_group_seconds": round(statistics.median(one.first_group for one in found), 2),
        "cpu_seconds_to_first_lease": round(statistics.median(sum(one.cpu.values()) for one in found), 2),
        "cpu_seconds": {
            name: round(statistics.median(one.cpu.get(name, 0.0) for one in found), 2) for name in sorted(names)
        },
        "steps": {
            name: {
                step: round(
                    statistics.median(one.steps[name][step] for one in found if step in one.steps.get(name, {})), 2
                )
                for step in steps
            }
            for name, steps in names.items()
        },
    }


if __name__ == "__main__":
    main()
