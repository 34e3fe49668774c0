"""The policy as the learner sees it: packed samples in, log-probability and entropy of each output token out.

train.py calls ``Policy``; its forward runs transformers' decoder on flat tokens (attention.py) and then the head below.

Invariant (I5): log-probabilities are of the logits divided by the group's sampling temperature, in float32, over the
full vocabulary, so that they are comparable with the engine's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from offtrail.platform.learner import attention
from offtrail.platform.learner.fused import fuse
from offtrail.platform.learner.packing import Packed

HEAD_ELEMENTS = 1 << 25
"""Logits held at a time (128 MiB in float32); beyond it the head runs in chunks and recomputes them in backward."""


def load_model(path: Path | str, *, device: torch.device | str = "cpu") -> Any:
    """A causal language model from a Hugging Face directory or name, in float32, with packed attention.

    Parameters are float32 whatever learner.dtype says: in bfloat16, AdamW's updates at the learning rates of RL would
    be rounded away. It stays in eval mode: dropout has no place in a ratio of probabilities.
    """
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation=attention.NAME)
    model.config.use_cache = False
    return model.to(device).eval()


class Policy(nn.Module):
    """A causal language model with the log-probability head. ``model`` is transformers' module, names unchanged.

    The root of the FSDP2 world: its forward gathers embedding, final norm and head, that of a decoder layer its own.
    With ``dtype`` bfloat16 the decoder runs under autocast; the head is float32 always. In float32 on a CPU the layers
    that fused.py knows are fused.
    """

    def __init__(self, model: Any, *, dtype: str = "float32") -> None:
        super().__init__()
        plain = dtype == "float32" and model.device.type == "cpu"
        self.model: Any = fuse(model) if plain else model
        self.autocast = dtype == "bfloat16"
        self.share_up_to = attention.SHARE_UP_TO if plain else 0
        """Longest sequence for packing's shared layout."""

    def forward(self, packed: Packed) -> tuple[Tensor, Tensor]:
        """(log-probabilities [M] with gradient, entropies [M] without), float32, of the micro-batch's output tokens."""
        with torch.autocast(packed.input_ids.device.type, torch.bfloat16, enabled=self.autocast):
            hidden = self.model.base_model(
                input_ids=packed.input_ids, position_ids=packed.position_ids, use_cache=False, packed=packed
            ).last_hidden_state[0]
        head = self.model.get_output_embeddings()
        rows = hidden.index_select(0, packed.predict)
        return token_logprobs(rows, head.weight, head.bias, packed.targets, packed.inverse_temperature)


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    inverse_temperature: Tensor | None = None,
    *,
    elements: int = HEAD_ELEMENTS,
) -> tuple[Tensor, Tensor]:
    """Log-probability of ``targets`` [M] and full-vocabulary entropy, from ``hidden`` [M, H] and the head's
    ``weight`` [V, H].

    At most ``elements`` logits exist at a time: then 8MHV instead of 6MHV operations. ``inverse_temperature`` [M, 1].
    Both outputs [M] float32; the entropy has no gradient.
    """
    out: tuple[Tensor, Tensor] = _TokenLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, targets, inverse_temperature, elements
    )
    return out


class _TokenLogprobs(torch.autograd.Function):
    """log softmax(hWᵀ/τ) at the targets. With p = softmax: d logits = (1[target] − p)·g/τ."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        inverse_temperature: Tensor | None,
        elements: int,
    ) -> tuple[Tensor, Tensor]:
        rows = max(1, elements // weight.shape[0])
        parts = list(range(0, len(hidden), rows)) or [0]
        head = weight.float()
        logprobs, entropies, kept = [], [], None
        for start in parts:
            part = slice(start, start + rows)
            z = _logits(hidden[part], head, bias, _part(inverse_temperature, part))
            logp = torch.log_softmax(z, -1)
            logprobs.append(logp.gather(1, targets[part].unsqueeze(1)).squeeze(1))
            p = logp.exp()
            entropies.append(torch.linalg.vecdot(p, logp).neg_())
            kept = p if len(parts) == 1 else None
        ctx.rows = rows
        ctx.save_for_backward(hidden, weight, bias, targets, inverse_temperature, kept)
        entropy = torch.cat(entropies)
        ctx.mark_non_differentiable(entropy)
        return torch.cat(logprobs), entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None, None]:
        hidden, weight, bias, targets, inverse_temperature, kept = ctx.saved_tensors
        head, g = weight.float(), grads[0]
        # Accumulated in float32: bfloat16 sums over chunks lose the small ones.
        d_head, d_bias = torch.zeros_like(head), None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        d_hidden = torch.empty_like(hidden)
        for start in range(0, len(hidden), ctx.rows):
            part = slice(start, start + ctx.rows)
            scale, column = _part(inverse_temperature, part), g[part].unsqueeze(1)
            p = kept if kept is not None else torch.softmax(_logits(hidden[part], head, bias, scale), -1)
            d_z = (p * -column).scatter_add_(1, targets[part].unsqueeze(1), column)
            if scale is not None:
                d_z *= scale
            d_hidden[part] = d_z @ head
            d_head.addmm_(d_z.T, hidden[part].float())
            if d_bias is not None:
                d_bias += d_z.sum(0)
        return (
            d_hidden, d_head.to(weight.dtype), None if d_bias is None or bias is None else d_bias.to(bias.dtype),
            None, None, None,
        )  # fmt: skip


def _logits(hidden: Tensor, head: Tensor, bias: Tensor | None, inverse_temperature: Tensor | None) -> Tensor:
    z = torch.nn.functional.linear(hidden.float(), head, None if bias is None else bias.float())
    return z if inverse_temperature is None else z.mul_(inverse_temperature)


def _part(values: Tensor | None, part: slice) -> Tensor | None:
    return None if values is None else values[part]
