"""job=sample: a model answers training problems, n times each, and the verified answers become a data set.

    the task's training problems ─► put (tasks/prompting.py) ─► asking.py: parts of answers, sealed ─► data.jsonl

DeepSeek-R1's data are made so (arXiv:2501.12948, §2.3.1, §2.3.3). What a line records as its prompt is the plain
problem, however the model was asked: that is what is to be learnt. Everything is written from the sealed parts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from rich.console import Console
from rich.table import Table

from offtrail.core.types import FINISH_REASONS, Group
from offtrail.platform.config.checkpoints import run_folder
from offtrail.platform.config.schema import Config
from offtrail.platform.launcher.asking import (
    Manner,
    Outcome,
    Questions,
    ask,
    check_same,
    groups_of,
    link_model,
    run_asking,
    version_of,
)
from offtrail.platform.launcher.dataset import line_of, rewards_of, write_about, write_data
from offtrail.platform.launcher.inputs import hashes, inputs_of
from offtrail.platform.launcher.overlap import write_overlaps
from offtrail.platform.launcher.serve import models_of_servers, served_model, text_of
from offtrail.platform.model.text import Text
from offtrail.platform.runtime.device import require_device
from offtrail.platform.tracking.held import Meter
from offtrail.platform.tracking.summary import read_summary, write_summary
from offtrail.tasks.lines import fault_of
from offtrail.tasks.prompting import questions as asked_questions
from offtrail.tasks.registry import make_task

STOP = FINISH_REASONS.index("stop")
SAMPLE_SEED = 0x5A3B1E
"""Mixed into run.seed: answers share no random numbers with training or evaluation."""
SECTIONS = ("task", "prompt", "sample", "sampling", "reward", "engine")
"""Of the configuration, what decides the data beside the model."""


def run_sampling(config: Config, run_dir: Path, interrupted: list[int]) -> Outcome:
    """job=sample: how it ended, and why."""
    return run_asking(sample, "generator", config, run_dir, interrupted)


def sample(config: Config, run_dir: Path, interrupted: list[int], meter: Meter) -> Outcome:
    """Ask what was not asked yet, then write the data and what they are."""
    write_overlaps(config, run_dir)
    require_device("engine.device", config.engine.device)
    model, given = served_model(config), config.sample
    link_model(run_dir, model)
    check_same(config, run_dir, "sampling")
    text = text_of(config, model)
    task = make_task(config.task, config.run.seed)
    problems, told = asked_questions(task, given, config.reward, config.run.seed, chats=text.chats)
    questions = Questions("training", config, problems, given.samples, told, given.first)
    manner = Manner("generator", given.temperature, given.top_p, config.run.seed ^ SAMPLE_SEED)
    ask(config, run_dir, text, [questions], manner, interrupted, meter, len(problems))
    found = Found(len(problems), given.samples)
    data = write_data(run_dir, lines_of(run_dir, questions, text, found))
    if not data["lines"]:
        return "failed", found.nothing(config)
    inputs = hashes(inputs_of(config, run_dir))
    about = {"model": model_of(config, model, inputs), "counts": found.counts(), "data": data, "inputs": inputs}
    write_about(run_dir, config, SECTIONS, about)
    write_summary(run_dir, read_summary(run_dir) | found.summary())
    Console().print(found.table(), highlight=False)
    return "completed", ""


def model_of(config: Config, model: Path, inputs: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Which model has answered: as it was given, its folder, the run that made it, and one hash of its files."""
    run, files = run_folder(config.checkpoint), inputs.get("model.path", {})
    state = xxhash.xxh3_128("".join(f"{name} {files[name]}\n" for name in sorted(files)).encode())
    return {
        "checkpoint": config.checkpoint,
        "folder": str(model.resolve()),
        "run": None if run is None else str(run.resolve()),
        "checksum": state.hexdigest(),
        "servers": {url: told["model_path"] for url, told in models_of_servers(config).items()},
    }


@dataclass
class Found:
    """What came of the answers: counted while lines are made of them."""

    questions: int
    samples: int
    kept: int = 0
    without_room: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    """Reason → answers that are no line."""
    right: list[int] = field(default_factory=list)
    """Right answers of each question that was asked."""
    lengths: list[float] = field(default_factory=list)
    cut: int = 0

    @property
    def answers(self) -> int:
        """That were drawn."""
        return len(self.right) * self.samples

    def counts(self) -> dict[str, Any]:
        """For data.json."""
        return {
            "questions": self.questions, "without_room": self.without_room, "answers": self.answers,
            "right": sum(self.right), "cut": self.cut, "lines": self.kept, "left_out": dict(self.left_out),
        }  # fmt: skip

    def summary(self) -> dict[str, Any]:
        """For summary.json."""
        asked = max(1, len(self.right))
        return {
            "sample/questions": self.questions,
            "sample/questions_without_room": self.without_room,
            "sample/answers": self.answers,
            "sample/accuracy": sum(self.right) / max(1, self.answers),
            "sample/questions_answered": sum(map(bool, self.right)) / asked,
            "sample/truncated_share": self.cut / max(1, self.answers),
            "sample/length_mean": float(np.mean(self.lengths)) if self.lengths else 0.0,
            "data/lines": self.kept,
            "data/left_out": dict(self.left_out),
        }

    def table(self) -> Table:
        """For the terminal."""
        told = self.summary()
        shown = Table.grid(padding=(0, 2))
        rows = {
            "questions × answers": f"{self.questions:,} × {self.samples}",
            "right": f"{told['sample/accuracy']:.3f} of the answers",
            "with a right answer": f"{told['sample/questions_answered']:.3f} of the questions",
            "cut at the longest length": f"{told['sample/truncated_share']:.3f} of the answers",
            "prompts without room": f"{self.without_room:,}" if self.without_room else "",
            "lines of data.jsonl": f"{self.kept:,}",
            "left out": ", ".join(f"{n:,} {reason}" for reason, n in sorted(self.left_out.items())),
        }
        for name, value in rows.items():
            if value:
                shown.add_row(name, value)
        return shown

    def nothing(self, config: Config) -> str:
        """Why there is not one line."""
        if not self.right:
            return (
                f"none of {self.questions:,} prompts leaves room for sampling.max_new_tokens="
                f"{config.sampling.max_new_tokens} in model.max_length={config.model.max_length}; raise it, or lower "
                "sampling.max_new_tokens"
            )
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in self.left_out.items())
        return f"sample.keep={config.sample.keep}: no answer of {self.answers:,} can be kept ({reasons})"


def lines_of(run_dir: Path, questions: Questions, text: Text, found: Found) -> Iterator[str]:
    """The lines of data.jsonl, in the order of the questions; ``found`` is told of everything."""
    config = questions.config
    source = {"model": config.checkpoint, "version": version_of(run_dir), "prompting": config.sample.prompting}
    put_to = questions.put or questions.problems
    for place, group in groups_of(run_dir, questions):
        main = np.nan_to_num(group.components[config.reward.main])
        found.right.append(int((main >= 1.0).sum()))
        for i, one in enumerate(group.samples()):
            answer = text.answer_text(put_to[place], one.tokens)
            found.lengths.append(len(one.tokens))
            found.cut += one.finish != "stop"
            if reason := not_kept(answer, one.finish, float(main[i]), config):
                found.left_out[reason] += 1
                continue
            found.kept += 1
            yield line_of(questions.problems[place], answer, source | told_of(group, i))
    found.without_room = found.questions - len(found.right)


def not_kept(answer: str, finish: str, main: float, config: Config) -> str:
    """Why an answer is no line; empty where it is one."""
    if config.sample.keep == "right" and main < 1.0:
        return "wrong"
    if config.sample.keep == "right" and finish != "stop":
        return "unfinished"
    if not answer.strip():
        return "empty"
    return "garbled" if fault_of(answer) else ""


def told_of(group: Group, i: int) -> dict[str, Any]:
    """What a line says of answer ``i`` of its group, besides the text."""
    return {
        "sample": i,
        "reward": round(float(group.rewards[i]), 6),
        "rewards": rewards_of({name: column[i] for name, column in group.components.items()}),
        "finish": FINISH_REASONS[int(group.finish[i])],
        "tokens": int(group.lengths[i]),
    }
