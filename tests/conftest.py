"""What several test files share: a start model, batches of ragged groups, and one real SGLang server.

A session fails when anything of it is left on the machine at its end (leftovers.py).
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import settings

from cover import leave_a_cover
from leftovers import Session
from offtrail.core.types import Batch, Group, Problem
from offtrail.platform.config.schema import ModelConfig, SglangConfig

if TYPE_CHECKING:
    from offtrail.platform.engines.sglang.servers import Servers

# A loaded machine is no failure: no test asserts a time.
settings.register_profile("offtrail", deadline=None)
settings.load_profile("offtrail")

MakeBatch = Callable[..., Batch]
SESSION = pytest.StashKey[Session]()
LEFT = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    """Temporary folders of all processes of the session stand in one of its own; workers of xdist belong to it."""
    # A shell's background jobs ignore it, and all that they start; so would the runs that tests interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if not hasattr(config, "workerinput"):
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())  # tmp_path stays, to be looked at
        temporary = Path(tempfile.mkdtemp(prefix="offtrail-tests-"))
        os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)
        config.stash[SESSION] = Session(temporary)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """Hand out files, in their order: slow tests come first. Runs of the real command go one by one: what they share is
    made once for all workers (xdist's own `loadgroup` is deaf under pytest 9.2).
    """
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return nodeid if "/run/" in file else file

    config.option.loadscopereorder = False
    return Files(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Before `-m` chooses among them."""
    leave_a_cover(items)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """After the last test, and the end of the workers."""
    if (mine := session.config.stash.get(SESSION, None)) is not None:
        runs = session.config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]
        session.config.stash[LEFT] = mine.left(runs)
        if session.config.stash[LEFT]:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """What is left; and what tests have recorded as ``told``, which a worker cannot print."""
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for name, words in report.user_properties:
            if name == "told":
                terminalreporter.write_line(str(words))
    if left := config.stash.get(LEFT, []):
        terminalreporter.section("left behind by this session", red=True)
        for line in left:
            terminalreporter.write_line(line)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Everything temporary goes."""
    if (mine := config.stash.get(SESSION, None)) is not None:
        shutil.rmtree(mine.temporary, ignore_errors=True)


@pytest.fixture(scope="session")
def warmed() -> Iterator[None]:
    """The process that runs are forks of; it imports beside the tests that come first."""
    import warm

    server = warm.warm()
    yield
    server.close()


@pytest.fixture(scope="session")
def start_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of a two-layer model, with its tokenizer."""
    from offtrail.platform.model.tiny import save_start

    folder = tmp_path_factory.mktemp("model") / "start"
    save_start(folder, ModelConfig(hidden_size=32, layers=2, mlp_size=48, heads=4, kv_heads=2), seed=3)
    return folder


@pytest.fixture(scope="module")
def sglang_server(start_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Servers, Path]]:
    """One real server of the start model on this CPU, ready, and the model's folder. A test leaves it as it was."""
    from offtrail.platform.engines.sglang.servers import Servers

    servers = Servers(
        SglangConfig(max_running=32, start_seconds=240.0),
        start_dir,
        owner="session-0",
        count=1,
        max_length=128,
        threads=1,
        run_dir=tmp_path_factory.mktemp("sglang"),
    )
    try:
        servers.start()
        while not servers.ready():
            servers.poll()
            time.sleep(0.05)
        yield servers, start_dir
    finally:
        servers.close()


@pytest.fixture(scope="session")
def make_batch() -> MakeBatch:
    """Called with (step, B=4, G=3, seed=0): ragged groups whose tokens are of version ``step``, rewards 0 or 1."""

    def make(step: int, B: int = 4, G: int = 3, seed: int = 0, versions: int | None = None) -> Batch:
        rng = np.random.default_rng([seed, step])
        return Batch(step, tuple(group(rng, step * B + b, G, step if versions is None else versions) for b in range(B)))

    def group(rng: np.random.Generator, number: int, G: int, version: int) -> Group:
        lengths = rng.integers(1, 24, G).astype(np.int32)
        lengths[int(rng.integers(G))] = 1
        T = int(lengths.sum())
        rewards = rng.integers(0, 2, G).astype(np.float32)
        return Group(
            group=number,
            slot=number,
            attempt=0,
            problem=Problem("chain", number, "1+1", "2"),
            generator="generator-0",
            temperature=1.0,
            prompt_tokens=rng.integers(7, 60, int(rng.integers(3, 12))).astype(np.int32),
            lengths=lengths,
            tokens=rng.integers(3, 60, T).astype(np.int32),
            logprobs=-rng.gamma(4.0, 1.0, T).astype(np.float32),
            versions=np.full(T, version, np.int32),
            finish=np.zeros(G, np.uint8),
            rewards=rewards,
            components={"accuracy": rewards},
            times=np.zeros((G, 3)),
            queued_version=version,
        )

    return make
