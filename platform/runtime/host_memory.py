"""How much memory this host still gives, and what the kernel has killed for the lack of it. From /proc and /sys alone.

A control group (a container, a Slurm job, a systemd unit) may give less than the machine has; of several limits on the
way up to the root the tightest counts.
"""

from __future__ import annotations

import ctypes
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class FreeMemory:
    """``bytes`` that may still be taken, bounded by ``bound``: the machine's, or a control group's by its path."""

    bytes: int
    bound: str


def free_memory(root: Path = Path("/")) -> FreeMemory | None:
    """What may still be taken: page cache can be, whoever filled it. None where there is no /proc/meminfo."""
    machine = _fields(root / "proc/meminfo").get("MemAvailable")
    if machine is None:
        return None
    found = FreeMemory(machine * 1024, "this machine")
    for group in _groups(root):
        limit, used = (
            _number(group, "memory.max", "memory.limit_in_bytes"),
            _number(group, "memory.current", "memory.usage_in_bytes"),
        )
        if limit is None or used is None:
            continue
        stat = _fields(group / "memory.stat")
        cache = stat.get("total_inactive_file", stat.get("inactive_file", 0))
        found = min(found, FreeMemory(max(0, limit - used + cache), f"control group {group}"), key=lambda f: f.bytes)
    return found


def kills(root: Path = Path("/")) -> int | None:
    """Processes killed so far for lack of memory, in this process's control group, or else on the machine; None where
    neither is counted.
    """
    for group in _groups(root):
        counted = _fields(group / "memory.events").get("oom_kill")
        if counted is not None:
            return counted
    return _fields(root / "proc/vmstat").get("oom_kill")


def resident(pid: int) -> int:
    """Bytes that a process has in memory, shared ones among them; 0 where it is gone."""
    return _fields(Path(f"/proc/{pid}/status")).get("VmRSS", 0) * 1024


class _Mallinfo2(ctypes.Structure):
    """mallinfo2(3)."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    )  # fmt: skip


_beside = 0
"""Anonymous pages beside what is allocated (stacks, Python's own arenas, the allocator's books), as last seen."""


def give_back_freed(at_least: int = 0) -> None:
    """Hand to the system what this process has freed, which glibc (2.33 and later) keeps for the next allocation, where
    it is ``at_least`` so many bytes. Nothing with another C library.

    Trap: glibc's own count of free bytes (fordblks) holds those that the system has back already. By it a small model's
    learner would give its working memory back before each pass, and spend a fifth of its time on taking it again.
    """
    global _beside
    if (library := _glibc()) is None:
        return
    if _resident_anonymous() - _allocated(library) - _beside >= at_least:
        library.malloc_trim(0)
        _beside = _resident_anonymous() - _allocated(library)


@cache
def _glibc() -> ctypes.CDLL | None:
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallinfo2"):
        return None
    library.mallinfo2.restype = _Mallinfo2
    return library


def _allocated(library: ctypes.CDLL) -> int:
    """Bytes that malloc has given and not got back."""
    info = library.mallinfo2()
    return int(info.uordblks) + int(info.hblkhd)


def _resident_anonymous() -> int:
    """Bytes in memory that no file stands behind."""
    _, resident, shared, *_ = Path("/proc/self/statm").read_text().split()
    return (int(resident) - int(shared)) * resource.getpagesize()


def _groups(root: Path) -> Iterator[Path]:
    """The control group of this process that bounds memory, and those above it: version 2, or version 1's."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        group = top / path.lstrip("/")
        while group.is_relative_to(top):
            if group.is_dir():
                yield group
            if group == top:
                break
            group = group.parent


def _fields(file: Path) -> dict[str, int]:
    """Lines of a name and a number; empty where the file is not there."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.replace(":", " ").split() for line in lines)
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) > 1 and pair[1].isdigit()}


def _number(group: Path, *names: str) -> int | None:
    """The first of these files that holds a number: "max" is none."""
    for name in names:
        try:
            text = (group / name).read_text().strip()
        except OSError:
            continue
        return int(text) if text.isdigit() else None
    return None
