"""Weights that give no finite number end the generator by that name, though the server calls the answer stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from offtrail.core.protocols import Completion, Request
from offtrail.core.types import Sampling
from offtrail.platform.engines.sglang.client import Client, Loop
from offtrail.platform.engines.sglang.servers import Address
from offtrail.platform.engines.stops import StopStrings

STOPPED = {"type": "stop", "matched": 9}


def report(finish: Any, *logprobs: float | None) -> dict[str, Any]:
    entries = [[value, 9, None] for value in logprobs]
    meta = {"output_token_logprobs": entries, "finish_reason": finish, "weight_version": "3", "cached_tokens": 0}
    return {"output_ids": [9] * len(logprobs), "meta_info": meta | {"completion_tokens": len(logprobs)}}


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop("test")
    yield loop
    loop.close()


def answer(loop: Loop, given: dict[str, Any]) -> list[Completion]:
    """What the client makes of a server whose every answer is one report."""

    async def generate(request: web.Request) -> web.StreamResponse:
        reply = web.StreamResponse()
        await reply.prepare(request)
        await reply.write(f"data: {json.dumps(given)}\n\n".encode())
        return reply

    async def serve() -> tuple[web.AppRunner, str]:
        app = web.Application()
        app.router.add_post("/generate", generate)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner, f"http://127.0.0.1:{runner.addresses[0][1]}"

    runner, url = loop.run(serve())
    client = Client(loop, prefix_tokens=64, keyed=False, recomputes=True, stops=StopStrings(Path()))
    address = Address(url, "", "", 1)
    loop.loop.call_soon_threadsafe(client.set_places, {0: address}, {address: 3}, 3)
    client.generate([Request(0, np.array([4, 5], np.int32), 1, Sampling(8, stop_token_ids=(9,)))])
    try:
        while not (taken := client.take(1.0))[0]:
            assert not taken[1]
        return taken[0]
    finally:
        loop.run(runner.cleanup())


def test_a_stopped_answer_is_one(loop: Loop) -> None:
    [completion] = answer(loop, report(STOPPED, -0.5, -0.25))
    assert (completion.finish, completion.logprobs.tolist()) == ("stop", [-0.5, -0.25])


@pytest.mark.parametrize(
    "given",
    [
        report({"type": "stop", "matched": "NaN happened"}, -0.5, -0.25),
        report(STOPPED, -0.5, float("nan")),
        report(STOPPED, float("-inf")),
        report(STOPPED, None),
    ],
)
def test_numbers_that_are_not_finite_are_no_answer(given: dict[str, Any], loop: Loop) -> None:
    with pytest.raises(FloatingPointError, match="weights of version 3 give log-probabilities that are not fini"):
        answer(loop, given)
