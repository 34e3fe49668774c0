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
