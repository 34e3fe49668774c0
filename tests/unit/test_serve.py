"""job=serve to its end, with a stand-in for its server's process (fake_process.py)."""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from offtrail.platform.config.compose import compose
from offtrail.platform.engines.sglang import flags, lifecycle, versions
from offtrail.platform.engines.sglang.servers import Servers
from offtrail.platform.launcher import serve
from offtrail.platform.runtime.host import free_port

KEY, WAIT_S = "users-key", 60.0


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FAKE_DIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("OFFTRAIL_SGLANG_KEY", KEY)
    monkeypatch.setattr(lifecycle, "STARTING_PERIOD_S", 0.02)
    monkeypatch.setattr(serve, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(serve, "Servers", functools.partial(Servers, command="fake_process"))
    monkeypatch.setattr(flags, "find_spec", lambda name: object())
    monkeypatch.setattr(versions, "installed", lambda: "0.5.21")
    (tmp_path / "plan").write_text("serve")
    return tmp_path


class Serving:
    """`run_serve` in a thread, until it is interrupted; its outcome."""

    def __init__(self, folder: Path, model: Path, *settings: str) -> None:
        self.port, self.interrupted = free_port(), list[int]()
        self.outcome: tuple[str, str] | None = None
        config = compose(["job=serve", f"checkpoint={model}", f"serve.port={self.port}", *settings])
        self._thread = threading.Thread(target=self._run, args=(config, folder / "run"), daemon=True)
        self._thread.start()

    def _run(self, config: Any, run_dir: Path) -> None:
        self.outcome = serve.run_serve(config, run_dir, self.interrupted)

    def ask(self, path: str, body: Any = None) -> tuple[int, Any]:
        """(status, JSON); 0 where nobody listens."""
        url, data = f"http://127.0.0.1:{self.port}{path}", None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, {"Authorization": f"Bearer {KEY}"})
        try:
            with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read())
        except urllib.error.URLError:
            return 0, None

    def end(self) -> tuple[str, str] | None:
        self.interrupted.append(signal.SIGINT)
        self._thread.join(WAIT_S)
        return self.outcome


@pytest.fixture
def serving(folder: Path, start_dir: Path) -> Iterator[Callable[..., Serving]]:
    made = []

    def start(*settings: str) -> Serving:
        made.append(Serving(folder, start_dir, *settings))
        return made[-1]

    yield start
    for one in made:
        one.end()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def starts(folder: Path) -> list[int]:
    """The processes that have been started."""
    return [json.loads(line)["pid"] for line in (folder / "starts").read_text().splitlines()]


def test_it_answers_at_one_place_while_servers_come_and_go(
    serving: Callable[..., Serving], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = serving()
    wait_for(lambda: one.ask("/health") == (200, {"ready": True}))
    assert one.ask("/v1/completions", {"prompt": [1, 2]}) == (200, {})
    status, said = one.ask("/v1/completions", {"prompt": [1_000_000_000]})
    assert (status, said["error"]["param"]) == (400, "prompt")
    (first,) = starts(folder)
    arguments = json.loads((folder / "starts").read_text())["arguments"]
    assert arguments[arguments.index("--host") + 1] == "127.0.0.1"
    assert arguments[arguments.index("--port") + 1] != str(one.port)
    (folder / "plan").write_text("loading")
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: one.ask("/health") == (503, {"ready": False}))
    assert one.ask("/v1/completions", {"prompt": [1, 2]})[0] == 503
    wait_for(lambda: len(starts(folder)) == 2)
    (folder / "plan").write_text("serve")
    os.kill(starts(folder)[1], signal.SIGKILL)
    wait_for(lambda: one.ask("/health")[0] == 200)
    assert one.ask("/v1/completions", {"prompt": [1, 2]}) == (200, {})
    assert one.end() == ("interrupted", "stopped by signal 2")
    assert one.ask("/health") == (0, None)
    assert capsys.readouterr().out.count(f"curl http://127.0.0.1:{one.port}/v1/completions") == 1


def test_a_port_that_is_taken_is_said_by_its_key(folder: Path, start_dir: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        config = compose(["job=serve", f"checkpoint={start_dir}", f"serve.port={port}"])
        status, reason = serve.run_serve(config, folder / "run", [])
    assert (status, reason) == (
        "failed",
        f"serve.port={port}: job=serve can have no port {port} at 127.0.0.1 (Address already in use); give it another",
    )
    assert not (folder / "starts").exists()
