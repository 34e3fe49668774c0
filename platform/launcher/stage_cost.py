"""What the stages of a recipe have spent, by their summaries. Evaluation is left out: it makes nobody better."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from offtrail.platform.config.recipe import Stage
from offtrail.platform.engines.spec import Spec, read_spec
from offtrail.platform.model.cost import Cost
from offtrail.platform.tracking.summary import read_summary

Summaries = Mapping[str, Mapping[str, Any]]
"""Stage → its summary.json."""
COSTS = ("flops", "generated", "trained", "seconds")


def spent(summary: Mapping[str, Any]) -> dict[str, float]:
    """FLOPs, tokens generated and trained, and seconds of one stage; 0 of what its job does not count."""
    evaluation = sum(
        amount
        for name, amount in summary.items()
        if name.removeprefix("compute/").startswith("evaluator_")
        and name.endswith("flops")
        and isinstance(amount, (int, float))
    )
    return {
        "flops": number(summary, "compute/flops") - evaluation,
        "generated": number(summary, "tokens/generated"),
        "trained": number(summary, "tokens/trained"),
        "seconds": number(summary, "wall_seconds") or number(summary, "launch_seconds"),
    }


def sampled(folder: Path) -> dict[str, float]:
    """What job=sample has spent in a folder, by the answers that it holds: each prompt once, each token of an answer
    once, at the price of the ledger (model/cost.py). Empty where the summary tells it, or nothing was sampled.
    """
    files = sorted((folder / "answers").glob("*.parquet"))
    summary = read_summary(folder)
    if not files or "sample/answers" not in summary or "compute/flops" in summary:
        return {}
    from offtrail.platform.broker.archive import read_groups  # slow to import

    made = flops = 0.0
    try:
        cost = cost_of_spec(read_spec(folder / "start"))
    except ValueError:  # an architecture whose cost is not known here
        return {}
    for file in files:
        for group in read_groups(file, range(2**31)):
            P, lengths = len(group.prompt_tokens), group.lengths.astype(float)
            made += float(lengths.sum())
            attended = P * (P + 1) / 2 + float((lengths * P + lengths * (lengths + 1) / 2).sum())
            tokens = P + float(lengths.sum())
            flops += cost.total(tokens=tokens, heads=float(lengths.sum()), attended=attended)
    return {"compute/flops": flops, "tokens/generated": made}


def cost_of_spec(spec: Spec) -> Cost:
    """What a token costs a model of this architecture."""
    return Cost.of(
        parameters=sum(math.prod(shape) for shape in spec.tensors().values()),
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        tied=spec.tied,
        layers=spec.layers,
        heads=spec.heads,
        head_size=spec.head_size,
    )


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
