"""At load the learner's numbers are compared with the model's own forward: equal, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from offtrail.algos.config import PpoConfig
from offtrail.platform.config.schema import Config
from offtrail.platform.engines.spec import read_spec
from offtrail.platform.learner.make import make_critic, make_policy, make_sft_trainer
from offtrail.platform.learner.objectives import rows_of_pairs
from offtrail.platform.learner.role import layer_classes
from offtrail.platform.learner.world import World
from offtrail.platform.model import attention
from offtrail.platform.model.check import ModelError, checked
from offtrail.platform.model.packing import SampleTable, lay_out
from offtrail.platform.model.policy import Policy, load_model
from offtrail.platform.model.scalar import Reads, ScalarModel, load_scalar
from offtrail.platform.runtime.activity import Activity

SIZES: dict[str, Any] = {
    "vocab_size": 53, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None,
    "initializer_range": 0.2, "max_position_embeddings": 64,
}  # fmt: skip
MULTIPLIED = {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.1}
RIGHT: dict[str, dict[str, Any]] = {
    "llama": {}, "qwen2": {}, "qwen3": {}, "mistral": {"pad_token_id": None}, "phi3": {}, "olmo2": {}, "smollm3": {},
    "gemma3_text": {}, "qwen3_moe": {}, "olmoe": {},
    "granite": {"logits_scaling": 8.0, **MULTIPLIED},
    "granitemoe": {"logits_scaling": 6.0},
    "cohere": {"logit_scale": 0.06},
    "hyperclovax": {"logits_scaling": 0.3},
    "gemma2": {"final_logit_softcapping": 3.0, "attn_logit_softcapping": None},
    "nanochat": {"final_logit_softcapping": 3.0},
}  # fmt: skip
ALONE = World(0, 1, torch.device("cpu"))


def made(kind: str, **settings: Any) -> Any:
    """Random weights, norms and biases away from 1 and 0, as load_model gives a model."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**{**SIZES, **settings})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.set_attn_implementation(attention.NAME)
    return model.eval()


def ragged() -> SampleTable:
    """Other tokens than those of the comparison, at temperature 0.7."""
    rng = np.random.default_rng(7)
    lengths = np.array([1, 20, 9, 4])
    return SampleTable(
        prompts=tuple(rng.integers(2, 53, n).astype(np.int32) for n in (3, 11)),
        group_of=np.repeat(np.arange(2), 2),
        starts=np.concatenate([[0], np.cumsum(lengths)]),
        tokens=rng.integers(2, 53, lengths.sum()).astype(np.int32),
        temperatures=np.full(2, 0.7, np.float32),
        ids=np.arange(2),
    )


def own_logprobs(model: Any, rows: SampleTable) -> torch.Tensor:
    """By transformers alone, a sample at a time."""
    model.set_attn_implementation("eager")
    out = []
    for i in range(rows.size):
        prompt, answer = rows.prompts[rows.group_of[i]], rows.tokens[rows.starts[i] : rows.starts[i + 1]]
        ids = torch.from_numpy(np.concatenate([prompt, answer]).astype(np.int64))
        logits = model(input_ids=ids[None, :-1], use_cache=False).logits[0, len(prompt) - 1 :]
        logits = logits / float(rows.temperatures[rows.group_of[i]])
        out.append(torch.log_softmax(logits, -1).gather(1, ids[len(prompt) :, None])[:, 0])
    return torch.cat(out)


def policy_of(model: Any, longest: int = 64) -> Policy:
    return checked(lambda: Policy(model), model, what="model.path=m", longest=longest)


@pytest.mark.parametrize("kind", RIGHT)
def test_log_probabilities_and_gradients_are_the_models_own(kind: str) -> None:
    rows, plain = ragged(), made(kind, **RIGHT[kind])
    policy = policy_of(made(kind, **RIGHT[kind]))
    weights = torch.randn(len(rows.tokens), generator=torch.Generator().manual_seed(1))
    logprobs, _ = policy(lay_out(rows, range(rows.size)))
    expected = own_logprobs(plain, rows)
    assert (logprobs - expected).abs().max() < 2e-5
    (logprobs * weights).sum().backward()
    (expected * weights).sum().backward()
    for (name, mine), theirs in zip(policy.model.named_parameters(), plain.parameters(), strict=True):
        if theirs.grad is not None:
            assert (mine.grad - theirs.grad).abs().max() < 1e-4 * theirs.grad.abs().max().clamp_min(1e-2), name


@pytest.mark.parametrize("kind", ["granite", "gemma2"])
def test_the_loss_of_sft_is_that_of_the_models_own_forward(kind: str) -> None:
    rng = np.random.default_rng(3)
    prompts, answers = ([rng.integers(2, 53, n).astype(np.int32) for n in (5, 8)] for _ in range(2))
    rows, plain = rows_of_pairs(prompts, answers), made(kind, **RIGHT[kind])
    trainer = make_sft_trainer(Config(job="sft"), ALONE, made(kind, **RIGHT[kind]), Activity())
    with torch.no_grad():
        expected = -float(own_logprobs(plain, rows).mean())
    assert trainer.step(0, rows).metrics["loss/sft"] == pytest.approx(expected, abs=1e-5)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a cap inside the attention": (
        "gemma2", {}, r"the learner cannot compute Gemma2ForCausalLM: this model's attention uses softcap"
    ),
    "sinks in the attention": (
        "gpt_oss", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        r"the learner cannot compute GptOssForCausalLM: this model's attention uses s_aux",
    ),
    "values of another size": (
        "deepseek_v3",
        {"head_dim": 4, "num_key_value_heads": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 6},
        r"values have 6 numbers a head and its queries 8",
    ),
    "a state that runs on": ("mamba", {}, r"MambaForCausalLM lets samples that are packed into one sequence see each"),
    "an attention of its own": ("bloom", {"head_dim": None}, r"BloomForCausalLM lets samples that are packed into"),
    "a window": ("mistral", {"sliding_window": 32}, r"attends within 32 tokens, .* set model\.max_length ≤ 32"),
    "a window of some layers": (
        "gemma3_text", {"sliding_window": 32, "layer_types": ["full_attention", "sliding_attention"]},
        r"attends within 32 tokens, .* set model\.max_length ≤ 32",
    ),
    "chunks": (
        "llama4_text", {"attention_chunk_size": 32, "layer_types": ["chunked_attention"] * 2},
        r"within chunks of 32 tokens \(attention_chunk_size\), .* set model\.max_length ≤ 32",
    ),
    "positions that follow the longest": (
        "phi3",
        {"original_max_position_embeddings": 32, "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
            "original_max_position_embeddings": 32,
        }},
        r"its positions \(rope_type=longrope\) change .* beyond 32 tokens; set model\.max_length ≤ 32",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_learner_would_compute_otherwise_is_refused(name: str) -> None:
    kind, settings, words = REFUSED[name]
    with pytest.raises(ModelError, match=rf"^model\.path=m: .*{words}"):
        policy_of(made(kind, **settings))


@pytest.mark.parametrize("name", ["a window", "positions that follow the longest"])
def test_what_only_long_samples_would_show_is_right_below(name: str) -> None:
    kind, settings, _ = REFUSED[name]
    policy_of(made(kind, **settings), longest=32)


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"logits_scaling": 2.0}, r"head; its config\.json has logits_scaling=2\.0; take"), ({}, r"and its head; take a")],
)
def test_a_forward_that_does_more_is_refused_with_the_key(settings: dict[str, Any], words: str) -> None:
    model = made("llama", **settings)
    plain: Callable[..., Any] = model.forward

    def forward(**kwargs: Any) -> Any:
        out = plain(**kwargs)
        out.logits = out.logits.square()
        return out

    model.forward = forward
    with pytest.raises(ModelError, match=rf"numbers are not those of LlamaForCausalLM's own forward, .*{words}"):
        policy_of(model)


def test_weights_that_are_not_finite_are_damaged() -> None:
    model = made("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(
        ModelError, match=r"LlamaForCausalLM gives numbers that are not finite; its weights are damaged"
    ):
        policy_of(model)


def test_dropout_has_no_part_in_training(tmp_path: Path) -> None:
    made("qwen3", attention_dropout=0.5).save_pretrained(tmp_path)
    policy, rows = make_policy(Config(), load_model(tmp_path)), ragged()
    assert not any(module.training for module in policy.model.modules())
    logprobs, _ = policy(lay_out(rows, range(rows.size)))
    assert (logprobs - own_logprobs(made("qwen3"), rows)).abs().max() < 2e-5


def test_a_random_forward_is_found() -> None:
    """A model that was put into training mode."""
    with pytest.raises(ModelError, match="numbers are not those of Qwen3ForCausalLM's own forward"):
        policy_of(made("qwen3", attention_dropout=0.5).train())


@pytest.mark.parametrize("reads", ["before", "after", "end"])
def test_a_scalar_model_is_compared_too_and_its_head_stays(reads: Reads, tmp_path: Path) -> None:
    made("qwen3", pad_token_id=None if reads == "before" else 0).save_pretrained(tmp_path)
    model = load_scalar(tmp_path, reads)
    head = model.score.weight.clone()

    def build() -> ScalarModel:
        return ScalarModel(model, reads)

    def otherwise(module: torch.nn.Module, inputs: Any, out: torch.Tensor) -> torch.Tensor:
        return out * (2 if model.config._attn_implementation == "eager" else 1)

    checked(build, model, what="algo.critic.path=m", longest=64, feed_last=reads != "before")
    assert torch.equal(model.score.weight, head)
    model = load_scalar(tmp_path, reads)
    model.base_model.norm.register_forward_hook(otherwise)
    with pytest.raises(ModelError, match=r"^algo\.critic\.path=m: the learner's numbers are not those of Qwen3"):
        checked(build, model, what="algo.critic.path=m", longest=64, feed_last=reads != "before")
    assert torch.equal(model.score.weight, head)


def test_a_critic_of_an_architecture_without_a_classifier_is_refused(tmp_path: Path) -> None:
    made("granite").save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"transformers has no SequenceClassification for granite; a .*algo\.critic\.path"
    ):
        make_critic(Config(), PpoConfig(), ALONE, tmp_path, vocabulary=53)


def test_an_architecture_that_comes_with_code_is_refused_in_one_line(tmp_path: Path) -> None:
    made("llama").save_pretrained(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    code = {"model_type": "minicpm", "auto_map": {"AutoConfig": "configuration_minicpm.MiniCPMConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(described | code))
    with pytest.raises(
        ValueError, match=r"model_type=minicpm is none of transformers .*'s own, and code that comes"
    ) as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value)


def test_layers_under_another_name_are_refused() -> None:
    with pytest.raises(ModelError, match=r"^model\.path=.*GPT2LMHeadModel has no list of layers under this name"):
        layer_classes(made("gpt2", head_dim=None))


def test_the_local_engine_takes_no_other_architecture(tmp_path: Path) -> None:
    made("granite").config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model_type=granite is not supported by the local engine"):
        read_spec(tmp_path)
