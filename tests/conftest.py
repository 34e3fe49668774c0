"""What several test files share: a start model, batches of ragged groups, and one real SGLang server."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import settings

from offtrail.core.types import Batch, Group, Problem
from offtrail.platform.config.schema import ModelConfig, SglangConfig

if TYPE_CHECKING:
    from offtrail.platform.engines.sglang.servers import Servers

# A loaded machine is no failure: no test asserts a time.
settings.register_profile("offtrail", deadline=None)
settings.load_profile("offtrail")

MakeBatch = Callable[..., Batch]


@pytest.fixture(scope="session")
def start_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of a two-layer model, with its tokenizer."""
    from offtrail.platform.model.tiny import save_start

    folder = tmp_path_factory.mktemp("model") / "start"
    save_start(folder, ModelConfig(hidden_size=32, layers=2, mlp_size=48, heads=4, kv_heads=2), seed=3)
    return folder


@pytest.fixture(scope="module")
def sglang_server(start_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Servers, Path]]:
    """One real server of the start model on this CPU, ready, and the model's folder. A test leaves it as it was."""
    from offtrail.platform.engines.sglang.servers import Servers

    servers = Servers(
        SglangConfig(max_running=32, start_seconds=240.0),
        start_dir,
        owner="session-0",
        count=1,
        max_length=128,
        threads=1,
        run_dir=tmp_path_factory.mktemp("sglang"),
    )
    try:
        servers.start()
        while not servers.ready():
            servers.poll()
            time.sleep(0.05)
        yield servers, start_dir
    finally:
        servers.close()


@pytest.fixture(scope="session")
def make_batch() -> MakeBatch:
    """Called with (step, B=4, G=3, seed=0): ragged groups whose tokens are of version ``step``, rewards 0 or 1."""

    def make(step: int, B: int = 4, G: int = 3, seed: int = 0, versions: int | None = None) -> Batch:
        rng = np.random.default_rng([seed, step])
        return Batch(step, tuple(group(rng, step * B + b, G, step if versions is None else versions) for b in range(B)))

    def group(rng: np.random.Generator, number: int, G: int, version: int) -> Group:
        lengths = rng.integers(1, 24, G).astype(np.int32)
        lengths[int(rng.integers(G))] = 1
        T = int(lengths.sum())
        rewards = rng.integers(0, 2, G).astype(np.float32)
        return Group(
            group=number,
            slot=number,
            attempt=0,
            problem=Problem("chain", number, "1+1", "2"),
            generator="generator-0",
            temperature=1.0,
            prompt_tokens=rng.integers(7, 60, int(rng.integers(3, 12))).astype(np.int32),
            lengths=lengths,
            tokens=rng.integers(3, 60, T).astype(np.int32),
            logprobs=-rng.gamma(4.0, 1.0, T).astype(np.float32),
            versions=np.full(T, version, np.int32),
            finish=np.zeros(G, np.uint8),
            rewards=rewards,
            components={"accuracy": rewards},
            times=np.zeros((G, 3)),
            queued_version=version,
        )

    return make
