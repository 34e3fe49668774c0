"""The compute of a cold start, kept beside the model that it made: whoever starts from that model counts it too.

job=sft ──► its summary ──► save, into the cached model's folder ──► load ──► compute/cold_start_* of a run
                                                     counted_once ──► of a recipe, whose stages may share one
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from offtrail.platform.tracking.summary import write_atomic

FILE = "compute.json"
KEPT = ("flops", "busy_seconds")
"""Of a summary's compute/… totals."""


def save(model: Path, summary: Mapping[str, Any]) -> None:
    """Write what a training run spent, by its summary, beside the model that it made; nothing where it does not say."""
    if any(f"compute/{name}" not in summary for name in KEPT):
        return
    spent: dict[str, Any] = {name: summary[f"compute/{name}"] for name in KEPT}
    spent |= {"tokens": summary["tokens/trained"], "devices": summary.get("devices", [])}
    write_atomic(model / FILE, json.dumps(spent, indent=2) + "\n")


def load(model: Path) -> dict[str, float]:
    """What the model's making cost: flops, busy_seconds, tokens; empty where nobody has written it down.

    Raises ValueError, naming the file, when it does not hold that.
    """
    path = model / FILE
    try:
        spent = json.loads(path.read_text(encoding="utf-8"))
        return {name: float(spent[name]) for name in (*KEPT, "tokens")}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: is not what a cold start writes ({error!r}); remove it") from error


def load_devices(model: Path) -> list[dict[str, Any]]:
    """The devices that the model's making has held, as held.rows says them; empty where nobody has written it down."""
    try:
        return list(json.loads((model / FILE).read_text(encoding="utf-8")).get("devices", []))
    except FileNotFoundError:
        return []


def counted_once(summaries: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The summaries of a recipe's stages, in order; a cold start stands in the first alone of those that begin from the
    same. The same: it took as many operations, and as many seconds to the last digit.
    """
    found, seen = list[Mapping[str, Any]](), set[tuple[Any, ...]]()
    for summary in summaries:
        made = tuple(summary.get(f"compute/cold_start_{name}") for name in KEPT)
        if made in seen:
            totals = {f"compute/{name}": spent for name, spent in zip(KEPT, made, strict=True)}
            cold = ("compute/cold_start_", "cold_start_devices")
            summary = {
                key: value - totals[key] if key in totals else value
                for key, value in summary.items()
                if not key.startswith(cold)
            }
        elif None not in made:
            seen.add(made)
        found.append(summary)
    return found
