"""Problems put to a model, and every answer kept: what job=eval, job=sample and job=label have in common.

    Questions ─► Part (64 of them) ─► Answers.rounds (engine, verifiers) ─► models that score, where there are some
              ─► answers/NAME-K.parquet ─► groups_of

Invariants: a part is sealed by rename and holds every answer, so that what was cut short goes on where it was
(run.resume=true); the number of a question keys its randomness, so that with the embedded engine it then says what an
undisturbed run says; whatever is said of the answers is said of the sealed parts. A signal is heard between two steps
of the engine.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from offtrail.core.protocols import Engine, Scorer
from offtrail.core.types import Group, Int32, Problem, Sampling
from offtrail.platform.broker.archive import SCHEMA, read_groups, tables
from offtrail.platform.config.errors import ConfigError, FinalError
from offtrail.platform.config.rundir import save
from offtrail.platform.config.schema import Config, SglangConfig
from offtrail.platform.engines.make import make_engine
from offtrail.platform.evaluator.answers import Answers, Round
from offtrail.platform.launcher.inputs import hashes, inputs_of
from offtrail.platform.launcher.reaper import reaped
from offtrail.platform.launcher.serve import models_of_servers
from offtrail.platform.model.start import StartError
from offtrail.platform.model.text import Text
from offtrail.platform.runtime.context import RoleContext
from offtrail.platform.runtime.devices import devices_of
from offtrail.platform.scorer.groups import score_groups
from offtrail.platform.tracking.held import Meter
from offtrail.platform.tracking.summary import read_summary, write_atomic, write_summary
from offtrail.platform.verifier.pool import VerifierPool
from offtrail.rewards.behaviour import added
from offtrail.tasks.base import TaskError

ANSWERS = "answers"
BEGUN_WITH = "begun_with.json"
"""What the files held that a run began with, by their hashes."""
PART = 64
"""Questions of a part: what an interruption costs at most, times the parts that are asked together."""
AHEAD = 4
"""Parts that SGLang servers are asked together."""
LOOK_SECONDS = 0.2
"""Between two looks at an engine that has no server yet."""
TELL_SECONDS = 60.0
"""Between two lines about how far it is, where there is no terminal."""
COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TimeRemainingColumn(),
)
Outcome = tuple[str, str]
Job = Callable[[Config, Path, list[int], Meter], Outcome]
Reading = Callable[[Config, Path, list[int]], Outcome]


class StoppedError(Exception):
    """A signal came in the middle of a part, which is asked again when the job goes on."""


@dataclass(frozen=True)
class Questions:
    """Problems of one name, which its files are named by, each asked ``samples`` times; ``config`` has the task and the
    reward that judge the answers. ``put``: what the model is asked in place of each problem; empty = the problem.
    ``first``: the number of the first question. ``begun``: see Round.
    """

    name: str
    config: Config
    problems: Sequence[Problem]
    samples: int
    put: Sequence[Problem] = ()
    first: int = 0
    begun: Sequence[Int32] = ()


@dataclass(frozen=True)
class Manner:
    """How all questions are asked: as which role, whose engine it is, and how tokens are drawn."""

    role: str
    temperature: float
    top_p: float
    seed: int

    @property
    def doing(self) -> str:
        """What it is called in which its seconds are counted."""
        return "evaluate" if self.role == "evaluator" else "decode"

    def sampling(self, config: Config, text: Text, version: int) -> Sampling:
        """Of a model of learner step ``version``: its answers may have grown."""
        return Sampling(
            max_new_tokens=config.sampling.longest_at(version),
            temperature=self.temperature,
            top_p=self.top_p,
            stop_token_ids=text.stop_token_ids,
            seed=self.seed,
        )


@dataclass(frozen=True)
class Part:
    """Some questions, from place ``first`` on, and the file that holds their answers."""

    file: Path
    questions: Questions
    first: int

    @property
    def problems(self) -> Sequence[Problem]:
        """What is verified."""
        return self.questions.problems[self.first : self.first + PART]

    def round(self, sampling: Sampling) -> Round:
        """What is asked."""
        asked, first = self.questions, self.questions.first + self.first
        put = asked.put[self.first : self.first + PART]
        begun = asked.begun[self.first : self.first + PART]
        return Round(self.problems, asked.samples, sampling, first, put, begun)

    def seal(self, run: str, made: Sequence[Group | None]) -> None:
        """Write its answers: the file stands with all of them, or not at all. Questions that left no room for one are
        left out.
        """
        groups = [({"group": group.group, "state": "evaluated"}, group) for group in made if group is not None]
        left_out: dict[int, str] = {}
        rows = [SCHEMA.empty_table(), *tables(run, groups, left_out)]
        whole = pa.concat_tables(rows, promote_options="permissive")
        if left_out:
            raise ValueError(f"question {next(iter(left_out))}: {next(iter(left_out.values()))}")
        partial = self.file.with_name(f".{self.file.name}")
        pq.write_table(whole, partial, compression="zstd", write_page_checksum=True)
        os.replace(partial, self.file)


def run_asking(job: Job, role: str, config: Config, run_dir: Path, interrupted: list[int]) -> Outcome:
    """A job that asks a model as a ``role`` would: how it ended, and why. Nothing outlives it, and what it held and
    spent stands in summary.json.
    """
    save(run_dir)
    meter = Meter(run_dir, role, devices_of(config, role, 0))
    try:
        with reaped(config, run_dir):
            return job(config, run_dir, interrupted, meter)
    except StoppedError:
        return "interrupted", f"stopped by signal {interrupted[0]}; run.resume=true goes on"
    except (ConfigError, FinalError, StartError, TaskError, ValueError, OSError) as error:
        return "failed", str(error)
    except MemoryError as error:
        return "failed", f"no memory for the engine ({error}); lower engine.kv_cache_mb or engine.max_running"
    finally:
        with contextlib.suppress(OSError, ValueError):  # a full disk has been told already
            meter.note()
            write_summary(run_dir, read_summary(run_dir) | meter.summary())


def run_reading(
    job: Callable[[Config, Path, list[int]], Outcome],
    config: Config,
    run_dir: Path,
    interrupted: list[int],
    resumed: str,
) -> Outcome:
    """A job that reads files and has no engine: how it ended, and why. ``resumed``: what run.resume=true does."""
    save(run_dir)
    try:
        with reaped(config, run_dir):
            return job(config, run_dir, interrupted)
    except StoppedError:
        return "interrupted", f"stopped by signal {interrupted[0]}; run.resume=true {resumed}"
    except (ConfigError, FinalError, TaskError, ValueError, OSError) as error:
        return "failed", str(error)


def ask(
    config: Config,
    run_dir: Path,
    text: Text,
    sets: Iterable[Questions],
    manner: Manner,
    interrupted: list[int],
    meter: Meter,
    total: int,
    scorers: Mapping[str, Scorer] | None = None,
) -> None:
    """Seal every part that is not sealed yet. Raises StoppedError when a signal came in between. A set is asked for
    when those before it are sealed, so that it may follow from their answers; ``total`` questions are looked for in
    all. ``scorers``: models that say of every answer what it is worth, by name.

    The embedded engine is asked part by part, so that a job that was cut makes the very same batches; SGLang, whose
    answers depend on what runs beside them anyway, begins a part while the last answers of others are made.
    """
    sealed = list[int]()
    coming = unsealed(run_dir, sets, sealed)
    if (first := next(coming, None)) is None:
        return
    (run_dir / ANSWERS).mkdir(exist_ok=True)
    console, ahead = Console(stderr=True), AHEAD if isinstance(config.engine, SglangConfig) else 1

    def look() -> None:
        if interrupted:
            raise StoppedError

    with (
        contextlib.closing(make_engine(RoleContext(config, run_dir, manner.role, 0))) as engine,
        Progress(*COLUMNS, console=console, disable=not console.is_terminal) as shown,
    ):
        began, waited, pools = time.monotonic(), 0.0, list[VerifierPool]()
        models = list((scorers or {}).values())

        def note() -> None:
            busy = time.monotonic() - began - waited
            counters = [engine.counters, *(pool.counters for pool in pools), *(one.counters for one in models)]
            meter.note({**added(counters), f"busy_{manner.doing}_seconds": busy})

        def tick(made: int) -> None:
            if meter.due:
                note()
            bar.answered(made)

        bar = Bar(shown, total, sum(sealed), look, quiet=console.is_terminal)
        wait_for(engine, bar, look)
        waited = time.monotonic() - began
        for questions, todo in itertools.chain([first], coming):
            parts = {questions.first + part.first: part for part in todo}
            version = version_of(run_dir)
            sampling = manner.sampling(questions.config, text, version)
            with VerifierPool(questions.config) as verifiers:
                pools.append(verifiers)
                answers = Answers(questions.config, engine, text, verifiers, f"{manner.role}-0")
                rounds = (part.round(sampling) for part in parts.values())
                for round, groups in answers.rounds(rounds, step=version, some=False, ahead=ahead, tick=tick):
                    score_groups((group for group in groups if group is not None), scorers or {}, lambda on: look())
                    parts[round.first].seal(config.run.name, groups)
                    note()
                    bar.answered(groups.count(None))
    look()


def unsealed(run_dir: Path, sets: Iterable[Questions], sealed: list[int]) -> Iterator[tuple[Questions, list[Part]]]:
    """Each set that has parts which are not sealed yet, and those; ``sealed`` is told how many questions are."""
    for questions in sets:
        todo = [part for part in parts_of(run_dir, questions) if not part.file.exists()]
        sealed.append(len(questions.problems) - sum(len(part.problems) for part in todo))
        if todo:
            yield questions, todo


def wait_for(engine: Engine, bar: Bar, look: Callable[[], None]) -> None:
    """Until a server of the engine is up; raises where it waits in vain."""
    while not engine.replicas:
        bar.say(engine.waiting_for)
        look()
        time.sleep(LOOK_SECONDS)
    bar.say("questions")


class Bar:
    """How far it is: on a terminal with every question that is answered; elsewhere, not ``quiet``, a line at times."""

    def __init__(self, shown: Progress, total: int, done: int, look: Callable[[], None], *, quiet: bool) -> None:
        self._shown, self._total, self._done, self._look, self._quiet = shown, total, done, look, quiet
        self._bar = shown.add_task("questions", total=total, completed=done)
        self._told = time.monotonic()

    def say(self, what: str) -> None:
        """What is waited for, or done."""
        self._shown.update(self._bar, description=what)

    def answered(self, questions: int) -> None:
        """So many more are; ``look`` may raise."""
        self._look()
        if not questions:
            return
        self._done += questions
        self._shown.update(self._bar, completed=self._done)
        if not self._quiet and time.monotonic() - self._told > TELL_SECONDS:
            self._told = time.monotonic()
            print(f"{self._done:,} of {self._total:,} questions", flush=True)


def check_same(config: Config, run_dir: Path, what: str) -> None:
    """Note what the model and the data of a new run hold; ValueError where one that goes on began with others. Other
    settings are refused before. ``what``: what is begun, in a word.
    """
    file = run_dir / BEGUN_WITH
    now = hashes(inputs_of(config, run_dir))
    if servers := {told["model_path"]: "served" for told in models_of_servers(config).values()}:
        now["engine.urls"] = servers
    if not file.exists():
        write_atomic(file, json.dumps(now))
        return
    was = json.loads(file.read_text(encoding="utf-8"))
    for key in now | was:
        if now.get(key) != was.get(key):
            named = "checkpoint" if key == "model.path" else key  # what runs/NAME/start leads to
            holds = "the servers serve" if key == "engine.urls" else "its files hold"
            raise ValueError(
                f"{named}: {holds} something else than when this {what} began; put back what was there, or take "
                "another run.name"
            )


def link_model(run_dir: Path, model: Path) -> None:
    """runs/NAME/start → the model, where engines look for it."""
    link = run_dir / "start"
    link.unlink(missing_ok=True)
    link.symlink_to(model.resolve())


def version_of(run_dir: Path) -> int:
    """The learner step of the checkpoint that is asked, by its folder's name; 0 of any other model."""
    stem, _, step = (run_dir / "start").resolve().name.partition("_")
    return int(step) if stem == "step" and step.isdecimal() else 0


def parts_of(run_dir: Path, questions: Questions) -> list[Part]:
    """All parts of the questions of one name."""
    return [
        Part(file_of(run_dir, questions.name, first), questions, first)
        for first in range(0, len(questions.problems), PART)
    ]


def file_of(run_dir: Path, name: str, first: int) -> Path:
    """Where the part is that begins with the question at place ``first``."""
    return run_dir / ANSWERS / f"{name.replace(':', '.')}-{first // PART:05d}.parquet"


def groups_of(run_dir: Path, questions: Questions) -> Iterator[tuple[int, Group]]:
    """(place of the question, its answers) out of the sealed parts, in order; a question without room has none."""
    for part in parts_of(run_dir, questions):
        first = questions.first + part.first
        for group in read_groups(part.file, range(first, first + len(part.problems))):
            yield group.group - questions.first, group
