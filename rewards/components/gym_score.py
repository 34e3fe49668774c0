"""The score of a reasoning-gym verifier with its partial credit (arXiv:2505.24760), for task=gym alone. Accuracy takes
the full score only: partial credit is given for texts that hold little more than noise. With weight 0 it is logged.
"""

from __future__ import annotations

from offtrail.rewards.base import Answered
from offtrail.rewards.gym import raw_score


def score(answered: Answered) -> float | None:
    """From 0 to 1; 0 where no answer is found; None for problems of other tasks."""
    if answered.problem.task != "gym":
        return None
    return 0.0 if answered.answer is None else raw_score(answered.problem, answered.answer)
