r"""Training problems that share text with evaluation problems, by 10-grams of words, as in DeepSeek-R1's data.

Source: arXiv:2501.12948v2 on decontamination: texts with a 10-gram of an evaluation question are taken out. Words are
lower-cased runs of `\w`, a CJK character each a word; a sign of a formula is no word, and part of the one that it
stands before, so that 3+4*2 and 3-4*2 have 3 words each, and other ones. What is compared is a question, without the
template that it is put by. In three places plain 10-grams are too little or too much, and this departs:

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

from offtrail.core.problem import Problem
from offtrail.tasks.templates import without_template

N = 10
BOILERPLATE = 3
"""Evaluation problems that a 10-gram stands in from which on it says nothing."""
CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
WORD = re.compile(rf"[{CJK}]|[^\W{CJK}]+")
TERM = re.compile(rf"\d[^\W{CJK}]*|[^\W\d_{CJK}](?:_?[\d\u00b2\u00b3\u2070-\u209c]+)?|sin|cos|tan|log|ln|exp|sqrt|pi")
"""A word of a formula: a number, one letter with its index or power, a function; a LaTeX command is one, too."""
SIGN = re.compile(r"[-+*/^%=<>≤≥≠±]")
MINUS = re.compile(r".*[^\w-]-", re.DOTALL)
"""What stands before a negative number: a minus that touches it, and no word before."""
ALIKE = str.maketrans("−–×·⋅∙÷", "--****/")
"""Signs that mean the same."""


def words_of(text: str) -> list[str]:
    """The words that are compared, with the signs that belong to them."""
    text = text.lower().translate(ALIKE)
    if SIGN.search(text) is None:
        return WORD.findall(text)
    text = f" {text}"
    words, end, after_term = list[str](), 0, False
    for found in WORD.finditer(text):
        gap, sign = text[end : found.start()], ""
        term = TERM.fullmatch(found[0]) is not None or gap.endswith("\\")
        if term and after_term:
            sign = "".join(SIGN.findall(gap))
        elif term and MINUS.fullmatch(gap):
            sign = "-"
        words.append(sign + found[0])
        end, after_term = found.end(), term
    return words


def question_of(problem: Problem, templates: Sequence[str]) -> str:
    """What is compared of a problem: its question, without the first of the ``templates`` that has written it; of
    messages what they say, without the system's, which stands before every question.
    """
    if not problem.messages:
        return without_template(problem.prompt, templates)
    said = [one["content"] for one in problem.messages if one["role"] != "system"]
    return "\n".join(without_template(text, templates) for text in said)


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
class Held:
    """Evaluation problems that questions are compared with, and the ``templates`` that these may be put by."""

    index: Index
    templates: Sequence[str]

    def matches(self, problem: Problem) -> list[tuple[Item, str]]:
        """See Index.matches."""
        return self.index.matches(question_of(problem, self.templates))


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
