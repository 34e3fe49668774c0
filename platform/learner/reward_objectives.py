"""Objectives of learned rewards: a reward model on preferences or on judged answers, a process reward model on labelled
steps, or on outcomes alone.

    BradleyTerry, YesNo   a ScalarModel (model/scalar.py), read at the end of each answer
    ProcessReward         a ScalarModel, read at each token that ends a step
    ImplicitReward        a Policy beside its reference

They train in the same loop as the policy (train.py); the losses are algos/preference.py's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from offtrail.algos.preference import (
    LABEL_SUMS,
    PAIR_SUMS,
    OutcomeMetrics,
    PairMetrics,
    StepMetrics,
    outcome_loss,
    pair_weights,
    preference_loss,
    step_loss,
)
from offtrail.platform.learner.objectives import Needs, PlainLoss, StepData, UpdatePlan
from offtrail.platform.model.head import TokenOutputs
from offtrail.platform.model.packing import Packed, SampleTable, minibatches
from offtrail.platform.model.scalar import ScalarOutputs


@dataclass(frozen=True)
class ScoredAnswers:
    """Answers in groups of one prompt, and how good each is: ``scores`` [N].

    To BradleyTerry only their order in a group counts: a pair of a chosen and a rejected answer is a group of two, with
    scores 1 and 0. To the others they are labels in [0, 1].
    """

    rows: SampleTable
    scores: Tensor


class BradleyTerry(PlainLoss):
    """A reward model, read at each answer's final token: σ(v_i − v_j) is the probability that answer i is preferred.

    Every group that has a pair weighs the same, and in it every pair.
    """

    needs = Needs(feed_last=True, together="group")

    def prepare(self, step: int, batch: ScoredAnswers) -> StepData:
        """One update of all groups."""
        rows = batch.rows
        weights = pair_weights(batch.scores, torch.from_numpy(rows.group_of))
        return StepData(rows=rows, updates=minibatches(len(rows.prompts), 1), weights=weights, rewards=batch.scores)

    def no_metrics(self, device: torch.device) -> PairMetrics:
        """Zeros."""
        return PairMetrics(torch.zeros(len(PAIR_SUMS), dtype=torch.float64, device=device))

    def loss(
        self, work: StepData, update: int, plan: UpdatePlan, packed: Packed, rows: slice, out: ScalarOutputs
    ) -> tuple[Tensor, PairMetrics]:
        """The pairs of these answers' groups, which are whole here."""
        assert work.rewards is not None
        samples = packed.samples[packed.ends][rows]
        group_of = torch.from_numpy(work.rows.group_of).to(samples.device)[samples]
        return preference_loss(out.values, work.rewards[samples], group_of, work.weights[samples])


class OutcomeLabels(PlainLoss):
    """What the objectives on labelled answers share: every answer of the update weighs the same."""

    def prepare(self, step: int, batch: ScoredAnswers) -> StepData:
        """One update of all groups."""
        rows = batch.rows
        weights = torch.full((rows.size,), 1 / rows.size)
        return StepData(rows=rows, updates=minibatches(len(rows.prompts), 1), weights=weights, rewards=batch.scores)

    def no_metrics(self, device: torch.device) -> OutcomeMetrics:
        """Zeros."""
        return OutcomeMetrics(torch.zeros(len(LABEL_SUMS), dtype=torch.float64, device=device))


class YesNo(OutcomeLabels):
    """A pointwise reward model, read at each answer's final token: σ(v) is the probability that it is good."""

    needs = Needs(feed_last=True)

    def loss(
        self, work: StepData, update: int, plan: UpdatePlan, packed: Packed, rows: slice, out: ScalarOutputs
    ) -> tuple[Tensor, OutcomeMetrics]:
        """The answers of these rows, one each."""
        assert work.rewards is not None
        samples = packed.samples[packed.ends][rows]
        return outcome_loss(out.values, work.rewards[samples], work.weights[samples])


class ImplicitReward(OutcomeLabels):
    """A process reward learned from outcomes: r = β Σ_t log π(y_t)/π_ref(y_t) of an answer is the logit of its being
    good, and the same sum over a step its reward (arXiv:2412.01981, eq. 3 and 5).
    """

    needs = Needs(ref=True)

    def __init__(self, beta: float) -> None:
        self.beta = beta

    def loss(
        self, work: StepData, update: int, plan: UpdatePlan, packed: Packed, rows: slice, out: TokenOutputs
    ) -> tuple[Tensor, OutcomeMetrics]:
        """The answers whose tokens these rows are, which are whole here."""
        assert work.rewards is not None
        assert work.ref is not None
        samples, place = torch.unique_consecutive(packed.samples[rows], return_inverse=True)
        ratios = out.logprobs - work.ref[packed.tokens[rows]]
        values = self.beta * ratios.new_zeros(len(samples)).index_add(0, place, ratios)
        return outcome_loss(values, work.rewards[samples], work.weights[samples])


@dataclass(frozen=True)
class LabelledSteps:
    """Answers and the labels of their steps: ``labels`` [T] in [0, 1] at the output token that ends a step, NaN at all
    others.
    """

    rows: SampleTable
    labels: Tensor


class ProcessReward(PlainLoss):
    """A process reward model, read at the tokens that end a step: σ(v) is the probability that the step is good.

    Every labelled step of the update weighs the same.
    """

    needs = Needs(feed_last=True)

    def prepare(self, step: int, batch: LabelledSteps) -> StepData:
        """One update of all groups."""
        rows, labelled = batch.rows, int((~batch.labels.isnan()).sum())
        weights = torch.full((rows.size,), 1 / max(1, labelled))
        return StepData(rows=rows, updates=minibatches(len(rows.prompts), 1), weights=weights, labels=batch.labels)

    def no_metrics(self, device: torch.device) -> StepMetrics:
        """Zeros."""
        return StepMetrics(torch.zeros(len(LABEL_SUMS), dtype=torch.float64, device=device))

    def loss(
        self, work: StepData, update: int, plan: UpdatePlan, packed: Packed, rows: slice, out: ScalarOutputs
    ) -> tuple[Tensor, StepMetrics]:
        """The steps that end in these rows."""
        assert work.labels is not None
        at, samples = packed.tokens[rows], packed.samples[rows]
        return step_loss(out.values, work.labels[at], work.weights[samples])
