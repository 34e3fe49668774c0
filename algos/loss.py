"""The policy loss: one frozen record in, (loss, metrics) out.

The learner calls ``policy_loss`` once a micro-batch:

    correction (corrections.py)   anchor and weight of each token, and which are left out
    × surrogate (objectives.py)   the algorithm's: for GRPO −min(r·A, clip(r)·A); or algo.loss=module:function
    + kl_coef · KL (kl.py)        added after the weight
    − entropy_coef · entropy
    → Σ aggregation weight · …    (aggregation.py): micro-batches and ranks add up

What needs the whole update first (update.py) comes in as LossInput.keep, LossInput.advantages and ``prepared``.

Invariants: metrics carry no gradient and do not change the loss; rejected tokens give nothing but stay in every
denominator; the sum over any cut of an update's samples is the update's loss.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from offtrail.algos.config import ALGOS, AlgoConfig
from offtrail.algos.correction_config import CorrectionConfig
from offtrail.algos.corrections import Correction, correct
from offtrail.algos.kl import kl_estimate
from offtrail.algos.metrics import BINS, BUCKET_SUMS, BUCKETS, MAXIMA, SUMS, LossMetrics, bin_of
from offtrail.algos.objectives import OBJECTIVES, Surrogate, Tokens, clamp_log_ratio, surrogate_of
from offtrail.algos.samples import Samples
from offtrail.algos.update import Prepared

LN2 = 0.6931471805599453


@dataclass(frozen=True, slots=True)
class LossInput:
    """Answer tokens of the whole samples of one micro-batch, flat. Everything [N]; ``logprobs`` has a gradient,
    and where they stand in the loss ``entropy`` and ``full_kl``.

    Attributes:
        logprobs: lp_θ, at the sampling temperature.
        behaviour_logprobs: lp_beh, the engine's, at the sampling temperature.
        advantages: of each token.
        token_weights: aggregation weight of each token (``sample_weights`` of the whole update, indexed by sample).
        sample_index: int64, any numbering of the micro-batch's samples from 0.
        prox_logprobs: lp_prox; None = the parameters have not moved since the batch arrived, so lp_θ detached.
        ref_logprobs: lp_ref, needed for every algo.kl in the loss but full.
        staleness: integers, learner step − token version; None = no buckets.
        keep: bool; False rejects the token from the policy loss. None = all kept.
        entropy: over the vocabulary, of each token's distribution; with gradient where algo.entropy_coef is not 0.
        full_kl: exact KL(π_θ‖π_ref) at each token with gradient, needed when algo.kl=full.
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
    full_kl: Tensor | None = None

    def __post_init__(self) -> None:
        N = self.logprobs.shape
        for name in self.__slots__:
            value = getattr(self, name)
            if value is not None and (value.shape != N or value.dim() != 1):
                raise ValueError(f"LossInput.{name} has shape {tuple(value.shape)}, logprobs {tuple(N)}: all are [N]")


def policy_loss(
    inputs: LossInput, algo: AlgoConfig, correction: CorrectionConfig, prepared: Prepared | None = None
) -> tuple[Tensor, LossMetrics]:
    """The configured objective with an off-policy correction: a scalar with gradient, and its metrics.

    ``prepared``: what the whole update decided (``prepare_update``); its ``keep`` and ``advantages`` are already in
    ``inputs``, cut to this micro-batch.

    Raises:
        ValueError: what algo.kl or algo.entropy_coef needs is not there, or an unknown name.
    """
    prepared = prepared or Prepared()
    if type(algo) not in OBJECTIVES:
        raise ValueError(f"algo={algo.name}: allowed are {', '.join(ALGOS)}")
    samples = Samples.of(inputs.sample_index)
    theta, advantages = inputs.logprobs.detach(), inputs.advantages.detach()
    prox = theta if inputs.prox_logprobs is None else inputs.prox_logprobs.detach()
    behaviour = inputs.behaviour_logprobs.detach()
    corrected = correct(
        correction, theta, prox, behaviour, advantages, samples, staleness=inputs.staleness, level=algo.level
    )
    tokens = Tokens(inputs.logprobs, corrected.anchor, behaviour, advantages, samples, prepared.bounds)
    surrogate = surrogate_of(tokens, algo)
    corrected = _with_update(corrected, inputs.keep, prepared.weight_scale)
    per_token = corrected.weight * surrogate.loss
    if corrected.keep is not None:
        per_token = torch.where(corrected.keep, per_token, 0.0)
    policy = (inputs.token_weights * per_token).sum()
    kl, entropy = _kl(inputs, algo), _entropy(inputs, algo)
    loss_kl = None if kl is None else algo.kl_coef * (inputs.token_weights * kl).sum()
    loss_entropy = None if entropy is None else -algo.entropy_coef * (inputs.token_weights * entropy).sum()
    parts = [part for part in (policy, loss_kl, loss_entropy) if part is not None]
    metrics = _metrics(inputs, corrected, surrogate, samples, kl, (policy, loss_kl, loss_entropy))
    return torch.stack(parts).sum(), metrics


def _with_update(corrected: Correction, keep: Tensor | None, scale: float) -> Correction:
    """The correction with the update's mask and scale joined to its own."""
    if keep is not None:
        keep = keep if corrected.keep is None else keep & corrected.keep
        corrected = replace(corrected, keep=keep)
    return corrected if scale == 1 else replace(corrected, weight=corrected.weight * scale)


def _kl(inputs: LossInput, algo: AlgoConfig) -> Tensor | None:
    """[N] the KL term of each token, with gradient, where one stands in the loss."""
    if algo.kl == "none" or algo.kl_in == "reward":
        return None
    if algo.kl == "full":
        if inputs.full_kl is None:
            raise ValueError("algo.kl=full: the loss needs full_kl; give it, or set algo.kl=k3")
        return inputs.full_kl
    if inputs.ref_logprobs is None:
        raise ValueError(f"algo.kl={algo.kl}: the loss needs ref_logprobs; give them, or set algo.kl=none")
    return kl_estimate(algo.kl, inputs.logprobs, inputs.ref_logprobs, behaviour_logprobs=inputs.behaviour_logprobs)


def _entropy(inputs: LossInput, algo: AlgoConfig) -> Tensor | None:
    """[N] the entropy of each token, with gradient, where the loss has a bonus."""
    if algo.entropy_coef == 0:
        return None
    if inputs.entropy is None or not (inputs.entropy.requires_grad or not torch.is_grad_enabled()):
        raise ValueError(f"algo.entropy_coef={algo.entropy_coef}: the loss needs entropy with a gradient")
    return inputs.entropy


@torch.no_grad()
def _metrics(
    inputs: LossInput,
    corrected: Correction,
    surrogate: Surrogate,
    samples: Samples,
    kl: Tensor | None,
    losses: tuple[Tensor, Tensor | None, Tensor | None],
) -> LossMetrics:
    N = inputs.logprobs.numel()
    metrics = LossMetrics.empty(inputs.logprobs.device)
    if N == 0:
        return metrics
    # float64: squares of e^20 summed over millions of tokens
    log_w = corrected.log_w.double()
    w, applied, ratio = log_w.exp(), corrected.weight.double(), surrogate.ratio.double()
    if corrected.keep is not None:
        applied = torch.where(corrected.keep, applied, 0.0)
    far = log_w.abs()
    seq_w = clamp_log_ratio(samples.sum(log_w)).exp()
    seq_applied = samples.mean(applied)
    policy, loss_kl, loss_entropy = (0 if loss is None else loss.detach() for loss in losses)
    totals = {
        "tokens": N,
        "samples": samples.count,
        "ratio": ratio.sum(),
        "clip_low": surrogate.clipped_low.sum(),
        "clip_high": surrogate.clipped_high.sum(),
        "rejected": 0 if corrected.keep is None else (~corrected.keep).sum(),
        "masked": 0 if surrogate.masked is None else surrogate.masked.sum(),
        "w": w.sum(),
        "w2": w.square().sum(),
        "applied": applied.sum(),
        "applied2": applied.square().sum(),
        "log_w": log_w.sum(),
        "log_w2": log_w.square().sum(),
        "abs_log_w": far.sum(),
        "far": (far > LN2).sum(),
        "seq_w": seq_w.sum(),
        "seq_w2": seq_w.square().sum(),
        "seq_applied": seq_applied.sum(),
        "seq_applied2": seq_applied.square().sum(),
        "loss_policy": policy,
        "loss_kl": loss_kl,
        "loss_entropy": loss_entropy,
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
        rejected = torch.zeros_like(w) if corrected.keep is None else (~corrected.keep).double()
        sums = {
            "tokens": torch.ones_like(w), "abs_log_w": far, "w": w, "w2": w.square(), "clipped": clipped,
            "log_w": log_w, "log_w2": log_w.square(), "rejected": rejected,
        }  # fmt: skip
        rows = torch.stack([sums[name] for name in BUCKET_SUMS], dim=1)
        metrics.buckets.index_add_(0, inputs.staleness.long().clamp(0, BUCKETS - 1), rows)
    rho = clamp_log_ratio(inputs.logprobs.detach() - inputs.behaviour_logprobs).exp()
    metrics.histograms = torch.stack([torch.bincount(bin_of(v), minlength=BINS) for v in (far, rho)])
    return metrics
