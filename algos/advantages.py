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
from offtrail.algos.group import Groups, check_rewards, grpo_advantages, rloo_advantages
from offtrail.algos.process import StepScores, process_advantages, process_token_rewards
from offtrail.algos.samples import per_group, returns_to_go
from offtrail.core.plugins import bind, is_plugin, load


@dataclass(frozen=True, slots=True)
class Advantages:
    """``tokens`` [T]: the advantage of each token. ``returns`` [T]: what the critic learns, None without one.
    ``process`` [T]: the part of ``tokens`` that step or token scores made, None where there are none or a critic is
    between.
    """

    tokens: Tensor
    returns: Tensor | None = None
    process: Tensor | None = None


def estimate(
    algo: AlgoConfig,
    rewards: Tensor,
    group_of: Tensor,
    lengths: Tensor,
    *,
    kl: Tensor | None = None,
    values: Tensor | None = None,
    steps: StepScores | None = None,
) -> Advantages:
    """The configured estimator (algo.advantage), with the KL penalty in the reward where algo.kl_in says so.

    Where algo.process names a channel, its part is added: A = A of the rewards + weight·A of the scores, each made by
    itself, so that neither's scale moves the other's. With a critic (gae) the scores are rewards of the tokens that end
    their steps instead, and the critic learns them.

    Args:
        algo: the algorithm.
        rewards: [N] terminal rewards, shaping included.
        group_of: [N] integers.
        lengths: [N] output tokens of each sample.
        kl: [T] estimates lp_prox against lp_ref (``kl_estimate``), for algo.kl_in=reward. Estimators that look at whole
            samples (group, rloo, reward) take each sample's sum, as RLOO does (arXiv:2402.14740).
        values: [T] the critic's values before the update, for gae.
        steps: step or token scores, for algo.process.

    Returns:
        float32, detached. A sample without tokens counts in its group.

    Raises:
        ValueError: shapes differ, a reward is not finite, or kl, values or steps are missing.
    """
    coef = 0.0
    if algo.kl_in == "reward" and algo.kl != "none":
        if kl is None:
            raise ValueError("algo.kl_in=reward: the advantages need the KL estimate of each token")
        coef = algo.kl_coef
    penalty = torch.zeros(int(lengths.sum())) if kl is None else kl.detach() * coef
    penalty = penalty.double().to(rewards.device)
    if algo.process.channel and steps is None:
        raise ValueError(f"algo.process.channel={algo.process.channel}: the advantages need its scores")
    steps = steps if algo.process.channel else None
    if algo.advantage == "gae":
        assert isinstance(algo, PpoConfig)
        if values is None:
            raise ValueError("algo.advantage=gae: the advantages need the critic's values")
        step_rewards = terminal_rewards(rewards, lengths) - penalty
        if steps is not None:
            step_rewards += process_token_rewards(algo.process, steps, lengths)
        return _critic(algo, step_rewards, lengths, values)
    tokens = _outcome(algo, rewards, group_of, lengths, penalty)
    if steps is None:
        return Advantages(tokens)
    process = algo.process.weight * process_advantages(algo.process, steps, group_of, lengths, eps=algo.std_eps)
    return Advantages(tokens + process, process=process)


def _outcome(algo: AlgoConfig, rewards: Tensor, group_of: Tensor, lengths: Tensor, penalty: Tensor) -> Tensor:
    """[T] float32: the advantages of the samples' rewards, without a critic."""
    if algo.advantage in ("reinforce_pp", "reinforce_pp_baseline"):
        baseline = algo.advantage == "reinforce_pp_baseline"
        return reinforce_pp_advantages(
            rewards, group_of, lengths, penalty=penalty, baseline=baseline, std=algo.std, eps=algo.std_eps
        )
    total = rewards.double() - _per_sample(penalty, lengths)
    if is_plugin(algo.advantage):
        return _own(algo, total, group_of, lengths)
    if algo.advantage == "group":
        each = grpo_advantages(total, group_of, std=algo.std, eps=algo.std_eps)
    elif algo.advantage == "rloo":
        each = rloo_advantages(total, group_of)
    else:
        each = total.float()
    return each.repeat_interleave(lengths)


def _own(algo: AlgoConfig, rewards: Tensor, group_of: Tensor, lengths: Tensor) -> Tensor:
    """[T] float32: the user's own estimator, (rewards, group_of, lengths, settings) → [N], or Advantages of each token.

    Raises PluginError when it cannot be loaded, and ValueError when it gives anything else.
    """
    name = algo.advantage
    function, what = load(name, what="algo.advantage"), "algo.advantage_settings"
    given = bind(function, algo.advantage_settings, name=name, what=what, given=3)(rewards, group_of, lengths)
    N, T = len(lengths), int(lengths.sum())
    if isinstance(given, Tensor) and given.shape == (N,):
        given = Advantages(given.repeat_interleave(lengths))
    if not isinstance(given, Advantages) or given.tokens.shape != (T,):
        raise ValueError(
            f"algo.advantage={name}: must give a number for each sample, [{N}], or Advantages with one for each token, "
            f"[{T}]"
        )
    if not bool(torch.isfinite(given.tokens).all()):
        raise ValueError(f"algo.advantage={name}: gave an advantage that is not finite")
    return given.tokens.detach().float()


def _critic(algo: PpoConfig, step_rewards: Tensor, lengths: Tensor, values: Tensor) -> Advantages:
    lam = adaptive_lambda(lengths, algo.gae_alpha) if algo.gae_alpha else algo.gae_lambda
    advantages = gae(step_rewards, values, lengths, gamma=algo.gamma, lam=lam)
    learnt = gae(step_rewards, values, lengths, gamma=algo.gamma, lam=algo.value_lambda)
    # Trap: returns are A + V of the advantages *before* whitening.
    return Advantages(whiten(advantages, std=algo.std, eps=algo.std_eps), (learnt + values.detach()).float())


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
    check_rewards(rewards, group_of, std)
    R = Groups(rewards, group_of).centred if baseline and rewards.numel() else rewards.double()
    tokens = terminal_rewards(R, lengths)
    if penalty is not None:
        tokens = tokens - penalty.double()
    returns = returns_to_go(tokens, lengths, torch.ones(len(lengths), dtype=torch.float64, device=rewards.device))
    return whiten(returns, std=std, eps=eps, centre=not baseline)


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
    total = per_group(share, group, groups).clamp_min(torch.finfo(R.dtype).tiny)
    return (first + (per_group(share * (R - first), group, groups) / total)[group]).float()


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
    return returns_to_go(delta, lengths, decay)


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


def _per_sample(tokens: Tensor, lengths: Tensor) -> Tensor:
    """[T] → [N] sums over each sample."""
    index = torch.arange(len(lengths), device=tokens.device).repeat_interleave(lengths)
    return per_group(tokens, index, len(lengths))
