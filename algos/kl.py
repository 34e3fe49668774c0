"""Estimators of KL(π_θ‖π_ref) from the log-probability of the sampled token (Schulman, "Approximating KL divergence").

With d = lp_θ − lp_ref, for tokens drawn from π_θ:

    k1 = d               unbiased; as a loss its expected gradient is 0: it does not pull at all
    k2 = d²/2            biased value; as a loss its expected gradient is that of KL(π_θ‖π_ref)
    k3 = e^−d − 1 + d    unbiased, ≥ 0; as a loss its expected gradient is that of KL(π_ref‖π_θ) (GRPO's, eq. 4)

Trap: for tokens of an older policy none of this holds unless the estimate is weighted by π_θ/π_beh.
"""

from __future__ import annotations

from torch import Tensor

from offtrail.algos.config import KlKind
from offtrail.algos.objectives import clamp_log_ratio


def kl_estimate(kind: KlKind, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Per-token estimate [N], differentiable in ``logprobs`` [N]. ValueError on an unknown kind or on ``none``."""
    d = clamp_log_ratio(logprobs - ref_logprobs.detach())
    if kind == "k1":
        return d
    if kind == "k2":
        return d.square() / 2
    if kind == "k3":
        # expm1: for d of 1e-4 the sum e^−d − 1 + d cancels to noise in float32
        return (-d).expm1() + d
    raise ValueError(f"algo.kl={kind}: allowed are k1, k2, k3")
