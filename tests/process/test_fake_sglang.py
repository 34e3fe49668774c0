"""The fake server by itself: the older contract, timing, ends and new beginnings."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import numpy as np
import pytest

from fake_sglang import FakeServer
from fakes.client import (
    PROMPT,
    ROOT,
    Server,
    Weights,
    coroutine_test,
    free_port,
    landed,
    session,
    start_flight,
    tensor_body,
)


@contextlib.contextmanager
def fake(weights: Weights, *flags: str) -> Iterator[tuple[FakeServer, Server]]:
    keys = ("--api-key", Server.key, "--admin-api-key", Server.admin)
    streams = ("--skip-tokenizer-init", "--incremental-streaming-output")
    with FakeServer("--model-path", str(weights.path), *keys, *streams, *flags) as served:
        yield served, Server("fake", served.url)


@contextlib.contextmanager
def process(weights: Weights, folder: Path) -> Iterator[tuple[Server, subprocess.Popen[bytes]]]:
    """The fake as a program; at another port where somebody has taken the free one meanwhile."""
    script, log = str(ROOT / "tests" / "fake_sglang.py"), folder / "log"
    flags = f"--api-key {Server.key} --incremental-streaming-output --step-seconds 0.002 --device cpu"
    words = "address already in use"
    while "address already in use" in words:
        port = free_port()
        command = [sys.executable, script, "--model-path", str(weights.path), "--port", str(port), *flags.split()]
        with log.open("wb") as errors:
            child = subprocess.Popen(
                command, env=os.environ | {"PYTHONPATH": str(ROOT / "src")}, stdout=subprocess.PIPE, stderr=errors
            )
        assert child.stdout is not None
        if not (up := b"fired up" in child.stdout.readline()):
            child.communicate()
        words = log.read_text()
    try:
        assert up, words
        yield Server("fake", f"http://127.0.0.1:{port}"), child
    finally:
        child.kill()
        child.communicate()


@coroutine_test
async def test_the_older_contract_has_no_sessions_and_no_versions_of_tokens(weights: tuple[Weights, Weights]) -> None:
    with fake(weights[0], "--sglang-version", "0.5.17", "--step-seconds", "0.002") as (_, server):
        for path in ("/begin_weight_update", "/end_weight_update"):
            assert (await server.call(path, key=server.key)).status == 404
            assert (await server.call(path)).status == 401  # what is not there takes the user key
        flight = start_flight(server, 200)
        await flight.made(20)
        await server.ok("/pause_generation", {"mode": "in_place"})
        await flight.settled()
        body = tensor_body(weights[1].named, weight_version="second", flush_cache=False)
        assert (await server.ok("/update_weights_from_tensor", body))["success"]
        await server.ok("/continue_generation")
        await landed(flight)
        assert "weight_versions" not in flight.last
        assert flight.last["weight_version"] == "second"
        info = json.loads((await server.call("/server_info", key=server.key, method="GET")).text)
        assert (info["version"], info["weight_version"]) == ("0.5.17", "second")


@coroutine_test
async def test_the_older_server_dies_of_a_flush_that_a_retraction_allows_the_newer_one(
    weights: tuple[Weights, Weights],
) -> None:
    for version in ("0.5.21", "0.5.17"):
        with fake(weights[0], "--sglang-version", version, "--step-seconds", "0.002") as (served, server):
            flight = start_flight(server, 300)
            await flight.made(20)
            await server.ok("/pause_generation", {"mode": "retract"})
            update = {"model_path": str(weights[1].path)}
            if version == "0.5.21":
                await server.ok("/update_weights_from_disk", update)
                await server.ok("/continue_generation")
                await landed(flight)
                continue
            with pytest.raises(aiohttp.ClientConnectionError):
                await server.call("/update_weights_from_disk", update)
            assert "Cache flush failed after updating weights" in served.died
            with pytest.raises(aiohttp.ClientPayloadError):
                await landed(flight)


@coroutine_test
async def test_the_server_is_busy_a_little_longer_than_its_last_request(weights: tuple[Weights, Weights]) -> None:
    with fake(weights[0], "--linger-seconds", "0.3") as (served, server):
        one = {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 1}}
        await server.generate(one)
        assert (await server.call("/flush_cache")).status == 400
        await server.generate(one)
        assert (await server.call("/flush_cache?timeout=10")).status == 200
        await server.ok("/update_weights_from_disk", {"model_path": str(weights[1].path)})
        await server.generate(one)
        with pytest.raises(aiohttp.ClientConnectionError):
            await server.call("/update_weights_from_disk", {"model_path": str(weights[1].path)})
        assert "Cache flush failed after updating weights" in served.died


@coroutine_test
async def test_no_more_run_than_there_is_room_for_and_the_rest_waits(weights: tuple[Weights, Weights]) -> None:
    with fake(weights[0], "--max-running-requests", "2", "--enable-metrics", "--step-seconds", "0.002") as (_, server):
        flights = [start_flight(server, 300, PROMPT[i:]) for i in range(5)]
        await flights[0].made(5)
        text = (await server.call("/metrics", key="", method="GET")).text
        assert f'sglang:num_running_reqs{{model_name="{weights[0].path}"}} 2\n' in text
        await landed(*flights)
        for i, flight in enumerate(flights):
            expected = weights[0].logprobs(PROMPT[i:], flight.tokens, 0.7)
            np.testing.assert_allclose(flight.logprobs, expected, atol=1e-4, rtol=0)


@coroutine_test
async def test_a_seed_repeats_the_same_tokens(weights: tuple[Weights, Weights]) -> None:
    made = []
    for _ in range(2):
        with fake(weights[0], "--random-seed", "7") as (_, server):
            answer = await server.generate({"input_ids": PROMPT, "sampling_params": {"ignore_eos": True}})
            made.append(answer["output_ids"])
    assert made[0] == made[1]
    assert len(made[0]) == 128


def test_a_process_can_be_stopped_go_on_be_killed_and_asked_to_leave(
    weights: tuple[Weights, Weights], tmp_path: Path
) -> None:
    async def stop_and_go(server: Server, process: int) -> None:
        flight = start_flight(server, 600)
        await flight.made(5)
        os.kill(process, signal.SIGSTOP)
        count = await flight.settled()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(server.call("/model_info", key=server.key, method="GET"), 0.3)
        os.kill(process, signal.SIGCONT)
        await flight.made(count + 5)
        os.kill(process, signal.SIGTERM)  # what is under way may end
        await asyncio.sleep(0.1)
        assert (await server.call("/health", key=server.key, method="GET")).status == 503
        await landed(flight)
        assert flight.last["finish_reason"] == {"type": "length", "length": 600}

    async def killed(server: Server, process: int) -> None:
        flight = start_flight(server, 900)
        await flight.made(5)
        os.kill(process, signal.SIGKILL)
        with pytest.raises((aiohttp.ClientConnectionError, aiohttp.ClientPayloadError)):
            await landed(flight)

    with process(weights[0], tmp_path) as (server, child):
        asyncio.run(stop_and_go(server, child.pid))
        assert child.wait(240) == 0
    with process(weights[0], tmp_path) as (server, child):
        asyncio.run(killed(server, child.pid))
        assert child.wait(240) == -signal.SIGKILL


@coroutine_test
async def test_a_new_server_listens_where_a_dead_one_did_and_knows_nothing_of_it(
    weights: tuple[Weights, Weights],
) -> None:
    with fake(weights[0]) as (served, server):
        async with session(server):
            await server.ok("/update_weights_from_tensor", tensor_body(weights[1].named, weight_version="second"))
        with pytest.raises(aiohttp.ClientConnectionError):
            await server.generate({"input_ids": [-1], "sampling_params": {"max_new_tokens": 1}})
        assert "IndexError" in served.died
        port = served.url.rpartition(":")[2]
    with fake(weights[0], "--port", port) as (again, server):
        assert again.url.endswith(f":{port}")
        tokens = [*PROMPT, 3]
        expected = weights[0].logprobs(tokens[:1], tokens[1:])
        np.testing.assert_allclose(await server.scores(tokens), expected, atol=1e-4, rtol=0)
        info = json.loads((await server.call("/model_info", key=server.key, method="GET")).text)
        assert info["weight_version"] == "default"
