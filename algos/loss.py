"""The policy loss: one frozen record in, (loss, metrics) out.

The learner calls ``policy_loss`` once a micro-batch:

    correction (corrections.py)   anchor and weight of each token
    × surrogate (objectives.py)   −min(r·A, clip(r)·A)
    + kl_coef · KL (kl.py)        added after the weight
    → Σ aggregation weight · …    (aggregation.py): micro-batches and ranks add up

Invariants: metrics carry no gradient and do not change the loss; rejected tokens give nothing but stay in every
denominator; the sum over any cut of an update's samples is the update's loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from offtrail.algos.config import CorrectionConfig, GrpoConfig
from offtrail.algos.corrections import Correction, correct
from offtrail.algos.kl import kl_estimate
from offtrail.algos.metrics import BINS, BUCKETS, MAXIMA, SUMS, LossMetrics, bin_of
from offtrail.algos.objectives import Surrogate, clamp_log_ratio, ppo_clip

LN2 = 0.6931471805599453


@dataclass(frozen=True, slots=True)
class LossInput:
    """Answer tokens of the whole samples of one micro-batch, flat. Everything [N]; only ``logprobs`` has a gradient.

    Attributes:
        logprobs: lp_θ, at the sampling temperature.
        behaviour_logprobs: lp_beh, the engine's, at the sampling temperature.
        advantages: of each token's sample.
        token_weights: aggregation weight of each token (``sample_weights`` of the whole update, indexed by sample).
        sample_index: int64, any numbering of the micro-batch's samples from 0.
        prox_logprobs: lp_prox; None = the parameters have not moved since the batch arrived, so lp_θ detached.
        ref_logprobs: lp_ref, needed when algo.kl is not none.
        staleness: integers, learner step − token version; None = no buckets.
        keep: bool; False rejects the token from the policy loss. None = all kept.
        entropy: full-vocabulary entropy of each token's distribution, for the metric only.
    """

    logprobs: Tensor
    behaviour_logprobs: Tensor
    advantages: Tensor
    token_weights: Tensor
    sample_index: Tensor
    prox_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    staleness: Tensor | None = None
    keep: Tensor | None = None
    entropy: Tensor | None = None

    def __post_init__(self) -> None:
        N = self.logprobs.shape
        for name in self.__slots__:
            value = getattr(self, name)
            if value is not None and (value.shape != N or value.dim() != 1):
                raise ValueError(f"LossInput.{name} has shape {tuple(value.shape)}, logprobs {tuple(N)}: all are [N]")


def policy_loss(inputs: LossInput, algo: GrpoConfig, correction: CorrectionConfig) -> tuple[Tensor, LossMetrics]:
    """GRPO's loss (arXiv:2402.03300, eq. 3) with an off-policy correction: a scalar with gradient, and its metrics.

    Raises:
        ValueError: algo.kl asks for reference log-probabilities that are not there, or an unknown name.
    """
    prox = inputs.logprobs.detach() if inputs.prox_logprobs is None else inputs.prox_logprobs
    corrected = correct(correction, prox, inputs.behaviour_logprobs)
    surrogate = ppo_clip(
        inputs.logprobs, corrected.anchor, inputs.advantages, clip_low=algo.clip_low, clip_high=algo.clip_high
    )
    per_token = corrected.weight * surrogate.loss
    if inputs.keep is not None:
        per_token = torch.where(inputs.keep, per_token, 0.0)
    policy = (inputs.token_weights * per_token).sum()
    if algo.kl == "none":
        return policy, _metrics(inputs, corrected, surrogate, policy, None, 0.0)
    if inputs.ref_logprobs is None:
        raise ValueError(f"algo.kl={algo.kl}: the loss needs ref_logprobs; give them, or set algo.kl=none")
    kl = kl_estimate(algo.kl, inputs.logprobs, inputs.ref_logprobs)
    weighted_kl = algo.kl_coef * (inputs.token_weights * kl).sum()
    return policy + weighted_kl, _metrics(inputs, corrected, surrogate, policy, kl, float(weighted_kl.detach()))


@torch.no_grad()
def _metrics(
    inputs: LossInput, corrected: Correction, surrogate: Surrogate, policy: Tensor, kl: Tensor | None, loss_kl: float
) -> LossMetrics:
    N = inputs.logprobs.numel()
    metrics = LossMetrics.empty(inputs.logprobs.device)
    if N == 0:
        return metrics
    # float64: squares of e^20 summed over millions of tokens
    log_w = corrected.log_w.double()
    w, applied, ratio = log_w.exp(), corrected.weight.double(), surrogate.ratio.double()
    if inputs.keep is not None:
        applied = torch.where(inputs.keep, applied, 0.0)
    far = log_w.abs()
    samples, position = torch.unique(inputs.sample_index, return_inverse=True)
    seq_w = clamp_log_ratio(
        torch.zeros(len(samples), dtype=log_w.dtype, device=log_w.device).scatter_add(0, position, log_w)
    ).exp()
    totals = {
        "tokens": N,
        "samples": len(samples),
        "ratio": ratio.sum(),
        "clip_low": surrogate.clipped_low.sum(),
        "clip_high": surrogate.clipped_high.sum(),
        "rejected": 0 if inputs.keep is None else (~inputs.keep).sum(),
        "w": w.sum(),
        "w2": w.square().sum(),
        "applied": applied.sum(),
        "applied2": applied.square().sum(),
        "log_w": log_w.sum(),
        "abs_log_w": far.sum(),
        "far": (far > LN2).sum(),
        "seq_w": seq_w.sum(),
        "seq_w2": seq_w.square().sum(),
        "loss_policy": policy.detach(),
        "loss_kl": loss_kl,
        "kl_ref": 0 if kl is None else kl.detach().double().sum(),
        "ref_tokens": 0 if kl is None else N,
        "entropy": 0 if inputs.entropy is None else inputs.entropy.double().sum(),
        "entropy_tokens": 0 if inputs.entropy is None else N,
    }
    metrics.sums = torch.stack([torch.as_tensor(totals[name], dtype=torch.float64, device=w.device) for name in SUMS])
    peaks = {"w": w.max(), "abs_log_w": far.max(), "ratio": ratio.max()}
    metrics.maxima = torch.stack([peaks[name] for name in MAXIMA])
    if inputs.staleness is not None:
        clipped = (surrogate.clipped_low | surrogate.clipped_high).double()
        rows = torch.stack([torch.ones_like(w), far, w, w.square(), clipped], dim=1)
        metrics.buckets.index_add_(0, inputs.staleness.long().clamp(0, BUCKETS - 1), rows)
    rho = clamp_log_ratio(inputs.logprobs.detach() - inputs.behaviour_logprobs).exp()
    metrics.histograms = torch.stack([torch.bincount(bin_of(v), minlength=BINS) for v in (far, rho)])
    return metrics
