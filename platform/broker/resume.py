"""What a run goes on from: a ledger, only with the settings that its slots and replays depend on, and a start model."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from offtrail.platform.broker.ledger import Ledger
from offtrail.platform.config.keys import noted_settings
from offtrail.platform.config.schema import Config
from offtrail.platform.runtime.roles import JOBS
from offtrail.platform.tracking import compute

log = logging.getLogger("offtrail.broker")


def check_whole(ledger: Ledger, run_dir: Path) -> None:
    """Raise ValueError where a checkpoint is there and the ledger knows of none: it was removed or emptied, and to
    begin anew would replace the run's metrics and archive.
    """
    numbers = (path.name.removeprefix("step_") for path in (run_dir / "checkpoints").glob("step_*"))
    newest = max((int(number) for number in numbers if number.isdecimal()), default=0)
    if newest and not ledger.logged() and not ledger.checkpoint:
        raise ValueError(
            f"{ledger.file.path}: holds no step of this run, but checkpoints/step_{newest} is there; put a copy of the "
            f"ledger back, or begin a new run.name with model.path={run_dir / 'checkpoints' / f'step_{newest}'}"
        )


def check_same_run(ledger: Ledger, config: Config, run: str) -> None:
    """Note the settings of a new ledger, and compare them with an old one's; note what may change, where it has.

    The last step is what the configuration says (again, after a budget ended the run earlier).

    Raises ValueError, naming key, values and way out, where they differ or the run is past its last step.
    """
    settings = {
        "run.seed": config.run.seed,
        "batch.groups": config.batch.groups,
        "batch.group_size": config.batch.group_size,
        "staleness.mode": config.staleness.mode,
        "staleness.on_violation": config.staleness.on_violation,
        "task": asdict(config.task),
        **({f"sft.{name}": value for name, value in asdict(config.sft).items()} if config.job == "sft" else {}),
    }
    noted = noted_settings(config)
    settings = {key: value for key, value in settings.items() if key not in noted}
    now = {key: json.dumps(value, sort_keys=True) for key, value in settings.items()}
    before = ledger.records.get("settings")
    for key, value in (json.loads(before) if before else {}).items():
        if now.get(key, value) != value:
            raise ValueError(
                f"{key}={now[key]}: the run {run} began with {value}; resume it with that, or choose another run.name"
            )
    if (done := ledger.logged()) > config.steps:
        raise ValueError(
            f"{config.steps_key}={config.steps}: the run {run} is at step {done} already; "
            "raise it, or choose another run.name"
        )
    note_changes(ledger, noted)
    ledger.records.put({"run": run, "settings": json.dumps(now), "last": str(config.steps), "last_why": ""})


def note_changes(ledger: Ledger, noted: Mapping[str, Any]) -> None:
    """Keys that decide numbers and may change at a resume all the same: from which step on which value holds."""
    before = json.loads(ledger.records.get("noted") or "{}")
    changes = [
        {"step": ledger.checkpoint, "key": key, "from": before[key], "to": value}
        for key, value in noted.items()
        if before.get(key, value) != value
    ]
    for change in changes:
        log.warning("%(key)s is %(to)s from step %(step)d on, it was %(from)s", change)
    ledger.records.put({"noted": json.dumps(noted), "changes": json.dumps(changes_of(ledger) + changes)})


def changes_of(ledger: Ledger) -> list[dict[str, Any]]:
    """What resumes have changed of the settings that decide numbers: step, key, from, to."""
    return list(json.loads(ledger.records.get("changes") or "[]"))


def cold_start_of(config: Config, run_dir: Path) -> dict[str, float]:
    """What the making of runs/NAME/start cost; empty, and said, where that is not known. A model.path costs nothing.

    Raises ValueError where the file beside it is not what a cold start writes.
    """
    if config.model.path or "generator" not in JOBS[config.job] or not (run_dir / "start").exists():
        return {}
    spent = compute.load(run_dir / "start")
    if not spent:
        log.warning("%s is missing: the cold start is not counted in compute/*", run_dir / "start" / compute.FILE)
    return spent
