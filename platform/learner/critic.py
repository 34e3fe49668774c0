"""The critic of PPO: the value of the state that each output token is drawn in, trained beside the policy.

train.py calls ``CriticTrainer``: ``score`` before the first update of a step, ``update`` behind each of the policy's.

Invariants: the critic sees the policy's micro-batches, cut over the same ranks; its values before the batch's first
update are the ones that advantages, returns and the value clip are taken from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from offtrail.algos.config import PpoConfig
from offtrail.algos.value import ValueMetrics, value_loss
from offtrail.platform.learner.world import World, full
from offtrail.platform.model.packing import Packed
from offtrail.platform.model.policy import Policy
from offtrail.platform.runtime.activity import Activity


class Critic(nn.Module):
    """A policy's decoder with a scalar head that begins at 0, so that at first advantages are returns.

    ``policy``: its decoder is taken as it is set up (dtype, kernels, checkpointing) under the same parameter names; its
    own head is left.
    """

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.model: Any = policy.model.base_model
        head = policy.model.get_output_embeddings().weight
        self.head = nn.Linear(head.shape[1], 1, bias=False, device=head.device, dtype=torch.float32)
        nn.init.zeros_(self.head.weight)
        self.autocast = policy.autocast

    def forward(self, packed: Packed) -> Tensor:
        """Values [M] float32, with gradient: before each output token, of the prompt and the tokens so far."""
        with torch.autocast(packed.input_ids.device.type, torch.bfloat16, enabled=self.autocast):
            hidden = self.model(
                input_ids=packed.input_ids, position_ids=packed.position_ids, use_cache=False, packed=packed
            ).last_hidden_state[0]
        # mv and not linear(…).squeeze(1): FSDP2's hooks do not hold on a view.
        return torch.mv(hidden.index_select(0, packed.predict).float(), self.head.weight[0].float())


class CriticTrainer:
    """A critic, its optimizer and its schedule. ``updates``: optimizer updates done so far."""

    def __init__(
        self,
        world: World,
        critic: Critic,
        optimizer: torch.optim.Optimizer,
        schedule: Callable[[int], float],
        algo: PpoConfig,
        activity: Activity,
    ) -> None:
        self.world, self.critic, self.optimizer, self.schedule = world, critic, optimizer, schedule
        self.activity, self.updates, self.clip = activity, 0, algo.value_clip
        self.grad_clip, self.pretrain_steps = algo.critic.grad_clip, algo.critic.pretrain_steps
        self.parameters = [p for p in critic.parameters() if p.requires_grad]
        self.size = sum(p.numel() for p in self.parameters)

    @torch.no_grad()
    def score(self, packs: Sequence[Packed], into: Tensor) -> None:
        """Write the values of this rank's tokens into [T]."""
        with self.activity.busy("values"):
            for packed in packs:
                into[packed.tokens] = self.critic(packed)
                self.activity.charge("value_flops", 2.0 * self.size * packed.input_ids.numel())

    def update(
        self, micro: Sequence[Packed], weights: Tensor, old_values: Tensor, returns: Tensor
    ) -> tuple[list[ValueMetrics], float, float]:
        """One optimizer update on ``weights`` [N], ``old_values`` and ``returns`` [T].

        Metrics of the micro-batches, the loss over all ranks and the gradient's norm before clipping. Where one of
        these is not finite, nothing was changed: the caller raises.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule(self.updates)
        losses, metrics = [], []
        for packed in micro:
            at = packed.tokens
            loss, sums = value_loss(
                self.critic(packed),
                old_values.index_select(0, at),
                returns.index_select(0, at),
                weights.index_select(0, packed.samples),
                clip=self.clip,
            )
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
            metrics.append(sums)
            self.activity.charge("value_flops", 6.0 * self.size * packed.input_ids.numel())
        norm = float(full(nn.utils.clip_grad_norm_(self.parameters, self.grad_clip)))
        loss_sum = float(self.world.sum(torch.stack(losses).sum()))
        if math.isfinite(norm) and math.isfinite(loss_sum):
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.updates += 1
        return metrics, loss_sum, norm
