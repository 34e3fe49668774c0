"""The data that a stage of reinforcement learning hands on: the right answers of its run, as runs/NAME/data.jsonl.

DeepSeek-R1 fine-tunes on answers of its reinforcement learning that rejection sampling kept (arXiv:2501.12948, §2.3.3).
Here they are those that the run has trained on, whichever version made them: nothing is sampled anew. Read from the
archive, so that the run may be over; each line has the fields that job=sft reads (learner/data.py), and where the
answer comes from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from offtrail.core.problem import Problem
from offtrail.platform.config.compose import load_config
from offtrail.platform.config.errors import ConfigError
from offtrail.platform.config.recipe import DATA_FILE
from offtrail.platform.launcher.dataset import line_of, rewards_of, write_about, write_data
from offtrail.platform.model.text import Text
from offtrail.platform.tracking.summary import read_summary
from offtrail.tasks.lines import fault_of

SECTIONS = ("task", "prompt", "sampling", "reward")
"""Of the configuration, what data.json repeats."""
ROWS = 256
"""Samples that are made Python objects at a time."""
COLUMNS = [
    "state",
    "group",
    "problem",
    "tokens",
    "finish",
    "reward",
    "rewards",
    "versions",
]


def write_right_answers(run_dir: Path) -> Path:
    """Write data.jsonl and data.json of a run of job=rl, whole or not at all: its right answers in the order of their
    training, equal ones once.

    Right: the main reward component is 1, the answer ended by itself, and a line may hold it (tasks/lines.py).
    ConfigError when there is none, or the archive is not whole.
    """
    if read_summary(run_dir).get("archive/unsealed"):
        raise ConfigError(f"{run_dir}: its archive is not whole yet (archive/unsealed); resume that run first")
    data = write_data(run_dir, right_answers(run_dir))
    if not data["lines"]:
        raise ConfigError(
            f"{run_dir}: none of its trained answers is right, so that it has no data to hand on; train it longer, or "
            "take another stage for data_from"
        )
    model = {"run": str(run_dir.resolve()), "folder": str((run_dir / "start").resolve())}
    write_about(run_dir, load_config(run_dir / "config.yaml"), SECTIONS, {"model": model, "data": data})
    return run_dir / DATA_FILE


def right_answers(run_dir: Path) -> Iterator[str]:
    """The lines of data.jsonl. What is held of those before is 16 bytes each."""
    config = load_config(run_dir / "config.yaml")
    text, seen = Text(run_dir / "start", config.prompt), set[bytes]()
    for row in trained_samples(run_dir):
        if dict(row["rewards"]).get(config.reward.main) != 1.0 or row["finish"] != "stop":
            continue
        problem = problem_of(row)
        answer = text.answer_text(problem, np.array(row["tokens"], np.int32))
        if fault_of(answer):
            continue
        told = json.dumps([problem.messages or problem.prompt, answer])
        key = hashlib.blake2b(told.encode(), digest_size=16).digest()
        if key not in seen:
            seen.add(key)
            yield line_of(problem, answer, told_of(row))


def trained_samples(run_dir: Path) -> Iterator[dict[str, Any]]:
    """The archived samples of trained groups, in the order of training: shards are numbered in that order, each holds
    whole batches in it, and one is held at a time. ConfigError when a shard is damaged or gone.
    """
    from offtrail.platform.broker.archive import ArchiveError, read_archive  # slow to import

    try:
        for shard in read_archive(run_dir, "*_batches_*.parquet", columns=COLUMNS):
            for part in shard.to_batches(ROWS):
                yield from (row for row in part.to_pylist() if row["state"] == "trained")
    except ArchiveError as error:
        raise ConfigError(str(error)) from error


def problem_of(row: dict[str, Any]) -> Problem:
    """The problem of an archived sample."""
    told = json.loads(row["problem"])
    messages = tuple(told.get("messages") or ())
    return Problem(told["task"], told["index"], told["prompt"], told["answer"], told["meta"], messages=messages)


def told_of(row: dict[str, Any]) -> dict[str, Any]:
    """What a line says of an archived sample, besides the text."""
    return {
        "group": row["group"],
        "reward": row["reward"],
        "rewards": rewards_of(dict(row["rewards"])),
        "finish": row["finish"],
        "tokens": len(row["tokens"]),
        "version": max(row["versions"], default=0),
    }
