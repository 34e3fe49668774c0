"""The fake server's manager: one state a request, and what pauses, aborts and updates mean for all of them.

    endpoints ──generate, pause, exclusively, …──► Manager ──tell, ask──► Scheduler (its thread)
                                                     ▲                       │
                                                     └─ chunks, replies, on the event loop

It is cut as SGLang's TokenizerManager is, since the races and traps follow from that cut. Invariants: a request waits
for the end of a pause before it is sent; an update that is not under a pause waits until no request is left, and
requests after it wait for it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from pathlib import Path
from typing import Any

from fakes.calls import HEALTH_RID, Call, Item, Json, RefusedError, checked, parse_version
from fakes.scheduler import Chunk, Scheduler

HEALTH_SECONDS = int(os.getenv("SGLANG_HEALTH_CHECK_TIMEOUT", "20"))
ABORT_AFTER_S = 2.0
"""So long after a stream has ended its request id is aborted once more, whoever has it then."""


class UpdateLock:
    """Many requests or one update; an update that waits holds up the requests after it."""

    def __init__(self) -> None:
        self._changed = asyncio.Condition()
        self._readers = self._waiting = 0
        self._writing = False

    @property
    def locked(self) -> bool:
        return self._writing or self._readers > 0

    @contextlib.asynccontextmanager
    async def request(self) -> AsyncIterator[None]:
        async with self._changed:
            await self._changed.wait_for(lambda: not self._writing and not self._waiting)
            self._readers += 1
        try:
            yield
        finally:
            async with self._changed:
                self._readers -= 1
                self._changed.notify_all()

    @contextlib.asynccontextmanager
    async def update(self) -> AsyncIterator[None]:
        async with self._changed:
            self._waiting += 1
            try:
                await self._changed.wait_for(lambda: not self.locked)
                self._writing = True
            finally:
                self._waiting -= 1
        try:
            yield
        finally:
            async with self._changed:
                self._writing = False
                self._changed.notify_all()


@dataclass(slots=True, eq=False)
class State:
    """One request at the manager: what it has heard of it."""

    stream: bool
    return_logprob: bool
    created: float = field(default_factory=time.time)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    out: list[Json] = field(default_factory=list)
    finished: bool = False
    dispatched: bool = False
    abort_sent: bool = False
    ids: list[int] = field(default_factory=list)
    logprobs: list[list[Any]] = field(default_factory=list)
    inputs: list[list[Any]] = field(default_factory=list)
    top: list[list[list[Any]]] | None = None
    text: str = ""


class Manager:
    """SGLang's TokenizerManager: one state a request, and what the control endpoints say about all of them."""

    def __init__(self, options: argparse.Namespace, die: Callable[[str], None]) -> None:
        self.options, self.since = options, parse_version(options.sglang_version)
        self.loop = asyncio.get_running_loop()
        self.states: dict[str, State] = {}
        self.paused, self.pause_changed = False, asyncio.Condition()
        self.lock, self._flushing = UpdateLock(), asyncio.Lock()
        self.weight_version, self.model_path = options.weight_version, options.model_path
        self.last_receive = time.time()
        self.leaving = self.unhealthy = False
        self.tokenizer = read_tokenizer(options)
        self.scheduler = Scheduler(options, self._heard, die, self.decode)
        self.scheduler.start()

    # To and from the scheduler

    def tell(self, command: Callable[[], Any]) -> None:
        self.scheduler.inbox.put(command)

    async def ask(self, command: Callable[[], Any]) -> Any:
        return await self.ask_later(lambda reply: reply(command()))

    async def ask_later(self, command: Callable[[Callable[[Any], None]], None]) -> Any:
        answer = self.loop.create_future()

        def settle(value: Any) -> None:
            self.last_receive = time.time()
            if not answer.done():
                answer.set_result(value)

        def reply(value: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self.loop.call_soon_threadsafe(settle, value)

        self.tell(lambda: command(reply))
        return await answer

    def _heard(self, chunks: list[Chunk]) -> None:
        """Called by the scheduler's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self.loop.call_soon_threadsafe(self._receive, chunks)

    def _receive(self, chunks: list[Chunk]) -> None:
        for chunk in chunks:
            state = self.states.get(chunk.rid)
            if state is None:
                continue
            out = self._aborted(chunk, state) if chunk.aborted else self._told(chunk, state)
            if state.finished:
                del self.states[chunk.rid]
            if state.stream or state.finished:
                state.out.append(out)
                state.changed.set()
        self.last_receive = time.time()

    def _told(self, chunk: Chunk, state: State) -> Json:
        first = len(state.ids)
        state.ids += chunk.ids
        state.logprobs += chunk.logprobs
        state.inputs += chunk.inputs or []
        state.finished = chunk.finish is not None
        incremental = state.stream and self.options.incremental_streaming_output
        meta: Json = {
            "id": chunk.rid,
            "finish_reason": chunk.finish,
            "prompt_tokens": chunk.prompt_tokens,
            "weight_version": self.weight_version,
            "num_retractions": chunk.retractions,
        }
        if state.return_logprob:
            meta["input_token_logprobs"] = list(state.inputs)
            meta["output_token_logprobs"] = state.logprobs[first if incremental else 0 :]
            meta["output_token_logprobs_length"] = len(state.logprobs)
        if chunk.top is not None:
            state.top = (state.top or []) + chunk.top
            meta |= {"input_top_logprobs": [], "output_top_logprobs": state.top[first if incremental else 0 :]}
        meta |= {"reasoning_tokens": 0, "completion_tokens": chunk.completion_tokens, "cached_tokens": chunk.cached}
        if chunk.spans is not None and self.since >= (0, 5, 19):
            meta |= {"weight_versions": chunk.spans, "weight_version": chunk.spans[-1]["version"]}
        meta["cached_tokens_details"] = {"device": chunk.cached, "host": 0} if chunk.cached else None
        meta["dp_rank"] = None
        if state.finished:
            meta["e2e_latency"] = time.time() - state.created
        return self._with_text(state, state.ids[first:] if incremental else list(state.ids), meta, incremental)

    def _with_text(self, state: State, ids: list[int], meta: Json, incremental: bool) -> Json:
        if self.tokenizer is None:
            return {"output_ids": ids, "meta_info": meta}
        before, state.text = state.text, self.tokenizer.decode(state.ids).rstrip("�")
        return {
            "text": state.text[len(before) :] if incremental else state.text,
            "output_ids": ids,
            "meta_info": meta,
        }

    def _aborted(self, chunk: Chunk, state: State) -> Json:
        """Of a request that was waiting: what the manager had heard, though more may have been made. In a stream the
        last token and all log-probabilities come a second time.
        """
        state.finished = True
        meta: Json = {
            "id": chunk.rid,
            "finish_reason": {"type": "abort", "message": "Abort in waiting queue"},
            "weight_version": self.weight_version,
            "e2e_latency": time.time() - state.created,
        }
        if self.since >= (0, 5, 19):
            assert chunk.spans is not None
            known = [span for span in chunk.spans if span["start"] < len(state.ids) or not span["start"]]
            spans = [span | {"end": min(span["end"], len(state.ids))} for span in known]
            meta |= {"weight_versions": spans, "weight_version": spans[-1]["version"]}
        if state.return_logprob:
            meta["input_token_logprobs"], meta["output_token_logprobs"] = state.inputs, state.logprobs
            meta["output_token_logprobs_length"] = len(state.logprobs)
        meta["completion_tokens"] = len(state.ids)
        repeated = state.stream and (self.options.incremental_streaming_output or self.since < (0, 5, 21))
        return self._with_text(state, state.ids[-1:] if repeated else state.ids, meta, False)

    # Calls

    async def generate(self, call: Call) -> AsyncGenerator[Json | list[Json], None]:
        """Answers of one call: one, or with ``stream`` many. RefusedError."""
        items = call.items
        rids = {item.rid for item in items}
        for item in items:
            self._open(item)
        try:
            async with self.pause_changed:
                await self.pause_changed.wait_for(lambda: not self.paused)
            async with self.lock.request():
                if call.samples > 1:
                    items = await self._spread(call, rids)
                else:
                    for item in items:
                        self._send(item)
                answers = [self._answers(self.states[item.rid]) for item in items]
                if call.single:
                    async for out in answers[0]:
                        yield out
                elif not items[0].stream:
                    yield await _all(answers)
                else:
                    async for out in _merged([item.rid for item in items], answers):
                        yield out
        except BaseException:
            for rid in rids:
                self._release(rid)
            raise

    def decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))

    def encode(self, text: str) -> list[int]:
        if self.tokenizer is None:
            raise RefusedError(
                "The engine initialized with skip_tokenizer_init=True cannot accept text prompts. Please provide "
                "input_ids or re-initialize the engine with skip_tokenizer_init=False."
            )
        return list(self.tokenizer.encode(text).ids)

    def _open(self, item: Item) -> None:
        if item.rid in self.states:
            raise RefusedError(f"Duplicate request ID detected: {item.rid}")
        self.states[item.rid] = State(item.stream, item.return_logprob)

    def _send(self, item: Item) -> None:
        req = checked(item, self.options, self.encode if self.tokenizer else None)
        self.tell(lambda: self.scheduler.submit(req))
        self.states[item.rid].dispatched = True

    async def _spread(self, call: Call, rids: set[str]) -> list[Item]:
        """``samples`` requests of each item, after one that fills the cache; all under new ids."""
        spread: list[Item] = []
        for item in call.items:
            del self.states[item.rid]
            first = replace(item, rid=uuid.uuid4().hex, params=item.params | {"max_new_tokens": 0}, stream=False)
            copies = [replace(item, rid=uuid.uuid4().hex) for _ in range(call.samples)]
            spread += copies
            rids |= {first.rid, *(copy.rid for copy in copies)}
            self._open(first)
            self._send(first)
            await anext(self._answers(self.states[first.rid]))
        for item in spread:
            self._open(item)
            self._send(item)
        return spread

    async def _answers(self, state: State) -> AsyncIterator[Json]:
        while True:
            await state.changed.wait()
            state.changed.clear()
            parts, state.out = state.out, []
            incremental = state.stream and self.options.incremental_streaming_output
            out = _coalesced(parts) if incremental and len(parts) > 1 else parts[-1]
            if state.finished:
                finish = out["meta_info"]["finish_reason"]
                if finish.get("status_code") == HTTPStatus.BAD_REQUEST and not state.stream:
                    raise RefusedError(finish["message"])
                yield out
                return
            yield out

    def _release(self, rid: str) -> None:
        state = self.states.get(rid)
        if state is not None and state.dispatched:
            self.abort(rid)
        elif state is not None:
            del self.states[rid]

    async def abort_later(self, rids: Iterable[str]) -> None:
        """What SGLang does after a stream, for clients that left."""
        await asyncio.sleep(ABORT_AFTER_S)
        for rid in rids:
            if rid in self.states:
                self.abort(rid)

    # Control

    def abort(self, rid: str, everything: bool = False) -> None:
        """A prefix reaches the scheduler only where it is some request's whole id."""
        if not everything:
            state = self.states.get(rid)
            if state is None or state.abort_sent:
                return
            state.abort_sent = self.since >= (0, 5, 21)
        self.tell(lambda: self.scheduler.abort(rid, everything))

    async def pause(self, mode: str) -> None:
        async with self.pause_changed:
            self.paused = True
            if mode != "abort":
                self.tell(lambda: self.scheduler.pause(mode))
                return
            while True:
                self.abort("", everything=True)
                if not self.lock.locked:
                    return
                await asyncio.sleep(1.0)

    async def resume(self) -> None:
        async with self.pause_changed:
            self.paused = False
            self.tell(self.scheduler.resume)
            self.pause_changed.notify_all()

    async def flush(self, seconds: float) -> tuple[bool, str]:
        """One at a time: a second waits for the first, however long that is given."""

        def command(reply: Callable[[Any], None]) -> None:
            self.scheduler.flush_within(seconds, lambda success, message: reply((success, message)))

        async with self._flushing:
            success, message = await self.ask_later(command)
            return success, message

    async def exclusively(self, command: Callable[[], Any]) -> Any:
        """Run a command at the scheduler: at once under a pause, else when no request is left."""
        async with self.pause_changed:
            if self.paused:
                return await self.ask(command)
        async with self.lock.update():
            return await self.ask(command)

    def updated(self, success: bool, message: str, version: str | None) -> tuple[bool, str]:
        if not success or version is None:
            return success, message
        self.weight_version = version
        return True, f"{message} Weight version updated to {version}."

    async def healthy(self) -> bool:
        """Make a token and wait for any word of the scheduler. Under a pause there is none, and this takes its time."""
        if self.leaving:
            return False
        asked = time.time()
        rid = f"{HEALTH_RID}_{uuid.uuid4().hex}"
        params = {"max_new_tokens": 1, "temperature": 0.0}
        call = Call([Item(rid, [0], params, return_logprob=False, start=-1, extra_key="", stream=False)], True, 1)

        async def probe() -> None:
            async for _ in self.generate(call):
                return

        task = asyncio.create_task(probe())
        try:
            while time.time() < asked + HEALTH_SECONDS:
                await asyncio.sleep(1)
                if self.last_receive > asked:
                    self.unhealthy = False
                    return True
            self.unhealthy = True
            return False
        finally:
            task.cancel()
            self.states.pop(rid, None)


def _coalesced(parts: list[Json]) -> Json:
    """Chunks that waited for each other become one; all but tokens, text and their log-probabilities is the last's."""
    out = dict(parts[-1])
    out["output_ids"] = [token for part in parts for token in part["output_ids"]]
    if "text" in out:
        out["text"] = "".join(part["text"] for part in parts)
    out["meta_info"] = meta = dict(out["meta_info"])
    for key in ("output_token_logprobs", "output_top_logprobs"):
        if key in meta:
            meta[key] = [item for part in parts for item in part["meta_info"].get(key, [])]
    return out


async def _all(answers: list[AsyncIterator[Json]]) -> list[Json]:
    """The one answer of each."""
    tasks = [asyncio.ensure_future(anext(answer)) for answer in answers]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def _merged(rids: list[str], answers: list[AsyncIterator[Json]]) -> AsyncIterator[Json]:
    """Chunks of several streams as they come, each with the ``index`` of its stream."""
    waiting = {asyncio.ensure_future(anext(answer)): answer for answer in answers}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                answer = waiting.pop(task)
                with contextlib.suppress(StopAsyncIteration):
                    out = task.result()
                    yield out | {"index": rids.index(out["meta_info"]["id"])}
                    waiting[asyncio.ensure_future(anext(answer))] = answer
    finally:
        for task in waiting:
            task.cancel()


def read_tokenizer(options: argparse.Namespace) -> Any:
    path = Path(options.model_path) / "tokenizer.json"
    if options.skip_tokenizer_init or not path.is_file():
        return None
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(path))
