"""From the scores of a group to its rewards. Pure numpy and no component is loaded: every role may ask.

"Does not apply" is None where components answer and NaN in arrays. Rule: what does not apply is left out of the sum,
its weight with it; nothing else is scaled up for it. A reward in which nothing counts is 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from offtrail.core.types import Float32
from offtrail.rewards.config import RewardConfig


class Scored(dict[str, Float32]):
    """Components of a group by name, and the ``counts`` of its answers, where there are any: of behaviour.py, and of
    components' reasons as NAME/REASON.
    """

    counts: Mapping[str, float] = {}


def total(config: RewardConfig, components: Mapping[str, Float32], *, task: str, step: int) -> Float32:
    """The weighted sum [G] of name → [G] scores, for a problem of ``task`` in the batch of learner step ``step``. A
    model's score that is not there is left out: an evaluation, and a driver's verdict, are of rules alone.
    """
    size = len(next(iter(components.values())))
    rewards = np.zeros(size, np.float64)
    for name, weight in config.weights.items():
        by_rules_alone = name in config.scored and name not in components
        if not by_rules_alone and config.applies(name, task) and config.counts(name, step):
            scores = components[name].astype(np.float64)
            rewards += weight * np.where(np.isnan(scores), 0.0, scores)
    return rewards.astype(np.float32)


def columns(scores: Mapping[str, Sequence[float | None]]) -> dict[str, Float32]:
    """Name → [G] float32, NaN for None."""
    return {
        name: np.array([np.nan if value is None else value for value in column], np.float32)
        for name, column in scores.items()
    }


def nothing_earned(config: RewardConfig, task: str, size: int) -> dict[str, Float32]:
    """Name → [size] zeros, of answers that could not be scored or were never given; NaN where it does not apply."""
    return {
        name: np.full(size, 0.0 if config.applies(name, task) else np.nan, np.float32) for name in config.components
    }


def means(config: RewardConfig, area: str, components: Mapping[str, Float32]) -> dict[str, float]:
    """`area/NAME` → mean over the scores that apply, where any does; `area/accuracy` is the main component's."""
    found = {}
    for name, column in components.items():
        scores = column[~np.isnan(column)]
        if scores.size:
            found[f"{area}/{name}"] = float(np.mean(scores))
    main = found.get(f"{area}/{config.main}")
    return found if main is None else found | {f"{area}/accuracy": main}


def reason_shares(area: str, counts: Mapping[str, float]) -> dict[str, float]:
    """`area/NAME_REASON_share` of the answers for which the component NAME had a reason, from counts NAME/REASON."""
    judged = dict[str, float]()
    for reason, n in counts.items():
        name = reason.rpartition("/")[0]
        judged[name] = judged.get(name, 0.0) + n
    return {
        f"{area}/{name}_{why}_share": n / judged[name]
        for (name, _, why), n in ((reason.rpartition("/"), n) for reason, n in counts.items())
        if name and judged[name]
    }
