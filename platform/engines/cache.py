"""Keys and values of the running samples, one slot each, and attention over the slots in use.

Invariants: the running samples hold slots 0…n−1; a slot's columns 0…length−2 hold the keys and values of its tokens but
the last, which the next decode step feeds. Columns past that hold finite leftovers and are masked. The cache is as
large as the samples that ran so far and their tokens made it (``reserve``), slots times columns: ``most_tokens`` at
most, or what one sample that is longer needs.
Legend: S slots, L columns (positions), n running, H query heads, K key/value heads, D head size, R = H/K.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from offtrail.core.types import Int32
from offtrail.platform.engines.decoder import Attend
from offtrail.platform.engines.spec import Spec

Int64 = npt.NDArray[np.int64]
_COLUMN_STEP = 8
"""Attention spans are rounded up to this: fewer distinct shapes, aligned rows."""
_GROWTH = 1.25
"""What is too small grows by this or to what is needed, whichever is more: a token is copied four times on average."""


class KVCache:
    """Keys and values of all layers, one tensor [2, S, K, L, D] each, empty until ``reserve``; S and L grow up to
    ``slots`` and ``max_length``, and in all to ``megabytes`` MiB.
    """

    def __init__(
        self, spec: Spec, slots: int, max_length: int, megabytes: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._most = slots, _stepped(max_length)
        self._kv_heads, self._scale = spec.kv_heads, spec.head_size**-0.5
        self._dtype, self._device = dtype, device
        self._empty = torch.zeros((2, 0, spec.kv_heads, 0, spec.head_size), dtype=dtype, device=device)
        self._count = spec.layers
        token_bytes = 2 * spec.layers * spec.kv_heads * spec.head_size * dtype.itemsize
        self.most_tokens = (megabytes << 20) // token_bytes
        """Slots times columns that fit."""
        self._batched_products = device.type == "cpu" and dtype == torch.float32
        self.release()

    def release(self) -> None:
        """Give everything back."""
        self.slots = self.columns = 0
        self.layers = [self._empty] * self._count
        self._index()

    @property
    def bytes(self) -> int:
        """What the cache holds now."""
        return sum(layer.nbytes for layer in self.layers)

    def fitting(self, length: int) -> int:
        """How many samples fit that may become so many tokens long; one always does."""
        return max(1, self.most_tokens // _stepped(length))

    def reserve(self, slots: int, columns: int) -> None:
        """Hold so many at least, and keep what is there of them: slots and columns beyond may go where there is no
        room for both. Plans, rows and biases made before are void when the size changes.

        One layer is copied after the other, so that no more than one is there twice. MemoryError, with the size and
        the keys, where they do not fit.
        """
        if slots <= self.slots and columns <= self.columns:
            return
        slots, columns = self._shape(slots, _stepped(columns))
        for i, old in enumerate(self.layers):
            shape = (2, slots, self._kv_heads, columns, old.shape[4])
            try:
                new = torch.zeros(shape, dtype=self._dtype, device=self._device)
            except RuntimeError as error:
                gib = len(self.layers) * np.prod(shape, dtype=np.int64) * self._dtype.itemsize / 2**30
                raise MemoryError(
                    f"the KV cache of {slots} samples x {columns} tokens needs {gib:.1f} GiB; "
                    f"lower engine.kv_cache_mb, engine.max_running, batch.group_size or model.max_length"
                ) from error
            new[:, : self.slots, :, : self.columns] = old[:, :slots, :, :columns]
            self.layers[i] = new
            self._rows[i] = self._empty  # not a view that would keep the old one
            del old
        self.slots, self.columns = slots, columns
        self._index()

    def _shape(self, slots: int, columns: int) -> tuple[int, int]:
        """The next size for what is needed: what is held is kept and grows as far as there is room, slots first."""
        most_slots = min(_grown(self.slots, slots), self._most[0])
        most_columns = min(_stepped(_grown(self.columns, columns)), self._most[1])
        slots = max(slots, min(most_slots, self.most_tokens // columns))
        room = self.most_tokens // slots // _COLUMN_STEP * _COLUMN_STEP
        return slots, max(columns, min(most_columns, room))

    def _index(self) -> None:
        self._rows = [layer.flatten(0, 3) for layer in self.layers]
        first = np.arange(2 * self.slots * self._kv_heads).reshape(2, self.slots, self._kv_heads) * self.columns
        self._first_row = np.concatenate(first, axis=1)
        self._column = torch.arange(self.columns, device=self._device, dtype=torch.float32)

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Keys and values [m, K, T, D] into the first T columns of ``slots`` [m]."""
        T = keys.shape[2]
        for side, new in zip(self.layers[layer], (keys, values), strict=True):
            side[:, :, :T].index_copy_(0, slots, new)

    def move(self, source: Int64, target: Int64, length: int) -> None:
        """Copy the first ``length`` columns of slots ``source`` to slots ``target`` (disjoint)."""
        self._check(int(max(source.max(), target.max())) + 1, length)
        from_slots, to_slots = self.to_device(source), self.to_device(target)
        for layer in self.layers:
            used = layer[:, :, :, :length]
            used[:, to_slots] = used[:, from_slots]

    def copy_out(self, slot: int, length: int) -> Tensor:
        """A copy of the first ``length`` columns of a slot, [layers, 2, K, length, D]."""
        self._check(slot + 1, length)
        return torch.stack([layer[:, slot, :, :length] for layer in self.layers])

    def copy_in(self, start: int, stop: int, kept: Tensor) -> None:
        """What ``copy_out`` gave, into each of slots ``start``…``stop`` − 1."""
        self._check(stop, kept.shape[3])
        for layer, one in zip(self.layers, kept, strict=True):
            layer[:, start:stop, :, : kept.shape[3]] = one.unsqueeze(1)

    def _check(self, slots: int, columns: int) -> None:
        """Trap: torch cuts a slice that reaches too far, and a row past a slot's columns is the next slot's."""
        if slots > self.slots or columns > self.columns:
            raise IndexError(
                f"{slots} slots x {columns} columns of the KV cache are used and {self.slots} x {self.columns} reserved"
            )

    def decode_plan(self, positions: Int64) -> DecodePlan:
        """What a decode step of slots 0…n−1 at ``positions`` [n] needs in every layer."""
        n, span = len(positions), _stepped(int(positions.max()) + 1)
        bias = self.bias(np.repeat(positions, self._kv_heads), span).unsqueeze(1)
        return DecodePlan(self, n, span, self.rows(np.arange(n), positions), bias)

    def rows(self, slots: Int64, columns: Int64) -> Tensor:
        """Where a token's keys and values stand among all rows [D] of a layer: [N, 2K] for N (slot, column) pairs."""
        self._check(int(slots.max()) + 1, int(columns.max()) + 1)
        return self.to_device(self._first_row[slots] + columns[:, None])

    def bias(self, positions: Int64, span: int) -> Tensor:
        """What is added to the attention weights [N, span] of tokens at ``positions``: on the columns after, what no
        weight makes up for, −3·10³⁸ or −inf.
        """
        last = self.to_device(positions.astype(np.float32))
        behind = (last[:, None] - self._column[:span]).clamp_(max=0)
        return behind.mul_(torch.finfo(self._dtype).max).to(self._dtype)

    def put(self, layer: int, rows: Tensor, kv: Tensor) -> None:
        """Keys and then values [N, 2K, D] into ``rows`` [N, 2K]."""
        self._rows[layer].index_put_((rows,), kv)

    def to_device(self, array: npt.NDArray[Any]) -> Tensor:
        """The array as a tensor beside the cache; on a CPU it shares the array's memory."""
        return torch.from_numpy(array).to(self._device)

    def append_and_attend(self, plan: DecodePlan, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        """Store one token's keys and values [n, 2K, D] a slot, and attend with q [n, H, D] → [n, H·D]."""
        self.put(layer, plan.rows, kv)
        n, span, K = plan.running, plan.span, self._kv_heads
        keys, values = self.layers[layer][:, :n, :, :span]
        queries = q.reshape(n * K, -1, q.shape[2])  # the R query heads of one key/value head as R queries
        if self._batched_products:  # about a third faster than the fused CPU kernel at one query a sample
            weights = torch.baddbmm(plan.bias, queries, keys.flatten(0, 1).transpose(1, 2), alpha=self._scale)
            return torch.bmm(torch.softmax(weights, -1), values.flatten(0, 1)).view(n, -1)
        bias = plan.bias.view(n, K, 1, span)
        queries = queries.view(n, K, -1, q.shape[2])
        return F.scaled_dot_product_attention(queries, keys, values, bias, scale=self._scale).reshape(n, -1)


def _grown(held: int, needed: int) -> int:
    """The size after ``held``, which is never less."""
    return held if needed <= held else max(needed, int(held * _GROWTH))


def _stepped(columns: int) -> int:
    """Rounded up to _COLUMN_STEP."""
    return -(-columns // _COLUMN_STEP) * _COLUMN_STEP


class DecodePlan:
    """The attention of one decode step: indices and mask are built once and used by every layer."""

    __slots__ = ("bias", "cache", "rows", "running", "span")

    def __init__(self, cache: KVCache, running: int, span: int, rows: Tensor, bias: Tensor) -> None:
        self.cache, self.running, self.span, self.rows, self.bias = cache, running, span, rows, bias

    def __call__(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        """``decoder.Attend``: [n, H·D] for the n running samples."""
        return self.cache.append_and_attend(self, layer, q, kv)


class Sequences:
    """The attention of m whole sequences, laid flat and padded right to T tokens each.

    No real token ever sees the padding on its right, and what padding tokens compute is never read.
    ``tokens`` and ``positions`` are [m·T].
    """

    __slots__ = ("count", "positions", "tokens", "width")

    def __init__(self, sequences: Sequence[Int32]) -> None:
        self.count, self.width = len(sequences), max(map(len, sequences))
        padded = np.zeros((self.count, self.width), np.int32)
        for row, tokens in zip(padded, sequences, strict=True):
            row[: len(tokens)] = tokens
        self.tokens = padded.ravel()
        self.positions = np.tile(np.arange(self.width), self.count)

    def split(self, x: Tensor) -> Tensor:
        """[m·T, heads, D] → [m, heads, T, D]."""
        return x.view(self.count, self.width, *x.shape[1:]).transpose(1, 2)

    def __call__(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        """``decoder.Attend``: [m·T, H·D]."""
        q, (k, v) = self.split(q), self.split(kv).chunk(2, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2).reshape(self.count * self.width, -1)


class Prefill(Sequences):
    """Whole sequences whose keys and values go to the cache, each into all of its slots; their hidden states are of no
    use, so that the last layer ends at its keys and values.
    """

    __slots__ = ("_cache", "_layers", "_source", "_target")

    def __init__(self, cache: KVCache, sequences: Sequence[Int32], slots: Sequence[Int64]) -> None:
        super().__init__(sequences)
        self._cache, self._layers = cache, len(cache.layers)
        self._source = cache.to_device(np.repeat(np.arange(len(slots)), [len(rows) for rows in slots]))
        self._target = cache.to_device(np.concatenate(slots))

    def __call__(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        """``decoder.Attend``: [m·T, H·D], and [0, H·D] in the last layer."""
        keys, values = self.split(kv).index_select(0, self._source).chunk(2, dim=1)
        self._cache.write(layer, self._target, keys, values)
        return q[:0].flatten(1) if layer == self._layers - 1 else super().__call__(layer, q, kv)


class Continuation(Sequences):
    """The rest of m sequences whose first ``starts`` tokens are in ``slots`` already: their keys and values join those.

    Padding ends at the last column, which is reserved beyond every sample's newest token: nobody attends to it.
    """

    __slots__ = ("_bias", "_cache", "_rows", "_slots", "_span")

    def __init__(self, cache: KVCache, sequences: Sequence[Int32], slots: Int64, starts: Int64) -> None:
        super().__init__(sequences)
        columns = np.minimum(starts[:, None] + np.arange(self.width), cache.columns - 1)
        self.positions = columns.ravel()
        self._cache, self._slots, self._span = cache, cache.to_device(slots), int(columns.max()) + 1
        self._rows = cache.rows(np.repeat(slots, self.width), self.positions)
        self._bias = cache.bias(self.positions, self._span).view(self.count, 1, self.width, self._span)

    def __call__(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        """``decoder.Attend``: [m·T, H·D], and [0, H·D] in the last layer."""
        self._cache.put(layer, self._rows, kv)
        if layer == len(self._cache.layers) - 1:
            return q[:0].flatten(1)
        span = self._cache.layers[layer][:, :, :, : self._span]
        keys, values = span[:, self._slots]  # index_select would copy every slot first
        out = F.scaled_dot_product_attention(self.split(q), keys, values, self._bias, enable_gqa=True)
        return out.transpose(1, 2).reshape(self.count * self.width, -1)


def joined(first: Prefill | Continuation, decode: DecodePlan) -> Attend:
    """One pass over the tokens of ``first`` and then a decode step's. The step's slots may be those that are filled
    here: each layer's keys and values are in the cache before the step attends to them.
    """
    rows = len(first.tokens)

    def attend(layer: int, q: Tensor, kv: Tensor) -> Tensor:
        ahead = first(layer, q[:rows], kv[:rows])
        return torch.cat((ahead, decode(layer, q[rows:], kv[rows:])))

    return attend
