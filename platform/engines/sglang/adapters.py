"""Versions that are adapters alone (learner.lora.publish=adapter), as SGLang loads them: each under a name of its own,
beside the start model, whose weights never change.

    engine._transfer ── write ──► a folder as PEFT's ── FromAdapter ──► /load_lora_adapter ── name_of(v) in each request

Version 0 is the start model: a request that names no adapter.

Traps of SGLang (read in 0.5.21): of q, k and v it wants all or none, and an adapter to up alone is left out without a
word, so that what is missing is written as zeros; a name that is loaded already is refused; an unload waits for all
requests of that name, with a lock that every later load needs (serve.py sees to it that none is counted for ever).
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from offtrail.platform.config.schema import LoraConfig, SglangConfig
from offtrail.platform.engines.sglang.control import ControlError, Server
from offtrail.platform.engines.sglang.servers import Address
from offtrail.platform.engines.sglang.shapes import Shapes
from offtrail.platform.model import lora

log = logging.getLogger("offtrail.generator")

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that are one in SGLang."""
LAYERS = ("o_proj", "down_proj", "qkv_proj", "gate_up_proj", *(name for group in TOGETHER for name in group))
"""Those that may have an adapter there, the experts of a mixture apart."""


def name_of(version: int) -> str | None:
    """The adapter's name in a server; None: no adapter."""
    return f"v{version}" if version > 0 else None


def server_flags(config: SglangConfig, settings: LoraConfig, shapes: Shapes) -> list[str]:
    """What a server is started with, so that it has room for such adapters. On a CPU by torch's own products."""
    flags = ["--enable-lora", "--max-lora-rank", str(settings.rank), "--lora-target-modules", *layers(settings, shapes)]
    return [*flags, "--lora-backend", "torch_native"] if config.device == "cpu" else flags


def layers(settings: LoraConfig, shapes: Shapes) -> list[str]:
    """The ends of the names of all layers that have an adapter."""
    if settings.targets != ["all-linear"]:
        return sorted({target.rpartition(".")[2] for target in settings.targets})
    stems = {name.removesuffix(".weight") for name in shapes if ".layers." in name and ".experts." not in name}
    return sorted({stem.rpartition(".")[2] for stem in stems} & set(LAYERS))


@dataclass(frozen=True)
class FromAdapter:
    """A Transfer (control.py) of one version's adapters, which stand in ``folder`` until it is over."""

    folder: Path
    version: int

    async def __call__(self, server: Server) -> None:
        """Load it beside those that are there, while the server goes on. Raises ControlError as Server.post."""
        await server.post("/load_lora_adapter", {"lora_name": name_of(self.version), "lora_path": str(self.folder)})


class Loaded:
    """Which versions each server of one engine has loaded. For one thread, that of the engine's loop."""

    def __init__(self) -> None:
        self._by_server: dict[Address, list[int]] = {}
        """The one loaded last at the end."""
        self._unloading: set[asyncio.Task[None]] = set()

    async def bring(self, server: Server, transfer: FromAdapter) -> None:
        """Have the server load a version that it has not. Raises ControlError as Server.post."""
        version, loaded = transfer.version, self._by_server.setdefault(server.address, [])
        if version in loaded:
            loaded.remove(version)
        elif version > 0:
            await transfer(server)
        loaded.append(version)

    def keep(self, used: Mapping[Address, Set[int]], server_of: Callable[[Address], Server]) -> None:
        """Forget the servers that are not among ``used``, and have each other one unload what is not used of it, in the
        background; but not the version loaded last, which may have nobody yet who names it.
        """
        self._by_server = {address: loaded for address, loaded in self._by_server.items() if address in used}
        for address, loaded in self._by_server.items():
            for version in [version for version in loaded[:-1] if version not in used[address]]:
                loaded.remove(version)
                if version > 0:
                    task = asyncio.ensure_future(_unload(server_of(address), version))
                    self._unloading.add(task)
                    task.add_done_callback(self._unloading.discard)


async def _unload(server: Server, version: int) -> None:
    try:
        await server.post("/unload_lora_adapter", {"lora_name": name_of(version)})
    except ControlError as error:
        log.warning("the adapters of version %d stay loaded: %s", version, error)


def check_adapters(version: int, adapters: Mapping[str, Tensor], shapes: Shapes) -> None:
    """Raise ValueError where a version's adapters are not those of the model that the servers came up with."""
    for layer, (a, b) in lora.pairs(adapters).items():
        if shapes.get(f"{layer}.weight") != (b.shape[0], a.shape[1]):
            raise ValueError(
                f"version {version} is of another model: no layer of the start model fits {layer}'s adapter"
            )


def write(folder: Path, adapters: Mapping[str, Tensor], settings: LoraConfig, shapes: Shapes) -> None:
    """Write a version as an adapter that SGLang takes whole."""
    found = lora.pairs(adapters)
    whole = dict(found)
    for layer, (a, _) in found.items():
        stem, _, end = layer.rpartition(".")
        for other in next((group for group in TOGETHER if end in group), ()):
            if shape := shapes.get(f"{stem}.{other}.weight"):
                whole.setdefault(f"{stem}.{other}", (torch.zeros_like(a), a.new_zeros(shape[0], len(a))))
    told: dict[str, Any] = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "r": settings.rank,
        "lora_alpha": settings.alpha, "target_modules": sorted({layer.rpartition(".")[2] for layer in whole}),
    }  # fmt: skip
    (folder / lora.CONFIG).write_text(json.dumps(told), encoding="utf-8")
    tensors = {
        lora.to_peft(f"{layer}.{part}.{lora.NAME}.weight"): tensor.contiguous()
        for layer, pair in whole.items()
        for part, tensor in zip(lora.PARTS, pair, strict=True)
    }
    save_file(tensors, folder / lora.WEIGHTS)
