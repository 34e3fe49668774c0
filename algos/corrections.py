"""Off-policy corrections: which policy the ratio is taken to, what weight a token's loss gets, and which are left out.

With w = π_prox/π_beh at each token, S = its sample:

    none       r = π_θ/π_beh, weight 1 (bypass: the ratio already holds the importance weight; so an objective must
               have one, which REINFORCE has not: refused)
    uncorrected  r = π_θ/π_prox, weight 1: staleness is ignored, the control of comparisons
    decoupled  r = π_θ/π_prox, weight w, without a cap
    a3po       the same with log π_prox interpolated between π_beh and π_θ
    tis        … weight min(w, cap)
    seq_tis    … weight min(∏_S w, cap); vcpo: the same, with a smaller step (algos/update.py)
    icepop     … weight w where low ≤ w ≤ high, else left out
    geo        … S left out unless low ≤ exp(mean_S log w) ≤ high
    k3_filter  … S left out where mean_S (w − 1 − log w) > limit
    veto       … S left out where any w < floor
    seq_mask   r = π_θ/π_beh; S left out where A < 0 and mean_S (log π_beh − log π_θ) > limit
    m2po       r = π_θ/π_beh, no clip; the update's farthest tokens left out (algos/update.py)

Invariants: w ≡ 1 leaves every one of them PPO's own loss. Weights are detached, multiply before the KL term, are
truncated first and normalised after; log-ratios are clamped at ±20. What is left out stays in every denominator.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from offtrail.algos.config import Level
from offtrail.algos.correction_config import (
    CORRECTIONS,
    A3poConfig,
    Age,
    CorrectionConfig,
    FilterConfig,
    GeoConfig,
    IcepopConfig,
    K3FilterConfig,
    SeqMaskConfig,
    SeqTisConfig,
    TisConfig,
    UncorrectedConfig,
    VetoConfig,
    WeightConfig,
)
from offtrail.algos.objectives import clamp_log_ratio
from offtrail.algos.samples import Samples


@dataclass(frozen=True, slots=True)
class Correction:
    """All [N], detached. ``anchor``: log-probabilities the ratio is taken to; ``weight`` multiplies the policy loss
    (never the KL term); ``keep`` is False where a rule leaves the token out (None: all kept); ``log_w``: the clamped
    raw log w, for diagnostics whatever the correction.
    """

    anchor: Tensor
    weight: Tensor
    log_w: Tensor
    keep: Tensor | None = None


@torch.no_grad()
def correct(
    config: CorrectionConfig,
    logprobs: Tensor,
    prox_logprobs: Tensor,
    behaviour_logprobs: Tensor,
    advantages: Tensor,
    samples: Samples,
    *,
    staleness: Tensor | None = None,
    level: Level = "token",
) -> Correction:
    """Apply the configured correction (decoupled PPO and its truncation: AReaL, arXiv:2505.24298, eq. 5). All [N].

    Args:
        config: which one.
        logprobs: lp_θ, for seq_mask and a3po only.
        prox_logprobs: lp_prox.
        behaviour_logprobs: lp_beh.
        advantages: their sign decides for seq_mask.
        samples: whose tokens they are; every sample is whole.
        staleness: learner step − token version, needed by a3po.
        level: ``sequence`` puts exp(mean_S log w) in w's place, for an objective whose ratio is such a mean too (GSPO),
            so that the product of both is again independent of π_prox.

    Trap: multiplying a ratio to the behaviour policy by w again would count the importance weight twice, so ``none``
    leaves prox out of the loss altogether. Raises ValueError on a correction this file does not know.
    """
    prox, beh = prox_logprobs, behaviour_logprobs
    log_w = clamp_log_ratio(prox - beh)
    one = torch.ones_like(log_w)
    if isinstance(config, A3poConfig):
        prox = interpolated_prox(logprobs, beh, staleness, age=config.age)
        return Correction(prox, _level(clamp_log_ratio(prox - beh), samples, level).exp(), log_w)
    if isinstance(config, WeightConfig):
        weight, keep = _weigh(config, log_w, samples, level)
        return Correction(prox, weight, log_w, keep)
    if isinstance(config, FilterConfig):
        keep = samples.each(_filter(config, log_w, samples))
        return Correction(
            prox, _level(log_w, samples, level).exp().clamp(max=config.cap) if config.cap else one, log_w, keep
        )
    if isinstance(config, UncorrectedConfig):
        return Correction(prox, one, log_w)
    if isinstance(config, SeqMaskConfig):
        away = samples.each(samples.mean(beh - logprobs))
        return Correction(beh, one, log_w, (advantages >= 0) | (away <= config.limit))
    if config.name in ("none", "m2po"):
        return Correction(beh, one, log_w)
    raise ValueError(f"correction={config.name}: allowed are {', '.join(CORRECTIONS)}")


def interpolated_prox(
    logprobs: Tensor, behaviour_logprobs: Tensor, staleness: Tensor | None, *, age: Age = "trained"
) -> Tensor:
    """A-3PO (arXiv:2512.06547): lp_beh + α·(lp_θ − lp_beh), α = (d − 1)/d, without a forward pass.

    ``trained``: d = step − version, the staleness, as in the paper and in AReaL, which counts θ as the version that is
    being trained; so a token of staleness 1 has α = 0, and one of staleness 0 too. ``made``: d is one more, the
    distance to the version that the step makes; π_prox, s versions on from π_beh, then lies at α = s/(s + 1).
    """
    if staleness is None:
        raise ValueError("correction=a3po: the loss needs each token's staleness")
    d = staleness.to(logprobs.dtype) + (age == "made")
    return behaviour_logprobs + (1 - 1 / d.clamp(min=1)) * (logprobs.detach() - behaviour_logprobs)


def _level(log_w: Tensor, samples: Samples, level: Level) -> Tensor:
    return samples.each(samples.mean(log_w)) if level == "sequence" else log_w


def _weigh(config: WeightConfig, log_w: Tensor, samples: Samples, level: Level) -> tuple[Tensor, Tensor | None]:
    """(weight, keep), each [N]."""
    if isinstance(config, SeqTisConfig):
        return samples.each(clamp_log_ratio(samples.sum(log_w)).exp().clamp(max=config.cap)), None
    w = _level(log_w, samples, level).exp()
    if isinstance(config, TisConfig):
        return w.clamp(max=config.cap), None
    if isinstance(config, IcepopConfig):
        return w, (w >= config.low) & (w <= config.high)
    return w, None


def _filter(config: FilterConfig, log_w: Tensor, samples: Samples) -> Tensor:
    """[S] bool: which samples stay."""
    if isinstance(config, GeoConfig):
        mean = samples.mean(log_w).exp()
        return (mean >= config.low) & (mean <= config.high)
    if isinstance(config, K3FilterConfig):
        # expm1: w − 1 − log w cancels to noise near 0
        return samples.mean(log_w.expm1() - log_w) <= config.limit
    if isinstance(config, VetoConfig):
        return ~samples.any(log_w.exp() < config.floor)
    raise ValueError(f"correction={config.name}: allowed are {', '.join(CORRECTIONS)}")


def sequence_weights(prox_logprobs: Tensor, behaviour_logprobs: Tensor, samples: Samples) -> Tensor:
    """[S] ∏w over each sample, raw but for the clamp of its logarithm at ±20."""
    return clamp_log_ratio(samples.sum(clamp_log_ratio(prox_logprobs - behaviour_logprobs))).exp()
