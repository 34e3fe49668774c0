"""The local engine: continuous batching over Hugging Face weights, in this process.

    generate ──► waiting ──enter (prompt prefilled once a request)──► slots 0…n−1 ──step──► Completions
                                                                          ▲
    load_weights: copies in place; unfinished samples stay, their KV is recomputed before the next step (or kept)

Invariants: samples enter in the order of submission as soon as there is room, so a slow one holds up nobody; a step
feeds each running sample's newest token and makes one more, stamped with the version whose weights made it; a token's
random number depends on its keys alone (I3), and its log-probability is taken at its sampling temperature (I5).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from offtrail.core.protocols import Completion, Request
from offtrail.core.types import Float32, Int32
from offtrail.platform.config.schema import LocalConfig
from offtrail.platform.engines.cache import Continuation, KVCache, Prefill, Sequences, joined
from offtrail.platform.engines.decoder import Attend, Decoder, read_weights
from offtrail.platform.engines.limits import check_request, check_tokens
from offtrail.platform.engines.sampler import draw, keep, log_probabilities
from offtrail.platform.engines.slots import Pending, Slots, queue, stacked
from offtrail.platform.engines.spec import read_spec
from offtrail.platform.engines.stops import StopStrings
from offtrail.platform.runtime.host_memory import give_back_freed

Int64 = npt.NDArray[np.int64]
_PASS_TOKENS = {"cpu": 1024}
"""Padded tokens of one pass over whole sequences: on a CPU few enough to stay in its cache, elsewhere 8192."""

_IDLE_BYTES = 1 << 28
"""What an engine without work keeps of its KV cache: more than that was filled by seconds of work."""
_HOLES = 1 << 26
"""Freed bytes that are worth giving back when the cache has grown: where smaller layers were."""
_BLOCK_LOGITS = 1 << 20
"""Logits sampled together on a CPU: few enough to stay in its cache."""


class _Due(NamedTuple):
    """Tokens whose keys and values are to be computed, the slots that they go to, and the tokens before them there."""

    tokens: Int32
    slots: Int64
    start: int = 0


class LocalEngine:
    """``core.protocols.Engine`` over the model in ``model_dir`` (config.json and model.safetensors).

    ``max_length`` bounds prompt + answer, in tokens, and ``config`` the samples that decode together, by their number
    and by the KV cache, which grows with them. ``threads`` is set for torch in this process. ``counters`` holds,
    besides the protocol's, ``scored_tokens``. A prompt of P tokens counts P − 1 as prefilled, since the first decode
    step feeds its last, and P − 1 as prefix hits for each further sample of the request.

    ``loaded=False``: without weights until ``load_weights``, as after ``release``.

    ValueError on an architecture, tensor or length that the model does not have.
    """

    def __init__(
        self, model_dir: Path, config: LocalConfig, *, max_length: int, threads: int, loaded: bool = True
    ) -> None:
        torch.set_num_threads(threads)
        spec = read_spec(model_dir)
        spec.check_length(max_length)
        self.version = 0
        self.vocab_size = spec.vocab_size
        self.counters: dict[str, float] = dict.fromkeys(
            ("decoded_tokens", "prefilled_tokens", "prefix_hit_tokens", "reprefilled_tokens", "scored_tokens", "flops"),
            0.0,
        )
        self._config, self._max_length = config, max_length
        self._device, dtype = torch.device(config.device), getattr(torch, config.dtype)
        self._pass_tokens = _PASS_TOKENS.get(self._device.type, 8192)
        self._cache = KVCache(spec, config.max_running, max_length, config.kv_cache_mb, dtype, self._device)
        self._slots = Slots(config.max_running, max_length, spec.vocab_size)
        self._stops = StopStrings(model_dir)
        self._waiting: deque[Pending] = deque()
        self._prompt_kv: Tensor | None = None
        """Prompt KV of the first waiting request, where some of its samples have entered already."""
        self._kv_stale = self._paused = False
        self._make_decoder = partial(Decoder, spec, max_length, dtype, self._device)
        self._loaded: Decoder | None = None
        if loaded:
            self.load_weights(0, read_weights(model_dir))

    replicas = 1
    waiting_for = ""

    @property
    def capacity(self) -> int:
        """Samples that decode together, at most."""
        return self._config.max_running

    @property
    def unfinished(self) -> int:
        """Samples submitted and not yet returned."""
        return self._slots.running + sum(p.request.samples - p.entered for p in self._waiting)

    def generate(self, requests: Sequence[Request]) -> None:
        """Queue requests; all are checked before any is queued."""
        for request in requests:
            check_request(request, vocab_size=self.vocab_size, max_length=self._max_length)
            if request.sampling.stop:
                self._stops.load()
        self._waiting.extend(queue(requests, time.time()))

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        """Let samples enter, make one token for each running sample, and return the finished ones."""
        if self._paused:
            return []
        due = self._stale()
        split = self._enter(due)
        if not self._slots.running:
            return []
        self._reserve()
        tokens, logprobs = self._draw(self._decode(due))
        if split:  # now or never: later the weights may be others
            self._prompt_kv = self._cache.copy_out(self._slots.running - 1, split)
        completions = self._advance(tokens, logprobs)
        if not self.unfinished and self._cache.bytes > _IDLE_BYTES:
            self._cache.release()
        return completions

    def lost(self) -> list[int]:
        """None: the engine dies only with its process."""
        return []

    @torch.inference_mode()
    def logprobs(
        self, prompts: Sequence[Int32], outputs: Sequence[Int32], temperature: float, replica: int = 0
    ) -> list[Float32]:
        """Log-probabilities [T_i] of the outputs under the current weights, at ``temperature`` (0: unscaled)."""
        if len(prompts) != len(outputs):
            raise ValueError(f"score: {len(prompts)} prompts but {len(outputs)} outputs")
        whole = [np.concatenate((p, o)).astype(np.int32) for p, o in zip(prompts, outputs, strict=True)]
        for prompt, sequence in zip(prompts, whole, strict=True):
            check_tokens(
                "score", prompt, sequence, len(sequence), vocab_size=self.vocab_size, max_length=self._max_length
            )
        scores: list[Float32] = [np.zeros(0, np.float32)] * len(whole)
        nonempty = [i for i, output in enumerate(outputs) if len(output)]
        divisor = torch.tensor(temperature or 1.0, device=self._device)
        for part in _cut([len(whole[i]) for i in nonempty], self._pass_tokens):
            chosen = [nonempty[place] for place in part]
            sequences = Sequences([whole[i][:-1] for i in chosen])
            hidden = self._forward(sequences.tokens, sequences.positions, sequences).view(
                len(chosen), sequences.width, -1
            )
            for place, i in enumerate(chosen):
                start = len(prompts[i]) - 1
                logits = self._decoder.logits(hidden[place, start : len(whole[i]) - 1])
                targets = self._to_device(whole[i][start + 1 :].astype(np.int64))[:, None]
                scores[i] = log_probabilities(logits, divisor).gather(1, targets)[:, 0].cpu().numpy()
                self._charge("scored_tokens", len(whole[i]) - 1, heads=len(outputs[i]))
        return scores

    @torch.inference_mode()
    def load_weights(self, version: int, weights: Mapping[str, Any]) -> None:
        """Copy a version's weights in, between steps. Unfinished samples go on under it, from the KV cache that
        ``engine.kv_on_update`` says; prompts that enter later are always prefilled under it.
        """
        if self._loaded is None:
            self._loaded = self._make_decoder()
        self._loaded.load(weights)
        self.version = version
        self._prompt_kv = None
        self._kv_stale = self._config.kv_on_update == "recompute" and self._slots.running > 0

    def pause(self) -> None:
        """Steps make no tokens until ``resume``; unfinished samples are kept."""
        self._paused = True

    def resume(self) -> None:
        """Go on after ``pause``."""
        self._paused = False

    @torch.inference_mode()
    def cancel(self, requests: Sequence[int]) -> None:
        """Drop the unfinished samples of these requests; their slots are free for the next step."""
        gone = set(requests)
        if self._waiting and self._waiting[0].request.id in gone:
            self._prompt_kv = None
        self._waiting = deque(pending for pending in self._waiting if pending.request.id not in gone)
        running = [pending.request.id in gone for pending in self._slots.pending[: self._slots.running] if pending]
        if any(running):
            self._remove(np.array(running))

    def abort(self) -> list[Completion]:
        """Return every unfinished sample as it is; one that never entered has no tokens."""
        now, slots = time.time(), self._slots
        partial = [slots.completion(row, now, aborted=True) for row in range(slots.running)]
        slots.remove(np.ones(slots.running, np.bool_))
        for pending in self._waiting:
            for index in range(pending.entered, pending.request.samples):
                none, request = np.zeros(0, np.int32), pending.request.id
                times = (pending.submitted, now, now)
                alternatives = stacked([], pending.request.sampling.alternatives)
                values = none.astype(np.float32)
                partial.append(Completion(request, index, none, values, none, "abort", times, alternatives))
        self._waiting.clear()
        self._prompt_kv, self._kv_stale = None, False
        return partial

    def release(self) -> None:
        """Give back weights and cache, to the system too; ``load_weights`` takes them again."""
        self._loaded = self._prompt_kv = None
        self._cache.release()
        give_back_freed()

    def close(self) -> None:
        """Drop the unfinished samples, the cache and the weights; the engine is of no use afterwards."""
        self.abort()
        self._loaded = None
        del self._cache

    # One step

    def _stale(self) -> list[_Due]:
        """What must be computed anew because the weights changed: all tokens of the running samples but their last.

        Samples of one request share their prompt again; each then adds its own tokens to it.
        """
        if not self._kv_stale:
            return []
        self._kv_stale = False
        slots, families, due = self._slots, dict[int, list[int]](), list[_Due]()
        for row in range(slots.running):
            families.setdefault(id(slots.pending[row]), []).append(row)
        for rows in families.values():
            shared = int(slots.prompt_length[rows[0]]) - 1 if len(rows) > 1 else 0
            due.append(_Due(slots.tokens[rows[0], :shared], np.array(rows)))
            due += [_Due(slots.tokens[row, shared : slots.length[row] - 1], np.array([row]), shared) for row in rows]
        due = [part for part in due if len(part.tokens)]
        for part in due:
            self._charge("reprefilled_tokens", len(part.tokens), start=part.start)
        return due

    def _enter(self, due: list[_Due]) -> int:
        """Let waiting samples enter while there is room, and add the prompts that are not in the cache to ``due``.

        Returns the tokens to keep of the last prompt, where some of its samples did not enter and it is not kept yet.
        """
        slots = self._slots
        while self._waiting and (room := self._room()) > 0:
            pending = self._waiting[0]
            prefix = pending.request.prompt_tokens[:-1]
            left = pending.request.samples - pending.entered
            rows = slots.enter(pending, min(room, left))
            hits, prompt_kv = rows.stop - rows.start, self._prompt_kv
            if prompt_kv is not None:
                self._reserve()
                self._cache.copy_in(rows.start, rows.stop, prompt_kv)
            elif len(prefix):
                due.append(_Due(prefix, np.arange(rows.start, rows.stop)))
                self._charge("prefilled_tokens", len(prefix))
                hits -= 1
            self.counters["prefix_hit_tokens"] += hits * len(prefix)
            if left > room:
                return 0 if prompt_kv is not None else len(prefix)
            self._waiting.popleft()
            self._prompt_kv = None
        return 0

    def _room(self) -> int:
        """How many more samples may run, should each become as long as the longest of them and the next may."""
        slots, next_one = self._slots, self._waiting[0].request
        longest = len(next_one.prompt_tokens) + next_one.sampling.max_new_tokens
        longest = max(longest, int(slots.limit[: slots.running].max(initial=0)))
        return min(self._config.max_running, self._cache.fitting(longest)) - slots.running

    def _reserve(self) -> None:
        """Room for what runs: a column beyond the newest token too, which there is since a sample of full length has
        ended.
        """
        slots, before = self._slots, self._cache.bytes
        self._cache.reserve(slots.running, int(slots.length[: slots.running].max()) + 1)
        if self._cache.bytes > before:
            give_back_freed(_HOLES)

    def _decode(self, due: Sequence[_Due]) -> Tensor:
        """Logits [n, V] of the next token of each running sample.

        ``due`` is prefilled before, in passes of bounded size; the last takes the running samples' tokens along.
        """
        slots = self._slots
        n, tokens, positions = slots.running, slots.last[: slots.running], slots.positions()
        decode = self._cache.decode_plan(positions)
        if due:
            *passes, last = self._passes(due)
            for part in passes:
                self._forward(part.tokens, part.positions, part)
            tokens, positions = np.concatenate((last.tokens, tokens)), np.concatenate((last.positions, positions))
            hidden = self._forward(tokens, positions, joined(last, decode))
        else:
            hidden = self._forward(tokens, positions, decode)
        self._charge("decoded_tokens", n, heads=n, context=int(slots.length[:n].sum()))
        return self._decoder.logits(hidden)

    def _draw(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The next token [n, 1] of each running sample and its log-probability [n, 1]; a block of rows after the other,
        since what sampling makes of a logit is seven times as large.
        """
        uniforms, n = self._to_device(self._slots.uniforms()), len(logits)
        block = max(1, _BLOCK_LOGITS // logits.shape[1]) if self._device.type == "cpu" else n
        parts = [
            self._draw_rows(logits[rows], uniforms[rows], rows)
            for rows in (slice(start, min(start + block, n)) for start in range(0, n, block))
        ]
        tokens, logprobs = zip(*parts, strict=True)
        return torch.cat(tokens), torch.cat(logprobs)

    def _draw_rows(self, logits: Tensor, uniforms: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        slots = self._slots

        def column(values: npt.NDArray[Any]) -> Tensor:
            return self._to_device(values[rows, None])

        logprobs = log_probabilities(logits, column(slots.temperature) if slots.scaled else None)
        if slots.most_alternatives:
            self._note_alternatives(logprobs, rows)
        kept = keep(logprobs, column(slots.top_p), column(slots.top_k)) if slots.filtered else None
        tokens = draw(logprobs, uniforms, kept)
        if slots.any_greedy:
            tokens = torch.where(column(slots.greedy), logprobs.argmax(-1, keepdim=True), tokens)
        tokens.clamp_(max=self.vocab_size - 1)  # only rows of NaN end past it, and _advance refuses those
        return tokens, logprobs.gather(1, tokens)

    def _note_alternatives(self, logprobs: Tensor, rows: slice) -> None:
        asking = np.flatnonzero(self._slots.alternatives_count[rows])
        values, ids = logprobs.index_select(0, self._to_device(asking)).topk(self._slots.most_alternatives)
        self._slots.note_alternatives(asking + rows.start, ids.cpu().numpy().astype(np.int32), values.cpu().numpy())

    def _advance(self, tokens: Tensor, logprobs: Tensor) -> list[Completion]:
        """Note the new tokens; take out and return the samples that they finish."""
        slots, now = self._slots, time.time()
        values = logprobs[:, 0].cpu().numpy()
        if not np.isfinite(values).all():
            raise FloatingPointError(
                f"the weights of version {self.version} give log-probabilities that are not finite"
            )
        done = slots.append(tokens[:, 0].cpu().numpy().astype(np.int32), values, self.version, now)
        if slots.any_stop_strings:
            done |= slots.stop_at_strings(self._stops)
        if not done.any():
            return []
        completions = [slots.completion(row, now) for row in np.flatnonzero(done).tolist()]
        self._remove(done)
        return completions

    def _remove(self, gone: npt.NDArray[np.bool_]) -> None:
        """Take rows out of the slots, and close the holes in the KV cache as the slots close theirs."""
        source, target = self._slots.remove(gone)
        if len(source):
            self._cache.move(source, target, int(self._slots.length[target].max()))

    # Helpers

    @property
    def _decoder(self) -> Decoder:
        """RuntimeError where it was released."""
        if self._loaded is None:
            raise RuntimeError("the engine has no weights: load_weights brings them (back)")
        return self._loaded

    def _passes(self, due: Sequence[_Due]) -> list[Prefill | Continuation]:
        """Passes over what is due: beginnings first, since what continues them attends to them."""
        passes: list[Prefill | Continuation] = []
        whole, rest = [part for part in due if not part.start], [part for part in due if part.start]
        for chosen in _cut([len(part.tokens) for part in whole], self._pass_tokens):
            parts = [whole[i] for i in chosen]
            passes.append(Prefill(self._cache, [part.tokens for part in parts], [part.slots for part in parts]))
        for chosen in _cut([len(part.tokens) for part in rest], self._pass_tokens):
            parts = [rest[i] for i in chosen]
            slots, starts = np.concatenate([part.slots for part in parts]), np.array([part.start for part in parts])
            passes.append(Continuation(self._cache, [part.tokens for part in parts], slots, starts))
        return passes

    def _forward(self, tokens: Int32, positions: Int64, attend: Attend) -> Tensor:
        return self._decoder.forward(self._to_device(tokens), self._to_device(positions), attend)

    def _charge(self, counter: str, tokens: int, *, heads: int = 0, start: int = 0, context: int | None = None) -> None:
        """Count tokens, and the operations of a forward over them (attention: ``context`` positions in all; by default
        those of one causal sequence after ``start`` tokens), with the output layer for ``heads`` of them.
        """
        attended = tokens * start + tokens * (tokens + 1) // 2 if context is None else context
        self.counters[counter] += tokens
        self.counters["flops"] += self._decoder.cost.total(tokens=tokens, heads=heads, attended=attended)

    def _to_device(self, array: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self._device)


def _cut(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Cut sequences, shortest first, into passes of at most ``budget`` padded tokens (or one sequence)."""
    passes: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if not passes or (len(passes[-1]) + 1) * lengths[i] > budget:
            passes.append([])
        passes[-1].append(i)
    return passes
