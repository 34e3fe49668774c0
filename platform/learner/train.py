"""One learner step: K optimizer updates on one batch. The same for every training job (source × head × objective).

    role.py, sft.py ── batch ──► Trainer.step
        refresh   the reference becomes the policy, where algo.ref_refresh says so
        prepare   rows, rewards, weights                               (objectives.py)
        cut       minibatches of whole groups → ranks → token budgets  (packing.py)
        score     before the first update, and only where the objective needs them: log-probabilities of the policy
                  (for minibatches 2…K alone where that is enough: in the first, θ is still itself) and of the
                  reference, values of the critic
        advance   rewards and scores → advantages, returns             (objectives.py)
        update    forward, loss in the head, backward, clip, AdamW; K times; behind each, the critic's (critic.py)

Invariants: the loss and its metrics do not depend on the cut into micro-batches and ranks; a loss or gradient that is
not finite stops the run (DivergedError), and nothing is published: the updates before it are lost with the process;
all ranks raise together.
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

from offtrail.algos.config import CriticConfig
from offtrail.platform.config.schema import OptimConfig, SftConfig
from offtrail.platform.learner.critic import CriticTrainer
from offtrail.platform.learner.objectives import Metrics, Objective, StepData
from offtrail.platform.learner.world import World, full, local, resharded
from offtrail.platform.model.head import Reference, TokenOutputs
from offtrail.platform.model.packing import Packed, lay_out, microbatches
from offtrail.platform.model.policy import Policy
from offtrail.platform.runtime.activity import Activity

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


@dataclass(frozen=True)
class UpdateReport:
    """One optimizer update: metrics of its micro-batches, the gradient's norm before clipping, the learning rate, and
    the cosine to the gradient before (NaN: not known).
    """

    metrics: list[Metrics]
    norm: float
    lr: float
    cosine: float = math.nan


def warmup(optim: OptimConfig | CriticConfig) -> Schedule:
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
    """A policy, its optimizer and schedule, an objective, and the reference and critic that it needs.

    ``updates``: optimizer updates of the policy done so far; ``refreshed``: of these, when the reference became the
    policy last (0: it is the start model). ``ref_refresh``: see algo.ref_refresh. ``watch_gradients``: log the cosine
    of consecutive gradients, at the price of a copy of one.
    """

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
        critic: CriticTrainer | None = None,
        ref_refresh: int = 0,
        watch_gradients: bool = False,
    ) -> None:
        self.world, self.policy, self.optimizer, self.objective = world, policy, optimizer, objective
        self.schedule, self.activity, self.reference, self.critic = schedule, activity, reference, critic
        self.budget, self.grad_clip, self.updates = budget, grad_clip, 0
        self.ref_refresh, self.refreshed, self.watch_gradients = ref_refresh, 0, watch_gradients
        self.share_up_to = policy.share_up_to
        self.parameters = [p for p in policy.parameters() if p.requires_grad]
        self.size = sum(p.numel() for p in self.parameters)
        self._last_gradient: list[Tensor] = []

    def step(self, step: int, batch: object) -> Report:
        """Train on one batch: K updates. Raises StalenessError before the first, DivergedError at any: then the
        parameters hold the updates before it, and nothing may be published.
        """
        with self.activity.busy("train"):
            self._refresh_reference()
            work = self.objective.prepare(step, batch).to(self.world.device)
            packs = [self._lay_out(work, groups) for groups in work.updates]
            trains_policy = self.critic is None or step >= self.critic.pretrain_steps
            work = self.objective.advance(self._scored(work, packs, trains_policy))
            metrics: dict[str, float] = dict(work.metrics)
            histograms: dict[str, list[float]] = {}
            policy, critic = [], []
            for k, micro in enumerate(packs):
                if trains_policy:
                    policy.append(self._update(step, work, k, micro, last=k + 1 == len(packs)))
                if self.critic is not None:
                    critic.append(self._update_critic(step, work, k, micro, self.critic))
            if policy:
                totals = self._over_ranks(functools.reduce(operator.add, (m for done in policy for m in done.metrics)))
                metrics |= totals.means(len(packs)) | self.objective.agreement(work, self.world)
                metrics |= self._policy_row(policy)
                histograms = self.objective.histograms(totals)
            if self.critic is not None:
                metrics |= self._critic_row(critic, self.critic)
        return Report(metrics, histograms, len(work.rows.tokens))

    def _policy_row(self, done: list[UpdateReport]) -> dict[str, float]:
        row = {"policy/grad_norm": sum(d.norm for d in done) / len(done), "policy/lr": done[-1].lr}
        if not math.isnan(done[-1].cosine):
            row["policy/grad_cosine"] = done[-1].cosine
        if self.ref_refresh:
            row["policy/ref_age_updates"] = float(self.updates - self.refreshed)
        return row

    def _critic_row(self, done: list[UpdateReport], critic: CriticTrainer) -> dict[str, float]:
        totals = self._over_ranks(functools.reduce(operator.add, (m for d in done for m in d.metrics)))
        norm = sum(d.norm for d in done) / len(done)
        row: dict[str, float] = totals.means(len(done)) | {"value/grad_norm": norm, "value/lr": done[-1].lr}
        return row

    def _lay_out(self, work: StepData, groups: range) -> list[Packed]:
        """Micro-batches of this rank of one update; every rank has as many."""
        every = microbatches(work.rows, groups, self.world.size, self.budget, quadratic=self.policy.quadratic)
        parts = every[self.world.rank]
        return [lay_out(work.rows, part, share_up_to=self.share_up_to).to(self.world.device) for part in parts]

    # --- before the first update

    @torch.no_grad()
    def _refresh_reference(self) -> None:
        """Between learner steps, so that all K updates of a step have one reference."""
        due = self.ref_refresh and self.updates - self.refreshed >= self.ref_refresh
        if self.reference is None or not due:
            return
        to, of = resharded(self.reference), resharded(self.policy)
        for mine, current in zip(to.parameters(), of.parameters(), strict=True):
            local(mine).copy_(local(current))
        self.refreshed = self.updates

    def _scored(self, work: StepData, packs: list[list[Packed]], trains_policy: bool) -> StepData:
        """The work with the scores that its objective needs, [T] each, NaN where they are not computed.

        Where advantages are made of scores, every rank gets those of all ranks; ``mine`` says which are its own.
        """
        needs, everything = self.objective.needs, [packed for micro in packs for packed in micro]
        mine = torch.zeros(len(work.rows.tokens), dtype=torch.bool, device=self.world.device)
        for packed in everything:
            mine[packed.tokens] = True
        prox, ref, values = self._nan(work), self._nan(work), self._nan(work)
        if needs.prox == "all" or (needs.prox == "later" and trains_policy):
            later = everything if needs.prox == "all" else [packed for micro in packs[1:] for packed in micro]
            if later:
                with self.activity.busy("prox"):
                    self._score(self.policy, later, prox, "prox_flops")
        if self.reference is not None and needs.ref:
            with self.activity.busy("reference"):
                self._score(self.reference, everything, ref, "reference_flops")
        if self.critic is not None:
            self.critic.score(everything, values)
        if needs.merged and self.world.size > 1:
            prox, ref, values = (self._merged(scores) for scores in (prox, ref, values))
        return replace(work, prox=prox, ref=ref if needs.ref else None, values=values, mine=mine)

    def _nan(self, work: StepData) -> Tensor:
        return torch.full((len(work.rows.tokens),), math.nan, device=self.world.device)

    def _merged(self, scores: Tensor) -> Tensor:
        """Each token's score from the rank that has it."""
        known = ~scores.isnan()
        total, count = self.world.sum(scores.nan_to_num()), self.world.sum(known.float())
        return torch.where(count > 0, total, math.nan)

    @torch.no_grad()
    def _score(self, policy: nn.Module, packs: list[Packed], into: Tensor, charge: str) -> None:
        for packed in packs:
            into[packed.tokens] = policy(packed)[0]
            self.activity.charge(charge, 2.0 * self.size * packed.input_ids.numel())

    # --- updates

    def _update(self, step: int, work: StepData, update: int, micro: list[Packed], *, last: bool) -> UpdateReport:
        """One optimizer update of the policy."""
        plan_of = self.objective.plan_update(work, update)
        lr = self.schedule(self.updates) * plan_of.lr_scale
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        losses, seen = [], []
        metrics: list[Metrics] = [self.objective.no_metrics(self.world.device)]
        for packed in micro:

            def loss_of(rows: slice, scores: TokenOutputs, packed: Packed = packed) -> Tensor:
                part, sums = self.objective.loss(work, update, plan_of, packed, rows, scores)
                metrics.append(sums)
                return part

            loss, scores = self.policy.loss(packed, loss_of, self._full_reference(packed))
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
            seen.append(scores.logprobs)
            self.activity.charge("trained_tokens", float(len(scores.logprobs)))
            self.activity.charge("train_flops", 6.0 * self.size * packed.input_ids.numel())
        if update == 0 and work.prox is not None and self.objective.needs.prox != "all":
            for packed, logprobs in zip(micro, seen, strict=True):
                work.prox[packed.tokens] = logprobs
        norm = float(full(nn.utils.clip_grad_norm_(self.parameters, self.grad_clip)))
        loss_sum = float(self.world.sum(torch.stack(losses).sum()))
        if not math.isfinite(norm) or not math.isfinite(loss_sum):
            raise self._diverged(step, work, update, loss_sum, norm, zip(micro, seen, strict=True))
        cosine = self._cosine(update, len(work.updates)) if self.watch_gradients else math.nan
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.updates += 1
        return UpdateReport(metrics, norm, lr, cosine)

    def _full_reference(self, packed: Packed) -> Reference | None:
        """What an exact KL compares with."""
        if self.reference is None or not self.objective.needs.full_ref:
            return None
        self.activity.charge("reference_flops", 2.0 * self.size * packed.input_ids.numel())
        return self.reference.reference(packed)

    def _update_critic(
        self, step: int, work: StepData, update: int, micro: list[Packed], critic: CriticTrainer
    ) -> UpdateReport:
        """One optimizer update of the critic. Raises DivergedError before its parameters change."""
        assert work.values is not None
        assert work.returns is not None
        lr = critic.schedule(critic.updates)
        metrics, loss, norm = critic.update(micro, work.weights, work.values, work.returns)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise DivergedError(
                f"step {step}, update {update + 1} of {len(work.updates)}: the critic's loss is {loss}, "
                f"value/grad_norm {norm}; no version was published. Lower algo.critic.lr and resume from the last "
                "checkpoint"
            )
        return UpdateReport(list(metrics), norm, lr)

    def _cosine(self, update: int, updates: int) -> float:
        """Of this gradient and the one before it; NaN where that is not kept.

        Only of the last two updates of a step (where K = 1, across two steps), so that a copy is held for no longer
        than that, and a resumed run logs what the first one logged.
        """
        last, keeps = update + 1 == updates, update + 2 == updates or updates == 1
        gradients = [local(p.grad) for p in self.parameters if p.grad is not None]
        cosine = math.nan
        if last and len(self._last_gradient) == len(gradients):
            pairs = list(zip(self._last_gradient, gradients, strict=True))
            dots = [torch.stack([(a * b).sum(), (a * a).sum(), (b * b).sum()]).double() for a, b in pairs]
            dot, before, now = self.world.sum(torch.stack(dots).sum(0)).tolist()
            cosine = dot / math.sqrt(before * now) if before * now > 0 else math.nan
        self._last_gradient = [g.clone() for g in gradients] if keeps else []
        return cosine

    def _diverged(
        self, step: int, work: StepData, update: int, loss: float, norm: float, seen: Iterable[tuple[Packed, Tensor]]
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
