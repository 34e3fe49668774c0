"""Whether a ledger goes on under a configuration: only with the settings that its slots and replays depend on."""

from __future__ import annotations

import json
from dataclasses import asdict

from offtrail.platform.broker.ledger import Ledger
from offtrail.platform.config.schema import Config


def check_same_run(ledger: Ledger, config: Config, run: str) -> None:
    """Note the settings of a new ledger, and compare them with an old one's.

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
    ledger.records.put({"run": run, "settings": json.dumps(now), "last": str(config.steps), "last_why": ""})
