"""The engine's own forward against transformers', on random weights of every supported family; what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from offtrail.core.protocols import Request
from offtrail.core.types import Sampling
from offtrail.platform.config.schema import LocalConfig
from offtrail.platform.engines.cache import KVCache
from offtrail.platform.engines.decoder import Decoder
from offtrail.platform.engines.local import LocalEngine
from offtrail.platform.engines.spec import read_spec

SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "intermediate_size": 80,
    "vocab_size": 61,
    "max_position_embeddings": 256,
    "initializer_range": 0.08,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS: dict[str, tuple[type[PreTrainedModel], Any]] = {
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True)),
    "qwen3-untied-bias": (
        Qwen3ForCausalLM,
        Qwen3Config(**SIZES, num_key_value_heads=6, head_dim=8, tie_word_embeddings=False, attention_bias=True),
    ),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES, num_key_value_heads=3, tie_word_embeddings=True)),
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES, num_key_value_heads=1, tie_word_embeddings=False)),
    "llama-scaled-bias": (
        LlamaForCausalLM,
        LlamaConfig(**SIZES, num_key_value_heads=2, attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3),
    ),
}


def make(name: str, folder: Path) -> PreTrainedModel:
    torch.manual_seed(0)
    kind, config = MODELS[name]
    model = kind(config).eval()
    for key, parameter in model.named_parameters():  # norms and biases start at 1 and 0, which would hide mistakes
        if key.endswith(("norm.weight", "bias")):
            torch.nn.init.normal_(parameter, float("norm" in key), 0.3)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def reference(model: PreTrainedModel, prompt: np.ndarray, output: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    ids = torch.from_numpy(np.concatenate((prompt, output))).long()
    logprobs = (model(ids[None]).logits[0].float() / temperature).log_softmax(-1)
    return logprobs[len(prompt) - 1 : -1].gather(1, ids[len(prompt) :, None])[:, 0].numpy()


@pytest.mark.parametrize("name", MODELS)
def test_generated_and_scored_logprobs_equal_transformers(name, tmp_path):
    model = make(name, tmp_path)
    engine = LocalEngine(tmp_path, LocalConfig(max_running=5), max_length=96, threads=1)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 61, length).astype(np.int32) for length in (1, 3, 17, 50)]
    engine.generate([Request(i, p, 2, Sampling(40, seed=1)) for i, p in enumerate(prompts)])
    completions = []
    while engine.unfinished:
        completions += engine.step()
    assert len(completions) == 8
    scores = engine.logprobs([prompts[c.request] for c in completions], [c.tokens for c in completions], 1.0)
    for completion, score in zip(completions, scores, strict=True):
        expected = reference(model, prompts[completion.request], completion.tokens)
        np.testing.assert_allclose(completion.logprobs, expected, atol=2e-6, rtol=0)
        np.testing.assert_allclose(score, expected, atol=2e-6, rtol=0)


def test_bfloat16_stays_near_float32(tmp_path):
    model = make("qwen3", tmp_path)
    engine = LocalEngine(tmp_path, LocalConfig(max_running=4, dtype="bfloat16"), max_length=64, threads=1)
    prompt = np.arange(20, dtype=np.int32)
    engine.generate([Request(0, prompt, 4, Sampling(30, seed=1))])
    while not (completions := engine.step()):
        pass
    exact = model.to(torch.bfloat16)
    for completion in completions:
        ours, theirs = completion.logprobs, reference(exact, prompt, completion.tokens)
        full = reference(model.to(torch.float32), prompt, completion.tokens)
        model.to(torch.bfloat16)
        assert np.abs(ours - full).mean() < 2 * np.abs(theirs - full).mean() + 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["qwen3", "llama"])
def test_a_row_is_normed_as_torch_does_it_whatever_stands_beside_it(name: str, dtype: torch.dtype, tmp_path: Path):
    make(name, tmp_path)
    decoder = Decoder(read_spec(tmp_path), 64, dtype, torch.device("cpu"))
    x, weight = torch.randn(37, 48).to(dtype), torch.rand(48).to(dtype)
    normed = decoder._norm(x, weight)
    wanted = torch.nn.functional.rms_norm(x, (48,), weight, decoder.spec.norm_eps)
    torch.testing.assert_close(normed, wanted, atol=0, rtol=2**-21 if dtype == torch.float32 else 0)
    assert all(
        torch.equal(decoder._norm(row, weight), one) for row, one in zip(x.split(1), normed.split(1), strict=True)
    )
    heads = torch.rand(6, 8).to(dtype)  # one weight a head
    apart = torch.stack([decoder._norm(x[:, 8 * i : 8 * i + 8], heads[i]) for i in range(6)], 1)
    together = decoder._norm(x.view(37, 6, 8), heads)
    torch.testing.assert_close(together, apart, atol=0, rtol=2**-21 if dtype == torch.float32 else 2**-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_weight_is_left_on_the_columns_after_a_token(dtype: torch.dtype, tmp_path: Path):
    make("llama", tmp_path)
    cache = KVCache(read_spec(tmp_path), 4, 4096, 64, dtype, torch.device("cpu"))
    cache.reserve(4, 4096)
    positions = np.array([0, 300, 301, 4095])
    bias = cache.bias(positions, 4096)
    weights = torch.softmax(bias + 50 * torch.randn(4, 4096).to(dtype), -1)
    for row, last in zip(weights, positions, strict=True):
        assert not row[last + 1 :].any()
        assert row.sum().item() == pytest.approx(1, abs=1e-2)
    assert not any(row[: last + 1].any() for row, last in zip(bias, positions, strict=True))


def test_keys_and_values_stand_where_attention_reads_them(tmp_path: Path):
    make("qwen3", tmp_path)
    cache = KVCache(read_spec(tmp_path), 4, 64, 64, torch.float32, torch.device("cpu"))
    cache.reserve(4, 64)
    slots, columns = np.array([2, 0, 2]), np.array([5, 63, 0])
    kv = torch.randn(3, 4, 16)
    cache.put(1, cache.rows(slots, columns), kv)
    for slot, column, one in zip(slots, columns, kv, strict=True):
        assert torch.equal(cache.layers[1][:, slot, :, column].flatten(0, 1), one)
    assert cache.layers[1].count_nonzero() == kv.numel()
    assert not cache.layers[0].any()


def test_shards_are_read_through_their_index(tmp_path):
    model = make("llama", tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    prompt, output = np.arange(5, dtype=np.int32), np.arange(7, dtype=np.int32)
    scores = [
        LocalEngine(tmp_path / part, LocalConfig(max_running=1), max_length=32, threads=1).logprobs(
            [prompt], [output], 1.0
        )
        for part in ("one", "many")
    ]
    assert (scores[0][0] == scores[1][0]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, r"model_type=mamba is not supported.*llama, qwen2, qwen3"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, r"rope_type=yarn"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, r"rope_type=linear"),
        ({"hidden_act": "gelu"}, r"hidden_act=gelu"),
        ({"use_sliding_window": True}, r"sliding-window"),
        ({"num_key_value_heads": 4}, r"6 heads, 4 key/value heads"),
    ],
)
def test_what_the_forward_does_not_cover_is_refused_in_one_line(change, message, tmp_path):
    make("qwen3", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message) as error:
        read_spec(tmp_path)
    assert "\n" not in str(error.value)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        LocalEngine(tmp_path, LocalConfig(), max_length=32, threads=1)
    make("qwen3", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no model\.safetensors"):
        LocalEngine(tmp_path, LocalConfig(max_running=1), max_length=32, threads=1)
    with pytest.raises(ValueError, match=r"max_length=300 is above the model's 256"):
        LocalEngine(tmp_path, LocalConfig(max_running=1), max_length=300, threads=1)


def test_an_older_config_with_rope_theta_at_the_top_reads_the_same(tmp_path):
    make("qwen2", tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    new = read_spec(tmp_path)
    path.write_text(json.dumps(config | {"rope_scaling": None}))
    assert read_spec(tmp_path) == new
