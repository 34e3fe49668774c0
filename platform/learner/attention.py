"""Causal attention of packed samples: the linear layers see flat tokens, only attention sees samples.

Registered with transformers' AttentionInterface as ``offtrail_packed``; model.py hands the layout (packing.Packed) to the
model as the keyword ``packed``, which every layer passes on to here. Gathering rows of q, k and v by Bucket.index makes
right-padded squares [n, heads, L, D], for which plain causal SDPA needs no mask: what stands to the right of a token is
never seen, and outputs at padding are dropped. A prompt shared by several samples is gathered once a sample.

Invariant: the output at a token depends on that token's own sample (and prompt) only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from offtrail.platform.learner.packing import Packed

NAME = "offtrail_packed"
UNSUPPORTED = ("softcap", "s_aux")
"""Keywords of attention variants that plain causal SDPA does not compute (Gemma 2's cap, GPT-OSS's sinks)."""


def attend(qkv: Tensor, heads: int, kv_heads: int, packed: Packed, scaling: float | None, dropout: float) -> Tensor:
    """Attention over flat rows ``qkv`` [F, (heads + 2·kv_heads)·D] (queries, keys, values) → [F, heads·D]."""
    outputs = []
    for bucket in packed.buckets:
        n, L = bucket.index.shape
        rows = qkv.index_select(0, bucket.index.view(-1)).view(n, L, heads + 2 * kv_heads, -1).transpose(1, 2)
        q, k, v = rows.split((heads, kv_heads, kv_heads), dim=1)
        out = scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scaling, dropout_p=dropout, enable_gqa=heads != kv_heads
        )
        outputs.append(out.transpose(1, 2).reshape(n * L, -1))
    padded = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return padded.index_select(0, packed.restore)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed: Packed,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The AttentionInterface function: ``query`` [1, heads, F, D], ``key`` and ``value`` [1, kv_heads, F, D] → [1, F, heads, D].

    Raises ValueError where the architecture asks for attention that this function does not compute.
    """
    check_supported(packed, sliding_window, kwargs)
    heads, kv_heads, D = query.shape[1], key.shape[1], query.shape[3]
    qkv = torch.cat((query, key, value), dim=1)[0].transpose(0, 1).reshape(-1, (heads + 2 * kv_heads) * D)
    return attend(qkv, heads, kv_heads, packed, scaling, dropout).view(1, -1, heads, D), None


def check_supported(packed: Packed, sliding_window: int | None, kwargs: dict[str, Any]) -> None:
    """Raise ValueError, naming the way out, on a window that samples would cross or a keyword of UNSUPPORTED."""
    longest = max(b.index.shape[1] for b in packed.buckets)
    if sliding_window is not None and longest > sliding_window:
        raise ValueError(
            f"this model attends within {sliding_window} tokens, but a sample has {longest}: the learner computes full "
            f"causal attention; set model.max_length ≤ {sliding_window}"
        )
    for name in UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(f"this model's attention uses {name}, which the learner does not compute; choose another")


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Transformers asks for a mask at each forward pass: causality is in the layout."""


def register() -> None:
    """Make ``offtrail_packed`` known to transformers (idempotent)."""
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, _no_mask)


register()
