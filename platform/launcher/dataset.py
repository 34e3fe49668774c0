"""The data that a run hands on: data.jsonl, one example a line as job=sft reads it, and data.json, where it is from.

    sample.py, reject.py, right_answers.py ─► line_of ─► write_data ─► data.jsonl, data.json

Invariant: data.jsonl stands whole or not at all.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from offtrail.core.types import Problem
from offtrail.platform.config.recipe import DATA_FILE
from offtrail.platform.config.schema import Config
from offtrail.platform.tracking.summary import finite, git_commit, package_versions, write_atomic

ABOUT_FILE = "data.json"


def line_of(problem: Problem, answer: str, told: Mapping[str, Any]) -> str:
    """One line: what is asked, the answer to imitate, the gold one, and what else there is to say of it."""
    asked = {"prompt": [dict(turn) for turn in problem.messages] or problem.prompt}
    known = {"gold": problem.answer, "task": problem.task, "index": problem.index}
    return as_line({**asked, "answer": answer, **known, **told})


def as_line(fields: Mapping[str, Any]) -> str:
    """A JSON object and the end of its line; what JSON does not know is text, a number that is none null."""
    return json.dumps(finite(fields), ensure_ascii=False, default=str) + "\n"


def rewards_of(components: Mapping[str, Any]) -> dict[str, float | None]:
    """Rewards by component, for a line; null where a component does not apply."""
    rounded = {name: round(float(value), 6) for name, value in components.items()}
    return {name: value if value == value else None for name, value in rounded.items()}


def write_data(run_dir: Path, lines: Iterable[str]) -> dict[str, Any]:
    """Write data.jsonl; what data.json says of it: lines, bytes, hash. An empty one is not written."""
    for left in run_dir.glob(f".{DATA_FILE}.*"):  # by a launch that was killed
        left.unlink()
    partial = run_dir / f".{DATA_FILE}.{os.getpid()}"
    state, number = xxhash.xxh3_128(), 0
    try:
        with partial.open("wb") as file:
            for line in lines:
                data = line.encode("utf-8")
                state.update(data)
                file.write(data)
                number += 1
        size = partial.stat().st_size
        if number:
            partial.replace(run_dir / DATA_FILE)
    finally:
        partial.unlink(missing_ok=True)
    return {"file": DATA_FILE, "lines": number, "bytes": size, "xxh3_128": state.hexdigest()}


def write_about(run_dir: Path, config: Config, sections: Iterable[str], told: Mapping[str, Any]) -> None:
    """data.json: settings that decide the data (``sections`` of the configuration), and what the job says of them."""
    settings = dataclasses.asdict(config)
    about = {
        "job": config.job,
        **told,
        "seed": config.run.seed,
        "settings": {name: settings[name] for name in sections},
        "versions": package_versions(),
        "git_commit": git_commit(),
    }
    write_atomic(run_dir / ABOUT_FILE, json.dumps(finite(about), indent=2, ensure_ascii=False, default=str) + "\n")
