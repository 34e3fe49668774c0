"""Losses of learned rewards: preferences between answers or labels of them (a reward model), and labels of steps (a
process reward model).

Invariant: everything is a sum over pairs or steps, with weights of the whole update, so micro-batches and ranks add up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

PAIR_SUMS = ("pairs", "loss", "right", "margin")
LABEL_SUMS = ("labels", "loss", "right", "good")


@dataclass(slots=True)
class PairMetrics:
    """``sums`` [len(PAIR_SUMS)] float64, detached, on the loss's device."""

    sums: Tensor

    def __add__(self, other: PairMetrics) -> PairMetrics:
        return PairMetrics(self.sums + other.sums)

    def means(self, updates: int = 1) -> dict[str, float]:
        """The loss, the share of pairs that the model orders as they are labelled, and the mean difference of a pair;
        empty without pairs.
        """
        pairs, loss, right, margin = self.sums.tolist()
        if pairs == 0:
            return {}
        return {
            "loss/preference": loss / updates,
            "preference/accuracy": right / pairs,
            "preference/margin": margin / pairs,
        }


def pair_weights(scores: Tensor, group_of: Tensor) -> Tensor:
    """[N] weight of each pair of a sample's group: 1/(pairs of the group · groups that have a pair); 0 where all
    ``scores`` [N] of a group are equal. ``group_of`` [N] counts from 0.
    """
    winners, _ = ordered_pairs(scores, group_of)
    each = torch.bincount(group_of[winners], minlength=int(group_of.max()) + 1)
    pairs = each[group_of].double()
    return torch.where(pairs > 0, 1 / (pairs.clamp(min=1) * (each > 0).sum().clamp(min=1)), 0.0).float()


def ordered_pairs(scores: Tensor, group_of: Tensor) -> tuple[Tensor, Tensor]:
    """Indices (better, worse) of every pair of one group with different ``scores`` [N]."""
    same = group_of.unsqueeze(1) == group_of.unsqueeze(0)
    better, worse = torch.nonzero(same & (scores.unsqueeze(1) > scores.unsqueeze(0)), as_tuple=True)
    return better, worse


def preference_loss(values: Tensor, scores: Tensor, group_of: Tensor, weights: Tensor) -> tuple[Tensor, PairMetrics]:
    """−Σ weight · log σ(v_better − v_worse) over the ordered pairs of each group.

    Bradley & Terry (1952); as a reward model's loss over all pairs of K ranked answers, arXiv:2203.02155, eq. 1.

    Args:
        values: [N], with gradient; whole groups.
        scores: [N], higher is better; pairs of equal ones say nothing.
        group_of: [N].
        weights: [N], ``pair_weights`` of the whole update.
    """
    better, worse = ordered_pairs(scores, group_of)
    margin = values[better] - values[worse]
    loss = -(weights[better] * logsigmoid(margin)).sum()
    seen = margin.detach().double()
    totals = (seen.new_tensor(len(seen)), loss.detach().double(), (seen > 0).sum().double(), seen.sum())
    return loss, PairMetrics(torch.stack(totals))


@dataclass(slots=True)
class StepMetrics:
    """``sums`` [len(LABEL_SUMS)] float64, detached, on the loss's device."""

    sums: Tensor

    def __add__(self, other: StepMetrics) -> StepMetrics:
        return StepMetrics(self.sums + other.sums)

    def means(self, updates: int = 1) -> dict[str, float]:
        """The loss, the share of steps judged as labelled (σ(v) ≥ ½ against label ≥ ½), the share labelled good; empty
        without steps.
        """
        steps, loss, right, good = self.sums.tolist()
        if steps == 0:
            return {}
        return {"loss/process": loss / updates, "process/accuracy": right / steps, "process/good_share": good / steps}


def step_loss(values: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, StepMetrics]:
    """−Σ weight · (y log σ(v) + (1 − y) log(1 − σ(v))) over the tokens that end a step.

    Process supervision, arXiv:2305.20050, with hard labels; with y the share of completions that come out right,
    Math-Shepherd's soft estimation, arXiv:2312.08935, eq. 3 and 4.

    Args:
        values: [N] logits, with gradient.
        labels: [N] in [0, 1]; NaN where no step ends.
        weights: [N], of the whole update.
    """
    ends = ~labels.isnan()
    loss, sums = _label_loss(values[ends], labels[ends], weights[ends])
    return loss, StepMetrics(sums)


@dataclass(slots=True)
class OutcomeMetrics:
    """``sums`` [len(LABEL_SUMS)] float64, detached, on the loss's device."""

    sums: Tensor

    def __add__(self, other: OutcomeMetrics) -> OutcomeMetrics:
        return OutcomeMetrics(self.sums + other.sums)

    def means(self, updates: int = 1) -> dict[str, float]:
        """The loss, the share of answers judged as labelled (σ(v) ≥ ½ against label ≥ ½), the share labelled good;
        empty without answers.
        """
        answers, loss, right, good = self.sums.tolist()
        if answers == 0:
            return {}
        return {
            "loss/outcome": loss / updates,
            "outcome/accuracy": right / answers,
            "outcome/good_share": good / answers,
        }


def outcome_loss(values: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, OutcomeMetrics]:
    """−Σ weight · (y log σ(v) + (1 − y) log(1 − σ(v))) over answers: a pointwise reward model, and with
    v = β·log π/π_ref of the whole answer an implicit process reward (arXiv:2412.01981, eq. 5).

    Args:
        values: [N] logits, with gradient.
        labels: [N] in [0, 1].
        weights: [N], of the whole update.
    """
    loss, sums = _label_loss(values, labels, weights)
    return loss, OutcomeMetrics(sums)


def _label_loss(values: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and [len(LABEL_SUMS)]."""
    loss = (weights * binary_cross_entropy_with_logits(values, labels, reduction="none")).sum()
    good = labels >= 0.5
    counts = (torch.tensor(len(labels)), loss.detach(), ((values.detach() >= 0) == good).sum(), good.sum())
    return loss, torch.stack([c.double().to(values.device) for c in counts])
