"""Packed, fused, chunked: the same numbers as transformers' own model on one sample at a time."""

from __future__ import annotations

import contextlib
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from offtrail.platform.model import fused, lean, liger
from offtrail.platform.model.head import TokenOutputs
from offtrail.platform.model.lean import again, keeping_less
from offtrail.platform.model.packing import Packed, SampleTable, lay_out
from offtrail.platform.model.policy import Policy, load_model

SIZES: dict[str, Any] = {
    "vocab_size": 53, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None,
    "initializer_range": 0.2,
}  # fmt: skip
CONFIGS = {
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**SIZES, tie_word_embeddings=False),  # biases on q, k, v
    "llama": lambda: LlamaConfig(**SIZES, mlp_bias=True, attention_bias=True),  # MLP biases
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=None),  # nothing fused
}


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp(request.param)
    built = AutoModelForCausalLM.from_config(CONFIGS[request.param]())
    with torch.no_grad():  # norms and biases away from 1 and 0, so that they can be seen
        for name, parameter in built.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    built.save_pretrained(path)
    return path


def ragged(seed: int = 0, temperature: float = 1.0) -> SampleTable:
    """Three prompts with three answers each, lengths 1 … 30."""
    rng = np.random.default_rng(seed)
    lengths = np.concatenate([[1, 30], rng.integers(1, 30, 7)])
    return SampleTable(
        prompts=tuple(rng.integers(2, 53, n).astype(np.int32) for n in (1, 6, 13)),
        group_of=np.repeat(np.arange(3), 3),
        starts=np.concatenate([[0], np.cumsum(lengths)]),
        tokens=rng.integers(2, 53, lengths.sum()).astype(np.int32),
        temperatures=np.full(3, temperature, np.float32),
        ids=np.arange(3),
    )


def one_by_one(model: Any, rows: SampleTable) -> torch.Tensor:
    """Log-probabilities [T] of the output tokens by plain forward passes without any padding."""
    out = []
    for i in range(rows.size):
        prompt = rows.prompts[rows.group_of[i]]
        output = rows.tokens[rows.starts[i] : rows.starts[i + 1]]
        ids = torch.from_numpy(np.concatenate([prompt, output]).astype(np.int64))
        logits = model(input_ids=ids[None, :-1], use_cache=False).logits[0, len(prompt) - 1 :]
        logits = logits / float(rows.temperatures[rows.group_of[i]])
        out.append(torch.log_softmax(logits, -1).gather(1, ids[len(prompt) :, None])[:, 0])
    return torch.cat(out)


@pytest.mark.parametrize("share", [0, 100], ids=["whole", "shared"])
def test_packed_equals_one_by_one_in_value_and_gradient(folder: Path, share: int) -> None:
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    policy, rows = Policy(load_model(folder)), ragged(temperature=0.7)
    logprobs, _ = policy(lay_out(rows, range(9), share_up_to=share))
    expected = one_by_one(plain, rows)
    assert (logprobs - expected).abs().max() < 1e-5

    weights = torch.randn(len(expected), generator=torch.Generator().manual_seed(1))
    (logprobs * weights).sum().backward()
    (expected * weights).sum().backward()
    for (name, mine), theirs in zip(policy.named_parameters(), plain.parameters(), strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert (mine.grad - theirs.grad).abs().max() < 1e-4 * theirs.grad.abs().max().clamp_min(1e-2), name


@pytest.mark.parametrize("share", [0, 100], ids=["whole", "shared"])
def test_no_sample_sees_another(folder: Path, share: int) -> None:
    policy, rows = Policy(load_model(folder)), ragged()
    packed = lay_out(rows, range(9), share_up_to=share)
    with torch.no_grad():
        before, _ = policy(packed)
        changed = rows.tokens.copy()
        start, stop = int(rows.starts[4]), int(rows.starts[5])
        changed[start:stop] = 2 + (changed[start:stop] + 7) % 51
        after, _ = policy(lay_out(SampleTable(**{**vars(rows), "tokens": changed}), range(9), share_up_to=share))
    others = torch.ones(len(before), dtype=torch.bool)
    others[start:stop] = False
    assert torch.equal(before[others], after[others])
    assert not torch.isclose(before[start:stop], after[start:stop]).any()


def test_an_empty_microbatch_gives_zero_gradients(folder: Path) -> None:
    policy = Policy(load_model(folder))
    logprobs, entropy = policy(lay_out(ragged(), [], share_up_to=100))
    logprobs.sum().backward()
    assert logprobs.shape == entropy.shape == (0,)
    assert all(p.grad is not None and not p.grad.any() for p in policy.parameters())


def test_bfloat16_stays_near_float32(folder: Path) -> None:
    packed = lay_out(ragged(), range(9))
    with torch.no_grad():
        exact, rough = (Policy(load_model(folder), dtype=d)(packed)[0] for d in ("float32", "bfloat16"))
    assert rough.dtype == torch.float32
    assert 0 < (exact - rough).abs().mean() < 0.1


def test_a_window_that_samples_cross_is_refused(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(MistralConfig(**SIZES, sliding_window=16)).save_pretrained(tmp_path)
    policy = Policy(load_model(tmp_path))
    with pytest.raises(ValueError, match=r"attends within 16 tokens, but a sample has \d+.*model\.max_length"):
        policy(lay_out(ragged(), range(9)))


def test_fused_layers_are_in_use(start_dir: Path) -> None:
    kinds = {type(m).__name__ for m in Policy(load_model(start_dir)).modules()}
    assert {"FusedQwen3RMSNorm", "FusedQwen3MLP", "FusedQwen3Attention"} <= kinds
    rough = {type(m).__name__ for m in Policy(load_model(start_dir), dtype="bfloat16").modules()}
    assert not any(kind.startswith("Fused") for kind in rough)


def test_weights_of_one_input_are_one_matrix_and_stay_parameters(start_dir: Path) -> None:
    loaded = load_model(start_dir)
    before = {name: p.detach().clone() for name, p in loaded.named_parameters()}
    policy = Policy(loaded)
    assert all(torch.equal(p, before[name.removeprefix("model.")]) for name, p in policy.named_parameters())
    for layer in policy.model.base_model.layers:
        for module, parts in ((layer.self_attn, ("q_proj", "k_proj", "v_proj")), (layer.mlp, ("gate_proj", "up_proj"))):
            weights = [getattr(module, name).weight for name in parts]
            joint = fused._whole(weights)
            assert joint is not None
            with torch.no_grad():
                weights[1].add_(1.0)
            assert torch.equal(joint, torch.cat([w.detach() for w in weights]))
            assert fused._whole([weights[1], weights[0]]) is None
            assert fused._whole([w.detach().clone() for w in weights]) is None


def test_weights_that_lie_apart_give_the_same_bits(folder: Path) -> None:
    packed, found = lay_out(ragged(), range(9), share_up_to=100), []
    for apart in (False, True):
        policy = Policy(load_model(folder))
        if apart:  # as FSDP2 has them
            for parameter in policy.parameters():
                parameter.data = parameter.data.clone()
        logprobs, _ = policy(packed)
        logprobs.sum().backward()
        found.append([logprobs.detach(), *(p.grad for p in policy.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def kept_of(policy: Policy, packed: Packed, monkeypatch: pytest.MonkeyPatch) -> tuple[torch.Tensor, int]:
    """Log-probabilities, and the bytes that the forward pass keeps for the backward."""
    kept, pack = dict[int, int](), lean._pack

    def keep(tensor: Any) -> Any:
        if isinstance(tensor, torch.Tensor):
            kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with monkeypatch.context() as patch, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        patch.setattr(lean, "_pack", lambda tensor: keep(pack(tensor)))
        logprobs, _ = policy(packed)
    return logprobs, sum(kept.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_keeping_less_gives_the_same_bits(folder: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, found, kept = lay_out(ragged(), range(9)), [], []
    for less in (True, False):
        if not less:
            monkeypatch.setattr("offtrail.platform.model.policy.lean", lambda model: model)
            monkeypatch.setattr("offtrail.platform.model.policy.keeping_less", contextlib.nullcontext)
        policy = Policy(load_model(folder), dtype=dtype)
        logprobs, size = kept_of(policy, packed, monkeypatch)
        kept.append(size)
        logprobs.sum().backward()
        found.append([logprobs.detach(), *(p.grad for p in policy.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert kept[0] < kept[1]


def test_what_is_made_again_is_what_was_kept() -> None:
    x, w, made, grads = torch.randn(5, 7, requires_grad=True), torch.randn(7, requires_grad=True), list[int](), []
    kept = x.detach()

    def make() -> torch.Tensor:
        made.append(1)
        return kept.exp()

    for less in (keeping_less(), contextlib.nullcontext()):
        with less:
            inner = again(x.exp().clone(), make)
            out = inner * w
            del inner  # its address may be another tensor's from here on
            out = out + (torch.ones(5, 7) * w).square()
        grads.append(torch.autograd.grad(out.sum(), (x, w)))
    assert made == [1]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_transpose_and_a_part_of_what_is_made_again_are_kept() -> None:
    """All stand at its address; with 6 × 6 numbers none has another shape."""
    x, w, grads = torch.randn(6, 6, requires_grad=True), torch.randn(6, 6, requires_grad=True), []
    kept = x.detach()
    for less in (keeping_less(), contextlib.nullcontext()):
        with less:
            inner = again(x.exp(), lambda: kept.exp())
            turned = again(x.cos().t(), lambda: kept.cos().t())
            out = inner.t() * w + turned.t() * w.square() + inner[:1] * w
        grads.append(torch.autograd.grad(out.sum(), (x, w)))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_rounded_weights_are_not_kept_beside_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x, kept, grads, pack = nn.Linear(7, 9), torch.randn(5, 7), list[Any](), [], lean._pack

    def spied(saved: torch.Tensor) -> Any:
        kept.append(pack(saved))
        return kept[-1]

    monkeypatch.setattr(lean, "_pack", spied)
    for less in (keeping_less(), contextlib.nullcontext()):
        with less, torch.autocast("cpu", torch.bfloat16):
            out = layer(x)
        grads.append(torch.autograd.grad(out.float().square().sum(), (layer.weight, layer.bias)))
    assert kept
    assert not any(isinstance(t, torch.Tensor) and {*t.shape} == {7, 9} for t in kept)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_rounded_weights_live_no_longer_than_their_layer(folder: Path, checkpointing: bool) -> None:
    policy = Policy(load_model(folder), dtype="bfloat16", activation_checkpointing=checkpointing)
    cached = list[bool]()
    for module in policy.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda *_: cached.append(torch.is_autocast_cache_enabled()))
    policy(lay_out(ragged(), range(9)))[0].sum().backward()
    assert cached
    assert not any(cached)


def test_freed_memory_goes_back_between_layers_in_both_directions(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = list[int]()
    monkeypatch.setattr("offtrail.platform.model.policy._LAYERS", 1)
    monkeypatch.setattr("offtrail.platform.model.policy.give_back_freed", given.append)
    policy = Policy(load_model(folder), dtype="bfloat16")
    between = len(policy.model.base_model.layers) - 1
    logprobs, _ = policy(lay_out(ragged(), range(9)))
    assert len(given) == between + 2  # and before the first and after the last
    logprobs.sum().backward()
    assert len(given) == 2 * between + 2


def test_what_autocast_rounds_of_a_norm_is_kept_by_none_of_its_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = lean.lean(Qwen3RMSNorm(7))
    readers, x, kept, grads, pack = (
        [nn.Linear(7, 9) for _ in range(3)],
        torch.randn(1, 5, 7),
        list[Any](),
        [],
        lean._pack,
    )
    x.requires_grad_()

    def spied(saved: torch.Tensor) -> Any:
        kept.append(pack(saved))
        return kept[-1]

    monkeypatch.setattr(lean, "_pack", spied)
    for less in (keeping_less(), contextlib.nullcontext()):
        with less, torch.autocast("cpu", torch.bfloat16):
            read = norm(x)
            out = sum(reader(read).float().square().sum() for reader in readers)
        grads.append(torch.autograd.grad(out, (x, *norm.parameters(), *(r.weight for r in readers))))
    assert not any(isinstance(t, torch.Tensor) and t.dtype == torch.bfloat16 and t.numel() == x.numel() for t in kept)
    assert sum(isinstance(t, lean._Again) and t.shape.numel() == x.numel() for t in kept) >= len(readers)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activation_checkpointing_gives_equal_gradients_and_keeps_less(
    folder: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = lay_out(ragged(), range(9), share_up_to=100 if dtype == "float32" else 0)
    grads, kept = [], []
    for recompute in (False, True):
        policy = Policy(load_model(folder), dtype=dtype, activation_checkpointing=recompute)
        logprobs, size = kept_of(policy, packed, monkeypatch)
        kept.append(size)
        logprobs.sum().backward()
        grads.append([p.grad for p in policy.parameters()])
    assert kept[1] < kept[0] / 2
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_checkpointed_layers_keep_one_class_with_their_name(start_dir: Path) -> None:
    plain, layers = (
        load_model(start_dir).base_model.layers,
        Policy(load_model(start_dir), activation_checkpointing=True).model.base_model.layers,
    )
    assert len({type(layer) for layer in layers}) == 1
    assert type(layers[0]).__name__ == type(plain[0]).__name__
    assert isinstance(layers[0], type(plain[0]))


def test_loss_inside_the_head_is_the_loss_behind_it(folder: Path) -> None:
    rows, reference = ragged(temperature=0.7), Policy(load_model(folder)).requires_grad_(False)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(1.1)
    packed = lay_out(rows, range(9), share_up_to=100)
    weights = torch.randn(len(packed.tokens), generator=torch.Generator().manual_seed(1))

    def loss(part: slice, scores: TokenOutputs) -> torch.Tensor:
        assert scores.kl is not None
        return (weights[part] * (scores.logprobs + 0.1 * scores.entropy - 0.5 * scores.kl)).sum()

    inside, behind = Policy(load_model(folder), elements=2000), Policy(load_model(folder))
    total, seen = inside.loss(packed, loss, reference.reference(packed))
    total.backward()
    scores = behind.outputs(packed, reference.reference(packed))
    expected = loss(slice(None), scores)
    expected.backward()
    assert total.item() == pytest.approx(expected.item(), abs=1e-4)
    for a, b in zip(seen, scores, strict=True):
        assert a is not None
        assert b is not None
        assert torch.allclose(a, b, atol=1e-5)
    for mine, theirs in zip(inside.parameters(), behind.parameters(), strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert (mine.grad - theirs.grad).abs().max() < 1e-5 * theirs.grad.abs().max().clamp_min(1)
    assert all(p.grad is None for p in reference.parameters())


def test_quadratic_share_by_hand() -> None:
    model = AutoModelForCausalLM.from_config(CONFIGS["qwen3"]())
    # 2 layers · 4 heads · 8; weights: embedding 53·32 tied to the head; a layer: q 32·32, k and v 32·16, o 32·32,
    # q and k norms 8, gate, up and down 32·40, two norms 32; last norm 32
    layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 2 * 8 + 3 * 32 * 40 + 2 * 32
    assert Policy(model).quadratic == pytest.approx(64 / (53 * 32 + 2 * layer + 32))


class FakeLiger:
    """Stands where liger-kernel's table of architectures does: its own import needs Triton."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: dict[str, Any] = {}
        table = types.ModuleType("liger_kernel.transformers.monkey_patch")
        table.MODEL_TYPE_TO_APPLY_LIGER_FN = {"qwen3": self.patch}  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", table)
        monkeypatch.setattr(liger, "missing", lambda device: None)

    def patch(self, rope: bool = False, cross_entropy: bool = True, rms_norm: bool = False, model: Any = None) -> None:
        self.asked = {"rope": rope, "cross_entropy": cross_entropy, "rms_norm": rms_norm, "model": model}


def test_liger_is_asked_for_the_decoder_only(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, model = FakeLiger(monkeypatch), AutoModelForCausalLM.from_config(CONFIGS["qwen3"]())
    assert liger.apply(model, "auto")
    assert fake.asked == {"rope": True, "cross_entropy": False, "rms_norm": True, "model": model}
    assert not liger.apply(model, "never")
    other = AutoModelForCausalLM.from_config(CONFIGS["mistral"]())
    assert not liger.apply(other, "auto")
    with pytest.raises(ValueError, match=r"learner\.liger=always: it has no kernels for model_type=mistral"):
        liger.apply(other, "always")


def test_liger_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_config(CONFIGS["qwen3"]())
    assert not liger.apply(model, "auto")
    with pytest.raises(ValueError, match=r"learner\.liger=always: its kernels need a CUDA device.*learner\.device=cpu"):
        liger.apply(model, "always")
    monkeypatch.setattr(liger.importlib.util, "find_spec", lambda name: None)
    assert "not installed" in str(liger.missing("cuda:0"))
