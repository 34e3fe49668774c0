"""Which GPUs the servers of each role take."""

from __future__ import annotations

from pathlib import Path

import pytest

from offtrail.platform.config.schema import Config, SglangConfig
from offtrail.platform.engines.make import first_device
from offtrail.platform.runtime.context import RoleContext


@pytest.mark.parametrize(
    ("device", "role", "index", "expected"),
    [
        ("cpu", "generator", 1, "cpu"),
        ("cuda", "generator", 0, "cuda:0"),
        ("cuda:1", "generator", 1, "cuda:7"),  # after 1 + three servers of two GPUs
        ("cuda:1", "evaluator", 0, "cuda:13"),
    ],
)
def test_no_two_servers_share_a_gpu(device: str, role: str, index: int, expected: str) -> None:
    engine = SglangConfig(device=device, servers=3, tensor_parallel=2)
    assert first_device(engine, 2, RoleContext(Config(engine=engine), Path(), role, index)) == expected
