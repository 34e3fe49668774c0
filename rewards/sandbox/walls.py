"""The walls of one process, which it puts around itself and can never take down: Landlock, seccomp, limits, a user id.

Linux only; no privilege is needed. Trap: the fork server imports this module; nothing of a test may stand in it.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import stat
import struct
from collections.abc import Sequence

from offtrail.rewards.sandbox import filter as seccomp

_LIBC = ctypes.CDLL(None, use_errno=True)
_CREATE, _ADD, _RESTRICT = 444, 445, 446
"""Landlock's system calls, the same on every machine."""
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_DEVICES = ("/dev/null", "/dev/urandom", "/dev/zero")
_NO_NEW_PRIVS, _SET_SECCOMP, _SET_DUMPABLE, _SET_PDEATHSIG = 38, 22, 4, 1
_CAPABILITIES = 0x20080522
"""Version 3 of their form: two words each of effective, permitted, inheritable."""
LARGEST_FILE, OPEN_FILES, STACK = 1 << 16, 32, 8 << 20
FIRST_UID, UIDS = 200_000, 4096
"""Each run of a root's sandbox has a user id of its own, in turn."""


def landlock_abi() -> int:
    """Landlock's version in this kernel; ≤ 0 where there is none."""
    return int(_LIBC.syscall(_CREATE, None, ctypes.c_size_t(0), 1))


def ruleset(folders: Sequence[str]) -> int:
    """Descriptor of a Landlock ruleset: to read files below ``folders`` and nothing else; no TCP, no signal to others,
    no abstract socket, as far as the kernel's version goes. −1 where the kernel has no Landlock.
    """
    abi = landlock_abi()
    if abi < 1:
        return -1
    files = (1 << 13) - 1 | (abi >= 2) << 13 | (abi >= 3) << 14 | (abi >= 5) << 15
    attributes = struct.pack("QQQ", files, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0)
    size = 8 if abi < 4 else 16 if abi < 6 else 24
    rules = int(_LIBC.syscall(_CREATE, attributes[:size], ctypes.c_size_t(size), 0))
    if rules < 0:
        raise _failed("landlock_create_ruleset")
    for path in (*folders, *_DEVICES):
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        access = _READ_FILE | _READ_DIR if os.path.isdir(path) else _READ_FILE
        if _LIBC.syscall(_ADD, rules, 1, struct.pack("=Qi", access, place), 0):
            raise _failed(f"landlock_add_rule of {path}")
        os.close(place)
    return rules


def free_uids(library: str) -> bool:
    """Whether this process is root, may become any of the user ids of runs (a container may have only one), and those
    can read Python's library (one in root's home they cannot).
    """
    if os.getuid() != 0 or not all(os.stat(path).st_mode & stat.S_IXOTH for path in (library, *_parents(library))):
        return False
    with open("/proc/self/uid_map", encoding="ascii") as file:
        ranges = [[int(number) for number in line.split()] for line in file]
    return any(start <= FIRST_UID and start + count >= FIRST_UID + UIDS for start, _, count in ranges)


def _parents(path: str) -> list[str]:
    return [] if path == "/" else [os.path.dirname(path), *_parents(os.path.dirname(path))]


def enclose(rules: int, *, memory: int, cpu_seconds: int, uid: int) -> None:
    """Put all walls around this process. ``rules``: a Landlock ruleset or −1; ``memory``: bytes of address space;
    ``uid``: the user to become, 0 to stay. Raises OSError where one of them does not stand.
    """
    limits = {
        resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: LARGEST_FILE, resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_AS: memory, resource.RLIMIT_STACK: STACK, resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }  # fmt: skip
    for what, value in limits.items():
        resource.setrlimit(what, (value, value))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 1))  # SIGXCPU tells why it died; then SIGKILL
    _prctl(_SET_DUMPABLE, 0)  # nobody attaches to it, and /proc/self is root's
    if uid:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    if _LIBC.capset(struct.pack("Ii", _CAPABILITIES, 0), bytes(24)):  # a root that stays root is one no more
        raise _failed("capset")
    _prctl(_NO_NEW_PRIVS, 1)
    _prctl(_SET_PDEATHSIG, signal.SIGKILL)  # trap: changing the user id clears it
    if rules >= 0 and _LIBC.syscall(_RESTRICT, rules, 0):
        raise _failed("landlock_restrict_self")
    code = seccomp.program_for(os.getpid())
    held = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxQ", len(code) // 8, ctypes.addressof(held))
    if _LIBC.prctl(_SET_SECCOMP, 2, ctypes.c_char_p(program), 0, 0):
        raise _failed("seccomp")


def _prctl(option: int, value: int) -> None:
    if _LIBC.prctl(option, value, 0, 0, 0):
        raise _failed(f"prctl {option}")


def _failed(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{what}: {os.strerror(number)}")
