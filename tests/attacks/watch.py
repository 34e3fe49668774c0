"""Runs the attacks and looks from outside for what they did. `python watch.py WALL` does it as whoever starts it."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attacks.harm import HARM
from attacks.score import OF_TESTS, SCORE
from offtrail.platform.verifier.keeper import descendants
from offtrail.rewards.sandbox.box import Box
from offtrail.rewards.sandbox.judge import Judged, judge
from offtrail.rewards.sandbox.runs import Limits

ATTACKS = SCORE | HARM
ENDLESS = {
    "endless_wire", "memory", "memory_catch", "bigint", "stdout_1gb", "inf_loop", "inf_loop_load", "sleep",
    "ignore_sigs", "threads", "thread_alive", "recursion", "fork_bomb", "reply_ahead", "trace_skip", "main_tamper",
    "json_tamper",
}  # fmt: skip
"""They may run to the deadline."""
SEEN: list[Any] = []
"""What the attacks' functions gave."""
TESTS = [f"SEEN.append(f({x}))\nassert SEEN[-1] == {x * x + 7}" for x in (2, -3, 10)]
META = {"asserts": TESTS, "functions": ["f"], "setup": "from attacks.watch import SEEN"}
RIGHT = "def f(x): return x*x+7"
PLENTY = Limits(seconds=60, cpu_seconds=20)


class Watch:
    """A secret, a listener, an open folder, a process with a token: what harm would be done to."""

    def __init__(self, folder: Path) -> None:
        self.token = f"token{os.urandom(8).hex()}"
        os.environ[self.token] = "LEAK"
        folder.chmod(0o755)
        self.marks, self.secret = folder / "marks", folder / "secret"
        self.marks.mkdir()
        self.marks.chmod(0o777)
        self.secret.write_text("LEAK")
        self.held = ctypes.create_string_buffer(b"LEAKLEAK")
        self.signals = 0
        self.before = signal.signal(signal.SIGUSR1, self._signalled)
        self.tcp = socket.create_server(("127.0.0.1", 0))
        self.abstract = socket.socket(socket.AF_UNIX)
        self.abstract.bind(f"\0{self.token}")
        self.abstract.listen()
        for one in (self.tcp, self.abstract):
            one.setblocking(False)
        wait = [sys.executable, "-I", "-S", "-c", "import sys; sys.stdin.read()", self.token]
        self.process = subprocess.Popen(wait, stdin=subprocess.PIPE)

    def _signalled(self, *_: object) -> None:
        self.signals += 1

    def close(self) -> None:
        self.process.communicate()
        self.tcp.close()
        self.abstract.close()
        signal.signal(signal.SIGUSR1, self.before)
        del os.environ[self.token]

    def aimed(self, program: str) -> str:
        """An attack at these."""
        names = f"HARNESS, HADDR, PORT = {os.getpid()}, {ctypes.addressof(self.held)}, {self.tcp.getsockname()[1]}\n"
        names += f"MARKS, SECRET = {str(self.marks)!r}, {str(self.secret)!r}\n"
        return names + program.replace("TOKEN", self.token)

    def harm(self) -> list[str]:
        """What has been done since the last look."""
        done = [f"gave {value!r}"[:60] for value in SEEN if "LEAK" in repr(value)]
        SEEN.clear()
        done += [f"signalled {self.signals} times"] * bool(self.signals)
        self.signals = 0
        done += [f"wrote {path.name}" for path in self.marks.iterdir()]
        for folder in ("/tmp", "/var/tmp", "/dev/shm", ".", "/usr/lib", "/lib", *sys.path):
            if (left := Path(folder, self.token)).exists():
                done.append(f"wrote {left}")
        if not self.secret.is_file() or self.secret.read_text() != "LEAK" or self.secret.stat().st_mode & 0o111:
            done.append("changed the secret")
        for name, one in (("TCP", self.tcp), ("abstract", self.abstract)):
            try:
                one.accept()[0].close()
                done.append(f"connected over {name}")
            except BlockingIOError:
                pass
        return done


@contextmanager
def watching(folder: Path) -> Iterator[Watch]:
    watch = Watch(folder)
    try:
        yield watch
    finally:
        watch.close()


def below(box: Box) -> set[int]:
    """The processes of a box."""
    return {box.server, *descendants(box.server)}


def attacked(box: Box, watch: Watch, name: str) -> tuple[Judged, list[str]]:
    """What an attack scores, and the harm it does."""
    before = below(box)
    box.limits = Limits(0.7, 1) if name in ENDLESS else PLENTY
    program, tests = (OF_TESTS[name][0], [OF_TESTS[name][1]]) if name in OF_TESTS else (ATTACKS[name], TESTS)
    judged = judge(box, watch.aimed(program), META | {"asserts": tests})
    harm = watch.harm()
    harm += [f"left process {pid}" for pid in below(box) - before]
    return judged, harm


def main(wall: Any) -> None:
    """Print {name: [reason, harm…]} of the attacks that succeed, and whether the box still works after them."""
    from attacks.watch import watching  # trap: of this module there must be one, for SEEN

    found: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder, watching(Path(folder)) as watch, Box(wall, PLENTY) as box:
        start = time.monotonic()
        for name in (*ATTACKS, *OF_TESTS):
            judged, harm = attacked(box, watch, name)
            if judged.score or harm:
                found[name] = [judged.reason, *harm]
        box.limits = PLENTY
        alive = judge(box, RIGHT, META).reason
    print(json.dumps({"uid": os.getuid(), "found": found, "alive": alive, "seconds": time.monotonic() - start}))


if __name__ == "__main__":
    from attacks.watch import main as run

    run(sys.argv[1])
