"""The fake server's scheduler: a thread that runs commands between decode steps, as SGLang's process does.

    commands (submit, abort, pause, flush, weights) ──► waiting ──► running ──step──► chunks for the manager

Invariants: commands run in their order and between steps; a token's version is that of the weights that made it; what
raises here is the end of the server.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import queue
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fakes.calls import HEALTH_RID, Json, Req, parse_version
from fakes.engine import Engine
from fakes.tensors import Unpickler, init_group, unbucket
from offtrail.platform.engines.decoder import read_weights

FORCED_INTERVAL = 50
"""Tokens after which the manager hears of a request that does not stream."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """What the scheduler tells the manager of one request; ``aborted``: it was taken out of the waiting queue."""

    rid: str
    ids: list[int] = field(default_factory=list)
    logprobs: list[list[Any]] = field(default_factory=list)
    inputs: list[list[Any]] | None = None
    finish: Json | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached: int = 0
    retractions: int = 0
    spans: list[Json] | None = None
    aborted: bool = False
    top: list[list[list[Any]]] | None = None


@dataclass(frozen=True, slots=True)
class Update:
    """What every update of the weights says besides the weights."""

    flush: bool = True
    version: str | None = None


class Scheduler(threading.Thread):
    """Runs commands between steps, in their order; ``deliver`` hands chunks on, ``die`` takes a traceback, ``decode``
    makes text of tokens.

    A command that raises is the end of the server, as an exception in SGLang's scheduler is.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        deliver: Callable[[list[Chunk]], None],
        die: Callable[[str], None],
        decode: Callable[[list[int]], str],
    ) -> None:
        super().__init__(name="fake-sglang", daemon=True)
        self.options, self.since = options, parse_version(options.sglang_version)
        self.engine = Engine(
            Path(options.model_path),
            max_running=options.max_running_requests,
            max_length=min(options.context_length, options.positions),
            dtype=options.dtype,
            seed=options.random_seed,
        )
        self.inbox: queue.SimpleQueue[Callable[[], Any]] = queue.SimpleQueue()
        self.waiting: deque[Req] = deque()
        self.running: dict[int, Req] = {}
        self.paused = self.stopped = self.session = False
        self.versions = [options.weight_version]
        self.tokens = self.retracted = 0
        self._deliver, self._die, self._decode = deliver, die, decode
        self._tail = False
        """The last request has ended in the last turn: to SGLang it is there until the next, and whatever comes between
        finds the server busy. ``--linger-seconds`` makes that long enough to be seen.
        """
        self._health_due = 0
        self._flush_due: tuple[Callable[[bool, str], None], float] | None = None
        self._groups: dict[str, Any] = {}
        self._keys = 0

    # The loop

    def run(self) -> None:
        try:
            while not self.stopped:
                self._receive()
                if not self.paused:
                    self._turn()
        except BaseException:
            self._die(traceback.format_exc())

    def _receive(self) -> None:
        """Run the commands that are there; wait for one where there is nothing else to do."""
        work = not self.paused and (self.waiting or self.running or self._tail)
        wait: float | None = 0.005 if self._flush_due else None
        with contextlib.suppress(queue.Empty):
            command = self.inbox.get_nowait() if work else self.inbox.get(timeout=wait)
            while True:
                command()
                command = self.inbox.get_nowait()
        self._check_flush()

    def _turn(self) -> None:
        """Let requests enter, make a token for each, and tell the manager what it is to know."""
        entered = self._admit()
        if not self.running:
            self._tail = False
            return
        for key, token, logprob, top in self.engine.advance():
            self._append(self.running[key], token, logprob, top)
        if self.options.step_seconds:
            time.sleep(self.options.step_seconds)
        done = {key for key, req in self.running.items() if req.finish}
        if not self.options.disable_radix_cache:
            self.engine.remember(entered | done)
        chunks = [self._report(req) for req in self.running.values() if self._due(req)]
        self.engine.drop(done)
        for key in done:
            del self.running[key]
        self._tail = not self.running
        chunks += [Chunk(HEALTH_RID)] * bool(self._health_due)
        self._health_due = 0
        if chunks:
            self._deliver(chunks)
        if self._tail:
            time.sleep(self.options.linger_seconds)

    def _admit(self) -> set[int]:
        """Let those enter that there is room for; their keys."""
        entered: set[int] = set()
        while self.waiting and len(self.running) < self.options.max_running_requests:
            req = self.waiting.popleft()
            if req.return_logprob and req.inputs is None:
                req.inputs = self._score(req)
            self._keys += 1
            req.key = self._keys
            most_cached = req.start if req.return_logprob else len(req.prompt)
            whole = req.prompt + req.output
            limit = most_cached if not req.output else len(whole)
            req.cached += self.engine.enter(req.key, whole, req.sampling, limit, req.extra_key)
            self.running[req.key] = req
            entered.add(req.key)
        return entered

    def _score(self, req: Req) -> list[list[Any]]:
        """Log-probabilities of the prompt from ``start`` on, at temperature 1; the first is never given."""
        prompt = np.array(req.prompt, np.int32)
        tokens = prompt[req.start :]
        if not len(tokens):
            return []
        values = self.engine.logprobs([prompt[: req.start + 1]], [tokens[1:]], 1.0)[0].tolist()
        last = self.engine.vocab_size - 1  # a trap of SGLang: the last token of the vocabulary is shown as 0
        ids = [0 if token == last else token for token in tokens.tolist()]
        return [[value, token, None] for value, token in zip([None, *values], ids, strict=True)]

    def _append(self, req: Req, token: int, logprob: float, top: list[list[Any]]) -> None:
        if req.limit or req.to_finish:
            req.output.append(token)
            req.logprobs.append(logprob)
            req.top.append(top)
            req.versions.append(self.engine.version)
            self.tokens += 1
        if req.to_finish:
            req.finish = req.to_finish
        elif req.output and (string := self._stopped_by(req)):
            req.finish = {"type": "stop", "matched": string}
        elif req.output and token in req.stops:
            req.finish = {"type": "stop", "matched": token}
        elif len(req.output) >= req.limit:
            req.finish = {"type": "length", "length": req.limit}

    def _stopped_by(self, req: Req) -> str:
        text = self._decode(req.output[-req.window :]) if req.strings else ""
        return next((string for string in req.strings if string in text), "")

    def _due(self, req: Req) -> bool:
        made = len(req.output)
        if req.finish:
            return True
        if req.stream:
            return made % req.interval == 1 if req.interval > 1 else True
        return made % FORCED_INTERVAL == 0

    def _report(self, req: Req) -> Chunk:
        part = slice(req.sent, len(req.output))
        pairs = zip(req.logprobs[part], req.output[part], strict=True)
        inputs = req.inputs if not req.sent else None
        req.sent = len(req.output)
        return Chunk(
            req.rid,
            req.output[part],
            [[value, token, None] for value, token in pairs] if req.return_logprob else [],
            inputs,
            req.finish,
            len(req.prompt),
            len(req.output),
            req.cached,
            req.retractions,
            self._spans(req) if req.finish else None,
            top=req.top[part] if req.return_logprob and req.sampling["alternatives"] else None,
        )

    def _spans(self, req: Req) -> list[Json]:
        spans: list[Json] = []
        for place, version in enumerate(req.versions):
            name = self.versions[version]
            if spans and spans[-1]["version"] == name:
                spans[-1]["end"] = place + 1
            else:
                spans.append({"version": name, "start": place, "end": place + 1})
        return spans or [{"version": self.versions[-1], "start": 0, "end": 0}]

    # Commands

    def submit(self, req: Req) -> None:
        if req.rid.startswith(HEALTH_RID) and not self.idle(for_health=True):
            self._health_due += 1
            return
        if not all(0 <= token < self.engine.vocab_size for token in req.prompt):
            raise IndexError("index out of range in self")
        self.waiting.append(req)

    def abort(self, rid: str, everything: bool) -> None:
        """By prefix. Who waits is gone at once; who runs makes one more token, after the pause where there is one."""
        gone = [req for req in self.waiting if everything or req.rid.startswith(rid)]
        self.waiting = deque(req for req in self.waiting if req not in gone)
        self._deliver([Chunk(req.rid, spans=self._spans(req), aborted=True) for req in gone])
        for req in self.running.values():
            if everything or req.rid.startswith(rid):
                req.to_finish = {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}

    def pause(self, mode: str) -> None:
        self.paused = True
        if mode == "in_place":
            return
        for req in self.running.values():
            req.retractions += 1
            self.retracted += 1
            self.waiting.append(req)
        self.engine.drop(set(self.running))
        self.running.clear()
        self._tail = False

    def resume(self) -> None:
        self.paused = False

    def idle(self, *, ignore_waiting: bool = False, for_health: bool = False) -> bool:
        nothing = not self.running and not self._tail
        return nothing and (ignore_waiting or not self.waiting)

    def flush(self) -> bool:
        """Empty the radix cache, unless something runs; from 0.5.21 on who waits under a pause does not count."""
        if not self.idle(ignore_waiting=self.paused and self.since >= (0, 5, 21)):
            return False
        self.engine.radix.clear()
        return True

    def flush_within(self, seconds: float, reply: Callable[[bool, str], None]) -> None:
        if seconds <= 0 or self.idle():
            reply(self.flush(), "")
        else:
            self._flush_due = reply, time.monotonic() + seconds

    def _check_flush(self) -> None:
        if self._flush_due is None:
            return
        reply, deadline = self._flush_due
        if self.idle():
            self._flush_due = None
            reply(self.flush(), "")
        elif time.monotonic() >= deadline:
            self._flush_due = None
            reply(False, "Timed out waiting for idle state.")

    def set_version(self, version: str | None) -> None:
        if version is not None and version != self.versions[-1]:
            self.versions.append(version)
            self.engine.version = len(self.versions) - 1

    def begin(self) -> tuple[bool, str]:
        if self.session:
            return False, "a weight-update session is already open; call end_weight_update() first"
        self.session = True
        return True, "Success"

    def end(self) -> tuple[bool, str]:
        if not self.session:
            return False, "no weight-update session is open; call begin_weight_update() first"
        self.session = False
        return True, "Success"

    def _updated(self, update: Update) -> None:
        self.engine.apply()
        if update.flush:
            assert self.flush(), "Cache flush failed after updating weights"
        self.set_version(update.version)

    def _outside(self, what: str) -> str:
        """Why an update is refused, or nothing."""
        if self.since < (0, 5, 21) or self.session:
            return ""
        return f"{what} must run between begin_weight_update() and end_weight_update()"

    def from_tensor(self, payload: bytes, load_format: str | None, update: Update) -> tuple[bool, str]:
        if refused := self._outside("update_weights_from_tensor"):
            return False, refused
        named = Unpickler(io.BytesIO(payload)).load()
        model = self.engine.model
        with torch.no_grad():
            if load_format == "flattened_bucket":
                model.load_weights(unbucket(named["flattened_tensor"], named["metadata"]))
            elif load_format == "direct":
                parameters = dict(model.named_parameters())
                for name, tensor in named:
                    assert parameters[name].shape == tensor.shape, f"{name}: {tensor.shape}"
                    parameters[name].copy_(tensor)
            elif load_format in self.options.custom_weight_loader:
                module, _, name = load_format.rpartition(".")
                getattr(importlib.import_module(module), name)(model, [(n, t.to("cpu")) for n, t in named])
            elif load_format is None:
                model.load_weights([(n, t.to("cpu")) for n, t in named])
            else:
                raise NotImplementedError(f"Unknown load_format={load_format}")
        self._updated(update)
        return True, "Success"

    def from_disk(self, path: str, update: Update) -> tuple[bool, str]:
        try:
            weights = read_weights(Path(path))
        except (OSError, ValueError) as error:
            return False, f"Failed to get weights iterator: {error}."
        # A trap of SGLang: it rolls back to the same checkpoint, so that one of another shape kills it.
        self.engine.model.load_weights(weights.items())
        self._updated(update)
        return True, "Succeeded to update model weights."

    def init_group(self, body: Json) -> tuple[bool, str]:
        address = f"tcp://{body['master_address']}:{body['master_port']}"
        name, backend = body.get("group_name", "weight_update_group"), body.get("backend", "nccl")
        try:
            group = init_group(backend, address, body["rank_offset"], body["world_size"], name)
        except Exception as error:
            return False, f"Failed to initialize custom process group: {error}."
        self._groups[name] = group
        return True, "Succeeded to initialize custom process group."

    def destroy_group(self, name: str) -> tuple[bool, str]:
        if name not in self._groups:
            return False, "The group to be destroyed does not exist."
        torch.distributed.destroy_process_group(self._groups.pop(name))
        return True, "Succeeded to destroy custom process group."

    def from_distributed(self, body: Json, update: Update) -> tuple[bool, str]:
        if refused := self._outside("update_weights_from_distributed"):
            return False, refused
        try:
            weights = self._broadcast(body)
        except Exception as error:
            return False, f"Failed to receive weights: {error}"
        try:
            with torch.no_grad():
                self.engine.model.load_weights(weights)
        except Exception as error:
            return False, (
                f"Failed to update parameter online: {error}. The full weights of the ModelRunner are partially "
                f"updated. Please discard the whole weights."
            )
        self._updated(update)
        return True, "Succeeded to update parameter online."

    def _broadcast(self, body: Json) -> list[tuple[str, Tensor]]:
        name = body.get("group_name", "weight_update_group")
        if name not in self._groups:
            known = list(self._groups)
            raise AssertionError(f"Group {name} not in {known}. Please call `init_weights_update_group` first.")
        group = self._groups[name]
        dtypes = [getattr(torch, dtype) for dtype in body["dtypes"]]
        tensors = [torch.empty(shape, dtype=dtype) for shape, dtype in zip(body["shapes"], dtypes, strict=True)]
        if body.get("load_format") == "flattened_bucket":
            flat = torch.cat([tensor.flatten().view(torch.uint8) for tensor in tensors])
            torch.distributed.broadcast(flat, src=0, group=group)
            sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
            parts = zip(flat.split(sizes), tensors, strict=True)
            tensors = [part.view(tensor.dtype).reshape(tensor.shape) for part, tensor in parts]
        else:
            waits = [torch.distributed.broadcast(tensor, src=0, group=group, async_op=True) for tensor in tensors]
            for wait in waits:
                assert wait is not None
                wait.wait()
        return list(zip(body["names"], tensors, strict=True))
