"""One learner step: K optimizer updates on one batch. The same for every training job (source × head × objective).

    role.py, sft.py ── batch ──► Trainer.step
        prepare   rows, advantages, weights                            (objectives.py)
        plan      minibatches of whole groups → ranks → token budgets  (packing.py)
        prox      log-probabilities before the first update, only for minibatches 2…K: in the first, θ is still itself
        ref       log-probabilities of the start model, only where the loss has a KL term
        update    forward, backward, clip, AdamW; K times

Invariants: the loss and its metrics do not depend on the cut into micro-batches and ranks; a loss or gradient that is
not finite stops the run before the parameters change, and nothing is published (DivergedError); all ranks raise
together.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from offtrail.platform.config.schema import OptimConfig, SftConfig
from offtrail.platform.learner.model import Policy
from offtrail.platform.learner.objectives import Metrics, Objective, Work
from offtrail.platform.learner.packing import Packed, lay_out, plan
from offtrail.platform.learner.world import World, full
from offtrail.platform.tracking.activity import Activity

Schedule = Callable[[int], float]
"""Learning rate of an optimizer update, counted from 0."""


class DivergedError(RuntimeError):
    """A loss or gradient is not finite."""


@dataclass(frozen=True)
class Report:
    """What one step did: scalars by name (docs/metrics.md), histograms as quantiles, trained output tokens."""

    metrics: dict[str, float]
    histograms: dict[str, list[float]]
    tokens: int


def warmup(optim: OptimConfig) -> Schedule:
    """Linear from lr/warmup_updates to lr, then constant."""
    return lambda update: optim.lr * min(1.0, (update + 1) / max(1, optim.warmup_updates))


def cosine(sft: SftConfig) -> Schedule:
    """Linear warm-up, then a half cosine from lr to final_lr_share·lr at the last update."""

    def lr(update: int) -> float:
        if update < sft.warmup_steps:
            return sft.lr * (update + 1) / sft.warmup_steps
        done = (update - sft.warmup_steps) / max(1, sft.steps - 1 - sft.warmup_steps)
        return sft.lr * (sft.final_lr_share + (1 - sft.final_lr_share) * 0.5 * (1 + math.cos(math.pi * done)))

    return lr


def adamw(
    parameters: Iterable[nn.Parameter], *, lr: float, betas: tuple[float, float], eps: float, decay: float
) -> torch.optim.Optimizer:
    """Torch's fused AdamW: one kernel over all parameters (on a CPU too) in place of a dozen a parameter."""
    return torch.optim.AdamW(list(parameters), lr=lr, betas=betas, eps=eps, weight_decay=decay, fused=True)


class Trainer:
    """A policy, its optimizer and schedule, and an objective. ``updates``: optimizer updates done so far."""

    def __init__(
        self,
        world: World,
        policy: Policy,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        objective: Objective,
        activity: Activity,
        *,
        budget: int,
        grad_clip: float = math.inf,
        reference: Policy | None = None,
    ) -> None:
        self.world, self.policy, self.optimizer, self.objective = world, policy, optimizer, objective
        self.schedule, self.activity, self.reference = schedule, activity, reference
        self.budget, self.grad_clip, self.updates = budget, grad_clip, 0
        self.share_up_to = policy.share_up_to
        self.parameters = [p for p in policy.parameters() if p.requires_grad]
        self.size = sum(p.numel() for p in self.parameters)

    def step(self, step: int, batch: object) -> Report:
        """Train on one batch: K updates. Raises StalenessError or DivergedError, before the parameters change."""
        with self.activity.busy("train"):
            work = self.objective.prepare(step, batch).to(self.world.device)
            packs = [self._lay_out(work, groups) for groups in work.updates]
            work = replace(work, prox=self._before(work, packs), ref=self._reference_logprobs(work, packs))
            done = [self._update(step, work, k, micro) for k, micro in enumerate(packs)]
            totals = self._over_ranks(functools.reduce(operator.add, (m for metrics, _ in done for m in metrics)))
            metrics = totals.means(len(packs)) | self.objective.agreement(work, self.world)
        metrics["policy/grad_norm"] = sum(norm for _, norm in done) / len(done)
        metrics["policy/lr"] = self.schedule(self.updates - 1)
        return Report(metrics, self.objective.histograms(totals), len(work.rows.tokens))

    def _lay_out(self, work: Work, groups: range) -> list[Packed]:
        """Micro-batches of this rank of one update; every rank has as many."""
        parts = plan(work.rows, groups, self.world.size, self.budget)[self.world.rank]
        return [lay_out(work.rows, part, share_up_to=self.share_up_to).to(self.world.device) for part in parts]

    def _before(self, work: Work, packs: list[list[Packed]]) -> Tensor:
        """[T] log-probabilities of this rank's tokens before the first update; NaN where they are not computed.

        The first update's own forward fills its part in: there θ has not moved.
        """
        before = torch.full((len(work.rows.tokens),), math.nan, device=self.world.device)
        if self.objective.needs_prox and len(packs) > 1:
            with self.activity.busy("prox"):
                self._score(self.policy, [packed for micro in packs[1:] for packed in micro], before, "prox_flops")
        return before

    def _reference_logprobs(self, work: Work, packs: list[list[Packed]]) -> Tensor | None:
        """[T] log-probabilities under the reference policy, of this rank's tokens."""
        if self.reference is None:
            return None
        scores = torch.full((len(work.rows.tokens),), math.nan, device=self.world.device)
        with self.activity.busy("reference"):
            self._score(self.reference, [packed for micro in packs for packed in micro], scores, "reference_flops")
        return scores

    @torch.no_grad()
    def _score(self, policy: nn.Module, packs: list[Packed], into: Tensor, charge: str) -> None:
        for packed in packs:
            into[packed.tokens] = policy(packed)[0]
            self.activity.charge(charge, 2.0 * self.size * packed.input_ids.numel())

    def _update(self, step: int, work: Work, update: int, micro: list[Packed]) -> tuple[list[Metrics], float]:
        """One optimizer update: metrics of its micro-batches, and the gradient's norm before clipping."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule(self.updates)
        losses, metrics, seen = [], [], []
        for packed in micro:
            logprobs, entropy = self.policy(packed)
            loss, sums = self.objective.loss(work, update, packed, logprobs, entropy)
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
            metrics.append(sums)
            seen.append(logprobs.detach())
            self.activity.charge("trained_tokens", float(len(logprobs)))
            self.activity.charge("train_flops", 6.0 * self.size * packed.input_ids.numel())
        if update == 0 and work.prox is not None:
            for packed, logprobs in zip(micro, seen, strict=True):
                work.prox[packed.tokens] = logprobs
        norm = float(full(nn.utils.clip_grad_norm_(self.parameters, self.grad_clip)))
        loss_sum = float(self.world.sum(torch.stack(losses).sum()))
        if not math.isfinite(norm) or not math.isfinite(loss_sum):
            raise self._diverged(step, work, update, loss_sum, norm, zip(micro, seen, strict=True))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.updates += 1
        return metrics, norm

    def _diverged(
        self, step: int, work: Work, update: int, loss: float, norm: float, seen: Iterable[tuple[Packed, Tensor]]
    ) -> DivergedError:
        """Names the groups whose log-probabilities are not finite on any rank; if there are none, all of the update."""
        bad = torch.zeros(len(work.rows.prompts), device=self.world.device)
        group_of = torch.from_numpy(work.rows.group_of).to(self.world.device)
        for packed, logprobs in seen:
            bad[group_of[packed.samples[~torch.isfinite(logprobs)]]] = 1
        named = torch.nonzero(self.world.sum(bad)).flatten().tolist() or list(work.updates[update])
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"policy/grad_norm is {norm}"
        return DivergedError(
            f"step {step}, update {update + 1} of {len(work.updates)}: {what} on groups "
            f"{work.rows.ids[named].tolist()}; no version was published. Look at these groups in the archive; lower "
            "learner.optim.lr and resume from the last checkpoint"
        )

    def _over_ranks(self, metrics: Metrics) -> Metrics:
        """Sums and histograms added, maxima maximised, over the ranks."""
        if self.world.size == 1:
            return metrics
        reduced = {
            field.name: (self.world.max if field.name == "maxima" else self.world.sum)(getattr(metrics, field.name))
            for field in dataclasses.fields(metrics)  # type: ignore[arg-type]
        }
        return replace(metrics, **reduced)  # type: ignore[type-var]
