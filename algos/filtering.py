"""Dynamic sampling: which finished groups carry a signal. No torch: the broker asks at admission."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

FilterRule = Literal["none", "accuracy", "variance"]
_Rewards = npt.NDArray[np.floating[Any]]


def filtered(rule: FilterRule, rewards: _Rewards, main: _Rewards) -> bool:
    """Whether a group gives its place back (DAPO, arXiv:2503.14476, eq. 11: 0 < right answers < G).

    Args:
        rule: ``accuracy``: all answers right, or all wrong, by the reward's main component. ``variance``: all rewards
            equal, so that every group-relative advantage is 0. ``none``: never.
        rewards: [G] totals.
        main: [G] scores of the main component in [0, 1]; NaN where it does not apply: left out, and where it applies
            to no answer the group is judged by the variance of its rewards.

    Raises:
        ValueError: unknown rule.
    """
    if rule == "none":
        return False
    if rule not in ("accuracy", "variance"):
        raise ValueError(f"algo.filter_groups={rule}: allowed are none, accuracy, variance")
    scores = main[~np.isnan(main)]
    if rule == "variance" or not scores.size:
        return bool((rewards == rewards[0]).all())
    return bool((scores >= 1).all() or (scores <= 0).all())
