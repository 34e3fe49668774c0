"""Which token comes next: counter-based uniforms and inverse-CDF draws.

Invariants: the uniform of a token is a function of (seed, request's key, sample, position) alone, whatever else is in
flight; a draw is never a token of probability zero and never past the vocabulary.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

UInt64 = npt.NDArray[np.uint64]
Float64 = npt.NDArray[np.float64]

_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = 0x9E3779B9, 0xBB67AE85


def philox(counter: tuple[UInt64, UInt64, UInt64, UInt64], key: tuple[UInt64, UInt64]) -> tuple[UInt64, ...]:
    """Philox4x32-10 on arrays of 32-bit words held in uint64 (Salmon et al., SC 2011): four words of each counter."""
    a, b, c, d = counter
    key_0, key_1 = key
    for _ in range(10):
        left, right = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (right >> _32) ^ b ^ key_0, right & _LOW, (left >> _32) ^ d ^ key_1, left & _LOW
        key_0, key_1 = (key_0 + np.uint64(_WEYL[0])) & _LOW, (key_1 + np.uint64(_WEYL[1])) & _LOW
    return a, b, c, d


def uniforms(seed: UInt64, request: UInt64, sample: UInt64, first: UInt64, count: int) -> Float64:
    """[m, count] numbers in [0, 1 − 2⁻⁵³] for positions ``first``…``first + count − 1`` of m samples.

    All but ``count`` are [m]. The 64-bit seed is the key, and the counter (request, 64 bits; sample, 32;
    position / 2, 32): distinct tokens never share one. It serves two positions, so ``first`` and ``count`` are even.
    """
    pairs = (first[:, None] >> np.uint64(1)) + np.arange(count // 2, dtype=np.uint64)
    full = np.zeros_like(pairs)
    counter = (full + (request & _LOW)[:, None], full + (request >> _32)[:, None], full + sample[:, None], pairs)
    words = philox(counter, ((seed & _LOW)[:, None], (seed >> _32)[:, None]))
    both = np.stack(((words[0] << _32) | words[1], (words[2] << _32) | words[3]), axis=-1)
    return (both >> np.uint64(11)).reshape(len(seed), count).astype(np.float64) * 2.0**-53


def log_probabilities(logits: Tensor, temperature: Tensor | None) -> Tensor:
    """log_softmax(logits / T) [N, V] float32; ``temperature`` [N, 1] (1 where greedy), or None where all are 1."""
    return torch.log_softmax(logits if temperature is None else logits / temperature, dim=-1)


def keep(logprobs: Tensor, top_p: Tensor, top_k: Tensor) -> Tensor:
    """Mask [N, V] of the tokens that top-p [N, 1] and top-k [N, 1] (0 = all) both keep.

    Top-p keeps the smallest set of most likely tokens whose mass reaches p, at least one; both look at the whole
    distribution at the sampling temperature. Ties go to the lower id.
    """
    ordered, ids = torch.sort(logprobs, dim=-1, descending=True, stable=True)
    mass = ordered.double().exp_()
    before = mass.cumsum(-1) - mass
    rank = torch.arange(logprobs.shape[1], device=logprobs.device)
    kept = (((before < top_p) | (top_p >= 1)) & ((rank < top_k) | (top_k <= 0))) | (rank == 0)
    return torch.zeros_like(kept).scatter_(1, ids, kept)


def draw(logprobs: Tensor, uniform: Tensor, kept: Tensor | None = None) -> Tensor:
    """One token id a row [N, 1] int64, by inverse CDF of exp(``logprobs`` [N, V]) at ``uniform`` [N, 1] float64.

    The token is the first whose cumulative mass exceeds u · total. So its own mass is above zero; and for u ≤ 1 − 2⁻⁵³
    the rounded product u · total stays below total, so there always is such a token.
    """
    mass = logprobs.exp()
    if kept is not None:
        mass.masked_fill_(~kept, 0.0)
    cumulative = mass.cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
