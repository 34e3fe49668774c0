"""Which architectures the local engine computes, and what it reads of one in config.json. No torch: the launcher asks
before anything starts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FAMILIES = ("llama", "qwen2", "qwen3")


@dataclass(frozen=True, slots=True)
class Spec:
    """The architecture, as read from a Hugging Face config.json."""

    family: str
    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    mlp_size: int
    norm_eps: float
    tied: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    max_positions: int
    rope_theta: float
    rope_scaling: Mapping[str, float] | None
    """Llama 3's rule (factor, low_freq_factor, high_freq_factor, original_max_position_embeddings), or none."""

    def check_length(self, max_length: int) -> None:
        """Raise ValueError where the model has fewer positions."""
        if max_length > self.max_positions:
            raise ValueError(
                f"model.max_length={max_length} is above the model's {self.max_positions} positions; lower it"
            )

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name → shape of every tensor that a checkpoint of this architecture holds."""
        C, H, K, D, M = self.hidden_size, self.heads, self.kv_heads, self.head_size, self.mlp_size
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, C),
            "model.norm.weight": (C,),
        }
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocab_size, C)
        for i in range(self.layers):
            layer = f"model.layers.{i}"
            shapes[f"{layer}.input_layernorm.weight"] = (C,)
            shapes[f"{layer}.post_attention_layernorm.weight"] = (C,)
            for name, rows, columns, bias in (
                ("self_attn.q_proj", H * D, C, self.qkv_bias),
                ("self_attn.k_proj", K * D, C, self.qkv_bias),
                ("self_attn.v_proj", K * D, C, self.qkv_bias),
                ("self_attn.o_proj", C, H * D, self.o_bias),
                ("mlp.gate_proj", M, C, self.mlp_bias),
                ("mlp.up_proj", M, C, self.mlp_bias),
                ("mlp.down_proj", C, M, self.mlp_bias),
            ):
                shapes[f"{layer}.{name}.weight"] = (rows, columns)
                if bias:
                    shapes[f"{layer}.{name}.bias"] = (rows,)
            if self.qk_norm:
                shapes[f"{layer}.self_attn.q_norm.weight"] = (D,)
                shapes[f"{layer}.self_attn.k_norm.weight"] = (D,)
        return shapes

    def check_tensors(self, given: Mapping[str, tuple[int, ...]]) -> None:
        """Raise ValueError, naming the first tensors (name → shape) that are missing, unknown or of another shape."""
        expected = self.tensors()
        left_out = ["rotary_emb.inv_freq"]  # a constant, which old checkpoints hold
        if self.tied:
            left_out.append("lm_head.weight")  # the tied output layer, which a state dict lists a second time
        given = {name: shape for name, shape in given.items() if not name.endswith(tuple(left_out))}
        missing = sorted(expected.keys() - given.keys())
        unknown = sorted(given.keys() - expected.keys())
        if missing or unknown:
            parts = [f"{what} {names[:3]}" for what, names in (("missing", missing), ("unknown", unknown)) if names]
            raise ValueError(f"weights do not fit this {self.family} model: {'; '.join(parts)}")
        for name, shape in expected.items():
            if given[name] != shape:
                raise ValueError(f"weights do not fit this {self.family} model: {name} is {given[name]}, not {shape}")


def read_spec(model_dir: Path) -> Spec:
    """The architecture of ``model_dir``/config.json; ValueError in one line where this forward does not cover it."""
    path, where = model_dir / "config.json", f"model.path={model_dir}"
    if not path.is_file():
        raise ValueError(f"{where}: no config.json there; give a Hugging Face model directory")
    config: dict[str, Any] = json.loads(path.read_text())
    family = config.get("model_type")

    def refuse(what: str) -> ValueError:
        return ValueError(f"{where}: {what}; the local engine supports {', '.join(FAMILIES)} without it")

    if family not in FAMILIES:
        raise ValueError(
            f"{where}: model_type={family} is not supported by the local engine; supported: {', '.join(FAMILIES)}; or "
            "take engine=sglang"
        )
    if config.get("hidden_act", "silu") != "silu":
        raise refuse(f"hidden_act={config['hidden_act']}")
    if config.get("use_sliding_window") or "sliding_attention" in (config.get("layer_types") or ()):
        raise refuse("sliding-window attention")
    if config.get("quantization_config"):
        raise refuse("quantization_config")
    rope: dict[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise refuse(f"rope_type={kind} (default and llama3 are)")
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise refuse("partial_rotary_factor")
    scaling_keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    heads = int(config["num_attention_heads"])
    bias = bool(config.get("attention_bias", False))
    kv_heads = int(config.get("num_key_value_heads") or heads)
    default_size = 128 if family == "qwen3" else config["hidden_size"] // heads
    head_size = int(config.get("head_dim") or default_size)
    if heads % kv_heads or head_size % 2:
        raise ValueError(f"{where}: {heads} heads, {kv_heads} key/value heads of size {head_size} do not fit together")
    return Spec(
        family=family,
        vocab_size=int(config["vocab_size"]),
        hidden_size=int(config["hidden_size"]),
        layers=int(config["num_hidden_layers"]),
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        mlp_size=int(config["intermediate_size"]),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=True if family == "qwen2" else bias,
        o_bias=False if family == "qwen2" else bias,
        mlp_bias=bool(config.get("mlp_bias", False)) if family == "llama" else False,
        qk_norm=family == "qwen3",
        max_positions=int(config.get("max_position_embeddings", 2048 if family == "llama" else 32768)),
        rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 10_000.0))),
        rope_scaling={key: float(rope[key]) for key in scaling_keys} if kind == "llama3" else None,
    )
