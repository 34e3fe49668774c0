"""Instructions (IFEval, arXiv:2311.07911): how many of a prompt's checkable instructions an answer follows."""

from __future__ import annotations

from offtrail.rewards.base import Answered, RewardError
from offtrail.rewards.instructions import followed, followed_loosely


class Instructions:
    """From 0 to 1, for task=ifeval alone. ``how``: strict or loose (rewards/instructions.py). ``level``: `share` of the
    instructions that are followed, or `all` (1 where all are). What is looked at is the answer that reward.answer
    finds; 0 where there is none. Raises RewardError at settings that cannot be.
    """

    def __init__(self, *, how: str = "strict", level: str = "share") -> None:
        if how not in ("strict", "loose"):
            raise RewardError(f"reward.settings.instructions.how={how}: must be strict or loose")
        if level not in ("share", "all"):
            raise RewardError(f"reward.settings.instructions.level={level}: must be share or all")
        self._follows, self._all = (followed if how == "strict" else followed_loosely), level == "all"

    def __call__(self, answered: Answered) -> float | None:
        """See Instructions."""
        asked = answered.problem.meta.get("instructions")
        if not asked:
            return None
        if answered.answer is None:
            return 0.0
        kept = [self._follows(answered.answer, one["name"], one["arguments"]) for one in asked]
        return float(all(kept)) if self._all else sum(kept) / len(kept)


score = Instructions
