"""The local engine's promises: order, sharing, versions, weight changes under way, determinism, refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from offtrail.core.protocols import Completion, Request
from offtrail.core.types import Sampling
from offtrail.platform.config.schema import LocalConfig
from offtrail.platform.engines import local as local_engine
from offtrail.platform.engines.local import LocalEngine

VOCAB = 31


def build(seed: int) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=64,
        vocab_size=VOCAB,
        tie_word_embeddings=True,
        initializer_range=0.3,
        max_position_embeddings=512,
    )
    return Qwen3ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Qwen3ForCausalLM, Qwen3ForCausalLM]:
    folder = tmp_path_factory.mktemp("model")
    first, second = build(0), build(1)
    first.save_pretrained(folder)
    return folder, first, second


def engine(folder: Path, *, max_running: int = 8, kv: str = "recompute", max_length: int = 160) -> LocalEngine:
    return LocalEngine(folder, LocalConfig(max_running=max_running, kv_on_update=kv), max_length=max_length, threads=1)


def run(local: LocalEngine, requests: list[Request]) -> dict[tuple[int, int], Completion]:
    local.generate(requests)
    done: dict[tuple[int, int], Completion] = {}
    while local.unfinished:
        done |= {(c.request, c.index): c for c in local.step()}
    return done


@torch.no_grad()
def logprobs_of(model: Qwen3ForCausalLM, prompt: np.ndarray, output: np.ndarray, T: float = 1.0) -> np.ndarray:
    ids = torch.from_numpy(np.concatenate((prompt, output))).long()
    table = (model(ids[None]).logits[0] / T).log_softmax(-1)
    return table[len(prompt) - 1 : -1].gather(1, ids[len(prompt) :, None])[:, 0].numpy()


def prompt(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, length).astype(np.int32)


def assert_same(a: Completion, b: Completion) -> None:
    assert a.tokens.tobytes() == b.tokens.tobytes()
    assert a.logprobs.tobytes() == b.logprobs.tobytes()
    assert a.finish == b.finish


def ragged(count: int) -> list[Request]:
    return [
        Request(i, prompt(3 + 5 * i % 17, i), 1 + i % 4, Sampling(5 + 7 * i % 30, seed=3, stop_token_ids=(2, 9)))
        for i in range(count)
    ]


def test_same_requests_in_the_same_order_give_the_same_bits(models):
    first, second = run(engine(models[0]), ragged(12)), run(engine(models[0]), ragged(12))
    assert first.keys() == second.keys() == {(r.id, i) for r in ragged(12) for i in range(r.samples)}
    for key in first:
        assert_same(first[key], second[key])


def test_a_request_draws_the_same_tokens_alone_and_among_others(models):
    together = run(engine(models[0], max_running=5), ragged(12))
    for request in ragged(12):
        alone = run(engine(models[0], max_running=64), [request])
        for key, completion in alone.items():
            assert (completion.tokens == together[key].tokens).all()
            np.testing.assert_allclose(completion.logprobs, together[key].logprobs, atol=5e-6, rtol=0)


def test_a_requests_key_and_not_its_id_makes_its_random_numbers(models):
    p, sampling = prompt(5), Sampling(40, seed=3)
    done = run(
        engine(models[0]),
        [Request(7, p, 1, sampling), Request(8, p, 1, sampling, key=7), Request(9, p, 1, sampling, key=7 + (1 << 40))],
    )
    assert done[7, 0].tokens.tolist() == done[8, 0].tokens.tolist()  # id 7 means key 7
    assert done[9, 0].tokens.tolist() != done[8, 0].tokens.tolist()


def test_stop_token_ends_a_sample_and_is_its_last(models):
    done = run(engine(models[0]), ragged(12))
    limits = {r.id: r.sampling.max_new_tokens for r in ragged(12)}
    assert {c.finish for c in done.values()} == {"stop", "length"}
    for completion in done.values():
        stops = np.flatnonzero(np.isin(completion.tokens, (2, 9)))
        if completion.finish == "stop":
            assert stops.tolist() == [len(completion.tokens) - 1]
        else:
            assert len(stops) == 0
            assert len(completion.tokens) == limits[completion.request]


def test_stop_tokens_are_each_requests_own(models):
    requests = [Request(i, prompt(6), 1, Sampling(60, seed=4, stop_token_ids=(i,))) for i in range(6)]
    for completion in run(engine(models[0]), requests).values():
        assert completion.request not in completion.tokens[:-1]


def test_the_cache_is_as_large_as_what_ran_and_not_as_what_may(models):
    local = engine(models[0], max_running=256, max_length=512)
    assert local._cache.bytes == 0
    run(local, [Request(i, prompt(10), 4, Sampling(30)) for i in range(2)])
    token = 2 * 2 * 2 * 8 * 4  # keys and values of two layers, two heads of eight numbers in float32
    assert 8 * 39 * token <= local._cache.bytes <= 1.25 * 8 * 40 * token
    before = local._cache.bytes
    run(local, [Request(i, prompt(10), 4, Sampling(30)) for i in range(2)])
    assert local._cache.bytes == before


def test_samples_wait_while_those_that_run_might_fill_the_cache(models):
    local = LocalEngine(models[0], LocalConfig(kv_cache_mb=1), max_length=512, threads=1)
    most = (1 << 20) // (500 * 2 * 2 * 2 * 8 * 4)
    requests = [Request(i, prompt(100), 5, Sampling(400)) for i in range(2)]
    local.generate(requests)
    local.step()
    assert most == 8
    assert local._slots.running == 8
    done = run(local, [])
    free = run(engine(models[0], max_length=512, max_running=16), requests)
    assert {key: c.tokens.tolist() for key, c in done.items()} == {key: c.tokens.tolist() for key, c in free.items()}
    assert local._cache.bytes <= 1 << 20


def test_short_samples_and_then_a_long_one_stay_within_the_cache(models):
    local = LocalEngine(models[0], LocalConfig(kv_cache_mb=1), max_length=512, threads=1)
    local.generate([Request(i, prompt(6, i), 1, Sampling(8)) for i in range(256)])
    local.generate([Request(256, prompt(90), 1, Sampling(400)), Request(257, prompt(6), 256, Sampling(8))])
    sizes = set()
    while local.unfinished:
        local.step()
        sizes.add((local._cache.slots, local._cache.columns))
        assert local._cache.bytes <= 1 << 20
    assert max(slots for slots, _ in sizes) > 200
    assert max(columns for _, columns in sizes) > 480


def test_a_cache_that_gives_slots_or_columns_away_gives_the_same_bits_as_one_with_room_for_all(models):
    def engine_of(megabytes: int) -> LocalEngine:
        return LocalEngine(models[0], LocalConfig(kv_cache_mb=megabytes, max_running=200), max_length=512, threads=1)

    short = [Request(i, prompt(3 + i % 6, i), 1 + i % 4, Sampling(11, stop_token_ids=(2,))) for i in range(60)]
    long = [Request(i, prompt(20 + 9 * i, i), 1 + i, Sampling(300, stop_token_ids=(i,))) for i in range(4)]
    tight, roomy = engine_of(1), engine_of(64)
    sizes = set()
    for requests in (short, long, short):
        first: dict[tuple[int, int], Completion] = {}
        second: dict[tuple[int, int], Completion] = {}
        for local, done in ((tight, first), (roomy, second)):
            local.generate(requests)
            steps = 0
            while local.unfinished:
                done |= {(c.request, c.index): c for c in local.step()}
                steps += 1
                sizes.add((local is tight, local._cache.slots * local._cache.columns))
                if steps == 9:
                    local.load_weights(1, models[2].state_dict())
                if steps == 90:
                    local.load_weights(2, models[1].state_dict())
        assert first.keys() == second.keys()
        for key, completion in first.items():
            assert_same(completion, second[key])
            assert completion.versions.tobytes() == second[key].versions.tobytes()
    most = tight._cache.most_tokens
    assert max(size for is_tight, size in sizes if is_tight) <= most < max(size for _, size in sizes)


def test_what_was_not_reserved_is_neither_read_nor_written(models):
    cache = engine(models[0])._cache
    cache.reserve(2, 8)
    kept, one = cache.copy_out(1, 8), np.array([1])
    for beyond in (
        lambda: cache.copy_in(1, 3, kept),
        lambda: cache.copy_in(2, 3, kept),
        lambda: cache.copy_out(1, 9),
        lambda: cache.move(one, one - 1, 9),
        lambda: cache.rows(one - 1, np.array([8])),
    ):
        with pytest.raises(IndexError, match="of the KV cache are used and 2 x 8 reserved"):
            beyond()


def test_sampling_in_blocks_of_rows_changes_no_bit(models, monkeypatch):
    kinds = [{"temperature": 0.7}, {"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.6}, {"alternatives": 2}, {}]
    requests = [Request(i, prompt(5 + i, i), 2, Sampling(20, **kinds[i % 6])) for i in range(9)]
    whole = run(engine(models[0], max_running=32), requests)
    monkeypatch.setattr(local_engine, "_BLOCK_LOGITS", 4 * VOCAB)
    blocks = run(engine(models[0], max_running=32), requests)
    for key, completion in whole.items():
        assert_same(completion, blocks[key])
        if completion.alternatives is not None:
            assert completion.alternatives.tokens.tobytes() == blocks[key].alternatives.tokens.tobytes()


def test_an_engine_without_work_gives_a_large_cache_back(models, monkeypatch):
    requests = [Request(i, prompt(5 + i, i), 2, Sampling(20)) for i in range(4)]
    local = engine(models[0])
    kept = run(local, requests)
    assert local._cache.bytes > 0
    monkeypatch.setattr(local_engine, "_IDLE_BYTES", 0)
    first, second = run(local, requests), run(local, requests)
    assert local._cache.bytes == 0
    for key, completion in kept.items():
        assert_same(completion, first[key])
        assert_same(completion, second[key])


def test_one_sample_runs_however_small_the_cache_may_be(models):
    local = LocalEngine(models[0], LocalConfig(kv_cache_mb=1), max_length=500, threads=1)
    local._cache.most_tokens = 1
    done = run(local, [Request(0, prompt(10), 3, Sampling(4))])
    assert [len(c.tokens) for c in done.values()] == [4, 4, 4]


def test_a_cache_that_grows_gives_the_same_bits_as_one_that_was_large(models):
    grown, large = engine(models[0], max_running=64), engine(models[0], max_running=64)
    run(large, [Request(0, prompt(4), 64, Sampling(150))])
    requests = [Request(i, prompt(3 + i, i), 1 + i % 3, Sampling(20 + 9 * i)) for i in range(12)]
    first, second = run(grown, requests), run(large, requests)
    for key in first:
        assert_same(first[key], second[key])


@pytest.mark.parametrize("temperature", [0.5, 1.7])
def test_logprobs_are_taken_at_the_sampling_temperature(models, temperature):
    """The bound is that of T = 1 over T: both sides divide logits by T, and so the rounding errors that these have."""
    p, atol = prompt(9), 5e-6 / temperature
    completion = run(engine(models[0]), [Request(0, p, 1, Sampling(30, temperature=temperature))])[0, 0]
    expected = logprobs_of(models[1], p, completion.tokens, temperature)
    np.testing.assert_allclose(completion.logprobs, expected, atol=atol, rtol=0)
    scored = engine(models[0]).logprobs([p], [completion.tokens], temperature)[0]
    np.testing.assert_allclose(scored, expected, atol=atol, rtol=0)


def test_greedy_takes_the_likeliest_and_keeps_unscaled_logprobs_beside_others(models):
    p = prompt(9)
    requests = [Request(0, p, 1, Sampling(20, temperature=0.0)), Request(1, p, 2, Sampling(20, temperature=0.6))]
    done = run(engine(models[0]), requests)
    greedy = done[0, 0]
    with torch.no_grad():
        ids = torch.from_numpy(np.concatenate((p, greedy.tokens))).long()
        best = models[1](ids[None]).logits[0].argmax(-1)[len(p) - 1 : -1]
    assert greedy.tokens.tolist() == best.tolist()
    np.testing.assert_allclose(greedy.logprobs, logprobs_of(models[1], p, greedy.tokens), atol=5e-6, rtol=0)


def test_top_k_one_is_greedy_and_top_p_leaves_logprobs_unnormalised(models):
    p = prompt(9)
    greedy = run(engine(models[0]), [Request(0, p, 1, Sampling(20, temperature=0.0))])[0, 0]
    requests = [Request(0, p, 1, Sampling(20, top_k=1)), Request(1, p, 2, Sampling(20, top_p=0.6))]
    done = run(engine(models[0]), requests)
    assert (done[0, 0].tokens == greedy.tokens).all()
    np.testing.assert_allclose(done[1, 1].logprobs, logprobs_of(models[1], p, done[1, 1].tokens), atol=5e-6, rtol=0)


def test_samples_enter_in_order_and_a_slow_one_holds_up_nobody(models):
    local = engine(models[0], max_running=2)
    local.generate([Request(0, prompt(4), 1, Sampling(40))])
    local.generate([Request(i, prompt(4, i), 1, Sampling(3)) for i in (1, 2, 3)])
    order = [c.request for _ in range(40) for c in local.step()]
    assert order == [1, 2, 3, 0]
    assert local.unfinished == 0


def test_a_group_enters_in_parts_and_its_prompt_is_prefilled_once(models):
    p = prompt(11)
    local = engine(models[0], max_running=3)
    parts = run(local, [Request(0, p, 8, Sampling(10, seed=1))])
    assert local.counters["prefilled_tokens"] == 10
    assert local.counters["prefix_hit_tokens"] == 7 * 10
    assert local.counters["decoded_tokens"] == 80
    whole = run(engine(models[0], max_running=8), [Request(0, p, 8, Sampling(10, seed=1))])
    for key in whole:
        assert (whole[key].tokens == parts[key].tokens).all()
        np.testing.assert_allclose(parts[key].logprobs, logprobs_of(models[1], p, parts[key].tokens), atol=5e-6, rtol=0)


def test_flops_are_two_a_weight_and_four_a_head_value_of_each_position(models):
    local = engine(models[0])
    run(local, [Request(0, prompt(5), 1, Sampling(2))])
    parameters = sum(parameter.numel() for parameter in models[1].parameters())
    body = parameters - VOCAB * 32  # the tied table is counted at the output only
    attention = 4 * 2 * 4 * 8  # 4 · layers · heads · head size
    prefill, decode = 4 * 2 * body, 2 * 2 * parameters
    assert local.counters["flops"] == prefill + decode + attention * ((1 + 2 + 3 + 4) + (5 + 6))


def test_weights_change_between_steps_and_nothing_is_dropped(models):
    folder, first, second = models
    local = engine(folder, max_running=4)
    p = [prompt(7, i) for i in range(3)]
    local.generate([Request(i, p[i], 3, Sampling(12 + i, seed=2)) for i in range(3)])
    done = [c for _ in range(5) for c in local.step()]
    local.load_weights(6, second.state_dict())
    while local.unfinished:
        done += local.step()
    assert len(done) == 9
    # request 0 runs whole, 3 samples that share 6 prompt tokens and have 5 of their own; request 1 has one running
    assert local.counters["reprefilled_tokens"] == (6 + 3 * 5) + (6 + 5)
    spans = 0
    for c in done:
        old = int((c.versions == 0).sum())
        assert c.versions.tolist() == [0] * old + [6] * (len(c.tokens) - old)
        spans += 0 < old < len(c.tokens)
        by_old, by_new = (logprobs_of(model, p[c.request], c.tokens) for model in (first, second))
        np.testing.assert_allclose(c.logprobs[:old], by_old[:old], atol=5e-6, rtol=0)
        np.testing.assert_allclose(c.logprobs[old:], by_new[old:], atol=5e-6, rtol=0)
    assert spans == 4


def test_recompute_in_many_passes_up_to_full_length(models, monkeypatch):
    """Padding of a short sample reaches past the last column when a long one shares its pass."""
    folder, first, second = models
    local = engine(folder, max_running=16, max_length=60)
    monkeypatch.setattr(local, "_pass_tokens", 150)
    requests = [Request(i, prompt(n, i), 4, Sampling(60 - n, seed=1)) for i, n in enumerate((1, 20, 50))]
    late = Request(9, prompt(55, 9), 4, Sampling(5, seed=1))
    local.generate([*requests, late])
    done, both = [], (first, second)
    for step in range(1, 100):
        done += local.step()
        if step in (8, 9, 30):
            local.load_weights(step, both[step % 2].state_dict())
    assert len(done) == 16
    model_of = {0: first, 8: first, 9: second, 30: first}
    for c in done:
        p = late.prompt_tokens if c.request == 9 else requests[c.request].prompt_tokens
        for version in set(c.versions.tolist()):
            at = c.versions == version
            expected = logprobs_of(model_of[version], p, c.tokens)
            np.testing.assert_allclose(c.logprobs[at], expected[at], atol=5e-6, rtol=0)


def test_kept_cache_differs_from_a_clean_forward_but_new_samples_do_not(models):
    folder, _, second = models
    local = engine(folder, max_running=2, kv="keep")
    p = prompt(9)
    local.generate([Request(0, p, 3, Sampling(12, seed=2))])
    for _ in range(4):
        local.step()
    local.load_weights(1, second.state_dict())
    done = {}
    while local.unfinished:
        done |= {c.index: c for c in local.step()}
    assert local.counters["reprefilled_tokens"] == 0
    difference = np.abs(done[0].logprobs - logprobs_of(second, p, done[0].tokens))[4:]
    assert difference.max() > 1e-3
    np.testing.assert_allclose(done[2].logprobs, logprobs_of(second, p, done[2].tokens), atol=5e-6, rtol=0)


@pytest.mark.parametrize("kv", ["recompute", "keep"])
def test_the_same_weights_again_change_nothing(models, kv):
    plain = run(engine(models[0]), ragged(6))
    local = engine(models[0], kv=kv)
    local.generate(ragged(6))
    done = {}
    while local.unfinished:
        local.load_weights(0, models[1].state_dict())
        done |= {(c.request, c.index): c for c in local.step()}
    for key in plain:
        assert (done[key].tokens == plain[key].tokens).all()
        np.testing.assert_allclose(done[key].logprobs, plain[key].logprobs, atol=5e-6, rtol=0)


def test_loaded_weights_are_copied(models):
    local = engine(models[0])
    p, output = prompt(5), prompt(6, 1)
    weights = {name: tensor.clone() for name, tensor in models[2].state_dict().items()}
    local.load_weights(1, weights)
    before = local.logprobs([p], [output], 1.0)[0]
    for tensor in weights.values():
        tensor.zero_()
    assert (local.logprobs([p], [output], 1.0)[0] == before).all()
    np.testing.assert_allclose(before, logprobs_of(models[2], p, output), atol=5e-6, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.norm.weight"), r"missing \['model\.norm\.weight'\]"),
        (lambda w: w.update({"extra.weight": torch.zeros(1)}), r"unknown \['extra\.weight'\]"),
        (lambda w: w.update({"model.norm.weight": torch.zeros(3)}), r"model\.norm\.weight is \(3,\), not \(32,\)"),
    ],
)
def test_weights_that_do_not_fit_change_nothing(models, change, message):
    local = engine(models[0])
    p, output = prompt(5), prompt(6, 1)
    before = local.logprobs([p], [output], 1.0)[0]
    weights = dict(models[2].state_dict())
    change(weights)
    with pytest.raises(ValueError, match=message):
        local.load_weights(9, weights)
    assert local.version == 0
    assert (local.logprobs([p], [output], 1.0)[0] == before).all()


def test_weights_that_are_not_finite_are_reported(models):
    local = engine(models[0])
    weights = {name: torch.full_like(tensor, torch.nan) for name, tensor in models[1].state_dict().items()}
    local.load_weights(4, weights)
    local.generate([Request(0, prompt(4), 2, Sampling(5))])
    with pytest.raises(FloatingPointError, match="version 4"):
        local.step()


def test_pause_keeps_samples_and_resume_goes_on(models):
    plain = run(engine(models[0]), ragged(4))
    local = engine(models[0])
    local.generate(ragged(4))
    done = {(c.request, c.index): c for _ in range(2) for c in local.step()}
    left = local.unfinished
    local.pause()
    assert local.step() == []
    assert local.unfinished == left
    local.resume()
    while local.unfinished:
        done |= {(c.request, c.index): c for c in local.step()}
    for key in plain:
        assert_same(done[key], plain[key])


def test_abort_returns_everything_once_and_leaves_the_engine_usable(models):
    plain = run(engine(models[0], max_running=4), ragged(6))
    local = engine(models[0], max_running=4)
    local.generate(ragged(6))
    done = [c for _ in range(4) for c in local.step()]
    partial = local.abort()
    assert local.unfinished == 0
    assert sorted((c.request, c.index) for c in done + partial) == sorted(plain)
    assert {c.finish for c in partial} == {"abort"}
    for c in partial:
        assert (c.tokens == plain[c.request, c.index].tokens[: len(c.tokens)]).all()
        assert len(c.tokens) == len(c.logprobs) == len(c.versions)
    assert any(len(c.tokens) == 0 for c in partial)
    again = run(local, ragged(6))
    for key in plain:
        assert_same(again[key], plain[key])


def test_cancel_drops_running_and_queued_samples_and_leaves_the_others_as_they_are(models):
    """Request 0 runs, 1 runs in part, 2 waits whole; the second step lets request 3 into the freed slots."""
    requests = [Request(i, prompt(5, i), 3, Sampling(20 + i, seed=2)) for i in range(4)]
    plain = run(engine(models[0], max_running=5), requests)
    local = engine(models[0], max_running=5)
    local.generate(requests)
    local.step()
    assert local.unfinished == 12
    local.cancel([1, 2, 77])
    assert local.unfinished == 6
    assert local.step() == []
    assert local._slots.running == 5
    done = {}
    while local.unfinished:
        done |= {(c.request, c.index): c for c in local.step()}
    assert sorted(done) == [(i, j) for i in (0, 3) for j in range(3)]
    for key, completion in done.items():
        assert completion.tokens.tolist() == plain[key].tokens.tolist()
        np.testing.assert_allclose(completion.logprobs, plain[key].logprobs, atol=5e-6, rtol=0)


def test_cancel_of_the_request_whose_prompt_is_kept_forgets_that_prompt(models):
    """Request 0 has entered in part when it is cancelled; request 1 then enters, with its own prompt."""
    local = engine(models[0], max_running=2)
    first, second = Request(0, prompt(9), 4, Sampling(10)), Request(1, prompt(9, 1), 2, Sampling(10))
    local.generate([first, second])
    local.step()
    local.cancel([0])
    done = {}
    while local.unfinished:
        done |= {c.index: c for c in local.step()}
    for c in done.values():
        expected = logprobs_of(models[1], second.prompt_tokens, c.tokens)
        np.testing.assert_allclose(c.logprobs, expected, atol=5e-6, rtol=0)
    assert local.counters["prefilled_tokens"] == 8 + 8


def test_cancel_between_an_update_and_the_next_step_and_under_a_pause(models):
    folder, first, second = models
    local = engine(folder, max_running=4)
    p = [prompt(7, i) for i in range(2)]
    local.generate([Request(i, p[i], 2, Sampling(12)) for i in range(2)])
    for _ in range(3):
        local.step()
    local.pause()
    local.load_weights(4, second.state_dict())
    local.cancel([0])
    local.generate([Request(0, p[0], 1, Sampling(5))])  # the id is free again
    local.resume()
    done = {}
    while local.unfinished:
        done |= {(c.request, c.index): c for c in local.step()}
    assert sorted(done) == [(0, 0), (1, 0), (1, 1)]
    assert local.counters["reprefilled_tokens"] == 6 + 2 * 3  # of request 1: its prompt once, then its own tokens
    assert set(done[0, 0].versions.tolist()) == {4}
    for (request, _), c in done.items():
        old = c.versions == 0
        np.testing.assert_allclose(c.logprobs[old], logprobs_of(first, p[request], c.tokens)[old], atol=5e-6, rtol=0)
        np.testing.assert_allclose(c.logprobs[~old], logprobs_of(second, p[request], c.tokens)[~old], atol=5e-6, rtol=0)


@pytest.mark.parametrize("temperature", [0.0, 0.6])
def test_alternatives_are_the_likeliest_tokens_at_the_sampling_temperature(models, temperature):
    """Beside samples that ask for more, for fewer and for none, in rows that move as others finish."""
    p = prompt(9)
    ask = Sampling(12, temperature=temperature, top_k=4, alternatives=3)
    requests = [
        Request(0, p, 2, Sampling(5, alternatives=7)), Request(1, p, 1, Sampling(3)), Request(2, p, 2, ask),
    ]  # fmt: skip
    done = run(engine(models[0]), requests)
    assert done[1, 0].alternatives is None
    for request, index, k in ((0, 0, 7), (0, 1, 7), (2, 0, 3), (2, 1, 3)):
        c = done[request, index]
        with torch.no_grad():
            logits = models[1](torch.from_numpy(np.concatenate((p, c.tokens))).long()[None]).logits[0]
        scaled = (logits / ((temperature or 1.0) if request == 2 else 1.0)).log_softmax(-1)[len(p) - 1 : -1]
        likeliest = scaled.sort(-1, descending=True)
        assert c.alternatives.tokens.dtype == np.int32
        assert c.alternatives.tokens.tolist() == likeliest.indices[:, :k].tolist()
        assert c.alternatives.logprobs.dtype == np.float32
        np.testing.assert_allclose(c.alternatives.logprobs, likeliest.values[:, :k], atol=2e-5, rtol=0)
        drawn = c.alternatives.tokens == c.tokens[:, None]
        assert (c.alternatives.logprobs[drawn] == c.logprobs[drawn.any(1)]).all()


def test_an_aborted_sample_has_the_alternatives_of_its_tokens(models):
    local = engine(models[0], max_running=1)
    local.generate([Request(0, prompt(4), 2, Sampling(9, alternatives=2))])
    local.step()
    begun, queued = local.abort()
    assert begun.alternatives.tokens.shape == begun.alternatives.logprobs.shape == (1, 2)
    assert queued.alternatives.tokens.shape == queued.alternatives.logprobs.shape == (0, 2)


def test_times_are_in_order(models):
    done = run(engine(models[0], max_running=2), ragged(4))
    assert all(c.times[0] <= c.times[1] <= c.times[2] for c in done.values())


def test_score_takes_many_and_empty_outputs(models):
    prompts, outputs = [prompt(i + 1, i) for i in range(9)], [prompt(2 * i, 90 + i) for i in range(9)]
    scores = engine(models[0]).logprobs(prompts, outputs, 1.0)
    assert [len(s) for s in scores] == [2 * i for i in range(9)]
    for p, o, s in zip(prompts[1:], outputs[1:], scores[1:], strict=True):
        np.testing.assert_allclose(s, logprobs_of(models[1], p, o), atol=5e-6, rtol=0)


def test_long_samples_cross_the_blocks_of_uniforms(models):
    p = prompt(3)
    long = run(engine(models[0]), [Request(0, p, 3, Sampling(150, seed=8))])
    short = run(engine(models[0]), [Request(0, p, 3, Sampling(100, seed=8))])
    for key in short:
        assert (short[key].tokens == long[key].tokens[:100]).all()
    assert (long[0, 0].tokens[:64] != long[0, 0].tokens[64:128]).any()


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (
            Request(3, prompt(100), 1, Sampling(61)),
            r"request 3: 100 prompt tokens and 61 new ones are 161.*max_length=160",
        ),
        (Request(3, np.array([4, VOCAB], np.int32), 1, Sampling(5)), r"token ids 4…31, but the vocabulary is 31"),
        (Request(3, np.array([-1], np.int32), 1, Sampling(5)), r"token ids -1…-1"),
        (Request(3, np.zeros(0, np.int32), 1, Sampling(5)), r"prompt is empty"),
        (Request(3, prompt(3), 0, Sampling(5)), r"samples=0"),
        (Request(3, prompt(3), 1, Sampling(0)), r"max_new_tokens=0"),
        (Request(3, prompt(3), 1, Sampling(5, temperature=-1.0)), r"temperature=-1\.0"),
        (Request(3, prompt(3), 1, Sampling(5, top_p=0.0)), r"top_p=0\.0"),
        (Request(3, prompt(3), 1, Sampling(5, top_k=-1)), r"top_k=-1"),
        (Request(3, prompt(3), 1, Sampling(5, stop_token_ids=(VOCAB,))), r"stop_token_ids=\(31,\)"),
        (Request(3, prompt(3), 1, Sampling(5, alternatives=VOCAB + 1)), r"alternatives=32; 0 ≤ alternatives ≤ 31"),
    ],
)
def test_requests_that_cannot_be_served_are_refused_whole(models, request_, message):
    local = engine(models[0])
    with pytest.raises(ValueError, match=message):
        local.generate([Request(0, prompt(3), 1, Sampling(5)), request_])
    assert local.unfinished == 0
