"""Group-relative advantages: rewards of N samples and the group of each → one advantage a sample."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Std = Literal["sample", "population", "none"]


def grpo_advantages(rewards: Tensor, group_of: Tensor, *, std: Std = "sample", eps: float = 1e-6) -> Tensor:
    """A_i = (R_i − mean) / (std + eps) within the group of sample i (GRPO, arXiv:2402.03300, §4.1.2).

    Invariant: A is exactly 0 in every group whose rewards are all equal, and in a group of one.

    Args:
        rewards: [N] floats, finite.
        group_of: [N] integers; samples with equal values form a group, in any order.
        std: divisor: over G − 1 (sample), over G (population), or none (Dr. GRPO, arXiv:2503.20783).
        eps: added to the standard deviation; unused with ``std="none"``.

    Returns:
        [N] float32, detached.

    Raises:
        ValueError: shapes differ, a reward is not finite, or ``std`` is unknown.
    """
    if rewards.shape != group_of.shape or rewards.dim() != 1:
        raise ValueError(f"rewards {tuple(rewards.shape)} and group_of {tuple(group_of.shape)} must both be [N]")
    if std not in ("sample", "population", "none"):
        raise ValueError(f"std={std!r}: allowed are sample, population, none")
    if not bool(torch.isfinite(rewards).all()):
        raise ValueError("a reward is not finite")
    if rewards.numel() == 0:
        return torch.zeros(0, dtype=torch.float32, device=rewards.device)
    R = rewards.detach().double()
    _, group = torch.unique(group_of, return_inverse=True)
    groups = int(group.max()) + 1
    size = _per_group(torch.ones_like(R), group, groups)
    centred = R - (_per_group(R, group, groups) / size)[group]
    if std == "none":
        scale = torch.ones_like(size)
    else:
        divisor = (size - 1).clamp_min(1) if std == "sample" else size
        scale = (_per_group(centred.square(), group, groups) / divisor).sqrt() + eps
    # Trap: the mean of equal rewards that are not dyadic (.1, 1/3) is off by an ulp, and dividing that by eps makes a
    # gradient out of nothing. Equality is decided on the rewards themselves, not on the standard deviation.
    infinity = torch.full((groups,), torch.inf, dtype=R.dtype, device=R.device)
    spread = (-infinity).scatter_reduce(0, group, R, "amax") - infinity.scatter_reduce(0, group, R, "amin")
    return torch.where(spread[group] > 0, centred / scale[group], 0.0).float()


def _per_group(values: Tensor, group: Tensor, groups: int) -> Tensor:
    return torch.zeros(groups, dtype=values.dtype, device=values.device).scatter_add(0, group, values)
