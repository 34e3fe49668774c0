"""Dynamic sampling: which finished groups carry a signal. No torch: the broker asks at admission."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

FilterRule = Literal["none", "accuracy", "variance"]
_Rewards = npt.NDArray[np.floating[Any]]


def filtered(rule: FilterRule, rewards: _Rewards, accuracy: _Rewards) -> bool:
    """Whether a group gives its place back (DAPO, arXiv:2503.14476, eq. 11: 0 < right answers < G).

    Args:
        rule: ``accuracy``: all answers right, or all wrong. ``variance``: all rewards equal, so that every
            group-relative advantage is 0. ``none``: never.
        rewards: [G] totals.
        accuracy: [G] in [0, 1].

    Raises:
        ValueError: unknown rule.
    """
    if rule == "none":
        return False
    if rule == "variance":
        return bool((rewards == rewards[0]).all())
    if rule == "accuracy":
        return bool((accuracy >= 1).all() or (accuracy <= 0).all())
    raise ValueError(f"algo.filter_groups={rule}: allowed are none, accuracy, variance")
