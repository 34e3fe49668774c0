"""The SGLang engine: ``core.protocols.Engine`` over servers that it starts and watches, or that run already.

    Rollout, Evaluation ── generate, step ──► Client (client.py) ──► servers
                        ── load_weights ────► swap (control.py), on every server that is behind, side by side
    watch (every 0.25 s): servers.poll ──► who is up ──► Client.set_places

Invariants: a server serves only while it holds the version that was loaded last, so that one that was started anew
waits for `load_weights`, which `version` asks for by being lower; a dead or hung server's requests are `lost` whole,
once, and never answered after that; nothing that this engine started outlives it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from offtrail.core.protocols import Completion, Request
from offtrail.core.types import Float32, Int32
from offtrail.platform.config.schema import LoraConfig, SglangConfig
from offtrail.platform.engines.limits import check_request, check_tokens
from offtrail.platform.engines.sglang import versions
from offtrail.platform.engines.sglang.adapters import FromAdapter, Loaded, check_adapters, server_flags, write
from offtrail.platform.engines.sglang.client import Client, Loop, Place, logprobs_of, under_version
from offtrail.platform.engines.sglang.control import (
    LOADER,
    AnsweredError,
    ControlError,
    FromDirectory,
    FromFile,
    FromMemory,
    LoaderRefusedError,
    PauseMode,
    Server,
    TornError,
    Transfer,
    hand_back,
    swap,
)
from offtrail.platform.engines.sglang.job import LostError
from offtrail.platform.engines.sglang.servers import SERVER, Address, ServerError, Servers
from offtrail.platform.engines.sglang.shapes import check_shapes, read_shapes
from offtrail.platform.engines.stops import StopStrings
from offtrail.platform.model.cost import Cost, active
from offtrail.platform.weights.memory import Handles, Pushed
from offtrail.platform.weights.store import Published, copy_whole

log = logging.getLogger("offtrail.generator")

ASK_SECONDS = 5.0
WATCH_SECONDS = 0.25
STEP_SECONDS = 0.02
"""The longest that `step` waits for a sample to finish."""


class SglangEngine:
    """``count`` servers of the model in ``model_dir`` for the role ``owner``; ``max_length`` bounds prompt + answer.
    ``as_it_is``: servers of engine.urls serve the model that they have, and count as version 0; the folder then
    needs no weights. ``adapters``: later versions are adapters alone, with these settings (adapters.py). ``command`` is
    the module of one server, for tests.

    Raises:
        ValueError: a request or a version that does not fit the model, before anything is sent.
        ServerError: a server does not start in engine.start_seconds, or dies more than engine.max_restarts times.
    """

    def __init__(
        self,
        model_dir: Path,
        config: SglangConfig,
        *,
        max_length: int,
        threads: int,
        owner: str,
        count: int,
        run_dir: Path,
        as_it_is: bool = False,
        adapters: LoraConfig | None = None,
        command: str = SERVER,
    ) -> None:
        described = json.loads((model_dir / "config.json").read_text())
        self._as_it_is = as_it_is and bool(config.urls)
        self._shapes = {} if self._as_it_is and not any(model_dir.glob("*.safetensors")) else read_shapes(model_dir)
        self.vocab_size = int(described["vocab_size"])
        self.max_length, self._config, self._owner = max_length, config, owner
        self.capacity = config.max_running * max(1, len(config.urls) or count)
        self._cost = _cost(described, self._shapes)
        self._scored = 0.0
        self._target = 0
        self._held: Mapping[Address, int] = {}
        """What each server that is up holds; −1: not known. Replaced, never changed: two threads read it."""
        self._noting = threading.Lock()
        self._awaiting: frozenset[Address] = frozenset()
        """Servers that are up and wait for the learner's push of the version loaded last."""
        self._about: dict[Address, dict[str, Any]] = {}
        self._adapters = adapters
        self._loaded = Loaded()
        self._failure: Exception | None = None
        self._remaining: Counter[int] = Counter()
        self._lost: list[int] = []
        self._paused = False
        self.servers = Servers(
            config,
            model_dir,
            owner=owner,
            count=count,
            max_length=max_length,
            threads=threads,
            run_dir=run_dir,
            as_it_is=self._as_it_is,
            more_flags=server_flags(config, adapters, self._shapes) if adapters is not None else (),
            command=command,
        )
        self._stops = StopStrings(model_dir)
        self._loop = Loop(f"sglang-{owner}")
        try:
            self._loop.run(self._start())  # the kernel kills servers when the thread ends that started them
        except BaseException:
            self._loop.close()
            self.servers.close()
            raise
        self._client = Client(
            self._loop,
            prefix_tokens=config.prefix_tokens,
            keyed="--enable-deterministic-inference" in config.flags,
            recomputes=config.kv_on_update == "recompute",
            stops=self._stops,
            adapted=adapters is not None,
        )
        self._watching = self._loop.submit(self._watch())

    # --- the Engine protocol ---

    @property
    def version(self) -> int:
        """The lowest version that a server holds which is up, without those that the learner has yet to push to; before
        the first is up, what the servers start with.
        """
        held, awaiting = self._held, self._awaiting
        given = [version for address, version in held.items() if address not in awaiting]
        return min(given or held.values(), default=self._target)

    @property
    def replicas(self) -> int:
        """Servers that are up."""
        return len(self._held)

    @property
    def waiting_for(self) -> str:
        """The server that the engine waits for, where none can serve; else empty (I4)."""
        self._raise_failure()
        return "" if self._client.serves else self.servers.describe() or "its servers, which hold another version"

    @property
    def unfinished(self) -> int:
        """Samples submitted and not yet returned."""
        return self._remaining.total()

    @property
    def counters(self) -> dict[str, float]:
        """Cumulative; operations of attention and layers by the same formula as the local engine's."""
        counters = dict(self._client.counters)
        decoded, attended = counters["decoded_tokens"], counters.pop("attended")
        prefilled = counters["prefilled_tokens"] + counters["reprefilled_tokens"] + self._scored
        flops = self._cost.total(tokens=decoded + prefilled, heads=decoded + self._scored, attended=attended)
        return counters | {"scored_tokens": self._scored, "flops": flops}

    def generate(self, requests: Sequence[Request]) -> None:
        """Queue requests; all are checked before any is queued."""
        self._raise_failure()
        for request in requests:
            check_request(request, vocab_size=self.vocab_size, max_length=self.max_length)
            if request.sampling.stop:
                self._stops.load()
        for request in requests:
            self._remaining[request.id] += request.samples
        self._client.generate(requests)

    def step(self) -> list[Completion]:
        """Wait a moment for samples to finish, and return those that have."""
        self._raise_failure()
        return [] if self._paused else self._take(STEP_SECONDS)

    def lost(self) -> list[int]:
        """Requests whose server died or broke off since the last call; their samples are forgotten."""
        lost, self._lost = self._lost, []
        return lost

    def logprobs(
        self, prompts: Sequence[Int32], outputs: Sequence[Int32], temperature: float, replica: int = 0
    ) -> list[Float32]:
        """Log-probabilities [T_i] of the outputs by prefill, on the ``replica``-th server.

        Raises ValueError at a temperature other than 1: a server gives log-probabilities of a prompt at 1 alone;
        ConnectionError when there is no such server that holds the version loaded last, or it broke off.
        """
        if temperature != 1.0:
            raise ValueError(f"score at temperature={temperature}: SGLang scores given tokens at 1 only")
        if len(prompts) != len(outputs):
            raise ValueError(f"score: {len(prompts)} prompts but {len(outputs)} outputs")
        for prompt, output in zip(prompts, outputs, strict=True):
            whole = np.concatenate((prompt, output))
            check_tokens("score", prompt, whole, len(whole), vocab_size=self.vocab_size, max_length=self.max_length)
        address = self._address(replica)
        self._scored += sum(len(p) + len(o) - 1 for p, o in zip(prompts, outputs, strict=True))
        try:
            return list(self._loop.run(self._scores(address, prompts, outputs)))
        except (LostError, aiohttp.ClientError, TimeoutError, OSError) as error:
            raise ConnectionError(f"{address.url} broke off: {type(error).__name__}: {error}") from error

    def load_weights(self, version: int, weights: Mapping[str, Any]) -> None:
        """Bring every server that is up to ``version``: a `Published` version of the store, `Handles` to the learner's
        memory, or `Pushed` (the learner gives it to those that are up; one that came late takes no samples before it
        has been given it too). Where no server is up, nothing happens.

        Raises ValueError when names or shapes differ from the model's, or a server's loader refuses the version, and
        FileNotFoundError when the version is no longer kept; all leave the servers as they were.
        """
        self._check_names(version, weights)
        if isinstance(weights, Pushed):
            self._raise_failure()
            self._loop.run(self._hear(version))
        else:
            self._awaiting = frozenset()
            with self._transfer(version, weights) as transfer:
                self._bring(version, transfer)
        if self._held:
            self._target = version
        self._loop.loop.call_soon_threadsafe(self._serve)

    def pause(self) -> None:
        """Hand out nothing until ``resume``. The servers finish what they have begun."""
        self._paused = True

    def resume(self) -> None:
        """Go on after ``pause``."""
        self._paused = False

    def cancel(self, requests: Sequence[int]) -> None:
        """Drop the unfinished samples of these requests, and have their servers abort them."""
        gone = set(requests)
        self._client.cancel(gone)
        self._lost = [request for request in self._lost if request not in gone]
        for request in gone:
            self._remaining.pop(request, None)

    def abort(self) -> list[Completion]:
        """Return every unfinished sample as it is."""
        finished = self._take(0.0)
        partial = self._client.abort()
        self._remaining = Counter()
        return finished + partial

    def release(self) -> None:
        """Nothing: a server keeps its weights."""

    def close(self) -> None:
        """Abort what runs, then end the servers that this engine started."""
        self._watching.cancel()
        with contextlib.suppress(Exception):
            if self._config.urls:
                self._client.abort()
        self._loop.close()
        self.servers.close()

    # --- samples ---

    def _take(self, timeout_s: float) -> list[Completion]:
        done, lost = self._client.take(timeout_s)
        for request in lost:
            del self._remaining[request]
            self._lost.append(request)
        done = [completion for completion in done if self._remaining[completion.request] > 0]
        self._remaining.subtract(completion.request for completion in done)
        self._remaining += Counter()  # without those at 0
        return done

    async def _scores(self, address: Address, prompts: Sequence[Int32], outputs: Sequence[Int32]) -> list[Float32]:
        limit, session = self._config.hang_seconds, self._loop.session
        version = self._held.get(address, -1)
        under = under_version(version, adapted=self._adapters is not None)
        calls = [logprobs_of(session, address, under, p, o, limit) for p, o in zip(prompts, outputs, strict=True)]
        return [np.array(found, np.float32) for found in await asyncio.gather(*calls)]

    def _address(self, replica: int) -> Address:
        current = [address for address, held in self._held.items() if held == self._target]
        if replica >= len(current):
            raise ConnectionError(f"{len(current)} servers of {self._owner} hold version {self._target}")
        return current[replica]

    # --- weights ---

    def _check_names(self, version: int, weights: Mapping[str, Any]) -> None:
        if self._adapters is not None:
            check_adapters(version, weights, self._shapes)
        elif isinstance(weights, Published):
            check_shapes(version, {name: tuple(tensor.shape) for name, tensor in weights.items()}, self._shapes)
        elif isinstance(weights, Handles):  # else it is the learner's own business
            check_shapes(version, dict(weights), self._shapes)

    @contextlib.contextmanager
    def _transfer(self, version: int, weights: Mapping[str, Any]) -> Iterator[Transfer]:
        if self._adapters is not None and isinstance(weights, Published):
            with tempfile.TemporaryDirectory(prefix=f"offtrail-v{version}-", dir=weights.folder) as folder:
                write(Path(folder), weights, self._adapters, self._shapes)
                yield FromAdapter(Path(folder), version)
        elif isinstance(weights, Handles):
            yield FromMemory(weights.fetch, self._config.tensor_parallel)
        elif isinstance(weights, Published) and self._have_loader():
            yield FromFile(weights.folder, version, self._config.tensor_parallel)
        elif isinstance(weights, Published):
            with tempfile.TemporaryDirectory(prefix=f"offtrail-v{version}-", dir=weights.folder) as folder:
                copy_whole(weights.folder, version, Path(folder) / "model.safetensors")
                yield FromDirectory(Path(folder), version)
        else:
            raise ValueError(f"version {version}: an SGLang server cannot read a {type(weights).__name__}")

    def _have_loader(self) -> bool:
        return not self._config.urls or all(
            LOADER in (about.get("custom_weight_loader") or []) for about in self._about.values()
        )

    def _bring(self, version: int, transfer: Transfer) -> None:
        """Swap on every server that is up and behind, side by side, also on those that come up meanwhile."""
        while behind := [address for address, held in self._held.items() if held != version]:
            self._raise_failure()
            futures = {address: self._loop.submit(self._swap(address, version, transfer)) for address in behind}
            errors = [self._settle(address, version, future) for address, future in futures.items()]
            for error in filter(None, errors):  # not before the last is over: they read what the caller holds open
                raise error

    def _settle(self, address: Address, version: int, future: Future[None]) -> Exception | None:
        """Wait for one swap; what its caller should be told."""
        try:
            future.result()
        except TornError as error:
            self._give_up(address, f"may hold a part of version {version}: {error}")
        except LoaderRefusedError as error:
            retired = FileNotFoundError.__name__ in str(error)
            return (FileNotFoundError if retired else ValueError)(str(error))
        except FileNotFoundError as error:
            return error
        except AnsweredError as error:
            return ValueError(f"version {version} was refused: {error}")
        except ControlError as error:
            self._give_up(address, f"does not take version {version}: {error}")
        else:
            if address in self._held:
                self._note(address, version)
        return None

    async def _swap(self, address: Address, version: int, transfer: Transfer) -> None:
        about, place = self._about[address], self._place(address)
        server = self._server(address, versions.needs_session(about["version"]))
        if isinstance(transfer, FromAdapter):
            await self._adopt(server, place, transfer)
            return
        mode = self._mode(about["version"])
        if place is None:
            await swap(server, version, "abort", transfer)
            return
        if mode != "retract":  # nothing new, until it is known which version's prompts it may begin from
            place.gate.clear()
        try:
            await swap(server, version, mode, transfer, drained=place.drained)
            place.version = version
        finally:
            place.heard = time.monotonic()
            place.gate.set()

    async def _adopt(self, server: Server, place: Place | None, transfer: FromAdapter) -> None:
        """As `_swap`, of adapters: loaded beside those that are there, and named by whatever is sent from now on. With
        kv_on_update=keep what runs ends under the one that it began with.
        """
        await self._loaded.bring(server, transfer)
        if place is None:
            return
        if self._config.kv_on_update == "keep":
            place.version = transfer.version
            return
        place.gate.clear()
        try:
            await hand_back(server, place.drained)
            place.version = transfer.version
        finally:
            place.heard = time.monotonic()
            place.gate.set()

    def _server(self, address: Address, has_sessions: bool = True) -> Server:
        return Server(address, self._loop.session, has_sessions, self._config.hang_seconds)

    def _place(self, address: Address) -> Place | None:
        return next((place for place in self._client.places.values() if place.address == address), None)

    async def _hear(self, version: int) -> None:
        """Ask the servers whether the learner has given them ``version``. In the loop, here and from the watch."""
        late = set()
        for address, held in self._held.items():
            if held == version:
                continue
            info = {}
            with contextlib.suppress(ControlError):
                info = await Server(address, self._loop.session, deadline_s=ASK_SECONDS).model_info()
            if _number(info.get("weight_version")) == version:
                self._note(address, version)
            else:
                late.add(address)
        self._awaiting = frozenset(late)

    def _mode(self, server_version: str) -> PauseMode:
        if self._config.kv_on_update == "keep":
            return "in_place"
        if self._config.pause_mode == "auto":
            return "retract" if versions.can_retract(server_version) else "abort"
        return self._config.pause_mode

    # --- watching ---

    async def _start(self) -> None:
        self.servers.start()

    async def _watch(self) -> None:
        """Who is up, who is not any more, who says nothing: for as long as the engine lives."""
        try:
            while True:
                self.servers.poll()
                await self._look()
                self._kill_the_hung()
                await asyncio.sleep(WATCH_SECONDS)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            self._failure = error

    async def _look(self) -> None:
        up = {place: self.servers.address(place) for place in self.servers.ready()}
        for address in set(up.values()) - set(self._held):
            about = await self._ask(address)
            if about is None:
                continue
            self._about[address] = about
            self._client.decodes &= not about.get("skip_tokenizer_init")
            # One that was here before may hold another run's version under the same number.
            held = -1 if self._config.urls else _number(about.get("weight_version"))
            self._note(address, self._target if self._as_it_is else held)
        for address in set(self._held) - set(up.values()):
            self._note(address, None)
        if self._awaiting:
            await self._hear(self._target)
        self._let_adapters_go()
        self._serve()

    def _let_adapters_go(self) -> None:
        """Of servers that are gone, and those that no sample names any more."""
        used = {address: {held} for address, held in self._held.items()}
        for place in self._client.places.values():
            used.setdefault(place.address, set()).update(job.version for job in place.running.values())
        self._loaded.keep(used, self._server)

    def _serve(self) -> None:
        """Tell the client who is up, and who of them holds the version loaded last. In the loop."""
        up = {place: self.servers.address(place) for place in self.servers.ready()}
        self._client.router = self.servers.router
        self._client.set_places(up, self._held, self._target)

    async def _ask(self, address: Address) -> dict[str, Any] | None:
        """What a server says of itself and of its model; None while it does not."""
        found: dict[str, Any] = {}
        try:
            if self._as_it_is:
                with contextlib.suppress(ServerError):  # some have it behind a key that nobody needs here
                    found |= await self._get(address, "/server_info")
                return found | await self._get(address, "/model_info")
            for path in ("/server_info", "/model_info"):
                found |= await self._get(address, path)
        except (TimeoutError, aiohttp.ClientError, OSError):
            return None
        if reason := versions.refusal(found["version"], self._config):
            raise ServerError(f"{address.url}: {reason}")
        if self._config.urls and int(found.get("tp_size") or 1) > 1:
            raise ServerError(
                f"{address.url}: runs with --tp-size {found['tp_size']}; servers of engine.urls have one GPU each"
            )
        return found

    async def _get(self, address: Address, path: str) -> dict[str, Any]:
        limit = aiohttp.ClientTimeout(total=ASK_SECONDS)
        for key in (address.key, address.admin_key):  # which of them a path wants differs between versions
            headers = {"Authorization": f"Bearer {key}"}
            async with self._loop.session.get(f"{address.url}{path}", headers=headers, timeout=limit) as reply:
                if reply.status == 200:
                    return dict(await reply.json())
        raise ServerError(f"{address.url}{path} answered {reply.status} to both keys")

    def _kill_the_hung(self) -> None:
        limit, now = self._config.hang_seconds, time.monotonic()
        for index, place in self._client.places.items():
            if place.running and place.gate.is_set() and now - place.heard > limit:
                self._kill(
                    index, f"has {len(place.running)} samples and made no token for {limit:g} s (engine.hang_seconds)"
                )

    def _give_up(self, address: Address, why: str) -> None:
        """In the engine's thread: a server that cannot be trusted, or does not answer, is started anew."""
        self._note(address, None)
        self._loop.run(self._end(address, why))

    async def _end(self, address: Address, why: str) -> None:
        for place in self.servers.ready():
            if self.servers.address(place) == address:
                self._kill(place, why)

    def _kill(self, place: int, why: str) -> None:
        log.warning("server %d of %s %s", place, self._owner, why)
        self.servers.kill(place, why)

    def _note(self, address: Address, version: int | None) -> None:
        """What a server holds; None: it is not up any more."""
        with self._noting:
            others = {known: held for known, held in self._held.items() if known != address}
            self._held = others if version is None else others | {address: version}

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure


def _number(version: Any) -> int:
    """A server's weight version as an integer; −1 for one that is not offtrail's."""
    try:
        return int(version)
    except (TypeError, ValueError):
        return -1


def _cost(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Cost:
    if not shapes:  # somebody else's model, of which only the tokenizer is here: not counted
        return Cost(0.0, 0.0, 0.0)
    heads = int(config["num_attention_heads"])
    return Cost.of(
        parameters=active({name: math.prod(shape) for name, shape in shapes.items()}, config),
        vocab_size=int(config["vocab_size"]),
        hidden_size=int(config["hidden_size"]),
        tied="lm_head.weight" not in shapes,
        layers=int(config["num_hidden_layers"]),
        heads=heads,
        head_size=int(config.get("head_dim") or config["hidden_size"] // heads),
    )
