"""The SGLang engine against a fake and a real server: one contract, and what only servers do (die, hang, be many)."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from tokenizers import Tokenizer

from fakes.client import PROMPT, VOCAB, Server, Weights
from fakes.text import first_with, strings_of
from offtrail.core.protocols import Completion, Engine, Request
from offtrail.core.types import Sampling
from offtrail.platform.config.schema import Config, LocalConfig, SglangConfig
from offtrail.platform.engines.channels import open_channel, open_reader
from offtrail.platform.engines.local import LocalEngine
from offtrail.platform.engines.sglang.engine import SglangEngine
from offtrail.platform.weights.store import Publisher, Subscriber

CLOSE = 1e-4
LONG = 400
"""Tokens of an answer that is still running when it is asked."""


@pytest.fixture(scope="module", params=["fake", "real"])
def engine(
    request: pytest.FixtureRequest, weights: tuple[Weights, Weights], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SglangEngine]:
    """One engine with one server, which every test leaves at some version, idle."""
    folder = tmp_path_factory.mktemp(f"engine-{request.param}")
    made = make(request.param, weights[0].path, folder, SglangConfig(max_running=32, start_seconds=240.0))
    yield made
    made.close()


def make(kind: str, model: Path, folder: Path, config: SglangConfig, count: int = 1) -> SglangEngine:
    command = {"command": "fake_sglang"} if kind == "fake" else {}
    return SglangEngine(
        model, config, max_length=512, threads=1, owner="generator-0", count=count, run_dir=folder, **command
    )


@pytest.fixture(scope="module", autouse=True)
def find_the_fake() -> Iterator[None]:
    """`python -m fake_sglang` finds it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]))
        yield


def ask(
    count: int = 2, samples: int = 4, *, new: int = 24, prompt: int = 20, temperature: float = 0.7
) -> list[Request]:
    rng = np.random.default_rng(count + prompt)
    sampling = Sampling(max_new_tokens=new, temperature=temperature, seed=7)
    return [Request(i, rng.integers(3, VOCAB, prompt).astype(np.int32), samples, sampling) for i in range(count)]


def drain(engine: SglangEngine, seconds: float = 240.0) -> list[Completion]:
    done, limit = list[Completion](), time.monotonic() + seconds
    while engine.unfinished:
        done += engine.step()
        assert time.monotonic() < limit, f"{engine.unfinished} samples never came"
    return done


def run_until_tokens(engine: SglangEngine, requests: list[Request], tokens: int) -> None:
    """Start long answers, and wait until the server has reported some of their tokens."""
    engine.generate(requests)
    limit = time.monotonic() + 240
    while not any(len(job.tokens) > tokens for p in engine._client.places.values() for job in p.running.values()):
        engine._raise_failure()
        time.sleep(0.002)
        assert time.monotonic() < limit, "the server reports nothing"


def gap(weights: Weights, request: Request, completion: Completion, version: int | None = None) -> float:
    """Largest |Δ log p| to transformers, over the tokens of ``version``."""
    theirs = weights.logprobs(request.prompt_tokens.tolist(), completion.tokens.tolist(), request.sampling.temperature)
    chosen = np.ones(len(theirs), bool) if version is None else completion.versions == version
    return float(np.abs(theirs - completion.logprobs)[chosen].max(initial=0.0))


def up(engine: SglangEngine, seconds: float = 240.0) -> None:
    limit = time.monotonic() + seconds
    while engine.waiting_for:
        time.sleep(0.05)
        assert time.monotonic() < limit, engine.waiting_for


@contextlib.contextmanager
def channel(kind: str, folder: Path, run_dir: Path, **keys: Any) -> Iterator[tuple[Any, Any]]:
    config = Config(engine=SglangConfig(hang_seconds=60.0))
    config.weights.channel, config.weights.bucket_mb = kind, 1  # type: ignore[assignment]
    for name, value in keys.items():
        setattr(config.weights, name, value)
    publisher = open_channel(config, folder, run_dir, 2)
    try:
        yield publisher, open_reader(config, folder)
    finally:
        publisher.close()


def parameters(weights: Weights) -> Mapping[str, torch.Tensor]:
    return dict(weights.named)


def load(engine: SglangEngine, reader: Any, version: int) -> None:
    with reader.open(version) as opened:
        engine.load_weights(version, opened)


@pytest.fixture
def start(engine: SglangEngine, weights: tuple[Weights, Weights], tmp_path: Path) -> int:
    """The engine back at the first model's weights; the version that they count as."""
    up(engine)
    version = engine.version + 1
    publisher = Publisher(tmp_path / "start")
    publisher.publish(version, parameters(weights[0]))
    load(engine, Subscriber(tmp_path / "start"), version)
    publisher.close()
    return version


def test_log_probabilities_are_the_learners_at_the_sampling_temperature(
    engine: SglangEngine, weights: tuple[Weights, Weights], start: int
) -> None:
    requests = ask()
    engine.generate(requests)
    assert engine.unfinished == 8
    done = drain(engine)
    assert sorted((c.request, c.index) for c in done) == [(i, j) for i in range(2) for j in range(4)]
    for completion in done:
        assert (len(completion.tokens), completion.finish) == (24, "length")
        assert set(completion.versions.tolist()) == {start}
        assert completion.times[0] <= completion.times[1] <= completion.times[2]
        assert gap(weights[0], requests[completion.request], completion) < CLOSE
    prompts, outputs = [requests[c.request].prompt_tokens for c in done[:2]], [c.tokens for c in done[:2]]
    for prompt, output, scored in zip(prompts, outputs, engine.logprobs(prompts, outputs, 1.0), strict=True):
        assert np.abs(scored - weights[0].logprobs(prompt.tolist(), output.tolist())).max() < CLOSE
    with pytest.raises(ValueError, match=r"temperature=0\.7: SGLang scores given tokens at 1 only"):
        engine.logprobs(prompts, outputs, 0.7)


def test_alternatives_are_the_likeliest_tokens_of_each_position(
    engine: SglangEngine, weights: tuple[Weights, Weights], start: int
) -> None:
    prompt = ask()[0].prompt_tokens
    sampling = Sampling(24, temperature=0.7)
    engine.generate([Request(0, prompt, 2, replace(sampling, alternatives=5)), Request(1, prompt, 1, sampling)])
    done = drain(engine)
    assert [c.alternatives is None for c in sorted(done, key=lambda c: c.request)] == [False, False, True]
    for c in done:
        if c.alternatives is not None:
            table = weights[0].table([*prompt.tolist(), *c.tokens.tolist()], 0.7)[len(prompt) - 1 : -1]
            likeliest = table.sort(-1, descending=True)
            assert c.alternatives.tokens.dtype == np.int32
            assert c.alternatives.tokens.tolist() == likeliest.indices[:, :5].tolist()
            np.testing.assert_allclose(c.alternatives.logprobs, likeliest.values[:, :5], atol=CLOSE, rtol=0)


@pytest.mark.parametrize("told", [True, False])
def test_an_answer_ends_with_the_token_that_completes_a_stop_string(
    engine: SglangEngine, weights: tuple[Weights, Weights], start: int, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The local engine's tokens, greedily, whatever the string: of several tokens, or ending in the middle of one. Also
    where the server does not see it itself, and makes more tokens.
    """
    monkeypatch.setattr(engine._client, "decodes", told)
    local = LocalEngine(weights[0].path, LocalConfig(max_running=4), max_length=512, threads=1)
    prompt = ask()[0].prompt_tokens
    greedy = Sampling(60, temperature=0.0)
    plain = collect(local, [Request(0, prompt, 1, greedy)])[0]
    requests = [
        Request(i, prompt, 1, replace(greedy, stop=("never", string), alternatives=2))
        for i, string in enumerate(strings_of(weights[0].path, plain.tokens.tolist()))
    ]
    requests.append(Request(len(requests), prompt, 1, replace(greedy, stop=("never",), alternatives=2)))
    ours, theirs = collect(local, requests), collect(engine, requests)
    assert len(requests) > 5
    for mine, other in zip(ours, theirs, strict=True):
        assert other.tokens.tolist() == mine.tokens.tolist()
        assert (other.finish, other.stopped_by) == (mine.finish, mine.stopped_by)
        assert len(other.logprobs) == len(other.versions) == len(other.alternatives.tokens) == len(mine.tokens)
        assert set(other.versions.tolist()) == {start}
        np.testing.assert_allclose(other.logprobs, mine.logprobs, atol=CLOSE, rtol=0)
    assert (theirs[-1].finish, theirs[-1].stopped_by) == ("length", "")
    assert all(c.finish == "stop" and c.stopped_by for c in theirs[:-1])


def test_a_server_with_a_tokenizer_stops_at_strings_itself_and_leaves_the_tokens_whole(
    engine: SglangEngine, weights: tuple[Weights, Weights], start: int
) -> None:
    address = engine.servers.address(0)
    server = Server("", address.url, address.key, address.admin_key)
    tokenizer = Tokenizer.from_file(str(weights[0].path / "tokenizer.json"))
    body = {"input_ids": PROMPT, "return_logprob": True}
    greedy = {"max_new_tokens": 40, "temperature": 0.0, "ignore_eos": True, "no_stop_trim": True}
    plain = asyncio.run(server.generate(body | {"sampling_params": greedy}))["output_ids"]
    pairs = [tokenizer.decode(plain[i : i + 2], skip_special_tokens=False) for i in range(1, 39)]
    string = next(text for text in pairs if text.isascii())
    count, _ = first_with(tokenizer, plain, (string,))
    answer = asyncio.run(server.generate(body | {"sampling_params": greedy | {"stop": ["never", string]}}))
    assert answer["output_ids"] == plain[:count]
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": string}
    assert len(answer["meta_info"]["output_token_logprobs"]) == count < 40


def collect(engine: Engine, requests: list[Request]) -> list[Completion]:
    done, limit = list[Completion](), time.monotonic() + 240
    engine.generate(requests)
    while engine.unfinished:
        done += engine.step()
        assert time.monotonic() < limit, f"{engine.unfinished} samples never came"
    return sorted(done, key=lambda completion: completion.request)


def test_a_stop_token_ends_an_answer_and_is_its_last(engine: SglangEngine, start: int) -> None:
    stops = tuple(range(2, 64))  # 2, the model's own end, stops a server whatever it is told
    [request] = ask(1, 8, new=100)
    engine.generate([Request(0, request.prompt_tokens, 8, Sampling(100, stop_token_ids=stops))])
    for completion in drain(engine):
        if completion.finish == "stop":
            assert completion.tokens[-1] in stops
        assert not set(completion.tokens[:-1].tolist()) & set(stops)


def test_what_does_not_fit_is_refused_before_anything_is_sent(engine: SglangEngine, start: int) -> None:
    [good] = ask(1, 1)
    bad = Request(1, np.array([3, VOCAB], np.int32), 1, Sampling(8))
    with pytest.raises(ValueError, match=rf"request 1: token ids 3…{VOCAB}, but the vocabulary is {VOCAB}"):
        engine.generate([good, bad])
    with pytest.raises(ValueError, match=r"above model\.max_length=512"):
        engine.generate([Request(1, good.prompt_tokens, 1, Sampling(500))])
    assert engine.unfinished == 0


def test_of_a_long_prompt_one_sample_goes_ahead_and_the_others_hit_the_cache(engine: SglangEngine, start: int) -> None:
    before = engine.counters
    engine.generate(ask(1, 8, prompt=150, new=8))
    drain(engine)
    added = {name: value - before[name] for name, value in engine.counters.items()}
    assert added["decoded_tokens"] == 64
    assert added["prefilled_tokens"] + added["prefix_hit_tokens"] == 8 * 150
    assert added["prefix_hit_tokens"] >= 7 * 149


MODES = ["retract", "abort", "in_place"]


@pytest.mark.pairs("engine", "kind", "mode")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["shm", "disk", "ipc"])
def test_a_version_reaches_the_server_in_flight_and_its_tokens_say_so(
    engine: SglangEngine, weights: tuple[Weights, Weights], start: int, tmp_path: Path, kind: str, mode: str,
    monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None],
) -> None:  # fmt: skip
    """Tokens before the boundary are the old weights', those after it the new ones'."""
    monkeypatch.setattr(engine._config, "kv_on_update", "keep" if mode == "in_place" else "recompute")
    monkeypatch.setattr(engine._config, "pause_mode", mode if mode != "in_place" else "auto")
    version = start + 1
    with channel(kind, tmp_path / "weights", tmp_path) as (publisher, reader):
        publisher.publish(version, parameters(weights[1]))
        requests = ask(2, 4, new=LONG)
        run_until_tokens(engine, requests, 30)
        load(engine, reader, version)
        assert engine.version == version
        done = drain(engine)
    assert engine.lost() == []
    mixed = [c for c in done if len(set(c.versions.tolist())) == 2]
    assert mixed, "no answer spans the update"
    for completion in done:
        assert len(completion.tokens) == LONG
        assert completion.versions.tolist() == sorted(completion.versions.tolist())
        assert set(completion.versions.tolist()) <= {start, version}
        request = requests[completion.request]
        assert gap(weights[0], request, completion, start) < CLOSE
        if mode != "in_place":
            assert gap(weights[1], request, completion, version) < CLOSE
    if mode == "in_place":
        kept = max(gap(weights[1], requests[c.request], c, version) for c in mixed)
        record_property("largest |Δ log p| under kv_on_update=keep", kept)
        assert kept > 1e-3, "the old keys and values were not kept"
    # A new sample of the same prompt begins from none of the old weights' keys and values.
    again = Request(9, requests[0].prompt_tokens, 2, Sampling(8, temperature=0.7))
    engine.generate([again])
    assert all(gap(weights[1], again, completion) < CLOSE for completion in drain(engine))
    [prompt, output] = requests[0].prompt_tokens, done[0].tokens
    [scored] = engine.logprobs([prompt], [output], 1.0)
    assert np.abs(scored - weights[1].logprobs(prompt.tolist(), output.tolist())).max() < CLOSE


def test_a_foreign_checkpoint_is_refused_and_nothing_changes(
    engine: SglangEngine, weights: tuple[Weights, Weights], start: int, tmp_path: Path
) -> None:
    publisher, reader = Publisher(tmp_path / "weights"), Subscriber(tmp_path / "weights")
    tensors = dict(parameters(weights[1]))
    lacking = {name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}
    for foreign, words in (
        (lacking, r"it lacks model\.norm\.weight"),
        (tensors | {"model.extra.weight": torch.zeros(2)}, r"it holds in addition model\.extra\.weight"),
        (tensors | {"model.norm.weight": torch.zeros(3)}, r"it has another shape of model\.norm\.weight"),
    ):
        publisher.publish(start + 1, foreign)
        with pytest.raises(ValueError, match=rf"version {start + 1} is of another model: {words}"):
            load(engine, reader, start + 1)
    publisher.close()
    assert engine.version == start
    requests = ask(1, 2)
    engine.generate(requests)
    assert all(gap(weights[0], requests[0], completion) < CLOSE for completion in drain(engine))


def test_changes_reach_the_server_and_one_without_its_base_is_refused(
    engine: SglangEngine, weights: tuple[Weights, Weights], start: int, tmp_path: Path
) -> None:
    """The server's own reader holds the base; from another base it goes back to the whole version, or refuses."""
    folder = tmp_path / "weights"
    tensors = {name: tensor.clone() for name, tensor in weights[0].named}
    with channel("shm", folder, tmp_path, delta=True, full_every=100) as (publisher, reader):
        for version in range(start + 1, start + 4):
            tensors["model.norm.weight"][version % 64] += 1.0
            publisher.publish(version, tensors)
            load(engine, reader, version)
        assert publisher.delta_share < 0.2
        [prompt], [output] = [ask(1)[0].prompt_tokens], [np.arange(5, 30, dtype=np.int32)]
        with torch.no_grad():
            weights[1].model.load_state_dict(weights[0].model.state_dict() | tensors)
        try:
            [scored] = engine.logprobs([prompt], [output], 1.0)
            assert np.abs(scored - weights[1].logprobs(prompt.tolist(), output.tolist())).max() < CLOSE
        finally:
            weights[1].model.load_state_dict(type(weights[1].model).from_pretrained(weights[1].path).state_dict())
        tensors["model.norm.weight"] += 1.0
        publisher.publish(start + 4, tensors)
        # what the version goes on from is taken away, from the server's reader too
        for file in folder.glob("v*.safetensors"):
            if file.name != f"v{start + 4:08d}.safetensors":
                file.unlink()
        unread = Subscriber(folder)
        with pytest.raises(Exception, match=rf"version {start + 4} holds what changed since version {start + 3}"):
            unread.open(start + 4)


def main_pid(engine: SglangEngine, place: int = 0) -> int:
    return engine.servers._places[place]._child.pid  # type: ignore[attr-defined, no-any-return]


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.prove)])
def mortal(request: pytest.FixtureRequest, weights: tuple[Weights, Weights], tmp_path: Path) -> Iterator[SglangEngine]:
    """An engine of its own, to be ill-treated."""
    config = SglangConfig(max_running=32, start_seconds=240.0, hang_seconds=6.0)
    made = make(request.param, weights[0].path, tmp_path, config)
    up(made)
    yield made
    made.close()


def test_a_killed_and_a_hung_server_lose_their_requests_once_and_come_back(
    mortal: SglangEngine, weights: tuple[Weights, Weights], tmp_path: Path
) -> None:
    """Kill -9 in the middle of a group; SIGSTOP for a moment, which loses nothing; SIGSTOP for good."""
    publisher, reader = Publisher(tmp_path / "weights"), Subscriber(tmp_path / "weights")
    publisher.publish(3, parameters(weights[1]))
    load(mortal, reader, 3)

    run_until_tokens(mortal, ask(2, 4, new=LONG), 1)
    os.kill(main_pid(mortal), signal.SIGKILL)
    returned = drain(mortal)
    assert sorted(mortal.lost()) == [0, 1]
    assert mortal.lost() == []
    assert {c.request for c in returned} <= {0, 1}
    up_again(mortal)
    load(mortal, reader, 3)
    assert made_by(mortal, weights[1]) == {3}

    run_until_tokens(mortal, ask(2, 4, new=LONG), 1)
    stop(mortal, signal.SIGSTOP)
    time.sleep(1.5)
    stop(mortal, signal.SIGCONT)
    assert len(drain(mortal)) == 8
    assert mortal.lost() == []

    run_until_tokens(mortal, ask(2, 4, new=LONG), 1)
    stop(mortal, signal.SIGSTOP)
    drain(mortal)
    assert sorted(mortal.lost()) == [0, 1]
    up_again(mortal)
    load(mortal, reader, 3)
    assert made_by(mortal, weights[1]) == {3}
    publisher.close()


def up_again(engine: SglangEngine) -> None:
    """Until a server is up that was started anew, from the start's weights, and waits for a version."""
    limit = time.monotonic() + 240
    while not engine.replicas or engine.version:
        engine._raise_failure()
        time.sleep(0.05)
        assert time.monotonic() < limit, "the server did not come back"
    assert engine.waiting_for


def made_by(engine: SglangEngine, weights: Weights) -> set[int]:
    requests = ask(1, 2)
    engine.generate(requests)
    done = drain(engine)
    assert all(gap(weights, requests[0], completion) < CLOSE for completion in done)
    return {int(v) for c in done for v in c.versions}


def stop(engine: SglangEngine, signum: signal.Signals) -> None:
    main = psutil.Process(main_pid(engine))
    for process in [main, *main.children(recursive=True)]:
        process.send_signal(signum)


def test_an_engine_whose_servers_cannot_be_started_leaves_nothing(
    weights: tuple[Weights, Weights], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither its loop's thread nor its connections, which would warn of themselves in another test."""

    def no_room(*_: Any, **__: Any) -> None:
        raise BlockingIOError("no room for another process")

    monkeypatch.setattr("offtrail.platform.engines.sglang.child.subprocess.Popen", no_room)
    before = set(threading.enumerate())
    with pytest.raises(BlockingIOError, match="no room"):
        make("fake", weights[0].path, tmp_path, SglangConfig())
    assert set(threading.enumerate()) <= before
    gc.collect()


@pytest.mark.parametrize("kind", ["fake"])
def test_unfinished_samples_come_back_as_they_are(kind: str, weights: tuple[Weights, Weights], tmp_path: Path) -> None:
    engine = make(kind, weights[0].path, tmp_path, SglangConfig(max_running=4, start_seconds=240.0))
    try:
        up(engine)
        run_until_tokens(engine, ask(3, 4, new=LONG), 1)
        aborted = engine.abort()
        assert sorted((c.request, c.index) for c in aborted) == [(i, j) for i in range(3) for j in range(4)]
        assert {c.finish for c in aborted} == {"abort"}
        assert engine.unfinished == 0
        engine.generate(ask(1, 2))
        assert len(drain(engine)) == 2
    finally:
        engine.close()


def test_cancelled_requests_are_not_heard_of_again_and_the_others_finish(
    engine: SglangEngine, weights: tuple[Weights, Weights], start: int
) -> None:
    """More samples than decode together, so that some of the cancelled wait inside the server."""
    requests = ask(10, 4, new=200)
    run_until_tokens(engine, requests, 1)
    before = engine.counters["decoded_tokens"]
    engine.cancel([0, 1, 2, 3, 4, 5, 6, 9, 77])
    assert engine.unfinished == 2 * 4
    assert engine.counters["decoded_tokens"] > before, "what was made and thrown away is counted"
    engine.generate([Request(0, requests[0].prompt_tokens, 2, Sampling(5, temperature=0.7))])  # the id is free again
    done = drain(engine)
    assert sorted((c.request, c.index) for c in done) == [(0, 0), (0, 1), *((i, j) for i in (7, 8) for j in range(4))]
    assert engine.lost() == []
    assert all(len(c.tokens) == (5 if c.request == 0 else 200) for c in done)
    assert all(gap(weights[0], requests[c.request], c) < CLOSE for c in done)


def test_cancel_before_a_server_is_up_and_after_it_is_gone(weights: tuple[Weights, Weights], tmp_path: Path) -> None:
    engine = make("fake", weights[0].path, tmp_path, SglangConfig(max_running=32, start_seconds=240.0))
    try:
        engine.generate(ask(2, 2))
        engine.cancel([0])
        assert engine.unfinished == 2
        assert {c.request for c in drain(engine)} == {1}
        run_until_tokens(engine, ask(2, 4, new=LONG), 1)
        os.kill(main_pid(engine), signal.SIGKILL)
        engine.cancel([0])
        drain(engine)
        assert engine.lost() == [1]
        engine.cancel([1])
        assert engine.lost() == []
    finally:
        engine.close()


@pytest.mark.parametrize("mode", MODES)
def test_samples_that_the_server_has_not_begun_survive_an_update(
    engine: SglangEngine, weights: tuple[Weights, Weights], start: int, tmp_path: Path, mode: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """More samples than decode together: some wait inside the server while weights change."""
    monkeypatch.setattr(engine._config, "kv_on_update", "keep" if mode == "in_place" else "recompute")
    monkeypatch.setattr(engine._config, "pause_mode", mode if mode != "in_place" else "auto")
    with channel("shm", tmp_path / "weights", tmp_path) as (publisher, reader):
        publisher.publish(start + 1, parameters(weights[1]))
        requests = ask(8, 8, new=60)
        run_until_tokens(engine, requests, 1)
        load(engine, reader, start + 1)
        done = drain(engine)
    assert engine.lost() == []
    assert len(done) == 64
    assert all(len(c.tokens) == 60 for c in done)
