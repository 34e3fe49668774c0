"""A plain HTTP client of an SGLang server and what it is compared with, for the tests of the contract.

``Weights`` is a model on disk and in transformers; ``Server`` calls one server, in a process (``started``) or a
FakeServer; ``Flight`` is a streamed request under way. Nothing here is offtrail's own client.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import json
import pickle
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from fakes.tensors import init_group
from offtrail.platform.config.schema import SglangConfig
from offtrail.platform.engines.sglang.flags import CONTEXT_MARGIN
from offtrail.platform.engines.sglang.servers import SERVER, Servers

Json = dict[str, Any]
ROOT = Path(__file__).parents[2]
VOCAB, CONTEXT = 512, 1024
RUNNING = 16
HEALTH_SECONDS = 3
"""How long a server waits for a sign of life before it says 503."""
PROMPT = list(range(40, 52))


def build(seed: int, **changes: Any) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    sizes: Json = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.25,  # peaked enough: a token has 2 to 3 nats
        "tie_word_embeddings": False,
        "eos_token_id": 2,
        "bos_token_id": 1,
        "pad_token_id": 0,
    }
    return Qwen3ForCausalLM(Qwen3Config(**(sizes | changes))).float().eval()


@dataclass(frozen=True)
class Weights:
    """One set of weights: on disk, and as the learner has it."""

    path: Path
    model: Qwen3ForCausalLM

    @property
    def named(self) -> list[tuple[str, Tensor]]:
        return [(name, tensor.detach()) for name, tensor in self.model.named_parameters()]

    @torch.no_grad()
    def logprobs(self, prompt: list[int], output: list[int], temperature: float = 1.0) -> np.ndarray:
        ids = torch.tensor(prompt + output)
        table = self.table(prompt + output, temperature)
        return table[len(prompt) - 1 : -1].gather(1, ids[len(prompt) :, None])[:, 0].numpy()

    @torch.no_grad()
    def table(self, tokens: list[int], temperature: float = 1.0) -> Tensor:
        """Log-probabilities [T, V] of whatever follows each token."""
        return (self.model(torch.tensor([tokens])).logits[0] / temperature).log_softmax(-1)


@dataclass
class Server:
    """A server, and what a call of it says."""

    kind: str
    url: str
    key: str = "user-key"
    admin: str = "admin-key"
    number: int = 0

    def rid(self) -> str:
        """Never the same twice: see test_an_id_is_aborted_two_seconds_after_its_stream."""
        self.number += 1
        return f"r{self.number:06d}"

    async def call(self, path: str, body: Json | None = None, *, key: str | None = None, method: str = "POST") -> Reply:
        """With the admin key, unless another one is given."""
        token = self.admin if key is None else key
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        sent = {"json": body if body is not None else {}} if method == "POST" else {}
        async with aiohttp.request(method, self.url + path, headers=headers, **sent) as response:
            text = await response.text()
        return Reply(response.status, text)

    async def ok(self, path: str, body: Json | None = None) -> Json:
        reply = await self.call(path, body)
        assert reply.status == 200, reply.text
        return json.loads(reply.text) if reply.text.startswith("{") else {}

    async def generate(self, body: Json) -> Any:
        reply = await self.call("/generate", body, key=self.key)
        assert reply.status == 200, reply.text
        return json.loads(reply.text)

    async def scores(self, tokens: list[int]) -> list[float]:
        """Of all tokens but the first, by prefill."""
        body = {
            "input_ids": tokens,
            "sampling_params": {"max_new_tokens": 0},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        return [value for value, _, _ in (await self.generate(body))["meta_info"]["input_token_logprobs"][1:]]

    async def load(self, weights: Weights, version: str) -> None:
        """Weights for a server that idles, or soon does. Trap: an update that flushes just after a request has ended
        may find it still there, and that kills the server; a flush that fails does not.
        """
        await self.ok("/flush_cache?timeout=20")
        await self.ok("/update_weights_from_disk", {"model_path": str(weights.path), "weight_version": version})


@dataclass(frozen=True)
class Reply:
    status: int
    text: str


@dataclass
class Flight:
    """One streamed request under way."""

    rid: str
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    chunks: list[Json] = field(default_factory=list)
    task: asyncio.Task[None] | None = None

    @property
    def done(self) -> bool:
        assert self.task is not None
        return self.task.done()

    @property
    def last(self) -> Json:
        meta: Json = self.chunks[-1]["meta_info"]
        return meta

    async def fly(self, server: Server, prompt: list[int], limit: int, **params: Any) -> None:
        sampling = {"max_new_tokens": limit, "temperature": 0.7, "ignore_eos": True, "stream_interval": 1} | params
        body = {
            "rid": self.rid,
            "input_ids": prompt,
            "sampling_params": sampling,
            "return_logprob": True,
            "stream": True,
        }
        async with aiohttp.request(
            "POST", f"{server.url}/generate", json=body, headers={"Authorization": f"Bearer {server.key}"}
        ) as response:
            assert response.status == 200
            async for line in response.content:
                if line.startswith(b"data: {"):
                    self.hear(json.loads(line[6:]))
        assert line == b"\n" or line.startswith(b"data: [DONE]")

    def hear(self, chunk: Json) -> None:
        assert "error" not in chunk, chunk
        self.chunks.append(chunk)
        if chunk["meta_info"].get("finish_reason") == {"type": "abort", "message": "Abort in waiting queue"}:
            return  # repeats: see test_a_retracted_request_that_is_aborted_repeats_itself
        self.tokens += chunk["output_ids"]
        self.logprobs += [value for value, _, _ in chunk["meta_info"]["output_token_logprobs"]]

    async def made(self, count: int) -> None:
        """Until so many tokens have come."""
        while len(self.tokens) < count:
            assert not self.done, self.chunks[-1:]
            await asyncio.sleep(0.002)

    async def settled(self) -> int:
        """How many tokens have come, once no more do."""
        while True:
            before = len(self.tokens)
            await asyncio.sleep(0.15)
            if len(self.tokens) == before:
                return before


def start_flight(server: Server, limit: int = 600, prompt: list[int] | None = None, **params: Any) -> Flight:
    flight = Flight(params.pop("rid", "") or server.rid())
    flight.task = asyncio.create_task(flight.fly(server, prompt or PROMPT, limit, **params))
    flight.task.add_done_callback(lambda task: task.cancelled() or task.exception())  # else asyncio logs it
    return flight


async def landed(*flights: Flight) -> None:
    async with asyncio.timeout(30):
        for flight in flights:
            assert flight.task is not None
            await flight.task


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def started(kind: str, model: Path, folder: Path) -> Iterator[tuple[Server, Servers]]:
    """A server in a process of its own, ready, and who keeps it. Weights may come through fakes.loading.from_file."""
    slow = "" if kind == "real" else " --step-seconds 0.002"
    flags = f"--skip-tokenizer-init --custom-weight-loader fakes.loading.from_file{slow}"
    servers = Servers(
        SglangConfig(max_running=RUNNING, stream_interval=4, flags=flags, start_seconds=300.0, max_restarts=0),
        model,
        owner=f"contract-{kind}",
        count=1,
        max_length=CONTEXT - CONTEXT_MARGIN,
        threads=1,
        run_dir=folder,
        command=SERVER if kind == "real" else "fake_sglang",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT / "tests"))
        patch.setenv("SGLANG_HEALTH_CHECK_TIMEOUT", str(HEALTH_SECONDS))
        try:
            servers.start()
            while not servers.ready():
                servers.poll()
                time.sleep(0.05)
            address = servers.address(0)
            yield Server(kind, address.url, address.key, address.admin_key), servers
        finally:
            servers.close()


def coroutine_test(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """A test that is a coroutine, as one that pytest can run."""

    @functools.wraps(test)
    def run(**fixtures: Any) -> None:
        asyncio.run(asyncio.wait_for(test(**fixtures), 60))

    return run


def tensor_body(named: Any, **more: Any) -> Json:
    """Weights as /update_weights_from_tensor takes them, with one tensor-parallel rank."""
    return {"serialized_named_tensors": [base64.b64encode(pickle.dumps(named)).decode()]} | more


def bucket(named: list[tuple[str, Tensor]]) -> Json:
    """All tensors' bytes as one tensor, and where each stands in it."""
    parts = [tensor.flatten().view(torch.uint8) for _, tensor in named]
    metadata, end = [], 0
    for (name, tensor), part in zip(named, parts, strict=True):
        start, end = end, end + part.numel()
        span = {"start_idx": start, "end_idx": end, "numel": part.numel()}
        metadata.append(SimpleNamespace(name=name, shape=tensor.shape, dtype=tensor.dtype, **span))
    return {"flattened_tensor": torch.cat(parts), "metadata": metadata}


@contextlib.asynccontextmanager
async def session(server: Server) -> AsyncIterator[None]:
    await server.ok("/begin_weight_update")
    yield
    await server.ok("/end_weight_update")


@contextlib.asynccontextmanager
async def group(server: Server, name: str) -> AsyncIterator[Any]:
    """A gloo group of this process, rank 0, and the server."""
    port = free_port()
    body = {"master_address": "127.0.0.1", "master_port": port, "rank_offset": 1, "world_size": 2}
    joining = asyncio.create_task(
        server.ok("/init_weights_update_group", body | {"group_name": name, "backend": "gloo"})
    )
    own = await asyncio.to_thread(init_group, "gloo", f"tcp://127.0.0.1:{port}", 0, 2, name)
    assert (await joining)["success"]
    try:
        yield own
    finally:
        assert (await server.ok("/destroy_weights_update_group", {"group_name": name}))["success"]
        torch.distributed.destroy_process_group(own)


async def broadcast(server: Server, named: list[tuple[str, Tensor]], version: str, *, flat: bool, **more: Any) -> Json:
    """Send tensors to the server by a gloo group of its own."""
    async with group(server, f"group-{version}") as own:
        body = {
            "names": [name for name, _ in named],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in named],
            "shapes": [list(tensor.shape) for _, tensor in named],
            "group_name": f"group-{version}",
            "weight_version": version,
            "load_format": "flattened_bucket" if flat else None,
        }
        receiving = asyncio.create_task(server.ok("/update_weights_from_distributed", body | more))
        tensors = [bucket(named)["flattened_tensor"]] if flat else [tensor.contiguous() for _, tensor in named]
        for tensor in tensors:
            await asyncio.to_thread(torch.distributed.broadcast, tensor, 0, own)
        return await receiving
