"""Tokens laid flat, told apart by sample: sums and means over each sample."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Samples:
    """S samples of N flat tokens, in any order: ``position`` [N] int64 is each token's sample, 0…S−1; ``sizes`` [S]."""

    position: Tensor
    sizes: Tensor

    @classmethod
    def of(cls, sample_index: Tensor) -> Samples:
        """From any numbering [N] of the samples."""
        _, position, sizes = torch.unique(sample_index, return_inverse=True, return_counts=True)
        return cls(position, sizes)

    @property
    def count(self) -> int:
        """S."""
        return len(self.sizes)

    def sum(self, values: Tensor) -> Tensor:
        """[N] → [S], differentiable."""
        return torch.zeros(self.count, dtype=values.dtype, device=values.device).scatter_add(0, self.position, values)

    def mean(self, values: Tensor) -> Tensor:
        """[N] → [S], differentiable."""
        return self.sum(values) / self.sizes

    def each(self, values: Tensor) -> Tensor:
        """[S] → [N]: every token gets its sample's value."""
        return values.index_select(0, self.position)

    def any(self, flags: Tensor) -> Tensor:
        """[N] bool → [S] bool."""
        return self.sum(flags.to(torch.int64)) > 0


def per_group(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """[N] → [groups]: sums; ``group`` [N] is each one's place."""
    return torch.zeros(groups, dtype=values.dtype, device=values.device).scatter_add(0, group, values)


def spread(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """[N] → [groups]: largest minus smallest value, exactly 0 where all are equal; ``group`` as above."""
    infinity = torch.full((groups,), torch.inf, dtype=values.dtype, device=values.device)
    high = (-infinity).scatter_reduce(0, group, values, "amax")
    return high - infinity.scatter_reduce(0, group, values, "amin")


def returns_to_go(tokens: Tensor, lengths: Tensor, decay: Tensor) -> Tensor:
    """y_t = x_t + decay·y_{t+1} within each sample, 0 after its end; [T], [N], [N] → [T] float64.

    One vector operation a position, all samples at once, from the last position to the first.
    """
    out = tokens.double().clone()
    starts = lengths.cumsum(0) - lengths
    for t in range(int(lengths.max()) - 2 if len(lengths) else -1, -1, -1):
        place = (starts + t)[lengths > t + 1]
        out[place] += decay[lengths > t + 1] * out[place + 1]
    return out
