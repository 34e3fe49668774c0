"""job=reject: of answers that were sampled those that are fit to be imitated, mixed with other data.

    rows of reject.paths ─► Candidate ─► Sieve (tasks/rejection.py) ─► data.jsonl, data.json
                                │                       └────────────► rejected.jsonl: an example of each reason
                                └─► Spool: the lines of those that are fit, on disk

It needs no model and no engine. A launch that goes on begins anew: the same rows and settings give the same data.
Invariant: of the rows and their texts no more are held than are in work, however many there are.
"""

from __future__ import annotations

import json
import logging
from array import array
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from decimal import Decimal
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from offtrail.core.problem import Problem
from offtrail.platform.config.errors import refuse
from offtrail.platform.config.schema import Config
from offtrail.platform.launcher.asking import COLUMNS, Outcome, StoppedError, check_same, run_reading
from offtrail.platform.launcher.dataset import as_line, rewards_of, write_about, write_data
from offtrail.platform.launcher.inputs import hashes, inputs_of
from offtrail.platform.launcher.spool import Spool, spooled
from offtrail.platform.tracking.summary import read_summary, write_atomic, write_summary
from offtrail.platform.verifier.pool import VerifierPool
from offtrail.tasks.candidates import candidates_in, examples_of_mix, held_index
from offtrail.tasks.data_config import RejectConfig
from offtrail.tasks.overlap import Held
from offtrail.tasks.registry import make_task
from offtrail.tasks.rejection import REASONS, Candidate, Sieve, Verdict, draw, mixed_in

REJECTED_FILE = "rejected.jsonl"
SEE = f"{REJECTED_FILE} has one of each reason"
SECTIONS = ("reject", "reward", "task")
IN_FLIGHT = 256
"""Answers that wait for a verifier at a time."""
log = logging.getLogger("offtrail.reject")


def run_rejection(config: Config, run_dir: Path, interrupted: list[int]) -> Outcome:
    """job=reject: how it ended, and why."""
    return run_reading(reject, config, run_dir, interrupted, "begins it anew")


@dataclass
class Found:
    """What became of the rows: the ``sources`` of all, by place; the places that are ``kept``, in order; reason → how
    many, and the first line of it.
    """

    sources: list[str] = field(default_factory=list)
    kept: array[int] = field(default_factory=lambda: array("q"))
    questions: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    first: dict[str, tuple[Verdict, str]] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """All of them."""
        return len(self.sources)

    def leave_out(self, verdict: Verdict, line: Callable[[], str]) -> None:
        """Count a row that is left out; its ``line`` is taken where it is the first of its reason."""
        self.rejected[verdict.reason] += 1
        if verdict.reason not in self.first or verdict.place < self.first[verdict.reason][0].place:
            self.first[verdict.reason] = verdict, line()

    def counts(self) -> dict[str, int]:
        """Reason → how many, in the order of REASONS; those that nobody met are left out."""
        return {reason: self.rejected[reason] for reason in REASONS if reason in self.rejected}


def reject(config: Config, run_dir: Path, interrupted: list[int]) -> Outcome:
    """Read, sift, mix, write."""
    check_same(config, run_dir, "rejection")
    given = config.reject
    held = held_index(given, config.task, held_out_problems(config))
    with spooled(run_dir) as spool:
        found = sifted(config, held, spool, interrupted)
        write_rejected(run_dir, found)
        if not found.kept:
            reasons = ", ".join(f"{n:,} {reason}" for reason, n in found.counts().items())
            raise refuse("reject.paths", given.paths, f"none of {found.rows:,} rows is kept: {reasons}; {SEE}")
        drawn, contaminated = draw_mix(config, len(found.kept), held)
        data = write_data(run_dir, chain(map(spool.line, found.kept), lines_of_mix(config, drawn)))
    counts = {
        "rows": found.rows,
        "kept": len(found.kept),
        "rejected": found.counts(),
        "questions": found.questions,
        "mixed": {name: len(rows) for name, rows in drawn.items()},
        "mixed_contaminated": contaminated,
    }
    told = {"counts": counts, "sources": by_source(found), "data": data}
    write_about(run_dir, config, SECTIONS, {**told, "inputs": hashes(inputs_of(config, run_dir))})
    write_summary(run_dir, read_summary(run_dir) | summary_of(counts, data["lines"]))
    Console().print(table(counts, data["lines"]), highlight=False)
    return "completed", ""


def sifted(config: Config, held: Held | None, spool: Spool, interrupted: list[int]) -> Found:
    """Every row once through the sieve, and then of those that are fit the ones that are chosen; ``spool`` has the
    lines of these. Raises StoppedError when a signal came in between.
    """
    given, found, sieve = config.reject, Found(), Sieve(config.reject, config.run.seed, held)
    console = Console(stderr=True)
    with (
        Progress(*COLUMNS, console=console, disable=not console.is_terminal) as shown,
        closing(scored(config, from_their_sources(config, found), interrupted)) as candidates,
    ):
        bar = shown.add_task("rows", total=None)
        for place, one in candidates:
            verdict = sieve.judged(place, one)
            if verdict.reason:
                found.leave_out(verdict, partial(line_of_row, one, given))
            else:
                spool.put(place, line_of_row(one, given))
            shown.advance(bar)
    kept = list[int]()
    for verdicts in sieve.chosen(lambda place: str(json.loads(spool.line(place))["answer"])):
        if interrupted:
            raise StoppedError
        left_out = [verdict for verdict in verdicts if verdict.reason]
        for verdict in left_out:
            found.leave_out(verdict, partial(spool.line, verdict.place))
        kept += (verdict.place for verdict in verdicts if not verdict.reason)
        found.questions += len(left_out) < len(verdicts)
    found.kept = array("q", sorted(kept))
    return found


def from_their_sources(config: Config, found: Found) -> Iterator[Candidate]:
    """The candidates, whose sources are noted as they are read."""
    for one in candidates_in(config.reject, config.reward.main, config.task):
        found.sources.append(one.source)
        yield one


def scored(
    config: Config, candidates: Iterable[Candidate], interrupted: list[int]
) -> Generator[tuple[int, Candidate], None, None]:
    """(place, candidate) of each; those that have a gold answer as they are decided, by the task's verifier and the
    reward's components, in processes that can be killed.
    """
    waiting: dict[int, Candidate] = {}
    pool: VerifierPool | None = None
    with ExitStack() as stack:
        for place, one in enumerate(candidates):
            if interrupted:
                raise StoppedError
            if not one.gold:
                yield place, one
                continue
            pool = pool or stack.enter_context(VerifierPool(config))
            problem = replace(one.problem, task=one.family or config.task.name, answer=one.gold)
            pool.submit(place, problem, [one.problem.answer], [one.finished])
            waiting[place] = one
            while len(waiting) >= IN_FLIGHT:
                yield from decided(pool, waiting, config.reward.main, interrupted)
        while pool is not None and waiting:
            yield from decided(pool, waiting, config.reward.main, interrupted)


def decided(
    pool: VerifierPool, waiting: dict[int, Candidate], main: str, interrupted: list[int]
) -> Iterator[tuple[int, Candidate]]:
    """Those of the ``waiting`` that have a verdict by now; they wait no more."""
    if interrupted:
        raise StoppedError
    for place, components in pool.poll(timeout_s=0.05):
        one = waiting.pop(place)
        if components is None:
            log.warning("%s: not judged: %s", place_of(one), pool.reason(place))
        told = None if components is None else rewards_of({name: column[0] for name, column in components.items()})
        yield place, with_rewards(one, told, main)


def with_rewards(one: Candidate, rewards: dict[str, float | None] | None, main: str) -> Candidate:
    """A candidate that was judged, and its row, which says so."""
    if rewards is None:
        return one
    return replace(one, reward=rewards[main], fields={**one.fields, "rewards": rewards})


def held_out_problems(config: Config) -> list[Problem]:
    """The task's, where rows are compared with them. Raises TaskError."""
    return make_task(config.task, config.run.seed).held_out(config.eval.prompts) if config.reject.held_out else []


def draw_mix(config: Config, kept: int, held: Held | None) -> tuple[dict[str, list[int]], dict[str, int]]:
    """Name → the rows of its file that are drawn, by number from 0, in their order; and how many are contaminated, so
    that they cannot be.
    """
    drawn, contaminated = dict[str, list[int]](), dict[str, int]()
    wanted = mixed_in(kept, config.reject)
    for name, entry in config.reject.mix.items():
        rows, fit = 0, array("q")
        for number, one in enumerate(examples_of_mix(name, entry)):
            rows = number + 1
            if held is None or not held.matches(one):
                fit.append(number)
        if len(fit) < rows:
            contaminated[name] = rows - len(fit)
        places = draw(name, len(fit), wanted[name], config.run.seed, repeat=entry.get("repeat", False))
        drawn[name] = [fit[place] for place in places]
    return drawn, contaminated


def lines_of_mix(config: Config, drawn: Mapping[str, list[int]]) -> Iterator[str]:
    """The lines of the rows that are drawn, each as often as it is."""
    for name, entry in config.reject.mix.items():
        times = Counter(drawn[name])
        for number, one in enumerate(examples_of_mix(name, entry)):
            yield from [line_of_mixed(name, one)] * times[number] if number in times else ()


def row_of(one: Candidate, given: RejectConfig) -> dict[str, Any]:
    """Its row, under the names that job=sft reads, and where it is from. A gold answer that stood in `answer` is
    `gold`, where job=reject looks for it.
    """
    rest = {name: value for name, value in one.fields.items() if name not in ("prompt", "messages", "answer")}
    if given.gold_field == "answer" != given.answer_field and "answer" in one.fields:
        rest.setdefault("gold", one.fields["answer"])
    return {**asked(one.problem), "answer": one.problem.answer, **plain(rest), "from": place_of(one)}


def line_of_row(one: Candidate, given: RejectConfig) -> str:
    """The line of ``row_of``."""
    return as_line(row_of(one, given))


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


def write_rejected(run_dir: Path, found: Found) -> None:
    """The first row of each reason, with why."""
    shown = [found.first[reason] for reason in found.counts()]
    lines = [as_line({"reason": one.reason, "why": one.why, **json.loads(line)}) for one, line in shown]
    write_atomic(run_dir / REJECTED_FILE, "".join(lines))


def by_source(found: Found) -> dict[str, dict[str, int]]:
    """File → its rows, and how many of them are kept."""
    rows, kept = Counter(found.sources), Counter(found.sources[place] for place in found.kept)
    return {source.partition("=")[2]: {"rows": n, "kept": kept[source]} for source, n in rows.items()}


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
