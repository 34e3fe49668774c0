"""What a loss takes from the whole optimizer update, before it is cut into micro-batches and ranks.

The learner calls ``prepare_update`` once an update where ``needs_whole_update(algo, correction)`` says so, with *every*
token of the update (all ranks, gathered), and hands the result to each micro-batch's ``policy_loss``.

Invariant: everything here is a function of the whole update, the same on every rank, so no cut can change it.

What is approximated, and why: BAPO and M2PO decide by π_θ at the moment of the update. Here π_prox stands for it, known
before the update without a further forward pass: exact in the first of a step's K updates, where θ *is* prox; later
ones do not see what the updates before them have moved.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from offtrail.algos.advantages import optimal_baseline
from offtrail.algos.config import AlgoConfig, BapoConfig
from offtrail.algos.correction_config import CorrectionConfig, M2poConfig, SeqTisConfig, VcpoConfig, WeightConfig
from offtrail.algos.corrections import correct, sequence_weights
from offtrail.algos.objectives import clamp_log_ratio
from offtrail.algos.samples import Samples


@dataclass(frozen=True, slots=True)
class Prepared:
    """``bounds`` of the ratio (BAPO; (0, ∞): M2PO); ``keep`` [N] bool for LossInput.keep, ``advantages`` [N] in place
    of the given ones (None: unchanged); ``weight_scale`` multiplies the weights, ``lr_scale`` the learning rate.
    """

    bounds: tuple[float, float] | None = None
    keep: Tensor | None = None
    advantages: Tensor | None = None
    weight_scale: float = 1.0
    lr_scale: float = 1.0


@torch.no_grad()
def prepare_update(
    algo: AlgoConfig,
    correction: CorrectionConfig,
    *,
    logprobs: Tensor,
    behaviour_logprobs: Tensor,
    advantages: Tensor,
    sample_index: Tensor,
    rewards: Tensor | None = None,
    group_of: Tensor | None = None,
    square_norms: Tensor | None = None,
) -> Prepared:
    """Decide for the N tokens of the S samples of one update.

    Args:
        algo: the objective.
        correction: the correction.
        logprobs: [N] lp_prox (or lp_θ, where someone can afford it).
        behaviour_logprobs: [N].
        advantages: [N].
        sample_index: [N] integers, ascending order of samples = order of the [S] tensors; samples without tokens must
            not stand in those.
        rewards: [S], for correction.baseline.
        group_of: [S], for correction.baseline=group.
        square_norms: [S] squared gradient norms of each sample's log-probability; None = ``score_norms`` of logprobs.

    Raises:
        ValueError: correction.baseline asks for rewards or groups that are not there.
    """
    samples = Samples.of(sample_index)
    if isinstance(algo, BapoConfig):
        return Prepared(bounds=bapo_bounds(algo, clamp_log_ratio(logprobs - behaviour_logprobs).exp(), advantages))
    if isinstance(correction, M2poConfig):
        keep = m2po_keep(clamp_log_ratio(logprobs - behaviour_logprobs), advantages, correction.limit)
        return Prepared(bounds=(0.0, torch.inf), keep=keep)
    scale = 1.0
    if isinstance(correction, WeightConfig) and correction.normalise:
        weighed = correct(correction, logprobs, logprobs, behaviour_logprobs, advantages, samples, level=algo.level)
        applied = weighed.weight if weighed.keep is None else torch.where(weighed.keep, weighed.weight, 0.0)
        # One weight a sample: their mean is over samples, or long samples would decide it.
        each = samples.mean(applied) if isinstance(correction, SeqTisConfig) else applied
        mean = float(each.double().mean())
        scale = 1 / mean if mean > 0 else 1.0
    if not isinstance(correction, VcpoConfig):
        return Prepared(weight_scale=scale)
    w = sequence_weights(logprobs, behaviour_logprobs, samples)
    return Prepared(
        advantages=_vcpo_advantages(correction, w, logprobs, samples, rewards, group_of, square_norms),
        weight_scale=scale,
        lr_scale=vcpo_lr_scale(w),
    )


def _vcpo_advantages(
    correction: VcpoConfig,
    w: Tensor,
    logprobs: Tensor,
    samples: Samples,
    rewards: Tensor | None,
    group_of: Tensor | None,
    square_norms: Tensor | None,
) -> Tensor | None:
    if correction.baseline == "none":
        return None
    if rewards is None or (group_of is None and correction.baseline == "group"):
        raise ValueError(f"correction.baseline={correction.baseline}: needs rewards and group_of of each sample")
    group = group_of if group_of is not None and correction.baseline == "group" else torch.zeros_like(samples.sizes)
    norms = score_norms(logprobs, samples) if square_norms is None else square_norms
    return samples.each(rewards.float() - optimal_baseline(rewards, w, norms, group))


def vcpo_lr_scale(weights: Tensor) -> float:
    """√min(1, ESS/B) of the raw sequence weights [B], ESS = (Σw)²/Σw² (VCPO, arXiv:2602.17616).

    Equal weights: 1; one-hot: 1/√B; none: 1.
    """
    w = weights.double()
    squares = float(w.square().sum())
    return min(1.0, float(w.sum()) ** 2 / (len(w) * squares)) ** 0.5 if squares > 0 else 1.0


def score_norms(logprobs: Tensor, samples: Samples) -> Tensor:
    """[S] a stand-in for ‖∇log π(sample)‖²: Σ_t (1 − p_t)², each token's squared slope to its own logit.

    It leaves out the other logits, the network below them, and correlations between tokens; what it keeps is that long
    and surprising samples have large gradients.
    """
    return samples.sum((1 - logprobs.exp()).square())


def m2po_keep(log_ratio: Tensor, advantages: Tensor, limit: float) -> Tensor:
    """[N] bool: M2PO's mask (arXiv:2510.01161, algorithm 1), False for as few tokens as possible.

    Among tokens that a clip could act on, (A > 0, r > 1) or (A < 0, r < 1), those of the largest (log r)² are left out
    until the mean of the others' is ≤ ``limit``. The rest always stays. Ties are left out in order of place.
    """
    candidate = ((advantages > 0) & (log_ratio > 0)) | ((advantages < 0) & (log_ratio < 0))
    m2 = log_ratio.double().square()[candidate]
    if len(m2) == 0:
        return torch.ones_like(candidate)
    order = m2.argsort(stable=True)
    means = m2[order].cumsum(0) / torch.arange(1, len(m2) + 1, device=m2.device)
    # The means of ascending values ascend, so those within the limit come first.
    kept = torch.zeros_like(m2, dtype=torch.bool)
    kept[order] = means <= limit
    keep = torch.ones_like(candidate)
    keep[candidate] = kept
    return keep


def bapo_bounds(algo: BapoConfig, ratio: Tensor, advantages: Tensor) -> tuple[float, float]:
    """BAPO's (low, high) for an update (arXiv:2510.18927, algorithm 1); ``ratio`` and ``advantages`` [N].

    Every token contributes r·|A|. low rises first, then high, until positive tokens reach their share or both are at
    their end (so without any positive token they go there). What a token beyond its bound contributes:

    ``unclipped``  nothing, as it has no gradient: a higher low silences negative tokens far below 1, a higher high
                   lets positive ones back in, as in the paper's figure 1
    ``clipped``    bound·|A|, as in the authors' code: there a higher low lets negative tokens count *more*, so that
                   it never helps by itself, and what balances is high. Its target, adv_ratio_target, is positive over
                   negative: positive_share/(1 − positive_share).
    """
    A, r = advantages.double(), ratio.double()
    (up, r_up), (down, r_down) = ((A[side].abs(), r[side]) for side in (A > 0, A < 0))

    def short(low: float, high: float) -> bool:
        if algo.counted == "clipped":
            positive, negative = up @ r_up.clamp(max=high), down @ r_down.clamp(min=low)
        else:
            positive, negative = up @ (r_up * (r_up <= high)), down @ (r_down * (r_down >= low))
        return float(positive) < algo.positive_share * float(positive + negative)

    low, high = algo.low_start, algo.high_start
    for low_next in _raised(low, algo.low_end, algo.low_step):
        if not short(low, high):
            return low, high
        low = low_next
    for high_next in _raised(high, algo.high_end, algo.high_step):
        if not short(low, high):
            return low, high
        high = high_next
    return low, high


def _raised(start: float, end: float, step: float) -> list[float]:
    """Steps from ``start``, which is not among them, to ``end``, which is."""
    steps = math.ceil((end - start) / step - 1e-9)
    return [start + i * step for i in range(1, steps)] + [end] * (steps > 0)
