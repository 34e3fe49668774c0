"""Servers with the real SGLang: keys, lengths, a taken port, deaths, the router, and the end of every process."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from leftovers import alive, words
from offtrail.platform.config.schema import SglangConfig
from offtrail.platform.engines.sglang import lifecycle
from offtrail.platform.engines.sglang.health import ask
from offtrail.platform.engines.sglang.lifecycle import UnhealthyError
from offtrail.platform.engines.sglang.servers import Address, Servers
from offtrail.platform.runtime.attempt import shared_files

Real = tuple[Servers, Path]
MAX_LENGTH = 128


def generate(address: Address, key: str, prompt: int = 4, new: int = 3) -> tuple[int, Any]:
    sampling = {"max_new_tokens": new, "temperature": 1.0, "ignore_eos": True}
    return ask(f"{address.url}/generate", key, {"input_ids": [9] * prompt, "sampling_params": sampling})


def until(servers: Servers, reached: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 240
    while not reached():
        servers.poll()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_each_key_opens_its_own_doors(sglang_server: Real) -> None:
    address = sglang_server[0].address(0)
    paths = {"/abort_request": {"rid": "of-nobody"}, "/pause_generation": {}, "/update_weight_version": {}}
    for wrong in ("", "wrong", address.admin_key):
        assert generate(address, wrong)[0] == 401
        assert ask(f"{address.url}/v1/models", wrong)[0] == 401
    for path, body in paths.items():
        for wrong in ("", "wrong", address.key):
            assert ask(address.url + path, wrong, body)[0] == 401
    assert generate(address, address.key)[0] == 200
    assert ask(f"{address.url}/abort_request", address.admin_key, paths["/abort_request"])[0] == 200


def test_the_keys_are_told_to_nobody(sglang_server: Real) -> None:
    address = sglang_server[0].address(0)
    assert ask(f"{address.url}/server_info", address.key)[0] == 401  # it would tell the admin key
    status, info = ask(f"{address.url}/server_info", address.admin_key)
    assert (status, info["api_key"], info["version"]) == (200, address.key, "0.5.21")
    for process in psutil.process_iter():
        command = " ".join(words(process))
        assert address.key not in command
        assert address.admin_key not in command


@pytest.mark.parametrize("prompt", [1, 64, MAX_LENGTH - 1])
def test_prompt_and_answer_reach_the_longest_length(sglang_server: Real, prompt: int) -> None:
    address = sglang_server[0].address(0)
    status, answer = generate(address, address.key, prompt, MAX_LENGTH - prompt)
    assert (status, len(answer["output_ids"])) == (200, MAX_LENGTH - prompt)


def test_the_settings_reach_the_server(sglang_server: Real) -> None:
    address = sglang_server[0].address(0)
    _, info = ask(f"{address.url}/server_info", address.admin_key)
    assert info["max_running_requests"] == 32
    assert info["stream_interval"] == 32
    assert info["incremental_streaming_output"] is True
    assert info["disable_radix_cache"] is False
    assert ask(f"{address.url}/model_info", address.key)[1]["weight_version"] == "0"


def test_a_server_through_its_life(
    sglang_server: Real, start_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ports = [int(sglang_server[0].address(0).url.rpartition(":")[2])]  # by the time that it has loaded, it is taken
    free = lifecycle.free_port
    monkeypatch.setattr(lifecycle, "free_port", lambda *at: ports.pop() if ports else free(*at))
    children = set(psutil.Process().children())
    servers = Servers(
        SglangConfig(max_running=16, start_seconds=240.0, max_restarts=1, router=True),
        start_dir,
        owner="generator-3",
        count=1,
        max_length=MAX_LENGTH,
        threads=1,
        run_dir=tmp_path,
        weight_version=7,
    )
    try:
        servers.start()
        until(servers, lambda: servers.ready() or not ports)
        until(servers, servers.ready)
        first = servers.address(0)
        assert first.incarnation == 2  # a taken port is another start, and no death
        family = tree_of(first)
        assert len(family) >= 3  # scheduler and detokenizer
        shared = loads_of(family)
        os.kill(family[0].pid, signal.SIGKILL)
        until(servers, lambda: not servers.ready())
        until(servers, servers.ready)
        second = servers.address(0)
        assert (second.incarnation, second.key) == (3, first.key)
        assert not any(alive(process) for process in family)
        assert ask(f"{second.url}/model_info", second.key)[1]["weight_version"] == "7"
        # the router finds the server where it is now, and asks for the same key
        until(servers, lambda: servers.router and routed(servers.router) == 200)
        router = servers.router
        assert router is not None
        assert generate(router, "wrong")[0] == 401
        assert ask(f"{router.url}/abort_request", router.admin_key, {"rid": "of-nobody"})[0] == 404
        family = tree_of(second)
        shared |= loads_of(family)
        for process in family[1:]:
            process.suspend()
    finally:
        servers.close()
    assert not any(alive(process) for process in family)
    assert not any(alive(process) for process in set(psutil.Process().children()) - children)
    assert len(shared) == 2
    assert not any(os.path.exists(path) for path in shared)


def routed(router: Address) -> int:
    try:
        return generate(router, router.key)[0]
    except UnhealthyError:
        return 0


def tree_of(address: Address) -> list[psutil.Process]:
    port = address.url.rpartition(":")[2]
    main = next(process for process in psutil.Process().children() if port in words(process))
    return [main, *main.children(recursive=True)]


def loads_of(family: list[psutil.Process]) -> set[str]:
    """The file that they share, in TMPDIR; in /dev/shm they have nothing that bears a random name."""
    found = {path for process in family for path in re.findall(r"/\S*/sglang_loads_\S+", maps_of(process))}
    assert found
    assert not shared_files(family)
    return found


def maps_of(process: psutil.Process) -> str:
    return Path(f"/proc/{process.pid}/maps").read_text()
