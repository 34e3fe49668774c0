"""weights.channel=ipc: SGLang servers of the same host read the learner's memory: CUDA IPC, or shared memory on a CPU.

    learner: MemoryChannel ◄── unix socket: handles of v ── HandleReader.open(v) :generator ── FromMemory ──► server
             flat buffers ◄───────────────────── mapped, and copied out of ─────────────────────────────────────┘

The learner copies a version into flat buffers of its own, on the parameters' device; a server maps these and copies out
of them: two copies, no file. Invariant: a buffer is written again only when nobody has its version open; the open
connection is the hold, which dies with its reader, so that a server never reads half of two versions.

Trap: torch counts the consumers of a handle, and one that is used twice frees what others still read. So handles are
made anew for every server, on demand.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import os
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from torch import Tensor

from offtrail.platform.weights.store import Publisher, WeightsError, checksum

SOCKET = "handles.sock"
READ_SECONDS = 600.0
"""The longest that a reader may hold a version whose buffers are wanted for a new one."""


@dataclass(frozen=True)
class Pushed(Mapping[str, Any]):
    """A version that the learner brings to the servers: an engine only waits until they hold it."""

    version: int

    def __getitem__(self, name: str) -> Any:
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


@dataclass(frozen=True)
class Handles(Mapping[str, Any]):
    """One version in another process's memory; as a mapping, name → shape."""

    version: int
    named_shapes: Mapping[str, tuple[int, ...]]
    fetch: Callable[[int], list[list[str]]]
    """Handles for one server of so many ranks: for each bucket one payload a rank, to be used once."""

    def __getitem__(self, name: str) -> Any:
        return self.named_shapes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.named_shapes)

    def __len__(self) -> int:
        return len(self.named_shapes)


@dataclass(frozen=True)
class HandleReader:
    """The reading end; on the learner's host. A learner that has left keeps no version: FileNotFoundError, as of one
    that is retired. Whether it should have left is the launcher's business.
    """

    folder: Path

    @contextlib.contextmanager
    def open(self, version: int) -> Iterator[Handles]:
        """Handles that stay good inside the ``with``. FileNotFoundError when the version is no longer kept."""
        lock = threading.Lock()
        with self._dial() as line:
            told = _ask(line, {"version": version})
            if "newest" in told:
                raise FileNotFoundError(f"version {version} is not in {self.folder} (newest: {told['newest']})")
            shapes = {name: tuple(shape) for name, shape in told["shapes"].items()}

            def fetch(ranks: int) -> list[list[str]]:
                with lock:  # several servers are brought to the version side by side
                    found: list[list[str]] = _ask(line, {"ranks": ranks})["payloads"]
                return found

            yield Handles(version, shapes, fetch)

    def probe(self, version: int) -> list[float]:
        """The learner's numbers on the fixed text; empty where there are none."""
        found: list[float] = read_note(self.folder, version)["probe"]
        return found

    @contextlib.contextmanager
    def _dial(self) -> Iterator[Any]:
        with socket.socket(socket.AF_UNIX) as line:
            line.settimeout(READ_SECONDS)
            try:
                line.connect(str(self.folder / SOCKET))
            except OSError as error:
                raise FileNotFoundError(
                    f"the learner does not answer at {self.folder / SOCKET}: {error.strerror}"
                ) from error
            with line.makefile("rwb") as file:
                yield file


def _ask(line: Any, question: Mapping[str, Any]) -> dict[str, Any]:
    line.write(json.dumps(question).encode() + b"\n")
    line.flush()
    answer = line.readline()
    if not answer:
        raise FileNotFoundError("the learner left while a version was read")
    return dict(json.loads(answer))


def note_path(folder: Path, version: int) -> Path:
    """Where a version without a file is described."""
    return folder / f"v{version:08d}.json"


def write_note(folder: Path, version: int, note: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    path = note_path(folder, version)
    temporary = folder / "writing" / path.name
    temporary.write_text(json.dumps({"version": version, **note}))
    os.replace(temporary, path)


def read_note(folder: Path, version: int) -> dict[str, Any]:
    """Raises FileNotFoundError when the version is no longer kept."""
    return dict(json.loads(note_path(folder, version).read_text()))


def remove_notes(folder: Path) -> None:
    """What a former publisher left."""
    for path in folder.glob("v*.json"):
        path.unlink(missing_ok=True)


@dataclass
class HeldTensors:
    """One version's flat buffers, a view for each tensor, the names of each bucket, and how many readers it has."""

    version: int
    flat: list[Tensor]
    views: dict[str, Tensor]
    buckets: list[list[str]]
    readers: int = 0


class MemoryChannel:
    """The publishing end: ``keep`` versions in buffers of the parameters' device.

    ``dtype``: what they are rounded to (None: as they are). Buckets of about ``bucket_bytes`` each.
    Raises WeightsError when a reader holds on to a version for longer than READ_SECONDS.
    """

    def __init__(self, store: Publisher, keep: int, *, dtype: torch.dtype | None, bucket_bytes: int) -> None:
        self.store, self.folder, self.keep = store, store.folder, keep
        self.dtype, self.bucket_bytes = dtype, bucket_bytes
        self.bytes_published, self.bytes_last, self.delta_share = 0, 0, 1.0
        self._held: dict[int, HeldTensors] = {}
        self._changed = threading.Condition()
        remove_notes(self.folder)
        # A descriptor in place of a name can be fetched by one process only, and only while this one lives.
        torch.multiprocessing.set_sharing_strategy("file_system")  # type: ignore[no-untyped-call]
        self._desk = _serve(self, self.folder / SOCKET)

    def publish(self, version: int, tensors: Mapping[str, Tensor], probe: Sequence[float] = ()) -> str:
        """Copy into buffers, retire the oldest version, let readers see the new one."""
        for old in [old for old in self._held if old >= version]:  # a replay publishes them again
            self._retire(old)
        held = self._retire(min(self._held)) if len(self._held) >= self.keep else self._allocate(tensors)
        for name, view in held.views.items():
            view.copy_(tensors[name].detach())
        if any(view.is_cuda for view in held.views.values()):
            torch.cuda.synchronize()  # another process knows nothing of this one's streams
        digest = fingerprint(held.views)
        write_note(self.folder, version, {"checksum": digest, "probe": list(probe)})
        held.version, held.readers = version, 0
        with self._changed:
            self._held[version] = held
        self.bytes_last = sum(flat.numel() for flat in held.flat)
        self.bytes_published += self.bytes_last
        return digest

    def pin(self, version: int) -> int:
        """A copy in the store, for the evaluator; its bytes."""
        self.store.publish(version, {name: view.cpu() for name, view in self._held[version].views.items()})
        return self.store.pin(version)

    def serve_late_readers(self) -> None:
        """Nothing: a server that was started anew is given handles by its engine."""

    def close(self) -> None:
        """Give the buffers back."""
        self._desk.shutdown()
        self._desk.server_close()
        (self.folder / SOCKET).unlink(missing_ok=True)
        remove_notes(self.folder)
        self._held.clear()
        self.store.close()

    # --- from the scheduler's threads ---

    @contextlib.contextmanager
    def reading(self, version: int) -> Iterator[HeldTensors | None]:
        """Hold a version; None when it is not kept."""
        with self._changed:
            held = self._held.get(version)
            if held is not None:
                held.readers += 1
        try:
            yield held
        finally:
            if held is not None:
                with self._changed:
                    held.readers -= 1
                    self._changed.notify_all()

    @property
    def newest(self) -> int:
        """The newest version; −1 before the first."""
        return max(self._held, default=-1)

    # --- buffers ---

    def _retire(self, version: int) -> HeldTensors:
        """Out of sight first; then wait for those who have it open."""
        started = time.time()
        with self._changed:
            held = self._held.pop(version)
            note_path(self.folder, version).unlink(missing_ok=True)
            if not self._changed.wait_for(lambda: not held.readers, READ_SECONDS):
                raise WeightsError(
                    f"version {version}: {held.readers} readers have held it since "
                    f"{time.strftime('%H:%M:%S', time.localtime(started))}, longer than {READ_SECONDS:g} s"
                )
        return held

    def _allocate(self, tensors: Mapping[str, Tensor]) -> HeldTensors:
        held = HeldTensors(-1, [], {}, cut(tensors, self.bucket_bytes, self.dtype))
        for bucket in held.buckets:
            size = sum(padded(bytes_of(tensors[name], self.dtype)) for name in bucket)
            buffer = torch.empty(size, dtype=torch.uint8, device=tensors[bucket[0]].device)
            held.flat.append(buffer if buffer.is_cuda else buffer.share_memory_())  # type: ignore[no-untyped-call]
            start = 0
            for name in bucket:
                tensor = tensors[name]
                length = bytes_of(tensor, self.dtype)
                view = held.flat[-1][start : start + length]
                held.views[name] = view.view(_dtype(tensor, self.dtype)).view(tensor.shape)
                start += padded(length)
        return held


class _Desk(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    channel: MemoryChannel


class _Reader(socketserver.StreamRequestHandler):
    """One reader: first the version, then handles for as many servers as it asks for; leaving ends its hold."""

    server: _Desk

    def handle(self) -> None:
        asked = self.rfile.readline()
        if not asked:
            return
        channel = self.server.channel
        with channel.reading(int(json.loads(asked)["version"])) as held:
            if held is None:
                self._tell({"newest": channel.newest})
                return
            self._tell({"shapes": {name: list(view.shape) for name, view in held.views.items()}})
            for line in self.rfile:
                ranks = int(json.loads(line)["ranks"])
                self._tell(
                    {
                        "payloads": [
                            [serialize([(name, held.views[name]) for name in bucket]) for _ in range(ranks)]
                            for bucket in held.buckets
                        ]
                    }
                )

    def _tell(self, answer: Mapping[str, Any]) -> None:
        self.wfile.write(json.dumps(answer).encode() + b"\n")


def _serve(channel: MemoryChannel, path: Path) -> _Desk:
    path.unlink(missing_ok=True)
    try:
        scheduler = _Desk(str(path), _Reader)
    except OSError as error:
        raise WeightsError(
            f"weights.channel=ipc: no socket at {path} ({error}): set weights.dir to a short path on this host, or "
            "take weights.channel=shm"
        ) from error
    os.chmod(path, 0o600)
    scheduler.channel = channel
    threading.Thread(target=scheduler.serve_forever, name="handles", daemon=True).start()
    return scheduler


def _dtype(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype


def bytes_of(tensor: Tensor, dtype: torch.dtype | None) -> int:
    """The bytes of a tensor once it is rounded to ``dtype``."""
    return tensor.numel() * _dtype(tensor, dtype).itemsize


def padded(size: int) -> int:
    """Up to a multiple of 16, so that every view is aligned."""
    return -(-size // 16) * 16


def cut(tensors: Mapping[str, Tensor], bucket_bytes: int, dtype: torch.dtype | None) -> list[list[str]]:
    """Names in their order, in buckets of about ``bucket_bytes`` (one tensor at least)."""
    buckets: list[list[str]] = []
    size = 0
    for name, tensor in tensors.items():
        length = padded(bytes_of(tensor, dtype))
        if not buckets or size + length > bucket_bytes:
            buckets.append([])
            size = 0
        buckets[-1].append(name)
        size += length
    return buckets


def serialize(named: Sequence[tuple[str, Tensor]]) -> str:
    """Base64 of pickled handles, as SGLang takes them."""
    if named and named[0][1].is_cuda:
        with contextlib.suppress(ImportError):  # its own names for devices: the servers may see others
            from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions

            monkey_patch_torch_reductions()
    buffer = io.BytesIO()
    ForkingPickler(buffer).dump(list(named))
    return base64.b64encode(buffer.getvalue()).decode()


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """The store's checksum; of tensors on a GPU a sum over their bits taken there, so that they need not leave it."""
    if all(tensor.device.type == "cpu" for tensor in tensors.values()):
        return checksum(tensors)
    parts: list[str] = []
    for name in sorted(tensors):
        bits = tensors[name].detach().contiguous().view(-1).view(torch.uint8)
        words = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).view(torch.int64)
        places = torch.arange(1, len(words) + 1, device=words.device) * 0x9E3779B97F4A7C1 | 1
        parts.append(f"{name}:{int((words * places).sum()) & (1 << 64) - 1:016x}")
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()
