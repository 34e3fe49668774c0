"""Format (DeepSeek-R1, arXiv:2501.12948, §2.2.2): one think block, one answer block, and then a stop token."""

from __future__ import annotations

from offtrail.rewards.base import Answered


def score(answered: Answered) -> float:
    """1 where the answer is well-formed (rewards/format.py) and was not cut off."""
    return float(answered.parts is not None and answered.finished)
