"""Surrogate objectives: per-token losses, before aggregation, before off-policy weights, before KL."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped at ± this before exp: e^20 ≈ 4.9e8, whose square still sums in float64."""


def clamp_log_ratio(log_ratio: Tensor) -> Tensor:
    """Clamp at ±LOG_RATIO_LIMIT; the gradient is 0 where it clamps."""
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


@dataclass(frozen=True, slots=True)
class Surrogate:
    """All [N]. ``loss`` carries the gradient; ``ratio`` and bool ``clipped_low``, ``clipped_high`` are detached."""

    loss: Tensor
    ratio: Tensor
    clipped_low: Tensor
    clipped_high: Tensor


def ppo_clip(
    logprobs: Tensor, prox_logprobs: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> Surrogate:
    """−min(r·A, clip(r, 1 − clip_low, 1 + clip_high)·A) with r = π_θ/π_prox (PPO, arXiv:1707.06347, eq. 7).

    All tensors are [N]; only ``logprobs`` is differentiated. A token counts as clipped only where the clip takes its
    gradient: below with A < 0, above with A > 0. So clip_low ≥ 1 never clips a negative advantage, and
    ``clip_high=inf`` never a positive one. At θ = prox the gradient is REINFORCE's and nothing is clipped.
    """
    A = advantages.detach()
    ratio = clamp_log_ratio(logprobs - prox_logprobs.detach()).exp()
    loss = -torch.minimum(ratio * A, ratio.clamp(1 - clip_low, 1 + clip_high) * A)
    r = ratio.detach()
    return Surrogate(loss, r, (r < 1 - clip_low) & (A < 0), (r > 1 + clip_high) & (A > 0))
