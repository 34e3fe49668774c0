"""What the launcher does for each job, and how it ends: `launch(config, run_dir)`.

launch ─► start model (cold start if it is not in the cache) ─► what is there to go on from (resume.py)
       ─► the roles of the job (run.py) ─► summary, learning.png, hacking.png
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from offtrail.platform.config.errors import ConfigError
from offtrail.platform.config.keys import SUPERVISED
from offtrail.platform.config.recipe import stages_of
from offtrail.platform.config.rundir import save
from offtrail.platform.config.schema import Config
from offtrail.platform.launcher.evaluate import run_evaluation
from offtrail.platform.launcher.hosts import LocalHosts
from offtrail.platform.launcher.label import run_labelling
from offtrail.platform.launcher.memory import check as check_memory
from offtrail.platform.launcher.overlap import write_overlaps
from offtrail.platform.launcher.prefer import run_preferring
from offtrail.platform.launcher.recipe import Outcome, run_recipe
from offtrail.platform.launcher.reject import run_rejection
from offtrail.platform.launcher.resume import check_what_is_there
from offtrail.platform.launcher.run import Run, watch
from offtrail.platform.launcher.sample import run_sampling
from offtrail.platform.launcher.serve import run_serve
from offtrail.platform.launcher.start import prepare_start_model
from offtrail.platform.model.scoring import check_tokenizers, scorings
from offtrail.platform.model.start import StartError
from offtrail.platform.tracking import cost
from offtrail.platform.tracking.cost import RunCost, cost_of
from offtrail.platform.tracking.hacking_plot import hacking_curves
from offtrail.platform.tracking.plot import learning_curve
from offtrail.platform.tracking.summary import LOSSES, read_summary, write_summary

EXIT_CODES = {"completed": 0, "failed": 1, "interrupted": 130}
URGENT = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)
STOPS = (*URGENT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that end a run in order: the user's, a closed terminal's (which may come twice), and those with which a
cluster announces the end of a job's time."""


def launch(config: Config, run_dir: Path) -> int:
    """Run a job or a recipe to its end in a run directory that exists; the exit status of the command."""
    with interrupts() as interrupted:
        status, _ = run_to_its_end(config, run_dir, interrupted)
    return EXIT_CODES[status]


def run_to_its_end(config: Config, run_dir: Path, interrupted: list[int]) -> Outcome:
    """One job, or every stage of a recipe, with its summary and its last words; how it ended, and why."""
    started = time.monotonic()
    try:
        if stages_of(config):
            outcome = run_recipe(config, run_dir, interrupted, run_to_its_end)
        else:
            outcome = JOBS[config.job](config, run_dir, interrupted)
    except KeyboardInterrupt as stopped:
        outcome = "interrupted", str(stopped)
    except (StartError, OSError) as error:
        outcome = "failed", str(error)
    finish(run_dir, *outcome, time.monotonic() - started, figures=config.tracking.figures)
    return outcome


def run_roles(config: Config, run_dir: Path, interrupted: list[int]) -> tuple[str, str]:
    """A training job: the start model, then every role until the end; how it ended, and why."""
    write_overlaps(config, run_dir)
    prepare_start_model(config, run_dir, interrupted, run_roles)
    check_tokenizers(scorings(config).values(), run_dir / "start")
    check_what_is_there(config, run_dir)
    check_memory(config, run_dir)
    save(run_dir)
    run = Run(config, run_dir, LocalHosts(run_dir))
    try:
        run.start_all()
        status, reason = watch(run, interrupted)
        run.leave(run.stop(status, reason), status == "completed")
    finally:
        run.close()
    return status, reason


JOBS = {
    "rl": run_roles,
    **dict.fromkeys(SUPERVISED, run_roles),
    "eval": run_evaluation,
    "sample": run_sampling,
    "label": run_labelling,
    "reject": run_rejection,
    "prefer": run_preferring,
    "serve": run_serve,
}


@contextlib.contextmanager
def interrupts() -> Iterator[list[int]]:
    """STOPS are noted and end the run in order; a second one of URGENT raises KeyboardInterrupt. What the launcher was
    started to ignore, as SIGHUP under nohup, stays ignored.
    """
    seen: list[int] = []
    cut_short = False

    def note(signum: int, frame: object) -> None:
        nonlocal cut_short
        seen.append(signum)
        if len(seen) == 1:
            say("stopping… (once more: at once)")
        elif signum in URGENT and not cut_short:  # a third one must not break into the end of the processes
            cut_short = True
            raise KeyboardInterrupt(f"stopped at once by a second signal, {signal.Signals(signum).name}")

    heard = [signum for signum in STOPS if signal.getsignal(signum) != signal.SIG_IGN]
    before = {signum: signal.signal(signum, note) for signum in heard}
    try:
        yield seen
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def say(text: str) -> None:
    """A line on stderr from a signal handler, which must not enter a stream that it has interrupted."""
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode(sys.stderr.encoding or "utf-8", "replace"))


def finish(run_dir: Path, status: str, reason: str, seconds: float, *, figures: bool = True) -> None:
    """Say what happened, set the final status (the broker may have died before it could), draw the curves if wanted.

    The reason comes first: a disk that is full may have been it, and takes no summary either.
    """
    if status == "failed":
        print(f"offtrail: error: {reason}", file=sys.stderr, flush=True)
    summary: dict[str, Any] = {"status": status, "launch_seconds": round(seconds, 3)}
    if reason:
        summary["reason"] = reason
    spent = costs(run_dir)
    try:
        before = read_summary(run_dir)
        before.pop("reason", None)  # of an earlier launch
        summary = before | summary
        summary |= spent.row() if spent is not None else {}
        write_summary(run_dir, summary)
        if spent is not None:
            cost.write(run_dir, spent)
        if figures and (run_dir / "metrics.jsonl").is_file():
            learning_curve(run_dir)
            hacking_curves(run_dir)
    except (OSError, ValueError) as error:  # ValueError: a file that was cut where the disk was full
        words = " ".join(str(error).split())
        print(f"offtrail: error: summary.json or a figure could not be written: {words}", file=sys.stderr)
    with contextlib.suppress(OSError):  # a terminal that is gone
        report(run_dir, summary)
        if spent is not None:
            Console().print(cost.table(spent), highlight=False)


def costs(run_dir: Path) -> RunCost | None:
    """What a run has cost; None of one that held nothing, or died before it could say."""
    try:
        spent = cost_of(run_dir)
    except (OSError, ValueError, ConfigError):
        return None
    return spent if spent.roles else None


def report(run_dir: Path, summary: dict[str, Any]) -> None:
    """The last words of a run on the terminal: what its summary says, and where to look."""
    generator = ["generator/busy_fraction"] if "generator/busy_fraction" in summary else []
    busy = "busy learner / generator" if generator else "busy learner"
    shown = {
        "status": summary["status"],
        "stages": _stages(summary),
        "learner steps": summary.get("steps"),
        "loss": next(filter(None, (_between(summary, name) for name in LOSSES)), None),
        "held-out accuracy": _between(summary, "eval/accuracy"),
        "held-out AUC": _between(summary, "eval/auc"),
        "first errors found, F1": _between(summary, "eval/first_error_f1"),
        **{f"held-out accuracy, {label}": _between(summary, f"eval/{label}/accuracy") for label in _sets(summary)},
        "training reward accuracy": _between(summary, "reward/accuracy"),
        "staleness mean / max": _pair(summary, "staleness/mean", "staleness/max"),
        "stale tokens": summary.get("staleness/stale_token_share"),
        "groups trained / lost / twice": _pair(summary, "groups/trained", "groups/lost", "groups/duplicated"),
        "groups refused": _refused(summary),
        "tokens trained": f"{summary['tokens/trained']:,}"
        if any(f"{name}_first" in summary for name in LOSSES)
        else None,
        "set aside": _set_aside(summary),
        "never scored": _unscored(summary),
        busy: _pair(summary, "learner/busy_fraction", *generator),
    }
    table = Table.grid(padding=(0, 2))
    for name, value in shown.items():
        if value is not None:
            table.add_row(name, f"{value:.3f}" if isinstance(value, float) else str(value))
    for line in summary.get("warnings", ()):
        table.add_row("warning", line)
    named = (
        "learning.png",
        "hacking.png",
        "eval.png",
        "few_shot.png",
        "data.jsonl",
        "rejected.jsonl",
        "summary.json",
        "cost.md",
        "logs",
    )
    for number, path in enumerate(run_dir / name for name in named if (run_dir / name).exists()):
        table.add_row("" if number else "see", str(path))
    Console().print(table, highlight=False)


def _sets(summary: dict[str, Any]) -> list[str]:
    """The held-out sets beside the task's own, as far as they have scores."""
    found = (re.fullmatch(r"eval/([^/]+)/accuracy_first", name) for name in summary)
    return [match[1] for match in found if match]


def _stages(summary: dict[str, Any]) -> str | None:
    stages = summary.get("stages", {}).items()
    return ", ".join(f"{name} {told.get('status', 'not begun')}" for name, told in stages) or None


def _refused(summary: dict[str, Any]) -> str | None:
    """By reason; not what a run's end leaves over."""
    reasons = summary.get("groups/refused", {}).items()
    told = [f"{count} {reason}" for reason, count in reasons if count and reason != "run_ended"]
    return f"{', '.join(told)}, of {summary.get('groups/admitted')}" if told else None


def _set_aside(summary: dict[str, Any]) -> str | None:
    """What could not be read, trained or archived; summary.json has the rest of it."""
    lines = summary.get("set_aside") or []
    return f"{lines[0]}{f', and {len(lines) - 1} more in summary.json' if lines[1:] else ''}" if lines else None


def _unscored(summary: dict[str, Any]) -> str | None:
    """Versions that were due, but of which no checkpoint was left when the run went on."""
    versions = summary.get("eval/unscored", ())
    return f"{', '.join(f'version {v}' for v in versions)}: no checkpoint of it is left" if versions else None


def _between(summary: dict[str, Any], name: str) -> str | None:
    first, last = summary.get(f"{name}_first"), summary.get(f"{name}_last")
    return None if first is None or last is None else f"{first:.3f} → {last:.3f}"


def _pair(summary: dict[str, Any], *names: str) -> str | None:
    values = [summary.get(name) for name in names]
    shown = ("–" if v is None else f"{v:.2f}" if isinstance(v, float) else str(v) for v in values)
    return None if all(v is None for v in values) else " / ".join(shown)
