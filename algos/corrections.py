"""Off-policy corrections: which policy the ratio is taken to, and what weight the token's loss gets.

With w = π_prox/π_beh at each token:

    none       r = π_θ/π_beh, weight 1 (bypass: the ratio already holds the importance weight)
    decoupled  r = π_θ/π_prox, weight w
    tis        r = π_θ/π_prox, weight min(w, cap)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from offtrail.algos.config import CorrectionConfig, DecoupledConfig, TisConfig
from offtrail.algos.objectives import clamp_log_ratio


@dataclass(frozen=True, slots=True)
class Correction:
    """All [N], detached. ``anchor``: log-probabilities the ratio is taken to; ``weight`` multiplies the policy loss
    (never the KL term); ``log_w``: the clamped raw log w, for diagnostics whatever the correction.
    """

    anchor: Tensor
    weight: Tensor
    log_w: Tensor


def correct(config: CorrectionConfig, prox_logprobs: Tensor, behaviour_logprobs: Tensor) -> Correction:
    """Apply the configured correction (decoupled PPO and its truncation: AReaL, arXiv:2505.24298, eq. 5).

    Trap: multiplying a ratio to the behaviour policy by w again would count the importance weight twice, so ``none``
    leaves prox out of the loss altogether. Raises ValueError on a correction this file does not know.
    """
    prox, beh = prox_logprobs.detach(), behaviour_logprobs.detach()
    log_w = clamp_log_ratio(prox - beh)
    if isinstance(config, TisConfig):
        return Correction(prox, log_w.exp().clamp(max=config.cap), log_w)
    if isinstance(config, DecoupledConfig):
        return Correction(prox, log_w.exp(), log_w)
    if config.name == "none":
        return Correction(beh, torch.ones_like(log_w), log_w)
    raise ValueError(f"correction={config.name}: allowed are none, tis, decoupled")
