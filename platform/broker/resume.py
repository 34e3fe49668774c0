"""What a run goes on from: a ledger, only with the settings that its slots and replays depend on, and a start model."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from offtrail.platform.config.errors import refuse, show
from offtrail.platform.config.keys import deciding_settings, noted_settings
from offtrail.platform.config.schema import Config
from offtrail.platform.ledger.ledger import Ledger
from offtrail.platform.runtime.roles import JOBS
from offtrail.platform.tracking import compute

log = logging.getLogger("offtrail.broker")

_ABSENT = "(absent)"


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


def check_settings(ledger: Ledger, config: Config, run_dir: Path) -> None:
    """Write the settings that decide numbers into the ledger of a new run; compare them with those that an old one
    began with: its config.yaml may have been edited since. Raises ConfigError with each key and both values.
    """
    begun_with: dict[str, Any] | None = json.loads(ledger.records.get("begun_with") or "null")
    now: dict[str, Any] = json.loads(json.dumps(deciding_settings(config)))  # tuples as lists
    if begun_with is None:
        ledger.records.put({"begun_with": json.dumps(now)})
        return
    changed = [key for key in now | begun_with if now.get(key, _ABSENT) != begun_with.get(key, _ABSENT)]
    if changed:
        was = {key: show(begun_with.get(key, _ABSENT)) for key in changed}
        others = "; ".join(f"{key}={show(now.get(key, _ABSENT))}, was {was[key]}" for key in changed[1:])
        also = f" (also: {others})" if others else ""
        raise refuse(
            changed[0], now.get(changed[0], _ABSENT), f"{run_dir / 'config.yaml'} was edited, the run began with "
            f"{was[changed[0]]}{also}, and one curve would join two "
            "experiments; put back what was there, or start a new run from its config.yaml",
        )  # fmt: skip


def note_launch(ledger: Ledger, config: Config, run: str) -> None:
    """Note whose ledger it is, what has changed of what may, and the last step: what the configuration says (again,
    after a budget ended the run earlier). Raises ValueError where the run is past it.
    """
    if (done := ledger.logged()) > config.steps:
        raise ValueError(
            f"{config.steps_key}={config.steps}: the run {run} is at step {done} already; "
            "raise it, or choose another run.name"
        )
    note_changes(ledger, noted_settings(config))
    ledger.records.put({"run": run, "last": str(config.steps), "last_why": ""})


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
