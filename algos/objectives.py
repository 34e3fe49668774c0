"""Surrogate objectives: per-token losses, before aggregation, before off-policy weights, before KL.

One function an objective, one line of ``OBJECTIVES`` each; or anybody's own, algo.loss=module:function. Notation:
r = π_θ/π_anchor, where the correction names the anchor (π_prox, or π_beh); ρ = π_θ/π_beh, for the objectives that hold
the behaviour policy themselves; sg = detached.

Invariant: at r = 1 every one of them has REINFORCE's gradient, −A·∇log π (tests/unit/test_algos_objectives.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from offtrail.algos.config import (
    AipoConfig,
    AlgoConfig,
    AspoConfig,
    BapoConfig,
    CispoConfig,
    DppoConfig,
    GrpoConfig,
    GspoConfig,
    OpmdConfig,
    PpoConfig,
    ReinforceConfig,
    SapoConfig,
    ToprConfig,
)
from offtrail.algos.samples import Samples
from offtrail.core.plugins import bind, load

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped at ± this before exp: e^20 ≈ 4.9e8, whose square still sums in float64."""


def clamp_log_ratio(log_ratio: Tensor) -> Tensor:
    """Clamp at ±LOG_RATIO_LIMIT; the gradient is 0 where it clamps."""
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


@dataclass(frozen=True, slots=True)
class Tokens:
    """What an objective sees, all [N]: only ``logprobs`` has a gradient. ``bounds``: of the ratio, where the whole
    update decided them (BAPO), or (0, ∞) where something else takes the clip's place (M2PO).
    """

    logprobs: Tensor
    anchor: Tensor
    behaviour: Tensor
    advantages: Tensor
    samples: Samples
    bounds: tuple[float, float] | None = None

    def log_ratio(self) -> Tensor:
        """Clamped log r, with gradient."""
        return clamp_log_ratio(self.logprobs - self.anchor)

    def log_rho(self) -> Tensor:
        """Clamped log ρ, with gradient."""
        return clamp_log_ratio(self.logprobs - self.behaviour)


@dataclass(frozen=True, slots=True)
class Surrogate:
    """All [N]. ``loss`` carries the gradient; ``ratio`` and the bools are detached.

    ``clipped_low`` (A < 0) and ``clipped_high`` (A > 0): tokens that a bound took the gradient from, or, where an
    objective only truncates the weight (CISPO, AIPO, TOPR), whose weight it truncated. ``masked``: left out by the
    objective's own rule.
    """

    loss: Tensor
    ratio: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    masked: Tensor | None = None


def _clip(log_ratio: Tensor, A: Tensor, low: float, high: float, dual: float = 0.0) -> Surrogate:
    """−min(r·A, clip(r, low, high)·A), and with ``dual`` never below dual·A where A < 0."""
    ratio = log_ratio.exp()
    gain = torch.minimum(ratio * A, ratio.clamp(low, high) * A)
    r = ratio.detach()
    clipped_low = (r < low) & (A < 0)
    if dual:
        gain = torch.where(A < 0, torch.maximum(gain, dual * A), gain)
        clipped_low |= (r > dual) & (A < 0)
    return Surrogate(-gain, r, clipped_low, (r > high) & (A > 0))


def grpo(x: Tokens, algo: GrpoConfig) -> Surrogate:
    """−min(r·A, clip(r, 1 − clip_low, 1 + clip_high)·A) (PPO, arXiv:1707.06347, eq. 7), asymmetric (DAPO, eq. 8).

    A token counts as clipped only where the clip takes its gradient: below with A < 0, above with A > 0. So
    clip_low = 1 never clips a negative advantage. ``dual_clip`` c: the gain is at least c·A for A < 0
    (arXiv:1912.09729, eq. 5), so a negative token at r > c has no gradient either; also where ``bounds`` took the place
    of the clip.
    """
    low, high = x.bounds or (1 - algo.clip_low, 1 + algo.clip_high)
    return _clip(x.log_ratio(), x.advantages, low, high, algo.dual_clip)


def gspo(x: Tokens, algo: GspoConfig) -> Surrogate:
    """−min(s·A, clip(s)·A) with s = exp(mean log r) over the sample, at each of its tokens (arXiv:2507.18071, eq. 5).

    With aggregation=seq_mean_token_mean this is the paper's mean over samples. A constant log-ratio gives an s that
    does not depend on length, a sample of one token PPO's clip.
    """
    log_s = x.samples.each(x.samples.mean(x.log_ratio()))
    return _clip(log_s, x.advantages, 1 - algo.clip_low, 1 + algo.clip_high)


def cispo(x: Tokens, algo: CispoConfig) -> Surrogate:
    """−sg(clip(r, clip_low, clip_high))·A·log π (MiniMax-M1, arXiv:2506.13585, eq. 4).

    Trap: ``clip_high`` is the cap of r itself (as in TRL), not 1 + ε as in the paper's text and other code.
    """
    r = x.log_ratio().detach().exp()
    loss = -r.clamp(algo.clip_low, algo.clip_high) * x.advantages * x.logprobs
    return Surrogate(loss, r, (r < algo.clip_low) & (x.advantages != 0), (r > algo.clip_high) & (x.advantages != 0))


def sapo(x: Tokens, algo: SapoConfig) -> Surrogate:
    """−(4/τ)·σ(τ(r − 1))·A, τ by the sign of A (arXiv:2511.20347): slope 1 in r at r = 1, fading to both sides."""
    ratio, A = x.log_ratio().exp(), x.advantages
    # Trap: where() of two Python numbers is float32, whatever A is.
    tau = torch.where(A > 0, A.new_tensor(algo.tau_positive), A.new_tensor(algo.tau_negative))
    never = torch.zeros_like(A, dtype=torch.bool)
    return Surrogate(-(4 / tau) * torch.sigmoid(tau * (ratio - 1)) * A, ratio.detach(), never, never)


def topr(x: Tokens, algo: ToprConfig) -> Surrogate:
    """−sg(a)·A·log π with a = 1 for A ≥ 0 and min(∏ρ, cap) over the sample for A < 0 (arXiv:2503.14286, eq. 9).

    The sign is the advantage's: with rewards of 0 and 1 none would be negative.
    """
    log_rho, A = x.log_rho().detach(), x.advantages
    sequence = x.samples.each(clamp_log_ratio(x.samples.sum(log_rho))).exp()
    weight = torch.where(A < 0, sequence.clamp(max=algo.cap), 1.0)
    never = torch.zeros_like(A, dtype=torch.bool)
    return Surrogate(-weight * A * x.logprobs, log_rho.exp(), (sequence > algo.cap) & (A < 0), never)


def aipo(x: Tokens, algo: AipoConfig) -> Surrogate:
    """−sg(min(ρ, cap))·A·log π (LlamaRL, arXiv:2505.24034); an infinite cap is plain importance sampling."""
    rho, A = x.log_rho().detach().exp(), x.advantages
    loss = -rho.clamp(max=algo.cap) * A * x.logprobs
    return Surrogate(loss, rho, (rho > algo.cap) & (A < 0), (rho > algo.cap) & (A > 0))


def aspo(x: Tokens, algo: AspoConfig) -> Surrogate:
    """A > 0: gradient −min(1/r, cap)·A·∇log π, none above r = 1 + clip_high; A ≤ 0: PPO's dual clip at cap.

    arXiv:2510.06062: PPO's r makes tokens that are already likely weigh most, so it is turned over. The cap truncates
    the weight and keeps the gradient.
    """
    ppo = _clip(x.log_ratio(), x.advantages, 1 - algo.clip_low, 1 + algo.clip_high, algo.cap)
    # exp(lp − sg lp): value 1, gradient ∇lp
    turned = (1 / ppo.ratio).clamp(max=algo.cap) * (x.logprobs - x.logprobs.detach()).exp()
    positive = torch.where(ppo.clipped_high, turned.detach(), turned) * x.advantages
    return Surrogate(torch.where(x.advantages > 0, -positive, ppo.loss), ppo.ratio, ppo.clipped_low, ppo.clipped_high)


def bapo(x: Tokens, algo: BapoConfig) -> Surrogate:
    """PPO's clip of ρ between bounds that the whole update decided (``algos.update.bapo_bounds``), dual for A < 0."""
    low, high = x.bounds or (algo.low_start, algo.high_start)
    return _clip(x.log_rho(), x.advantages, low, high, algo.dual_clip)


def opmd(x: Tokens, algo: OpmdConfig) -> Surrogate:
    """−A·log π + (τ/2)·(log ρ)² (Kimi k1.5, arXiv:2501.12599, eq. 3), A = R − R̄; τ = 0 is REINFORCE.

    ``square_of=sequence``: the square is of Σ log ρ over the sample, spread evenly over its tokens, so that under
    aggregation=seq_mean_token_sum_norm a sample has the paper's (τ/2)(log π(y)/π_beh(y))².
    """
    log_rho = x.log_rho()
    square = log_rho.square()
    if algo.square_of == "sequence":
        square = x.samples.each(x.samples.sum(log_rho).square() / x.samples.sizes)
    never = torch.zeros_like(x.advantages, dtype=torch.bool)
    loss = -x.advantages * x.logprobs + algo.tau / 2 * square
    return Surrogate(loss, log_rho.detach().exp(), never, never)


def dppo(x: Tokens, algo: DppoConfig) -> Surrogate:
    """−keep·ρ·A + penalty·(log ρ)²; keep = 0 where p_θ − p_beh > mask_high (A > 0) or < −mask_low (A < 0).

    prime-rl's default loss, whose advantages are R − R̄ without a deviation (std=none): a trust region in probability,
    which does not bind where both are tiny.
    """
    log_rho, A = x.log_rho(), x.advantages
    moved = x.logprobs.detach().exp() - x.behaviour.exp()
    masked = ((moved > algo.mask_high) & (A > 0)) | ((moved < -algo.mask_low) & (A < 0))
    rho = log_rho.exp()
    loss = -torch.where(masked, 0.0, rho * A) + algo.penalty * log_rho.square()
    return Surrogate(loss, rho.detach(), masked & (A < 0), masked & (A > 0), masked)


def reinforce(x: Tokens, algo: ReinforceConfig) -> Surrogate:
    """−A·log π (Williams 1992): no ratio to π_θ at all; only the correction's weight knows of other policies."""
    never = torch.zeros_like(x.advantages, dtype=torch.bool)
    return Surrogate(-x.advantages * x.logprobs, x.log_ratio().detach().exp(), never, never)


OBJECTIVES: dict[type[AlgoConfig], Callable[[Tokens, Any], Surrogate]] = {
    GrpoConfig: grpo,
    PpoConfig: grpo,
    GspoConfig: gspo,
    CispoConfig: cispo,
    SapoConfig: sapo,
    ToprConfig: topr,
    AipoConfig: aipo,
    AspoConfig: aspo,
    BapoConfig: bapo,
    OpmdConfig: opmd,
    DppoConfig: dppo,
    ReinforceConfig: reinforce,
}


def surrogate_of(x: Tokens, algo: AlgoConfig) -> Surrogate:
    """The algorithm's surrogate, or the user's own (algo.loss): (Tokens, settings) → [N] losses, or a Surrogate.

    Raises PluginError when the user's cannot be loaded, and ValueError when it gives anything else.
    """
    if not algo.loss:
        return OBJECTIVES[type(algo)](x, algo)
    function = bind(load(algo.loss, what="algo.loss"), algo.loss_settings, name=algo.loss, what="algo.loss_settings")
    given = function(x)
    if isinstance(given, Tensor):
        none = torch.zeros_like(x.advantages, dtype=torch.bool)
        given = Surrogate(given, x.log_ratio().detach().exp(), none, none)
    if not isinstance(given, Surrogate) or given.loss.shape != x.logprobs.shape:
        what = f"shape {tuple(given.loss.shape)}" if isinstance(given, Surrogate) else type(given).__name__
        shape = tuple(x.logprobs.shape)
        raise ValueError(f"algo.loss={algo.loss}: gave {what}, must give a loss of each token, {shape}")
    if torch.is_grad_enabled() and x.logprobs.requires_grad and not given.loss.requires_grad:
        raise ValueError(f"algo.loss={algo.loss}: gave a loss without a gradient; it must depend on tokens.logprobs")
    return given
