"""Advantage estimators: rewards of the N samples of a whole batch → an advantage for each of its T output tokens.

Invariants: everything is computed on the whole batch, the same on every rank, so whitening is global and no cut into
ranks or micro-batches can change it; equal rewards in a group give exactly 0 (group-relative estimators).

Tokens lie sample by sample: those of sample i are the next lengths[i] ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from offtrail.algos.config import AlgoConfig, PpoConfig, Std


@dataclass(frozen=True, slots=True)
class Advantages:
    """``tokens`` [T]: the advantage of each token. ``returns`` [T]: what the critic learns, None without one."""

    tokens: Tensor
    returns: Tensor | None = None


def estimate(
    algo: AlgoConfig,
    rewards: Tensor,
    group_of: Tensor,
    lengths: Tensor,
    *,
    kl: Tensor | None = None,
    values: Tensor | None = None,
) -> Advantages:
    """The configured estimator (algo.advantage), with the KL penalty in the reward where algo.kl_in says so.

    Args:
        algo: the algorithm.
        rewards: [N] terminal rewards, shaping included.
        group_of: [N] integers.
        lengths: [N] output tokens of each sample.
        kl: [T] estimates lp_prox against lp_ref (``kl_estimate``), for algo.kl_in=reward. Estimators that look at whole
            samples (group, rloo, reward) take each sample's sum, as RLOO does (arXiv:2402.14740).
        values: [T] the critic's values before the update, for gae.

    Returns:
        float32, detached. A sample without tokens counts in its group.

    Raises:
        ValueError: shapes differ, a reward is not finite, or kl or values are missing.
    """
    coef = 0.0
    if algo.kl_in == "reward" and algo.kl != "none":
        if kl is None:
            raise ValueError("algo.kl_in=reward: the advantages need the KL estimate of each token")
        coef = algo.kl_coef
    penalty = torch.zeros(int(lengths.sum())) if kl is None else kl.detach() * coef
    penalty = penalty.double().to(rewards.device)
    if algo.advantage == "gae":
        assert isinstance(algo, PpoConfig)
        if values is None:
            raise ValueError("algo.advantage=gae: the advantages need the critic's values")
        return _critic(algo, rewards, lengths, penalty, values)
    if algo.advantage in ("reinforce_pp", "reinforce_pp_baseline"):
        baseline = algo.advantage == "reinforce_pp_baseline"
        tokens = reinforce_pp_advantages(
            rewards, group_of, lengths, penalty=penalty, baseline=baseline, std=algo.std, eps=algo.std_eps
        )
        return Advantages(tokens)
    total = rewards.double() - _per_sample(penalty, lengths)
    if algo.advantage == "group":
        each = grpo_advantages(total, group_of, std=algo.std, eps=algo.std_eps)
    elif algo.advantage == "rloo":
        each = rloo_advantages(total, group_of)
    else:
        each = total.float()
    return Advantages(each.repeat_interleave(lengths))


def _critic(algo: PpoConfig, rewards: Tensor, lengths: Tensor, penalty: Tensor, values: Tensor) -> Advantages:
    lam = adaptive_lambda(lengths, algo.gae_alpha) if algo.gae_alpha else algo.gae_lambda
    step_rewards = terminal_rewards(rewards, lengths) - penalty
    advantages = gae(step_rewards, values, lengths, gamma=algo.gamma, lam=lam)
    learnt = gae(step_rewards, values, lengths, gamma=algo.gamma, lam=algo.value_lambda)
    # Trap: returns are A + V of the advantages *before* whitening.
    return Advantages(whiten(advantages, std=algo.std, eps=algo.std_eps), (learnt + values.detach()).float())


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
    _check(rewards, group_of, std)
    if rewards.numel() == 0:
        return torch.zeros(0, dtype=torch.float32, device=rewards.device)
    groups = _Groups(rewards, group_of)
    if std == "none":
        return groups.centred.float()
    divisor = (groups.size - 1).clamp_min(1) if std == "sample" else groups.size
    scale = (groups.sum(groups.centred.square()) / divisor).sqrt() + eps
    return torch.where(groups.signal, groups.centred / scale[groups.place], 0.0).float()


def rloo_advantages(rewards: Tensor, group_of: Tensor) -> Tensor:
    """A_i = R_i − mean of the *other* samples' rewards = G/(G − 1)·(R_i − mean) (RLOO, arXiv:2402.14740, eq. 8).

    [N], [N] → [N] float32; exactly 0 where a group's rewards are equal, and in a group of one. ValueError as above.
    """
    _check(rewards, group_of, "none")
    if rewards.numel() == 0:
        return torch.zeros(0, dtype=torch.float32, device=rewards.device)
    groups = _Groups(rewards, group_of)
    return (groups.centred * (groups.size / (groups.size - 1).clamp_min(1))[groups.place]).float()


def reinforce_pp_advantages(
    rewards: Tensor,
    group_of: Tensor,
    lengths: Tensor,
    *,
    penalty: Tensor | None = None,
    baseline: bool = False,
    std: Std = "sample",
    eps: float = 1e-6,
) -> Tensor:
    """Returns-to-go of each token, whitened over all tokens of the batch (REINFORCE++, arXiv:2501.03262, eq. 8).

    Args:
        rewards: [N] terminal rewards.
        group_of: [N] integers.
        lengths: [N] tokens of each sample.
        penalty: [T] taken from each token's reward.
        baseline: the group's mean is subtracted first, and whitening then only divides: over samples that mean is 0
            already, and shifting by the mean over *tokens* would give groups without signal an advantage made of the
            other groups' lengths. Without a penalty such groups are exactly 0.
        std: of the whitening; eps: added to it.
        eps: see std.

    Returns:
        [T] float32. Exactly 0 where all tokens of the batch have the same return.
    """
    _check(rewards, group_of, std)
    R = _Groups(rewards, group_of).centred if baseline and rewards.numel() else rewards.double()
    tokens = terminal_rewards(R, lengths)
    if penalty is not None:
        tokens = tokens - penalty.double()
    returns = _backwards(tokens, lengths, torch.ones(len(lengths), dtype=torch.float64, device=rewards.device))
    return whiten(returns, std=std, eps=eps, centre=not baseline)


def step_leave_one_out(step_rewards: Tensor, step_sample: Tensor, group_of: Tensor, *, gamma: float = 1.0) -> Tensor:
    """Leave-one-out over steps: Σ_{s ≥ t} γ^{s−t}·(r_s − mean of the other samples' mean step reward).

    PRIME's process part (arXiv:2502.01456, eq. 5); the outcome part is ``rloo_advantages``, added by the caller.

    Args:
        step_rewards: [P] of the steps, sample by sample, in order.
        step_sample: [P] int64 ascending: the sample of each step, a place in ``group_of``.
        group_of: [N] integers.
        gamma: discount from one step to the next.

    Returns:
        [P] float32. Exactly 0 in a group whose step rewards are all equal, and in a group of one. Samples without steps
        do not count as others.
    """
    r = step_rewards.detach().double()
    N = len(group_of)
    counts = torch.bincount(step_sample, minlength=N)
    mean = torch.zeros(N, dtype=r.dtype, device=r.device).scatter_add(0, step_sample, r) / counts.clamp_min(1)
    _, group = torch.unique(group_of, return_inverse=True)
    groups = int(group.max()) + 1 if N else 0
    has = (counts > 0).double()
    total, size = _per_group(mean * has, group, groups), _per_group(has, group, groups)
    others = size[group] - has
    baseline = ((total[group] - mean * has) / others.clamp_min(1))[step_sample]
    place = group[step_sample]
    signal = (_spread(r, place, groups)[place] > 0) & (others[step_sample] > 0)
    centred = torch.where(signal, r - baseline, 0.0)
    return _backwards(centred, counts, torch.full((N,), gamma, dtype=r.dtype, device=r.device)).float()


def optimal_baseline(rewards: Tensor, weights: Tensor, square_norms: Tensor, group_of: Tensor) -> Tensor:
    """The baseline of least variance off-policy, b = Σ w²‖g‖²R / Σ w²‖g‖² over each group (VCPO, arXiv:2602.17616).

    Args:
        rewards: [N].
        weights: [N] raw importance weights of whole samples.
        square_norms: [N] ‖g‖², squared gradient norms of each sample's log-probability, or a proxy.
        group_of: [N] integers; all equal = one baseline.

    Returns:
        [N] float32, each sample's baseline. Equal rewards give that reward exactly.
    """
    R = rewards.double()
    share = weights.double().square() * square_norms.double()
    _, group = torch.unique(group_of, return_inverse=True)
    groups = int(group.max()) + 1 if len(R) else 0
    # Centred first: R − b must vanish exactly where rewards are equal.
    first = torch.full((groups,), torch.inf, dtype=R.dtype, device=R.device).scatter_reduce(0, group, R, "amin")[group]
    total = _per_group(share, group, groups).clamp_min(torch.finfo(R.dtype).tiny)
    return (first + (_per_group(share * (R - first), group, groups) / total)[group]).float()


def terminal_rewards(rewards: Tensor, lengths: Tensor) -> Tensor:
    """[N] → [T] float64: each sample's reward at its last token, 0 before."""
    out = torch.zeros(int(lengths.sum()), dtype=torch.float64, device=rewards.device)
    has = lengths > 0
    out[(lengths.cumsum(0) - 1)[has]] = rewards.double()[has]
    return out


def gae(step_rewards: Tensor, values: Tensor, lengths: Tensor, *, gamma: float, lam: float | Tensor) -> Tensor:
    """A_t = Σ_l (γλ)^l δ_{t+l} with δ_t = r_t + γ·V_{t+1} − V_t and V = 0 after the end (arXiv:1506.02438, eq. 16).

    γ = λ = 1: return minus value. λ = 0: δ. [T], [T], [N] → [T] float64, detached; ``lam`` a number or [N].
    """
    V = values.detach().double()
    following = torch.cat([V[1:], V.new_zeros(1)])
    ends = (lengths.cumsum(0) - 1)[lengths > 0]
    following[ends] = 0.0
    delta = step_rewards.double() + gamma * following - V
    decay = gamma * torch.as_tensor(lam, dtype=torch.float64, device=V.device).expand(len(lengths))
    return _backwards(delta, lengths, decay)


def adaptive_lambda(lengths: Tensor, alpha: float) -> Tensor:
    """λ = 1 − 1/(α·l) of a sample of l tokens (VAPO, arXiv:2504.05118, eq. 9), never below 0; [N] → [N] float64."""
    return (1 - 1 / (alpha * lengths.double().clamp_min(1))).clamp_min(0.0)


def whiten(values: Tensor, *, std: Std = "sample", eps: float = 1e-6, centre: bool = True) -> Tensor:
    """(x − mean)/(std + eps) over all of [T], float32; without ``centre`` the mean is taken as 0 in both places.

    Exactly 0 where all values are equal (and centred).
    """
    if len(values) == 0:
        return values.float()
    x = values.double()
    if centre:
        x = torch.where(x.max() > x.min(), x - x.mean(), 0.0)
    if std == "none":
        return x.float()
    divisor = max(1, len(x) - 1) if std == "sample" and centre else len(x)
    return (x / ((x.square().sum() / divisor).sqrt() + eps)).float() if bool((x != 0).any()) else x.float()


def overlong_penalty(lengths: Tensor, *, max_length: int, buffer: int) -> Tensor:
    """DAPO's soft overlong punishment (arXiv:2503.14476, eq. 13): [N] float32 in [−1, 0].

    0 up to max_length − buffer tokens, then linear, −1 at max_length and beyond.
    """
    if buffer == 0:
        return -(lengths > max_length).float()
    return ((max_length - buffer - lengths.double()) / buffer).clamp(-1.0, 0.0).float()


class _Groups:
    """Rewards by group, in float64: ``centred`` [N] is exactly 0 where ``signal`` [N] is False.

    Trap: the mean of equal rewards that are not dyadic (.1, 1/3) is off by an ulp, and dividing that by eps makes a
    gradient out of nothing. Equality is decided on the rewards themselves, not on the standard deviation.
    """

    def __init__(self, rewards: Tensor, group_of: Tensor) -> None:
        R = rewards.detach().double()
        _, self.place = torch.unique(group_of, return_inverse=True)
        self.count = int(self.place.max()) + 1
        self.size = self.sum(torch.ones_like(R))
        self.signal = _spread(R, self.place, self.count)[self.place] > 0
        self.centred = torch.where(self.signal, R - (self.sum(R) / self.size)[self.place], 0.0)

    def sum(self, values: Tensor) -> Tensor:
        """[N] → [groups]."""
        return _per_group(values, self.place, self.count)


def _check(rewards: Tensor, group_of: Tensor, std: str) -> None:
    if rewards.shape != group_of.shape or rewards.dim() != 1:
        raise ValueError(f"rewards {tuple(rewards.shape)} and group_of {tuple(group_of.shape)} must both be [N]")
    if std not in ("sample", "population", "none"):
        raise ValueError(f"std={std!r}: allowed are sample, population, none")
    if not bool(torch.isfinite(rewards).all()):
        raise ValueError("a reward is not finite")


def _spread(values: Tensor, group: Tensor, groups: int) -> Tensor:
    infinity = torch.full((groups,), torch.inf, dtype=values.dtype, device=values.device)
    high = (-infinity).scatter_reduce(0, group, values, "amax")
    return high - infinity.scatter_reduce(0, group, values, "amin")


def _per_group(values: Tensor, group: Tensor, groups: int) -> Tensor:
    return torch.zeros(groups, dtype=values.dtype, device=values.device).scatter_add(0, group, values)


def _per_sample(tokens: Tensor, lengths: Tensor) -> Tensor:
    """[T] → [N] sums over each sample."""
    index = torch.arange(len(lengths), device=tokens.device).repeat_interleave(lengths)
    return _per_group(tokens, index, len(lengths))


def _backwards(tokens: Tensor, lengths: Tensor, decay: Tensor) -> Tensor:
    """y_t = x_t + decay·y_{t+1} within each sample, 0 after its end; [T], [N], [N] → [T] float64.

    One vector operation a position, all samples at once, from the last position to the first.
    """
    out = tokens.double().clone()
    starts = lengths.cumsum(0) - lengths
    for t in range(int(lengths.max()) - 2 if len(lengths) else -1, -1, -1):
        place = (starts + t)[lengths > t + 1]
        out[place] += decay[lengths > t + 1] * out[place + 1]
    return out
