"""The command lines of servers and router: what reaches SGLang, on which GPU, and that the user has the last word."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import offtrail
from offtrail.platform.config.schema import SglangConfig
from offtrail.platform.engines.sglang import flags


def made(place: int = 0, max_length: int = 4096, name: str = "", **settings: Any) -> list[str]:
    return flags.server_flags(
        SglangConfig(**settings), Path("/m"), place=place, port=5, max_length=max_length, weight_version=3, name=name
    )


def value(line: list[str], flag: str) -> str:
    """What argparse takes: the last."""
    return line[len(line) - 1 - line[::-1].index(flag) + 1]


def test_settings_become_flags() -> None:
    line = made(max_running=48, stream_interval=7, dtype="bfloat16", address="10.1.1.1")
    expected = {
        "--model-path": "/m", "--host": "10.1.1.1", "--port": "5", "--dtype": "bfloat16", "--tp": "1",
        "--max-running-requests": "48", "--stream-interval": "7", "--weight-version": "3", "--context-length": "4102",
        "--custom-weight-loader": "offtrail.platform.engines.sglang.loader.load",
    }  # fmt: skip
    assert {flag: value(line, flag) for flag in expected} == expected
    assert "--incremental-streaming-output" in line
    assert "--disable-radix-cache" not in line
    assert "--served-model-name" not in line
    assert value(made(name="mine"), "--served-model-name") == "mine"


@pytest.mark.parametrize(
    ("running", "length", "tokens"),
    [(16, 256, 4096), (256, 256, 65_536), (256, 4096, 262_144), (1, 400_000, 400_006)],
)
def test_a_cpu_has_what_it_needs_and_a_bounded_cache(running: int, length: int, tokens: int) -> None:
    line = made(max_running=running, max_length=length)
    assert value(line, "--max-total-tokens") == str(tokens)
    assert value(line, "--device") == "cpu"
    assert value(line, "--attention-backend") == "torch_native"
    assert value(line, "--grammar-backend") == "none"
    for switch in ("--skip-server-warmup", "--disable-overlap-schedule", "--sleep-on-idle"):
        assert switch in line
    assert "--base-gpu-id" not in line


@pytest.mark.parametrize(
    ("device", "parallel", "place", "first"),
    [("cuda", 1, 0, 0), ("cuda", 1, 3, 3), ("cuda:2", 4, 0, 2), ("cuda:2", 4, 1, 6)],
)
def test_each_server_has_gpus_of_its_own(device: str, parallel: int, place: int, first: int) -> None:
    line = made(place, device=device, tensor_parallel=parallel)
    assert (value(line, "--base-gpu-id"), value(line, "--tp")) == (str(first), str(parallel))
    for flag in ("--device", "--attention-backend", "--max-total-tokens", "--mem-fraction-static"):
        assert flag not in line


def test_the_users_flags_come_last() -> None:
    line = made(flags="--mem-fraction-static 0.5 --chat-template 'my file.jinja'")
    assert line[-4:] == ["--mem-fraction-static", "0.5", "--chat-template", "my file.jinja"]
    assert value(line, "--mem-fraction-static") == "0.5"


def test_keys_are_in_the_environment_and_not_in_the_flags(tmp_path: Path) -> None:
    environment = flags.environment(3, "one", "two", tmp_path)
    assert (environment["OFFTRAIL_SGLANG_KEY"], environment["OFFTRAIL_SGLANG_ADMIN_KEY"]) == ("one", "two")
    assert (environment["OMP_NUM_THREADS"], environment["TMPDIR"]) == ("3", str(tmp_path))
    assert environment["PYTHONPATH"].split(os.pathsep)[0] == str(Path(offtrail.__file__).parents[1])
    assert not {"--api-key", "--admin-api-key"} & set(made() + flags.router_flags(SglangConfig(), 1, 2))


def test_the_router_leaves_watching_and_repeating_to_offtrail() -> None:
    line = flags.router_flags(SglangConfig(address="10.0.0.1"), 7, 8)
    assert (value(line, "--host"), value(line, "--port"), value(line, "--policy")) == ("10.0.0.1", "7", "cache_aware")
    assert (value(line, "--prometheus-host"), value(line, "--prometheus-port")) == ("127.0.0.1", "8")
    assert {"--disable-health-check", "--disable-retries"} <= set(line)
    assert "--worker-urls" not in line


@pytest.mark.parametrize(
    ("address", "url"),
    [("127.0.0.1", "http://127.0.0.1:9"), ("0.0.0.0", "http://127.0.0.1:9"), ("10.0.0.1", "http://10.0.0.1:9"),
     ("::", "http://[::1]:9"), ("fe80::2", "http://[fe80::2]:9")],
)  # fmt: skip
def test_where_a_server_is_reached(address: str, url: str) -> None:
    assert flags.url_of(address, 9) == url
    assert flags.names_a_server(url)
