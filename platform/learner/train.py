"""One learner step: K optimizer updates on one batch. The same for every training job (source × head × objective).

    role.py ── batch ──► Trainer.step
        refresh   the reference becomes the policy, where algo.ref_refresh says so
        prepare   rows, rewards, weights                               (objectives.py)
        cut       minibatches of whole groups → ranks → token budgets  (packing.py)
        score     before the first update, and only what the objective needs: log-probabilities of the policy (for
                  minibatches 2…K alone where that is enough: in the first, θ is still itself) and of the reference,
                  values of the critic
        advance   rewards and scores → advantages, returns             (objectives.py)
        update    of each trained module in turn: forward, loss in the head, backward, clip, AdamW; K times

Invariants: the loss and its metrics do not depend on the cut into micro-batches and ranks; a loss or gradient that is
not finite stops the run (DivergedError), and nothing is published: the updates before it are lost with the process;
all ranks raise together.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic

import torch
from torch import Tensor, nn

from offtrail.algos.config import CriticConfig
from offtrail.platform.config.head_config import SupervisedConfig
from offtrail.platform.config.schema import OptimConfig
from offtrail.platform.learner.adapters import AdaptedReference
from offtrail.platform.learner.gradients import GradientBlock
from offtrail.platform.learner.objectives import B, Loss, Metrics, Objective, StepData, UpdatePlan
from offtrail.platform.learner.world import World, full, local, resharded
from offtrail.platform.model.head import Reference
from offtrail.platform.model.lora import adapters_of
from offtrail.platform.model.packing import Packed, SampleTable, lay_out, microbatches
from offtrail.platform.model.policy import PackedModel, Policy
from offtrail.platform.model.scores import ScoreSpec
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


def cosine(settings: SupervisedConfig) -> Schedule:
    """Linear warm-up, then a half cosine from lr to final_lr_share·lr at the last update."""

    def lr(update: int) -> float:
        if update < settings.warmup_steps:
            return settings.lr * (update + 1) / settings.warmup_steps
        done = (update - settings.warmup_steps) / max(1, settings.steps - 1 - settings.warmup_steps)
        last = settings.final_lr_share
        return settings.lr * (last + (1 - last) * 0.5 * (1 + math.cos(math.pi * done)))

    return lr


def adamw(
    parameters: Iterable[nn.Parameter], *, lr: float, betas: tuple[float, float], eps: float, decay: float
) -> torch.optim.Optimizer:
    """Torch's fused AdamW: one kernel over all parameters (on a CPU too) in place of a dozen a parameter."""
    return torch.optim.AdamW(list(parameters), lr=lr, betas=betas, eps=eps, weight_decay=decay, fused=True)


@dataclass
class Trained:
    """A module under training: its head, what it minimises, its optimizer and its schedule.

    ``name``: of its metrics (NAME/lr), of its files in a checkpoint and in messages. ``charges``: what its tokens and
    FLOPs are called in the compute ledger. ``lr_key``: the configuration's, for messages. ``first_step``: the learner
    step from which it is trained. ``watch_gradient``: log the cosine of consecutive gradients, at the price of a copy
    of one. ``updates``: optimizer updates done so far. ``block``: where its gradients are kept together.
    """

    name: str
    module: PackedModel[Any]
    objective: Loss[Any]
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    grad_clip: float = math.inf
    charges: tuple[str, str] = ("trained_tokens", "train_flops")
    lr_key: str = "learner.optim.lr"
    first_step: int = 0
    watch_gradient: bool = False
    updates: int = 0
    block: GradientBlock | None = None
    gradient: list[Tensor] = field(default_factory=list)
    """The one before, while it is watched."""

    def __post_init__(self) -> None:
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]

    def zero_grad(self) -> None:
        """Let the gradients go."""
        self.optimizer.zero_grad()
        if self.block is not None:
            self.block.release()


class Trainer(Generic[B]):
    """The modules that a job trains, in the order of their updates, and the reference that its objective needs.

    ``trained``: the first is the one that the job is about, whose module is published and saved; PPO's critic comes
    behind it, under the name "value". ``refreshed``: of the first's updates, when the reference became it last (0: it
    is the start model). ``ref_refresh``: see algo.ref_refresh. ``scores``: what stands beside the saved model, where it
    is one that scores.
    """

    def __init__(
        self,
        world: World,
        objective: Objective[B, Any],
        trained: Sequence[Trained],
        activity: Activity,
        *,
        budget: int,
        reference: Policy | AdaptedReference | None = None,
        ref_refresh: int = 0,
        scores: ScoreSpec | None = None,
    ) -> None:
        self.world, self.objective, self.activity, self.budget = world, objective, activity, budget
        self.trained = {t.name: t for t in trained}
        self.main = trained[0]
        self.reference, self.ref_refresh, self.refreshed = reference, ref_refresh, 0
        self.scores = scores

    @property
    def module(self) -> PackedModel[Any]:
        """What is published and saved."""
        return self.main.module

    def step(self, step: int, batch: B) -> Report:
        """Train on one batch: K updates. Raises StalenessError before the first, DivergedError at any: then the
        parameters hold the updates before it, and nothing may be published.
        """
        with self.activity.busy("train"):
            self._refresh_reference()
            work = self.objective.prepare(step, batch).to(self.world.device)
            packs = [self._lay_out(work.rows, groups) for groups in work.updates]
            trained = [t for t in self.trained.values() if step >= t.first_step]
            work = self.objective.advance(self._scored(work, packs, trains_main=self.main in trained))
            done: dict[str, list[UpdateReport]] = {t.name: [] for t in trained}
            for k, micro in enumerate(packs):
                for t in trained:
                    done[t.name].append(self._update(step, work, k, micro, t))
            metrics: dict[str, float] = dict(work.metrics)
            histograms: dict[str, list[float]] = {}
            for t in trained:
                row, shapes = self._row(work, t, done[t.name])
                metrics, histograms = metrics | row, histograms | shapes
        return Report(metrics, histograms, len(work.rows.tokens))

    def _row(
        self, work: StepData, trained: Trained, done: list[UpdateReport]
    ) -> tuple[dict[str, float], dict[str, list[float]]]:
        """Metrics and histograms of a module's K updates; a collective."""
        totals = self._over_ranks(functools.reduce(operator.add, (m for d in done for m in d.metrics)))
        name, row = trained.name, totals.means(len(done))
        row |= trained.objective.agreement(work, self.world)
        row |= {f"{name}/grad_norm": sum(d.norm for d in done) / len(done), f"{name}/lr": done[-1].lr}
        if not math.isnan(done[-1].cosine):
            row[f"{name}/grad_cosine"] = done[-1].cosine
        if self.ref_refresh and trained is self.main:
            row[f"{name}/ref_age_updates"] = float(trained.updates - self.refreshed)
        return row, trained.objective.histograms(totals)

    def _lay_out(self, rows: SampleTable, groups: range) -> list[Packed]:
        """Micro-batches of this rank of some groups; every rank has as many."""
        needs, module = self.objective.needs, self.module
        fed = needs.feed_last
        parts = microbatches(
            rows, groups, self.world.size, self.budget,
            quadratic=module.quadratic, feed_last=fed, together=needs.together,
        )[self.world.rank]  # fmt: skip
        share = module.share_up_to
        return [lay_out(rows, part, share_up_to=share, feed_last=fed).to(self.world.device) for part in parts]

    def ask(self, rows: SampleTable) -> Tensor:
        """What the module that the job is about says of samples, less what the reference says where there is one: [T]
        on every rank, a number for each token that it is read at, NaN for all others. A collective.
        """
        said, ref = (torch.full((len(rows.tokens),), math.nan, device=self.world.device) for _ in range(2))
        packs = self._lay_out(rows, range(len(rows.prompts)))
        self._score(self.module, packs, said, "held_out", "held_out_flops")
        if self.reference is not None:
            self._score(self.reference, packs, ref, "held_out", "held_out_flops")
            said -= ref
        return self._merged(said) if self.world.size > 1 else said

    # --- before the first update

    @torch.no_grad()
    def _refresh_reference(self) -> None:
        """Between learner steps, so that all K updates of a step have one reference."""
        due = self.ref_refresh and self.main.updates - self.refreshed >= self.ref_refresh
        if self.reference is None or not due:
            return
        to, of = resharded(self.reference), resharded(self.module)
        current_ones = adapters_of(of).values() or of.parameters()
        for mine, current in zip(to.parameters(), current_ones, strict=True):
            local(mine).copy_(local(current))
        self.refreshed = self.main.updates

    def _scored(self, work: StepData, packs: list[list[Packed]], *, trains_main: bool) -> StepData:
        """The work with the scores that its objective needs, [T] each, NaN where they are not computed.

        Where advantages are made of scores, every rank gets those of all ranks; ``mine`` says which are its own.
        """
        needs, everything = self.objective.needs, [packed for micro in packs for packed in micro]
        mine = torch.zeros(len(work.rows.tokens), dtype=torch.bool, device=self.world.device)
        for packed in everything:
            mine[packed.tokens] = True
        prox, ref, values = self._nan(work), self._nan(work), self._nan(work)
        if needs.prox == "all" or (needs.prox == "later" and trains_main):
            later = everything if needs.prox == "all" else [packed for micro in packs[1:] for packed in micro]
            if later:
                self._score(self.module, later, prox, "prox", "prox_flops")
        if self.reference is not None and needs.ref:
            self._score(self.reference, everything, ref, "reference", "reference_flops")
        if needs.values:
            self._score(self.trained["value"].module, everything, values, "values", "value_flops")
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
    def _score(
        self, module: PackedModel[Any] | AdaptedReference, packs: list[Packed], into: Tensor, what: str, charge: str
    ) -> None:
        """Write the first of what a head says of each token."""
        with self.activity.busy(what):
            for packed in packs:
                into[module.tokens_of(packed)] = module(packed)[0]
                self.activity.charge("scored_tokens", float(len(packed.targets)))
                self.activity.charge(charge, module.forward_flops(packed))

    # --- updates

    def _update(self, step: int, work: StepData, update: int, micro: list[Packed], trained: Trained) -> UpdateReport:
        """One optimizer update of one module. Raises DivergedError before its parameters change."""
        objective = trained.objective
        plan = objective.plan_update(work, update)
        lr = trained.schedule(trained.updates) * plan.lr_scale
        for group in trained.optimizer.param_groups:
            group["lr"] = lr
        metrics, losses, said = [objective.no_metrics(self.world.device)], [], []
        for packed in micro:
            loss, out, sums = self._backward(work, update, plan, packed, trained)
            losses.append(loss)
            said.append((packed, out))
            metrics += sums
        norm = float(full(nn.utils.clip_grad_norm_(trained.parameters, trained.grad_clip)))
        loss_sum = float(self.world.sum(torch.stack(losses).sum()))
        if not math.isfinite(norm) or not math.isfinite(loss_sum):
            raise self._diverged(step, work, update, trained, loss_sum, norm, said)
        cosine = self._cosine(update, len(work.updates), trained) if trained.watch_gradient else math.nan
        trained.optimizer.step()
        trained.zero_grad()
        trained.updates += 1
        return UpdateReport(metrics, norm, lr, cosine)

    def _backward(
        self, work: StepData, update: int, plan: UpdatePlan, packed: Packed, trained: Trained
    ) -> tuple[Tensor, Tensor, list[Metrics]]:
        """Add a micro-batch's gradients: its loss, the first of what the head said of its rows, its metrics."""
        metrics: list[Metrics] = []

        def loss_of(rows: slice, out: Any) -> Tensor:
            part, sums = trained.objective.loss(work, update, plan, packed, rows, out)
            metrics.append(sums)
            return part

        loss, out = trained.module.loss(packed, loss_of, self._full_reference(packed, trained))
        loss.backward()  # type: ignore[no-untyped-call]
        tokens, flops = trained.charges
        self.activity.charge(tokens, float(len(packed.targets)))
        needed, again = trained.module.training_flops(packed)
        self.activity.charge(flops, needed)
        if again:
            self.activity.charge("repeated_operations", again)
        return loss.detach(), out[0], metrics

    def _full_reference(self, packed: Packed, trained: Trained) -> Reference | None:
        """What an exact KL compares with."""
        if self.reference is None or not trained.objective.needs.full_ref:
            return None
        self.activity.charge("reference_flops", self.reference.forward_flops(packed))
        return self.reference.reference(packed)

    def _cosine(self, update: int, updates: int, trained: Trained) -> float:
        """The cosine of this gradient and the one before it; NaN where that is not kept.

        Only of the last two updates of a step (where K = 1, across two steps), so that a copy is held for no longer
        than that, and a resumed run logs what the first one logged.
        """
        last, keeps = update + 1 == updates, update + 2 == updates or updates == 1
        gradients = [local(p.grad) for p in trained.parameters if p.grad is not None]
        cosine = math.nan
        if last and len(trained.gradient) == len(gradients):
            pairs = list(zip(trained.gradient, gradients, strict=True))
            dots = [torch.stack([(a * b).sum(), (a * a).sum(), (b * b).sum()]).double() for a, b in pairs]
            dot, before, now = self.world.sum(torch.stack(dots).sum(0)).tolist()
            cosine = dot / math.sqrt(before * now) if before * now > 0 else math.nan
        trained.gradient = [g.clone() for g in gradients] if keeps else []
        return cosine

    def _diverged(
        self,
        step: int,
        work: StepData,
        update: int,
        trained: Trained,
        loss: float,
        norm: float,
        said: Iterable[tuple[Packed, Tensor]],
    ) -> DivergedError:
        """Names the groups of which the head says something that is not finite, on any rank; if there are none, all of
        the update.
        """
        bad = torch.zeros(len(work.rows.prompts), device=self.world.device)
        group_of = torch.from_numpy(work.rows.group_of).to(self.world.device)
        for packed, out in said:
            bad[group_of[trained.module.samples_of(packed)[~torch.isfinite(out)]]] = 1
        named = torch.nonzero(self.world.sum(bad)).flatten().tolist() or list(work.updates[update])
        name = trained.name
        what = f"the {name}'s loss is {loss}" if not math.isfinite(loss) else f"{name}/grad_norm is {norm}"
        return DivergedError(
            f"step {step}, update {update + 1} of {len(work.updates)}: {what} on groups "
            f"{work.rows.ids[named].tolist()}; no version was published. Lower {trained.lr_key} and "
            "resume: run.resume=true goes on from the newest checkpoint, run.resume_from=step_N from an older one, and "
            "the ledger notes the change"
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
