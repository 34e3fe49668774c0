"""Steps of an answer: where each ends, as exclusive token offsets. What a process reward is a score of.

    tokens ── Pieces.of ──► a piece of text a token ── Steps.ends ──► step_ends of one sample
                                                    └─ answer_from ──► where the answer begins, behind the thought

Text is never tokenised again: marks are looked for in the text, and a step ends with the token that completes its mark,
also where that token has begun the next step. A step has something to read beside marks and tags: of empty ones there
are none, so that a policy cannot make more steps out of nothing. What follows the last mark is a step too (``rest``),
up to the last token that has something to read; a stop token, which has no text of its own, belongs to no step.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from offtrail.core.types import Int32
from offtrail.rewards.format import TAGS
from offtrail.rewards.step_config import UNFINISHED, Aggregate, StepSettings

Decode = Callable[[Sequence[int]], str]
"""Token ids to text, special tokens among them; nothing cleaned up."""
AGGREGATES: dict[str, Callable[[npt.NDArray[np.float64]], np.float64]] = {
    "min": np.min, "mean": np.mean, "product": np.prod, "sum": np.sum,
}  # fmt: skip
_WINDOW = 8
_SENTENCE = re.compile(r"(?:[.!?…]+[\"'”’)\]]*(?=\s|\Z)|[。！？]+[”’」』）]*|\n)")
_NO_END = re.compile(r"(?:\b(?:e\.g|i\.e|cf|vs|Mr|Mrs|Ms|Dr|Prof|Fig|Eq)|\A\s*(?:\d+|[A-Za-z]))\Z")
"""Before a full stop that ends no sentence: an abbreviation, or the number of a list's item."""
_TAGS = re.compile("|".join(map(re.escape, TAGS)))


class Pieces:
    """What each token adds to an answer's text, by the tokenizer's own ``decode``. A token is ``silent`` at the end of
    an answer, where it has stopped it.
    """

    def __init__(self, decode: Decode, silent: Collection[int] = ()) -> None:
        self._decode, self._silent = decode, frozenset(silent)
        self._known: dict[int, str | None] = {}

    def of(self, tokens: Int32 | Sequence[int]) -> list[str]:
        """One piece a token [T]; joined they are the text. A character of several tokens is of the one that completes
        it, the others have none; one that is never completed is U+FFFD, of the last.
        """
        ids = [int(token) for token in tokens]
        stopped = bool(ids) and ids[-1] in self._silent
        if stopped:
            ids.pop()
        found = [self._piece(token) for token in ids]
        if found and found[0] is not None:
            found[0] = self._decode(ids[:1])  # a tokenizer may drop a blank at the very beginning
        at = 0
        while at < len(ids):
            if found[at] is not None:
                at += 1
                continue
            end = next((i for i in range(at, len(ids)) if found[i] is not None), len(ids))
            found[at:end] = self._bytes(ids, at, end)
            at = end
        return [piece or "" for piece in found] + [""] * stopped

    def _piece(self, token: int) -> str | None:
        """Of a token anywhere but at the beginning; None where it holds a part of a character."""
        if token not in self._known:
            alone = self._decode([token])
            whole = UNFINISHED not in alone
            self._known[token] = self._decode([token, token])[len(alone) :] if whole else None
        return self._known[token]

    def _bytes(self, ids: list[int], begin: int, end: int) -> list[str]:
        """Pieces of tokens that each hold a part of a character; a whole token, or none, stands at both ends."""
        start = max(0, begin - 1)
        pieces, given = [], len(self._decode(ids[start:begin])) if start < begin else 0
        for i in range(begin, end):
            text = self._decode(ids[start : i + 1])
            settled = text if i == end - 1 else text.rstrip(UNFINISHED)
            pieces.append(settled[given:])
            given = max(given, len(settled))
            if settled == text:
                start, given = i + 1, 0
            elif i - start >= _WINDOW:
                start = i - 3  # no character has more bytes than that has tokens
                given = len(self._decode(ids[start : i + 1]).rstrip(UNFINISHED))
        return pieces


class Steps(StepSettings):
    """The steps of an answer, by these settings."""

    def ends(self, pieces: Sequence[str], opened: str = "") -> Int32:
        """[S] int32, ascending: where steps end, exclusive offsets in the answer's tokens, whose ``pieces`` are given.
        ``opened``: what the prompt has begun of the answer, such as ``<think>``.
        """
        text = "".join(pieces)
        if self.by != "tokens":
            return token_ends(pieces, self.cut(text, opened))
        read = _last_read(text, self._stop(text, opened))
        last = int(token_ends(pieces, [read])[0]) if read else 0
        whole = np.arange(self.tokens, last + 1, self.tokens, dtype=np.int32)
        if self.rest == "none" or last % self.tokens == 0:
            return whole
        return np.append(whole, np.int32(last))

    def cut(self, text: str, opened: str = "") -> list[int]:
        """[S] ascending: where the steps of a text end, exclusive offsets in its characters. ValueError for
        by=tokens.
        """
        stop = self._stop(text, opened)
        found, begin = [], 0
        for end in self._marks(text, stop):
            if self._reads(text[begin:end]):
                found.append(end)
                begin = end
        if self.rest == "step" and self._reads(text[begin:stop]):
            found.append(_last_read(text, stop))
        return found

    def joined(self, steps: Sequence[str]) -> tuple[str, list[int]]:
        """The text of steps that are given one by one, each up to its mark, and where they end in it. ValueError for
        by=tokens.
        """
        if self.by == "tag":
            parts = [f"<{self.tag}>{step.strip()}</{self.tag}>" for step in steps]
        else:
            behind = self._mark or " "
            parts = [step.strip() + behind for step in steps[:-1]] + [step.strip() for step in steps[-1:]]
        self._marks("", 0)
        text = "".join(parts)
        ends = itertools.accumulate(map(len, parts))
        return text, [len(text[:end].rstrip()) if self.by == "sentence" else end for end in ends]

    def _marks(self, text: str, stop: int) -> list[int]:
        if self.by == "tokens":
            raise ValueError("steps.by=tokens: a text has no tokens; take newline, sentence, separator or tag")
        if self.by == "sentence":
            return _sentences(text, stop)
        return [match.end() for match in re.finditer(re.escape(self._mark), text[:stop])]

    @property
    def _mark(self) -> str:
        return {"newline": "\n", "separator": self.separator, "tag": f"</{self.tag}>"}.get(self.by, "")

    def _reads(self, part: str) -> bool:
        """Whether there is something to read in it, beside marks and tags."""
        if self._mark:
            part = part.replace(self._mark, "")
        if self.by == "tag":
            part = part.replace(f"<{self.tag}>", "")
        return bool(_TAGS.sub("", part).strip())

    def _stop(self, text: str, opened: str) -> int:
        """Characters of the part that is cut."""
        if self.within == "response":
            return len(text)
        closed = text.rfind("</think>")
        return closed if closed >= 0 else len(text) if _in_thought(text, opened) else 0


def token_ends(pieces: Sequence[str], ends: Sequence[int]) -> Int32:
    """[S'] int32, ascending, each once: the exclusive offset of the token that completes each character offset."""
    lengths = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
    return np.unique(np.searchsorted(lengths, np.asarray(ends, np.int64), side="left") + 1).astype(np.int32)


def answer_from(pieces: Sequence[str], opened: str = "") -> int:
    """The offset of the answer's first token, behind the one that completes the last ``</think>``: 0 where nothing was
    thought, T where the thought is not closed.
    """
    text = "".join(pieces)
    closed = text.rfind("</think>")
    if closed >= 0:
        return int(token_ends(pieces, [closed + len("</think>")])[0])
    return len(pieces) if _in_thought(text, opened) else 0


def aggregate(scores: Sequence[float] | Any, how: Aggregate) -> float:
    """One number of an answer's scores, in order; NaN where there are none."""
    values = np.asarray(scores, np.float64)
    if not values.size:
        return math.nan
    return float(values[-1] if how == "last" else AGGREGATES[how](values))


def _in_thought(text: str, opened: str) -> bool:
    return "</think>" not in opened and ("<think>" in opened or "<think>" in text)


def _last_read(text: str, stop: int) -> int:
    return len(text[:stop].rstrip())


def _sentences(text: str, stop: int) -> list[int]:
    found, begin = [], 0
    for match in _SENTENCE.finditer(text, 0, stop):
        if match[0].startswith(".") and _NO_END.search(text[begin : match.start()]):
            continue
        found.append(match.end())
        begin = match.end()
    return found
