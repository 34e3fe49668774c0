"""Rows and packing: from the samples of a batch to micro-batches without padding.

Who calls whom: sources.py makes Rows (all samples of one learner step); train.py cuts them into minibatches of whole
groups (`minibatches`), over ranks (`balance`), into token budgets (`pack`), and lays each micro-batch out (`lay_out`).

Invariants: every sample with at least one output token stands in exactly one micro-batch of one rank; the same rows and
settings give the same layout on every rank, so that ranks agree without talking; no layout changes a result beyond
rounding, because samples never attend to each other and denominators are counted over the whole minibatch.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from offtrail.core.types import Float32, Int32

Int64 = npt.NDArray[np.int64]

BUCKET_SHARE = 0.75
"""A sample shorter than this share of its bucket's longest opens a new attention bucket …"""
BUCKET_MIN = 2048
"""… once the bucket holds so many padded positions: below it, a further kernel call costs more than the padding."""


@dataclass(frozen=True)
class Rows:
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

    def inputs(self) -> Int64:
        """Tokens that each sample puts through the model alone, [N]: prompt and output but the last; 0 without output."""
        prompts = np.array([len(p) for p in self.prompts], dtype=np.int64)[self.group_of]
        lengths = self.lengths
        return np.where(lengths > 0, prompts + lengths - 1, 0)


@dataclass(frozen=True)
class Bucket:
    """n samples of similar length, right-padded to L for attention. ``index`` [n, L] is the flat place of each token."""

    index: torch.Tensor


@dataclass(frozen=True)
class Packed:
    """One micro-batch: F flat input tokens, M predicted tokens.

    The prompt of a group stands once, however many of its samples are here. ``input_ids`` and ``position_ids`` [1, F];
    ``buckets`` say which flat tokens form a sequence and ``restore`` [F] where, among the buckets' padded outputs laid
    end to end, each flat token's own output stands; ``predict`` [M] are the flat places whose hidden state predicts
    ``targets`` [M]; ``inverse_temperature`` [M, 1] divides the logits (None: all at temperature 1). ``tokens`` [M] are
    the places in Rows.tokens, ``samples`` [M] the places in Rows of each predicted token.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    buckets: tuple[Bucket, ...]
    restore: torch.Tensor
    predict: torch.Tensor
    targets: torch.Tensor
    inverse_temperature: torch.Tensor | None
    tokens: torch.Tensor
    samples: torch.Tensor

    @property
    def padded(self) -> int:
        """Attention positions, padding included."""
        return sum(b.index.numel() for b in self.buckets)

    def to(self, device: torch.device) -> Packed:
        """The same micro-batch on a device."""
        if device.type == "cpu":
            return self
        moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in vars(self).items()}
        moved["buckets"] = tuple(Bucket(b.index.to(device)) for b in self.buckets)
        return Packed(**moved)


def minibatches(groups: int, K: int) -> list[range]:
    """Cut B groups, in durable order, into K minibatches of whole groups.

    Raises ValueError unless K divides B: unequal updates would weigh groups unequally.
    """
    if groups % K:
        raise ValueError(f"learner.minibatches={K}: must divide batch.groups={groups} (whole groups, equal updates)")
    size = groups // K
    return [range(k * size, (k + 1) * size) for k in range(K)]


def balance(costs: Sequence[int], ranks: int) -> list[list[int]]:
    """Give items to ranks: longest first, each to the rank with the least so far (Graham's LPT, within 4/3 of the best).

    Items of cost 0 are left out. Ties go to the lower rank; each rank's items come back in ascending order.
    """
    loads, parts = [0] * ranks, [[] for _ in range(ranks)]  # type: tuple[list[int], list[list[int]]]
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


def plan(rows: Rows, groups: range, ranks: int, budget: int) -> list[list[list[int]]]:
    """Micro-batches [rank][micro-batch] → samples of one minibatch.

    Every rank gets the same number of micro-batches, the last perhaps empty: FSDP2's collectives must pair up.
    """
    inputs = rows.inputs()
    chosen = (rows.group_of >= groups.start) & (rows.group_of < groups.stop)
    costs: list[int] = np.where(chosen, inputs, 0).tolist()
    packs = [pack(part, costs, budget) for part in balance(costs, ranks)]
    count = max(1, *(len(p) for p in packs))
    return [p + [[] for _ in range(count - len(p))] for p in packs]


def lay_out(rows: Rows, samples: Sequence[int]) -> Packed:
    """Lay samples (ascending) out as one micro-batch; an empty one holds a single token and predicts nothing."""
    flat: list[Int32] = []
    positions: list[Int64] = []
    prompt_at: dict[int, int] = {}
    sequences: list[Int64] = []
    predict: list[Int64] = []
    end = 0
    for i in samples:
        group, start, stop = int(rows.group_of[i]), int(rows.starts[i]), int(rows.starts[i + 1])
        prompt = rows.prompts[group]
        P, T = len(prompt), stop - start
        if group not in prompt_at:
            prompt_at[group] = end
            flat.append(prompt)
            positions.append(np.arange(P))
            end += P
        first = prompt_at[group]
        flat.append(rows.tokens[start : stop - 1])
        positions.append(np.arange(P, P + T - 1))
        sequence = np.concatenate([np.arange(first, first + P), np.arange(end, end + T - 1)])
        sequences.append(sequence)
        predict.append(sequence[P - 1 :])
        end += T - 1
    if not sequences:
        flat, positions, sequences, end = [np.zeros(1, np.int32)], [np.zeros(1, np.int64)], [np.zeros(1, np.int64)], 1
    buckets = _buckets(sequences)
    restore = np.empty(end, np.int64)
    padded = 0
    for index, lengths in buckets:
        n, L = index.shape
        valid = np.arange(L) < lengths[:, None]
        # A shared prompt is written once a sample, always with equal outputs: the last one wins.
        restore[index[valid]] = padded + np.flatnonzero(valid)
        padded += n * L
    tokens = _spans(rows.starts, samples)
    sample_of = np.repeat(np.asarray(samples, np.int64), rows.lengths[np.asarray(samples, np.int64)])
    temperatures = rows.temperatures[rows.group_of[sample_of]]
    return Packed(
        input_ids=torch.from_numpy(np.concatenate(flat).astype(np.int64)).unsqueeze(0),
        position_ids=torch.from_numpy(np.concatenate(positions)).unsqueeze(0),
        buckets=tuple(Bucket(torch.from_numpy(index)) for index, _ in buckets),
        restore=torch.from_numpy(restore),
        predict=torch.from_numpy(np.concatenate(predict) if predict else np.zeros(0, np.int64)),
        targets=torch.from_numpy(rows.tokens[tokens].astype(np.int64)),
        inverse_temperature=None if (temperatures == 1).all() else torch.from_numpy(1 / temperatures).unsqueeze(1),
        tokens=torch.from_numpy(tokens),
        samples=torch.from_numpy(sample_of),
    )


def _buckets(sequences: Sequence[Int64]) -> list[tuple[Int64, Int64]]:
    """Sequences of similar length together: (index [n, L] right-padded with place 0, lengths [n]), longest first.

    Padding may point anywhere: under a causal mask no real token sees what stands to its right.
    """
    order = sorted(range(len(sequences)), key=lambda i: (-len(sequences[i]), i))
    parts: list[list[int]] = []
    for i in order:
        longest = len(sequences[parts[-1][0]]) if parts else 0
        if not parts or (len(sequences[i]) < BUCKET_SHARE * longest and longest * len(parts[-1]) >= BUCKET_MIN):
            parts.append([])
        parts[-1].append(i)
    buckets = []
    for part in parts:
        lengths = np.array([len(sequences[i]) for i in part], np.int64)
        index = np.zeros((len(part), int(lengths[0])), np.int64)
        for row, i in enumerate(part):
            index[row, : lengths[row]] = sequences[i]
        buckets.append((index, lengths))
    return buckets


def _spans(starts: Int64, samples: Sequence[int]) -> Int64:
    """Places in Rows.tokens of all tokens of the samples, in their order."""
    if not len(samples):
        return np.zeros(0, np.int64)
    return np.concatenate([np.arange(starts[i], starts[i + 1]) for i in samples])
