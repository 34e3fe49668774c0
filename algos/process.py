"""Scores along the way (a process reward model's, a search's): scores of P steps → an advantage for each of T tokens.

Called by advantages.py; settings: config.ProcessConfig. A token score is the score of a step of one token.

    scores ── form ──► rewards of the steps ── baseline ──► centred ── sums to come ──► advantages of the steps' tokens

Invariants: nothing crosses from one sample to another but a baseline, and that stays in its group; tokens that belong
to no step (what follows a sample's last one) get 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from offtrail.algos.config import ProcessConfig, Std
from offtrail.algos.group import grpo_advantages
from offtrail.algos.samples import per_group, returns_to_go, spread


@dataclass(frozen=True, slots=True)
class StepScores:
    """``values`` [P] of the steps; ``ends`` [P] int64, ascending: where each ends, an exclusive offset in the batch's T
    tokens. A step begins where the one before it or its sample does.
    """

    values: Tensor
    ends: Tensor

    def samples(self, lengths: Tensor) -> Tensor:
        """[P] int64: the place of each step's sample among the N of ``lengths``."""
        return torch.searchsorted(lengths.cumsum(0), self.ends)


def process_rewards(process: ProcessConfig, scores: Tensor, counts: Tensor) -> Tensor:
    """What the steps' scores r_1…r_K are worth as rewards, by ``process.form``.

    ==========  =============================================  ==================================================
    sum         r_k                                            Math-Shepherd (arXiv:2312.08935)
    min         softmax(−r/temperature)_k · r_k                PURE (arXiv:2504.15275): the weakest step counts
    clip        min(r_k − threshold, 0)                        arXiv:2410.15115, §4
    delta       r_k − r_{k+1}; r_{K−1} at K − 1, 0 at K        the same: the sums to come are bounded
    clip_delta  delta of clip                                  the same
    shaping     γ·Φ_k − Φ_{k−1}, Φ = r, Φ_0 = Φ_K = 0          potentials: the best policy stays (Ng et al., 1999)
    ==========  =============================================  ==================================================

    Shaping leaves the best policy alone under ``baseline=none`` only: one taken from each step pays for their number.

    Args:
        process: form, temperature, threshold, gamma.
        scores: [P], sample by sample, in order.
        counts: [N] int64: the steps of each sample.

    Returns:
        [P] float64, detached.
    """
    r = scores.detach().double()
    if process.form == "min":
        sample = torch.arange(len(counts), device=r.device).repeat_interleave(counts)
        weight = torch.exp((_lowest(r, sample, len(counts)) - r) / process.temperature)
        return r * weight / per_group(weight, sample, len(counts))[sample]
    if process.form in ("clip", "clip_delta"):
        r = (r - process.threshold).clamp_max(0.0)
    if process.form in ("sum", "clip"):
        return r
    ends = counts.cumsum(0)
    last, first = (ends - 1)[counts > 0], (ends - counts)[counts > 0]
    potential = r.clone()
    potential[last] = 0.0
    if process.form == "shaping":
        before = potential.roll(1)
        before[first] = 0.0
        return process.gamma * potential - before
    after = potential.roll(-1)
    after[last] = 0.0
    return potential - after


def process_advantages(
    process: ProcessConfig, steps: StepScores, group_of: Tensor, lengths: Tensor, *, eps: float = 1e-6
) -> Tensor:
    """Σ_{s ≥ k} γ^{s−k}·(r_s − baseline) of step k, at each of its tokens; before ``process.weight``.

    Baselines: leave_one_out (``step_leave_one_out``); group: the mean over all steps of the group, and group_std
    divides by their standard deviation (n − 1) plus ``eps`` too (GRPO's process supervision, arXiv:2402.03300, §4.1.3);
    none.

    Args:
        process: the settings.
        steps: [P] scores and where the steps end.
        group_of: [N] integers.
        lengths: [N] output tokens of each sample.
        eps: see above.

    Returns:
        [T] float32. With a baseline exactly 0 in a group whose rewards (after ``form``) are all equal.
    """
    sample = steps.samples(lengths)
    counts = torch.bincount(sample, minlength=len(lengths))
    rewards = process_rewards(process, steps.values, counts)
    if process.baseline == "leave_one_out":
        each = step_leave_one_out(rewards, sample, group_of, gamma=process.gamma).double()
    else:
        if process.baseline != "none":
            std: Std = "sample" if process.baseline == "group_std" else "none"
            rewards = grpo_advantages(rewards, group_of[sample], std=std, eps=eps).double()
        each = returns_to_go(rewards, counts, torch.full((len(counts),), process.gamma, device=rewards.device).double())
    return _to_tokens(each, steps, sample, lengths).float()


def process_token_rewards(process: ProcessConfig, steps: StepScores, lengths: Tensor) -> Tensor:
    """[T] float64: ``process.weight`` times each step's reward (by ``form``) at its last token, for a critic."""
    counts = torch.bincount(steps.samples(lengths), minlength=len(lengths))
    out = torch.zeros(int(lengths.sum()), dtype=torch.float64, device=lengths.device)
    out[steps.ends - 1] = process.weight * process_rewards(process, steps.values, counts)
    return out


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
    total, size = per_group(mean * has, group, groups), per_group(has, group, groups)
    others = size[group] - has
    baseline = ((total[group] - mean * has) / others.clamp_min(1))[step_sample]
    place = group[step_sample]
    signal = (spread(r, place, groups)[place] > 0) & (others[step_sample] > 0)
    centred = torch.where(signal, r - baseline, 0.0)
    return returns_to_go(centred, counts, torch.full((N,), gamma, dtype=r.dtype, device=r.device)).float()


def _lowest(values: Tensor, sample: Tensor, samples: int) -> Tensor:
    """[P]: the least value of each step's sample."""
    least = torch.full((samples,), torch.inf, dtype=values.dtype, device=values.device)
    return least.scatter_reduce(0, sample, values, "amin")[sample]


def _to_tokens(each: Tensor, steps: StepScores, sample: Tensor, lengths: Tensor) -> Tensor:
    """[P] → [T]: every token gets its step's value, 0 where it is of none."""
    if not len(each):
        return torch.zeros(int(lengths.sum()), dtype=each.dtype, device=each.device)
    owner = torch.arange(len(lengths), device=each.device).repeat_interleave(lengths)
    token = torch.arange(len(owner), device=each.device)
    step = torch.searchsorted(steps.ends, token, right=True)
    known = step.clamp_max(len(each) - 1)
    return torch.where((step < len(each)) & (sample[known] == owner), each[known], 0.0)
