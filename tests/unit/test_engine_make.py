"""Which GPUs the servers of each role take."""

from __future__ import annotations

from pathlib import Path

import pytest

from offtrail.platform.config.schema import Config, SglangConfig
from offtrail.platform.engines.make import first_device
from offtrail.platform.runtime.context import RoleContext
from offtrail.platform.runtime.devices import gpus_of


@pytest.mark.parametrize(
    ("device", "job", "role", "index", "expected"),
    [
        ("cpu", "rl", "generator", 1, "cpu"),
        ("cuda", "rl", "generator", 0, "cuda:0"),
        ("cuda:1", "rl", "generator", 1, "cuda:7"),  # after 1 + three servers of two GPUs
        ("cuda:1", "rl", "evaluator", 0, "cuda:13"),
        ("cuda:1", "eval", "evaluator", 0, "cuda:1"),  # it has the machine for itself
    ],
)
def test_no_two_servers_share_a_gpu(device: str, job: str, role: str, index: int, expected: str) -> None:
    config = Config(job=job, engine=SglangConfig(device=device, servers=3, tensor_parallel=2))  # type: ignore[arg-type]
    config.generator.count = 2
    assert first_device(config.engine, 2, RoleContext(config, Path(), role, index)) == expected  # type: ignore[arg-type]
    if device != "cpu":
        assert gpus_of(config, role, index)[0] == int(expected.partition(":")[2])
