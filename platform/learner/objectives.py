"""What a learner step minimises: the policy-gradient objective of job=rl, and likelihood for job=sft.

train.py asks an objective, once a step, to ``prepare`` the batch (Work), and once a micro-batch for its ``loss``.
What differs between jobs stands here and in sources.py; the loop is the same.

Invariants: weights and advantages are of the whole update before it is cut, so that micro-batches and ranks add up; a
token older than staleness.max versions never reaches a loss (I2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from offtrail.algos.advantages import grpo_advantages
from offtrail.algos.aggregation import sample_weights
from offtrail.algos.config import GrpoConfig
from offtrail.algos.loss import LossInput, policy_loss
from offtrail.algos.metrics import LossMetrics
from offtrail.core.types import Batch
from offtrail.platform.config.schema import Config
from offtrail.platform.learner.packing import Packed, Rows, minibatches
from offtrail.platform.learner.world import World


class StalenessError(RuntimeError):
    """A batch holds a token that I2 forbids; nothing was trained."""


@dataclass(frozen=True)
class Work:
    """One learner step laid out: N samples, T output tokens, K updates.

    ``updates``: the groups of each. ``weights`` [N]: loss weight of every token of a sample within its update. For rl
    also ``advantages`` [N], ``behaviour`` [T] log-probabilities and ``staleness`` [T]; train.py fills in ``prox`` [T]
    (from before the first update) and ``ref`` [T], of this rank's tokens and where the objective needs them, NaN
    elsewhere.
    """

    rows: Rows
    updates: list[range]
    weights: Tensor
    advantages: Tensor | None = None
    behaviour: Tensor | None = None
    staleness: Tensor | None = None
    prox: Tensor | None = None
    ref: Tensor | None = None

    def to(self, device: torch.device) -> Work:
        """The same work with its tensors on a device."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)


class Metrics(Protocol):
    """A dataclass of tensors, sums but for one named ``maxima``: `+` merges micro-batches, train.py merges ranks."""

    def __add__(self, other: Any) -> Any:
        """Both together."""

    def means(self, updates: int = 1) -> dict[str, float]:
        """Named numbers of everything added."""


class Objective(Protocol):
    """One job's loss."""

    needs_prox: bool
    """Whether log-probabilities from before the first update are needed in the later ones."""
    needs_ref: bool
    """Whether log-probabilities of the start model are needed."""

    def prepare(self, step: int, batch: object) -> Work:
        """Rows, weights and advantages of one batch. Every rank gets the same."""

    def loss(
        self, work: Work, update: int, packed: Packed, logprobs: Tensor, entropy: Tensor
    ) -> tuple[Tensor, Metrics]:
        """A micro-batch's part of the update's loss, and its metrics."""

    def histograms(self, metrics: Any) -> dict[str, list[float]]:
        """Distributions by name, each as evenly spaced quantiles."""

    def agreement(self, work: Work, world: World) -> dict[str, float]:
        """What engine and learner say of the same tokens under the same weights (I5); a collective."""


class PolicyGradient:
    """GRPO with an off-policy correction (algos/loss.py) on batches of groups."""

    def __init__(self, config: Config) -> None:
        assert isinstance(config.algo, GrpoConfig)
        self.algo, self.correction = config.algo, config.correction
        self.minibatches, self.bound = config.learner.minibatches, config.staleness.max
        self.max_length = config.sampling.max_new_tokens
        self.needs_prox = self.correction.name != "none"
        self.needs_ref = self.algo.kl != "none"

    def prepare(self, step: int, batch: object) -> Work:
        """Advantages over whole groups, weights over each update. Raises StalenessError on a forbidden token."""
        assert isinstance(batch, Batch)
        rows = rows_of_groups(batch)
        staleness = step - np.concatenate([g.versions for g in batch.groups])
        self._check_staleness(step, batch, rows, staleness)
        updates = minibatches(len(batch.groups), self.minibatches)
        group_of, lengths = torch.from_numpy(rows.group_of), torch.from_numpy(rows.lengths)
        rewards = torch.from_numpy(np.concatenate([g.rewards for g in batch.groups]))
        weights = torch.zeros(rows.size)
        for update in updates:
            part = (group_of >= update.start) & (group_of < update.stop)
            weights[part] = sample_weights(
                self.algo.aggregation, lengths[part], group_of[part], max_length=self.max_length
            )
        return Work(
            rows=rows,
            updates=updates,
            weights=weights,
            advantages=grpo_advantages(rewards, group_of, std=self.algo.std, eps=self.algo.std_eps),
            behaviour=torch.from_numpy(np.concatenate([g.logprobs for g in batch.groups])),
            staleness=torch.from_numpy(staleness.astype(np.int64)),
        )

    def loss(
        self, work: Work, update: int, packed: Packed, logprobs: Tensor, entropy: Tensor
    ) -> tuple[Tensor, LossMetrics]:
        """See algos/loss.py. In the first update θ itself is the proximal policy."""
        assert work.behaviour is not None
        assert work.advantages is not None
        assert work.staleness is not None
        prox = None if work.prox is None or update == 0 else work.prox.index_select(0, packed.tokens)
        inputs = LossInput(
            logprobs=logprobs,
            behaviour_logprobs=work.behaviour.index_select(0, packed.tokens),
            advantages=work.advantages.index_select(0, packed.samples),
            token_weights=work.weights.index_select(0, packed.samples),
            sample_index=packed.samples,
            prox_logprobs=prox,
            ref_logprobs=None if work.ref is None else work.ref.index_select(0, packed.tokens),
            staleness=work.staleness.index_select(0, packed.tokens),
            entropy=entropy,
        )
        return policy_loss(inputs, self.algo, self.correction)

    def histograms(self, metrics: LossMetrics) -> dict[str, list[float]]:
        """offpolicy/ratio: π_θ/π_beh of the tokens."""
        return {"offpolicy/ratio": metrics.ratios()}

    @torch.no_grad()
    def agreement(self, work: Work, world: World) -> dict[str, float]:
        """mismatch/*: learner's minus engine's log-probabilities in groups that the learner's own version made whole.

        Empty where the batch has no such group, or none whose log-probabilities before the first update are known.
        """
        assert work.prox is not None
        assert work.behaviour is not None
        assert work.staleness is not None
        rows = work.rows
        stale = np.add.reduceat(work.staleness.cpu().numpy(), rows.starts[:-1][rows.lengths > 0])
        fresh_groups = np.ones(len(rows.prompts), bool)
        fresh_groups[rows.group_of[rows.lengths > 0][stale > 0]] = False
        fresh = torch.from_numpy(np.repeat(fresh_groups[rows.group_of], rows.lengths)).to(work.prox.device)
        delta = (work.prox - work.behaviour)[fresh & ~work.prox.isnan()].double()
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

    def _check_staleness(self, step: int, batch: Batch, rows: Rows, staleness: np.ndarray) -> None:
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


def rows_of_groups(batch: Batch) -> Rows:
    """The samples of a batch in durable order."""
    groups = batch.groups
    lengths = np.concatenate([g.lengths for g in groups])
    return Rows(
        prompts=tuple(g.prompt_tokens for g in groups),
        group_of=np.repeat(np.arange(len(groups)), [g.size for g in groups]),
        starts=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
        tokens=np.concatenate([g.tokens for g in groups]),
        temperatures=np.array([g.temperature for g in groups], np.float32),
        ids=np.array([g.group for g in groups], np.int64),
    )


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


class Likelihood:
    """Mean negative log-likelihood of the answer's tokens; the prompt is not trained."""

    needs_prox = False
    needs_ref = False

    def prepare(self, step: int, batch: object) -> Work:
        """``batch`` is the Rows of one update; each token weighs the same."""
        assert isinstance(batch, Rows)
        weights = torch.full((batch.size,), 1 / max(1, len(batch.tokens)))
        return Work(rows=batch, updates=minibatches(len(batch.prompts), 1), weights=weights)

    def loss(
        self, work: Work, update: int, packed: Packed, logprobs: Tensor, entropy: Tensor
    ) -> tuple[Tensor, LikelihoodMetrics]:
        """−Σ log p / tokens of the update."""
        loss = -(work.weights.index_select(0, packed.samples) * logprobs).sum()
        seen = (loss.detach(), torch.tensor(len(logprobs)), logprobs.detach().sum(), entropy.sum())
        return loss, LikelihoodMetrics(torch.stack([v.double().to(logprobs.device) for v in seen]))

    def histograms(self, metrics: LikelihoodMetrics) -> dict[str, list[float]]:
        """None."""
        return {}

    def agreement(self, work: Work, world: World) -> dict[str, float]:
        """No engine made these tokens."""
        return {}


def rows_of_pairs(prompts: Sequence[np.ndarray], answers: Sequence[np.ndarray]) -> Rows:
    """One sample a prompt, at temperature 1."""
    N = len(prompts)
    return Rows(
        prompts=tuple(prompts),
        group_of=np.arange(N),
        starts=np.concatenate([[0], np.cumsum([len(a) for a in answers], dtype=np.int64)]),
        tokens=np.concatenate(answers),
        temperatures=np.ones(N, np.float32),
        ids=np.arange(N),
    )
