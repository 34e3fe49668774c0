"""The client of SGLang servers: one asyncio loop in a thread, one connection pool, a task for each running sample.

    engine.py ── Job ──► waiting ──(a server is up)──► task: POST /generate, streamed ──► Completion
                                  │  a server dies or hangs: its requests are `lost`, whole
                                  └─ a server hands a sample back (pause_mode=abort): sent again, prompt + partial

Invariants
- A request's samples all run on one server, so that they share its prompt's prefix in the radix cache; of a long prompt
  one sample goes ahead and the others follow when its first token is there.
- A token's version is the server's own stamp (``weight_versions``, SGLang ≥ 0.5.19); an older server is only ever
  updated with nothing running, so that the version of a whole answer is the one it began with. Where versions are
  adapters, it is the one that the request named: the server answers with that or not at all.
- Nothing is sent twice: a request that may have reached a server is never retried, it is lost, and its holder decides
  (it asks anew MOST_LOST times, and takes nothing of what was lost).
- A token id is checked before it is sent: one outside the vocabulary kills the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence, Set
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from offtrail.core.protocols import Completion, Request
from offtrail.core.types import FinishReason, Int32
from offtrail.platform.engines.sglang.adapters import name_of
from offtrail.platform.engines.sglang.job import Job, LostError
from offtrail.platform.engines.sglang.servers import KEPT_SECONDS, Address
from offtrail.platform.engines.stops import StopStrings

log = logging.getLogger("offtrail.generator")

RID_FORMAT = "{}{:08x}{:08x}{:08x}"
"""client, serial number of the request, sample, segment: rids of one length, since an abort matches by prefix."""
COUNTERS = (
    "decoded_tokens", "prefilled_tokens", "prefix_hit_tokens", "reprefilled_tokens", "attended", "lost_requests",
)  # fmt: skip
"""``attended``: positions attended to, by all decoded and first prefilled tokens."""
NOT_FINITE = "NaN happened"
"""What a server says to have matched when it drew no token of the vocabulary: such an answer would look whole."""
LONGEST_LINE = 1 << 26
"""Bytes of one streamed report; aiohttp's own limit, 64 KiB, is a few thousand tokens."""


@dataclass
class Place:
    """One server of the fleet, as the client sees it. ``gate`` is closed while an update hands samples back."""

    address: Address
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    running: dict[tuple[int, int], Job] = field(default_factory=dict)
    """By serial number and sample: those sent, and those that wait for the one ahead of them."""
    tasks: dict[tuple[int, int], asyncio.Task[None]] = field(default_factory=dict)
    open_requests: int = 0
    """HTTP requests that the server has not answered to the end."""
    version: int = -1
    """What the server holds."""
    suspect: bool = False
    """A connection broke: nothing more is sent before the engine has looked whether the server is still there."""
    heard: float = field(default_factory=time.monotonic)
    """When a sample last reported, or the first was sent to an idle server."""

    def __post_init__(self) -> None:
        self.gate.set()

    async def drained(self) -> None:
        """Return when the server has answered everything; with the gate closed nothing new is sent."""
        while self.open_requests:
            await asyncio.sleep(0.002)


class Loop:
    """An asyncio loop in a daemon thread, with one session (connection pool) for everything that runs in it."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name=name, daemon=True)
        self._thread.start()
        self.session: aiohttp.ClientSession = self.run(self._open())

    async def _open(self) -> aiohttp.ClientSession:
        # No limit on connections: every running sample holds one open.
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEPT_SECONDS),
            timeout=aiohttp.ClientTimeout(total=None),
            read_bufsize=LONGEST_LINE,
        )

    def submit(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        """Start a coroutine in the loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def run(self, work: Coroutine[Any, Any, Any], timeout_s: float | None = None) -> Any:
        """Run a coroutine in the loop and wait for it."""
        return self.submit(work).result(timeout_s)

    def close(self) -> None:
        """End every task, then the loop."""
        with contextlib.suppress(Exception):
            self.run(self._close(), 5.0)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(5.0)
        if not self._thread.is_alive():
            self.loop.close()

    async def _close(self) -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.session.close()


class Client:
    """Samples on their way. Called from the engine's thread, except where a name begins with an underscore.

    ``prefix_tokens``: prompts at least so long send one sample ahead. ``keyed``: the servers take a seed a sample.
    ``recomputes``: an update has the servers prefill unfinished samples again. ``adapted``: versions are adapters.
    ``decodes``: every server has a tokenizer. ``counters`` are cumulative.
    """

    def __init__(
        self,
        loop: Loop,
        *,
        prefix_tokens: int,
        keyed: bool,
        recomputes: bool,
        stops: StopStrings,
        adapted: bool = False,
    ) -> None:
        self.loop, self.prefix_tokens, self.keyed, self.recomputes = loop, prefix_tokens, keyed, recomputes
        self.stops, self.adapted, self.decodes = stops, adapted, True
        self._name, self._serials = uuid.uuid4().hex[:8], itertools.count()
        self.places: dict[int, Place] = {}
        self.counters = dict.fromkeys(COUNTERS, 0.0)
        self.router: Address | None = None
        self._waiting: deque[list[Job]] = deque()
        self._done: deque[Completion] = deque()
        self._lost: list[int] = []
        self._broken: FloatingPointError | None = None
        self._news = threading.Event()
        self._lock = threading.Lock()
        self._telling: set[asyncio.Task[None]] = set()

    # --- from the engine's thread ---

    def generate(self, requests: Sequence[Request]) -> None:
        """Queue every sample of the requests."""
        now = time.time()
        groups = []
        for request in requests:
            serial = next(self._serials)
            groups.append([Job(request, serial, i, now) for i in range(request.samples)])
        self.loop.loop.call_soon_threadsafe(self._enqueue, groups)

    def take(self, timeout_s: float) -> tuple[list[Completion], list[int]]:
        """Finished samples, and requests that are lost, waiting up to ``timeout_s`` for the first of either.

        Raises FloatingPointError once a server's numbers are not finite, as the local engine does.
        """
        self._news.wait(timeout_s)
        self._news.clear()
        if self._broken is not None:
            raise self._broken
        with self._lock:
            done, lost = list(self._done), self._lost
            self._done, self._lost = deque(), []
        return done, lost

    @property
    def serves(self) -> bool:
        """Whether there is a server to send samples to."""
        return any(not place.suspect for place in list(self.places.values()))

    def abort(self) -> list[Completion]:
        """Take every unfinished sample back as it is, and tell the servers to forget them."""
        return list(self.loop.run(self._abort()))

    def cancel(self, requests: Set[int]) -> None:
        """Drop every unfinished sample of these requests, whatever of them is not taken yet, and tell the servers."""
        self.loop.run(self._cancel(requests))

    # --- in the loop ---

    def _enqueue(self, groups: list[list[Job]]) -> None:
        self._waiting += groups
        self._dispatch()

    def _dispatch(self) -> None:
        while self._waiting and (open_places := [place for place in self.places.values() if not place.suspect]):
            place = min(open_places, key=lambda p: len(p.running))
            self._start(place, self._waiting.popleft())

    def _start(self, place: Place, jobs: list[Job]) -> None:
        ahead = len(jobs) > 1 and len(jobs[0].request.prompt_tokens) >= self.prefix_tokens > 0
        for job in jobs[:1] if ahead else jobs:
            self._send(place, job, jobs[1:] if ahead else [])

    def _send(self, place: Place, job: Job, followers: Sequence[Job]) -> None:
        if not place.running:
            place.heard = time.monotonic()
        for one in (job, *followers):  # followers count as this server's load, and are lost with it
            place.running[one.serial, one.index] = one
        place.tasks[job.serial, job.index] = asyncio.ensure_future(self._sample(place, job, followers))

    async def _sample(self, place: Place, job: Job, followers: Sequence[Job]) -> None:
        key = (job.serial, job.index)

        def first() -> None:
            for follower in followers:
                self._send(place, follower, ())

        try:
            finish = await self._answer(place, job, first)
        except (LostError, aiohttp.ClientError, OSError, ValueError, KeyError, TypeError) as error:
            place.suspect = place.suspect or not isinstance(error, LostError)
            self._lose(place, job.serial, f"{type(error).__name__}: {error}")
            return
        except FloatingPointError:
            self._broken = FloatingPointError(
                f"the weights of version {place.version} give log-probabilities that are not finite, at "
                f"{place.address.url}"
            )
            self._news.set()
            return
        finally:
            place.tasks.pop(key, None)
        if place.running.pop(key, None) is not None:
            self._finish(job.completion(finish))

    async def _answer(self, place: Place, job: Job, first: Callable[[], None]) -> FinishReason:
        """Segments of one sample until it is finished; ``first`` is called at its first token."""
        while True:
            await place.gate.wait()
            place.open_requests += 1
            try:
                reason = await self._segment(place, job, first)
            finally:
                place.open_requests -= 1
            left = job.request.sampling.max_new_tokens - len(job.tokens)
            if reason == "stop" or job.stopped_by:
                return "stop"
            if reason == "length" or left < 1:
                return "length"
            job.segment += 1  # handed back for an update: the rest is asked for again, under whatever weights hold then
            self.counters["reprefilled_tokens"] += len(job.request.prompt_tokens) + len(job.tokens)

    async def _segment(self, place: Place, job: Job, first: Callable[[], None]) -> str:
        address = self.router or place.address
        job.segment_start, job.report, own, aborted = len(job.tokens), None, None, False
        job.version = place.version if self.adapted else -1
        async with self.loop.session.post(
            f"{address.url}/generate", json=self._body(place, job), headers={"Authorization": f"Bearer {address.key}"}
        ) as reply:
            if reply.status != 200:
                raise LostError(f"{address.url}/generate answered {reply.status}: {(await reply.text())[:300]}")
            async for line in reply.content:
                if not line.startswith(b"data:") or line.startswith(b"data: [DONE]"):
                    continue
                report = json.loads(line[5:])
                if "meta_info" not in report:
                    raise LostError(f"{address.url}/generate: {str(report.get('error', report))[:300]}")
                if not job.tokens:
                    job.first = time.time()
                place.heard = time.monotonic()
                job.grow(report, self.stops)
                if job.tokens:
                    first()
                    first = _nothing
                own = job.report = report["meta_info"]
                if job.stopped_by and not aborted and own.get("finish_reason") is None:  # the server has not seen it
                    self._tell(place.address, self._rid(job))
                    aborted = True
        if own is None or own.get("finish_reason") is None:
            raise LostError(f"{address.url}/generate ended before sample {self._rid(job)} did")
        job.last = time.time()
        job.stamp(own)
        self._charge(job)
        first()  # an answer of no token frees its followers too
        reason = own["finish_reason"]
        if reason.get("matched") == NOT_FINITE:
            raise FloatingPointError
        if not job.stopped_by and reason.get("matched") in job.request.sampling.stop:
            job.stopped_by = reason["matched"]
        if reason["type"] == "abort" and reason.get("status_code"):
            raise LostError(f"{address.url}/generate: {reason.get('message', reason)}")
        return str(reason["type"])

    def _rid(self, job: Job) -> str:
        return RID_FORMAT.format(self._name, job.serial, job.index, job.segment)

    def _body(self, place: Place, job: Job) -> dict[str, Any]:
        sampling = job.request.sampling
        parameters: dict[str, Any] = {
            "max_new_tokens": sampling.max_new_tokens - len(job.tokens),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
        }
        if sampling.stop_token_ids:
            parameters["stop_token_ids"] = list(sampling.stop_token_ids)
        else:  # the server would stop at the model's own end-of-text
            parameters["ignore_eos"] = True
        if sampling.stop and self.decodes:  # it knows a stop string only as it would cut it: Job.grow knows all
            parameters |= {"stop": list(sampling.stop), "no_stop_trim": True}
        if self.keyed:
            parameters["sampling_seed"] = hash((sampling.seed, job.request.random_key, job.index)) & 0x7FFFFFFF
        return {
            "input_ids": [*job.request.prompt_tokens.tolist(), *job.tokens],
            "rid": self._rid(job),
            "sampling_params": parameters,
            "return_logprob": True,
            "stream": True,
            **({"top_logprobs_num": sampling.alternatives} if sampling.alternatives else {}),
            **under_version(place.version, adapted=self.adapted),
        }

    def _charge(self, job: Job) -> None:
        """Count what the server has computed in this segment, once, as far as its last report tells."""
        if job.report is None:
            return
        cached, prompt = int(job.report.get("cached_tokens") or 0), len(job.request.prompt_tokens)
        before = job.segment_start
        # Of a sample that a stop string ended, the server may have made more than was taken.
        new, job.report = int(job.report.get("completion_tokens") or len(job.tokens) - before), None
        self.counters["decoded_tokens"] += new
        self.counters["attended"] += new * (prompt + before) + new * (new + 1) // 2
        if not job.segment:
            fresh = prompt - cached
            self.counters["prefilled_tokens"] += fresh
            self.counters["prefix_hit_tokens"] += cached
            self.counters["attended"] += fresh * cached + fresh * (fresh + 1) // 2
        # Held through an update, a sample begins its next version with a prefill of all that is there.
        starts = [end for _, end in job.spans[:-1] if end > before] if self.recomputes else []
        self.counters["reprefilled_tokens"] += sum(prompt + start for start in starts)

    def _finish(self, completion: Completion) -> None:
        with self._lock:
            self._done.append(completion)
        self._news.set()

    def _lose(self, place: Place, serial: int, why: str) -> None:
        """Forget all of a request: its other samples are on the same server, or given out already."""
        lost = [key for key in place.running if key[0] == serial]
        if not lost:
            return
        log.warning("request %d is lost: %s", place.running[lost[0]].request.id, why)
        self.counters["lost_requests"] += 1
        with self._lock:
            self._lost.append(place.running[lost[0]].request.id)
            self._done = deque(c for c in self._done if c.request != self._lost[-1])
        for key in lost:
            job = place.running.pop(key)
            task = place.tasks.pop(key, None)
            if task is not None and task is not asyncio.current_task():
                task.cancel()
                self._tell(place.address, self._rid(job))
        self._news.set()

    def _tell(self, address: Address, rid: str) -> None:
        """Have the server forget a sample, if it still can."""
        task = asyncio.ensure_future(self._forget(address, rid))
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    def set_places(self, up: dict[int, Address], held: Mapping[Address, int], current: int) -> None:
        """The servers that are up, and what they hold; one that holds ``current`` may join. In the loop.

        Samples of one that is gone, or was started anew, are lost; one that is not current does not join, but goes on
        with what it has.
        """
        for index, place in list(self.places.items()):
            if up.get(index) != place.address:
                del self.places[index]
                for serial in {serial for serial, _ in place.running}:
                    self._lose(place, serial, f"the server {place.address.url} is gone")
        for index, address in up.items():
            if index not in self.places and held.get(address) == current:
                self.places[index] = Place(address)
        for place in self.places.values():
            place.version, place.suspect = held.get(place.address, place.version), False
        self._dispatch()

    async def _abort(self) -> list[Completion]:
        aborted = [job.completion("abort") for jobs in self._waiting for job in jobs]
        self._waiting.clear()
        for place in self.places.values():
            aborted += [self._take_back(place, key).completion("abort") for key in list(place.running)]
        await asyncio.gather(*self._telling, return_exceptions=True)
        return aborted

    async def _cancel(self, requests: Set[int]) -> None:
        self._waiting = deque(jobs for jobs in self._waiting if jobs[0].request.id not in requests)
        for place in self.places.values():
            for key in [key for key, job in place.running.items() if job.request.id in requests]:
                self._take_back(place, key)
        with self._lock:
            self._done = deque(c for c in self._done if c.request not in requests)
            self._lost = [request for request in self._lost if request not in requests]

    def _take_back(self, place: Place, key: tuple[int, int]) -> Job:
        """A running sample as it stands; its server is told to forget it, and nothing of it is heard any more."""
        job, task = place.running.pop(key), place.tasks.pop(key, None)
        self._charge(job)
        if task is not None:
            task.cancel()
            self._tell(place.address, self._rid(job))
        return job

    async def _forget(self, address: Address, rid: str) -> None:
        with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
            async with self.loop.session.post(
                f"{address.url}/abort_request",
                json={"rid": rid},
                headers={"Authorization": f"Bearer {address.admin_key}"},
                timeout=aiohttp.ClientTimeout(total=5.0),
            ):
                pass


def _nothing() -> None:
    pass


def under_version(version: int, *, adapted: bool) -> dict[str, str]:
    """Of a request's body, what is due to the version: it keeps its prompts apart in the radix cache, for under
    kv_on_update=keep that still holds what older weights made, and a new prompt must not begin from it; ``adapted``: it
    names the version's adapter.
    """
    name = name_of(version) if adapted else None
    return {"extra_key": f"version-{version}", **({"lora_path": name} if name else {})}


async def logprobs_of(
    session: aiohttp.ClientSession,
    address: Address,
    under: Mapping[str, str],
    prompt: Int32,
    output: Int32,
    deadline_s: float,
) -> list[float]:
    """Log-probabilities of ``output`` after ``prompt`` by prefill, at temperature 1 (a server knows no other there), of
    the version that ``under`` names (`under_version`).
    """
    body = {
        "input_ids": [*prompt.tolist(), *output.tolist()],
        "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
        "return_logprob": True,
        "logprob_start_len": len(prompt) - 1,
        **under,
    }
    async with session.post(
        f"{address.url}/generate", json=body, headers={"Authorization": f"Bearer {address.key}"},
        timeout=aiohttp.ClientTimeout(total=deadline_s),
    ) as reply:  # fmt: skip
        answer = await reply.json(content_type=None)
        if reply.status != 200:
            raise LostError(f"{address.url}/generate answered {reply.status}: {answer}")
    scored = answer["meta_info"]["input_token_logprobs"]
    return [float(entry[0]) for entry in scored[1:]]
