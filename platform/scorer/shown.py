"""What a model that scores is shown of the outputs to one prompt, and where its numbers stand in their group.

    problem, prompt, outputs ── show ──► Shown: arrays of a ScoreRequest ──► scores(numbers) ──► component, channel

Nothing is tokenised again: of an answer alone the tokens behind the thought go to the model, after the prompt as it is,
as in job=reward_model; steps end with tokens (rewards/steps.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from offtrail.core.protocols import Scores
from offtrail.core.types import Channel, Float32, Int32, Problem, ScoredBy
from offtrail.platform.model.scoring import Scoring
from offtrail.platform.model.text import Text
from offtrail.rewards.steps import Pieces, Steps, aggregate, answer_from

_NOTHING = np.zeros(0, np.int32)


@dataclass(frozen=True)
class Shown:
    """Of n outputs, each of ``sizes`` [n] tokens: the ``parts`` that a model reads, which begin at ``begins`` [n] in
    them, and the ``ends`` of the steps in each part; a part is empty where there is nothing to read.
    """

    scoring: Scoring
    prompt: Int32
    sizes: list[int]
    begins: list[int]
    parts: list[Int32]
    ends: list[Int32]

    @property
    def asked(self) -> list[int]:
        """The places of the outputs that the model is asked about."""
        return [i for i, part in enumerate(self.parts) if len(part)]

    @property
    def tokens(self) -> int:
        """That the model has to read."""
        return len(self.prompt) + sum(map(len, self.parts))

    def arrays(self) -> list[Int32]:
        """Those of a ScoreRequest."""
        parts = [self.parts[i] for i in self.asked]
        lengths = np.array([len(part) for part in parts], np.int32)
        arrays = [self.prompt, lengths, np.concatenate(parts)]
        if self.scoring.spec.reads == "steps":
            before = np.cumsum(lengths) - lengths
            ends = [self.ends[i] + begin for i, begin in zip(self.asked, before, strict=True)]
            arrays.append(np.concatenate(ends).astype(np.int32))
        return arrays

    def scores(self, version: int, numbers: Float32) -> Scores:
        """What the model's ``numbers`` are to the group of these outputs. ValueError where they are not as many as were
        asked for, or one is not finite.
        """
        spec, name = self.scoring.spec, self.scoring.name
        by = ScoredBy(name, version)
        counts = [self._count(i) for i in self.asked]
        if numbers.shape != (sum(counts),) or numbers.dtype != np.float32 or not np.isfinite(numbers).all():
            raise ValueError(f"{name} answered {numbers.shape} numbers, expected {sum(counts)}, all finite float32")
        each = [_NOTHING.astype(np.float32)] * len(self.parts)
        for i, end, count in zip(self.asked, np.cumsum(counts), counts, strict=True):
            each[i] = numbers[end - count : end]
        component = np.array([self._one(some) for some in each], np.float32)
        if spec.reads == "outcome":
            return Scores(by, {name: component})
        starts = np.cumsum(self.sizes) - self.sizes
        if spec.reads == "steps":
            ends = [end + start + begin for end, start, begin in zip(self.ends, starts, self.begins, strict=True)]
            channel = Channel("step", np.concatenate(each))
            return Scores(by, {name: component}, {name: channel}, np.concatenate(ends).astype(np.int32))
        values = np.zeros(sum(self.sizes), np.float32)
        for some, start, begin in zip(each, starts, self.begins, strict=True):
            values[start + begin : start + begin + len(some)] = some
        return Scores(by, {name: component}, {name: Channel("token", values)})

    def unread(self) -> Scores:
        """Where there is nothing to read in any output: `empty` of each, by no version. ValueError where the entry has
        no `empty`.
        """
        name = self.scoring.name
        if self.scoring.empty is None or math.isnan(self.scoring.empty):
            raise ValueError(
                f"every answer is empty, so that {name} has nothing to read; scorer.models.{name}.empty=SCORE says "
                "what that is worth"
            )
        return dataclasses.replace(self.scores(0, _NOTHING.astype(np.float32)), by=None)

    def _count(self, i: int) -> int:
        return {"outcome": 1, "steps": len(self.ends[i]), "tokens": len(self.parts[i])}[self.scoring.spec.reads]

    def _one(self, numbers: Float32) -> float:
        if len(numbers):
            return aggregate(numbers, self.scoring.aggregate)
        assert self.scoring.empty is not None  # or it would not have been shown
        return self.scoring.empty


class Show:
    """Cuts outputs to what the model ``scoring`` reads, by the tokenizer of ``text``."""

    def __init__(self, scoring: Scoring, text: Text) -> None:
        def decode(tokens: Sequence[int]) -> str:
            return str(text.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))

        self._scoring, self._text = scoring, text
        self._pieces = Pieces(decode, text.stop_token_ids)
        self._steps = Steps.of(scoring.spec.steps) if scoring.spec.reads == "steps" else None

    def __call__(self, problem: Problem, prompt: Int32, outputs: Sequence[Int32]) -> Shown:
        """ValueError where an output has nothing to read and scorer.models.NAME.empty says no score of it."""
        opened, of_answer = self._text.opened(problem), self._scoring.spec.of == "answer"
        begins, parts, ends = list[int](), list[Int32](), list[Int32]()
        for place, output in enumerate(outputs):
            pieces = self._pieces.of(output)
            begin = answer_from(pieces, opened) if of_answer else 0
            rest = pieces[begin:]
            cut = _NOTHING if self._steps is None else self._steps.ends(rest, "" if of_answer else opened)
            empty = not "".join(rest).strip() or (self._steps is not None and not len(cut))
            if empty and self._scoring.empty is None:
                name = self._scoring.name
                raise ValueError(
                    f"answer {place} has nothing for {name} to read (scorer.models.{name} reads the "
                    f"{self._scoring.spec.of}); scorer.models.{name}.empty=SCORE says what that is worth"
                )
            begins.append(begin)
            parts.append(_NOTHING if empty else output[begin:])
            ends.append(_NOTHING if empty else cut)
        return Shown(self._scoring, prompt, [len(output) for output in outputs], begins, parts, ends)
