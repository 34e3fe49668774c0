"""job=reject: of answers that were sampled those that are fit to be imitated, mixed with other data.

    rows of reject.paths ─► Candidate ─► sift (tasks/rejection.py) ─► data.jsonl, data.json
                                                            └───────► rejected.jsonl: an example of each reason

It needs no model and no engine. A launch that goes on begins anew: the same rows and settings give the same data.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from offtrail.core.problem import Problem
from offtrail.platform.config.errors import ConfigError, FinalError, refuse
from offtrail.platform.config.rundir import save
from offtrail.platform.config.schema import Config
from offtrail.platform.launcher.asking import COLUMNS, Outcome, StoppedError, check_same
from offtrail.platform.launcher.dataset import as_line, rewards_of, write_about, write_data
from offtrail.platform.launcher.inputs import hashes, inputs_of
from offtrail.platform.launcher.reaper import reaped
from offtrail.platform.tracking.summary import read_summary, write_atomic, write_summary
from offtrail.platform.verifier.pool import VerifierPool
from offtrail.tasks.base import TaskError
from offtrail.tasks.candidates import examples_of_mix, held_index, read_candidates
from offtrail.tasks.data_config import RejectConfig
from offtrail.tasks.overlap import Index
from offtrail.tasks.registry import make_task
from offtrail.tasks.rejection import Candidate, Sifted, draw, mixed_in, sift

REJECTED_FILE = "rejected.jsonl"
SEE = f"{REJECTED_FILE} has one of each reason"
SECTIONS = ("reject", "reward", "task")
IN_FLIGHT = 256
"""Answers that wait for a verifier at a time."""
log = logging.getLogger("offtrail.reject")


def run_rejection(config: Config, run_dir: Path, interrupted: list[int]) -> Outcome:
    """job=reject: how it ended, and why."""
    save(run_dir)
    try:
        with reaped(config, run_dir):
            return reject(config, run_dir, interrupted)
    except StoppedError:
        return "interrupted", f"stopped by signal {interrupted[0]}; run.resume=true begins it anew"
    except (ConfigError, FinalError, TaskError, ValueError, OSError) as error:
        return "failed", str(error)


def reject(config: Config, run_dir: Path, interrupted: list[int]) -> Outcome:
    """Read, sift, mix, write."""
    check_same(config, run_dir, "rejection")
    given = config.reject
    candidates = read_candidates(given, config.reward.main)
    held = held_index(given, config.task, held_out_problems(config))
    console = Console(stderr=True)
    with Progress(*COLUMNS, console=console, disable=not console.is_terminal) as shown:
        unscored = [place for place, one in enumerate(candidates) if one.gold]
        if unscored:
            scored = shown.add_task("verified", total=len(unscored))
            for place, rewards in verified(config, candidates, unscored, interrupted):
                candidates[place] = with_rewards(candidates[place], rewards, config.reward.main)
                shown.advance(scored)
        bar = shown.add_task("rows", total=len(candidates))

        def looked() -> None:
            if interrupted:
                raise StoppedError
            shown.advance(bar)

        sifted = sift(candidates, given, config.run.seed, held=held, looked=looked)
    write_rejected(run_dir, candidates, sifted, given)
    if not sifted.kept:
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in sifted.counts().items())
        raise refuse("reject.paths", given.paths, f"none of {len(candidates):,} rows is kept: {reasons}; {SEE}")
    mixed, contaminated = read_mix(config, len(sifted.kept), held)
    lines = [as_line(row_of(candidates[place], given)) for place in sifted.kept]
    data = write_data(run_dir, [*lines, *(line_of_mixed(name, one) for name, rows in mixed.items() for one in rows)])
    counts = {
        "rows": len(candidates),
        "kept": len(sifted.kept),
        "rejected": sifted.counts(),
        "questions": len({candidates[place].question for place in sifted.kept}),
        "mixed": {name: len(rows) for name, rows in mixed.items()},
        "mixed_contaminated": contaminated,
    }
    told = {"counts": counts, "sources": by_source(candidates, sifted), "data": data}
    write_about(run_dir, config, SECTIONS, {**told, "inputs": hashes(inputs_of(config, run_dir))})
    write_summary(run_dir, read_summary(run_dir) | summary_of(counts, data["lines"]))
    Console().print(table(counts, data["lines"]), highlight=False)
    return "completed", ""


def verified(
    config: Config, candidates: Sequence[Candidate], places: Sequence[int], interrupted: list[int]
) -> Iterator[tuple[int, dict[str, float | None] | None]]:
    """(place, rewards by component, or None where a verifier gave none) of candidates that have a gold answer, as they
    are decided: by the task's verifier and the reward's components, in processes that can be killed.
    """
    mixture: Mapping[str, float] = getattr(config.task, "weights", {})
    with VerifierPool(config) as pool:
        waiting = iter(places)
        while True:
            if interrupted:
                raise StoppedError
            for place in islice(waiting, IN_FLIGHT - pool.pending):
                one = candidates[place]
                named = str(one.fields.get("task", ""))
                task = named if named in mixture else next(iter(mixture), config.task.name)
                problem = replace(one.problem, task=task, answer=one.gold)
                pool.submit(place, problem, [one.problem.answer], [one.finished])
            if not pool.pending:
                return
            for place, components in pool.poll(timeout_s=0.05):
                if components is None:
                    log.warning("%s: not judged: %s", place_of(candidates[place]), pool.reason(place))
                told = None if components is None else {name: column[0] for name, column in components.items()}
                yield place, None if told is None else rewards_of(told)


def with_rewards(one: Candidate, rewards: dict[str, float | None] | None, main: str) -> Candidate:
    """A candidate that was judged, and its row, which says so."""
    if rewards is None:
        return one
    return replace(one, reward=rewards[main], fields={**one.fields, "rewards": rewards})


def held_out_problems(config: Config) -> list[Problem]:
    """The task's, where rows are compared with them. Raises TaskError."""
    return make_task(config.task, config.run.seed).held_out(config.eval.prompts) if config.reject.held_out else []


def read_mix(config: Config, kept: int, held: Index | None) -> tuple[dict[str, list[Problem]], dict[str, int]]:
    """Name → the rows that are drawn of it; and how many of its file are contaminated, so that they cannot be."""
    mixed, contaminated = dict[str, list[Problem]](), dict[str, int]()
    wanted = mixed_in(kept, config.reject)
    for name, entry in config.reject.mix.items():
        rows = examples_of_mix(name, entry)
        fit = [one for one in rows if held is None or not held.matches(one.prompt)]
        if len(fit) < len(rows):
            contaminated[name] = len(rows) - len(fit)
        places = draw(name, len(fit), wanted[name], config.run.seed, repeat=entry.get("repeat", False))
        mixed[name] = [fit[place] for place in places]
    return mixed, contaminated


def row_of(one: Candidate, given: RejectConfig) -> dict[str, Any]:
    """Its row, under the names that job=sft reads, and where it is from. A gold answer that stood in `answer` is
    `gold`, where job=reject looks for it.
    """
    rest = {name: value for name, value in one.fields.items() if name not in ("prompt", "messages", "answer")}
    if given.gold_field == "answer" != given.answer_field and "answer" in one.fields:
        rest.setdefault("gold", one.fields["answer"])
    return {**asked(one.problem), "answer": one.problem.answer, **plain(rest), "from": place_of(one)}


def line_of_mixed(name: str, one: Problem) -> str:
    """A row of further data."""
    return as_line({**asked(one), "answer": one.answer, "mix": name, "from": f"{one.task}, {one.meta['place']}"})


def asked(problem: Problem) -> dict[str, Any]:
    """What is asked, as job=sft reads it."""
    return {"prompt": [dict(turn) for turn in problem.messages] or problem.prompt}


def place_of(one: Candidate) -> str:
    """The file and the row in it."""
    return f"{one.source.partition('=')[2]}, {one.problem.meta['place']}"


def plain(value: Any) -> Any:
    """A value of a row as JSON writes it: numbers that were read exactly are numbers again."""
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


def write_rejected(run_dir: Path, candidates: Sequence[Candidate], sifted: Sifted, given: RejectConfig) -> None:
    """The first candidate of each reason, with why."""
    first = {one.reason: one for one in reversed(sifted.rejected)}
    shown = [first[reason] for reason in sifted.counts()]
    lines = [as_line({"reason": one.reason, "why": one.why, **row_of(candidates[one.place], given)}) for one in shown]
    write_atomic(run_dir / REJECTED_FILE, "".join(lines))


def by_source(candidates: Sequence[Candidate], sifted: Sifted) -> dict[str, dict[str, int]]:
    """File → its rows, and how many of them are kept."""
    found: dict[str, dict[str, int]] = {}
    for one in candidates:
        counts = found.setdefault(one.source.partition("=")[2], {"rows": 0, "kept": 0})
        counts["rows"] += 1
    for place in sifted.kept:
        found[candidates[place].source.partition("=")[2]]["kept"] += 1
    return found


def summary_of(counts: Mapping[str, Any], lines: int) -> dict[str, Any]:
    """For summary.json."""
    return {
        "data/rows": counts["rows"],
        "data/kept": counts["kept"],
        "data/questions": counts["questions"],
        "data/rejected": counts["rejected"],
        "data/mixed": counts["mixed"],
        "data/lines": lines,
    }


def table(counts: Mapping[str, Any], lines: int) -> Table:
    """A line a reason, for the terminal."""
    shown = Table("rows", "", "share", box=None)
    rows = counts["rows"]
    for reason, n in counts["rejected"].items():
        shown.add_row(reason, f"{n:,}", f"{n / rows:.3f}")
    shown.add_row("kept", f"{counts['kept']:,}", f"{counts['kept'] / rows:.3f}", style="bold")
    shown.add_row("of", f"{rows:,}", "")
    for name, n in counts["mixed"].items():
        shown.add_row(f"mixed in: {name}", f"{n:,}", f"{n / lines:.3f}")
    if counts["mixed"]:
        shown.add_row("lines of data.jsonl", f"{lines:,}", "")
    return shown
