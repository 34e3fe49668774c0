"""What offtrail counts on in an SGLang server, held against the fake one and a real one over plain HTTP.

Each test runs twice, so that whatever passes with tests/fake_sglang.py can be trusted to pass with sglang. Sampled
tokens are not compared (on a CPU nobody can seed them): log-probabilities are, with transformers' model in float32.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
import torch

from fake_sglang import FakeServer
from fakes.client import (
    CONTEXT,
    PROMPT,
    RUNNING,
    VOCAB,
    Flight,
    Json,
    Server,
    Weights,
    broadcast,
    bucket,
    build,
    coroutine_test,
    landed,
    session,
    start_flight,
    started,
    tensor_body,
)
from offtrail.platform.engines.sglang.flags import CONTEXT_MARGIN
from offtrail.platform.engines.sglang.servers import ServerError, Servers

CLOSE = 1e-4
APART = 1e-3


@pytest.fixture(scope="module", params=["fake", "real"])
def running(
    request: pytest.FixtureRequest, weights: tuple[Weights, Weights], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("servers")
    with started(request.param, weights[0].path, folder) as (server, _):
        yield server


@pytest.fixture
def server(running: Server, weights: tuple[Weights, Weights]) -> Server:
    """The server, idle, under the first weights and version ``first``."""

    async def reset() -> None:
        await running.ok("/continue_generation")
        await running.ok("/abort_request", {"abort_all": True})
        await running.load(weights[0], "first")

    asyncio.run(reset())
    return running


# Tokens, log-probabilities, finish reasons


@coroutine_test
async def test_tokens_in_and_out_with_logprobs_at_the_sampling_temperature(
    server: Server, weights: tuple[Weights, Weights]
) -> None:
    prompts = [PROMPT, PROMPT[:5]]
    params = {"max_new_tokens": 24, "temperature": 0.7, "ignore_eos": True}
    answers = await server.generate({"input_ids": prompts, "sampling_params": params, "return_logprob": True})
    assert len(answers) == 2
    for prompt, answer in zip(prompts, answers, strict=True):
        output, meta = answer["output_ids"], answer["meta_info"]
        assert "text" not in answer
        assert len(output) == meta["completion_tokens"] == 24
        assert all(0 <= token < VOCAB for token in output)
        assert meta["prompt_tokens"] == len(prompt)
        assert meta["finish_reason"] == {"type": "length", "length": 24}
        assert meta["weight_version"] == "first"
        assert meta["weight_versions"] == [{"version": "first", "start": 0, "end": 24}]
        assert meta["input_token_logprobs"] == []
        assert [token for _, token, _ in meta["output_token_logprobs"]] == output
        got = [value for value, _, _ in meta["output_token_logprobs"]]
        np.testing.assert_allclose(got, weights[0].logprobs(prompt, output, 0.7), atol=CLOSE, rtol=0)


@coroutine_test
async def test_top_p_and_top_k_leave_logprobs_of_the_whole_distribution(
    server: Server, weights: tuple[Weights, Weights]
) -> None:
    for more in ({"top_p": 0.5}, {"top_k": 3}, {"temperature": 0.0}):
        params = {"max_new_tokens": 16, "temperature": 0.7, "ignore_eos": True} | more
        answer = await server.generate({"input_ids": PROMPT, "sampling_params": params, "return_logprob": True})
        got = [value for value, _, _ in answer["meta_info"]["output_token_logprobs"]]
        temperature = params["temperature"] or 1.0  # greedy ones are unscaled
        expected = weights[0].logprobs(PROMPT, answer["output_ids"], temperature)
        np.testing.assert_allclose(got, expected, atol=CLOSE, rtol=0)


@coroutine_test
async def test_top_logprobs_are_at_the_sampling_temperature_too_the_likeliest_first(
    server: Server, weights: tuple[Weights, Weights]
) -> None:
    for temperature in (0.7, 0.0):
        params = {"max_new_tokens": 9, "temperature": temperature, "top_k": 3, "ignore_eos": True}
        body = {"input_ids": PROMPT, "sampling_params": params, "return_logprob": True, "top_logprobs_num": 4}
        answer = await server.generate(body)
        whole, meta = PROMPT + answer["output_ids"], answer["meta_info"]
        table = weights[0].table(whole, temperature or 1.0)[len(PROMPT) - 1 : -1]
        assert meta["input_top_logprobs"] == []
        assert [len(position) for position in meta["output_top_logprobs"]] == [4] * 9
        ids = [[token for _, token, _ in position] for position in meta["output_top_logprobs"]]
        assert ids == table.argsort(-1, descending=True)[:, :4].tolist()
        values = [[value for value, _, _ in position] for position in meta["output_top_logprobs"]]
        expected = table.sort(-1, descending=True).values[:, :4]
        np.testing.assert_allclose(values, expected, atol=CLOSE, rtol=0)


@coroutine_test
async def test_score_by_prefill_is_at_temperature_one(server: Server, weights: tuple[Weights, Weights]) -> None:
    tokens = [*PROMPT, 300, 7, 99, VOCAB - 1, 12]
    for start in (0, 4, len(tokens) - 1, len(tokens)):
        answer = await server.generate(
            {
                "input_ids": tokens,
                "sampling_params": {"max_new_tokens": 0, "temperature": 0.5},
                "return_logprob": True,
                "logprob_start_len": start,
            }
        )
        meta = answer["meta_info"]
        assert answer["output_ids"] == meta["output_token_logprobs"] == []
        assert meta["finish_reason"] == {"type": "length", "length": 0}
        rows = meta["input_token_logprobs"]
        # Trap: the vocabulary's last token is shown as 0.
        assert [token for _, token, _ in rows] == [0 if t == VOCAB - 1 else t for t in tokens[start:]]
        if rows:
            assert rows[0][0] is None
            expected = weights[0].logprobs(tokens[: start + 1], tokens[start + 1 :]) if len(rows) > 1 else []
            np.testing.assert_allclose([row[0] for row in rows[1:]], expected, atol=CLOSE, rtol=0)


@coroutine_test
async def test_score_and_sample_in_one_call(server: Server, weights: tuple[Weights, Weights]) -> None:
    params = {"max_new_tokens": 6, "temperature": 0.7, "ignore_eos": True}
    body = {"input_ids": PROMPT, "sampling_params": params, "return_logprob": True, "logprob_start_len": 0}
    for _ in range(2):  # the second time from a warm cache
        answer = await server.generate(body)
        meta = answer["meta_info"]
        scored = [value for value, _, _ in meta["input_token_logprobs"][1:]]
        np.testing.assert_allclose(scored, weights[0].logprobs(PROMPT[:1], PROMPT[1:]), atol=CLOSE, rtol=0)
        made = [value for value, _, _ in meta["output_token_logprobs"]]
        np.testing.assert_allclose(made, weights[0].logprobs(PROMPT, answer["output_ids"], 0.7), atol=CLOSE, rtol=0)
        assert meta["cached_tokens"] == 0


@coroutine_test
async def test_a_stop_token_is_the_last_of_the_output(server: Server) -> None:
    stops = list(range(0, VOCAB, 2))
    params = {"max_new_tokens": 200, "stop_token_ids": [*stops, 10 * VOCAB]}
    answer = await server.generate({"input_ids": PROMPT, "sampling_params": params, "return_logprob": True})
    output, meta = answer["output_ids"], answer["meta_info"]
    assert output[-1] in stops
    assert not set(output[:-1]) & set(stops)
    assert meta["finish_reason"] == {"type": "stop", "matched": output[-1]}
    assert len(meta["output_token_logprobs"]) == len(output)


@coroutine_test
async def test_the_models_end_token_stops_unless_it_is_ignored_and_so_do_all_others(server: Server) -> None:
    every = list(range(VOCAB))
    params = {"max_new_tokens": 5, "stop_token_ids": every}
    answer = await server.generate({"input_ids": PROMPT, "sampling_params": params})
    assert answer["meta_info"]["finish_reason"]["type"] == "stop"
    # Trap: ignore_eos ignores stop_token_ids too.
    answer = await server.generate({"input_ids": PROMPT, "sampling_params": params | {"ignore_eos": True}})
    assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 5}
    ended: list[dict[str, Any]] = []
    for _ in range(20):  # a token in some hundreds is the end
        samples = await server.generate({"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 400, "n": 4}})
        if ended := [s for s in samples if s["meta_info"]["finish_reason"]["type"] == "stop"]:
            break
    assert ended
    assert all(s["meta_info"]["finish_reason"]["matched"] == s["output_ids"][-1] == 2 for s in ended)


@coroutine_test
async def test_several_samples_of_a_prompt_come_as_a_flat_list_under_ids_of_their_own(server: Server) -> None:
    rid = server.rid()
    params = {"max_new_tokens": 3, "ignore_eos": True, "n": 2}
    answers = await server.generate({"input_ids": [PROMPT, PROMPT[:4]], "rid": rid, "sampling_params": params})
    assert [answer["meta_info"]["prompt_tokens"] for answer in answers] == [len(PROMPT)] * 2 + [4] * 2
    assert not any(answer["meta_info"]["id"].startswith(rid) for answer in answers)  # trap: rid is lost
    assert [answer["meta_info"]["cached_tokens"] for answer in answers] == [len(PROMPT) - 1] * 2 + [3] * 2
    batch = await server.generate({"input_ids": [PROMPT, PROMPT], "rid": rid, "sampling_params": {"max_new_tokens": 1}})
    assert [answer["meta_info"]["id"] for answer in batch] == [f"{rid}_0", f"{rid}_1"]


@coroutine_test
async def test_a_prefix_that_was_seen_is_not_prefilled_again(server: Server) -> None:
    params = {"max_new_tokens": 8, "ignore_eos": True}
    first = await server.generate({"input_ids": PROMPT, "sampling_params": params})
    assert first["meta_info"]["cached_tokens"] == 0
    whole = PROMPT + first["output_ids"]
    again = await server.generate({"input_ids": [*whole, 5], "sampling_params": params})
    assert again["meta_info"]["cached_tokens"] == len(whole) - 1
    await server.ok("/flush_cache?timeout=20")
    cold = await server.generate({"input_ids": whole, "sampling_params": params})
    assert cold["meta_info"]["cached_tokens"] == 0


@coroutine_test
async def test_what_is_refused_and_how(server: Server) -> None:
    def body(**changes: Any) -> Json:
        return {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 2}} | changes

    twice = await server.call("/generate", body(input_ids=[PROMPT, PROMPT], rid=["a", "a"]), key=server.key)
    refused = {
        "input_ids cannot be empty.": body(input_ids=[]),
        f"The input ({CONTEXT} tokens) is longer than the model's context length ({CONTEXT} tokens).": body(
            input_ids=[5] * CONTEXT
        ),
        f"Input length ({CONTEXT - 6} tokens) exceeds the maximum allowed length ({CONTEXT - 6} tokens). "
        f"Use a shorter input or enable --allow-auto-truncate.": body(input_ids=[5] * (CONTEXT - 6)),
        "temperature must be a non-negative finite number, got -1.": body(sampling_params={"temperature": -1}),
        "top_p must be in (0, 1], got 0.": body(sampling_params={"top_p": 0}),
        "top_k must be -1 (disable) or at least 1, got 0.": body(sampling_params={"top_k": 0}),
        "max_new_tokens must be at least 0, got -2.": body(sampling_params={"max_new_tokens": -2}),
        "req.logprob_start_len=50 is higher than the number of input tokens len(req.origin_input_ids)=12. "
        "Please use a smaller logprob_start_len.": body(return_logprob=True, logprob_start_len=50),
    }
    for words, wrong in refused.items():
        reply = await server.call("/generate", wrong, key=server.key)
        assert (reply.status, json.loads(reply.text)) == (400, {"error": {"message": words}})
    assert (twice.status, "Duplicate request IDs" in twice.text) == (400, True)
    long = await server.call("/generate", body(sampling_params={"max_new_tokens": CONTEXT}), key=server.key)
    assert (long.status, "exceeds the model's maximum context length" in long.text) == (400, True)
    assert (await server.call("/generate", body(input_ids=[1.5]), key=server.key)).status == 400
    assert (await server.call("/generate", body(sampling_params={"zork": 1}), key=server.key)).status == 500


@coroutine_test
async def test_two_tokens_of_the_context_are_never_made(server: Server) -> None:
    length = CONTEXT - 10
    params = {"max_new_tokens": 10, "ignore_eos": True}
    answer = await server.generate({"input_ids": [7] * length, "sampling_params": params})
    assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 8}


# Streams


@coroutine_test
async def test_streamed_chunks_add_up_to_the_whole(server: Server, weights: tuple[Weights, Weights]) -> None:
    flight = start_flight(server, 30, stream_interval=None)
    await landed(flight)
    assert len(flight.tokens) == len(flight.logprobs) == 30
    expected = weights[0].logprobs(PROMPT, flight.tokens, 0.7)
    np.testing.assert_allclose(flight.logprobs, expected, atol=CLOSE, rtol=0)
    *before, last = [chunk["meta_info"] for chunk in flight.chunks]
    assert all(meta["finish_reason"] is None and "weight_versions" not in meta for meta in before)
    assert all(meta["completion_tokens"] % 4 == 1 for meta in before)
    assert last["finish_reason"] == {"type": "length", "length": 30}
    assert last["weight_versions"] == [{"version": "first", "start": 0, "end": 30}]
    counts = np.cumsum([len(chunk["output_ids"]) for chunk in flight.chunks]).tolist()
    assert counts == [chunk["meta_info"]["completion_tokens"] for chunk in flight.chunks]
    assert counts == [chunk["meta_info"]["output_token_logprobs_length"] for chunk in flight.chunks]


@coroutine_test
async def test_a_stream_that_is_refused_says_so_in_a_chunk(server: Server) -> None:
    body = {"input_ids": [5] * CONTEXT, "sampling_params": {"max_new_tokens": 2}, "stream": True}
    reply = await server.call("/generate", body, key=server.key)
    first, done, *rest = reply.text.split("\n\n")
    assert (reply.status, done, rest) == (200, "data: [DONE]", [""])
    error = json.loads(first.removeprefix("data: "))["error"]
    assert (error["code"], "longer than the model's context" in error["message"]) == (400, True)


@coroutine_test
async def test_a_stream_whose_client_leaves_is_aborted(server: Server) -> None:
    flight = start_flight(server, 900)
    await flight.made(5)
    assert flight.task is not None
    flight.task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await flight.task
    assert (await server.call("/flush_cache?timeout=20")).status == 200


@coroutine_test
async def test_an_id_is_aborted_two_seconds_after_its_stream(server: Server) -> None:
    """Trap: sglang aborts an id once more when a stream has ended, so that a new request under it is lost."""
    rid = server.rid()
    await landed(start_flight(server, 2, rid=rid))
    second = start_flight(server, 1000, rid=rid)
    while not second.done and not second.chunks:
        await asyncio.sleep(0.01)
    other = start_flight(server, 1000)
    await server.ok("/pause_generation", {"mode": "in_place"})
    await asyncio.sleep(2.5)
    await server.ok("/continue_generation")
    await landed(second)
    assert second.last["finish_reason"]["type"] == "abort"
    assert not other.done
    await server.ok("/abort_request", {"rid": other.rid})
    await landed(other)


# Keys, health, information


@coroutine_test
async def test_each_endpoint_takes_its_own_key_only(server: Server) -> None:
    generate = {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 1}}
    for key, status in ((server.key, 200), (server.admin, 401), ("", 401), ("user", 401)):
        assert (await server.call("/generate", generate, key=key)).status == status
        assert (await server.call("/model_info", key=key, method="GET")).status == status
    for path in ("/flush_cache", "/abort_request", "/pause_generation", "/continue_generation", "/begin_weight_update"):
        reply = await server.call(path, key=server.key)
        assert (reply.status, json.loads(reply.text)) == (401, {"error": "Unauthorized"})
    assert (await server.call("/health_generate", key="", method="GET")).status == 401  # it makes a token
    assert (await server.call("/health_generate", key=server.key, method="GET")).status == 200
    assert (await server.call("/health", key="", method="GET")).status == 200  # and this none
    assert (await server.call("/nothing", key=server.key)).status == 404


@coroutine_test
async def test_health_is_good_with_and_without_work_and_not_under_a_pause(server: Server) -> None:
    reply = await server.call("/health_generate", key=server.key, method="GET")
    assert (reply.status, reply.text) == (200, "")
    flight = start_flight(server, 900)
    await flight.made(1)
    assert (await server.call("/health_generate", key=server.key, method="GET")).status == 200
    await server.ok("/pause_generation", {"mode": "in_place"})
    await flight.settled()
    assert (
        await server.call("/health_generate", key=server.key, method="GET")
    ).status == 503  # trap: a paused server is called ill
    await server.ok("/continue_generation")
    await server.ok("/abort_request", {"abort_all": True})
    await landed(flight)


@coroutine_test
async def test_what_a_server_says_of_itself(server: Server, weights: tuple[Weights, Weights]) -> None:
    await server.ok("/update_weight_version", {"new_version": "seven"})
    reply = await server.call("/model_info", key=server.key, method="GET")
    info = json.loads(reply.text)
    assert info["model_path"] == str(weights[0].path)
    assert info["weight_version"] == "seven"
    assert (info["model_type"], info["architectures"]) == ("qwen3", ["Qwen3ForCausalLM"])
    reply = await server.call("/server_info", method="GET")
    info = json.loads(reply.text)
    assert info["version"] == "0.5.21"
    assert info["weight_version"] == "0"  # trap: of its start
    assert info["internal_states"][0]["weight_version"] == "seven"
    assert info["custom_weight_loader"] == ["fakes.loading.from_file"]
    assert info["max_total_num_tokens"] == RUNNING * (CONTEXT - CONTEXT_MARGIN)
    assert info["max_req_input_len"] == CONTEXT - 6
    assert (info["tp_size"], info["dtype"], info["enable_deterministic_inference"]) == (1, "float32", False)
    assert (info["stream_interval"], info["incremental_streaming_output"]) == (4, True)


# Aborting


@coroutine_test
async def test_an_abort_returns_what_was_made_of_its_request_and_of_those_whose_id_it_begins(server: Server) -> None:
    rid = server.rid()
    flights = [start_flight(server, 900, rid=rid), start_flight(server, 900, rid=f"{rid}-1")]
    other = start_flight(server, 900)
    for flight in (*flights, other):
        await flight.made(3)
    nothing = await server.call("/abort_request", {"rid": rid[:-1]})  # trap: a prefix alone is nobody's
    assert nothing.status == 200
    before = len(other.tokens)
    await other.made(before + 5)
    assert not any(flight.done for flight in (*flights, other))
    await server.ok("/abort_request", {"rid": rid})
    await landed(*flights)
    for flight in flights:
        assert flight.last["finish_reason"] == {
            "type": "abort",
            "message": "Aborted",
            "status_code": None,
            "err_type": None,
        }
        assert flight.last["completion_tokens"] == len(flight.tokens) == len(flight.logprobs)
        assert flight.last["weight_versions"] == [{"version": "first", "start": 0, "end": len(flight.tokens)}]
    assert not other.done
    await server.ok("/abort_request", {"abort_all": True})
    await landed(other)
    assert other.last["finish_reason"]["type"] == "abort"


@coroutine_test
async def test_an_id_in_use_is_refused_and_its_holder_goes_on(server: Server) -> None:
    flight = start_flight(server, 900)
    await flight.made(1)
    body = {"rid": flight.rid, "input_ids": PROMPT, "sampling_params": {"max_new_tokens": 1}}
    reply = await server.call("/generate", body, key=server.key)
    assert reply.status == 400
    assert json.loads(reply.text) == {"error": {"message": f"Duplicate request ID detected: {flight.rid}"}}
    await flight.made(len(flight.tokens) + 3)
    await server.ok("/abort_request", {"abort_all": True})
    await landed(flight)


@coroutine_test
async def test_a_retracted_request_that_is_aborted_repeats_itself(server: Server) -> None:
    """Traps: the last token and all log-probabilities come a second time, and what had not been reported is lost."""
    flight = start_flight(server, 900, stream_interval=20)
    await flight.made(21)
    await server.ok("/pause_generation", {"mode": "retract"})
    count = await flight.settled()
    await server.ok("/abort_request", {"rid": flight.rid})
    await landed(flight)
    last = flight.chunks[-1]
    assert count == len(flight.tokens)
    assert count % 20 == 1
    assert last["output_ids"] == flight.tokens[-1:]
    assert [value for value, _, _ in last["meta_info"]["output_token_logprobs"]] == flight.logprobs
    assert last["meta_info"]["completion_tokens"] == count
    assert last["meta_info"]["weight_versions"] == [{"version": "first", "start": 0, "end": count}]
    assert "prompt_tokens" not in last["meta_info"]


# Flushing


@coroutine_test
async def test_flushing_is_refused_while_anything_runs(server: Server) -> None:
    flight = start_flight(server, 900)
    await flight.made(1)
    reply = await server.call("/flush_cache")
    assert (reply.status, reply.text) == (400, "Flush cache failed.\n")
    reply = await server.call("/flush_cache?timeout=0.2")
    assert (reply.status, reply.text) == (400, "Timed out waiting for idle state.")
    first = asyncio.create_task(server.call("/flush_cache?timeout=20"))
    await asyncio.sleep(0.05)
    second = asyncio.create_task(server.call("/flush_cache"))  # waits for the first
    await asyncio.sleep(0.1)
    assert not first.done()
    assert not second.done()
    await server.ok("/abort_request", {"abort_all": True})
    assert ((await first).status, (await second).status) == (200, 200)
    await landed(flight)


# Pausing


@coroutine_test
async def test_new_requests_wait_for_the_end_of_a_pause(server: Server) -> None:
    for mode in ("in_place", "retract", "abort"):
        await server.ok("/pause_generation", {"mode": mode})
        body = {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 1}}
        waiting = asyncio.create_task(server.generate(body))
        await asyncio.sleep(0.3)
        assert not waiting.done()
        await server.ok("/continue_generation")
        await waiting


@coroutine_test
async def test_in_place_updates_keep_the_old_keys_and_values(
    server: Server, weights: tuple[Weights, Weights], capsys: pytest.CaptureFixture[str]
) -> None:
    flight = start_flight(server, 400)
    await flight.made(30)
    await server.ok("/pause_generation", {"mode": "in_place"})
    boundary = await flight.settled()
    update = {"model_path": str(weights[1].path), "weight_version": "second", "flush_cache": False}
    await server.ok("/update_weights_from_disk", update)
    await server.ok("/continue_generation")
    await landed(flight)
    assert flight.last["weight_versions"] == spans(boundary, 400)
    assert flight.last["num_retractions"] == 0
    gap = boundary_gap(flight, weights, boundary)
    with capsys.disabled():
        print(f"\n{server.kind}: in-place update, greatest gap to a clean recompute {gap:.3f}")
    assert gap > APART


@coroutine_test
async def test_retracting_and_flushing_recomputes_under_the_new_weights(
    server: Server, weights: tuple[Weights, Weights]
) -> None:
    flights = [start_flight(server, 400), start_flight(server, 400, PROMPT[:7])]
    for flight in flights:
        await flight.made(20)
    await server.ok("/pause_generation", {"mode": "retract"})
    boundaries = [await flight.settled() for flight in flights]
    async with session(server):
        await server.ok("/update_weights_from_tensor", tensor_body(weights[1].named, weight_version="second"))
    await server.ok("/continue_generation")
    await landed(*flights)
    for flight, boundary in zip(flights, boundaries, strict=True):
        assert flight.last["weight_versions"] == spans(boundary, 400)
        assert flight.last["num_retractions"] == 1
        assert flight.last["finish_reason"] == {"type": "length", "length": 400}
    assert boundary_gap(flights[0], weights, boundaries[0]) < CLOSE
    assert boundary_gap(flights[1], weights, boundaries[1], PROMPT[:7]) < CLOSE


@coroutine_test
async def test_retracting_without_a_flush_finds_the_old_prompt_in_the_cache(
    server: Server, weights: tuple[Weights, Weights]
) -> None:
    flight = start_flight(server, 200)
    await flight.made(20)
    await server.ok("/pause_generation", {"mode": "retract"})
    boundary = await flight.settled()
    update = {"model_path": str(weights[1].path), "weight_version": "second", "flush_cache": False}
    await server.ok("/update_weights_from_disk", update)
    await server.ok("/continue_generation")
    await landed(flight)
    assert flight.last["weight_versions"] == spans(boundary, 200)
    assert boundary_gap(flight, weights, boundary) > APART
    fresh = await server.generate({"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 1}})
    assert fresh["meta_info"]["cached_tokens"] == len(PROMPT) - 1  # trap: of the old weights


@coroutine_test
async def test_under_a_pause_by_abort_the_cache_can_be_flushed_and_partials_sent_anew(
    server: Server, weights: tuple[Weights, Weights]
) -> None:
    flight = start_flight(server, 400)
    await flight.made(20)
    await server.ok("/pause_generation", {"mode": "abort"})
    await landed(flight)
    assert flight.last["finish_reason"]["type"] == "abort"
    await server.ok("/flush_cache?timeout=10")
    await server.load(weights[1], "second")
    await server.ok("/continue_generation")
    rest = start_flight(server, 60, PROMPT + flight.tokens)
    await landed(rest)
    assert rest.last["weight_versions"] == [{"version": "second", "start": 0, "end": 60}]
    expected = weights[1].logprobs(PROMPT + flight.tokens, rest.tokens, 0.7)
    np.testing.assert_allclose(rest.logprobs, expected, atol=CLOSE, rtol=0)
    expected = weights[0].logprobs(PROMPT, flight.tokens, 0.7)
    np.testing.assert_allclose(flight.logprobs, expected, atol=CLOSE, rtol=0)


@coroutine_test
async def test_a_paused_abort_of_a_running_request_comes_after_the_pause(server: Server) -> None:
    flight = start_flight(server, 900)
    await flight.made(5)
    await server.ok("/pause_generation", {"mode": "in_place"})
    count = await flight.settled()
    await server.ok("/abort_request", {"rid": flight.rid})
    assert await flight.settled() == count
    assert not flight.done
    await server.ok("/continue_generation")
    await landed(flight)
    assert flight.last["completion_tokens"] == len(flight.tokens) == count + 1


@coroutine_test
async def test_without_a_pause_an_update_waits_until_nothing_runs(
    server: Server, weights: tuple[Weights, Weights]
) -> None:
    flight = start_flight(server, 150)
    await flight.made(5)
    update = {"model_path": str(weights[1].path), "weight_version": "second", "flush_cache": False}
    updating = asyncio.create_task(server.ok("/update_weights_from_disk", update))
    await asyncio.sleep(0.05)
    later = start_flight(server, 5)
    await landed(flight)
    assert flight.last["weight_versions"] == [{"version": "first", "start": 0, "end": 150}]
    await updating
    await landed(later)
    assert later.last["weight_versions"] == [{"version": "second", "start": 0, "end": 5}]


@coroutine_test
async def test_a_version_can_change_without_weights(server: Server) -> None:
    flight = start_flight(server, 300)
    await flight.made(20)
    await server.ok("/pause_generation", {"mode": "in_place"})
    boundary = await flight.settled()
    await server.ok("/update_weight_version", {"new_version": "second", "abort_all_requests": False})
    await server.ok("/continue_generation")
    await flight.made(boundary + 10)
    await server.ok("/update_weight_version", {"new_version": "third"})  # trap: aborts all by default
    await landed(flight)
    assert flight.last["finish_reason"]["type"] == "abort"
    first, second, *third = flight.last["weight_versions"]
    assert [first, second["version"], second["start"]] == [
        {"version": "first", "start": 0, "end": boundary},
        "second",
        boundary,
    ]
    assert [span["version"] for span in third] in ([], ["third"])


def spans(boundary: int, end: int) -> list[Json]:
    """The versions of a request that went on under the second weights."""
    return [{"version": "first", "start": 0, "end": boundary}, {"version": "second", "start": boundary, "end": end}]


def boundary_gap(
    flight: Flight, weights: tuple[Weights, Weights], boundary: int, prompt: list[int] | None = None
) -> float:
    """After the first weights' part, which is exact, the greatest difference to a recompute under the second."""
    before, after = flight.tokens[:boundary], flight.tokens[boundary:]
    exact = weights[0].logprobs(prompt or PROMPT, before, 0.7)
    np.testing.assert_allclose(flight.logprobs[:boundary], exact, atol=CLOSE, rtol=0)
    clean = weights[1].logprobs((prompt or PROMPT) + before, after, 0.7)
    return float(np.abs(clean - flight.logprobs[boundary:]).max())


# Weights


NORM = "model.norm.weight", torch.linspace(0.5, 2.0, 64)
CHANNELS = ("tensor", "bucket", "direct", "loader", "disk", "distributed", "distributed bucket")


@pytest.mark.parametrize("channel", CHANNELS)
@coroutine_test
async def test_every_channel_makes_the_new_weights_effective(
    server: Server, weights: tuple[Weights, Weights], channel: str
) -> None:
    second, tokens = weights[1], [*PROMPT, 3, 400]
    before = await server.scores(tokens)
    np.testing.assert_allclose(before, weights[0].logprobs(tokens[:1], tokens[1:]), atol=CLOSE, rtol=0)
    if channel == "disk":
        await server.load(second, channel)
    elif channel.startswith("distributed"):
        async with session(server):
            done = await broadcast(server, second.named, channel, flat=channel.endswith("bucket"))
        assert done["message"] == f"Succeeded to update parameter online. Weight version updated to {channel}."
    else:
        async with session(server):
            done = await server.ok("/update_weights_from_tensor", by_tensor(channel, second))
        assert done == {"success": True, "message": f"Success Weight version updated to {channel}."}
    after = await server.scores(tokens)
    expected = second.logprobs(tokens[:1], tokens[1:])
    if channel == "direct":
        expected = with_norm(second.path).logprobs(tokens[:1], tokens[1:])
    np.testing.assert_allclose(after, expected, atol=CLOSE, rtol=0)
    assert np.abs(np.subtract(after, before)).max() > APART
    info = json.loads((await server.call("/model_info", key=server.key, method="GET")).text)
    assert info["weight_version"] == channel


def by_tensor(channel: str, second: Weights) -> Json:
    version = {"weight_version": channel}
    if channel == "bucket":
        return tensor_body(bucket(second.named), load_format="flattened_bucket", **version)
    if channel == "direct":
        return tensor_body([NORM], load_format="direct", **version)
    if channel == "loader":
        path = torch.tensor(list(str(second.path / "model.safetensors").encode()), dtype=torch.uint8)
        return tensor_body([("path", path)], load_format="fakes.loading.from_file", **version)
    return tensor_body(second.named, **version)


def with_norm(path: Path) -> Weights:
    """The first weights with NORM."""
    model = build(0)
    with torch.no_grad():
        dict(model.named_parameters())[NORM[0]].copy_(NORM[1])
    return Weights(path, model)


@coroutine_test
async def test_part_of_the_weights_can_be_sent_and_unknown_names_are_taken_in_silence(
    server: Server, weights: tuple[Weights, Weights], tmp_path: Path
) -> None:
    tokens = [*PROMPT, 3, 400]
    async with session(server):
        half = [pair for pair in weights[1].named if ".layers.0." in pair[0]]
        await server.ok("/update_weights_from_tensor", tensor_body(half, flush_cache=False))
        await server.ok("/update_weights_from_tensor", tensor_body(weights[1].named[:-1], flush_cache=False))
        await server.ok("/update_weights_from_tensor", tensor_body(weights[1].named[-1:]))
    expected = weights[1].logprobs(tokens[:1], tokens[1:])
    np.testing.assert_allclose(await server.scores(tokens), expected, atol=CLOSE, rtol=0)
    unknown = ("foreign.norm.weight", "model.layers.0.self_attn.zork.weight", "model.layers.9.self_attn.q_proj.weight")
    foreign = [(name, torch.ones(64, 64)) for name in unknown]
    async with session(server):
        done = await server.ok("/update_weights_from_tensor", tensor_body(foreign, weight_version="foreign"))
    assert done["success"]  # trap: nothing was loaded
    np.testing.assert_allclose(await server.scores(tokens), expected, atol=CLOSE, rtol=0)
    missing = await server.call("/update_weights_from_disk", {"model_path": str(tmp_path / "none")})
    assert (missing.status, json.loads(missing.text)["success"]) == (400, False)
    np.testing.assert_allclose(await server.scores(tokens), expected, atol=CLOSE, rtol=0)


@coroutine_test
async def test_outside_a_session_an_update_is_refused(server: Server, weights: tuple[Weights, Weights]) -> None:
    tokens = [*PROMPT, 3]
    before = await server.scores(tokens)
    body = tensor_body(weights[1].named, weight_version="never")
    distributed = {"names": [], "dtypes": [], "shapes": [], "group_name": "none"}
    for path, sent in (("/update_weights_from_tensor", body), ("/update_weights_from_distributed", distributed)):
        reply = await server.call(path, sent)
        words = f"{path[1:]} must run between begin_weight_update() and end_weight_update()"
        assert (reply.status, json.loads(reply.text)) == (400, {"success": False, "message": words})
    assert (await server.call("/end_weight_update")).status == 400
    async with session(server):
        assert (await server.call("/begin_weight_update")).status == 400
        reply = await server.call("/update_weights_from_distributed", distributed)
        assert (reply.status, "init_weights_update_group" in reply.text) == (400, True)
    assert (await server.call("/destroy_weights_update_group", {"group_name": "none"})).status == 400
    assert await server.scores(tokens) == before


# What ends a server


async def unknown_token(server: Server, weights: Weights) -> None:
    await server.call("/generate", {"input_ids": [VOCAB], "sampling_params": {"max_new_tokens": 1}}, key=server.key)


async def flush_under_running(server: Server, weights: Weights) -> None:
    flight = start_flight(server, 900)
    await flight.made(1)
    await server.ok("/pause_generation", {"mode": "in_place"})
    await server.ok("/update_weights_from_disk", {"model_path": str(weights.path)})


async def other_shape(server: Server, weights: Weights) -> None:
    await server.ok("/begin_weight_update")
    await server.call("/update_weights_from_tensor", tensor_body([("model.norm.weight", torch.zeros(3))]))


async def unknown_projection(server: Server, weights: Weights) -> None:
    await server.ok("/begin_weight_update")
    await server.call("/update_weights_from_tensor", tensor_body([("zork.q_proj.weight", torch.zeros(3))]))


async def other_checkpoint(server: Server, weights: Weights) -> None:
    folder = weights.path.with_name("narrow")
    build(0, hidden_size=32).save_pretrained(folder)
    await server.call("/update_weights_from_disk", {"model_path": str(folder)})


async def unknown_format(server: Server, weights: Weights) -> None:
    await server.ok("/begin_weight_update")
    await server.call("/update_weights_from_tensor", tensor_body(weights.named, load_format="zork"))


async def foreign_class(server: Server, weights: Weights) -> None:
    await server.ok("/begin_weight_update")
    await server.call("/update_weights_from_tensor", tensor_body([("path", Path("/"))]))


DEATHS = (
    unknown_token,
    flush_under_running,
    other_shape,
    unknown_projection,
    other_checkpoint,
    unknown_format,
    foreign_class,
)


async def deadly(deed: Callable[[Server, Weights], Awaitable[None]], server: Server, weights: Weights) -> None:
    with pytest.raises((aiohttp.ClientConnectionError, aiohttp.ClientPayloadError)):
        async with asyncio.timeout(30):
            await deed(server, weights)


def watch(servers: Servers) -> None:
    while True:
        servers.poll()
        time.sleep(0.05)


@pytest.mark.parametrize("deed", DEATHS, ids=lambda deed: deed.__name__)
@pytest.mark.parametrize("kind", ["fake", pytest.param("real", marks=pytest.mark.prove)])
def test_what_kills_a_server(
    kind: str, deed: Callable[[Server, Weights], Awaitable[None]], weights: tuple[Weights, Weights], tmp_path: Path
) -> None:
    if kind == "real" or deed is unknown_token:
        with started(kind, weights[0].path, tmp_path) as (server, servers):
            asyncio.run(deadly(deed, server, weights[1]))
            with pytest.raises(ServerError, match="was killed by SIGKILL"):
                watch(servers)
        return
    keys = ("--api-key", Server.key, "--admin-api-key", Server.admin)
    flags = ("--incremental-streaming-output", "--step-seconds", "0.002")
    with FakeServer("--model-path", str(weights[0].path), *keys, *flags) as fake:
        asyncio.run(deadly(deed, Server(kind, fake.url), weights[1]))
        assert fake.died.startswith("Traceback")
