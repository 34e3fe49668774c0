"""Length, so that answers grow or shrink where that helps. Counted in characters of the text: components see no tokens.

`overlong` is not here: DAPO's soft punishment of what nears the limit is `algo.overlong_share`, in tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from offtrail.rewards.base import Answered, RewardError, whole_group


@whole_group
class Length:
    """``how``

    linear   Kimi k1.5 (arXiv:2501.12599, §2.3.3): λ = .5 − (length − shortest) / (longest − shortest) over the answers
             of a prompt; λ where the answer is right, min(0, λ) where it is wrong, 0 where all are equally long
    cosine   Yeo et al. (arXiv:2502.03373, §4): from the first to the second of ``right`` (of ``wrong``) as the length
             goes from 0 to ``longest`` characters, along half a cosine; ``beyond`` for longer ones or cut-off ones

    An answer is right where its accuracy is 1. Raises RewardError at settings that cannot be.
    """

    def __init__(
        self,
        *,
        how: str = "linear",
        longest: int = 4000,
        right: Sequence[float] = (1.0, 0.5),
        wrong: Sequence[float] = (-1.0, -0.5),
        beyond: float = -1.0,
    ) -> None:
        if how not in ("linear", "cosine"):
            raise RewardError(f"reward.settings.length.how={how}: must be linear or cosine")
        if longest < 1:
            raise RewardError(f"reward.settings.length.longest={longest}: must be ≥ 1")
        for name, ends in (("right", right), ("wrong", wrong)):
            if len(ends) != 2:
                raise RewardError(f"reward.settings.length.{name}={list(ends)}: must be two numbers, for 0 and longest")
        self._how, self._longest, self._ends, self._beyond = how, longest, (wrong, right), beyond

    def __call__(self, answers: Sequence[Answered]) -> list[float]:
        """See Length."""
        lengths, right = [len(one.text) for one in answers], [one.accuracy == 1 for one in answers]
        if self._how == "linear":
            return linear(lengths, right)
        return [
            cosine(length, self._longest, *self._ends[good])
            if length < self._longest and one.finished
            else self._beyond
            for one, length, good in zip(answers, lengths, right, strict=True)
        ]


def linear(lengths: Sequence[int], right: Sequence[bool]) -> list[float]:
    """One number in [−.5, .5] for each answer of a prompt."""
    shortest, longest = min(lengths), max(lengths)
    if shortest == longest:
        return [0.0] * len(lengths)
    shares = [0.5 - (length - shortest) / (longest - shortest) for length in lengths]
    return [share if good else min(0.0, share) for share, good in zip(shares, right, strict=True)]


def cosine(length: int, longest: int, at_zero: float, at_longest: float) -> float:
    """``at_zero`` for length 0, ``at_longest`` for ``longest``, half a cosine between them."""
    return at_longest + (at_zero - at_longest) * (1 + math.cos(math.pi * length / longest)) / 2


score = Length
