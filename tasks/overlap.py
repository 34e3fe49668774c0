r"""Training problems that share text with evaluation problems, by 10-grams of words, as in DeepSeek-R1's data.

Source: arXiv:2501.12948v2 on decontamination: texts with a 10-gram of an evaluation question are taken out. Words are
lower-cased runs of `\w`, a CJK character each a word. In three places plain 10-grams
are too little or too much, and this departs:

    an evaluation problem of fewer than 10 words      matches as a whole, inside a longer problem too
    a 10-gram of 3 evaluation problems or more        is boilerplate ("where m and n are relatively prime positive …")
    a problem that has nothing but boilerplate        matches as a whole, like a short one

Paraphrases and translations share no 10-gram and are not found. An evaluation problem that stands in a set several
times counts once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

N = 10
BOILERPLATE = 3
"""Evaluation problems that a 10-gram stands in from which on it says nothing."""
CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
WORD = re.compile(rf"[{CJK}]|[^\W{CJK}]+")


def words_of(text: str) -> list[str]:
    """The words that are compared."""
    return WORD.findall(text.lower())


@dataclass(frozen=True, slots=True)
class Item:
    """A problem with its place: ``source`` is the set as key=path, ``place`` the row in it."""

    source: str
    place: str
    text: str


@dataclass(frozen=True, slots=True)
class Pair:
    """A training problem, an evaluation problem, and the first words that they share."""

    training: Item
    evaluation: Item
    shared: str


class Index:
    """The 10-grams of evaluation problems, and the whole text of those that have none of their own."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = list({tuple(words_of(item.text)): item for item in reversed(items)}.items())
        self.items.reverse()  # of equal problems the first
        places = dict[int, set[int]]()
        for i, (words, _) in enumerate(self.items):
            for gram in _grams(words, N):
                places.setdefault(gram, set()).add(i)
        self._grams = {gram: sorted(found) for gram, found in places.items() if len(found) < BOILERPLATE}
        self._whole = dict[int, dict[int, int]]()
        """Number of words → hash of a whole problem → the problem."""
        for i, (words, _) in enumerate(self.items):
            if words and not any(gram in self._grams for gram in _grams(words, N)):
                self._whole.setdefault(len(words), {})[hash(words)] = i

    def matches(self, text: str) -> list[tuple[Item, str]]:
        """Evaluation problems that ``text`` shares words with, each once, and the first words that it shares."""
        words, found = tuple(words_of(text)), dict[int, str]()
        for start, gram in enumerate(_grams(words, N)):
            for i in self._grams.get(gram, ()):
                found.setdefault(i, " ".join(words[start : start + N]))
        for length, whole in self._whole.items():
            for start, gram in enumerate(_grams(words, length)):
                if (same := whole.get(gram)) is not None:
                    found.setdefault(same, " ".join(words[start : start + length]))
        return [(self.items[i][1], shared) for i, shared in found.items()]


def _grams(words: Sequence[str], n: int) -> list[int]:
    """The hash of each n words in a row. Trap: another in each process, so that none may be kept."""
    return [hash(tuple(words[i : i + n])) for i in range(len(words) - n + 1)]


@dataclass(frozen=True)
class Overlap:
    """What a training set shares with evaluation sets. ``against``: set → its problems; ``policy``: what was asked."""

    source: str
    problems: int
    against: dict[str, int]
    policy: str
    pairs: list[Pair] = field(repr=False)

    @property
    def places(self) -> list[str]:
        """The training problems that share words, each once."""
        return list(dict.fromkeys(pair.training.place for pair in self.pairs))

    def remark(self) -> str:
        """In one line, for a person."""
        against, n = " and ".join(self.against), len(self.places)
        if not self.pairs:
            return f"{self.source}: none of its {self.problems:,} problems shares {N} words in a row with {against}"
        first = self.pairs[0]
        kept = "are left out of training" if self.policy == "drop" else "are trained on all the same"
        return (
            f"{self.source}: {n:,} of its {self.problems:,} problems share {N} words in a row, or a shorter problem, "
            f"with {against}, the first {first.training.place} with {first.evaluation.source}, "
            f"{first.evaluation.place} ({first.shared!r}); they {kept} (task.decontaminate={self.policy}); the run "
            "directory lists all"
        )

    def report(self) -> dict[str, Any]:
        """As JSON: counts, and each pair with its rows."""
        hits = {
            source: {p.training.place for p in self.pairs if p.evaluation.source == source} for source in self.against
        }
        return {
            "policy": self.policy,
            "words": N,
            "boilerplate_in": BOILERPLATE,
            "training": {"set": self.source, "problems": self.problems, "overlapping": len(self.places)},
            "against": [
                {"set": source, "problems": n, "overlapping": len(hits[source])} for source, n in self.against.items()
            ],
            "pairs": [
                {
                    "training": pair.training.place,
                    "set": pair.evaluation.source,
                    "evaluation": pair.evaluation.place,
                    "shared": pair.shared,
                }
                for pair in self.pairs
            ],
        }


def compare(training: Sequence[Item], evaluation: Sequence[Item], policy: str) -> Overlap:
    """What problems of one training set share with those of evaluation sets."""
    index, against = Index(evaluation), dict[str, int]()
    for item in evaluation:
        against[item.source] = against.get(item.source, 0) + 1
    pairs = [Pair(item, other, shared) for item in training for other, shared in index.matches(item.text)]
    return Overlap(training[0].source if training else "", len(training), against, policy, pairs)
