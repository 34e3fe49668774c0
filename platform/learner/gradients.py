"""All gradients of a module in one block of memory, from an update's first backward to its end.

    backward ── a parameter's gradient ──► its place in the block ◄── p.grad, which later micro-batches add to

On a CPU, gradients that lie where the allocator put them, between activations that come and go, leave holes that no
activation of the next micro-batch fits into: a tenth of the learner's memory on a model of 135M parameters. A block is
given back to the system whole.

Invariant: gradients keep their bits, and a parameter that has none keeps None.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_ALIGNED = 16
"""Elements: 64 bytes of float32."""


class GradientBlock:
    """Moves the gradient of each of ``parameters`` (one dtype) into one block as soon as backward has made it."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._starts: dict[nn.Parameter, int] = {}
        self._size = 0
        for parameter in parameters:
            self._starts[parameter] = self._size
            self._size += -(-parameter.numel() // _ALIGNED) * _ALIGNED
            parameter.register_post_accumulate_grad_hook(self._take)  # type: ignore[no-untyped-call]
        self._block: Tensor | None = None
        self._taken = set[nn.Parameter]()

    def release(self) -> None:
        """Let the block go, where ``p.grad`` has: the next backward begins another."""
        self._block = None
        self._taken.clear()

    def _take(self, parameter: Tensor) -> None:
        if parameter in self._taken:
            return
        assert isinstance(parameter, nn.Parameter)
        assert parameter.grad is not None
        if self._block is None:
            self._block = torch.empty(self._size, dtype=parameter.dtype, device=parameter.device)
        start = self._starts[parameter]
        place = self._block[start : start + parameter.numel()].view_as(parameter)
        parameter.grad = place.copy_(parameter.grad)
        self._taken.add(parameter)
