"""The learner's processes: one plain process, or an FSDP2 world of learner.ranks.

The launcher starts the ranks with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT set, as torchrun does.

ranks = 1 trains the plain module: there is nothing to shard, and FSDP2's hooks, gathers and DTensor parameters would
cost without giving anything. ranks > 1 shards parameters, gradients and optimizer state by accelerate's FSDP2 (gloo
on a CPU, NCCL on GPUs); the batch reaches rank 0 and is broadcast.

Invariants: every rank calls the same collectives in the same order; gradients add up over ranks (they are not
averaged), because the loss of each rank is divided by counts of the whole update.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from offtrail.platform.config.schema import LearnerConfig

M = TypeVar("M", bound=nn.Module)


@dataclass
class World:
    """The place of a process among the learner's ranks, and the collectives that train.py and role.py need."""

    rank: int
    size: int
    device: torch.device
    accelerator: Any = None

    @property
    def main(self) -> bool:
        """Rank 0: the one that talks to the broker, publishes and writes."""
        return self.rank == 0

    def prepare(self, model: M, optimizer: torch.optim.Optimizer) -> tuple[M, torch.optim.Optimizer]:
        """Shard a module (its decoder layers one by one, the rest at the root) and point the optimizer at the shards.

        Raises RuntimeError where a parameter is no DTensor afterwards: accelerate falls back to DDP without a word.
        """
        if self.size == 1:
            return model, optimizer
        model, prepared = self.accelerator.prepare(model, optimizer)
        plain = [name for name, p in model.named_parameters() if not isinstance(p, DTensor)]
        if plain:
            raise RuntimeError(f"learner.ranks={self.size}: FSDP2 did not shard {plain[0]} (and {len(plain) - 1} more)")
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)  # the default averages over ranks
                module.set_force_sum_reduction_for_comms(True)  # gloo has no pre-multiplied sum
        return model, prepared.optimizer

    def shard(self, model: M) -> M:
        """Shard a module that is not trained."""
        if self.size == 1:
            return model
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        sharded: M = fsdp2_prepare_model(self.accelerator, model)
        return sharded

    def sum(self, tensor: Tensor) -> Tensor:
        """Add in place over the ranks."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def max(self, tensor: Tensor) -> Tensor:
        """Maximum in place over the ranks."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def broadcast(self, blob: bytes | bytearray | memoryview) -> bytes | bytearray | memoryview:
        """Rank 0's bytes on every rank; what the others pass is ignored."""
        if self.size == 1:
            return blob
        length = torch.tensor([len(blob)], dtype=torch.int64, device=self.device)
        dist.broadcast(length, 0)
        data = torch.empty(int(length), dtype=torch.uint8, device=self.device)
        if self.main:
            data.copy_(torch.frombuffer(bytearray(blob), dtype=torch.uint8) if len(blob) else data)
        dist.broadcast(data, 0)
        return bytes(data.cpu().numpy().tobytes())

    def close(self) -> None:
        """Leave the process group."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def full(tensor: Tensor) -> Tensor:
    """A DTensor gathered, any other tensor as it is; a collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def resharded(module: nn.Module) -> nn.Module:
    """The module with only its shards at hand: a forward without backward leaves the root's parameters gathered."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
    return module


def local(tensor: Tensor) -> Tensor:
    """Shard of a DTensor on this rank, any other tensor as it is; no collective. Writing to it writes to the whole."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """``value``, whole on every rank, cut and placed as ``like`` is."""
    if not isinstance(like, DTensor):
        return value.to(like.device, like.dtype)
    return distribute_tensor(value.to(like.device, like.dtype), like.device_mesh, like.placements, src_data_rank=None)


def join(config: LearnerConfig, layer_classes: Iterable[str], *, deadline_s: float) -> World:
    """Join the world that the environment describes; ``layer_classes`` are the decoder layers' class names.

    Raises ValueError when WORLD_SIZE is not learner.ranks. A collective that waits longer than ``deadline_s`` fails.
    """
    torch.set_num_threads(config.threads)
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if size != config.ranks:
        raise ValueError(f"learner.ranks={config.ranks}, but WORLD_SIZE={size}: start as many processes as ranks")
    if size == 1:
        return World(rank, size, torch.device(config.device))
    return World(rank, size, *_accelerate(config, list(layer_classes), deadline_s))


def _accelerate(config: LearnerConfig, layer_classes: list[str], deadline_s: float) -> tuple[torch.device, Any]:
    from accelerate import Accelerator, FullyShardedDataParallelPlugin, InitProcessGroupKwargs
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    cpu = config.device == "cpu"
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=layer_classes,
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
    )
    patience = InitProcessGroupKwargs(backend="gloo" if cpu else "nccl", timeout=timedelta(seconds=deadline_s))
    accelerator = Accelerator(cpu=cpu, fsdp_plugin=plugin, kwargs_handlers=[patience])
    if cpu:
        # Trap: on a CPU accelerate takes the plugin and goes on with DDP.
        for state in (PartialState, AcceleratorState):
            state._shared_state["distributed_type"] = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    return accelerator.device, accelerator
