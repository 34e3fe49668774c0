"""From per-token losses to one number: a weight for each sample's tokens, fixed before the update is cut.

Invariant: loss = Σ_t weight[sample of t] · loss_t. The weights come from the whole update (all ranks, all
micro-batches), so any cut of the samples gives the same number: micro-batches and ranks *add*. A rank of an FSDP world
that averages gradients must therefore multiply its loss by the number of ranks.
"""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from offtrail.algos.config import Aggregation


def sample_weights(mode: Aggregation, lengths: Tensor, group_of: Tensor, *, max_length: int) -> Tensor:
    """Weight of every token of each sample of one optimizer update.

    ===========================  ==================================  ==========================================
    mode                         weight of a token of sample i       also called
    ===========================  ==================================  ==========================================
    token_mean                   1 / Σ_j L_j                         DAPO
    seq_mean_token_mean          1 / (S · L_i)                       GRPO
    seq_mean_token_sum_norm      1 / (S · max_length)                Dr. GRPO
    prompt_mean                  1 / (groups · Σ_{j in group} L_j)   ScaleRL's prompt average
    ===========================  ==================================  ==========================================

    Args:
        mode: one of the above.
        lengths: [S] answer tokens of each sample of the whole update; masked or rejected tokens are counted too: they
            stay in the denominator, so that rejecting a token never makes the others weigh more.
        group_of: [S] integers, the group of each sample.
        max_length: the constant of seq_mean_token_sum_norm, usually sampling.max_new_tokens.

    Returns:
        [S] float32. A sample without tokens gets 0 but counts in S; an update without tokens is all zeros.

    Raises:
        ValueError: unknown mode, shapes differ, or ``max_length`` < 1.
    """
    if lengths.shape != group_of.shape or lengths.dim() != 1:
        raise ValueError(f"lengths {tuple(lengths.shape)} and group_of {tuple(group_of.shape)} must both be [S]")
    if max_length < 1:
        raise ValueError(f"max_length={max_length}: must be ≥ 1")
    L = lengths.double()
    if mode == "token_mean":
        share = L.sum().expand_as(L)
    elif mode == "seq_mean_token_mean":
        share = L * len(L)
    elif mode == "seq_mean_token_sum_norm":
        share = torch.full_like(L, float(len(L) * max_length))
    elif mode == "prompt_mean":
        groups, group = torch.unique(group_of, return_inverse=True)
        share = len(groups) * torch.zeros_like(L).scatter_add(0, group, L)[group]
    else:
        raise ValueError(f"algo.aggregation={mode}: allowed are {', '.join(get_args(Aggregation))}")
    return torch.where(L > 0, 1 / share.clamp_min(1), 0.0).float()
