"""The weight channels behind one interface: how a published version reaches the engines.

    shm, disk     store.py        a file; readers come for it                           local and SGLang engines
    ipc           memory.py       handles to the learner's memory; readers come for it  SGLang, one host
    distributed   push.py         the learner broadcasts it into the servers            SGLang

Whatever the channel, the store in the same folder holds what outlives a version: pinned ones, for the evaluator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from offtrail.platform.config.schema import Config, SglangConfig
from offtrail.platform.runtime.context import reuses_files, servers_folder


class Reader(Protocol):
    """What a generator or the evaluator reads versions with."""

    def open(self, version: int) -> AbstractContextManager[Mapping[str, Any]]:
        """The version, valid inside the ``with``; FileNotFoundError when it is no longer kept."""

    def probe(self, version: int) -> list[float]:
        """The learner's log-probabilities of the fixed text under it; empty where it carries none."""


class Channel(Protocol):
    """What the learner publishes with."""

    bytes_published: int
    """Cumulative bytes of versions, as written or sent to one reader; ``bytes_last``: of the newest."""
    bytes_last: int
    delta_share: float
    """``bytes_last`` over the bytes of the whole version."""

    def publish(self, version: int, tensors: Mapping[str, Tensor], probe: Sequence[float] = ()) -> str:
        """Make the version visible, whole or not at all; its checksum."""

    def pin(self, version: int) -> int:
        """Keep the version, the newest, readable from the store until it is unpinned; how many bytes that keeps."""

    def serve_late_readers(self) -> None:
        """Called now and then while the learner waits: readers that came late get what they lack."""

    def close(self) -> None:
        """Let go of the channel."""


def open_reader(config: Config, folder: Path) -> Reader:
    """The reading end of the configured channel in ``folder``."""
    if config.weights.channel == "ipc":
        from offtrail.platform.weights.memory import HandleReader

        return HandleReader(folder)
    if config.weights.channel == "distributed":
        from offtrail.platform.engines.sglang.push import PushedReader

        return PushedReader(folder)
    from offtrail.platform.weights.store import Subscriber

    return Subscriber(folder, reuse=reuses_files(config))


def open_channel(config: Config, folder: Path, run_dir: Path, keep: int) -> Channel:
    """The publishing end; rank 0 only. ``keep``: versions that stay readable. distributed: the servers come up with
    ``run_dir``/start.
    """
    from offtrail.platform.weights.store import Publisher

    weights, dtype = config.weights, engine_dtype(config)
    whole = weights.channel in ("shm", "disk")
    full_every = weights.full_every if weights.delta and whole else 0
    store = Publisher(folder, keep, dtype=dtype, full_every=full_every, reuse=reuses_files(config))
    if whole:
        return store
    bucket_bytes = weights.bucket_mb << 20
    if weights.channel == "ipc":
        from offtrail.platform.weights.memory import MemoryChannel

        return MemoryChannel(store, keep, dtype=dtype, bucket_bytes=bucket_bytes)
    from offtrail.platform.engines.sglang.push import DistributedChannel
    from offtrail.platform.engines.sglang.shapes import read_shapes

    engine = config.engine
    assert isinstance(engine, SglangConfig)  # a rule of the configuration
    return DistributedChannel(
        store,
        servers_folder(run_dir),
        engine,
        dtype=dtype,
        bucket_bytes=bucket_bytes,
        generators=config.generator.count,
        shapes=read_shapes(run_dir / "start"),
    )


def engine_dtype(config: Config) -> torch.dtype | None:
    """What versions are rounded to: the engine's dtype where it is narrower than the learner's float32 parameters.
    Adapters are not: who merges them sums in float32, and a server rounds them itself.
    """
    return torch.bfloat16 if config.engine.dtype == "bfloat16" and not config.publishes_adapters else None
