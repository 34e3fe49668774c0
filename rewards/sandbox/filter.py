"""The seccomp filter: system calls that a Python program needs to compute, and no others (Linux, x86-64 and aarch64).

The rest is EPERM: no new process, no program, no socket, no signal to others, nobody's memory, no file's owner or mode.
Numbers: arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h of Linux.
"""

from __future__ import annotations

import errno
import os
import struct
from functools import cache

_X86_64 = {
    "read": 0, "write": 1, "open": 2, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7, "lseek": 8, "mmap": 9,
    "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "ioctl": 16,
    "pread64": 17, "readv": 19, "writev": 20, "access": 21, "select": 23, "sched_yield": 24, "mremap": 25,
    "madvise": 28, "dup": 32, "nanosleep": 35, "getpid": 39, "sendto": 44, "recvfrom": 45, "clone": 56, "exit": 60,
    "uname": 63, "fcntl": 72, "getcwd": 79, "readlink": 89, "gettimeofday": 96, "getrlimit": 97, "getrusage": 98,
    "times": 100, "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108, "getppid": 110, "sigaltstack": 131,
    "gettid": 186, "futex": 202, "sched_getaffinity": 204, "getdents64": 217, "set_tid_address": 218,
    "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230, "exit_group": 231, "epoll_wait": 232,
    "epoll_ctl": 233, "tgkill": 234, "openat": 257, "newfstatat": 262, "readlinkat": 267, "faccessat": 269,
    "pselect6": 270, "ppoll": 271, "set_robust_list": 273, "epoll_create1": 291, "dup3": 292, "pipe2": 293,
    "prlimit64": 302, "getrandom": 318, "membarrier": 324, "statx": 332, "rseq": 334, "clone3": 435, "faccessat2": 439,
}  # fmt: skip
_AARCH64 = {
    "getcwd": 17, "epoll_create1": 20, "epoll_ctl": 21, "epoll_pwait": 22, "dup": 23, "dup3": 24, "fcntl": 25,
    "ioctl": 29, "faccessat": 48, "openat": 56, "close": 57, "pipe2": 59, "getdents64": 61, "lseek": 62, "read": 63,
    "write": 64, "readv": 65, "writev": 66, "pread64": 67, "pselect6": 72, "ppoll": 73, "readlinkat": 78,
    "newfstatat": 79, "fstat": 80, "exit": 93, "exit_group": 94, "set_tid_address": 96, "futex": 98,
    "set_robust_list": 99, "nanosleep": 101, "clock_gettime": 113, "clock_getres": 114, "clock_nanosleep": 115,
    "sched_getaffinity": 123, "sched_yield": 124, "tgkill": 131, "sigaltstack": 132, "rt_sigaction": 134,
    "rt_sigprocmask": 135, "rt_sigreturn": 139, "times": 153, "uname": 160, "getrlimit": 163, "getrusage": 165,
    "gettimeofday": 169, "getpid": 172, "getppid": 173, "getuid": 174, "geteuid": 175, "getgid": 176, "getegid": 177,
    "gettid": 178, "sendto": 206, "recvfrom": 207, "brk": 214, "munmap": 215, "mremap": 216, "clone": 220, "mmap": 222,
    "mprotect": 226, "madvise": 233, "prlimit64": 261, "getrandom": 278, "membarrier": 283, "statx": 291, "rseq": 293,
    "clone3": 435, "faccessat2": 439,
}  # fmt: skip
MACHINES = {"x86_64": (0xC000003E, _X86_64), "aarch64": (0xC00000B7, _AARCH64)}
"""Machine → its AUDIT_ARCH number and table."""

_LOAD, _EQUAL, _ANY_BIT, _AT_LEAST, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCH, _FIRST, _SECOND = 0, 4, 16, 24
"""Where struct seccomp_data holds the call's number, machine and the low halves of its first two arguments."""
_CLONE_THREAD = 0x10000
_X32 = 0x40000000
_FCNTL = (0, 1, 2, 3, 4, 1030)
"""Duplicate, close-on-exec, non-blocking. Trap: F_SETOWN and F_SETSIG would send any signal to any process of one's
user, where Landlock does not see signals.
"""
_IOCTL = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
"""Is it a terminal, its size, bytes to read, non-blocking, close-on-exec."""
_PID = 0x5A5A5A5A

Instruction = tuple[int, int, int, int]


def program_for(pid: int) -> bytes:
    """The classic BPF of the process ``pid``: it may signal and limit itself alone. Built once, then patched."""
    return _built().replace(struct.pack("I", _PID), struct.pack("I", pid))


@cache
def _built() -> bytes:
    arch, table = MACHINES[os.uname().machine]
    code: list[Instruction] = [(_LOAD, 0, 0, _ARCH), (_EQUAL, 1, 0, arch), (_RETURN, 0, 0, _KILL)]
    code += [(_LOAD, 0, 0, _NUMBER), (_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, _KILL)]
    code += _when(table["clone3"], [(_RETURN, 0, 0, _ERROR | errno.ENOSYS)])  # the C library then takes clone
    code += _when(table["clone"], [(_LOAD, 0, 0, _FIRST), (_ANY_BIT, 0, 1, _CLONE_THREAD), (_RETURN, 0, 0, _ALLOW)])
    code += _when(table["tgkill"], _one_of(_FIRST, (_PID,)))
    code += _when(table["prlimit64"], _one_of(_FIRST, (0, _PID)))
    code += _when(table["fcntl"], _one_of(_SECOND, _FCNTL))
    code += _when(table["ioctl"], _one_of(_SECOND, _IOCTL))
    for name, number in table.items():
        if name not in ("clone", "clone3", "tgkill", "prlimit64", "fcntl", "ioctl"):
            code += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    code.append((_RETURN, 0, 0, _ERROR | errno.EPERM))
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)


def _when(number: int, then: list[Instruction]) -> list[Instruction]:
    """``then`` for one system call, and EPERM where it decides nothing."""
    then = [*then, (_RETURN, 0, 0, _ERROR | errno.EPERM)]
    return [(_EQUAL, 0, len(then), number), *then]


def _one_of(argument: int, values: tuple[int, ...]) -> list[Instruction]:
    """Allowed with an argument among ``values``."""
    tests = [test for value in values for test in ((_EQUAL, 0, 1, value), (_RETURN, 0, 0, _ALLOW))]
    return [(_LOAD, 0, 0, argument), *tests]
