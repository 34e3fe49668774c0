"""Servers against stand-ins for their processes (fake_process.py): ready, dead, hung, stopped, portless, closed."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import offtrail
from leftovers import alive
from offtrail.platform.config.schema import Config, SglangConfig
from offtrail.platform.engines.sglang import health, lifecycle, versions
from offtrail.platform.engines.sglang.servers import ServerError, Servers, read_addresses
from offtrail.platform.runtime.context import own_name, remove_leftovers

FakeServers = Callable[..., Servers]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """$FAKE_DIR of the stand-ins."""
    monkeypatch.setenv("FAKE_DIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setattr(lifecycle, "STARTING_PERIOD_S", 0.02)
    monkeypatch.setattr(lifecycle, "RUNNING_PERIOD_S", 0.05)
    return tmp_path


@pytest.fixture
def make(folder: Path) -> Iterator[FakeServers]:
    """Called with (plan, count=1, settings of SglangConfig): started servers, closed at the end."""
    made = []

    def build(plan: str = "serve", count: int = 1, **settings: Any) -> Servers:
        (folder / "plan").write_text(plan)
        config = SglangConfig(**{"start_seconds": 60.0, "hang_seconds": 60.0, **settings})
        servers = Servers(
            config, folder / "model", owner="generator-0", count=count, max_length=64, threads=1,
            run_dir=folder / "run", command="fake_process",
        )  # fmt: skip
        made.append(servers)
        servers.start()
        return servers

    yield build
    for servers in made:
        servers.close()


def until(servers: Servers, reached: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not reached():
        servers.poll()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def starts(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "starts").read_text().splitlines()]


def file_of(folder: Path) -> Path:
    return folder / "run" / "servers" / "generator-0.json"


def test_two_servers_become_ready_with_keys_of_their_own_and_are_written_for_this_user_alone(
    make: FakeServers, folder: Path
) -> None:
    servers = make(count=2)
    assert servers.ready() == []
    assert read_addresses(file_of(folder)) == {}
    assert servers.describe().count("of generator-0 (http://127.0.0.1:") == 2
    until(servers, lambda: len(servers.ready()) == 2)
    assert servers.describe() == ""
    first, second = servers.address(0), servers.address(1)
    assert first.url != second.url
    assert (first.incarnation, first.key, first.admin_key) == (1, second.key, second.admin_key)
    assert first.key != first.admin_key
    assert len(first.key) == 32
    assert read_addresses(file_of(folder)) == {0: first, 1: second}
    assert stat.S_IMODE(file_of(folder).stat().st_mode) == 0o600
    for place in (0, 1):
        log = folder / "run" / "logs" / f"sglang-generator-0-{place}.log"
        assert stat.S_IMODE(log.stat().st_mode) == 0o600
    for start in starts(folder):
        assert first.key not in " ".join(psutil.Process(start["pid"]).cmdline())


def test_a_dead_server_is_started_anew_at_another_port(make: FakeServers, folder: Path) -> None:
    servers = make()
    until(servers, servers.ready)
    before, written = servers.address(0), []
    os.kill(starts(folder)[0]["pid"], signal.SIGKILL)

    def again() -> bool:
        if (now := read_addresses(file_of(folder))) not in written:
            written.append(now)
        return 0 in now and now[0].incarnation == 2

    until(servers, again)
    assert [list(now) for now in written] == [[0], [], [0]]
    after = servers.address(0)
    assert (after.incarnation, after.key) == (2, before.key)
    assert after.url != before.url
    assert servers.ready() == [0]
    old, new = starts(folder)
    assert not alive(old["child"])
    assert alive(new["pid"])


def test_a_stopped_tree_is_killed_and_started_anew(make: FakeServers, folder: Path) -> None:
    servers = make()
    until(servers, servers.ready)
    (start,) = starts(folder)
    for pid in (start["child"], start["pid"]):
        os.kill(pid, signal.SIGSTOP)
    servers.kill(0, "made no token for 120 s (engine.hang_seconds)")
    assert not alive(start["pid"])
    assert not alive(start["child"])
    assert servers.ready() == []
    assert read_addresses(file_of(folder)) == {}
    until(servers, servers.ready)
    assert servers.address(0).incarnation == 2


def test_a_server_that_stops_answering_is_killed_and_started_anew(
    make: FakeServers, folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "TIMEOUT_S", 0.2)
    servers = make(hang_seconds=0.5)
    until(servers, servers.ready)
    (folder / "hang").touch()
    until(servers, lambda: len(starts(folder)) == 2)
    (folder / "hang").unlink()
    until(servers, servers.ready)
    assert "has not answered for 0.5 s (engine.hang_seconds): does not answer" in caplog.text
    assert not alive(starts(folder)[0]["child"])


def test_a_poll_that_comes_late_is_not_held_against_the_server(make: FakeServers, folder: Path) -> None:
    servers = make(hang_seconds=0.3)
    until(servers, servers.ready)
    for _ in range(3):
        time.sleep(0.5)  # the caller was busy for longer than hang_seconds
        servers.poll()
    assert servers.ready() == [0]
    assert len(starts(folder)) == 1


def test_too_many_deaths_are_the_end(make: FakeServers, folder: Path) -> None:
    servers = make(max_restarts=2)
    for turn in range(3):
        until(servers, lambda turn=turn: servers.ready() and len(starts(folder)) == turn + 1)  # type: ignore[misc]
        os.kill(starts(folder)[-1]["pid"], signal.SIGKILL)
    with pytest.raises(ServerError) as caught:
        until(servers, lambda: len(starts(folder)) == 4)
    text = str(caught.value)
    assert text.startswith(
        "SGLang server 0 of generator-0 died 3 times (engine.max_restarts=2): it was killed by SIGKILL"
    )
    assert "sglang-generator-0-0.log" in text
    assert read_addresses(file_of(folder)) == {}


def test_a_restart_that_fails_counts_as_a_death(make: FakeServers, folder: Path) -> None:
    servers = make("serve,exit,exit,serve", max_restarts=3)
    until(servers, servers.ready)
    os.kill(starts(folder)[-1]["pid"], signal.SIGKILL)
    until(servers, lambda: servers.ready() and len(starts(folder)) == 4)
    assert servers.address(0).incarnation == 4


def test_a_server_that_cannot_start_says_why_at_once(make: FakeServers, folder: Path) -> None:
    servers = make("exit")
    with pytest.raises(ServerError) as caught:
        until(servers, servers.ready)
    assert str(caught.value) == (
        "SGLang server 0 of generator-0 does not start: it exited with status 3; last words: RuntimeError: no weights "
        f"here (log: {folder}/run/logs/sglang-generator-0-0.log)"
    )
    assert len(starts(folder)) == 1
    assert not alive(starts(folder)[0]["child"])


def test_a_start_ends_at_its_deadline_and_says_what_was_waited_for(make: FakeServers) -> None:
    servers = make("loading", start_seconds=0.5)
    with pytest.raises(ServerError) as caught:
        until(servers, servers.ready)
    text = str(caught.value)
    for part in ("waited for SGLang server 0 of generator-0 (http://127.0.0.1:", " since ", " until ",
                 "raise engine.start_seconds", "sglang-generator-0-0.log"):  # fmt: skip
        assert part in text
    assert "\n" not in text


def test_a_taken_port_is_no_death(make: FakeServers, folder: Path) -> None:
    servers = make("taken,taken,serve", max_restarts=0)
    until(servers, servers.ready)
    ports = [start["arguments"][start["arguments"].index("--port") + 1] for start in starts(folder)]
    assert len(ports) == 3
    assert servers.address(0).url == f"http://127.0.0.1:{ports[-1]}"


def test_a_stranger_on_the_port_is_not_taken_for_the_server(
    make: FakeServers, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger = make()
    until(stranger, stranger.ready)
    port = int(stranger.address(0).url.rpartition(":")[2])
    monkeypatch.setattr(lifecycle, "free_port", lambda *_: port)
    servers = make(start_seconds=3.0)
    with pytest.raises(ServerError, match=f"{port}/health_generate answers 401"):
        until(servers, servers.ready)
    assert stranger.ready() == [0]


def test_close_leaves_no_process_and_no_file(make: FakeServers, folder: Path) -> None:
    servers = make(count=2)
    until(servers, lambda: len(servers.ready()) == 2)
    temporary = {psutil.Process(start["pid"]).environ()["TMPDIR"] for start in starts(folder)}
    os.kill(starts(folder)[0]["pid"], signal.SIGKILL)  # its child is an orphan, for a moment
    servers.close()
    servers.close()
    assert not any(alive(start[who]) for start in starts(folder) for who in ("pid", "child"))
    assert not file_of(folder).exists()
    assert not any(Path(place).exists() for place in temporary)
    assert servers.ready() == []


OWNER = """
import sys, time
from pathlib import Path
from offtrail.platform.config.schema import SglangConfig
from offtrail.platform.engines.sglang.servers import Servers
folder = Path(sys.argv[1])
servers = Servers(SglangConfig(), folder / "model", owner="generator-0", count=1, max_length=64, threads=1,
                  run_dir=folder / "run", command="fake_process")
servers.start()
while not servers.ready():
    servers.poll()
    time.sleep(0.01)
print("ready", flush=True)
time.sleep(600)
"""


def test_servers_die_with_an_owner_that_is_killed_and_the_run_takes_what_they_left(folder: Path) -> None:
    (folder / "plan").write_text("serve")
    path = os.pathsep.join((str(Path(offtrail.__file__).parents[1]), str(Path(__file__).parent)))
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, str(folder)], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": path}
    ) as owner:
        try:
            assert owner.stdout is not None
            assert owner.stdout.readline() == b"ready\n"
        finally:
            owner.kill()
    (start,) = starts(folder)
    deadline = time.monotonic() + 30
    while alive(start["pid"]) or alive(start["child"]):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    left = list(Path(tempfile.gettempdir()).glob(f"{own_name(folder / 'run')}-*-sglang-*"))
    assert len(left) == 1
    remove_leftovers(Config(), folder / "run")
    assert not left[0].exists()
    assert not (folder / "run" / "servers").exists()


# Attached


@pytest.fixture
def running(make: FakeServers, monkeypatch: pytest.MonkeyPatch) -> Servers:
    """A server that somebody else runs, and its keys in the environment."""
    servers = make()
    until(servers, servers.ready)
    address = servers.address(0)
    monkeypatch.setenv("OFFTRAIL_SGLANG_KEY", address.key)
    monkeypatch.setenv("OFFTRAIL_SGLANG_ADMIN_KEY", address.admin_key)
    return servers


def attach(folder: Path, url: str, **settings: Any) -> Servers:
    config = SglangConfig(urls=[url], **{"start_seconds": 60.0, "hang_seconds": 60.0, **settings})
    servers = Servers(config, folder, owner="evaluator-0", count=1, max_length=64, threads=1, run_dir=folder / "run")
    servers.start()
    return servers


def refusal(servers: Servers, reached: Callable[[], Any] | None = None) -> str:
    with pytest.raises(ServerError) as caught:
        until(servers, reached or servers.ready)
    servers.close()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_attached_server_is_used_and_left_alone(running: Servers, folder: Path) -> None:
    url = running.address(0).url
    servers = attach(folder, url + "/")
    until(servers, servers.ready)
    assert servers.address(0) == running.address(0)
    assert read_addresses(folder / "run" / "servers" / "evaluator-0.json") == {0: running.address(0)}
    with pytest.raises(ServerError, match=f"engine.urls: {url} made no token; offtrail has not started it"):
        servers.kill(0, "made no token")
    servers.close()
    assert alive(starts(folder)[0]["pid"])


def test_an_attached_server_that_dies_is_an_error(running: Servers, folder: Path) -> None:
    servers = attach(folder, running.address(0).url)
    until(servers, servers.ready)
    running.close()
    assert refusal(servers, lambda: False).startswith(f"engine.urls: {running.address(0).url} does not answer")


def test_an_attached_server_that_hangs_is_an_error(
    running: Servers, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "TIMEOUT_S", 0.2)
    servers = attach(folder, running.address(0).url, hang_seconds=0.5)
    until(servers, servers.ready)
    (folder / "hang").touch()
    assert "has not answered for 0.5 s (engine.hang_seconds)" in refusal(servers, lambda: False)
    (folder / "hang").unlink()


def test_an_attached_server_that_is_not_there_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFTRAIL_SGLANG_KEY", "a")
    monkeypatch.setenv("OFFTRAIL_SGLANG_ADMIN_KEY", "b")
    url = f"http://127.0.0.1:{lifecycle.free_port('127.0.0.1')}"
    text = refusal(attach(folder, url, start_seconds=0.5))
    assert text.startswith(f"engine.urls: waited for {url} ({url}) since ")
    assert "Connection refused" in text


@pytest.mark.parametrize("variable", ["OFFTRAIL_SGLANG_KEY", "OFFTRAIL_SGLANG_ADMIN_KEY"])
def test_a_refused_key_is_named(running: Servers, folder: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "wrong")
    assert f"refuses the key of ${variable} (401)" in refusal(attach(folder, running.address(0).url))
    monkeypatch.delenv(variable)
    with pytest.raises(ServerError, match=r"engine\.urls: set \$OFFTRAIL_SGLANG_KEY and"):
        attach(folder, running.address(0).url)


@pytest.mark.parametrize(
    ("version", "says"),
    [("0.5.16", "SGLang 0.5.16 is too old"), ("", "does not say its version"), ("main", "is 'main', which is none")],
)
def test_an_attached_server_must_be_of_a_known_version(
    folder: Path, make: FakeServers, monkeypatch: pytest.MonkeyPatch, version: str, says: str
) -> None:
    monkeypatch.setenv("FAKE_VERSION", version)
    running = make()
    until(running, running.ready)
    monkeypatch.setenv("OFFTRAIL_SGLANG_KEY", running.address(0).key)
    monkeypatch.setenv("OFFTRAIL_SGLANG_ADMIN_KEY", running.address(0).admin_key)
    assert says in refusal(attach(folder, running.address(0).url))


# Versions


@pytest.mark.parametrize(
    ("version", "tells", "retracts", "session"),
    [("0.5.17", 0, 0, 0), ("0.5.18", 0, 0, 0), ("0.5.19", 1, 0, 0), ("0.5.20.post2", 1, 0, 0), ("v0.5.21", 1, 1, 1),
     ("0.6.0rc1", 1, 1, 1)],
)  # fmt: skip
def test_what_a_version_can_do(version: str, tells: bool, retracts: bool, session: bool) -> None:
    assert (versions.parse(version) >= versions.TELLS_VERSIONS) == tells
    assert versions.can_retract(version) == retracts
    assert versions.needs_session(version) == session


def test_settings_that_a_version_cannot_honour_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    keep, retract = SglangConfig(kv_on_update="keep"), SglangConfig(pause_mode="retract")
    assert versions.refusal("0.5.18", SglangConfig()) is None
    assert str(versions.refusal("0.5.18", keep)).startswith("engine.kv_on_update=keep: SGLang 0.5.18 does not say")
    assert versions.refusal("0.5.19", keep) is None
    assert str(versions.refusal("0.5.20", retract)).startswith("engine.pause_mode=retract: SGLang 0.5.20 dies")
    assert versions.refusal("0.5.21", retract) is None
    assert str(versions.refusal("0.5.16", SglangConfig())).startswith("engine.name=sglang: SGLang 0.5.16 is too old")
    assert not caplog.records
    assert versions.refusal("0.5.23", keep) is None
    assert "0.5.23 is newer than 0.5.21" in caplog.text
    with pytest.raises(ValueError, match="none that offtrail can read"):
        versions.refusal("nightly", SglangConfig())
