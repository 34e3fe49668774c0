"""Sums that describe a loss, and nothing but sums: any cut into micro-batches and ranks gives the same metrics.

A ``LossMetrics`` is three tensors of fixed layout. Adding two merges them; over ranks, all-reduce ``sums``, ``buckets``
and ``histograms`` with SUM and ``maxima`` with MAX. ``means()`` turns the totals into named numbers, once, at the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SUMS = (
    "tokens", "samples", "ratio", "clip_low", "clip_high", "rejected", "masked",
    "w", "w2", "applied", "applied2", "log_w", "log_w2", "abs_log_w", "far",
    "seq_w", "seq_w2", "seq_applied", "seq_applied2",
    "loss_policy", "loss_kl", "loss_entropy", "kl_ref", "ref_tokens", "entropy", "entropy_tokens",
)  # fmt: skip
MAXIMA = ("w", "abs_log_w", "ratio")
BUCKET_SUMS = ("tokens", "abs_log_w", "w", "w2", "clipped", "log_w", "log_w2", "rejected")
BUCKETS = 9
"""Staleness 0, 1, …, 7, and 8 or more. Bucket 0 is the numerics floor (same weights, other kernels), but under
engine.kv_on_update=keep: a token of the newest version may there stand on older keys and values. mismatch/* is the
floor in both.
"""
HISTOGRAMS = ("abs_log_w", "rho")

_LOW_OCTAVE, _OCTAVES, _STEPS = -32, 64, 128
BINS = _OCTAVES * _STEPS


def bin_of(values: Tensor) -> Tensor:
    """Bin [N] int64 of non-negative values: exponent and top 7 mantissa bits of the float32, 2^−32 … 2^32.

    Smaller values, 0 among them, fall into bin 0. A bin is at most .8 % wide.
    """
    bits = values.detach().float().view(torch.int32).long() >> 16
    return (bits - (127 + _LOW_OCTAVE) * _STEPS).clamp(0, BINS - 1)


def bin_value(index: int) -> float:
    """Middle of a bin (0 for bin 0): within .4 % of every value in it."""
    if index == 0:
        return 0.0
    octave, step = divmod(index, _STEPS)
    return math.ldexp(1 + (step + 0.5) / _STEPS, octave + _LOW_OCTAVE)


def quantiles(histogram: Tensor, shares: Sequence[float]) -> list[float]:
    """For each q of ``shares`` the ⌈q·N⌉-th smallest of the N values counted in ``histogram`` [BINS] int64, within
    .4 %; NaN if it is empty.
    """
    counted = histogram.cumsum(0)
    total = int(counted[-1])
    if total == 0:
        return [math.nan] * len(shares)
    ranks = torch.tensor([max(1, math.ceil(q * total)) for q in shares], device=histogram.device)
    return [bin_value(i) for i in torch.searchsorted(counted, ranks).tolist()]


@dataclass(slots=True)
class LossMetrics:
    """``sums`` [len(SUMS)] float64, ``maxima`` [len(MAXIMA)] float64, ``buckets`` [BUCKETS, len(BUCKET_SUMS)] float64,
    ``histograms`` [len(HISTOGRAMS), BINS] int64; all detached, on the loss's device.
    """

    sums: Tensor
    maxima: Tensor
    buckets: Tensor
    histograms: Tensor

    @classmethod
    def empty(cls, device: torch.device | str = "cpu") -> LossMetrics:
        """What adding nothing gives."""
        return cls(
            torch.zeros(len(SUMS), dtype=torch.float64, device=device),
            torch.zeros(len(MAXIMA), dtype=torch.float64, device=device),
            torch.zeros(BUCKETS, len(BUCKET_SUMS), dtype=torch.float64, device=device),
            torch.zeros(len(HISTOGRAMS), BINS, dtype=torch.int64, device=device),
        )

    def __add__(self, other: LossMetrics) -> LossMetrics:
        return LossMetrics(
            self.sums + other.sums,
            torch.maximum(self.maxima, other.maxima),
            self.buckets + other.buckets,
            self.histograms + other.histograms,
        )

    def means(self, updates: int = 1) -> dict[str, float]:
        """Named metrics over everything added; ``updates``: optimizer updates in it (losses are means over these).

        Names are those of docs/metrics.md. Without tokens there is nothing to say: the dict is empty.
        """
        s = dict(zip(SUMS, self.sums.tolist(), strict=True))
        top = dict(zip(MAXIMA, self.maxima.tolist(), strict=True))
        N = s["tokens"]
        if N == 0:
            return {}
        named = {
            "loss/policy": s["loss_policy"] / updates,
            "policy/ratio_mean": s["ratio"] / N,
            "policy/ratio_max": top["ratio"],
            "policy/clip_low_fraction": s["clip_low"] / N,
            "policy/clip_high_fraction": s["clip_high"] / N,
            "policy/masked_fraction": s["masked"] / N,
            "offpolicy/rejected_fraction": s["rejected"] / N,
            "offpolicy/weight_mean": s["w"] / N,
            "offpolicy/weight_max": top["w"],
            "offpolicy/ess_token": _ess(s["w"], s["w2"], N),
            "offpolicy/ess_token_truncated": _ess(s["applied"], s["applied2"], N),
            "offpolicy/ess_sequence": _ess(s["seq_w"], s["seq_w2"], s["samples"]),
            "offpolicy/ess_sequence_truncated": _ess(s["seq_applied"], s["seq_applied2"], s["samples"]),
            "offpolicy/abs_dlogp_mean": s["abs_log_w"] / N,
            "offpolicy/abs_dlogp_max": top["abs_log_w"],
            "offpolicy/abs_dlogp_over_ln2": s["far"] / N,
            "offpolicy/k1": -s["log_w"] / N,
            "offpolicy/k3": (s["w"] - s["log_w"]) / N - 1,
            "offpolicy/chi2": s["w2"] / N - 1,
            "offpolicy/second_moment": s["log_w2"] / N,
        }
        far, rho = quantiles(self.histograms[0], (0.5, 0.95, 0.99)), quantiles(self.histograms[1], (0.05, 0.5, 0.95))
        named |= {f"offpolicy/abs_dlogp_p{p}": value for p, value in zip((50, 95, 99), far, strict=True)}
        named |= {f"offpolicy/ratio_p{p}": value for p, value in zip((5, 50, 95), rho, strict=True)}
        if s["ref_tokens"]:
            named |= {"loss/kl": s["loss_kl"] / updates, "policy/kl_ref": s["kl_ref"] / s["ref_tokens"]}
        if s["loss_entropy"]:
            named["loss/entropy"] = s["loss_entropy"] / updates
        if s["entropy_tokens"]:
            named["policy/entropy"] = s["entropy"] / s["entropy_tokens"]
        return named | self._bucket_means()

    def _bucket_means(self) -> dict[str, float]:
        named: dict[str, float] = {}
        for i, row in enumerate(self.buckets.tolist()):
            s = dict(zip(BUCKET_SUMS, row, strict=True))
            if N := s["tokens"]:
                tag = f"stale_{i}" + ("_or_more" if i == BUCKETS - 1 else "")
                named |= {
                    f"offpolicy/abs_dlogp_mean/{tag}": s["abs_log_w"] / N,
                    f"offpolicy/ess_token/{tag}": _ess(s["w"], s["w2"], N),
                    f"offpolicy/k3/{tag}": (s["w"] - s["log_w"]) / N - 1,
                    f"offpolicy/chi2/{tag}": s["w2"] / N - 1,
                    f"offpolicy/second_moment/{tag}": s["log_w2"] / N,
                    f"offpolicy/rejected_fraction/{tag}": s["rejected"] / N,
                    f"policy/clip_fraction/{tag}": s["clipped"] / N,
                }
        return named

    def ratios(self, points: int = 200) -> list[float]:
        """π_θ/π_beh of the tokens as ``points`` evenly spaced quantiles, for a histogram view; empty without tokens."""
        counts = self.histograms[1]
        if int(counts.sum()) == 0:
            return []
        return quantiles(counts, [(i + 0.5) / points for i in range(points)])


def _ess(total: float, squares: float, count: float) -> float:
    """Effective sample size as a share of the count: (Σw)² / (N·Σw²); 1 for equal weights, 1/N for one-hot."""
    return total * total / (count * squares) if squares > 0 else 0.0
