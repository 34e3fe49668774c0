"""The running samples, column by column: what a decode step reads and writes without a Python loop over samples.

Invariant: rows 0…``running`` − 1 are the running samples, and row i belongs to KV slot i. Who finishes leaves a hole
that the last running sample fills, in every column and in the KV cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from offtrail.core.protocols import Alternatives, Completion, Request
from offtrail.core.types import FinishReason, Float32, Int32
from offtrail.platform.engines.sampler import uniforms
from offtrail.platform.engines.stops import StopStrings

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]

UNIFORM_BLOCK = 64
"""Uniforms are made for so many positions at once; even."""


@dataclass(slots=True)
class Pending:
    """A queued request: samples ``entered``… are still to enter. ``uniforms`` [samples, UNIFORM_BLOCK] is for their
    first tokens.
    """

    request: Request
    submitted: float
    uniforms: Float64
    entered: int = 0


def queue(requests: Sequence[Request], now: float) -> list[Pending]:
    """Requests as they wait, with the first uniforms of all their samples made at once."""
    counts = [request.samples for request in requests]
    seed = np.repeat(np.array([request.sampling.seed % 2**64 for request in requests], np.uint64), counts)
    number = np.repeat(np.array([request.random_key for request in requests], np.uint64), counts)
    sample = np.concatenate([np.arange(count, dtype=np.uint64) for count in counts] or [np.zeros(0, np.uint64)])
    drawn = uniforms(seed, number, sample, np.zeros_like(seed), UNIFORM_BLOCK)
    ends = np.cumsum(counts).tolist()
    return [
        Pending(request, now, drawn[end - request.samples : end]) for request, end in zip(requests, ends, strict=True)
    ]


class Slots:
    """Columns of up to ``capacity`` running samples of up to ``max_length`` tokens each."""

    def __init__(self, capacity: int, max_length: int, vocab_size: int) -> None:
        self.running = 0
        self._vocab_size = vocab_size
        self._numbers = np.arange(capacity)
        self.pending: list[Pending | None] = [None] * capacity
        self.index = np.zeros(capacity, np.int64)
        self.prompt_length = np.zeros(capacity, np.int64)
        self.length = np.zeros(capacity, np.int64)
        """Prompt and output tokens so far."""
        self.limit = np.zeros(capacity, np.int64)
        self.temperature = np.ones(capacity, np.float32)
        """1 where greedy: greedy log-probabilities are unscaled."""
        self.greedy = np.zeros(capacity, np.bool_)
        self.top_p = np.ones(capacity, np.float64)
        self.top_k = np.zeros(capacity, np.int64)
        self.stop_set = np.zeros(capacity, np.int64)
        self.seed = np.zeros(capacity, np.uint64)
        self.request = np.zeros(capacity, np.uint64)
        self.first_token = np.zeros(capacity, np.float64)
        self.last = np.zeros(capacity, np.int32)
        """The newest token: what the next decode step feeds."""
        self.tokens = np.zeros((capacity, max_length), np.int32)
        self.logprobs = np.zeros((capacity, max_length), np.float32)
        self.versions = np.zeros((capacity, max_length), np.int32)
        self._uniforms = np.zeros((capacity, UNIFORM_BLOCK), np.float64)
        self.alternatives: list[list[tuple[Int32, Float32]]] = [[] for _ in range(capacity)]
        """Of those that ask for them: ids [k] and log-probabilities [k] of each position so far."""
        self.alternatives_count = np.zeros(capacity, np.int64)
        self.has_stop_strings = np.zeros(capacity, np.bool_)
        self.stopped_by = [""] * capacity
        self._columns = [v for name, v in vars(self).items() if isinstance(v, np.ndarray) and name != "_numbers"]
        self._stop_sets: dict[tuple[int, ...], int] = {}
        self._stop_table = np.zeros((0, vocab_size), np.bool_)
        self.scaled = self.any_greedy = self.filtered = False
        """Whether any running sample has T ≠ 1, T = 0, or top-p or top-k."""
        self.most_alternatives = 0
        self.any_stop_strings = False

    def enter(self, pending: Pending, count: int) -> slice:
        """Give ``count`` more samples of a request the next free rows."""
        request, sampling = pending.request, pending.request.sampling
        rows = slice(self.running, self.running + count)
        length = len(request.prompt_tokens)
        self.pending[rows] = [pending] * count
        self.index[rows] = np.arange(pending.entered, pending.entered + count)
        self.prompt_length[rows] = self.length[rows] = length
        self.limit[rows] = length + sampling.max_new_tokens
        self.temperature[rows] = sampling.temperature or 1.0
        self.greedy[rows] = sampling.temperature == 0
        self.top_p[rows], self.top_k[rows] = sampling.top_p, sampling.top_k
        self.stop_set[rows] = self._stop_row(sampling.stop_token_ids)
        self.seed[rows] = sampling.seed % 2**64
        self.alternatives[rows] = [[] for _ in range(count)]
        self.alternatives_count[rows] = sampling.alternatives
        self.has_stop_strings[rows], self.stopped_by[rows] = bool(sampling.stop), [""] * count
        self.request[rows] = request.random_key
        self.tokens[rows, :length] = request.prompt_tokens
        self.last[rows] = request.prompt_tokens[-1]
        self._uniforms[rows] = pending.uniforms[pending.entered : pending.entered + count]
        pending.entered += count
        self.running += count
        self._note_kinds()
        return rows

    def positions(self) -> Int64:
        """Position [n] of the token that the next decode step feeds."""
        return self.length[: self.running] - 1

    def uniforms(self) -> Float64:
        """One number [n, 1] a running sample, for the token that it makes next."""
        n = self.running
        place = self.length[:n] - self.prompt_length[:n]
        column = place % UNIFORM_BLOCK
        due = np.flatnonzero((column == 0) & (place > 0))
        if len(due):
            index, first = self.index[due].astype(np.uint64), place[due].astype(np.uint64)
            self._uniforms[due] = uniforms(self.seed[due], self.request[due], index, first, UNIFORM_BLOCK)
        drawn: Float64 = self._uniforms[self._numbers[:n], column]
        return drawn[:, None]

    def append(
        self, tokens: npt.NDArray[np.int32], logprobs: npt.NDArray[np.float32], version: int, now: float
    ) -> Bool:
        """Note one new token a running sample; whether each is finished [n], by a stop token or by its limit."""
        n = self.running
        rows, length = self._numbers[:n], self.length[:n]
        self.tokens[rows, length] = tokens
        self.logprobs[rows, length] = logprobs
        self.versions[rows, length] = version
        self.last[:n] = tokens
        fresh = length == self.prompt_length[:n]
        if fresh.any():
            self.first_token[:n][fresh] = now
        length += 1
        return self._stop_table[self.stop_set[:n], tokens] | (length >= self.limit[:n])

    def stop_at_strings(self, stops: StopStrings) -> Bool:
        """Whether the newest token of each running sample [n] completes one of its stop strings."""
        for row in np.flatnonzero(self.has_stop_strings[: self.running]).tolist():
            pending = self.pending[row]
            assert pending is not None
            answer = self.tokens[row, self.prompt_length[row] : self.length[row]]
            self.stopped_by[row] = stops.completed(answer, pending.request.sampling.stop)
        return np.array([bool(string) for string in self.stopped_by[: self.running]])

    def note_alternatives(self, rows: Int64, ids: Int32, logprobs: Float32) -> None:
        """Note the likeliest tokens [m, k] at the next position of ``rows`` [m], each row as many as it asked for."""
        for row, count, tokens, values in zip(
            rows.tolist(), self.alternatives_count[rows].tolist(), ids, logprobs, strict=True
        ):
            self.alternatives[row].append((tokens[:count], values[:count]))

    def completion(self, row: int, now: float, *, aborted: bool = False) -> Completion:
        """A copy of what a running sample has made."""
        pending = self.pending[row]
        assert pending is not None
        made = slice(int(self.prompt_length[row]), int(self.length[row]))
        tokens = self.tokens[row, made].copy()
        string = self.stopped_by[row]
        stopped = bool(string) or (len(tokens) > 0 and bool(self._stop_table[self.stop_set[row], tokens[-1]]))
        finish: FinishReason = "abort" if aborted else "stop" if stopped else "length"
        return Completion(
            request=pending.request.id,
            index=int(self.index[row]),
            tokens=tokens,
            logprobs=self.logprobs[row, made].copy(),
            versions=self.versions[row, made].copy(),
            finish=finish,
            times=(pending.submitted, float(self.first_token[row]) if len(tokens) else now, now),
            alternatives=stacked(self.alternatives[row], pending.request.sampling.alternatives),
            stopped_by=string,
        )

    def remove(self, finished: Bool) -> tuple[Int64, Int64]:
        """Take out finished rows; the rows (source, target) that moved to keep the running ones together."""
        left = self.running - int(finished.sum())
        target = np.flatnonzero(finished[:left])
        source = left + np.flatnonzero(~finished[left:])
        if len(source):
            for column in self._columns:
                column[target] = column[source]
        for to, row in zip(target.tolist(), source.tolist(), strict=True):
            self.pending[to] = self.pending[row]
            self.alternatives[to], self.stopped_by[to] = self.alternatives[row], self.stopped_by[row]
        self.pending[left : self.running] = [None] * (self.running - left)
        self.running = left
        self._note_kinds()
        return source, target

    def _stop_row(self, ids: tuple[int, ...]) -> int:
        """The row of the stop table for a set of stop tokens; a row is made at first use."""
        row = self._stop_sets.setdefault(ids, len(self._stop_sets))
        if row == len(self._stop_table):
            stops = np.zeros((1, self._vocab_size), np.bool_)
            stops[0, list(ids)] = True
            self._stop_table = np.concatenate((self._stop_table, stops))
        return row

    def _note_kinds(self) -> None:
        n = self.running
        self.scaled = bool((self.temperature[:n] != 1).any())
        self.any_greedy = bool(self.greedy[:n].any())
        self.filtered = bool((self.top_p[:n] < 1).any() or (self.top_k[:n] > 0).any())
        self.most_alternatives = int(self.alternatives_count[:n].max(initial=0))
        self.any_stop_strings = bool(self.has_stop_strings[:n].any())


def stacked(noted: list[tuple[Int32, Float32]], count: int) -> Alternatives | None:
    """[T, count] each; None where none were asked for."""
    if not count:
        return None
    ids, logprobs = [tokens for tokens, _ in noted], [values for _, values in noted]
    shape = (len(noted), count)
    return Alternatives(np.array(ids, np.int32).reshape(shape), np.array(logprobs, np.float32).reshape(shape))
