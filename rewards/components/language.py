r"""Language consistency (DeepSeek-R1, arXiv:2501.12948, §2.3.2): words of the target language / words.

Not counted: code between backquotes, formulas (`$…$`, `$$…$$`, `\(…\)`, `\[…\]`), LaTeX commands, tags, addresses,
digits and single letters. 1 where no word is left. By script a word is a run of two letters or more; in scripts without
spaces (Han, Kana, Thai) each character counts as one word, so that a Chinese text weighs more than its translation.

Two dollars in a line hold a formula as pandoc has it: no blank behind the first nor before the second, no digit behind
the second, `\$` is neither. Nor do they where an amount with words follows the first ("$5 and then 7$"), or where words
in a row stand between them outside `\text{…}`: what is prose is counted.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from offtrail.rewards.base import Answered, RewardError

EAST = "\u3000-\u30ff\u3400-\u9fff가-힣\uff00-\uffef"
"""Letters and marks that follow an amount without a blank."""
AMOUNT = rf"\d[\d.,]*(?:\s+[^\W\d_]{{2}}|\s*[{EAST}])"
"""What is no formula behind a dollar: "5 and", "5元", "5，"."""
FORMULA = (
    rf"(?<!\\)\$(?!\s|{AMOUNT})"
    r"(?:\\[A-Za-z]+ *\{[^{}$\n]*\}|\\[^\n]|(?!\b[^\W\d_]{2,} +[^\W\d_]{2,}\b)[^$\\\n])++"
    r"(?<!\s)\$(?!\d)"
)
LEFT_OUT = re.compile(
    rf"```.*?(?:```|\Z)|`[^`\n]*`|\$\$.*?\$\$|{FORMULA}"
    r"|\\\((?:[^\\]|\\(?![()]))*+\\\)|\\\[(?:[^\\]|\\(?![\[\]]))*+\\\]|\\[A-Za-z]+|</?[A-Za-z_]+>|https?://\S+",
    re.DOTALL,
)
SCRIPTS = {
    "latin": "A-Za-zÀ-ÖØ-öø-ɏ",
    "cyrillic": "Ѐ-ӿ",
    "greek": "Ͱ-Ͽἀ-῿",
    "arabic": "؀-ۿ",
    "hebrew": "א-ת",
    "devanagari": "ऀ-ॿ",
    "hangul": "가-힣",
    "han": "㐀-䶿一-鿿",
    "kana": "ぁ-ヿ",
    "thai": "ก-๛",
}
UNSPACED = ("han", "kana", "thai")
WORDS = {
    name: re.compile(f"[{letters}]" if name in UNSPACED else f"[{letters}]{{2,}}") for name, letters in SCRIPTS.items()
}
LATIN = ("cs", "da", "de", "en", "es", "fi", "fr", "hu", "id", "it", "nl", "no", "pl", "pt", "ro", "sv", "tr", "vi")
OTHERS = {
    "ar": ("arabic",),
    "bg": ("cyrillic",),
    "el": ("greek",),
    "fa": ("arabic",),
    "he": ("hebrew",),
    "hi": ("devanagari",),
    "ja": ("han", "kana"),
    "ko": ("hangul",),
    "ru": ("cyrillic",),
    "th": ("thai",),
    "uk": ("cyrillic",),
    "zh": ("han",),
}
SCRIPTS_OF = dict.fromkeys(LATIN, ("latin",)) | OTHERS
SENTENCE_END = re.compile(r"(?<=[.!?])\s+|[。！？\n]+")
SHORTEST_SENTENCE = 4
"""Words; detectors are wrong about shorter ones ("so x is 3" is French)."""


class Language:
    """From 0 to 1. ``target``: the ISO 639-1 code of the language that is wanted.

    ``detector=script`` tells scripts apart, sentences of two languages in one too; `lingua` (extra) two languages or
    more of one script, ``others`` beside the target, by sentences: those of less than 4 words take the neighbour's.
    Raises RewardError at a code or detector that is not known, or where lingua is missing.
    """

    def __init__(self, *, target: str = "en", detector: str = "script", others: Sequence[str] = ()) -> None:
        for code in (target, *others):
            if code not in SCRIPTS_OF:
                raise RewardError(f"reward.settings.language: {code} is not known; {', '.join(sorted(SCRIPTS_OF))}")
        if detector not in ("script", "lingua"):
            raise RewardError(f"reward.settings.language.detector={detector}: must be script or lingua")
        if (detector == "lingua") != bool(others):
            raise RewardError(
                f"reward.settings.language.others={list(others)}: goes with detector=lingua, which needs the languages"
                " to tell from the target, such as [de]"
            )
        self._target, self._detect = target, _lingua(target, others) if others else None

    def __call__(self, answered: Answered) -> float:
        """See Language."""
        return self.share(answered.text)

    def share(self, text: str) -> float:
        """The score of a text."""
        text = LEFT_OUT.sub(" ", text)
        return by_script(text, self._target) if self._detect is None else by_sentence(text, self._target, self._detect)


def by_script(text: str, target: str) -> float:
    """Share of the words of ``text`` that stand in a script of ``target``; 1 where there are none."""
    there = ("latin",) if text.isascii() else tuple(WORDS)
    words = {script: len(WORDS[script].findall(text)) for script in there}
    total = sum(words.values())
    return sum(words.get(script, 0) for script in SCRIPTS_OF[target]) / total if total else 1.0


def by_sentence(text: str, target: str, detect: Callable[[str], str]) -> float:
    """Share of the words of ``text`` in sentences of ``target``; 1 where there are none."""
    sentences = [(part, sum(len(p.findall(part)) for p in WORDS.values())) for part in SENTENCE_END.split(text)]
    sentences = [(part, words) for part, words in sentences if words]
    found = [detect(part) if words >= SHORTEST_SENTENCE else "" for part, words in sentences]
    for order in (range(len(found)), range(len(found) - 1, -1, -1)):
        for before, here in pairwise(order):
            found[here] = found[here] or found[before]
    total = sum(words for _, words in sentences)
    if not total:
        return 1.0
    known = [language or target for language in found]  # nothing but short ones
    return sum(words for (_, words), language in zip(sentences, known, strict=True) if language == target) / total


def _lingua(target: str, others: Sequence[str]) -> Callable[[str], str]:
    if importlib.util.find_spec("lingua") is None:
        raise RewardError("reward.settings.language.detector=lingua needs lingua: pip install offtrail[lingua]")
    from lingua import IsoCode639_1, LanguageDetectorBuilder

    codes = [getattr(IsoCode639_1, {"no": "nb"}.get(code, code).upper()) for code in dict.fromkeys((target, *others))]
    detector: Any = LanguageDetectorBuilder.from_iso_codes_639_1(*codes).build()

    def detect(sentence: str) -> str:
        language = detector.detect_language_of(sentence)
        return language.iso_code_639_1.name.lower().replace("nb", "no") if language else ""

    return detect


score = Language
