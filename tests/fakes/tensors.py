"""Weights as they come to a server: pickled tensors, flattened buckets, process groups beside the default one."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import distributed_c10d as c10d


@dataclass
class FlattenedTensorMetadata:
    """sglang.srt.weight_sync.tensor_bucket's, under whose name it is unpickled."""

    name: str
    shape: Sequence[int]
    dtype: torch.dtype
    start_idx: int
    end_idx: int
    numel: int


class Unpickler(pickle.Unpickler):
    """Tensors and plain containers, as SGLang's SafeUnpickler lets them pass; anything else kills the scheduler."""

    plain = frozenset(
        ["bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "range", "set", "slice"]
    ) | {"str", "tuple"}
    modules = ("torch", "torch._utils", "torch.storage", "torch.nn.parameter", "torch._tensor", "torch.serialization")
    others = frozenset(
        [("collections", "OrderedDict"), ("types", "SimpleNamespace"), ("_codecs", "encode"), ("functools", "partial")]
    )

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("sglang.srt.weight_sync") and name == "FlattenedTensorMetadata":
            return FlattenedTensorMetadata
        reductions = module == "torch.multiprocessing.reductions" and name.startswith("rebuild_")
        shared = module == "multiprocessing.resource_sharer" and name == "DupFd"
        known = (module == "builtins" and name in self.plain) or (module, name) in self.others
        if known or module in self.modules or reductions or shared:
            return super().find_class(module, name)
        raise RuntimeError(f"Blocked unsafe global ({module}.{name}) during pickle deserialization")


def unbucket(flat: Tensor, metadata: Iterable[Any]) -> list[tuple[str, Tensor]]:
    """Named tensors out of a flattened bucket of bytes."""
    return [(m.name, flat[m.start_idx : m.end_idx].view(m.dtype).reshape(m.shape)) for m in metadata]


def init_group(backend: str, address: str, rank: int, world_size: int, name: str) -> Any:
    """A process group beside the default one, with members of other programs: SGLang's init_custom_process_group."""
    timeout = c10d.default_pg_timeout
    store, rank, world_size = next(c10d.rendezvous(address, rank, world_size, timeout=timeout))
    store.set_timeout(timeout)
    group, _ = c10d._new_process_group_helper(
        world_size,
        rank,
        [],
        c10d.Backend(backend),
        c10d.PrefixStore(name, store),
        group_name=name,
        timeout=timeout,
    )
    c10d._world.pg_group_ranks[group] = {i: i for i in range(world_size)}
    return group
