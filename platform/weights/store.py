"""The weight channel: a folder in which each published version is one safetensors file.

    learner rank 0 ── Publisher.publish(v) ──► v00000012.safetensors ──► with Subscriber.open(v) ── generators
                   │    └─◄── writing/ ◄── retired, and read by nobody: the next version is copied into its pages
                   └─ Publisher.pin(v) ──────► pinned/v00000012.safetensors ──► open, then unpin ── evaluator

With ``delta`` most versions hold what changed (delta.py) since the version before, back to a whole one; a reader keeps
the tensors that it read last and goes on from them, or from the whole version.

Invariants: a name in the folder is a whole version (written in writing/, then renamed), and no version loses what it
was made from while it is kept; what a reader has open is never written, for it holds a shared lock on the file, and a
publisher writes into a file again only under the exclusive one; a reader hands out nothing of a version before it has
hashed all of it; one living publisher a folder (a lock that dies with its holder), so that whatever writing/ holds at
start is rubbish.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from offtrail.platform.weights.delta import Changes, apply
from offtrail.platform.weights.files import (
    Bytes,
    Layout,
    Maps,
    Reading,
    Source,
    VersionFile,
    WeightsError,
    as_bytes,
    checksum,
    file_system,
    sweep,
)

__all__ = [
    "Published", "Publisher", "Subscriber", "WeightsError", "checksum", "copy_whole", "pin_anew", "remove",
    "whole_size",
]  # fmt: skip

_NAME = re.compile(r"v(\d{8,})\.safetensors")
_PINNED = "pinned"
_WRITING = "writing"
_HEADROOM = 1 << 20
"""Bytes asked for beyond the file: the file system's own."""
_WORTH = 0.75
"""Share of the whole version's bytes: a change that takes more is written whole, and readers can begin there."""

Sources = dict[str, Source]
Metadata = dict[str, str]


@dataclass
class HeldVersion:
    """Tensors of one version, kept to go on from; ``readers`` that use them now. ``version`` −1: of none."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    version: int = -1
    checksum: str = ""
    readers: int = 0

    def fits(self, sources: Mapping[str, Source]) -> bool:
        """Whether it has the same names, dtypes and shapes."""
        held = {name: (t.dtype, list(t.shape)) for name, t in self.tensors.items()}
        return held == {name: (s.dtype, s.shape) for name, s in sources.items()}

    def copy(self, sources: Mapping[str, Source]) -> str:
        """Take the tensors of ``sources``; returns their checksum."""
        if not self.fits(sources):
            self.tensors = {name: torch.empty(s.shape, dtype=s.dtype) for name, s in sources.items()}
        memory = {name: as_bytes(tensor) for name, tensor in self.tensors.items()}

        def put(name: str, begin: int, piece: Bytes) -> None:
            memory[name][begin : begin + len(piece)] = piece

        return sweep(sources, put)

    def release(self) -> None:
        """One reader less."""
        self.readers -= 1


class Publisher:
    """Writes versions into ``folder`` and keeps the ``keep`` newest of them; pinned ones stay until unpinned.

    With ``reuse`` one retired file more is kept to write into: a version's memory for the speed of pages that exist.
    ``dtype``: floating-point tensors are cast to it. ``full_every`` ≥ 1: write what changed, and every so many versions
    a whole one; then a copy of the version before is held in memory, and versions are kept back to the whole one that
    the oldest kept one leads to. 0: every version is whole.

    Starting removes what a former publisher left, except pinned versions: after a restart the newest version in the
    folder must not be one that the restored run has not made.

    Raises:
        WeightsError: the folder belongs to another user or cannot be made, or another publisher holds it.
    """

    def __init__(
        self,
        folder: Path,
        keep: int = 2,
        dtype: torch.dtype | None = None,
        full_every: int = 0,
        reuse: bool = True,
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep={keep}: the newest version is always kept, so at least 1")
        self.folder, self.keep, self.dtype, self.full_every = folder, keep, dtype, full_every
        self.bytes_published = self.bytes_last = 0
        self.delta_share = 1.0
        """``bytes_last`` over the bytes of the whole version."""
        _own_folder(folder)
        self._lock = self._take_lock()
        shutil.rmtree(folder / _WRITING, ignore_errors=True)
        for sub in (_WRITING, _PINNED):
            (folder / sub).mkdir(exist_ok=True)
        for version in list(_versions(folder)):
            _path(folder, version).unlink(missing_ok=True)
        system = file_system(folder)
        local = system is not None
        self._reuse, self._removes, self._mapped = reuse and local, local and not reuse, system == "tmpfs"
        self._files: dict[int, VersionFile] = {}
        self._bases: dict[int, int | None] = {}
        self._spares: list[VersionFile] = []
        self._held, self._since_whole, self._written = HeldVersion(), 0, 0

    def publish(self, version: int, tensors: Mapping[str, Tensor], probe: Sequence[float] = ()) -> str:
        """Make ``version`` visible, whole or not at all, and drop what is not kept. Returns its checksum.

        ``probe``: log-probabilities of the fixed text (probe.py) under this version, for the engines to compare.

        Of names that share one tensor (a tied head) the first is written, as Hugging Face checkpoints do; tensors that
        were gathered into separate copies must be given without the tied name. No given tensor is held after the call.

        Raises:
            WeightsError: not enough free space, or a tensor that is not a plain dense one.
        """
        sources = {name: Source.of(tensor, self._cast(tensor)) for name, tensor in _plain(tensors).items()}
        metadata = _metadata(version, probe)
        layout = whole = Layout.of(sources, metadata)
        if self.full_every:
            sources, metadata = self._changes(version, sources, metadata)
            layout = Layout.of(sources, metadata)
        digest = self._write(version, sources, layout, metadata)
        self.bytes_last = layout.size
        self.bytes_published += self.bytes_last
        self.delta_share = layout.size / whole.size
        self._bases[version] = int(metadata["base"]) if "base" in metadata else None
        self._held.version, self._held.checksum = version, digest
        self._retire()
        return digest

    def pin(self, version: int) -> int:
        """Keep ``version`` readable until a subscriber unpins it: a second name for the same bytes, no copy. A version
        that holds changes is written whole. Returns how many bytes that keeps.

        Raises:
            WeightsError: the version is not in the folder (any more).
        """
        temporary = _path(self.folder / _WRITING, version)
        temporary.unlink(missing_ok=True)
        try:
            if self._bases.get(version) is None:
                os.link(_path(self.folder, version), temporary)
            else:
                copy_whole(self.folder, version, temporary)
        except FileNotFoundError as error:
            raise WeightsError(
                f"version {version} is not in {self.folder} any more: pin it when it is published"
            ) from error
        kept = _path(self.folder / _PINNED, version)
        os.replace(temporary, kept)
        temporary.unlink(missing_ok=True)  # renaming a link over a link of the same file leaves both
        return kept.stat().st_size

    def serve_late_readers(self) -> None:
        """Nothing: readers come by themselves."""

    def close(self) -> None:
        """Let go of the folder; the versions stay for readers. ``remove`` takes them away at the run's end."""
        for spare in self._spares:
            spare.remove()
        for file in self._files.values():
            file.close()
        self._spares, self._files = [], {}
        os.close(self._lock)

    def _cast(self, tensor: Tensor) -> torch.dtype | None:
        return self.dtype if tensor.dtype.is_floating_point else None

    def _changes(self, version: int, sources: Sources, metadata: Metadata) -> tuple[Sources, Metadata]:
        """What to write of ``version``: changes where there is a version to go on from and they are worth it."""
        held, base, base_checksum = self._held, self._held.version, self._held.checksum
        held.version = -1  # until this one is out, there is none to go on from
        self._since_whole += 1
        metadata = metadata | {"chain": "1"}
        if 0 <= base < version and self._since_whole < self.full_every and held.fits(sources):
            changes = Changes(held.tensors)
            digest = sweep(sources, changes.take)
            parts = {name: Source.of(part) for name, part in changes.parts().items()}
            if sum(p.size for p in parts.values()) <= _WORTH * sum(s.size for s in sources.values()):
                return parts, metadata | {"base": str(base), "base_checksum": base_checksum, "checksum": digest}
        else:
            held.copy(sources)
        self._since_whole = 0
        return {name: Source.of(tensor) for name, tensor in held.tensors.items()}, metadata

    def _write(self, version: int, sources: Sources, layout: Layout, metadata: Metadata) -> str:
        """Under its name; returns its checksum."""
        try:
            with self._blank(version, layout.size) as file:
                try:
                    digest = file.write(sources, layout, metadata)
                except BaseException:
                    file.remove()
                    raise
            if (before := self._files.pop(version, None)) is not None:
                before.close()
            file.rename(_path(self.folder, version))
        except OSError as error:
            raise WeightsError(f"version {version} cannot be written to {self.folder}: {error}") from error
        self._files[version] = file
        return metadata.get("checksum", digest)

    @contextlib.contextmanager
    def _blank(self, version: int, size: int) -> Iterator[VersionFile]:
        """A file of ``size`` bytes to write: a retired one where it can be, locked against readers, or a new one."""
        for spare in list(self._spares):
            with spare.idle() as idle:
                if not idle:
                    continue
                self._spares.remove(spare)
                if self._reuse and spare.size == size:
                    spare.overwrite()
                    yield spare
                    return
                spare.remove()
        self._check_space(version, size)
        yield VersionFile(self._unused(), mapped=self._mapped)

    def _retire(self) -> None:
        """Take away the names of what is not kept, newest first: a reader that misses a version's base looks whether
        the version itself is still there.
        """
        kept: set[int | None] = {None}
        for version in sorted(self._files)[-self.keep :]:
            above: int | None = version
            while above not in kept:
                kept.add(above)
                above = self._bases.get(above) if above is not None else None
        for version in sorted(self._files.keys() - kept, reverse=True):
            file = self._files.pop(version)
            del self._bases[version]
            if self._removes:  # who has it open or pinned keeps it; between hosts a reader would lose it
                file.remove()
                continue
            try:
                file.rename(self._unused())
                self._spares.append(file)
            except FileNotFoundError:  # someone has removed it
                file.close()
        unread = [spare for spare in self._spares if spare.unread()]
        for spare in unread[:-1] if self._reuse else unread:
            self._spares.remove(spare)
            spare.remove()

    def _unused(self) -> Path:
        self._written += 1
        return self.folder / _WRITING / f"{self._written}.safetensors"

    def _take_lock(self) -> int:
        lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise WeightsError(
                f"another run publishes into {self.folder}: end it, or set weights.dir to a folder of this run's own"
            ) from error
        return lock

    def _check_space(self, version: int, size: int) -> None:
        needed, free = size + _HEADROOM, shutil.disk_usage(self.folder).free
        if needed > free:
            raise WeightsError(
                f"version {version} needs {needed:,} bytes in {self.folder}, {free:,} are free: "
                "make room there, or set weights.dir to a folder with more"
            )


class Published(Mapping[str, Tensor]):
    """A version as a reader has it: name → CPU tensor, verified, and valid only until the ``with`` ends.

    Copy what is to stay: the memory is used again for later versions.
    """

    def __init__(
        self, version: int, folder: Path, checksum: str, tensors: Mapping[str, Tensor], close: Callable[[], None]
    ) -> None:
        self.version, self.folder, self.checksum = version, folder, checksum
        self._tensors: Mapping[str, Tensor] | None = tensors
        self._close = close

    def __getitem__(self, name: str) -> Tensor:
        return self._open()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._open())

    def __len__(self) -> int:
        return len(self._open())

    def __enter__(self) -> Published:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the version go; the publisher may write into its memory from now on."""
        if self._tensors is not None:
            self._tensors = None
            self._close()

    def _open(self) -> Mapping[str, Tensor]:
        if self._tensors is None:
            raise WeightsError(f"version {self.version} was let go: its tensors are valid inside the `with` only")
        return self._tensors


class Subscriber:
    """Reads versions out of ``folder``; makes nothing and needs no publisher to be alive. For one thread. ``reuse``:
    keep the memory maps of what was read, for a publisher that writes into its files again; a map keeps the memory of a
    file that was removed.
    """

    def __init__(self, folder: Path, reuse: bool = True) -> None:
        self.folder = folder
        self._maps = Maps(keep=reuse)
        self._held = HeldVersion()

    def newest(self) -> int | None:
        """The newest published version, or None before the first. One scan of a handful of names (microseconds)."""
        return max(_versions(self.folder), default=None)

    def open(self, version: int) -> Published:
        """``version``, published or pinned, checked against its checksum as a whole, for use in a ``with``.

        Raises:
            FileNotFoundError: the version was never published, or is no longer kept: ask ``newest`` again.
            WeightsError: truncated, corrupted, another version under this name, or made from one that is not here.
        """
        for folder in (self.folder, self.folder / _PINNED):
            with contextlib.suppress(FileNotFoundError):
                return self._open(Reading(_path(folder, version), version, self._maps))
        raise FileNotFoundError(f"version {version} is not in {self.folder} (newest: {self.newest()})")

    def probe(self, version: int) -> list[float]:
        """The fixed text's log-probabilities that were published with ``version``; empty where there are none.

        Raises:
            FileNotFoundError: the version is no longer kept.
        """
        with Reading(_path(self.folder, version), version, self._maps) as reading:
            found: list[float] = json.loads(reading.metadata.get("probe", "[]"))
        return found

    def unpin(self, version: int) -> None:
        """Let a pinned version go; nothing happens if it is not pinned."""
        _path(self.folder / _PINNED, version).unlink(missing_ok=True)
        self._maps.drop_removed()

    def _open(self, reading: Reading) -> Published:
        with contextlib.ExitStack() as stack:
            stack.enter_context(reading)
            if "chain" in reading.metadata:
                held = self._follow(self._chain(reading, stack))
                held.readers += 1
                return Published(reading.version, self.folder, held.checksum, held.tensors, held.release)
            reading.verify()
            stack.pop_all()
        return Published(reading.version, self.folder, reading.checksum, reading.tensors, reading.close)

    def _chain(self, reading: Reading, stack: contextlib.ExitStack) -> list[Reading]:
        """From what is held, or from a whole version, up to ``reading``; open until ``stack`` ends."""
        chain = [reading]
        while "base" in (metadata := chain[0].metadata):
            version, base, wanted = chain[0].version, int(metadata["base"]), metadata["base_checksum"]
            if (self._held.version, self._held.checksum) == (base, wanted):
                break
            try:
                below = stack.enter_context(Reading(_path(self.folder, base), base, self._maps))
            except FileNotFoundError as error:
                if not reading.current():
                    raise
                raise WeightsError(
                    f"version {version} holds what changed since version {base}, which is not in {self.folder} any more"
                ) from error
            if below.checksum != wanted:
                raise WeightsError(
                    f"version {version} holds what changed since version {base} with checksum {wanted}, "
                    f"but the version {base} in {self.folder} has {below.checksum}"
                )
            chain.insert(0, below)
        return chain

    def _follow(self, chain: list[Reading]) -> HeldVersion:
        """Apply the chain to what is held, which is another's as soon as it is open to a reader."""
        changes = [reading for reading in chain if "base" in reading.metadata]
        for reading in changes:
            reading.verify()
        held, self._held, found = self._held, HeldVersion(), ""
        if held.readers:
            held = HeldVersion({name: tensor.clone() for name, tensor in held.tensors.items()})
        if chain[0] not in changes:
            found = held.copy({name: Source.of(tensor) for name, tensor in chain[0].tensors.items()})
            chain[0].verify(found)
        for reading in changes:
            apply(held.tensors, reading.tensors)
            found = ""
        held.version, held.checksum = chain[-1].version, found or checksum(held.tensors)
        if held.checksum != chain[-1].checksum:
            raise WeightsError(
                f"{chain[-1].path} does not lead to version {held.version}: the result has checksum {held.checksum}, "
                f"published was {chain[-1].checksum}"
            )
        self._held = held
        return held


def copy_whole(folder: Path, version: int, target: Path) -> None:
    """Write the published ``version`` to ``target`` as one whole file. FileNotFoundError: it is not kept any more."""
    with Subscriber(folder).open(version) as weights:
        _write_whole(target, version, {name: Source.of(tensor) for name, tensor in weights.items()})


def pin_anew(folder: Path, version: int, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> str:
    """Put a version that was published before, and is gone from ``folder``, among the pinned ones there; floating-point
    tensors are cast to ``dtype``. Returns its checksum. For one caller at a time; a publisher has the folder open.

    Raises:
        OSError: no room for it, for one.
    """
    sources = {name: Source.of(t, dtype if t.dtype.is_floating_point else None) for name, t in tensors.items()}
    temporary = _path(folder / _WRITING, version)
    temporary.unlink(missing_ok=True)
    try:
        digest = _write_whole(temporary, version, sources)
        os.replace(temporary, _path(folder / _PINNED, version))
    finally:
        temporary.unlink(missing_ok=True)
    return digest


def _write_whole(target: Path, version: int, sources: Sources) -> str:
    metadata = _metadata(version, ())
    file = VersionFile(target, mapped=False)
    try:
        return file.write(sources, Layout.of(sources, metadata), metadata)
    finally:
        file.close()


def whole_size(folder: Path, version: int) -> int:
    """Bytes of the published ``version`` as one whole file. FileNotFoundError: it is not kept any more."""
    while True:
        with Reading(_path(folder, version), version, Maps()) as reading:
            if "base" not in reading.metadata:
                return reading.path.stat().st_size
            version = int(reading.metadata["base"])


def remove(folder: Path) -> None:
    """Remove a channel's folder with every version in it, if it is there. Readers' maps stay valid."""
    for version in list(_versions(folder)):
        _path(folder, version).unlink(missing_ok=True)
    for sub in (_WRITING, _PINNED):
        shutil.rmtree(folder / sub, ignore_errors=True)
    (folder / "lock").unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not there, or it holds something of someone else's
        folder.rmdir()


def _metadata(version: int, probe: Sequence[float]) -> Metadata:
    return {"format": "pt", "version": str(version), "probe": json.dumps(list(probe))}


def _path(folder: Path, version: int) -> Path:
    return folder / f"v{version:08d}.safetensors"


def _versions(folder: Path) -> Iterator[int]:
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if match := _NAME.fullmatch(entry.name):
                yield int(match[1])


def _own_folder(folder: Path) -> None:
    """Make the folder for this user alone. Shared memory is open to all: a folder put there by another is refused."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat(follow_symlinks=False)
    except OSError as error:
        raise WeightsError(
            f"the weight channel's folder {folder} cannot be made ({error.strerror}): "
            "set weights.dir to a folder that can, or weights.channel=disk"
        ) from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise WeightsError(f"{folder} is not a folder of user {os.getuid()}: set weights.dir to one that is")


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Dense contiguous CPU tensors without gradients; equal views are one tensor, overlapping ones stay apart."""
    plain: dict[str, Tensor] = {}
    views: set[tuple[object, ...]] = set()
    for name, tensor in tensors.items():
        if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout != torch.strided or tensor.is_meta:
            raise WeightsError(
                f"{name} is a {type(tensor).__name__} on {tensor.device}: gather it into a dense tensor first"
            )
        view = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and view in views:
            continue
        plain[name] = tensor.detach().cpu().contiguous()
        views.add(view)
    return plain
