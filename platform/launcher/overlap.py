"""runs/NAME/decontamination.json: what is trained on shares with evaluation sets (task.decontaminate), each pair with
its rows, and what became of it: problems of a file, and examples of sft.path.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from offtrail.platform.config.schema import Config
from offtrail.tasks.examples import read_examples
from offtrail.tasks.overlap import Overlap
from offtrail.tasks.registry import make_task, overlaps_of, overlaps_of_examples, policies_of

FILE = "decontamination.json"


def write_overlaps(config: Config, run_dir: Path) -> None:
    """Write the report where one was asked for. A resumed run has its own: it reads the same files."""
    path = run_dir / FILE
    if path.exists() or config.head is not None or not policies_of(config.task):
        return
    if found := [overlap.report() for overlap in _overlaps(config)]:
        unfinished = path.with_name(f".{FILE}")
        unfinished.write_text(json.dumps({"sets": found}, indent=1, ensure_ascii=False), encoding="utf-8")
        os.replace(unfinished, path)


def _overlaps(config: Config) -> Iterator[Overlap]:
    """Of what a run trains on, its cold start too."""
    task, sft = make_task(config.task, config.run.seed), config.sft
    imitates = bool(sft.path) and (config.job == "sft" or (config.job == "rl" and not config.model.path))
    if config.job != "sft" or not sft.path:  # which trains on the examples alone
        yield from overlaps_of(task)
    if imitates:
        yield from overlaps_of_examples(task, read_examples(Path(sft.path), sft.prompt_field, sft.answer_field))
