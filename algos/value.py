"""The critic's loss and what it says of the critic: values and returns of tokens in, sums out.

Invariant: everything is a sum over tokens, with weights of the whole update, so micro-batches and ranks add up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SUMS = ("tokens", "loss", "clipped", "value", "returns", "returns2", "error", "error2")


@dataclass(slots=True)
class ValueMetrics:
    """``sums`` [len(SUMS)] float64, detached, on the loss's device."""

    sums: Tensor

    def __add__(self, other: ValueMetrics) -> ValueMetrics:
        return ValueMetrics(self.sums + other.sums)

    def means(self, updates: int = 1) -> dict[str, float]:
        """Named metrics of everything added (docs/metrics.md); empty without tokens.

        Explained variance is 1 − Var(R − V)/Var(R), and 0 where all returns are equal: there is nothing to explain.
        """
        s = dict(zip(SUMS, self.sums.tolist(), strict=True))
        N = s["tokens"]
        if N == 0:
            return {}
        spread = s["returns2"] / N - (s["returns"] / N) ** 2
        unexplained = s["error2"] / N - (s["error"] / N) ** 2
        return {
            "value/loss": s["loss"] / updates,
            "value/clip_fraction": s["clipped"] / N,
            "value/mean": s["value"] / N,
            "value/return_mean": s["returns"] / N,
            # A variance of float64 sums is exact to about 1e-12 of the squares it is the difference of.
            "value/explained_variance": 1 - unexplained / spread if spread > 1e-12 * s["returns2"] / N else 0.0,
        }


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, token_weights: Tensor, *, clip: float
) -> tuple[Tensor, ValueMetrics]:
    """Σ weight · ½·max((V − R)², (V_clip − R)²) with V_clip = V_old + clip(V − V_old, ±clip).

    The clipped value loss of PPO's implementations (Schulman et al.'s baselines; ½ as in arXiv:2203.02155's code base).
    A token counts as clipped where |V − V_old| > clip and the clipped term is the larger one: there V gets no gradient.

    Args:
        values: [N], with gradient.
        old_values: [N], the critic's before the batch's first update.
        returns: [N], A + V_old before the advantages are whitened.
        token_weights: [N], of the whole update.
        clip: ≥ 0; 0 = off.
    """
    old, target = old_values.detach(), returns.detach()
    plain = (values - target).square()
    if clip:
        moved = values - old
        clipped_term = (old + moved.clamp(-clip, clip) - target).square()
        squares = torch.maximum(plain, clipped_term)
        # Inside the range V_old + (V − V_old) differs from V by rounding, and so do the two terms.
        clipped = (moved.detach().abs() > clip) & (clipped_term.detach() > plain.detach())
    else:
        squares, clipped = plain, torch.zeros_like(plain, dtype=torch.bool)
    loss = 0.5 * (token_weights * squares).sum()
    V, R = values.detach().double(), target.double()
    totals = {
        "tokens": len(V),
        "loss": loss.detach(),
        "clipped": clipped.sum(),
        "value": V.sum(),
        "returns": R.sum(),
        "returns2": R.square().sum(),
        "error": (R - V).sum(),
        "error2": (R - V).square().sum(),
    }
    sums = torch.stack([torch.as_tensor(totals[name], dtype=torch.float64, device=V.device) for name in SUMS])
    return loss, ValueMetrics(sums)
