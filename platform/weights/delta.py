"""What changed between two versions, as tensors that a safetensors file can hold.

    Changes.take(name, begin, piece) ── of every piece, in any order ──► Changes.parts() ──► apply(held, parts)

An unchanged tensor takes nothing; a changed one takes the cheaper of whole (``NAME``) and the sum of

    NAME::bits or NAME::gaps   which elements: a bit each, or the gaps between them in 8, 16 or 32 bits
    NAME::steps                by how much their bits went up or down as integers, in half their width
    NAME::values               the new elements whose step does not fit (it reads _LEAST)

Steps are small where learning rates are: of bfloat16 nearly all fit 8 bits, where the elements take 16. Elements are
compared by their bits: NaN equals itself, and −0 differs from 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from offtrail.platform.weights.files import Bytes, WeightsError, as_bytes

Words = npt.NDArray[Any]
Positions = npt.NDArray[np.int64]

_WORDS: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_SIGNED: dict[int, Any] = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
_STEPS: dict[int, Any] = {1: np.int8, 2: np.int8, 4: np.int16, 8: np.int32}


class _Piece(NamedTuple):
    """What changed in one piece: its first element, a bit for each, steps of the changed, values that do not fit."""

    begin: int
    bits: Bytes
    steps: Words
    values: Words


class Changes:
    """Compares the pieces of a version with ``held``, the one before, and makes ``held`` the new one."""

    def __init__(self, held: Mapping[str, Tensor]) -> None:
        self.held = held
        self._found: dict[str, list[_Piece]] = {name: [] for name in held}

    def take(self, name: str, begin: int, piece: Bytes) -> None:
        """Bytes from ``begin`` on of a tensor. Called by several threads, for different pieces."""
        width = self.held[name].itemsize
        first, new = begin // width, piece.view(_WORDS[width])
        old = _words(self.held[name])[first : first + len(new)]
        changed = new != old
        if changed.any():
            now = new[changed]
            steps, fits = _steps(now, old[changed])
            self._found[name].append(_Piece(first, np.packbits(changed), steps, now[~fits]))
            old[:] = new

    def parts(self) -> dict[str, Tensor]:
        """The changes, once every piece was taken."""
        found: dict[str, Tensor] = {}
        for name, pieces in self._found.items():
            if pieces:
                found |= _cheapest(name, self.held[name], sorted(pieces, key=lambda piece: piece.begin))
        return found


def apply(held: Mapping[str, Tensor], parts: Mapping[str, Tensor]) -> None:
    """Make ``held`` the version that ``parts`` lead to. Raises WeightsError where they are not made for it."""
    for part in parts:
        name, _, kind = part.partition("::")
        if name not in held:
            raise WeightsError(f"a change of {name}, which the version before does not have")
        if not kind:
            held[name].copy_(parts[part])
        elif kind in ("bits", "gaps"):
            _step(name, held[name], _POSITIONS[kind](parts[part].numpy()), parts)


def _step(name: str, tensor: Tensor, where: Positions, parts: Mapping[str, Tensor]) -> None:
    words, width = _words(tensor), tensor.itemsize
    steps, values = parts[f"{name}::steps"].numpy(), parts[f"{name}::values"].numpy()
    if len(where) != len(steps) or (len(where) and where[-1] >= len(words)):
        raise WeightsError(f"{len(steps)} changes at {len(where)} places of {name}, which has {len(words)} elements")
    words[where] += steps.astype(_SIGNED[width]).view(_WORDS[width])
    words[where[steps == _least(width)]] = values.view(_WORDS[width])


def _steps(new: Words, old: Words) -> tuple[Words, npt.NDArray[np.bool_]]:
    """Differences modulo the word in half its width, and which of them fit."""
    width = new.itemsize
    steps = (new - old).view(_SIGNED[width])
    limit = -_least(width)
    fits = (steps > -limit) & (steps < limit)
    return np.where(fits, steps, -limit).astype(_STEPS[width]), fits


def _least(width: int) -> int:
    return int(np.iinfo(_STEPS[width]).min)


def _cheapest(name: str, tensor: Tensor, pieces: list[_Piece]) -> dict[str, Tensor]:
    steps, values = (np.concatenate([piece[i] for piece in pieces]) for i in (2, 3))
    bits = np.zeros((tensor.numel() + 7) // 8, np.uint8)
    for piece in pieces:  # all but a tensor's last piece hold a multiple of eight elements
        bits[piece.begin // 8 :][: len(piece.bits)] = piece.bits
    room = tensor.nbytes - steps.nbytes - values.nbytes
    kind, where = "bits", bits
    if len(steps) < len(bits):  # a gap takes a byte at least
        gaps = _gaps(np.flatnonzero(np.unpackbits(bits)))
        if gaps.nbytes < bits.nbytes:
            kind, where = "gaps", gaps
    if where.nbytes >= room:
        return {name: tensor}
    found = {kind: where, "steps": steps, "values": values.view(_SIGNED[tensor.itemsize])}
    return {f"{name}::{part}": torch.from_numpy(array) for part, array in found.items()}


def _gaps(where: Positions) -> Words:
    """Unchanged elements before each changed one, in the narrowest form.

    The largest word stands for so many unchanged elements and goes on: 300 in 8 bits is 255, 45.
    """
    gaps = np.diff(where, prepend=-1) - 1
    widths = {w: w * (len(gaps) + int((gaps // np.iinfo(_WORDS[w]).max).sum())) for w in (1, 2, 4)}
    width = min(widths, key=lambda w: widths[w])
    most = np.iinfo(_WORDS[width]).max
    long, rest = np.divmod(gaps, most)
    found = np.full(widths[width] // width, most, _WORDS[width])
    found[np.cumsum(long + 1) - 1] = rest
    return found


def _from_gaps(gaps: Words) -> Positions:
    ends = gaps != np.iinfo(gaps.dtype).max
    found: Positions = (np.cumsum(gaps.astype(np.int64) + ends) - 1)[ends]
    return found


def _from_bits(bits: Bytes) -> Positions:
    return np.flatnonzero(np.unpackbits(bits))


_POSITIONS = {"bits": _from_bits, "gaps": _from_gaps}


def _words(tensor: Tensor) -> Words:
    """The elements' bits as unsigned integers [n]."""
    return as_bytes(tensor).view(_WORDS[tensor.itemsize])
