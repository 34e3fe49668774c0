"""What the stages of a recipe have spent, by their summaries. Evaluation is left out: it makes nobody better."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from offtrail.platform.config.recipe import Stage

Summaries = Mapping[str, Mapping[str, Any]]
"""Stage → its summary.json."""
COSTS = ("flops", "generated", "trained", "seconds")
EVALUATION = "compute/evaluator_flops"
"""All that an evaluator charges of FLOPs, in a run and in job=eval."""


def spent(summary: Mapping[str, Any]) -> dict[str, float]:
    """FLOPs, tokens generated and trained, and seconds of one stage; 0 of what its job does not count."""
    return {
        "flops": number(summary, "compute/flops") - number(summary, EVALUATION),
        "generated": number(summary, "tokens/generated"),
        "trained": number(summary, "tokens/trained"),
        "seconds": number(summary, "wall_seconds") or number(summary, "launch_seconds"),
    }


def number(summary: Mapping[str, Any], name: str) -> float:
    """A number of a summary; 0 where it has none."""
    value = summary.get(name)
    return float(value) if isinstance(value, (int, float)) else 0.0


def together(names: Sequence[str], summaries: Summaries) -> dict[str, float]:
    """The sum over stages."""
    costs = [spent(summaries[name]) for name in names]
    return {key: sum(cost[key] for cost in costs) for key in COSTS}


def made_for(name: str, stages: Sequence[Stage]) -> list[str]:
    """The stage itself, and those that made the data that it was trained on, in their order."""
    return _reached(name, stages, lambda stage: stage.data_from)


def lineage(name: str, stages: Sequence[Stage]) -> list[str]:
    """The stage itself, and all whose models and data it stands on, in their order."""
    return _reached(name, stages, lambda stage: (*stage.data_from, *filter(None, (stage.start_from,))))


def _reached(name: str, stages: Sequence[Stage], before: Callable[[Stage], Sequence[str]]) -> list[str]:
    by_name, found, open_ = {stage.name: stage for stage in stages}, set[str](), [name]
    while open_:
        one = open_.pop()
        if one in by_name and one not in found:
            found.add(one)
            open_ += before(by_name[one])
    return [stage.name for stage in stages if stage.name in found]
