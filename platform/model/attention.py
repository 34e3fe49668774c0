"""Causal attention of packed samples: the linear layers see flat tokens, only attention sees samples.

Registered with transformers' AttentionInterface as ``offtrail_packed``; policy.py hands the layout (packing.Packed) to
the model as the keyword ``packed``, which every layer passes on to here. Two kernels, chosen by the layout:

- whole samples (any length, any device): rows of q, k, v gathered into right-padded squares [n, heads, L, D], for which
  plain causal SDPA needs no mask: what stands to the right of a token is never seen, outputs at padding are dropped;
- shared prompts (short sequences on a CPU, float32): answers' queries against prompt and answer keys, so that a
  prompt's attention is computed once a group; plain matrix products and softmax, whose probabilities are kept.

Invariant: the output at a token depends on that token's own sample (and prompt) only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from offtrail.platform.model.lean import again
from offtrail.platform.model.packing import Bucket, Packed

NAME = "offtrail_packed"
SHARE_UP_TO = 192
"""Longest sequence, in tokens, of the shared layout: beyond it the half that a causal kernel skips is worth more."""
UNSUPPORTED = ("softcap", "s_aux", "dropout")
"""Keywords of attention variants that plain causal SDPA does not compute (Gemma 2's cap, GPT-OSS's sinks)."""


def attend(qkv: Tensor, heads: int, kv_heads: int, packed: Packed, scaling: float) -> Tensor:
    """Attention over flat rows ``qkv`` [F, (heads + 2·kv_heads)·D] (queries, keys, values) → [F, heads·D]."""
    if packed.shared:
        out: Tensor = _SharedAttention.apply(qkv, heads, kv_heads, packed, scaling)  # type: ignore[no-untyped-call]
        return out
    outputs, kept = list[Tensor](), list[Tensor]()
    for bucket in packed.buckets:
        n, L = bucket.queries.shape
        rows = qkv.index_select(0, bucket.queries.view(-1)).view(n, L, heads + 2 * kv_heads, -1).transpose(1, 2)
        q, k, v = torch.split(rows, [heads, kv_heads, kv_heads], dim=1)
        out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=heads != kv_heads)
        outputs.append(out)
        kept.append(out.detach())  # which its own backward keeps
    return again(_flat(outputs, packed), lambda: _flat(kept, packed))


def _flat(outputs: list[Tensor], packed: Packed) -> Tensor:
    """[n, heads, L, D] of each bucket → [F, heads·D]."""
    padded = [out.transpose(1, 2).reshape(out.shape[0] * out.shape[2], -1) for out in outputs]
    return (padded[0] if len(padded) == 1 else torch.cat(padded)).index_select(0, packed.restore)


class _SharedAttention(torch.autograd.Function):
    """P = softmax(scaling·QKᵀ + mask), O = PV in every bucket; heads of one key-value head are rows of one product.

    Gradients: dV = PᵀdO; dS = P∘(dP − Σ dP∘P) with dP = dO·Vᵀ; dQ = scaling·dS·K; dK = scaling·dSᵀ·Q.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int, kv_heads: int, packed: Packed, scaling: float) -> Tensor:
        D = qkv.shape[1] // (heads + 2 * kv_heads)
        padded, saved, start = [], [], 0
        for bucket in packed.buckets:
            q = _by_head(qkv[:, : heads * D], bucket.queries, kv_heads, D).mul_(scaling)
            k = _by_head(qkv[:, heads * D : (heads + kv_heads) * D], bucket.keys, kv_heads, D)
            v = _by_head(qkv[:, (heads + kv_heads) * D :], bucket.keys, kv_heads, D)
            scores = torch.baddbmm(_causal(bucket, heads // kv_heads), q, k.transpose(1, 2))
            if bucket.bias is not None:
                scores.view(len(bucket.keys), -1, scores.shape[2]).add_(bucket.bias.unsqueeze(1))
            p = torch.softmax(scores, -1)
            padded.append(_by_token(torch.bmm(p, v), bucket.queries, D))
            saved += [q, k, v, p]
            start += bucket.queries.numel()
        ctx.save_for_backward(*saved)
        ctx.packed, ctx.scaling, ctx.heads, ctx.kv_heads, ctx.padded = packed, scaling, heads, kv_heads, start
        return torch.cat(padded).index_select(0, packed.restore)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        packed, kv_heads, saved = ctx.packed, ctx.kv_heads, ctx.saved_tensors
        D = grads[0].shape[1] // ctx.heads
        # Zeros at padding: then nothing reaches a key from a query that is not there.
        d_padded = grads[0].new_zeros(ctx.padded, grads[0].shape[1]).index_copy_(0, packed.restore, grads[0])
        d_q = torch.empty_like(d_padded)
        d_kv = grads[0].new_zeros(len(grads[0]), 2 * kv_heads * D)
        end = 0
        for i, bucket in enumerate(packed.buckets):
            q, k, v, p = saved[4 * i : 4 * i + 4]
            start, end = end, end + bucket.queries.numel()
            d_out = _heads_first(d_padded[start:end], bucket.queries, kv_heads, D)
            d_v = torch.bmm(p.transpose(1, 2), d_out)
            d_s = torch._softmax_backward_data(torch.bmm(d_out, v.transpose(1, 2)), p, -1, p.dtype)
            d_q[start:end] = _by_token(torch.bmm(d_s, k), bucket.queries, D)
            d_k = torch.bmm(d_s.transpose(1, 2), q)
            both = torch.cat((_by_token(d_k, bucket.keys, D), _by_token(d_v, bucket.keys, D)), 1)
            d_kv.index_add_(0, bucket.keys.view(-1), both)
        d_q = d_q.mul_(ctx.scaling).index_select(0, packed.restore)
        return torch.cat((d_q, d_kv), 1), None, None, None, None


def _by_head(flat: Tensor, index: Tensor, kv_heads: int, D: int) -> Tensor:
    """Rows [F, heads·D] at index [n, L] → [n·kv_heads, heads/kv_heads·L, D]."""
    return _heads_first(flat.index_select(0, index.view(-1)), index, kv_heads, D)


def _heads_first(rows: Tensor, index: Tensor, kv_heads: int, D: int) -> Tensor:
    n, L = index.shape
    return rows.view(n, L, -1, D).transpose(1, 2).reshape(n * kv_heads, -1, D)


def _by_token(blocks: Tensor, index: Tensor, D: int) -> Tensor:
    """The way back: [n·kv_heads, heads/kv_heads·L, D] → [n·L, heads·D]."""
    n, L = index.shape
    return blocks.view(n, -1, L, D).transpose(1, 2).reshape(n * L, -1)


def _causal(bucket: Bucket, repeats: int) -> Tensor:
    """Additive mask [repeats·Lq, Lk]: query i sees keys up to Lk − Lq + i."""
    Lq, Lk = bucket.queries.shape[1], bucket.keys.shape[1]
    mask = torch.full((Lq, Lk), float("-inf"), device=bucket.keys.device).triu_(Lk - Lq + 1)
    return mask.repeat(repeats, 1)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed: Packed,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The AttentionInterface function: ``query`` [1, heads, F, D], ``key`` and ``value`` [1, kv_heads, F, D] → [1, F,
    heads, D].

    Raises ValueError where the architecture asks for attention that this function does not compute.
    """
    check_supported(packed, sliding_window, kwargs)
    if value.shape[3] != query.shape[3]:
        raise ValueError(
            f"this model's values have {value.shape[3]} numbers a head and its queries {query.shape[3]}, which the "
            "learner's attention takes to be equal; choose another"
        )
    heads, kv_heads, D = query.shape[1], key.shape[1], query.shape[3]
    qkv = torch.cat((query, key, value), dim=1)[0].transpose(0, 1).reshape(-1, (heads + 2 * kv_heads) * D)
    scale = D**-0.5 if scaling is None else scaling
    return attend(qkv, heads, kv_heads, packed, scale).view(1, -1, heads, D), None


def check_supported(packed: Packed, sliding_window: int | None, kwargs: dict[str, Any]) -> None:
    """Raise ValueError, naming the way out, on a window that samples would cross or a keyword of UNSUPPORTED."""
    if sliding_window is not None and packed.longest > sliding_window:
        raise ValueError(
            f"this model attends within {sliding_window} tokens, but a sample has {packed.longest}: the learner "
            f"computes full causal attention; set model.max_length ≤ {sliding_window}"
        )
    for name in UNSUPPORTED:
        value = kwargs.get(name)
        if isinstance(value, Tensor) or value not in (None, 0.0):
            raise ValueError(f"this model's attention uses {name}, which the learner does not compute; choose another")


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Transformers asks for a mask at each forward pass: causality is in the layout."""


def register() -> None:
    """Make ``offtrail_packed`` known to transformers (idempotent)."""
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, _no_mask)


register()
