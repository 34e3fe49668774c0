"""The reference policy of a LoRA run: the policy's own weights with other adapters. No second model.

make.py ──► AdaptedReference ──► train.py scores with it and refreshes it, checkpoint.py saves it, like any reference

At first its B are 0, which is the start model. algo.ref_refresh copies the policy's adapters into it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from offtrail.platform.learner.world import local, resharded
from offtrail.platform.model.head import Reference
from offtrail.platform.model.lora import PARTS, adapters_of
from offtrail.platform.model.packing import Packed
from offtrail.platform.model.policy import Policy


class AdaptedReference(nn.Module):
    """Its parameters are adapters alone, named as the policy's with / for every dot (a module's own names have none),
    and sharded as they are; for the length of a forward pass the policy wears them.
    """

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self._policy = (policy,)  # in a tuple: its weights are not this module's
        for name, parameter in adapters_of(policy).items():
            begin = torch.zeros_like(parameter) if f".{PARTS[1]}." in name else parameter.detach().clone()
            self.register_parameter(name.replace(".", "/"), nn.Parameter(begin, requires_grad=False))

    def forward(self, packed: Packed) -> Any:
        """As Policy's."""
        with self._worn() as policy:
            return policy(packed)

    def tokens_of(self, packed: Packed) -> Tensor:
        """As Policy's."""
        return packed.tokens

    def reference(self, packed: Packed) -> Reference:
        """As Policy's."""
        with self._worn() as policy:
            return policy.reference(packed)

    def forward_flops(self, packed: Packed) -> float:
        """As Policy's."""
        return self._policy[0].forward_flops(packed)

    @contextlib.contextmanager
    def _worn(self) -> Iterator[Policy]:
        """The policy in these adapters. Trap: what FSDP2 has gathered at the root is gathered anew."""
        policy = self._policy[0]
        own = _shards(policy)
        kept = [shard.clone() for shard in own]
        _copy([local(parameter) for parameter in self.parameters()], own)
        try:
            yield policy
        finally:
            _copy(kept, _shards(policy))


def _shards(policy: Policy) -> list[Tensor]:
    resharded(policy)
    return [local(parameter) for parameter in adapters_of(policy).values()]


@torch.no_grad()
def _copy(values: list[Tensor], into: list[Tensor]) -> None:
    for target, value in zip(into, values, strict=True):
        target.copy_(value)
