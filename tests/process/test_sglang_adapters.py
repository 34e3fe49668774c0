"""Versions that are adapters alone, in a real SGLang server on the CPU: what it says is what the merged weights say."""

from __future__ import annotations

import asyncio
import copy
import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from fakes.client import VOCAB, Server, Weights
from offtrail.core.protocols import Completion, Engine, Request
from offtrail.core.types import Sampling
from offtrail.platform.config.schema import LocalConfig, LoraConfig, SglangConfig
from offtrail.platform.engines.adapters import AdaptedEngine
from offtrail.platform.engines.sglang.engine import SglangEngine
from offtrail.platform.weights.store import Publisher, Subscriber

CLOSE = 1e-4
LONG = 400
"""Tokens of an answer that is still running when it is asked."""
LORA = LoraConfig(rank=4, alpha=8.0, publish="adapter")
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Tensors = dict[str, torch.Tensor]


def adapters(weights: Weights, seed: int, ends: Sequence[str] = ALL) -> Tensors:
    """A and B of every layer that one of ``ends`` names, large enough to be seen."""
    generator = torch.Generator().manual_seed(seed)
    made: Tensors = {}
    for name, tensor in weights.named:
        layer = name.removesuffix(".weight")
        if layer.rpartition(".")[2] in ends:
            rows, columns = tensor.shape
            made[f"{layer}.lora_A.default.weight"] = torch.randn(LORA.rank, columns, generator=generator) * 0.1
            made[f"{layer}.lora_B.default.weight"] = torch.randn(rows, LORA.rank, generator=generator) * 0.1
    return made


def merged(weights: Weights, version: Tensors) -> Weights:
    """The same model with W + 2·B·A for every W that has them."""
    model = copy.deepcopy(weights.model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            layer = name.removesuffix(".weight")
            if f"{layer}.lora_A.default.weight" in version:
                a, b = (version[f"{layer}.lora_{part}.default.weight"] for part in "AB")
                parameter += LORA.alpha / LORA.rank * (b @ a)
    return Weights(weights.path, model)


@pytest.fixture(scope="module")
def engine(weights: tuple[Weights, Weights], tmp_path_factory: pytest.TempPathFactory) -> Iterator[SglangEngine]:
    made = make(weights[0].path, tmp_path_factory.mktemp("engine"), max_running=8)
    yield made
    made.close()


def make(model: Path, folder: Path, **settings: int) -> SglangEngine:
    config = SglangConfig(start_seconds=300.0, hang_seconds=120.0, **settings)  # type: ignore[arg-type]
    made = SglangEngine(
        model, config, max_length=512, threads=1, owner="generator-0", count=1, run_dir=folder, adapters=LORA
    )
    limit = time.monotonic() + 300
    while made.waiting_for:
        time.sleep(0.05)
        assert time.monotonic() < limit, made.waiting_for
    return made


@pytest.fixture
def channel(tmp_path: Path) -> Iterator[tuple[Publisher, Subscriber]]:
    publisher = Publisher(tmp_path / "weights")
    yield publisher, Subscriber(tmp_path / "weights")
    publisher.close()


def load(engine: Engine, channel: tuple[Publisher, Subscriber], version: int, tensors: Tensors) -> None:
    channel[0].publish(version, tensors)
    with channel[1].open(version) as opened:
        engine.load_weights(version, opened)


def ask(count: int, samples: int, new: int, temperature: float = 0.7) -> list[Request]:
    rng = np.random.default_rng(count + new)
    sampling = Sampling(max_new_tokens=new, temperature=temperature, seed=7)
    return [Request(i, rng.integers(3, VOCAB, 20).astype(np.int32), samples, sampling) for i in range(count)]


def drain(engine: Engine) -> list[Completion]:
    done, limit = list[Completion](), time.monotonic() + 240
    while engine.unfinished:
        done += engine.step()
        assert time.monotonic() < limit, f"{engine.unfinished} samples never came"
    return done


def answers(engine: Engine, requests: list[Request]) -> list[Completion]:
    engine.generate(requests)
    return sorted(drain(engine), key=lambda done: (done.request, done.index))


def run_until_tokens(engine: SglangEngine, requests: list[Request]) -> None:
    engine.generate(requests)
    limit = time.monotonic() + 240
    while not any(len(job.tokens) > 30 for p in engine._client.places.values() for job in p.running.values()):
        engine._raise_failure()
        time.sleep(0.002)
        assert time.monotonic() < limit, "the server reports nothing"


def gap(weights: Weights, request: Request, done: Completion, version: int | None = None) -> float:
    """Largest |Δ log p| to transformers, over the tokens of ``version``."""
    theirs = weights.logprobs(request.prompt_tokens.tolist(), done.tokens.tolist(), request.sampling.temperature or 1.0)
    chosen = np.ones(len(theirs), bool) if version is None else done.versions == version
    return float(np.abs(theirs - done.logprobs)[chosen].max(initial=0.0))


def loaded(engine: SglangEngine) -> set[str]:
    """The adapters that the server itself says it has."""
    address = engine.servers.address(0)
    server = Server("", address.url, address.key, address.admin_key)
    models = json.loads(asyncio.run(server.call("/v1/models", key=address.key, method="GET")).text)["data"]
    return {model["id"] for model in models if model.get("parent")}


def only(engine: SglangEngine, version: int) -> None:
    """Wait until it has no other one."""
    limit = time.monotonic() + 240
    while loaded(engine) != {f"v{version}"}:
        time.sleep(0.1)
        assert time.monotonic() < limit, loaded(engine)


@pytest.mark.parametrize(
    "ends",
    [
        ALL,
        *(
            pytest.param(e, marks=pytest.mark.prove)
            for e in [("q_proj",), ("v_proj", "up_proj"), ("o_proj", "gate_proj")]
        ),
    ],
)
def test_a_loaded_adapter_says_what_the_merged_weights_say(
    engine: SglangEngine, weights: tuple[Weights, Weights], channel: tuple[Publisher, Subscriber], ends: Sequence[str]
) -> None:
    """Greedily, token for token, as transformers with merged weights, and as the embedded engine that merges them."""
    version, tensors = engine.version + 1, adapters(weights[0], 1, ends)
    whole = merged(weights[0], tensors)
    load(engine, channel, version, tensors)
    local = AdaptedEngine(weights[0].path, LocalConfig(max_running=8), LORA, max_length=512, threads=1)
    load(local, channel, version, tensors)
    requests = ask(4, 1, 40, temperature=0.0)
    found, ours = answers(engine, requests), answers(local, requests)
    plain = [
        weights[0].logprobs(r.prompt_tokens.tolist(), d.tokens.tolist()) for r, d in zip(requests, found, strict=True)
    ]
    for request, done, mine, start in zip(requests, found, ours, plain, strict=True):
        table = whole.table([*request.prompt_tokens.tolist(), *done.tokens.tolist()])
        theirs = table[len(request.prompt_tokens) - 1 : -1].argmax(-1)
        assert done.tokens.tolist() == mine.tokens.tolist() == theirs.tolist()
        assert set(done.versions.tolist()) == {version}
        assert gap(whole, request, done) < CLOSE
        assert np.abs(start - done.logprobs).max() > 0.05, "it should say something else than the start model"
    [scored] = engine.logprobs([requests[0].prompt_tokens], [found[0].tokens], 1.0)
    expected = whole.logprobs(requests[0].prompt_tokens.tolist(), found[0].tokens.tolist())
    assert np.abs(scored - expected).max() < CLOSE


def test_version_0_is_the_start_model_and_one_can_go_back_to_it(
    engine: SglangEngine, weights: tuple[Weights, Weights], channel: tuple[Publisher, Subscriber]
) -> None:
    tensors = adapters(weights[0], 2)
    load(engine, channel, 100, tensors)
    load(engine, channel, 0, {name: t * ("lora_A" in name) for name, t in tensors.items()})
    requests = ask(2, 2, 24)
    for done in answers(engine, requests):
        assert set(done.versions.tolist()) == {0}
        assert gap(weights[0], requests[done.request], done) < CLOSE
    load(engine, channel, 101, tensors)


@pytest.mark.parametrize("kept", ["recompute", pytest.param("keep", marks=pytest.mark.prove)])
def test_a_version_comes_while_samples_run_and_the_one_before_goes_with_the_last_of_its_own(
    engine: SglangEngine, weights: tuple[Weights, Weights], channel: tuple[Publisher, Subscriber], kept: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Twice as many samples as run at a time, so that some wait in the server's queue, where they are aborted too."""
    monkeypatch.setattr(engine._config, "kv_on_update", kept)
    first, second = engine.version + 1, engine.version + 2
    old, new = adapters(weights[0], 3), adapters(weights[0], 4)
    wholes = {first: merged(weights[0], old), second: merged(weights[0], new)}
    load(engine, channel, first, old)
    requests = ask(4, 4, LONG)
    run_until_tokens(engine, requests)
    load(engine, channel, second, new)
    assert engine.version == second
    later = [Request(9, requests[0].prompt_tokens, 2, Sampling(8, temperature=0.7))]
    engine.generate(later)
    done = drain(engine)
    assert engine.lost() == []
    assert len(done) == 18
    for completion in done:
        request = next(r for r in [*requests, *later] if r.id == completion.request)
        assert len(completion.tokens) == request.sampling.max_new_tokens
        assert completion.versions.tolist() == sorted(completion.versions.tolist())
        for version, whole in wholes.items():
            assert gap(whole, request, completion, version) < CLOSE
    mixed = [c for c in done if set(c.versions.tolist()) == {first, second}]
    assert bool(mixed) == (kept == "recompute")
    assert {int(v) for c in done if c.request == 9 for v in c.versions} == {second}
    only(engine, second)


def test_aborted_and_cancelled_samples_hold_no_adapter(
    engine: SglangEngine, weights: tuple[Weights, Weights], channel: tuple[Publisher, Subscriber]
) -> None:
    for seed in (5, 6, 7, 8):
        version = engine.version + 1
        load(engine, channel, version, adapters(weights[0], seed))
        assert engine.version == version
        run_until_tokens(engine, ask(6, 4, LONG))
        engine.cancel([0, 1, 5])
        assert len(engine.abort()) == 12
        only(engine, version)
    assert engine.servers.address(0).incarnation == 1, "no unload hung, and no load behind it"


def test_adapters_of_another_model_are_refused_before_anything_is_sent(
    engine: SglangEngine, weights: tuple[Weights, Weights], channel: tuple[Publisher, Subscriber]
) -> None:
    version, tensors = engine.version, adapters(weights[0], 8)
    name = "model.layers.0.mlp.up_proj.lora_B.default.weight"
    for odd, words in (
        (tensors | {name: torch.zeros(3, LORA.rank)}, "no layer of the start model fits model.layers.0.mlp.up_proj"),
        (dict(weights[1].named), "has A and B of each, and nothing else"),
    ):
        with pytest.raises(ValueError, match=words):
            load(engine, channel, version + 1, odd)
    assert engine.version == version


@pytest.mark.prove
def test_a_server_that_was_killed_is_given_the_adapters_again(
    weights: tuple[Weights, Weights], channel: tuple[Publisher, Subscriber], tmp_path: Path
) -> None:
    engine, tensors = make(weights[0].path, tmp_path, max_running=8), adapters(weights[0], 9)
    try:
        load(engine, channel, 3, tensors)
        run_until_tokens(engine, ask(2, 2, LONG))
        os.kill(engine.servers._places[0]._child.pid, signal.SIGKILL)  # type: ignore[attr-defined]
        drain(engine)
        assert sorted(engine.lost()) == [0, 1]
        limit = time.monotonic() + 240
        while not engine.replicas or engine.version:
            engine._raise_failure()
            time.sleep(0.05)
            assert time.monotonic() < limit, "the server did not come back"
        load(engine, channel, 3, tensors)
        requests, whole = ask(2, 2, 24), merged(weights[0], tensors)
        for done in answers(engine, requests):
            assert set(done.versions.tolist()) == {3}
            assert gap(whole, requests[done.request], done) < CLOSE
    finally:
        engine.close()
