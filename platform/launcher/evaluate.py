"""job=eval: a checkpoint answers held-out problems of one or several sets, n times each.

    problems ─► Answers (engine, verifiers), a part at a time ─► answers/SET-K.parquet ─► measures.py
             ─► eval.json, eval.png, summary.json and the table on the terminal

Invariants: a part is sealed by rename and holds every answer, so that an evaluation that was cut short goes on where it
was (run.resume=true); the number of a question keys its randomness, so that it then says what an undisturbed one says.
Everything that is said is said of the sealed parts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from offtrail.core.types import FINISH_REASONS, Group, Problem, Sampling
from offtrail.platform.broker.archive import SCHEMA, read_groups, tables
from offtrail.platform.config.errors import FinalError
from offtrail.platform.config.rundir import save
from offtrail.platform.config.schema import Config
from offtrail.platform.config.sets import EvalSet, sets_of
from offtrail.platform.engines.make import make_engine
from offtrail.platform.evaluator.answers import Answers
from offtrail.platform.evaluator.report import Asked, write_results
from offtrail.platform.launcher.inputs import hashes, inputs_of
from offtrail.platform.launcher.reaper import reaped
from offtrail.platform.launcher.serve import LOOK_SECONDS, served_model, text_of
from offtrail.platform.model.start import StartError
from offtrail.platform.model.text import Text
from offtrail.platform.runtime.context import RoleContext
from offtrail.platform.runtime.device import require_device
from offtrail.platform.runtime.devices import devices_of
from offtrail.platform.tracking.held import Meter
from offtrail.platform.tracking.summary import read_summary, write_atomic, write_summary
from offtrail.platform.verifier.pool import VerifierPool
from offtrail.rewards.answer import find_answer
from offtrail.rewards.format import parse
from offtrail.tasks.base import TaskError

ANSWERS = "answers"
PART = 64
"""Questions of a part: what an interruption costs at most."""
COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TimeRemainingColumn(),
)
STOP = FINISH_REASONS.index("stop")
EVAL_SEED = 0xE7A15E7
"""Mixed into run.seed: answers share no random numbers with training, nor with the evaluation during training."""


def run_evaluation(config: Config, run_dir: Path, interrupted: list[int]) -> tuple[str, str]:
    """job=eval: how it ended, and why."""
    save(run_dir)
    meter = Meter(run_dir, "evaluator", devices_of(config, "evaluator", 0))
    try:
        with reaped(config, run_dir):
            return evaluate(config, run_dir, interrupted, meter)
    except (FinalError, StartError, TaskError, ValueError, OSError) as error:
        return "failed", str(error)
    except MemoryError as error:
        return "failed", f"no memory for the engine ({error}); lower engine.kv_cache_mb or engine.max_running"
    finally:
        with contextlib.suppress(OSError, ValueError):  # a full disk has been told already
            write_summary(run_dir, read_summary(run_dir) | meter.summary())


def evaluate(config: Config, run_dir: Path, interrupted: list[int], meter: Meter) -> tuple[str, str]:
    """Ask what was not asked yet, then say what came of all of it."""
    require_device("engine.device", config.engine.device)
    model = served_model(config)
    link_model(run_dir, model)
    check_same(config, run_dir)
    text, asked = text_of(config, model), {one.label: one for one in sets_of(config)}
    sets = {name: one.problems() for name, one in asked.items()}
    todo = {name: parts_of(run_dir, name, problems) for name, problems in sets.items()}
    if any(todo.values()) and not ask(config, run_dir, text, sets, todo, interrupted, meter):
        return "interrupted", f"stopped by signal {interrupted[0]}; run.resume=true goes on"
    found = [collect(run_dir, asked[name], problems, text) for name, problems in sets.items()]
    longest = config.sampling.longest_at(version_of(run_dir))
    Console().print(write_results(config, run_dir, model, found, longest))
    return "completed", ""


def ask(
    config: Config,
    run_dir: Path,
    text: Text,
    sets: dict[str, list[Problem]],
    todo: dict[str, list[Part]],
    interrupted: list[int],
    meter: Meter,
) -> bool:
    """Seal the parts; False when a signal came in between."""
    asked = {one.label: one for one in sets_of(config)}
    busy = 0.0
    questions, left = (sum(map(len, sets.values())), sum(len(p.problems) for parts in todo.values() for p in parts))
    console = Console(stderr=True)
    with (
        contextlib.closing(make_engine(RoleContext(config, run_dir, "evaluator", 0))) as engine,
        Progress(*COLUMNS, console=console, disable=not console.is_terminal) as shown,
    ):
        bar = shown.add_task("questions", total=questions, completed=questions - left)
        while not engine.replicas and not interrupted:
            shown.update(bar, description=engine.waiting_for)  # raises where it waits in vain
            time.sleep(LOOK_SECONDS)
        shown.update(bar, description="questions")
        for name, parts in todo.items():
            of_set = asked[name]
            with VerifierPool(of_set.config) as verifiers:
                answers = Answers(of_set.config, engine, text, verifiers, "evaluator-0")
                for part in parts:
                    if interrupted:
                        return False
                    began = time.monotonic()
                    part.seal(answers, of_set, version_of(run_dir))
                    busy += time.monotonic() - began
                    meter.note({**engine.counters, "busy_evaluate_seconds": busy})
                    shown.advance(bar, len(part.problems))
    return not interrupted


def check_same(config: Config, run_dir: Path) -> None:
    """Note what the model and the data of a new evaluation hold; ValueError where one that goes on began with others.
    Other settings are refused before.
    """
    file = run_dir / ANSWERS / "begun_with.json"
    now = hashes(inputs_of(config, run_dir))
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        write_atomic(file, json.dumps(now))
        return
    was = json.loads(file.read_text(encoding="utf-8"))
    for key in now | was:
        if now.get(key) != was.get(key):
            named = "checkpoint" if key == "model.path" else key  # what runs/NAME/start leads to
            raise ValueError(
                f"{named}: its files hold something else than when this evaluation began; put back what was there, or "
                "take another run.name"
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


@dataclasses.dataclass(frozen=True)
class Part:
    """Some questions of a set, from number ``first`` on, and the file that holds their answers."""

    file: Path
    first: int
    problems: list[Problem]

    def seal(self, answers: Answers, asked: EvalSet, version: int) -> None:
        """Ask the model of learner step ``version`` (its answers may have grown); the file stands with all answers, or
        not at all. Questions that leave no room for one are left out.
        """
        config = asked.config
        sampling = Sampling(
            max_new_tokens=config.sampling.longest_at(version),
            temperature=config.eval.temperature,
            top_p=config.eval.top_p,
            stop_token_ids=answers.text.stop_token_ids,
            seed=config.run.seed ^ EVAL_SEED,
        )
        made = answers.groups(self.problems, asked.samples, sampling, first=self.first, some=False)
        groups = [({"group": group.group, "state": "evaluated"}, group) for group in made if group is not None]
        left_out: dict[int, str] = {}
        rows = [SCHEMA.empty_table(), *tables(config.run.name, groups, left_out)]
        whole = pa.concat_tables(rows, promote_options="permissive")
        if left_out:
            raise ValueError(f"question {next(iter(left_out))}: {next(iter(left_out.values()))}")
        partial = self.file.with_name(f".{self.file.name}")
        pq.write_table(whole, partial, compression="zstd", write_page_checksum=True)
        os.replace(partial, self.file)


def parts_of(run_dir: Path, name: str, problems: list[Problem]) -> list[Part]:
    """The parts of a set that are not sealed yet."""
    parts = (
        Part(file_of(run_dir, name, first), first, problems[first : first + PART])
        for first in range(0, len(problems), PART)
    )
    return [part for part in parts if not part.file.exists()]


def file_of(run_dir: Path, name: str, first: int) -> Path:
    """Where the part of a set is that begins with question ``first``."""
    return run_dir / ANSWERS / f"{name.replace(':', '.')}-{first // PART:05d}.parquet"


def collect(run_dir: Path, one: EvalSet, problems: list[Problem], text: Text) -> Asked:
    """What came of a set, out of its sealed parts. Questions that left no room for an answer are wrong."""
    name, n, made, reward = one.label, one.samples, dict[int, Group](), one.config.reward
    for first in range(0, len(problems), PART):
        for group in read_groups(file_of(run_dir, name, first), range(len(problems))):
            made[group.group] = group
    scores = np.zeros((len(problems), n))
    asked = Asked(name, scores, [[None] * n for _ in problems], np.zeros((len(problems), n)), np.zeros_like(scores))
    for place, group in made.items():
        main = np.nan_to_num(group.components[reward.main].astype(np.float64))
        asked.scores[place], asked.lengths[place] = main, group.lengths
        asked.cut[place] = group.finish != STOP
        told = [text.answer_text(group.problem, sample.tokens) for sample in group.samples()]
        asked.answers[place] = [
            find_answer(words, parse(words), not cut, reward) for words, cut in zip(told, asked.cut[place], strict=True)
        ]
    return asked
