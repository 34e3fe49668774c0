"""A saved score model that can be asked: tokens in, numbers out. A head over a decoder, or an implicit process reward.

    folder ── scores.json, or its layout ──► Reader.open ──► ask(questions): a number a sample, a step or a token

Who asks brings tokens, and where their steps end: nothing here knows text. Invariant: what is asked together, in
whatever order and packing, says what each would say alone, up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from offtrail.core.types import Float32, Int32
from offtrail.platform.config.errors import refuse
from offtrail.platform.model.check import checked
from offtrail.platform.model.packing import Packed, SampleTable, lay_out, microbatches, table_of
from offtrail.platform.model.policy import Policy, load_model
from offtrail.platform.model.scalar import Reads, ScalarModel, load_scalar
from offtrail.platform.model.scores import ScoreSpec, spec_of
from offtrail.platform.model.text import Text


@dataclass(frozen=True)
class Question:
    """``outputs``, tokens after the ``prompt``; ``ends``: of each output where its steps end, exclusive offsets in it,
    ascending (a model that reads no steps needs none).
    """

    prompt: Int32
    outputs: Sequence[Int32]
    ends: Sequence[npt.NDArray[np.integer]] = field(default_factory=tuple)


@dataclass
class Reader:
    """``module`` says the numbers: of a head, or log-probabilities, beside those of ``reference``. ``inserted``: the
    token behind each step; ``closing``: what is put behind an output, up to the token that ends it where it has none,
    and after that.
    """

    spec: ScoreSpec
    module: ScalarModel | Policy
    reference: Policy | None = None
    inserted: int | None = None
    closing: tuple[list[int], list[int]] = field(default_factory=lambda: ([], []))
    tokens: int = 0
    """That went through the model so far; ``flops``: of all forward passes."""
    flops: float = 0.0

    @classmethod
    def open(
        cls, folder: Path, spec: ScoreSpec | None = None, *, key: str = "path", longest: int,
        device: torch.device | str = "cpu", dtype: str = "float32",
    ) -> Reader:  # fmt: skip
        """Load the model of a Hugging Face directory; ``spec``: in place of what it says of itself. ``longest``: tokens
        of the longest question, prompt and output.

        Raises ConfigError, ValueError and ModelError, each naming ``key``, where it cannot be read so.
        """
        spec = spec or spec_of(folder, key, str(folder))
        what = f"{key}={folder}"
        if spec.beta:
            policy = _policy(folder, what, longest, device, dtype)
            other = f"{what}, its reference {spec.reference}"
            return cls(spec, policy, _policy(Path(spec.reference), other, longest, device, dtype))
        reads: Reads = "end" if spec.reads == "outcome" else "after"
        model = load_scalar(folder, reads, device=device, key=key)
        module = checked(
            lambda: ScalarModel(model, reads, dtype=dtype), model, what=what, longest=longest, feed_last=True
        )
        module.requires_grad_(False)
        text = Text(folder) if spec.insert or spec.closed else None
        inserted = None if text is None or not spec.insert else _token(text, spec.insert, key, folder)
        return cls(spec, module, None, inserted, text.turn_rest() if text is not None and spec.closed else ([], []))

    @torch.no_grad()
    def ask(self, questions: Sequence[Question], budget: int) -> list[list[Float32]]:
        """Of each question and output the numbers, before ``spec.squash``: [1] of a model that reads the outcome (NaN
        of an output without tokens), [S] of its steps, [T] of its tokens. ``budget``: tokens of a forward pass.
        """
        fed = [[self._fed(q, i) for i in range(len(q.outputs))] for q in questions]
        rows = table_of([q.prompt for q in questions], fed)
        said = self._said(rows, budget)
        flat = [said[a:b] for a, b in zip(rows.starts[:-1], rows.starts[1:], strict=True)]
        if self.spec.reads == "outcome":
            return _regrouped([self._outcome(part) for part in flat], questions)
        asked = [(q, i) for q in questions for i in range(len(q.outputs))]
        return _regrouped([self._read(part, q, i) for part, (q, i) in zip(flat, asked, strict=True)], questions)

    def _outcome(self, said: Float32) -> Float32:
        """[1] of a sample's numbers."""
        if not len(said):
            return np.full(1, np.nan, np.float32)
        return said.sum(dtype=np.float64, keepdims=True).astype(np.float32) if self.spec.beta else said[-1:]

    def _fed(self, question: Question, place: int) -> Int32:
        """An output as it goes through the model."""
        output = question.outputs[place]
        if self.inserted is not None:
            return np.insert(output, question.ends[place], self.inserted)
        end, rest = self.closing
        if not end or not len(output):
            return output
        return np.concatenate([output, [] if output[-1] == end[-1] else end, rest]).astype(np.int32)

    def _read(self, said: Float32, question: Question, place: int) -> Float32:
        """Of the numbers of all tokens that were fed, those that were asked for."""
        if self.spec.reads == "tokens":
            return said
        ends = np.asarray(question.ends[place], np.int64)
        if self.spec.beta:
            sums = np.concatenate([[0.0], np.cumsum(said, dtype=np.float64)])
            return np.diff(sums[ends], prepend=0.0).astype(np.float32)
        return said[ends + np.arange(len(ends))] if self.inserted is not None else said[ends - 1]

    def _said(self, rows: SampleTable, budget: int) -> Float32:
        """One number a token [T], NaN where the model says none: of an outcome at the last token of each sample."""
        device = next(self.module.parameters()).device
        fed_last = not self.spec.beta
        said = torch.full((len(rows.tokens),), torch.nan, device=device)
        packs = microbatches(rows, range(len(rows.prompts)), 1, budget, feed_last=fed_last)[0]
        for samples in packs:
            if samples:
                share = self.module.share_up_to
                packed = lay_out(rows, samples, share_up_to=share, feed_last=fed_last).to(device)
                at = packed.tokens[packed.ends] if self.spec.reads == "outcome" and fed_last else packed.tokens
                said[at] = self._numbers(packed)
        return said.cpu().numpy()

    def _numbers(self, packed: Packed) -> Tensor:
        numbers: Tensor = self.module(packed)[0]
        self.tokens += packed.input_ids.numel()
        self.flops += sum(one.forward_flops(packed) for one in (self.module, self.reference) if one is not None)
        if self.reference is not None:
            numbers = self.spec.beta * (numbers - self.reference(packed)[0])
        return numbers


def _policy(folder: Path, what: str, longest: int, device: torch.device | str, dtype: str) -> Policy:
    model = load_model(folder, given=str(folder), device=device)
    policy = checked(lambda: Policy(model, dtype=dtype), model, what=what, longest=longest)
    return policy.requires_grad_(False)


def _token(text: Text, token: str, key: str, folder: Path) -> int:
    known = text.tokenizer.get_vocab()
    if token not in known:
        raise refuse(key, str(folder), f"its tokenizer lacks {token!r}, which stands behind each step; give its own")
    return int(known[token])


def _regrouped(flat: list[Float32], questions: Sequence[Question]) -> list[list[Float32]]:
    found = iter(flat)
    return [[next(found) for _ in question.outputs] for question in questions]
