"""What is relative to a group: rewards of the N samples of a batch → advantages centred in their groups.

Called by advantages.py (samples of a prompt) and process.py (steps of a prompt's samples). Invariant: equal rewards in
a group give exactly 0, and so does a group of one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from offtrail.algos.config import Std
from offtrail.algos.samples import per_group, spread


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
    check_rewards(rewards, group_of, std)
    if rewards.numel() == 0:
        return torch.zeros(0, dtype=torch.float32, device=rewards.device)
    groups = Groups(rewards, group_of)
    if std == "none":
        return groups.centred.float()
    divisor = (groups.size - 1).clamp_min(1) if std == "sample" else groups.size
    scale = (groups.sum(groups.centred.square()) / divisor).sqrt() + eps
    return torch.where(groups.signal, groups.centred / scale[groups.place], 0.0).float()


def rloo_advantages(rewards: Tensor, group_of: Tensor) -> Tensor:
    """A_i = R_i − mean of the *other* samples' rewards = G/(G − 1)·(R_i − mean) (RLOO, arXiv:2402.14740, eq. 8).

    [N], [N] → [N] float32; exactly 0 where a group's rewards are equal, and in a group of one. ValueError as above.
    """
    check_rewards(rewards, group_of, "none")
    if rewards.numel() == 0:
        return torch.zeros(0, dtype=torch.float32, device=rewards.device)
    groups = Groups(rewards, group_of)
    return (groups.centred * (groups.size / (groups.size - 1).clamp_min(1))[groups.place]).float()


class Groups:
    """Rewards by group, in float64: ``centred`` [N] is exactly 0 where ``signal`` [N] is False.

    Trap: the mean of equal rewards that are not dyadic (.1, 1/3) is off by an ulp, and dividing that by eps makes a
    gradient out of nothing. Equality is decided on the rewards themselves, not on the standard deviation.
    """

    def __init__(self, rewards: Tensor, group_of: Tensor) -> None:
        R = rewards.detach().double()
        _, self.place = torch.unique(group_of, return_inverse=True)
        self.count = int(self.place.max()) + 1
        self.size = self.sum(torch.ones_like(R))
        self.signal = spread(R, self.place, self.count)[self.place] > 0
        self.centred = torch.where(self.signal, R - (self.sum(R) / self.size)[self.place], 0.0)

    def sum(self, values: Tensor) -> Tensor:
        """[N] → [groups]."""
        return per_group(values, self.place, self.count)


def check_rewards(rewards: Tensor, group_of: Tensor, std: str) -> None:
    """Raise ValueError when shapes differ, a reward is not finite, or ``std`` is unknown."""
    if rewards.shape != group_of.shape or rewards.dim() != 1:
        raise ValueError(f"rewards {tuple(rewards.shape)} and group_of {tuple(group_of.shape)} must both be [N]")
    if std not in ("sample", "population", "none"):
        raise ValueError(f"std={std!r}: allowed are sample, population, none")
    if not bool(torch.isfinite(rewards).all()):
        raise ValueError("a reward is not finite")
