"""The language-model head: log-probability, entropy and exact KL of each token, without [tokens, vocabulary].

policy.py calls ``token_logprobs`` (scores first, loss later) or ``loss_in_head`` (scores, loss and gradient piece by
piece). With h [M, H] hidden states, W [V, H] and temperatures τ, z = (hWᵀ + b)/τ, p = softmax(z), lse = logsumexp(z):

    log-probability  z[target] − lse         entropy  S = −Σ p log p         KL(π‖ref) = Σ p (log p − log q)
    d z = p·(−g − g_S·(log p + S) + g_K·(log p − log q − KL)) + g at the target,  d h = (d z/τ) W,  d W = (d z/τ)ᵀ h

With a soft cap c the logits are y = c·tanh((hWᵀ + b)/c) and z = y/τ, and the gradient is multiplied by 1 − (y/c)².

A piece whose logits fit in ``elements`` is one product whose log-probabilities are kept for the gradient: 6MHV
operations. A larger one passes over tiles of the vocabulary (running maximum and sums), and once more for the
gradient: 8MHV, but each part of d W is one product over all M rows, so that nothing is summed over tiles.

Invariants: at most ``elements`` logits (a reference's as many, a soft cap's slopes as many) exist at a time; logits,
log-sum-exp and all sums are float32 or wider, and a sum over pieces is never in bfloat16, whose rounding triples the
gradient's error; the cut into pieces and tiles moves results by rounding only.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

CPU_ELEMENTS, GPU_ELEMENTS = 1 << 25, 1 << 28
"""Logits held at a time, at least: 128 MiB and 1 GiB in float32."""
PIECE_ROWS = 512
"""From so many rows on, a piece's products hide the cost of adding to the weight's gradient."""
TILE = 1 << 22
"""… and per tile on a CPU, so that the passes over it stay in the cache."""
BLOCK = 1 << 20
"""Logits per softmax call on a CPU, for the same reason."""
TILE_COLUMNS = 512
"""Narrower tiles make thin, slow products."""


@dataclass(frozen=True)
class Head:
    """``weight`` [V, H], ``bias`` [V] or None. Products are taken in ``products``, float32 or bfloat16, summed in
    float32. ``cap``: the logits stay within ±cap (0: as they are).
    """

    weight: Tensor
    bias: Tensor | None = None
    products: torch.dtype = torch.float32
    cap: float = 0.0


@dataclass(frozen=True)
class Reference:
    """What the exact KL compares with: ``hidden`` [M, H'] of the same M tokens, and that model's head over the same
    vocabulary. No gradient reaches it.
    """

    hidden: Tensor
    head: Head


class TokenOutputs(NamedTuple):
    """Float32 [M] each, all differentiable; ``kl`` only with a reference."""

    logprobs: Tensor
    entropy: Tensor
    kl: Tensor | None = None


LossOf = Callable[[slice, TokenOutputs], Tensor]
"""A piece's rows (of M) and their scores → its part of the loss, a scalar; parts add up."""


def token_logprobs(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    inverse_temperature: Tensor | None = None,
    *,
    reference: Reference | None = None,
    elements: int | None = None,
) -> TokenOutputs:
    """What the head says of ``targets`` [M] from ``hidden`` [M, H]; ``inverse_temperature`` [M, 1] divides both models'
    logits.

    Raises ValueError where the reference's vocabulary is another. A row whose gradients are all zero (no advantage, a
    clipped ratio) costs nothing in backward.
    """
    _check(head, reference)
    rest = (head, targets, inverse_temperature, reference, elements or default_elements(head.weight))
    out = _TokenLogprobs.apply(hidden, head.weight, head.bias, *rest)  # type: ignore[no-untyped-call]
    return TokenOutputs(*out)


def loss_in_head(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    loss: LossOf,
    inverse_temperature: Tensor | None = None,
    *,
    pieces: Sequence[slice],
    reference: Reference | None = None,
    elements: int | None = None,
) -> tuple[Tensor, TokenOutputs]:
    """The sum of ``loss`` over ``pieces``, which cut the M rows in order, and the scores without gradient.

    Each piece's gradient is taken while its logits are still there: 6MHV operations where ``token_logprobs`` and a
    loss behind it take 8MHV. Two derivatives at once: the gradient exists before backward is called, which scales it.
    """
    _check(head, reference)
    limit = elements or default_elements(head.weight)
    rest = (head, targets, loss, inverse_temperature, list(pieces), reference, limit)
    total, *scores = _LossInHead.apply(hidden, head.weight, head.bias, *rest)  # type: ignore[no-untyped-call]
    return total, TokenOutputs(*scores)


def default_elements(weight: Tensor) -> int:
    """Logits that may exist at a time: half as many as the head has weights, whose gradient exists anyway, or the
    floor for its device.
    """
    return max(CPU_ELEMENTS if weight.device.type == "cpu" else GPU_ELEMENTS, weight.numel() // 2)


def pieces(lengths: Sequence[int], vocabulary: int, elements: int) -> list[slice]:
    """Cut the rows of consecutive samples into pieces of whole samples, of at most ``elements`` logits each.

    A sample above that is a piece of its own; no rows are one empty piece. Short samples share a piece only as long as
    that makes its products faster.
    """
    elements = min(elements, max(elements // 8, PIECE_ROWS * vocabulary))
    cuts, end = [0], 0
    for length in lengths:
        if end > cuts[-1] and (end + length - cuts[-1]) * vocabulary > elements:
            cuts.append(end)
        end += length
    cuts.append(end)
    return [slice(a, b) for a, b in itertools.pairwise(cuts)]


def _check(head: Head, reference: Reference | None) -> None:
    if reference is not None and len(reference.head.weight) != len(head.weight):
        raise ValueError(
            f"the reference's vocabulary has {len(reference.head.weight)} entries, the policy's {len(head.weight)}: "
            "an exact KL needs the same tokenizer and the same padding of the embedding"
        )


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        targets: Tensor,
        inverse_temperature: Tensor | None,
        reference: Reference | None,
        elements: int,
    ) -> tuple[Tensor, ...]:
        piece = _Piece(hidden, head, targets, inverse_temperature, reference, elements, keep=any(ctx.needs_input_grad))
        # Detached: an output that the node itself holds would be a cycle, and memory that only gc frees.
        scores = tuple(s.detach() for s in piece.outputs() if s is not None)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, piece.logp, piece.logq)
        piece.logp = piece.logq = None
        ctx.piece = piece
        return scores

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, ctx.piece.logp, ctx.piece.logq = ctx.saved_tensors
        sums = _Gradients(hidden, weight, bias, ctx.needs_input_grad, pieces=1)
        g, g_entropy, g_kl = (*grads, None)[:3]
        ctx.piece.add_gradients(sums, slice(None), g, g_entropy, g_kl, scratch=False)
        ctx.piece.logp = ctx.piece.logq = None
        return *sums.cast(), None, None, None, None, None


class _LossInHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        targets: Tensor,
        loss: LossOf,
        inverse_temperature: Tensor | None,
        pieces: list[slice],
        reference: Reference | None,
        elements: int,
    ) -> tuple[Tensor, ...]:
        sums = _Gradients(hidden, weight, bias, ctx.needs_input_grad, pieces=len(pieces))
        total = torch.zeros((), device=hidden.device)
        found: list[TokenOutputs] = []
        scratch = _Scratch()
        for rows in pieces:
            at = None if inverse_temperature is None else inverse_temperature[rows]
            ref = None if reference is None else Reference(reference.hidden[rows], reference.head)
            piece = _Piece(hidden[rows], head, targets[rows], at, ref, elements, keep=True, scratch=scratch)
            scores = piece.outputs()
            leaves = [s.detach().requires_grad_() for s in scores if s is not None]
            with torch.enable_grad():
                part = loss(rows, TokenOutputs(*leaves))
                grads = torch.autograd.grad(part, leaves, allow_unused=True) if part.requires_grad else (None, None)
            piece.add_gradients(sums, rows, *grads, scratch=True)
            total += part.detach()
            found.append(scores)
        ctx.save_for_backward(*sums.cast())
        out = [torch.cat(s) for s in zip(*([s for s in f if s is not None] for f in found), strict=True)]
        ctx.mark_non_differentiable(*out)
        return total, *out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        made = ctx.saved_tensors
        scale = float(grads[0])
        scaled = made if scale == 1.0 else [None if d is None else d * grads[0].to(d.dtype) for d in made]
        return *scaled, None, None, None, None, None, None, None


class _Scratch:
    """Float32 buffers that pieces use again: on a CPU the first touch of memory costs more than the arithmetic."""

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}

    def take(self, name: str, rows: int, columns: int, device: torch.device) -> Tensor:
        size = rows * columns
        if name not in self.buffers or self.buffers[name].numel() < size:
            self.buffers[name] = torch.empty(size, device=device)
        return self.buffers[name][:size].view(rows, columns)


class _Gradients:
    """d hidden, d weight and d bias of all pieces; sums over several pieces are float32."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: Sequence[bool], *, pieces: int
    ) -> None:
        self.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        exact = torch.float32 if pieces > 1 else weight.dtype
        empty = pieces == 0 or not len(hidden)
        make = torch.zeros if empty else torch.empty
        self.hidden = torch.empty(hidden.shape, device=hidden.device) if needed[0] else None
        self.weight = make(weight.shape, dtype=exact, device=weight.device) if needed[1] else None
        self.bias = None if bias is None or not needed[2] else torch.zeros(len(bias), device=bias.device)
        self.fresh = True
        """Nothing stands in ``weight`` yet: the first piece writes, the others add."""

    def add_weight(self, columns: slice, d_z: Tensor, hidden: Tensor, products: torch.dtype) -> None:
        """The gradient of these columns of the vocabulary += d zᵀ h."""
        if self.bias is not None:
            self.bias[columns] += d_z.sum(0)
        if self.weight is None:
            return
        into = self.weight[columns]
        if products == torch.float32 and into.dtype == torch.float32:
            into.addmm_(d_z.T, hidden, beta=0 if self.fresh else 1)
        elif self.fresh:
            into.copy_(_product(d_z.T, hidden, products))
        else:
            into.add_(_product(d_z.T, hidden, products))

    def cast(self) -> list[Tensor | None]:
        """In the dtypes of what they are gradients of."""
        made = (self.hidden, self.weight, self.bias)
        return [None if d is None else d.to(dtype) for d, dtype in zip(made, self.dtypes, strict=True)]


class _Piece:
    """Rows that are scored together: all logits at once where they fit in ``elements``, else by vocabulary tile."""

    def __init__(
        self,
        hidden: Tensor,
        head: Head,
        targets: Tensor,
        inverse_temperature: Tensor | None,
        reference: Reference | None,
        elements: int,
        *,
        keep: bool,
        scratch: _Scratch | None = None,
    ) -> None:
        self.hidden, self.head, self.targets = hidden.detach().float(), head, targets
        self.scale, self.reference, self.keep, self.scratch = inverse_temperature, reference, keep, scratch
        self.ref_hidden = None if reference is None else reference.hidden.detach().float()
        M, self.V = len(hidden), len(head.weight)
        self.on_cpu = hidden.device.type == "cpu"
        self.whole = elements >= M * self.V
        limit = min(elements, TILE) if self.on_cpu else elements
        width = max(min(TILE_COLUMNS, elements // max(1, M)), limit // max(1, M), 1)
        self.tiles = [slice(v, min(v + width, self.V)) for v in range(0, self.V, width)]
        self.logp: Tensor | None = None
        self.logq: Tensor | None = None

    def outputs(self) -> TokenOutputs:
        """Log-probability, entropy and KL of each row."""
        if self.whole:
            return self._whole()
        return self._tiled()

    def _whole(self) -> TokenOutputs:
        logp = self._logits(self.hidden, self.head, slice(None), self.scale, "policy")
        first = logp[:, 0].clone()
        logq = None
        if self.reference is not None and self.ref_hidden is not None:
            logq = self._logits(self.ref_hidden, self.reference.head, slice(None), self.scale, "reference")
        M = len(logp)
        entropy = logp.new_empty(M)
        kl = None if logq is None else logp.new_empty(M)
        rows = max(1, BLOCK // self.V) if self.on_cpu else max(1, M)
        for start in range(0, M, rows):
            part = slice(start, start + rows)
            z = logp[part]
            z.copy_(torch.log_softmax(z, -1))
            p = z.exp()
            entropy[part] = torch.linalg.vecdot(p, z).neg_()
            if logq is not None and kl is not None:
                q = logq[part]
                q.copy_(torch.log_softmax(q, -1))
                kl[part] = torch.linalg.vecdot(p, z - q)
        logprobs = logp.gather(1, self.targets.unsqueeze(1)).squeeze(1)
        if self.keep:
            self.logp, self.logq, self.entropy, self.kl = logp, logq, entropy, kl
            self.lse = first - logp[:, 0]
        return TokenOutputs(logprobs, entropy, kl)

    def _tiled(self) -> TokenOutputs:
        """Running sums over tiles: Σe^(z−max), Σe^(z−max)·z and with a reference Σe^(z−max)·(z−z_ref)."""
        policy, other = _Running(self.hidden), _Running(self.hidden)
        picked = self.hidden.new_zeros(len(self.hidden))
        for tile in self.tiles:
            z = self._logits(self.hidden, self.head, tile, self.scale, "policy")
            local, inside = self._local(tile)
            picked = torch.where(inside, z.gather(1, local).squeeze(1), picked)
            z_ref = None
            if self.reference is not None and self.ref_hidden is not None:
                z_ref = self._logits(self.ref_hidden, self.reference.head, tile, self.scale, "reference")
            policy.add(z, z_ref)
            if z_ref is not None:
                other.add(z_ref, None)
        lse = policy.log_sum()
        entropy = (lse - policy.mean()).float()
        kl = None
        if self.reference is not None:
            # The difference of two log-sum-exps in float64: in float32 its rounding would exceed a small KL.
            kl = (policy.mean_gap() - (lse - other.log_sum())).float()
            self.lse_ref = other.log_sum().float()
        self.lse, self.entropy, self.kl = lse.float(), entropy, kl
        return TokenOutputs((picked - lse).float(), entropy, kl)

    def add_gradients(
        self,
        sums: _Gradients,
        rows: slice,
        g: Tensor | None,
        g_entropy: Tensor | None,
        g_kl: Tensor | None = None,
        *,
        scratch: bool,
    ) -> None:
        """Add this piece's gradients, given those of its scores; ``scratch``: what was kept may be overwritten."""
        M = len(self.hidden)
        given = [x for x in (g, g_entropy, g_kl) if x is not None]
        alive = torch.zeros(M, dtype=torch.bool, device=self.hidden.device)
        for x in given:
            alive |= x != 0
        live = torch.nonzero(alive).squeeze(1)
        some = len(live) < M
        pick: Callable[[Tensor], Tensor] = (lambda x: x.index_select(0, live)) if some else (lambda x: x)
        hidden = pick(self.hidden)
        place = None if sums.hidden is None else sums.hidden[rows].zero_()
        d_hidden = torch.zeros_like(hidden) if some and place is not None else place
        if len(live) or sums.fresh:
            state = _RowGradients(self, pick, g, g_entropy, g_kl)
            for tile in [slice(0, self.V)] if self.whole else self.tiles:
                logp, logq = self._logp(tile, pick, overwrite=scratch or some)
                d_z = state.logits(logp, logq, tile)
                if d_hidden is not None:
                    _add_product(d_hidden, d_z, self.head.weight[tile], self.head.products)
                sums.add_weight(tile, d_z, hidden, self.head.products)
            sums.fresh = False
        if some and place is not None and d_hidden is not None:
            place.index_copy_(0, live, d_hidden)

    def _logp(self, tile: slice, pick: Callable[[Tensor], Tensor], *, overwrite: bool) -> tuple[Tensor, Tensor | None]:
        """Both models' log-probabilities of a tile's columns, to be written over."""
        if self.whole:
            assert self.logp is not None
            logp, logq = pick(self.logp), None if self.logq is None else pick(self.logq)
            return (logp if overwrite else logp.clone()), logq
        scale = None if self.scale is None else pick(self.scale)
        logp = self._logits(pick(self.hidden), self.head, tile, scale, "policy").sub_(pick(self.lse).unsqueeze(1))
        if self.reference is None or self.ref_hidden is None:
            return logp, None
        logq = self._logits(pick(self.ref_hidden), self.reference.head, tile, scale, "reference")
        return logp, logq.sub_(pick(self.lse_ref).unsqueeze(1))

    def _local(self, tile: slice) -> tuple[Tensor, Tensor]:
        """Targets [M, 1] as columns of a tile, clamped, and which of them are in it [M]."""
        local = self.targets - tile.start
        width = tile.stop - tile.start
        return local.clamp(0, width - 1).unsqueeze(1), (local >= 0) & (local < width)

    def _logits(self, hidden: Tensor, head: Head, tile: slice, scale: Tensor | None, name: str) -> Tensor:
        weight = head.weight.detach()[tile]
        if head.products == torch.float32 and self.scratch is not None:
            into = self.scratch.take(name, len(hidden), len(weight), hidden.device)
            z = torch.mm(hidden, weight.float().T, out=into)
        else:
            z = _product(hidden, weight.T, head.products)
        if head.bias is not None:
            z.add_(head.bias.detach()[tile].float())
        if head.cap:
            z.div_(head.cap).tanh_().mul_(head.cap)
        return z if scale is None else z.mul_(scale)


class _RowGradients:
    """d z of a tile, from the gradients of its rows' scores."""

    def __init__(
        self,
        piece: _Piece,
        pick: Callable[[Tensor], Tensor],
        g: Tensor | None,
        g_entropy: Tensor | None,
        g_kl: Tensor | None,
    ) -> None:
        rows = len(piece.hidden)
        zero = piece.hidden.new_zeros(rows)
        scale = None if piece.scale is None else pick(piece.scale)
        self.piece, self.pick, self.scale = piece, pick, scale
        self.g = pick(zero if g is None else g.float()).unsqueeze(1)
        self.g_entropy = None if g_entropy is None else pick(g_entropy.float()).unsqueeze(1)
        self.g_kl = None if g_kl is None else pick(g_kl.float()).unsqueeze(1)

    def logits(self, logp: Tensor, logq: Tensor | None, tile: slice) -> Tensor:
        """The gradient of the logits (before the temperature and the cap), written over ``logp``."""
        piece, pick = self.piece, self.pick
        slope_of_cap = self._slope_of_cap(logp)
        at_target = self.g if self.scale is None else self.g * self.scale
        local, inside = piece._local(tile)
        if self.g_entropy is None and self.g_kl is None:
            d_z = logp.exp_().mul_(-at_target)
        else:
            constant, slope = -self.g, torch.zeros_like(self.g)
            if self.g_entropy is not None:
                constant = constant - self.g_entropy * pick(piece.entropy).unsqueeze(1)
                slope = slope - self.g_entropy
            if self.g_kl is not None and piece.kl is not None:
                constant = constant - self.g_kl * pick(piece.kl).unsqueeze(1)
                slope = slope + self.g_kl
            weight = torch.addcmul(constant, slope, logp)
            if self.g_kl is not None and logq is not None:
                weight.addcmul_(self.g_kl, logq, value=-1)
            d_z = logp.exp_().mul_(weight)
            if self.scale is not None:
                d_z.mul_(self.scale)
        there = torch.where(pick(inside).unsqueeze(1), at_target, torch.zeros_like(at_target))
        d_z.scatter_add_(1, pick(local), there)
        return d_z if slope_of_cap is None else d_z.mul_(slope_of_cap)

    def _slope_of_cap(self, logp: Tensor) -> Tensor | None:
        """1 − (y/cap)² of the capped logits y, which are got back from their log-probabilities."""
        if not self.piece.head.cap:
            return None
        y = logp + self.pick(self.piece.lse).unsqueeze(1)
        if self.scale is not None:
            y.div_(self.scale)
        return y.div_(self.piece.head.cap).square_().neg_().add_(1)


class _Running:
    """Sums over logits that come tile by tile, [M] each: maximum, Σe^(z−max), Σe^(z−max)·(z−max) and ·(z−other)."""

    def __init__(self, hidden: Tensor) -> None:
        M = len(hidden)
        self.top = hidden.new_full((M,), float("-inf"))
        self.sum, self.first, self.gap = (hidden.new_zeros(M, dtype=torch.float64) for _ in range(3))

    def add(self, z: Tensor, other: Tensor | None) -> None:
        """A further tile [M, C]. ``other`` is not changed, ``z`` is."""
        top = torch.maximum(self.top, z.amax(1))
        # 0 at the first tile, where the maximum was −∞ and the sums are 0.
        moved = torch.where(self.top == float("-inf"), 0.0, (self.top - top).double())
        shrink = moved.exp()
        gap = None if other is None else z - other
        z.sub_(top.unsqueeze(1))
        e = z.exp()
        self.first = shrink * (self.first + moved * self.sum) + torch.linalg.vecdot(e, z).double()
        self.sum = shrink * self.sum + e.sum(1).double()
        if gap is not None:
            self.gap = shrink * self.gap + torch.linalg.vecdot(e, gap).double()
        self.top = top

    def log_sum(self) -> Tensor:
        """Log Σ e^z, float64."""
        return self.top.double() + self.sum.log()

    def mean(self) -> Tensor:
        """Σ p z."""
        return self.top.double() + self.first / self.sum

    def mean_gap(self) -> Tensor:
        """Σ p (z − other)."""
        return self.gap / self.sum


def _product(a: Tensor, b: Tensor, products: torch.dtype) -> Tensor:
    """``a`` @ ``b`` in float32, of operands rounded to ``products`` first."""
    if products == torch.float32:
        return torch.mm(a.float(), b.float())
    a, b = a.to(products), b.to(products)
    if a.device.type == "cpu":
        return torch.mm(a.float(), b.float())  # a CPU has no such product; that of the rounded operands is the same
    out: Tensor = torch.mm(a, b, out_dtype=torch.float32)
    return out


def _add_product(into: Tensor, a: Tensor, b: Tensor, products: torch.dtype) -> None:
    """``into`` += ``a`` @ ``b``."""
    if products == torch.float32:
        into.addmm_(a, b.detach().float())
    else:
        into.add_(_product(a, b.detach(), products))
