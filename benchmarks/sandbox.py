"""Programs judged in a second, against a new jailed interpreter for each.

    python benchmarks/sandbox.py [--runs 40] [--rounds 5]

All arms judge the same program by the same three asserts, one run after another, in turn within a round:
``ours`` is rewards/sandbox behind each wall (fork, walls, program, three calls, reaped). ``subprocess`` starts Python
anew (-I -S, without site) for each run, imports what the fork server has warm, puts the same Landlock, seccomp and
limits around itself and runs program and asserts. ``bwrap`` starts that Python in bubblewrap, without Landlock and
seccomp of its own. Neither peer can tell a forged success: tests stand in the program's process. The last line is one
JSON object: medians over rounds; `runs_per_second` is behind `wall=auto`, ratios are of seconds a run, goal ≥ 5.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import offtrail
from offtrail.rewards.sandbox import box as boxes
from offtrail.rewards.sandbox import bubblewrap
from offtrail.rewards.sandbox.box import Box
from offtrail.rewards.sandbox.judge import judge
from offtrail.rewards.sandbox.server import WARM

PROGRAM = "import collections\n\ndef top(words):\n    return collections.Counter(words).most_common(1)[0][0]\n"
ASSERTS = ["assert top(['a', 'b', 'a']) == 'a'", "assert top(['x']) == 'x'", "assert top('hello') == 'l'"]
META = {"asserts": ASSERTS, "functions": ["top"]}
WHOLE = PROGRAM + "\n".join(ASSERTS)
ENCLOSED = (
    "import os, sys; sys.path.append(sys.argv[1]); from offtrail.rewards.sandbox import walls\n"
    f"import {', '.join(WARM.split())}\n"
    "walls.enclose(walls.ruleset(sys.argv[2:]), memory=512 << 20, cpu_seconds=3, uid=0)\n" + WHOLE
)
IMPORTED = f"import {', '.join(WARM.split())}\n" + WHOLE


def ours(wall: boxes.Wall) -> Callable[[], None]:
    """One judged run behind a wall, of a box that stays."""
    box = Box(wall)

    def run() -> None:
        assert judge(box, PROGRAM, META).reason == "ok"

    return run


def anew(*before: str, code: str, after: tuple[str, ...] = ()) -> Callable[[], None]:
    """One interpreter for one run."""
    command = [*before, os.path.realpath(sys.executable), "-I", "-S", "-B", "-c", code, *after]

    def run() -> None:
        subprocess.run(command, env={}, stdin=subprocess.DEVNULL, check=True)

    return run


def arms() -> dict[str, Callable[[], None]]:
    source = str(Path(offtrail.__file__).parents[1])
    found = {
        "auto": ours("auto"),
        "landlock": ours("landlock"),
        "subprocess": anew(code=ENCLOSED, after=(source, *boxes.library_folders())),
    }
    if program := bubblewrap.found():
        found["bwrap"] = anew(*bubblewrap.jail(program, boxes.python_prefix()), code=IMPORTED)
    return found


def measured(run: Callable[[], None], runs: int) -> float:
    """Seconds a run."""
    start = time.perf_counter()
    for _ in range(runs):
        run()
    return (time.perf_counter() - start) / runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    found = arms()
    for run in found.values():
        run()
    rounds = [{name: measured(run, arguments.runs) for name, run in found.items()} for _ in range(arguments.rounds)]
    for name in found:
        milliseconds = [1000 * one[name] for one in rounds]
        middle, low, high = statistics.median(milliseconds), min(milliseconds), max(milliseconds)
        print(f"{name:>10}: {middle:6.1f} ms a run ({low:.1f}–{high:.1f})", file=sys.stderr)
    result: dict[str, float | None] = {"runs_per_second": statistics.median(1 / one["auto"] for one in rounds)}
    for peer in ("subprocess", "bwrap"):
        ratios = [one[peer] / one["auto"] for one in rounds if peer in one]
        result[f"ratio_to_{peer}"] = statistics.median(ratios) if ratios else None
    result["ratio_to_subprocess_landlock"] = statistics.median(one["subprocess"] / one["landlock"] for one in rounds)
    print(json.dumps({name: value and round(value, 2) for name, value in result.items()}))


if __name__ == "__main__":
    main()
