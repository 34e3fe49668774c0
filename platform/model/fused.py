"""The same layers in fewer passes over memory, for float32 on a CPU.

``fuse(model)`` changes the class of the modules it knows (Llama, Qwen2, Qwen3: RMS norm, SwiGLU, attention) to a
subclass with the same parameters and another ``forward``; all other modules stay as they are, so any architecture
works. On a narrow model the elementwise operations of these three cost as much as the matrix products; each is one
autograd node here, with its gradient written out. Weights of one input lie one behind the other in one storage, so that
they are one matrix without a copy; what an elementwise pass gives again is not kept for the backward (lean.py).

Invariant: outputs and gradients equal the unfused model's to float32 rounding (tests/unit/test_learner_model.py).
bfloat16 and GPUs keep transformers' modules, whose rounding order this does not follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from offtrail.platform.model.attention import attend, check_supported
from offtrail.platform.model.lean import MLPS, NORMS, again
from offtrail.platform.model.packing import Packed

ATTENTIONS = ("LlamaAttention", "Qwen2Attention", "Qwen3Attention")


class _RmsNorm(torch.autograd.Function):
    """y = x·r·w with r = (mean x² + ε)^−½ over the last dimension; x [..., H]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        r = _inverse_rms(x, eps)
        ctx.save_for_backward(x, weight, r)
        return (x * r).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, r = ctx.saved_tensors
        return *_norm_gradient(grads[0], x * r, r, weight), None


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    r: Tensor = torch.linalg.vecdot(x, x).mul_(1 / x.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)
    return r


def _norm_gradient(g: Tensor, n: Tensor, r: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients to x and weight of y = n·w, n = x·r: dx = r·(g·w − n·mean(g·w·n)), dw = Σ g·n."""
    gn = g * n
    rows = gn.reshape(-1, gn.shape[-1])  # a view, but where an attention that is not fused hands heads over transposed
    dw = rows.sum(0)
    mean = torch.mv(rows, weight).mul_(-1 / gn.shape[-1]).view(r.shape)
    return (g * weight).addcmul_(n, mean).mul_(r), dw


class _SwiGlu(torch.autograd.Function):
    """silu(gate)·up, where ``both`` [..., 2·I] holds gate and up side by side."""

    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        return _swiglu(both)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (both,) = ctx.saved_tensors
        gate, up = both.chunk(2, -1)
        out = torch.empty_like(both)
        d_gate, d_up = out.chunk(2, -1)
        torch.mul(grads[0], up, out=d_gate)
        torch.ops.aten.silu_backward.grad_input(d_gate, gate, grad_input=d_gate)
        torch.ops.aten.silu.out(gate, out=d_up)
        d_up.mul_(grads[0])
        return out


def _swiglu(both: Tensor) -> Tensor:
    gate, up = both.chunk(2, -1)
    return silu(gate).mul_(up)


class _Joint(torch.autograd.Function):
    """x·Wᵀ + b for x [..., C], where W [R, C], ``joint``, is what the ``weights`` are views of, in order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, joint: Tensor, bias: Tensor | None, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, joint)
        ctx.rows, ctx.biased = [len(weight) for weight in weights], bias is not None
        return linear(x, joint, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, joint = ctx.saved_tensors
        g = grads[0].reshape(-1, len(joint))
        d_joint = torch.mm(g.t(), x.reshape(-1, x.shape[-1]))
        return torch.mm(g, joint).view(x.shape), None, g.sum(0) if ctx.biased else None, *torch.split(d_joint, ctx.rows)


class _NormRope(torch.autograd.Function):
    """Rotary embedding of the query and key heads in ``qkv`` [F, heads, D], after an RMS norm where ``weight`` is
    given.

    The first ``rotated`` heads are changed, the others (values) copied. ``cos`` and ``sin`` [F, 1, D] as transformers
    makes them: halves of D rotate against each other. ``weight`` [rotated, D] or None.
    """

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor, rotated: int
    ) -> Tensor:
        x, out, r = qkv[:, :rotated], torch.empty_like(qkv), None
        if weight is not None:
            r = _inverse_rms(x, eps)
            x = (x * r).mul_(weight)
        _rotate(x, cos, sin, out[:, :rotated])
        out[:, rotated:] = qkv[:, rotated:]
        ctx.rotated = rotated
        ctx.save_for_backward(qkv if weight is not None else None, weight, r, cos, sin)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None, None, None]:
        qkv, weight, r, cos, sin = ctx.saved_tensors
        g, rotated = grads[0], ctx.rotated
        out = torch.empty_like(g)
        out[:, rotated:] = g[:, rotated:]
        # The transpose of a rotation by φ is the rotation by −φ.
        if weight is None:
            _rotate(g[:, :rotated], cos, -sin, out[:, :rotated])
            return out, None, None, None, None, None
        g = _rotate(g[:, :rotated], cos, -sin, torch.empty_like(g[:, :rotated]))
        n = qkv[:, :rotated] * r
        gn = g * n
        dw = gn.sum(0)
        mean = (gn * weight).sum(-1, keepdim=True).mul_(-1 / gn.shape[-1])
        torch.mul(g.mul_(weight).addcmul_(n, mean), r, out=out[:, :rotated])
        return out, dw, None, None, None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Tensor:
    """Write x·cos + rotate_half(x)·sin into ``out``, for x [F, heads, D]; cos and sin repeat their first half."""
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    s = sin[..., :half]
    torch.mul(x, cos, out=out)
    out[..., :half].addcmul_(b, s, value=-1)
    out[..., half:].addcmul_(a, s)
    return out


class _FusedNorm:
    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        out: Tensor = _RmsNorm.apply(hidden_states, self.weight, self.variance_epsilon)  # type: ignore[no-untyped-call]
        x, weight, eps = hidden_states.detach(), self.weight.detach(), self.variance_epsilon
        return again(out, lambda: (x * _inverse_rms(x, eps)).mul_(weight))


class _FusedMlp:
    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        both = _joint(x, (self.gate_proj, self.up_proj))
        inner: Tensor = _SwiGlu.apply(both)  # type: ignore[no-untyped-call]
        both = both.detach()
        out: Tensor = self.down_proj(again(inner, lambda: _swiglu(both)))
        return out


class _FusedAttention:
    config: Any
    head_dim: int
    scaling: float
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        *,
        packed: Packed,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        check_supported(packed, getattr(self, "sliding_window", None), {})
        heads, kv_heads, D = self.config.num_attention_heads, self.config.num_key_value_heads, self.head_dim
        qkv = _joint(hidden_states[0], (self.q_proj, self.k_proj, self.v_proj)).view(-1, heads + 2 * kv_heads, D)
        q_norm, k_norm = getattr(self, "q_norm", None), getattr(self, "k_norm", None)
        weight, eps = None, 0.0
        if q_norm is not None and k_norm is not None:
            weight = torch.cat((q_norm.weight.expand(heads, D), k_norm.weight.expand(kv_heads, D)))
            eps = q_norm.variance_epsilon
        cos, sin = (p[0].unsqueeze(1) for p in position_embeddings)
        rotated = _NormRope.apply(qkv, weight, eps, cos, sin, heads + kv_heads)  # type: ignore[no-untyped-call]
        out = attend(rotated.view(qkv.shape[0], -1), heads, kv_heads, packed, self.scaling)
        return self.o_proj(out).unsqueeze(0), None


def _joint(x: Tensor, layers: tuple[nn.Linear, ...]) -> Tensor:
    """Several linear layers of one input as one matrix product, outputs side by side."""
    weights = [layer.weight for layer in layers]
    bias = torch.cat([layer.bias for layer in layers]) if layers[0].bias is not None else None
    joint = _whole(weights)
    if joint is None:
        return linear(x, torch.cat(weights), bias)
    out: Tensor = _Joint.apply(x, joint, bias, *weights)  # type: ignore[no-untyped-call]
    return out


@torch.no_grad()
def _lay_together(layers: Sequence[nn.Linear]) -> None:
    """Give the weights of ``layers`` one storage, one behind the other."""
    joint = torch.cat([layer.weight for layer in layers])
    for layer, rows in zip(layers, torch.split(joint, [len(layer.weight) for layer in layers]), strict=True):
        layer.weight.data = rows


def _whole(weights: Sequence[Tensor]) -> Tensor | None:
    """The matrix that the weights [R_i, C] are all rows of, in order, without gradient; None where their storage is
    not such a one any more: FSDP2 gathers each by itself.
    """
    first, at = weights[0], 0
    storage = first.untyped_storage()
    for weight in weights:
        if weight.untyped_storage().data_ptr() != storage.data_ptr() or weight.storage_offset() != at:
            return None
        at += weight.numel()
    if storage.nbytes() != at * first.element_size():
        return None
    return first.detach().as_strided((at // first.shape[1], first.shape[1]), (first.shape[1], 1))


def fuse(model: nn.Module) -> nn.Module:
    """Change the known modules of ``model`` in place; see the file's head for when this is right."""
    for parameter in model.parameters():  # or what was mapped of a file stays in memory beside the weights moved below
        parameter.data = parameter.data.clone()
    for module in model.modules():
        kind = type(module)
        for names, fused in ((NORMS, _FusedNorm), (MLPS, _FusedMlp), (ATTENTIONS, _FusedAttention)):
            if kind.__name__ in names and _fits(module) and _is_plain(module):
                module.__class__ = type(f"Fused{kind.__name__}", (fused, kind), {})
        for part in JOINT:
            if isinstance(module, _FusedAttention | _FusedMlp) and hasattr(module, part[0]):
                _lay_together([getattr(module, name) for name in part])
    return model


JOINT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers of one input, whose products are one here."""


def _is_plain(module: nn.Module) -> bool:
    """Whether its joint layers are linear ones: an adapter's wrapping would be passed by."""
    layers = (getattr(module, name, None) for part in JOINT for name in part)
    return all(type(layer) is nn.Linear for layer in layers if layer is not None)


def _fits(module: nn.Module) -> bool:
    """SwiGLU only with SiLU; Llama's tensor-parallel pretraining and the like have other forwards."""
    config = getattr(module, "config", None)
    return getattr(config, "hidden_act", "silu") == "silu"
