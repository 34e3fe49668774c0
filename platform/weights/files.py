"""One version is one file: safetensors whose bytes carry a checksum. store.py names, keeps and retires the files.

    VersionFile.write ──► pieces of 512 KiB: copied, and hashed while they are in cache ──► header last
    Reading ◄── lock, header, tensors on a memory map that the reader keeps ── hashed before any is handed out

Invariants: a reader holds a shared lock on the open file for as long as it reads; a file is written only when it has no
visible name, or under the exclusive lock; a file's length never changes, so that a map of it is never cut short.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import math
import mmap
import os
import struct
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import Tensor

Bytes = npt.NDArray[np.uint8]

PIECE = 1 << 19
"""Bytes that are copied and hashed at a time; part of what ``checksum`` means."""
_SHARED = 1 << 25
"""Bytes from which a second thread pays: starting it takes about as long as copying 1 MiB."""
_PAGE, _METADATA = 4096, 2048
_NO_SEAL = "0" * 16
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64, "BOOL": torch.bool,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
}  # fmt: skip
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_LOCAL = {0x01021994: "tmpfs", 0xEF53: "ext4", 0x58465342: "xfs", 0x9123683E: "btrfs", 0x794C7630: "overlayfs"}
"""File systems of one host, by statfs's f_type: all their readers see one set of locks and one set of pages."""


class WeightsError(RuntimeError):
    """A version cannot be written, or what stands under its name is not what was published."""


class Source(NamedTuple):
    """A tensor to publish: ``flat`` [n] on the CPU, cast to ``dtype`` piece by piece; ``size``: bytes once it is cast;
    ``memory``: its bytes, where there is nothing to cast.
    """

    flat: Tensor
    dtype: torch.dtype
    shape: list[int]
    size: int
    memory: Bytes | None

    @classmethod
    def of(cls, tensor: Tensor, dtype: torch.dtype | None = None) -> Source:
        """``dtype``: of the published tensor; None = its own."""
        flat = tensor.detach().reshape(-1)
        memory = as_bytes(flat) if dtype in (None, tensor.dtype) else None
        dtype = dtype or tensor.dtype
        return cls(flat, dtype, list(tensor.shape), flat.numel() * dtype.itemsize, memory)

    def piece(self, begin: int, end: int) -> Bytes:
        """Bytes [begin, end) of the cast tensor."""
        if self.memory is not None:
            return self.memory[begin:end]
        width = self.dtype.itemsize
        return as_bytes(self.flat[begin // width : end // width].to(self.dtype))


def as_bytes(tensor: Tensor) -> Bytes:
    """The memory of a contiguous CPU tensor, [bytes]."""
    flat = tensor if tensor.dim() == 1 else tensor.view(-1)
    if flat.stride(0) != 1:  # of one element or none: any stride is contiguous then
        flat = flat.as_strided(flat.shape, (1,))
    found: Bytes = flat.view(torch.uint8).numpy()
    return found


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """32 hex digits over name, dtype, shape and bytes of each CPU tensor, in sorted order of the names: xxh3-128 over
    the xxh3-64 of their pieces of 512 KiB, so that pieces can be hashed in any order while they are in cache.
    """
    return sweep({name: Source.of(tensor) for name, tensor in tensors.items()})


def sweep(sources: Mapping[str, Source], put: Callable[[str, int, Bytes], None] | None = None) -> str:
    """The checksum of ``sources``; ``put(name, begin, piece)`` sees each piece before it is hashed.

    Two threads share the pieces of large versions where this process has two cores; ``put`` must allow that.
    """
    names = sorted(sources)
    pieces = [(name, begin) for name in names for begin in range(0, sources[name].size, PIECE)]
    hashes = np.zeros(len(pieces), np.uint64)
    jobs = iter(enumerate(pieces))

    def work() -> None:
        for place, (name, begin) in jobs:
            piece = sources[name].piece(begin, begin + PIECE)
            if put is not None:
                put(name, begin, piece)
            hashes[place] = xxhash.xxh3_64_intdigest(piece.data)

    if sum(source.size for source in sources.values()) >= _SHARED and len(os.sched_getaffinity(0)) > 1:
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(work)
            work()
            other.result()
    else:
        work()
    described = [[name, str(sources[name].dtype), sources[name].shape] for name in names]
    digest = xxhash.xxh3_128(json.dumps(described).encode())
    digest.update(hashes.data)
    return digest.hexdigest()


@dataclass(frozen=True)
class Layout:
    """Where everything stands in a file, in bytes: ``starts`` by name, data from ``start`` on, ``size`` in all;
    ``header`` as safetensors has it.
    """

    header: str
    starts: Mapping[str, int]
    start: int
    size: int

    @classmethod
    def of(cls, sources: Mapping[str, Source], metadata: Mapping[str, str]) -> Layout:
        """Wide types first, so that each tensor is aligned. Equal tensors give an equal size whatever the metadata,
        as long as it is short.
        """
        header, places, at = dict[str, Any](), dict[str, int](), 0
        for name in sorted(sources, key=lambda n: (-sources[n].dtype.itemsize, n)):
            source = sources[name]
            if source.dtype not in _CODES:
                raise WeightsError(f"{name} is of {source.dtype}, which safetensors does not have")
            places[name] = at
            offsets = [at, at := at + source.size]
            header[name] = {"dtype": _CODES[source.dtype], "shape": source.shape, "data_offsets": offsets}
        text = json.dumps(header)
        needed = 8 + len(text) + max(_METADATA, 256 + len(json.dumps(metadata)))
        start = math.ceil(needed / _PAGE) * _PAGE
        return cls(text, {name: start + place for name, place in places.items()}, start, start + at)

    def head(self, metadata: Mapping[str, str]) -> bytes:
        """The bytes before the data: length, header with its seal, padding."""
        joint = ", " if self.starts else ""
        sealed = json.dumps({**metadata, "seal": _NO_SEAL})
        text = f'{{"__metadata__": {sealed}{joint}{self.header[1:]}'.encode().ljust(self.start - 8)
        return struct.pack("<Q", len(text)) + _seal(text, _NO_SEAL, xxhash.xxh3_64_hexdigest(text))


class VersionFile:
    """A publisher's file, open for writing; ``path`` is where it is now. A file is overwritten only where ``idle``."""

    def __init__(self, path: Path, *, mapped: bool) -> None:
        self.path, self._mapped = path, mapped
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._map: Bytes | None = None

    @property
    def size(self) -> int:
        """Bytes."""
        return os.fstat(self._file).st_size

    def write(self, sources: Mapping[str, Source], layout: Layout, metadata: Mapping[str, str]) -> str:
        """All of it, the header with ``checksum`` last; returns the checksum. OSError: no room, for one."""

        def put(name: str, begin: int, piece: Bytes) -> None:
            self._put(layout.starts[name] + begin, piece)

        digest = sweep(sources, put)
        head = layout.head({**metadata, "checksum": metadata.get("checksum", digest), "written": digest})
        self._put(0, np.frombuffer(head, np.uint8))
        return digest

    def rename(self, path: Path) -> None:
        """Move it, over what stands there."""
        os.replace(self.path, path)
        self.path = path

    @contextlib.contextmanager
    def idle(self) -> Iterator[bool]:
        """Whether nobody reads it and it has no other name: if so, none can begin to inside the ``with``."""
        locked = _lock(self._file, fcntl.F_WRLCK)
        try:
            yield locked and os.fstat(self._file).st_nlink == 1
        finally:
            if locked and self._file >= 0:  # closing it unlocks, too
                _lock(self._file, fcntl.F_UNLCK)

    def unread(self) -> bool:
        """Whether it is ``idle`` now."""
        with self.idle() as idle:
            return idle

    def overwrite(self) -> None:
        """Before a file is written again. Copying into a map of pages that exist is what takes shared memory to the
        speed of memory; on disks ``pwrite`` is faster, and tells of a full one.
        """
        if self._mapped and self._map is None:
            self._map = np.frombuffer(mmap.mmap(self._file, self.size), np.uint8)

    def close(self) -> None:
        """Let go of it; its name stays."""
        self._map = None
        os.close(self._file)
        self._file = -1

    def remove(self) -> None:
        """Let go of it, and of its name."""
        self.path.unlink(missing_ok=True)
        self.close()

    def _put(self, at: int, piece: Bytes) -> None:
        if self._map is not None:
            self._map[at : at + len(piece)] = piece
            return
        view = piece.data
        while view:
            written = os.pwrite(self._file, view, at)
            view, at = view[written:], at + written


class Maps:
    """A reader's memory maps by file. With ``keep`` they stay from version to version, for publishers that use files
    again: page tables cost more than the bytes. Maps of removed files are dropped.
    """

    def __init__(self, *, keep: bool = True) -> None:
        self._keep = keep
        self._maps: dict[tuple[int, int, int], tuple[int, Tensor]] = {}
        weakref.finalize(self, _close, self._maps)

    def of(self, file: int) -> Tensor:
        """The bytes of an open file. Private: what is written into them is nobody else's."""
        self.drop_removed()
        key = _identity(file)
        if not self._keep:
            return _map(file, key[2])
        if key not in self._maps:
            kept = os.dup(file)
            self._maps[key] = kept, _map(kept, key[2])
        return self._maps[key][1]

    def drop_removed(self) -> None:
        """Of files that have no name any more, or another size."""
        for key, (kept, _) in list(self._maps.items()):
            if os.fstat(kept).st_nlink == 0 or _identity(kept) != key:
                os.close(kept)
                del self._maps[key]


class Reading:
    """An open version: ``metadata``, and ``tensors`` on the map, locked against a publisher until ``close``.

    Raises:
        FileNotFoundError: there is no such name, or its file was taken for another version meanwhile.
        WeightsError: no whole safetensors file, or one of another version.
    """

    def __init__(self, path: Path, version: int, maps: Maps) -> None:
        self.path, self.version = path, version
        self.metadata: dict[str, str] = {}
        self.tensors: dict[str, Tensor] = {}
        self._file = _open_locked(path)
        try:
            data = maps.of(self._file) if os.fstat(self._file).st_size else torch.empty(0, dtype=torch.uint8)
            self.metadata, self.tensors = _parse(path, data)
            if self.metadata.get("version") != str(version):
                raise WeightsError(f"{path} holds version {self.metadata.get('version')}, not {version}")
            if not _sealed(data, self.metadata.get("seal", "")):
                raise WeightsError(f"{path} is damaged: its header is not the one that was written")
        except BaseException:
            self.close()
            raise

    @property
    def checksum(self) -> str:
        """The checksum of the version that this file leads to."""
        return self.metadata["checksum"]

    def current(self) -> bool:
        """Whether its name still stands for it."""
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.stat(self.path), os.fstat(self._file))
        return False

    def verify(self, found: str | None = None) -> None:
        """Hash all that is in it (or take what was ``found`` while copying). Raises WeightsError."""
        found = found or checksum(self.tensors)
        if self.metadata.get("written") != found:
            raise WeightsError(
                f"{self.path} is damaged: its bytes give {found}, published was {self.metadata.get('written')}"
            )

    def close(self) -> None:
        """Give the lock back."""
        self.tensors = {}
        if self._file >= 0:
            _lock(self._file, fcntl.F_UNLCK)  # the kept map shares this open file, and with it the lock
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Reading:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def file_system(folder: Path) -> str | None:
    """tmpfs, ext4, …: those of one host; None for any other."""
    found = ctypes.create_string_buffer(512)
    failed = ctypes.CDLL(None).statfs(os.fsencode(folder), found)
    return None if failed else _LOCAL.get(int.from_bytes(found.raw[:8], "little", signed=True))


def _lock(file: int, kind: int) -> bool:
    """Lock the open file, not the process; True when granted. NFS knows these locks, too, between all its hosts."""
    try:
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, struct.pack("hhqqi", kind, os.SEEK_SET, 0, 0, 0))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise  # where there are no locks, which is on none of _LOCAL, no file is written again
    return True


def _open_locked(path: Path) -> int:
    """Open what the name stands for now, with the shared lock. FileNotFoundError once it stands for nothing."""
    while True:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if _lock(file, fcntl.F_RDLCK):
            with contextlib.suppress(FileNotFoundError):
                # Trap: between open and lock the file may have been retired and written again.
                if os.path.samestat(os.stat(path), os.fstat(file)):
                    return file
            _lock(file, fcntl.F_UNLCK)
        os.close(file)


def _map(file: int, size: int) -> Tensor:
    return torch.frombuffer(mmap.mmap(file, size, mmap.MAP_PRIVATE), dtype=torch.uint8)


def _close(maps: Mapping[Any, tuple[int, Tensor]]) -> None:
    for kept, _ in maps.values():
        os.close(kept)


def _identity(file: int) -> tuple[int, int, int]:
    found = os.fstat(file)
    return found.st_dev, found.st_ino, found.st_size


def _parse(path: Path, data: Tensor) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file that is there as a whole. Raises WeightsError."""
    try:
        length = int.from_bytes(bytes(data[:8].tolist()), "little")
        start = 8 + length
        if not 8 < start <= len(data):
            raise ValueError(f"a header of {length} bytes in a file of {len(data)}")
        header = json.loads(bytes(data[8:start].numpy().data))
        metadata = header.pop("__metadata__", {})
        tensors = {name: _tensor(data[start:], entry) for name, entry in header.items()}
        if sum(t.nbytes for t in tensors.values()) != len(data) - start:
            raise ValueError("its tensors do not fill it")
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise WeightsError(f"{path} is damaged: {error}") from error
    return metadata, tensors


def _seal(header: bytes, old: str, new: str) -> bytes:
    return header.replace(f'"seal": "{old}"'.encode(), f'"seal": "{new}"'.encode(), 1)


def _sealed(data: Tensor, seal: str) -> bool:
    """Whether the header has the hash that it had when its seal was blank."""
    header = bytes(data[8 : 8 + int.from_bytes(bytes(data[:8].tolist()), "little")].numpy().data)
    return xxhash.xxh3_64_hexdigest(_seal(header, seal, _NO_SEAL)) == seal


def _tensor(data: Tensor, entry: Mapping[str, Any]) -> Tensor:
    begin, end = entry["data_offsets"]
    if not 0 <= begin <= end <= len(data):
        raise ValueError(f"bytes {begin} to {end} of {len(data)}")
    return data[begin:end].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
