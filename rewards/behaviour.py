"""How answers are written, counted by program: words of reflection, length, repetition, language mix, format.

    text ─► of_answer ─► counts (of one answer) ─► added up over answers ─► RATIOS ─► behaviour/…

The words of reflection are those whose number over training DeepSeek-R1's paper draws (arXiv:2501.12948; Nature 645,
2025, extended figures): whole words, in any case, so that "checks" and "waiting" do not count. They count a style:
"but" and "check" stand in texts that reflect on nothing. It costs about what a cheap reward does, and is counted where
verifiers run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from offtrail.rewards.components.language import LATIN, LEFT_OUT, by_script
from offtrail.rewards.components.repetition import LONGEST, repeated_suffix
from offtrail.rewards.components.repetition import WORD as PIECE
from offtrail.rewards.format import TAGS, parse

REFLECTION = ("wait", "mistake", "however", "but", "retry", "error", "verify", "wrong", "evaluate", "check")
WORD = re.compile(r"[㐀-䶿一-鿿ぁ-ヿ]|[^\W\d_㐀-䶿一-鿿ぁ-ヿ]+(?:['’][^\W\d_]+)*")
"""A run of letters, or one Han or Kana character; numbers, formulas' signs and tags are no words."""
TAG = re.compile("|".join(map(re.escape, TAGS)))

RATIOS: dict[str, tuple[str, str, float]] = {
    "reflection_per_1000_words": ("reflection", "words", 1000.0),
    "reflection_per_answer": ("reflection", "answers", 1.0),
    "reflection_share": ("reflecting", "answers", 1.0),
    **{f"{word}_per_1000_words": (word, "words", 1000.0) for word in REFLECTION},
    "words_mean": ("words", "answers", 1.0),
    "repeated_suffix_share": ("repeated", "answers", 1.0),
    "other_language_share": ("foreign", "answers", 1.0),
    "format_share": ("well_formed", "answers", 1.0),
}
"""Metric → (count above, count below, factor)."""

Counts = dict[str, float]


def of_answer(text: str, *, finished: bool, target: str = "en") -> Counts:
    """The counts of one answer: 1 ``answers``, ``words``, ``reflection`` words and each of them by itself,
    ``reflecting`` (1 where there is one), the share of its longest ``repeated`` suffix, the share of ``foreign`` words
    (of another script than the language ``target``), ``well_formed``. Of a long one the last LONGEST characters.
    """
    kept = text[-LONGEST:]
    words = [word.lower() for word in WORD.findall(TAG.sub(" ", kept))]
    found = {word: float(words.count(word)) for word in REFLECTION}
    reflection = sum(found.values())
    latin = target in LATIN and kept.isascii()
    return {
        "answers": 1.0,
        "words": float(len(words)),
        "reflection": reflection,
        "reflecting": float(reflection > 0),
        **found,
        "repeated": repeated_suffix(PIECE.findall(kept)),
        "foreign": 0.0 if latin else 1.0 - by_script(LEFT_OUT.sub(" ", kept), target),
        "well_formed": float(finished and parse(text) is not None),
    }


def counted(texts: Sequence[str], finished: Sequence[bool], target: str) -> Counts:
    """The counts of several answers together, without those that are 0: they travel with each group."""
    each = (of_answer(text, finished=ended, target=target) for text, ended in zip(texts, finished, strict=True))
    return {name: count for name, count in added(each).items() if count}


def added(counts: Iterable[Mapping[str, float]]) -> Counts:
    """The sum, name by name."""
    total: Counts = {}
    for one in counts:
        for name, value in one.items():
            total[name] = total.get(name, 0.0) + value
    return total


def metrics(counts: Mapping[str, float], area: str) -> dict[str, float]:
    """`area/METRIC` → its value, as far as there is anything to divide by."""
    return {
        f"{area}/{name}": factor * counts.get(above, 0.0) / counts[below]
        for name, (above, below, factor) in RATIOS.items()
        if counts.get(below)
    }
