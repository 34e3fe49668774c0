"""Which devices a role's process holds, by the identity and the name of each: what the run costs is counted by them.

    context.connect ── Hello.devices: identity → name ──► broker/held.py

Two processes on one GPU, or all that compute on one host's CPU, hold one device. Asked without torch and without a
CUDA context, which would itself take memory of the device.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
from functools import cache
from operator import attrgetter
from pathlib import Path

from offtrail.platform.config.schema import Config, SglangConfig
from offtrail.platform.runtime.roles import ROLES

GPUS = Path("/proc/driver/nvidia/gpus")
CPUS = Path("/proc/cpuinfo")
ASK_SECONDS = 20.0
LONGEST = 200
"""Characters of a name."""


def devices_of(config: Config, role: str, index: int) -> dict[str, str]:
    """Identity → name of what a process of a role holds: GPUs, or its host; nothing where it needs no device. Servers
    that run already (engine.urls) are told by their address.
    """
    key, host = next((row.device for row in ROLES if row.role == role), ""), socket.gethostname()
    if not key:
        return {}
    if key == "engine.device" and (engine := served(config, role)) is not None and engine.urls:
        return {f"{url} {rank}": "SGLang server" for url in engine.urls for rank in range(engine.tensor_parallel)}
    device = str(attrgetter(key)(config))
    if not device.startswith("cuda"):
        return {host: cpu_name()}
    shown, names = visible(), gpu_names()
    places = [shown[at] if at < len(shown) else str(at) for at in gpus_of(config, role, index)]
    return {f"{host} GPU {place}": _name(names, place) for place in places}


def gpus_of(config: Config, role: str, index: int) -> range:
    """The CUDA devices of a process on its host, counted as CUDA counts them there."""
    if role == "learner":
        first = int(config.learner.device.partition(":")[2] or 0)
        return range(index, index + 1) if config.learner.ranks > 1 else range(first, first + 1)
    if role in ("scorer", "refresher"):
        device = config.scorer.device if role == "scorer" else config.scorer.refresh.device
        first = int(device.partition(":")[2] or 0)
        return range(first, first + 1)
    first, engine = int(config.engine.device.partition(":")[2] or 0), served(config, role)
    if engine is None:
        return range(first, first + 1)
    evaluates = role == "evaluator"
    before = config.generator.count if evaluates and config.job == "rl" else index
    first += before * engine.servers * engine.tensor_parallel
    return range(first, first + (1 if evaluates else engine.servers) * engine.tensor_parallel)


def served(config: Config, role: str) -> SglangConfig | None:
    """The servers' settings where a role generates with SGLang."""
    embedded = role == "evaluator" and config.eval.engine == "local"
    return config.engine if isinstance(config.engine, SglangConfig) and not embedded else None


def visible() -> list[str]:
    """What CUDA_VISIBLE_DEVICES lets this process see, in its order; empty where it says nothing."""
    return [word.strip() for word in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if word.strip()]


@cache
def gpu_names() -> tuple[str, ...]:
    """Of this host's GPUs in the order of their bus, by the driver or nvidia-smi; empty where neither knows."""
    names = []
    for file in sorted(GPUS.glob("*/information")):
        lines = (line.partition(":") for line in file.read_text(errors="replace").splitlines())
        names += [value.strip() for key, _, value in lines if key.strip() == "Model"]
    if names or (program := shutil.which("nvidia-smi")) is None:
        return tuple(names)
    try:
        ask = [program, "--query-gpu=name", "--format=csv,noheader"]
        told = subprocess.run(ask, capture_output=True, text=True, timeout=ASK_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(line.strip() for line in told.splitlines() if line.strip())


@cache
def cpu_name() -> str:
    """The host's processor, behind the word CPU."""
    try:
        lines = [line.partition(":") for line in CPUS.read_text(errors="replace").splitlines()]
    except OSError:
        lines = []
    model = next((value.strip() for key, _, value in lines if key.strip() == "model name"), "")
    return f"CPU {model or platform.machine()}"[:LONGEST]


def _name(names: tuple[str, ...], place: str) -> str:
    """Of one GPU; where there is one kind only, its identity need not be a number."""
    if place.isdecimal() and int(place) < len(names):
        return names[int(place)][:LONGEST]
    return names[0][:LONGEST] if len(set(names)) == 1 else "GPU"
