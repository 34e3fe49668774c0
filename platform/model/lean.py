"""Tensors that a backward needs and an elementwise pass gives again: made again there, not kept from the forward.

    with keeping_less(): h = norm(x); again(h, make) ──► linear(h) ──► its graph holds ``make`` in place of h
                                                                        └──► its backward calls ``make``

So is what autocast rounds to bfloat16: the weights, which would else be kept beside the float32 ones, and outputs of
norms, of which each layer that reads one would keep a copy of its own. ``lean(model)`` does so in transformers' RMS
norms and SwiGLU layers, for bfloat16 on a CPU, where those stay as they are; fused.py and attention.py do it by
themselves.

Invariant: what is made again has the same bits, so that nothing else changes.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

NORMS = ("LlamaRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")
MLPS = ("LlamaMLP", "Qwen2MLP", "Qwen3MLP")

Make = Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class _Again:
    make: Make
    shape: torch.Size


_known: dict[int, tuple[weakref.ref[Tensor], Make]] | None = None
"""By address, inside ``keeping_less``. A tensor that is gone has left its address to another."""
_by_node: dict[Any, Make] = {}
"""The same by the node of the graph that made it, which its rounded copies refer to."""


@contextlib.contextmanager
def keeping_less() -> Iterator[None]:
    """Operations inside keep nothing for their backward that can be made again. Not for layers that are checkpointed,
    which keep nothing at all.
    """
    global _known
    _known = {}
    try:
        with saved_tensors_hooks(_pack, _unpack):
            yield
    finally:
        _known = None
        _by_node.clear()


def again(tensor: Tensor, make: Make) -> Tensor:
    """``tensor``, which ``make`` gives again, and views of all of it. What ``make`` refers to is kept: it must be
    detached, and kept by others anyway.
    """
    if _known is not None:
        _known[tensor.data_ptr()] = weakref.ref(tensor), make
        if tensor.grad_fn is not None:
            _by_node[tensor.grad_fn] = make
    return tensor


def _pack(saved: Tensor) -> Tensor | _Again:
    assert _known is not None
    found, make = _known.get(saved.data_ptr(), (None, None))
    tensor = found() if found is not None else None
    if make and tensor is not None and _same(saved, tensor):
        return _Again(make, saved.shape)
    rounded = _rounded_again(saved) if saved.dtype == torch.bfloat16 else None
    return saved if rounded is None else _Again(rounded, saved.shape)


def _same(saved: Tensor, tensor: Tensor) -> bool:
    """Whether two tensors at one address are one. Trap: a part begins there, too, and a transpose is even as large."""
    return saved.nbytes == tensor.nbytes and saved.is_contiguous() and tensor.is_contiguous()


def _unpack(saved: Tensor | _Again) -> Tensor:
    if not isinstance(saved, _Again):
        return saved
    made = saved.make()
    return made if made.shape == saved.shape else made.view(saved.shape)


def _rounded_again(saved: Tensor) -> Make | None:
    """How to round again what autocast has rounded: a parameter, transposed where ``saved`` is, or a tensor that
    ``again`` knows.
    """
    node: Any = saved.grad_fn
    seen_as = node.name() if node is not None else ""
    if seen_as in ("TBackward0", "ViewBackward0"):
        node = node.next_functions[0][0]
    if node is None or node.name() != "ToCopyBackward0":
        return None
    source, dtype = node.next_functions[0][0], saved.dtype
    parameter = getattr(source, "variable", None)
    if isinstance(parameter, nn.Parameter):
        whole = parameter.detach()
        return lambda: whole.to(dtype).t() if seen_as == "TBackward0" else whole.to(dtype)
    make = _by_node.get(source)
    return None if make is None or seen_as == "TBackward0" else lambda: make().to(dtype)


class _LeanNorm:
    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.to(torch.float32)
        r = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        kept_x, kept_r = x.detach(), r.detach()
        n = again(x * r, lambda: kept_x * kept_r)
        weight, dtype = self.weight.detach(), hidden_states.dtype
        return again(self.weight * n.to(dtype), lambda: weight * (kept_x * kept_r).to(dtype))


class _LeanMlp:
    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear
    act_fn: Callable[[Tensor], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        kept_gate, kept_up = gate.detach(), up.detach()
        acted = again(self.act_fn(gate), lambda: self.act_fn(kept_gate))
        inner = again(acted * up, lambda: self.act_fn(kept_gate) * kept_up)
        del acted
        out: Tensor = self.down_proj(inner)
        return out


def lean(model: nn.Module) -> nn.Module:
    """Change the known modules of ``model`` in place."""
    for module in model.modules():
        kind = type(module)
        for names, changed in ((NORMS, _LeanNorm), (MLPS, _LeanMlp)):
            if kind.__name__ in names:
                module.__class__ = type(f"Lean{kind.__name__}", (changed, kind), {})
    return model
