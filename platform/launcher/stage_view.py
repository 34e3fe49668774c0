"""Where a recipe is: stage k of n, what is done, what comes. Lines for any terminal; the live view shows the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from offtrail.platform.config.recipe import Stage
from offtrail.platform.tracking.progress import PLACE

NAMED = 3
"""Stages that are named of those that come; the others are counted."""


def plan(name: str, stages: Sequence[Stage], done: Mapping[str, float]) -> str:
    """All stages, a line each: at the start of a launch, so that one that goes on says what it passes over. ``done``:
    stage → seconds.
    """
    lines = [f"recipe {name}: {len(stages)} stages{f', {len(done)} done before' if done else ''}"]
    for stage in stages:
        seconds = f", {done[stage.name]:.0f} s" if stage.name in done else ""
        lines.append(f"  {'✓' if stage.name in done else '·'} {stage.number} {stage.name} ({_what(stage)}{seconds})")
    return "\n".join(lines)


def _what(stage: Stage) -> str:
    parts = [stage.job]
    if stage.start_from:
        parts.append(f"from {stage.start_from}")
    if stage.data_from:
        parts.append(f"data of {' and '.join(stage.data_from)}")
    return ", ".join(parts)


def here(stage: Stage, stages: Sequence[Stage], done: Mapping[str, float]) -> str:
    """The stage that begins now, and tell the live view."""
    place = f"stage {stage.number}/{len(stages)}"
    PLACE.set(place)
    after = [later.name for later in stages if later.number > stage.number]
    seconds = sum(done.values())
    told = [f"{place}: {stage.name} (job={stage.job})", f"{len(done)} done in {seconds:.0f} s" if done else ""]
    if after:
        more = f" and {len(after) - NAMED} more" if len(after) > NAMED else ""
        told.append(f"then {', '.join(after[:NAMED])}{more}")
    return " · ".join(filter(None, told))
