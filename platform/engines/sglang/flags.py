"""The command lines and the environment of what servers.py starts. No torch, no sglang: the configuration's rules use
it too.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import offtrail
from offtrail.platform.config.schema import SglangConfig
from offtrail.platform.engines.sglang.serve import ADMIN_KEY_VARIABLE, KEY_VARIABLE

CONTEXT_MARGIN = 6
"""sglang stops a sample two tokens before its context length, and takes no prompt that ends within six of it."""
CPU_CACHE_TOKENS = 262_144
"""The most tokens of KV cache on a CPU, unless one sample needs more; sglang also keeps within its share of memory."""
LONGEST_FLAGS = 65_536
LOADER = "offtrail.platform.engines.sglang.loader.load"
OWN_FLAGS = {
    "--model-path": "the engine's model is the run's",
    "--model": "the engine's model is the run's",
    "--host": "take engine.address",
    "--port": "every server is given a free one",
    "--api-key": "every run makes its own",
    "--admin-api-key": "every run makes its own",
    "--device": "take engine.device",
    "--base-gpu-id": "take engine.device=cuda:N",
    "--tensor-parallel-size": "take engine.tensor_parallel",
    "--tp-size": "take engine.tensor_parallel",
    "--tp": "take engine.tensor_parallel",
    "--weight-version": "it counts the learner's versions",
    "--custom-weight-loader": "weights come through weights.channel",
}
"""Flags that offtrail gives and that must stay as it gives them, with the way out."""


def user_flags(text: str) -> list[str]:
    """engine.flags as arguments. ValueError when a quotation has no end."""
    return shlex.split(text)


def refused(text: str) -> str | None:
    """Why engine.flags cannot be taken; None when it can."""
    if len(text) > LONGEST_FLAGS:
        return f"has {len(text):,} characters, more than a command line takes; {LONGEST_FLAGS:,} at most"
    try:
        flags = user_flags(text)
    except ValueError as error:
        return f"malformed ({error}); quote as in a shell"
    for flag in flags:
        name = flag.partition("=")[0]
        # argparse takes an unambiguous beginning of a flag for the flag
        own = next((own for own in OWN_FLAGS if len(name) > 2 and own.startswith(name)), None)
        if own is not None:
            return f"{own} is offtrail's own: {OWN_FLAGS[own]}"
    return None


def server_flags(
    config: SglangConfig,
    model: Path,
    *,
    place: int,
    port: int,
    max_length: int,
    weight_version: int,
    name: str = "",
    more: Sequence[str] = (),
) -> list[str]:
    """Flags of the server at ``place``; prompt + answer may be ``max_length`` tokens. ``name``: of the model in the
    OpenAI API, else its path. After these come ``more``; the user's come last and win.
    """
    flags = {
        "--model-path": str(model),
        "--host": config.address,
        "--port": port,
        "--dtype": config.dtype,
        "--tp": config.tensor_parallel,
        "--context-length": max_length + CONTEXT_MARGIN,
        "--max-running-requests": config.max_running,
        "--stream-interval": config.stream_interval,
        "--weight-version": weight_version,
        "--custom-weight-loader": LOADER,
        "--log-level-http": "warning",  # without it a log line a request
    }
    if name:
        flags["--served-model-name"] = name
    switches = ["--incremental-streaming-output"]
    if config.device == "cpu":
        cache = max(max_length + CONTEXT_MARGIN, min(config.max_running * max_length, CPU_CACHE_TOKENS))
        flags |= {
            "--device": "cpu",
            "--attention-backend": "torch_native",
            "--sampling-backend": "pytorch",
            "--grammar-backend": "none",
            "--mem-fraction-static": 0.1,
            "--max-total-tokens": cache,
        }
        # an idle scheduler burns a core unless it sleeps; the overlap pays only where the CPU would wait for a GPU
        switches += ["--sleep-on-idle", "--disable-overlap-schedule", "--skip-server-warmup"]
    else:
        flags["--base-gpu-id"] = first_gpu(config.device) + place * config.tensor_parallel
    ours = [*(str(part) for pair in flags.items() for part in pair), *more, *switches]
    return [*ours, *user_flags(config.flags)]


def first_gpu(device: str) -> int:
    """N of cuda:N; 0 of cuda."""
    return int(device.partition(":")[2] or 0)


def router_flags(config: SglangConfig, port: int, metrics_port: int) -> list[str]:
    """Flags of sglang-router with no servers yet: servers.py adds and removes them, and watches them itself.

    No retries either: a sample that a server's death has cut is sent anew by the engine, which counts what is lost.
    """
    flags = ["--host", config.address, "--port", str(port), "--policy", "cache_aware", "--log-level", "warn"]
    flags += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics_port)]
    return [*flags, "--disable-health-check", "--disable-circuit-breaker", "--disable-retries"]


def environment(threads: int, key: str, admin_key: str, temporary: Path) -> dict[str, str]:
    """A server's: as here, and with ``threads``, its keys, this checkout's package, a TMPDIR, and no downloads."""
    source = str(Path(offtrail.__file__).parents[1])
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH")))),
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",  # CONTEXT_MARGIN may lie beyond the model's positions
        "TMPDIR": str(temporary),
        KEY_VARIABLE: key,
        ADMIN_KEY_VARIABLE: admin_key,
    }


def names_a_server(url: str) -> bool:
    """Whether ``url`` is http(s)://host:port and nothing more: no user, no path, a host of ASCII or an address."""
    match = re.fullmatch(r"https?://([A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\]):([0-9]{1,5})/?", url)
    return match is not None and 0 < int(match[2]) < 65_536


def url_of(address: str, port: int) -> str:
    """Where a server that listens at ``address`` is reached from this host."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def missing_packages(config: SglangConfig) -> Sequence[str]:
    """Packages that this engine needs and this Python lacks."""
    needed = [] if config.urls else ["sglang", *(["sglang_router"] if config.router else [])]
    return [name for name in needed if find_spec(name) is None]
