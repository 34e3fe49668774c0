"""Format (DeepSeek-R1, arXiv:2501.12948, §2.2.2): one think block, one answer block, and then a stop token.

What the prompt has opened counts as the answer's (docs/text.md).
"""

from __future__ import annotations

import re

from offtrail.rewards.base import Answered, RewardError
from offtrail.rewards.format import TAGS

PART = 0.2
"""Of a graded score: what each tag is worth, and the shape as a whole."""


class Format:
    """From 0 to 1. ``how``

    strict   1 where the answer is well-formed (rewards/format.py) and was not cut off, else 0
    graded   a fifth for each of the four tags that occurs exactly once (tag_count_reward of open-r1), and a fifth for
             what strict asks
    regex    1 where ``pattern`` matches the whole text (`.` takes line ends, too) and it was not cut off, else 0

    Raises RewardError at another ``how``, and at a ``pattern`` that is none.
    """

    def __init__(self, *, how: str = "strict", pattern: str = "") -> None:
        if how not in ("strict", "graded", "regex"):
            raise RewardError(f"reward.settings.format.how={how}: must be one of strict, graded, regex")
        if (how == "regex") != bool(pattern):
            raise RewardError(f"reward.settings.format.pattern={pattern}: goes with how=regex, and how=regex with it")
        try:
            self._pattern = re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise RewardError(f"reward.settings.format.pattern={pattern}: is no regular expression: {error}") from None
        self._how = how

    def __call__(self, answered: Answered) -> float:
        """See Format."""
        if self._how == "regex":
            return float(answered.finished and self._pattern.fullmatch(answered.text) is not None)
        whole = float(answered.parts is not None and answered.finished)
        if self._how == "strict":
            return whole
        return PART * (sum(answered.text.count(tag) == 1 for tag in TAGS) + whole)


score = Format
