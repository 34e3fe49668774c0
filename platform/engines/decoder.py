"""A decoder-only forward over Hugging Face tensors, for few operations a layer: Qwen3, Qwen2 and Llama.

Invariant: on the same weights the log-probabilities equal those of transformers' modules to float32 rounding.
How it differs from them, and why that changes nothing: q, k, v are one matrix and so are gate and up; the rows of q and
k (and the q/k norms) are stored with each rotary pair side by side, so that a rotation is one complex product, and
since q and k are permuted alike their inner products stay. Rotated keys stand before their values, so that one write
takes both to the cache.

Legend of shapes: N tokens (of a decode step, or of a padded batch laid flat), C hidden size, H query heads, K key/value
heads, D head size, V vocabulary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from offtrail.platform.engines.spec import Spec
from offtrail.platform.model.cost import Cost


def read_weights(model_dir: Path) -> dict[str, Tensor]:
    """Tensors of model.safetensors, or of the shards that model.safetensors.index.json names."""
    index = model_dir / "model.safetensors.index.json"
    single = model_dir / "model.safetensors"
    if index.is_file():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    elif single.is_file():
        files = [single.name]
    else:
        raise ValueError(f"model.path={model_dir}: no model.safetensors there; save the model with save_pretrained")
    weights: dict[str, Tensor] = {}
    for name in files:
        with safe_open(model_dir / name, framework="pt") as file:
            weights.update({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118  (not a mapping)
    return weights


def rotary_table(spec: Spec, positions: int) -> Tensor:
    """(cos, sin) of each rotary pair, [positions, D] float32 with a pair's two values side by side.

    Llama 3 scaling (The Llama 3 Herd of Models, and its release): wavelengths above original/low are slowed by
    ``factor``, those below original/high stay, and between them the two are blended linearly in original/wavelength.
    """
    D = spec.head_size
    frequency = 1.0 / (spec.rope_theta ** (torch.arange(0, D, 2, dtype=torch.float32) / D))
    if spec.rope_scaling is not None:
        s = spec.rope_scaling
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        turns = s["original_max_position_embeddings"] / (2 * math.pi / frequency)
        blend = ((turns - low) / (high - low)).clamp(0.0, 1.0)
        frequency = (1 - blend) * frequency / s["factor"] + blend * frequency
    angle = torch.arange(positions, dtype=torch.float32)[:, None] * frequency
    return torch.stack((angle.cos(), angle.sin()), dim=-1).flatten(1)


def _paired(rows: Tensor, head_size: int) -> Tensor:
    """Rows of q or k [heads·D, …] reordered so that the rotary partners d and d + D/2 of a head stand side by side."""
    halves = rows.view(-1, 2, head_size // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


@dataclass(slots=True)
class _Layer:
    """One layer's storage. ``qk_norm`` [H + K, D] stacks q_norm and k_norm, one row a head."""

    norm_1: Tensor
    norm_2: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    qk_norm: Tensor | None
    o: Tensor
    o_bias: Tensor | None
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


Attend = Callable[[int, Tensor, Tensor], Tensor]
"""(layer, q [N, H, D], keys and values [N, 2K, D]) → [n, H·D] for the last n ≤ N tokens, the only ones that go on."""


class Decoder:
    """The weights, in storage of its own, and the forward over them. Raises ValueError on weights of another shape."""

    def __init__(self, spec: Spec, max_length: int, dtype: torch.dtype, device: torch.device) -> None:
        self.spec, self.dtype, self.device = spec, dtype, device
        C, D, M = spec.hidden_size, spec.head_size, spec.mlp_size
        qkv = (spec.heads + 2 * spec.kv_heads) * D
        self._eps = torch.tensor(spec.norm_eps, device=device)
        self._plain = plain = device.type == "cpu" and dtype == torch.float32

        def empty(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        def matrix(outputs: int, inputs: int) -> Tensor:
            """[outputs, inputs]; in memory the other way round where a product with few rows is faster so."""
            return empty(inputs, outputs).t() if plain else empty(outputs, inputs)

        self.embed = empty(spec.vocab_size, C)
        self.head = self.embed if spec.tied else empty(spec.vocab_size, C)
        self.norm = empty(C)
        self.layers = [
            _Layer(
                norm_1=empty(C),
                norm_2=empty(C),
                qkv=matrix(qkv, C),
                qkv_bias=empty(qkv) if spec.qkv_bias else None,
                qk_norm=empty(spec.heads + spec.kv_heads, D) if spec.qk_norm else None,
                o=matrix(C, spec.heads * D),
                o_bias=empty(C) if spec.o_bias else None,
                gate_up=matrix(2 * M, C),
                gate_up_bias=empty(2 * M) if spec.mlp_bias else None,
                down=matrix(C, M),
                down_bias=empty(C) if spec.mlp_bias else None,
            )
            for _ in range(spec.layers)
        ]
        self._rotary = rotary_table(spec, max_length).to(device)
        self.cost = Cost.of(
            parameters=sum(math.prod(shape) for shape in spec.tensors().values()),
            vocab_size=spec.vocab_size,
            hidden_size=C,
            tied=spec.tied,
            layers=spec.layers,
            heads=spec.heads,
            head_size=D,
        )

    def load(self, weights: Mapping[str, Any]) -> None:
        """Copy checked weights into place; nothing of ``weights`` is kept."""
        self.spec.check_tensors({name: tuple(tensor.shape) for name, tensor in weights.items()})
        spec, D = self.spec, self.spec.head_size
        q_rows, k_rows = spec.heads * D, spec.kv_heads * D
        self.embed.copy_(weights["model.embed_tokens.weight"])
        self.norm.copy_(weights["model.norm.weight"])
        if not spec.tied:
            self.head.copy_(weights["lm_head.weight"])
        for i, layer in enumerate(self.layers):
            name = f"model.layers.{i}."
            layer.norm_1.copy_(weights[name + "input_layernorm.weight"])
            layer.norm_2.copy_(weights[name + "post_attention_layernorm.weight"])
            for fused, kind in ((layer.qkv, "weight"), (layer.qkv_bias, "bias")):
                if fused is not None:
                    q, k, v = fused[:q_rows], fused[q_rows : q_rows + k_rows], fused[q_rows + k_rows :]
                    q.copy_(_paired(weights[f"{name}self_attn.q_proj.{kind}"], D))
                    k.copy_(_paired(weights[f"{name}self_attn.k_proj.{kind}"], D))
                    v.copy_(weights[f"{name}self_attn.v_proj.{kind}"])
            if layer.qk_norm is not None:
                layer.qk_norm[: spec.heads].copy_(_paired(weights[name + "self_attn.q_norm.weight"], D))
                layer.qk_norm[spec.heads :].copy_(_paired(weights[name + "self_attn.k_norm.weight"], D))
            for fused, kind in ((layer.gate_up, "weight"), (layer.gate_up_bias, "bias")):
                if fused is not None:
                    gate, up = fused.chunk(2)
                    gate.copy_(weights[f"{name}mlp.gate_proj.{kind}"])
                    up.copy_(weights[f"{name}mlp.up_proj.{kind}"])
            for tensor, key in (
                (layer.o, "self_attn.o_proj.weight"),
                (layer.o_bias, "self_attn.o_proj.bias"),
                (layer.down, "mlp.down_proj.weight"),
                (layer.down_bias, "mlp.down_proj.bias"),
            ):
                if tensor is not None:
                    tensor.copy_(weights[name + key])

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Hidden states [n, C] before the last norm, of ``tokens`` [N] at ``positions`` [N]; n is ``attend``'s."""
        spec = self.spec
        N, D = len(tokens), spec.head_size
        x = F.embedding(tokens, self.embed)
        rotation = torch.view_as_complex(self._rotary.index_select(0, positions).view(N, 1, -1, 2))
        for i, layer in enumerate(self.layers):
            h = self._norm(x, layer.norm_1)
            qkv = F.linear(h, layer.qkv, layer.qkv_bias).view(N, -1, D)
            qk = qkv[:, : -spec.kv_heads]
            normed = qk if layer.qk_norm is None else self._norm(qk, layer.qk_norm)
            self._rotate(normed, rotation, qk)
            attended = attend(i, qkv[:, : spec.heads], qkv[:, spec.heads :])
            x = _add_linear(x[len(x) - len(attended) :], attended, layer.o, layer.o_bias)
            h = self._norm(x, layer.norm_2)
            gate, up = F.linear(h, layer.gate_up, layer.gate_up_bias).chunk(2, dim=1)
            x = _add_linear(x, F.silu(gate).mul_(up), layer.down, layer.down_bias)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, C] → [N, V] float32."""
        return F.linear(self._norm(hidden, self.norm), self.head).float()

    def _rotate(self, x: Tensor, rotation: Tensor, out: Tensor) -> None:
        """Rotate each pair of x [N, heads, D] into ``out``."""
        paired = (*x.shape[:2], -1, 2)
        pairs = torch.view_as_complex(x.float().view(paired))
        if self.dtype == torch.float32:
            torch.mul(pairs, rotation, out=torch.view_as_complex(out.view(paired)))
        else:
            out.copy_(torch.view_as_real(pairs * rotation).flatten(2))

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm (arXiv:1910.07467, eq. 4) over the last dimension, times ``weight``: x's shape but for the first."""
        if not self._plain:
            shared = weight if weight.dim() == 1 else None
            normed = F.rms_norm(x, x.shape[-1:], shared, self.spec.norm_eps)
            return normed if shared is not None else normed.mul_(weight)
        mean = torch.add(self._eps, (x * x).sum(-1, keepdim=True), alpha=1 / x.shape[-1])
        return (x * mean.rsqrt_()).mul_(weight)


def _add_linear(x: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """X + inputs · weightᵀ (+ bias), the residual added by the matrix product itself."""
    out = torch.addmm(x, inputs, weight.t())
    return out if bias is None else out.add_(bias)
