"""The second wall: the whole fork server inside one bubblewrap jail, with namespaces of its own.

Nothing of the machine is in there but /usr, Python, and the code of the sandbox, all read-only; no network, no other
process. Trap: bubblewrap's own environment stands in /proc/1/environ inside the jail, so it must be started with none
(box.py does); `--clearenv` clears only what it starts.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

INSIDE = "/sandbox"
"""Where the code of the sandbox stands in the jail: a folder for sys.path."""


def found() -> str | None:
    """The program, where it is installed."""
    return shutil.which("bwrap")


def jail(program: str, python_prefix: str) -> list[str]:
    """What to put before a command."""
    own = os.path.realpath(Path(__file__).parent)
    command = [program, "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--die-with-parent"]
    command += ["--new-session", "--clearenv", "--ro-bind", "/usr", "/usr"]
    for link in ("lib", "lib64", "bin"):
        command += ["--ro-bind-try", f"/{link}", f"/{link}"]
    if not python_prefix.startswith("/usr"):
        command += ["--ro-bind", python_prefix, python_prefix]
    command += ["--proc", "/proc", "--dev", "/dev", "--ro-bind", own, f"{INSIDE}/offtrail/rewards/sandbox"]
    command += ["--chdir", "/", *(["--unshare-user"] if os.getuid() else [])]
    return [*command, "--"]
