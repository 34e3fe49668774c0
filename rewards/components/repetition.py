"""Repetition: 0 for none, towards 1 for a text that says one thing again and again. Give it a weight below 0."""

from __future__ import annotations

import re
from collections.abc import Sequence

from offtrail.rewards.base import Answered, RewardError

WORD = re.compile(r"[㐀-䶿一-鿿ぁ-ヿ]|[^\W㐀-䶿一-鿿ぁ-ヿ]+|[^\w\s]")
LONGEST = 200_000
"""Characters, the last of a text, that are looked at."""


class Repetition:
    """From 0 to 1, over words, punctuation marks and Han or Kana characters. ``how``

    ngram    the share of n-grams that stood before: 1 − different / all, n = ``n``
             (get_repetition_penalty_reward of open-r1, after the n-gram penalty of Yeo et al., arXiv:2502.03373, §4)
    suffix   the share of the text that its longest repeated suffix takes: the longest end that also stands earlier,
             overlapping or not. A loop at the end comes near 1, a phrase used twice elsewhere is 0

    Raises RewardError at settings that cannot be.
    """

    def __init__(self, *, how: str = "ngram", n: int = 20) -> None:
        if how not in ("ngram", "suffix"):
            raise RewardError(f"reward.settings.repetition.how={how}: must be ngram or suffix")
        if n < 1:
            raise RewardError(f"reward.settings.repetition.n={n}: must be ≥ 1")
        self._how, self._n = how, n

    def __call__(self, answered: Answered) -> float:
        """See Repetition."""
        words = WORD.findall(answered.text[-LONGEST:])
        return repeated_grams(words, self._n) if self._how == "ngram" else repeated_suffix(words)


def repeated_grams(words: Sequence[str], n: int) -> float:
    """Share in [0, 1) of the n-grams of ``words`` that stood before; 0 where there are fewer than n words."""
    grams = [hash(tuple(words[i : i + n])) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def repeated_suffix(words: Sequence[str]) -> float:
    """Length of the longest suffix of ``words`` that also ends earlier, over their number: in [0, 1). Linear time."""
    reverse = words[::-1]
    size, begin, end = len(reverse), 0, 0
    matches = [0] * size  # the Z function: how far reverse[i:] goes as reverse does
    for i in range(1, size):
        match = min(end - i, matches[i - begin]) if i < end else 0
        while i + match < size and reverse[match] == reverse[i + match]:
            match += 1
        matches[i] = match
        if i + match > end:
            begin, end = i, i + match
    return max(matches) / size if size else 0.0


score = Repetition
