"""What a learner step minimises: the policy-gradient objective of job=rl with its critic's, likelihood for job=sft.

train.py asks an objective, once a step, to ``prepare`` the batch (StepData) and, when its scores are in, to ``advance``
it (advantages); once an update to ``plan_update``; and once a piece of a micro-batch for its ``loss``. What differs
between jobs stands here and in sources.py, what differs between algorithms and corrections in algos/: this file reads
their fields and knows none of their names.

Invariants: weights, advantages and an update's plan are of the whole update before it is cut, the same on every rank,
so that pieces, micro-batches and ranks add up; a token older than staleness.max versions never reaches a loss (I2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from offtrail.algos.advantages import estimate, overlong_penalty
from offtrail.algos.aggregation import sample_weights
from offtrail.algos.kl import kl_estimate
from offtrail.algos.loss import LossInput, policy_loss
from offtrail.algos.metrics import LossMetrics
from offtrail.algos.pairs import needs_whole_update
from offtrail.algos.process import StepScores
from offtrail.algos.update import Prepared, prepare_update
from offtrail.algos.value import SUMS as VALUE_SUMS
from offtrail.algos.value import ValueMetrics, value_loss
from offtrail.core.types import Batch
from offtrail.platform.config.schema import Config
from offtrail.platform.learner.world import World
from offtrail.platform.model.head import TokenOutputs
from offtrail.platform.model.packing import Packed, SampleTable, Together, minibatches, table_of
from offtrail.platform.model.scalar import ScalarOutputs


class StalenessError(RuntimeError):
    """A batch holds a token that I2 forbids; nothing was trained."""


class ChannelError(RuntimeError):
    """A group has no such channel as the algorithm takes its scores from; nothing of its batch was trained."""


@dataclass(frozen=True)
class Needs:
    """What must be scored before the first update, and how samples are laid out.

    ``prox``: the policy's log-probabilities, of the tokens of the later updates or of all. ``ref``: the reference's.
    ``full_ref``: the reference's whole distribution, micro-batch by micro-batch (exact KL). ``values``: the critic's.
    ``merged``: every rank needs the scores of all ranks, because advantages or the plan of an update are made of them.
    ``feed_last``: the hidden state at a sample's final token is read. ``together``: what no micro-batch and no rank may
    cut apart.
    """

    prox: Literal["none", "later", "all"] = "none"
    ref: bool = False
    full_ref: bool = False
    values: bool = False
    merged: bool = False
    feed_last: bool = False
    together: Together = "sample"


@dataclass(frozen=True)
class StepData:
    """One learner step laid out: N samples, T output tokens, K updates.

    ``updates``: the groups of each. ``weights`` [N]: loss weight of every token of a sample within its update. For rl
    also ``rewards`` [N] (shaping included), ``behaviour`` [T] log-probabilities, ``staleness`` [T], and of the P steps
    or tokens that algo.process names ``step_scores`` [P] and where they end among the T tokens, ``step_ends`` [P];
    train.py fills in the scores [T] that the objective needs (``prox`` from before the first update, ``ref``,
    ``values``), NaN where they are not computed, and ``mine`` [T], which are of this rank's tokens; ``advance`` then
    ``advantages`` [T] and ``returns`` [T]. For reward models ``rewards`` [N] or ``labels`` [T] are what is to be
    learned. ``metrics``: what is known before the first update.
    """

    rows: SampleTable
    updates: list[range]
    weights: Tensor
    rewards: Tensor | None = None
    behaviour: Tensor | None = None
    staleness: Tensor | None = None
    step_scores: Tensor | None = None
    step_ends: Tensor | None = None
    prox: Tensor | None = None
    ref: Tensor | None = None
    values: Tensor | None = None
    mine: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None
    labels: Tensor | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    def to(self, device: torch.device) -> StepData:
        """The same work with its tensors on a device."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class UpdatePlan:
    """What the whole update decides; its tensors are of the update's tokens, the first at place ``first`` of [T]."""

    prepared: Prepared = field(default_factory=Prepared)
    first: int = 0

    @property
    def lr_scale(self) -> float:
        """Multiplies the learning rate."""
        return self.prepared.lr_scale


class Metrics(Protocol):
    """A dataclass of tensors, sums but for one named ``maxima``: `+` merges micro-batches, train.py merges ranks."""

    def __add__(self, other: Any) -> Any:
        """Both together."""

    def means(self, updates: int = 1) -> dict[str, float]:
        """Named numbers of everything added."""


B = TypeVar("B", contravariant=True)
"""A job's batch: what its source gives for one learner step."""
Out = TypeVar("Out", contravariant=True)
"""What the head of the trained module says of a micro-batch."""


class Loss(Protocol[Out]):
    """What one module minimises, once a step's data are complete."""

    needs: Needs

    def plan_update(self, work: StepData, update: int) -> UpdatePlan:
        """What an update decides as a whole."""

    def loss(
        self, work: StepData, update: int, plan: UpdatePlan, packed: Packed, rows: slice, out: Out
    ) -> tuple[Tensor, Metrics]:
        """The part of the update's loss of these rows of a micro-batch (whole samples), and its metrics."""

    def no_metrics(self, device: torch.device) -> Metrics:
        """Metrics of nothing, to add to."""

    def histograms(self, metrics: Any) -> dict[str, list[float]]:
        """Distributions by name, each as evenly spaced quantiles."""

    def agreement(self, work: StepData, world: World) -> dict[str, float]:
        """What engine and learner say of the same tokens under the same weights (I5); a collective."""


class Objective(Loss[Out], Protocol[B, Out]):
    """One job's loss, and how its batch becomes a step's data."""

    def prepare(self, step: int, batch: B) -> StepData:
        """SampleTable, weights and rewards of one batch. Every rank gets the same."""

    def advance(self, work: StepData) -> StepData:
        """The work with its advantages, now that it has its scores."""


class PlainLoss:
    """What most losses leave empty."""

    needs = Needs()

    def advance(self, work: StepData) -> StepData:
        """There is nothing to add."""
        return work

    def plan_update(self, work: StepData, update: int) -> UpdatePlan:
        """There is nothing to decide."""
        return UpdatePlan()

    def histograms(self, metrics: Any) -> dict[str, list[float]]:
        """None."""
        return {}

    def agreement(self, work: StepData, world: World) -> dict[str, float]:
        """No engine made these tokens."""
        return {}


class PolicyGradient:
    """Any algorithm with any correction (algos/loss.py) on batches of groups."""

    def __init__(self, config: Config) -> None:
        self.algo, self.correction, self.sampling = config.algo, config.correction, config.sampling
        self.minibatches, self.bound = config.learner.minibatches, config.staleness.max
        self.whole_update = needs_whole_update(self.algo, self.correction)
        self.kl_in_reward = self.algo.needs_ref and self.algo.kl_in == "reward"
        everywhere = self.whole_update or (self.kl_in_reward and self.correction.needs_prox)
        self.needs = Needs(
            prox="all" if everywhere else "later" if self.correction.needs_prox else "none",
            ref=self.algo.needs_ref and self.algo.kl != "full",
            full_ref=self.algo.kl == "full",
            values=self.algo.needs_values,
            merged=everywhere or self.kl_in_reward or self.algo.needs_values,
        )

    def prepare(self, step: int, batch: Batch) -> StepData:
        """Rewards with their shaping, weights over each update. Raises StalenessError on a forbidden token, and
        ChannelError where a group lacks the scores of algo.process.
        """
        rows = rows_of_groups(batch)
        staleness = step - np.concatenate([g.versions for g in batch.groups])
        self._check_staleness(step, batch, rows, staleness)
        updates = minibatches(len(batch.groups), self.minibatches)
        group_of, lengths = torch.from_numpy(rows.group_of), torch.from_numpy(rows.lengths)
        longest = self.sampling.longest_at(step)
        weights = torch.zeros(rows.size)
        for update in updates:
            part = (group_of >= update.start) & (group_of < update.stop)
            weights[part] = sample_weights(self.algo.aggregation, lengths[part], group_of[part], max_length=longest)
        rewards, metrics = torch.from_numpy(np.concatenate([g.rewards for g in batch.groups])), {}
        if self.algo.overlong_share:
            buffer = round(self.algo.overlong_share * longest)
            shaping = self.algo.overlong_penalty * overlong_penalty(lengths, max_length=longest, buffer=buffer)
            rewards, metrics = rewards + shaping, {"reward/overlong": float(shaping.mean())}
        channel = self.algo.process.channel
        scores, ends = steps_of_groups(batch, channel) if channel else (None, None)
        return StepData(
            rows=rows,
            updates=updates,
            weights=weights,
            rewards=rewards,
            step_scores=scores,
            step_ends=ends,
            behaviour=torch.from_numpy(np.concatenate([g.logprobs for g in batch.groups])),
            staleness=torch.from_numpy(staleness.astype(np.int64)),
            metrics=metrics,
        )

    @torch.no_grad()
    def advance(self, work: StepData) -> StepData:
        """Advantages of the whole batch (algos/advantages.py).

        The KL in the reward is that of π_prox, the policy just before the update, or of π_beh where the correction
        takes it for proximal.
        """
        assert work.rewards is not None
        assert work.behaviour is not None
        lengths = torch.from_numpy(work.rows.lengths).to(work.rewards.device)
        group_of = torch.from_numpy(work.rows.group_of).to(work.rewards.device)
        kl, metrics = None, work.metrics
        if self.kl_in_reward:
            assert work.prox is not None
            assert work.ref is not None
            made_by = work.prox if self.correction.needs_prox else work.behaviour
            kl = kl_estimate(self.algo.kl, made_by, work.ref)
            penalty = self.algo.kl_coef * float(kl.double().sum()) / work.rows.size
            metrics = metrics | {"reward/kl_penalty": -penalty, "policy/kl_ref": float(kl.double().mean())}
        steps = None
        if work.step_scores is not None and work.step_ends is not None:
            steps = StepScores(work.step_scores, work.step_ends)
        made = estimate(self.algo, work.rewards, group_of, lengths, kl=kl, values=work.values, steps=steps)
        if made.process is not None:
            process, outcome = (float(part.abs().sum()) for part in (made.process, made.tokens - made.process))
            metrics = metrics | {"policy/process_share": process / max(process + outcome, 1e-12)}
        return replace(work, advantages=made.tokens, returns=made.returns, metrics=metrics)

    def plan_update(self, work: StepData, update: int) -> UpdatePlan:
        """Masks, bounds and scales that look at all tokens of the update (algos/update.py)."""
        if not self.whole_update:
            return UpdatePlan()
        assert work.prox is not None
        assert work.behaviour is not None
        assert work.advantages is not None
        assert work.rewards is not None
        groups, rows, device = work.updates[update], work.rows, work.prox.device
        chosen = np.flatnonzero((rows.group_of >= groups.start) & (rows.group_of < groups.stop))
        first, end = int(rows.starts[chosen[0]]), int(rows.starts[chosen[-1] + 1])
        told = torch.from_numpy(chosen[rows.lengths[chosen] > 0]).to(device)
        prepared = prepare_update(
            self.algo,
            self.correction,
            logprobs=work.prox[first:end],
            behaviour_logprobs=work.behaviour[first:end],
            advantages=work.advantages[first:end],
            sample_index=torch.from_numpy(np.repeat(chosen, rows.lengths[chosen])).to(device),
            rewards=work.rewards[told],
            group_of=torch.from_numpy(rows.group_of).to(device)[told],
        )
        return UpdatePlan(prepared, first)

    def loss(
        self, work: StepData, update: int, plan: UpdatePlan, packed: Packed, rows: slice, out: TokenOutputs
    ) -> tuple[Tensor, LossMetrics]:
        """See algos/loss.py. In the first update θ itself is the proximal policy, which ``work.prox`` then holds."""
        assert work.prox is not None
        assert work.behaviour is not None
        assert work.advantages is not None
        assert work.staleness is not None
        at, samples, prepared = packed.tokens[rows], packed.samples[rows], plan.prepared
        if update == 0 and self.needs.prox != "all":
            work.prox[at] = out.logprobs.detach()
        prox = work.prox if update > 0 and self.needs.prox != "none" else None
        advantages = work.advantages if prepared.advantages is None else prepared.advantages
        here = at if prepared.advantages is None else at - plan.first
        inputs = LossInput(
            logprobs=out.logprobs,
            behaviour_logprobs=work.behaviour.index_select(0, at),
            advantages=advantages.index_select(0, here),
            token_weights=work.weights.index_select(0, samples),
            sample_index=samples,
            prox_logprobs=None if prox is None else prox.index_select(0, at),
            ref_logprobs=None if work.ref is None else work.ref.index_select(0, at),
            staleness=work.staleness.index_select(0, at),
            keep=None if prepared.keep is None else prepared.keep.index_select(0, at - plan.first),
            entropy=out.entropy,
            full_kl=out.kl,
        )
        return policy_loss(inputs, self.algo, self.correction, prepared)

    def no_metrics(self, device: torch.device) -> LossMetrics:
        """Zeros."""
        return LossMetrics.empty(device)

    def histograms(self, metrics: LossMetrics) -> dict[str, list[float]]:
        """offpolicy/ratio: π_θ/π_beh of the tokens."""
        return {"offpolicy/ratio": metrics.ratios()}

    @torch.no_grad()
    def agreement(self, work: StepData, world: World) -> dict[str, float]:
        """mismatch/*: learner's minus engine's log-probabilities in groups that the learner's own version made whole.

        Empty where the batch has no such group, or none whose log-probabilities before the first update are known.
        """
        assert work.prox is not None
        assert work.mine is not None
        assert work.behaviour is not None
        assert work.staleness is not None
        rows = work.rows
        stale = np.add.reduceat(work.staleness.cpu().numpy(), rows.starts[:-1][rows.lengths > 0])
        fresh_groups = np.ones(len(rows.prompts), bool)
        fresh_groups[rows.group_of[rows.lengths > 0][stale > 0]] = False
        fresh = torch.from_numpy(np.repeat(fresh_groups[rows.group_of], rows.lengths)).to(work.prox.device)
        delta = (work.prox - work.behaviour)[fresh & work.mine & ~work.prox.isnan()].double()
        sums = world.sum(
            torch.stack([delta.new_tensor(float(len(delta))), delta.abs().sum(), (delta.exp() - 1 - delta).sum()])
        )
        top = world.max(delta.abs().max().reshape(1) if len(delta) else delta.new_zeros(1))
        tokens, distance, k3 = sums.tolist()
        if tokens == 0:
            return {}
        return {
            "mismatch/tokens": tokens,
            "mismatch/abs_dlogp_mean": distance / tokens,
            "mismatch/abs_dlogp_max": float(top),
            "mismatch/k3": k3 / tokens,
        }

    def _check_staleness(self, step: int, batch: Batch, rows: SampleTable, staleness: np.ndarray) -> None:
        wrong = (staleness > self.bound) | (staleness < 0)
        if not wrong.any():
            return
        token = int(np.flatnonzero(wrong)[0])
        group = batch.groups[int(rows.group_of[np.searchsorted(rows.starts, token, side="right") - 1])]
        found = sorted(set(group.versions.tolist()))
        raise StalenessError(
            f"step {step}: group {group.group} holds tokens of versions {found}, but staleness.max={self.bound} allows "
            f"{max(0, step - self.bound)}…{step} only (I2); nothing of the batch was trained"
        )


class ValueRegression(PlainLoss):
    """PPO's critic: the value of the state that each output token is drawn in, regressed on the returns.

    Its values before the batch's first update are the ones that advantages, returns and the value clip are taken from.
    """

    def __init__(self, clip: float) -> None:
        self.clip = clip

    def no_metrics(self, device: torch.device) -> ValueMetrics:
        """Zeros."""
        return ValueMetrics(torch.zeros(len(VALUE_SUMS), dtype=torch.float64, device=device))

    def loss(
        self, work: StepData, update: int, plan: UpdatePlan, packed: Packed, rows: slice, out: ScalarOutputs
    ) -> tuple[Tensor, ValueMetrics]:
        """See algos/value.py."""
        assert work.values is not None
        assert work.returns is not None
        at, samples = packed.tokens[rows], packed.samples[rows]
        old, returns = work.values.index_select(0, at), work.returns.index_select(0, at)
        return value_loss(out.values, old, returns, work.weights.index_select(0, samples), clip=self.clip)


def rows_of_groups(batch: Batch) -> SampleTable:
    """The samples of a batch in durable order."""
    groups = batch.groups
    lengths = np.concatenate([g.lengths for g in groups])
    return SampleTable(
        prompts=tuple(g.prompt_tokens for g in groups),
        group_of=np.repeat(np.arange(len(groups)), [g.size for g in groups]),
        starts=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
        tokens=np.concatenate([g.tokens for g in groups]),
        temperatures=np.array([g.temperature for g in groups], np.float32),
        ids=np.array([g.group for g in groups], np.int64),
    )


def steps_of_groups(batch: Batch, name: str) -> tuple[Tensor, Tensor]:
    """Scores [P] float32 of the batch's steps (axis step) or tokens (axis token), and where each ends among its tokens
    [P] int64. Raises ChannelError, naming the group.
    """
    values, ends, start = [], [], 0
    for group in batch.groups:
        channel = group.channels.get(name)
        if channel is None or channel.axis not in ("step", "token"):
            found = {other: made.axis for other, made in group.channels.items()}
            raise ChannelError(
                f"algo.process.channel={name}: group {group.group} has no such channel of axis step or token, but "
                f"{found or 'none at all'}; name one that the run's driver or scorer makes, or leave it empty"
            )
        tokens = len(group.tokens)
        values.append(channel.values.astype(np.float32))
        ends.append(start + (np.arange(1, tokens + 1) if channel.axis == "token" else group.step_ends.astype(np.int64)))
        start += tokens
    return torch.from_numpy(np.concatenate(values)), torch.from_numpy(np.concatenate(ends))


@dataclass
class LikelihoodMetrics:
    """``sums`` [4] float64: updates' losses, tokens, summed log-probability, summed entropy."""

    sums: Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.float64))

    def __add__(self, other: LikelihoodMetrics) -> LikelihoodMetrics:
        return LikelihoodMetrics(self.sums + other.sums)

    def means(self, updates: int = 1) -> dict[str, float]:
        """loss/sft (nats a token), policy/entropy."""
        loss, tokens, _, entropy = self.sums.tolist()
        return {"loss/sft": loss / updates, "policy/entropy": entropy / max(tokens, 1.0)}


class Likelihood(PlainLoss):
    """Mean negative log-likelihood of the answer's tokens; the prompt is not trained."""

    def prepare(self, step: int, batch: SampleTable) -> StepData:
        """``batch`` is the table of one update; each token weighs the same."""
        weights = torch.full((batch.size,), 1 / max(1, len(batch.tokens)))
        return StepData(rows=batch, updates=minibatches(len(batch.prompts), 1), weights=weights)

    def no_metrics(self, device: torch.device) -> LikelihoodMetrics:
        """Zeros."""
        return LikelihoodMetrics(torch.zeros(4, dtype=torch.float64, device=device))

    def loss(
        self, work: StepData, update: int, plan: UpdatePlan, packed: Packed, rows: slice, out: TokenOutputs
    ) -> tuple[Tensor, LikelihoodMetrics]:
        """−Σ log p / tokens of the update."""
        logprobs = out.logprobs
        loss = -(work.weights.index_select(0, packed.samples[rows]) * logprobs).sum()
        seen = (loss.detach(), torch.tensor(len(logprobs)), logprobs.detach().sum(), out.entropy.detach().sum())
        return loss, LikelihoodMetrics(torch.stack([v.double().to(logprobs.device) for v in seen]))


def rows_of_pairs(prompts: Sequence[np.ndarray], answers: Sequence[np.ndarray]) -> SampleTable:
    """One sample a prompt, at temperature 1."""
    return table_of(prompts, [[answer] for answer in answers])
