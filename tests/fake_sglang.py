"""A stand-in for an SGLang server: its HTTP contract over a LocalEngine, so that tokens, log-probabilities and weights
are real.

    HTTP ──► endpoints ──► manager (request states, pause, update lock) ──► scheduler (thread: waiting, running, steps)

`python tests/fake_sglang.py --model-path DIR --port P [--api-key K] [--admin-api-key A] [--sglang-version 0.5.21]
[--step-seconds 0] [--linger-seconds 0] …` runs it as a process, which takes SGLang's other flags and ignores them;
FakeServer runs it in a thread; Servers(…, command="fake_sglang"), with tests/ on PYTHONPATH, runs it in serve.py's
place. Its parts are in tests/fakes/, cut as SGLang is.

tests/process/test_sglang_contract.py holds it to what a real server does. In short:
- what kills a real server (an unknown token id, a flush under running requests, tensors of another shape, an unknown
  load format) kills this one: the process by SIGKILL, FakeServer by cutting every connection;
- prefixes come from a radix cache, whose keys and values are those of the weights that made them, until it is flushed;
- who leaves a call without `stream` is noticed at once, where SGLang takes up to 4 s.

Not here: text beyond a tokenizer.json, its trimming at stop strings, penalties, min_p, grammars, chat endpoints,
weights from IPC, memory release.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

from aiohttp import web

from fakes.endpoints import Api
from fakes.manager import Manager
from offtrail.platform.engines.sglang.serve import die_with, keys_as_flags
from offtrail.platform.engines.spec import read_spec


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The flags that mean something here, with what the model's config.json decides; unknown ones are ignored."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--model-path", "--model", required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--api-key")
    parser.add_argument("--admin-api-key")
    parser.add_argument("--sglang-version", default="0.5.21")
    parser.add_argument("--guarded", action="store_true")
    parser.add_argument("--step-seconds", type=float, default=0.0)
    parser.add_argument("--linger-seconds", type=float, default=0.0)
    parser.add_argument("--max-running-requests", type=int, default=64)
    parser.add_argument("--max-total-tokens", type=int, default=65536)
    parser.add_argument("--context-length", type=int)
    parser.add_argument("--stream-interval", type=int, default=1)
    parser.add_argument("--incremental-streaming-output", action="store_true")
    parser.add_argument("--skip-tokenizer-init", action="store_true")
    parser.add_argument("--enable-metrics", action="store_true")
    parser.add_argument("--enable-deterministic-inference", action="store_true")
    parser.add_argument("--disable-radix-cache", action="store_true")
    parser.add_argument("--custom-weight-loader", nargs="*", default=[])
    parser.add_argument("--weight-version", default="default")
    parser.add_argument("--tp-size", "--tensor-parallel-size", "--tp", type=int, default=1)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--random-seed", type=int)
    options, _ = parser.parse_known_args(arguments)
    config = json.loads((Path(options.model_path) / "config.json").read_text())
    options.eos = read_eos(Path(options.model_path))
    options.positions = read_spec(Path(options.model_path)).max_positions
    options.context_length = options.context_length or options.positions
    if options.dtype == "auto":
        options.dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    if options.random_seed is None:
        options.random_seed = int.from_bytes(os.urandom(4))
    return options


def read_eos(model_dir: Path) -> frozenset[int]:
    """End tokens of the model's configuration and of its generation configuration, as SGLang takes both."""
    ids: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        if (model_dir / name).is_file():
            eos = json.loads((model_dir / name).read_text()).get("eos_token_id")
            ids |= set(eos if isinstance(eos, list) else [] if eos is None else [eos])
    return frozenset(ids)


@contextlib.asynccontextmanager
async def serving(options: argparse.Namespace, die: Callable[[str], None]) -> AsyncIterator[tuple[Manager, int]]:
    """The server, at the port that it got."""
    manager = Manager(options, die)
    api = Api(options, manager)
    runner = web.AppRunner(api.app, handler_cancellation=True, keepalive_timeout=5.0, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, options.host, options.port).start()
        yield manager, int(runner.addresses[0][1])
    finally:
        manager.scheduler.stopped = True
        manager.tell(lambda: None)
        await runner.cleanup()


class FakeServer:
    """A fake server in a thread of this process: ``with FakeServer("--model-path", …) as server: server.url``.

    ``died`` is the traceback of what would have killed a process.
    """

    def __init__(self, *arguments: str) -> None:
        self.options = parse(["--port", "0", *arguments])
        self.url = self.died = ""
        self._ready, self._stop = threading.Event(), asyncio.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        try:
            async with serving(self.options, self._die) as (_, port):
                self.url = f"http://{self.options.host}:{port}"
                self._ready.set()
                await self._stop.wait()
        except Exception as error:
            self._failure = error
        finally:
            self._ready.set()

    def _die(self, words: str) -> None:
        self.died = words
        self._loop.call_soon_threadsafe(self._stop.set)

    def __enter__(self) -> FakeServer:
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            raise self._failure
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(RuntimeError):  # it died before
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10.0)


def kill_self(words: str) -> None:
    """What an exception in SGLang's scheduler ends in."""
    print(f"Scheduler hit an exception: {words}", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


async def main(arguments: Sequence[str]) -> None:
    """Serve until SIGTERM or SIGINT; then requests are let end first, unless the server is ill."""
    flags: list[str] = []
    if arguments[0].isdecimal():  # in serve.py's place
        die_with(int(arguments[0]))
        flags = ["--guarded", *keys_as_flags()]
    options = parse([*arguments, *flags])
    told = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, told.set)
    async with serving(options, kill_self) as (manager, _):
        print("The server is fired up and ready to roll!", flush=True)
        await told.wait()
        manager.leaving = True
        while manager.states and not manager.unhealthy:
            await asyncio.sleep(0.02)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
