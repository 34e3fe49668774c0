"""Samples as a table, and packing: from the samples of a batch to micro-batches without padding.

Who calls whom: sources.py makes a SampleTable (all samples of one learner step); train.py cuts it into minibatches of
whole groups (`minibatches`), over ranks (`balance`), into token budgets (`pack`), and lays each micro-batch out
(`lay_out`).

Invariants: every sample with at least one output token stands in exactly one micro-batch of one rank, and with
``together`` = "group" all of its group there with it; the same rows and settings give the same layout on every rank, so
that ranks agree without talking; no layout changes a result beyond rounding, because samples never attend to each other
and denominators are counted over the whole minibatch.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from offtrail.core.types import Float32, Int32

Int64 = npt.NDArray[np.int64]

Together = Literal["sample", "group"]
"""What a cut into micro-batches and ranks leaves whole: a loss of pairs or of a whole group needs "group"."""

BUCKET_SHARE = 0.85
"""A sample shorter than this share of its bucket's longest opens a new attention bucket …"""
BUCKET_MIN = 512
"""… once the bucket holds so many padded positions: below it, a further kernel call costs more than the padding."""


@dataclass(frozen=True)
class SampleTable:
    """N samples of B groups, columnar, in durable order; T output tokens in all.

    ``prompts`` B × [P_b]; ``group_of`` [N] is each sample's place in ``prompts`` (ascending); ``starts`` [N+1] cuts
    ``tokens`` [T] into samples; ``temperatures`` [B]; ``ids`` [B] name the groups in messages.
    """

    prompts: tuple[Int32, ...]
    group_of: Int64
    starts: Int64
    tokens: Int32
    temperatures: Float32
    ids: Int64

    @property
    def size(self) -> int:
        """N, the number of samples."""
        return len(self.group_of)

    @property
    def lengths(self) -> Int64:
        """Output tokens of each sample, [N]."""
        return np.diff(self.starts)

    def inputs(self, *, feed_last: bool = False) -> Int64:
        """Tokens that each sample puts through the model alone, [N]: prompt and output, but the last unless
        ``feed_last``; 0 without output.
        """
        prompts = np.array([len(p) for p in self.prompts], dtype=np.int64)[self.group_of]
        lengths = self.lengths
        return np.where(lengths > 0, prompts + lengths - (not feed_last), 0)


def table_of(prompts: Sequence[Int32], outputs: Sequence[Sequence[Int32]]) -> SampleTable:
    """The samples of groups that no broker knows: of each prompt its outputs, at temperature 1."""
    flat = [output for group in outputs for output in group]
    return SampleTable(
        prompts=tuple(prompts),
        group_of=np.repeat(np.arange(len(prompts)), [len(group) for group in outputs]),
        starts=np.concatenate([[0], np.cumsum([len(output) for output in flat], dtype=np.int64)]),
        tokens=np.concatenate(flat) if flat else np.zeros(0, np.int32),
        temperatures=np.ones(len(prompts), np.float32),
        ids=np.arange(len(prompts)),
    )


@dataclass(frozen=True)
class Bucket:
    """n sequences that attend together: ``queries`` [n, Lq] and ``keys`` [n, Lk], each the flat place of a token.

    Query i sees key j where j ≤ Lk − Lq + i and ``bias`` [n, Lk] (0 or −∞, None: all 0) does not hide it. Both are
    padded on the right with place 0, which no real query sees; a shorter prompt is padded on the left, which ``bias``
    hides.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    bias: torch.Tensor | None = None


@dataclass(frozen=True)
class Packed:
    """One micro-batch: F flat input tokens, M predicted tokens.

    The prompt of a group stands once, however many of its samples are here. ``input_ids`` and ``position_ids`` [1, F];
    ``buckets`` say which flat tokens attend to which, and ``restore`` [F] where, among the buckets' padded outputs laid
    end to end, each flat token's own output stands. ``shared``: prompts and answers are buckets of their own, and a
    prompt's queries are computed once; otherwise each bucket holds whole samples (queries = keys) for a causal kernel.
    ``predict`` [M] are the flat places whose hidden state predicts ``targets`` [M]; ``inverse_temperature`` [M, 1]
    divides the logits (None: all at temperature 1). ``tokens`` [M] are the places in the table's tokens, ``samples``
    [M] the places in the table of each predicted token, ``lengths`` how many each sample in turn has (Σ = M), ``ends``
    [n] where among the M each of the n samples has its final token. ``attended``: positions that the flat tokens see,
    summed. ``own`` [M], only where final tokens are fed: the flat place of each predicted token itself, whose hidden
    state has seen it.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    buckets: tuple[Bucket, ...]
    restore: torch.Tensor
    shared: bool
    predict: torch.Tensor
    targets: torch.Tensor
    inverse_temperature: torch.Tensor | None
    tokens: torch.Tensor
    samples: torch.Tensor
    lengths: tuple[int, ...]
    ends: torch.Tensor
    attended: int
    own: torch.Tensor | None = None

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, prompt included."""
        return max(b.keys.shape[1] for b in self.buckets)

    def to(self, device: torch.device) -> Packed:
        """The same micro-batch on a device."""
        if device.type == "cpu":
            return self
        moved: dict[str, Any] = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in vars(self).items()}
        moved["buckets"] = tuple(
            Bucket(b.queries.to(device), b.keys.to(device), None if b.bias is None else b.bias.to(device))
            for b in self.buckets
        )
        return Packed(**moved)


def minibatches(groups: int, K: int) -> list[range]:
    """Cut B groups, in durable order, into K minibatches of whole groups.

    Raises ValueError unless K divides B: unequal updates would weigh groups unequally.
    """
    if groups % K:
        raise ValueError(f"learner.minibatches={K}: must divide batch.groups={groups} (whole groups, equal updates)")
    size = groups // K
    return [range(k * size, (k + 1) * size) for k in range(K)]


def balance(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Give items to ranks: longest first, each to the rank with the least so far (Graham's LPT, within 4/3 of the
    best).

    Items of cost 0 are left out. Ties go to the lower rank; each rank's items come back in ascending order.
    """
    loads, parts = [0.0] * ranks, [[] for _ in range(ranks)]  # type: tuple[list[float], list[list[int]]]
    for item in sorted((i for i, c in enumerate(costs) if c > 0), key=lambda i: (-costs[i], i)):
        rank = loads.index(min(loads))
        loads[rank] += costs[item]
        parts[rank].append(item)
    return [sorted(part) for part in parts]


def pack(items: Sequence[int], costs: Sequence[int], budget: int) -> list[list[int]]:
    """Best-fit decreasing: bins of at most ``budget`` tokens, an item above the budget alone in a bin of its own.

    ``costs`` is indexed by item. Bins come back in order of their first item, items ascending.
    """
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens left, bin), ascending
    for item in sorted(items, key=lambda i: (-costs[i], i)):
        at = bisect_left(free, (costs[item], -1))
        if at == len(free):
            bins.append([item])
            insort(free, (max(0, budget - costs[item]), len(bins) - 1))
        else:
            left, place = free.pop(at)
            bins[place].append(item)
            insort(free, (left - costs[item], place))
    return sorted(sorted(b) for b in bins)


def microbatches(
    rows: SampleTable,
    groups: range,
    ranks: int,
    budget: int,
    *,
    quadratic: float = 0.0,
    feed_last: bool = False,
    together: Together = "sample",
) -> list[list[list[int]]]:
    """Micro-batches [rank][micro-batch] → samples of one minibatch, balanced by Σ L + quadratic·L² over samples.

    L are a sample's tokens, ``quadratic`` what attention costs beside the linear layers (PackedModel.quadratic): with
    ΣL alone the rank that got the long samples would be late. Every rank gets the same number of micro-batches, the
    last perhaps empty, because FSDP2's collectives must pair up; and its heaviest first, because ranks wait for each
    other in each of them. What stays ``together``, a sample or a group, is alone in a micro-batch where it is above the
    budget.
    """
    inputs = rows.inputs(feed_last=feed_last)
    chosen = (rows.group_of >= groups.start) & (rows.group_of < groups.stop)
    each: list[int] = np.where(chosen, inputs, 0).tolist()
    units = _units(rows, together)
    tokens = [sum(each[i] for i in unit) for unit in units]
    work = [sum(each[i] + quadratic * each[i] * each[i] for i in unit) for unit in units]
    packs = [pack(part, tokens, budget) for part in balance(work, ranks)]
    if ranks > 1:
        packs = [sorted(p, key=lambda items: -sum(work[u] for u in items)) for p in packs]
    count = max(1, *(len(p) for p in packs))
    samples = [[[i for u in items for i in units[u] if each[i]] for items in p] for p in packs]
    return [p + [[] for _ in range(count - len(p))] for p in samples]


def _units(rows: SampleTable, together: Together) -> list[list[int]]:
    """The samples of what is never cut, ascending."""
    if together == "sample":
        return [[i] for i in range(rows.size)]
    bounds = np.searchsorted(rows.group_of, np.arange(len(rows.prompts) + 1)).tolist()
    return [list(range(start, stop)) for start, stop in itertools.pairwise(bounds)]


def lay_out(rows: SampleTable, samples: Sequence[int], *, share_up_to: int = 0, feed_last: bool = False) -> Packed:
    """Lay samples (ascending, each with output) out as one micro-batch; an empty one holds one token to no effect.

    ``share_up_to``: sequences no longer than this use the ``shared`` layout, which spares computing a prompt's
    attention once a sample but holds Lq × Lk scores. ``feed_last``: the final token of each sample is an input too.
    """
    layout = _Layout(feed_last)
    for i in samples:
        group, start, stop = int(rows.group_of[i]), int(rows.starts[i]), int(rows.starts[i + 1])
        layout.add(group, rows.prompts[group], rows.tokens[start:stop])
    if not layout.answers:
        layout.add_prompt(-1, np.zeros(1, np.int32))
    longest = max((p.size + a.size for p, a in layout.answers), default=1)
    shared = longest <= share_up_to
    buckets = layout.shared_buckets() if shared else layout.whole_buckets()
    chosen = np.asarray(samples, np.int64)
    positions = np.concatenate(layout.positions)
    tokens = np.concatenate([np.arange(rows.starts[i], rows.starts[i + 1]) for i in samples] or [np.zeros(0, np.int64)])
    sample_of = np.repeat(chosen, rows.lengths[chosen])
    temperatures = rows.temperatures[rows.group_of[sample_of]]
    return Packed(
        input_ids=torch.from_numpy(np.concatenate(layout.flat).astype(np.int64)).unsqueeze(0),
        position_ids=torch.from_numpy(positions).unsqueeze(0),
        buckets=tuple(bucket for bucket, _ in buckets),
        restore=torch.from_numpy(_restore(buckets, layout.end)),
        shared=shared,
        predict=torch.from_numpy(layout.predict()),
        targets=torch.from_numpy(rows.tokens[tokens].astype(np.int64)),
        inverse_temperature=None if (temperatures == 1).all() else torch.from_numpy(1 / temperatures).unsqueeze(1),
        tokens=torch.from_numpy(tokens),
        samples=torch.from_numpy(sample_of),
        lengths=tuple(rows.lengths[chosen].tolist()),
        ends=torch.from_numpy(np.cumsum(rows.lengths[chosen]) - 1),
        attended=int(positions.sum()) + len(positions),
        own=torch.from_numpy(layout.own()) if feed_last else None,
    )


class _Layout:
    """Flat places of a micro-batch while it is laid out: each prompt once, then the inputs of its samples."""

    def __init__(self, feed_last: bool) -> None:
        self.feed_last = feed_last
        self.flat: list[Int32] = []
        self.positions: list[Int64] = []
        self.prompts: dict[int, Int64] = {}
        self.answers: list[tuple[Int64, Int64]] = []
        """Flat places of each sample's prompt and of its own inputs (its output, but the last token unless fed)."""
        self.end = 0

    def add(self, group: int, prompt: Int32, output: Int32) -> None:
        if group not in self.prompts:
            self.add_prompt(group, prompt)
        self.answers.append((self.prompts[group], self._place(output[: None if self.feed_last else -1], len(prompt))))

    def add_prompt(self, group: int, prompt: Int32) -> None:
        self.prompts[group] = self._place(prompt, 0)

    def _place(self, tokens: Int32, position: int) -> Int64:
        places = np.arange(self.end, self.end + len(tokens))
        self.flat.append(tokens)
        self.positions.append(np.arange(position, position + len(tokens)))
        self.end += len(tokens)
        return places

    def predict(self) -> Int64:
        """The places that predict: the prompt's last token predicts the first output token."""
        fed = -1 if self.feed_last else None
        return _joined([part for prompt, own in self.answers for part in (prompt[-1:], own[:fed])])

    def own(self) -> Int64:
        """The places of the output tokens themselves, where all of them are fed."""
        return _joined([own for _, own in self.answers])

    def whole_buckets(self) -> list[tuple[Bucket, Int64]]:
        """Whole samples, prompt and answer, right-padded: (bucket, real queries of each sequence [n])."""
        sequences = [np.concatenate(pair) for pair in self.answers] or list(self.prompts.values())
        return [_square([sequences[i] for i in part]) for part in _similar([len(s) for s in sequences])]

    def shared_buckets(self) -> list[tuple[Bucket, Int64]]:
        """Prompts by themselves, then answers that see their prompt: every token is a query exactly once."""
        prompts = list(self.prompts.values())
        buckets = [_square([prompts[i] for i in part]) for part in _similar([len(p) for p in prompts])]
        answers = [pair for pair in self.answers if len(pair[1])]
        parts = _similar([len(own) for _, own in answers]) if answers else []
        return buckets + [_behind_prompts([answers[i] for i in part]) for part in parts]


def _joined(parts: list[Int64]) -> Int64:
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _similar(lengths: Sequence[int]) -> list[list[int]]:
    """Items of similar length together, longest first."""
    parts: list[list[int]] = []
    longest = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not parts or (lengths[i] < BUCKET_SHARE * longest and longest * len(parts[-1]) >= BUCKET_MIN):
            parts.append([])
            longest = lengths[i]
        parts[-1].append(i)
    return parts


def _square(sequences: list[Int64]) -> tuple[Bucket, Int64]:
    index = np.zeros((len(sequences), max(map(len, sequences))), np.int64)
    for row, sequence in zip(index, sequences, strict=True):
        row[: len(sequence)] = sequence
    places = torch.from_numpy(index)
    return Bucket(places, places), np.array([len(s) for s in sequences], np.int64)


def _behind_prompts(answers: list[tuple[Int64, Int64]]) -> tuple[Bucket, Int64]:
    P, T = max(len(prompt) for prompt, _ in answers), max(len(own) for _, own in answers)
    keys, bias = np.zeros((len(answers), P + T), np.int64), np.zeros((len(answers), P + T), np.float32)
    for row, hidden, (prompt, own) in zip(keys, bias, answers, strict=True):
        row[P - len(prompt) : P] = prompt
        row[P : P + len(own)] = own
        hidden[: P - len(prompt)] = -np.inf
    places = torch.from_numpy(keys)
    some_hidden = torch.from_numpy(bias) if (bias < 0).any() else None
    return Bucket(places[:, P:].contiguous(), places, some_hidden), np.array([len(own) for _, own in answers], np.int64)


def _restore(buckets: Sequence[tuple[Bucket, Int64]], size: int) -> Int64:
    """Where each flat token's output stands. A prompt in several whole samples has equal outputs there: the last
    wins.
    """
    restore = np.empty(size, np.int64)
    padded = 0
    for bucket, lengths in buckets:
        n, L = bucket.queries.shape
        real = np.arange(L) < lengths[:, None]
        restore[bucket.queries.numpy()[real]] = padded + np.flatnonzero(real)
        padded += n * L
    return restore
