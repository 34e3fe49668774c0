"""The weight channel: a folder in which each published version is one safetensors file.

    learner rank 0 ── Publisher.publish(v) ──► v00000012.safetensors ──► Subscriber.load(v) ── generators
                   └─ Publisher.pin(v) ──────► pinned/v00000012.safetensors ──► load, then unpin ── evaluator

Invariants: a name in the folder is a whole version (written into writing/, then renamed); what a reader has opened
stays readable after the file is removed (it is a memory map, and files are never written in place); one living
publisher a folder (a lock that dies with its holder), so that whatever writing/ holds at start is rubbish.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_NAME = re.compile(r"v(\d{8,})\.safetensors")
_PINNED = "pinned"
_WRITING = "writing"
_HEADROOM = 1 << 20
"""Bytes asked for beyond the tensors: the header, and the file system's own."""


class WeightsError(RuntimeError):
    """A version cannot be written, or what stands under its name is not what was published."""


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """xxh3-128 over name, dtype, shape and bytes of each CPU tensor, in sorted order of the names: 32 hex digits."""
    digest = xxhash.xxh3_128()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Publisher:
    """Writes versions into ``folder`` and keeps the ``keep`` newest of them; pinned ones stay until unpinned.

    Starting removes what a former publisher left, except pinned versions: after a restart the newest version in the
    folder must not be one that the restored run has not made.

    Raises:
        WeightsError: the folder belongs to another user or cannot be made, or another publisher holds it.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep={keep}: the newest version is always kept, so at least 1")
        self.folder, self.keep = folder, keep
        _own_folder(folder)
        self._lock = self._take_lock()
        # a whole sub-folder: safetensors, too, writes under temporary names of its own before it renames
        shutil.rmtree(folder / _WRITING, ignore_errors=True)
        for sub in (_WRITING, _PINNED):
            (folder / sub).mkdir(exist_ok=True)
        for version in list(_versions(folder)):
            _path(folder, version).unlink(missing_ok=True)

    def publish(self, version: int, tensors: Mapping[str, Tensor], probe: Sequence[float] = ()) -> str:
        """Make ``version`` visible, whole or not at all, and drop the oldest beyond ``keep``. Returns its checksum.

        ``probe``: log-probabilities of the fixed text (probe.py) under this version, for the engines to compare.

        Of names that share one tensor (a tied head) the first is written, as Hugging Face checkpoints do; tensors that
        were gathered into separate copies must be given without the tied name. Nothing is held after the call.

        Raises:
            WeightsError: not enough free space, or a tensor that is not a plain dense one.
        """
        plain = _plain(tensors)
        self._check_space(version, sum(t.numel() * t.element_size() for t in plain.values()))
        digest = checksum(plain)
        metadata = {"format": "pt", "version": str(version), "checksum": digest, "probe": json.dumps(list(probe))}
        temporary = _path(self.folder / _WRITING, version)
        try:
            save_file(plain, temporary, metadata=metadata)
            os.replace(temporary, _path(self.folder, version))
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise WeightsError(f"version {version} cannot be written to {self.folder}: {error}") from error
        for old in sorted(_versions(self.folder))[: -self.keep]:
            _path(self.folder, old).unlink(missing_ok=True)
        return digest

    def pin(self, version: int) -> None:
        """Keep ``version`` readable until a subscriber unpins it: a second name for the same bytes, no copy.

        Raises:
            WeightsError: the version is not in the folder (any more).
        """
        temporary = _path(self.folder / _WRITING, version)
        try:
            os.link(_path(self.folder, version), temporary)
        except FileNotFoundError as error:
            raise WeightsError(
                f"version {version} is not in {self.folder} any more: pin it when it is published"
            ) from error
        os.replace(temporary, _path(self.folder / _PINNED, version))
        temporary.unlink(missing_ok=True)  # renaming a link over a link of the same file leaves both

    def close(self) -> None:
        """Let go of the folder; the versions stay for readers. ``remove`` takes them away at the run's end."""
        os.close(self._lock)

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


class Subscriber:
    """Reads versions out of ``folder``; makes nothing and needs no publisher to be alive."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def newest(self) -> int | None:
        """The newest published version, or None before the first. One scan of a handful of names (microseconds)."""
        return max(_versions(self.folder), default=None)

    def load(self, version: int) -> dict[str, Tensor]:
        """Memory-mapped CPU tensors of ``version``, published or pinned, checked against their checksum.

        They stay valid when the version is removed. Write into them only after a copy.

        Raises:
            FileNotFoundError: the version was never published, or is no longer kept: ask ``newest`` again.
            WeightsError: truncated, corrupted, or another version under this name.
        """
        for folder in (self.folder, self.folder / _PINNED):
            with contextlib.suppress(FileNotFoundError):
                return _read(_path(folder, version), version)
        raise FileNotFoundError(f"version {version} is not in {self.folder} (newest: {self.newest()})")

    def probe(self, version: int) -> list[float]:
        """The fixed text's log-probabilities that were published with ``version``; empty where there are none.

        Raises:
            FileNotFoundError: the version is no longer kept.
        """
        with safe_open(_path(self.folder, version), framework="pt", device="cpu") as file:
            found: list[float] = json.loads((file.metadata() or {}).get("probe", "[]"))
        return found

    def unpin(self, version: int) -> None:
        """Let a pinned version go; nothing happens if it is not pinned."""
        _path(self.folder / _PINNED, version).unlink(missing_ok=True)


def remove(folder: Path) -> None:
    """Remove a channel's folder with every version in it, if it is there. Readers' maps stay valid."""
    for version in list(_versions(folder)):
        _path(folder, version).unlink(missing_ok=True)
    for sub in (_WRITING, _PINNED):
        shutil.rmtree(folder / sub, ignore_errors=True)
    (folder / "lock").unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not there, or it holds something of someone else's
        folder.rmdir()


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
    """Dense contiguous CPU tensors without gradients; equal views are one tensor, overlapping ones are copied."""
    plain: dict[str, Tensor] = {}
    views: set[tuple[object, ...]] = set()
    storages: set[int] = set()
    for name, tensor in tensors.items():
        if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout != torch.strided or tensor.is_meta:
            raise WeightsError(
                f"{name} is a {type(tensor).__name__} on {tensor.device}: gather it into a dense tensor first"
            )
        view = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and view in views:
            continue
        storage = tensor.untyped_storage().data_ptr()
        copy = tensor.detach().cpu().contiguous()
        plain[name] = copy.clone() if storage in storages else copy
        views.add(view)
        storages.add(storage)
    return plain


def _read(path: Path, version: int) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise WeightsError(f"{path} is damaged: {error}") from error
    if metadata.get("version") != str(version):
        raise WeightsError(f"{path} holds version {metadata.get('version')}, not {version}")
    found = checksum(tensors)
    if metadata.get("checksum") != found:
        raise WeightsError(f"{path} is damaged: its bytes give {found}, published was {metadata.get('checksum')}")
    return tensors
