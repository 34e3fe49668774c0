"""runs/NAME/decontamination.json: what training problems share with evaluation sets (task.decontaminate), each pair
with its rows, and what became of them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from offtrail.platform.config.schema import Config
from offtrail.tasks.registry import make_task, overlaps_of

FILE = "decontamination.json"


def write_overlaps(config: Config, run_dir: Path) -> None:
    """Write the report where one was asked for. A resumed run has its own: it reads the same files."""
    path = run_dir / FILE
    if path.exists() or not _asked(config):
        return
    if found := [overlap.report() for overlap in overlaps_of(make_task(config.task, config.run.seed))]:
        unfinished = path.with_name(f".{FILE}")
        unfinished.write_text(json.dumps({"sets": found}, indent=1, ensure_ascii=False), encoding="utf-8")
        os.replace(unfinished, path)


def _asked(config: Config) -> bool:
    """Whether the task, or a mixture's family, compares what it trains on."""
    families: dict[str, dict[str, object]] = getattr(config.task, "settings", {})
    policies = [vars(config.task).get("decontaminate"), *(one.get("decontaminate") for one in families.values())]
    imitates = config.job == "sft" and config.sft.path  # it trains on that alone
    return not imitates and any(policy not in (None, "off") for policy in policies)
