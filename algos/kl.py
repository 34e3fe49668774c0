"""Estimators of KL(π_θ‖π_ref) from the log-probability of the sampled token (Schulman, "Approximating KL divergence").

With d = lp_θ − lp_ref, for tokens drawn from π_θ:

    k1            d               unbiased; as a loss its expected gradient is 0: it does not pull (refused there)
    k2            d²/2            biased value; as a loss its expected gradient is that of KL(π_θ‖π_ref)
    k3            e^−d − 1 + d    unbiased, ≥ 0; as a loss its expected gradient is that of KL(π_ref‖π_θ) (GRPO, eq. 4)
    k3_weighted   ρ·k3            ρ = π_θ/π_beh attached: value and gradient of KL(π_θ‖π_ref), for tokens of any policy
                                  (DeepSeek-V3.2, arXiv:2512.02556, eq. 7)
    full          Σ_v p log p/q   exact at each visited prefix, over the whole vocabulary

In the reward (algo.kl_in=reward) the estimate is detached and its sign turned: k1 then has KL(π_θ‖π_ref)'s gradient, k3
has not.

Trap: for tokens of an older policy none of the unweighted ones holds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from offtrail.algos.config import KlKind
from offtrail.algos.objectives import clamp_log_ratio


def kl_estimate(
    kind: KlKind, logprobs: Tensor, ref_logprobs: Tensor, *, behaviour_logprobs: Tensor | None = None
) -> Tensor:
    """Per-token estimate [N], differentiable in ``logprobs`` [N].

    ``behaviour_logprobs`` [N]: for k3_weighted. Raises ValueError on an unknown kind, ``none``, or ``full``, which is
    no function of the sampled token (``full_kl``).
    """
    d = clamp_log_ratio(logprobs - ref_logprobs.detach())
    if kind == "k1":
        return d
    if kind == "k2":
        return d.square() / 2
    # expm1: for d of 1e-4 the sum e^−d − 1 + d cancels to noise in float32
    if kind == "k3":
        return (-d).expm1() + d
    if kind == "k3_weighted":
        if behaviour_logprobs is None:
            raise ValueError("algo.kl=k3_weighted: needs the behaviour log-probabilities")
        return clamp_log_ratio(logprobs - behaviour_logprobs.detach()).exp() * ((-d).expm1() + d)
    raise ValueError(f"algo.kl={kind}: allowed are k1, k2, k3, k3_weighted")


def full_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(π‖π_ref) of a chunk of tokens over the whole vocabulary: two [c, V] → [c] float32, gradient to the first.

    For the learner's chunked head, which never holds more than a chunk of logits. Its gradient to the logits is
    p·(log p − log q − KL), which a head that recomputes chunks in backward can write out (``full_kl_grad``).
    """
    p, q = torch.log_softmax(logits.float(), -1), torch.log_softmax(ref_logits.detach().float(), -1)
    return (p.exp() * (p - q)).sum(-1)


def full_kl_grad(logp: Tensor, ref_logp: Tensor, kl: Tensor) -> Tensor:
    """∂KL/∂logits [c, V] of a chunk: p·(log p − log q − KL), from log-softmaxes [c, V] and ``kl`` [c]."""
    return logp.exp() * (logp - ref_logp - kl.unsqueeze(-1))
