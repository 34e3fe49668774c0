"""What the fake server decodes with: a LocalEngine driven token by token behind a radix cache, and its weights.

The scheduler calls all of it, from its own thread. Invariants: keys and values in the radix cache are those of the
weights that made them; a parameter is decoded with after ``Engine.apply``.
"""

from __future__ import annotations

import json
import re
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offtrail.core.protocols import Request
from offtrail.core.types import Int32, Sampling
from offtrail.platform.config.schema import LocalConfig
from offtrail.platform.engines.decoder import read_weights
from offtrail.platform.engines.local import LocalEngine, _Due
from offtrail.platform.engines.spec import Spec, read_spec

RADIX_ENTRIES = 256
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
FUSED = (("qkv_proj", ("q_proj", "k_proj", "v_proj")), ("gate_up_proj", ("gate_proj", "up_proj")))


class Model:
    """What SGLang calls the model: ``load_weights``, ``named_parameters`` (q, k, v are one and gate, up are one) and
    ``config``. ``tensors`` are views of the parameters by their names in a checkpoint.
    """

    def __init__(self, model_dir: Path, spec: Spec, dtype: torch.dtype) -> None:
        self.config = SimpleNamespace(**json.loads((model_dir / "config.json").read_text()))
        self.tensors: dict[str, Tensor] = {}
        self._parameters: dict[str, Tensor] = {}
        shapes = spec.tensors()
        for name, shape in shapes.items():
            owner, parts = next(((o, p) for o, p in FUSED if f".{p[0]}." in name), (None, ()))
            if owner is None:
                if name not in self.tensors:
                    self.tensors[name] = self._parameters[name] = torch.zeros(shape, dtype=dtype)
                continue
            names = [name.replace(parts[0], part) for part in parts]
            rows = [shapes[part][0] for part in names]
            whole = torch.zeros((sum(rows), *shape[1:]), dtype=dtype)
            self._parameters[name.replace(parts[0], owner)] = whole
            self.tensors.update(zip(names, whole.split(rows), strict=True))

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._parameters.items()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copy what fits by name; absent names stay as they are. Traps, as SGLang has them: unknown names and layers
        are skipped, unless they are those of a projection that is fused with others: KeyError.
        """
        for name, tensor in weights:
            if name.startswith(("layers.", "embed_tokens.", "norm.")):
                name = f"model.{name}"
            layer = LAYER.search(name)
            known = self.tensors.get(name)
            if (layer and int(layer[1]) >= self.config.num_hidden_layers) or (known is None and name.endswith(".bias")):
                continue
            if known is None:
                if part := next((part for _, parts in FUSED for part in parts if part in name), ""):
                    raise KeyError(name.replace(part, next(owner for owner, parts in FUSED if part in parts)))
                print(f"Parameter {name} not found in params_dict", file=sys.stderr)
                continue
            assert known.shape == tensor.shape, (
                f"Attempted to load weight ({tensor.shape}) into parameter ({known.shape})"
            )
            known.copy_(tensor)


class Radix:
    """Keys and values of token sequences; of one ``extra_key`` the first that came with a prefix is found."""

    def __init__(self) -> None:
        self._entries: deque[tuple[str, Int32, Tensor]] = deque(maxlen=RADIX_ENTRIES)

    def match(self, extra_key: str, tokens: Int32) -> tuple[int, Tensor | None]:
        """The longest prefix that is known, in tokens, and its keys and values."""
        best, found = 0, None
        for key, known, keys in self._entries:
            if key != extra_key:
                continue
            same = known[: len(tokens)] == tokens[: len(known)]
            length = len(same) if same.all() else int(same.argmin())
            if length > best:
                best, found = length, keys
        return best, found

    def insert(self, extra_key: str, tokens: Int32, keys: Callable[[], Tensor]) -> None:
        if self.match(extra_key, tokens)[0] < len(tokens):
            self._entries.append((extra_key, tokens.copy(), keys()))

    def clear(self) -> None:
        self._entries.clear()


class Engine(LocalEngine):
    """A LocalEngine that is driven token by token, sample by sample, with a radix cache before its prefill."""

    def __init__(self, model_dir: Path, *, max_running: int, max_length: int, dtype: str, seed: int) -> None:
        config = LocalConfig(dtype="bfloat16" if dtype == "bfloat16" else "float32", max_running=max_running)
        config.kv_on_update = "keep"
        super().__init__(model_dir, config, max_length=max_length, threads=1)
        self.spec = read_spec(model_dir)
        self.model = Model(model_dir, self.spec, getattr(torch, config.dtype))
        self.radix = Radix()
        self.max_length, self._seed = max_length, seed
        self._hits: dict[int, tuple[int, Tensor | None]] = {}
        self._extra_keys: dict[int, str] = {}
        self.load(read_weights(model_dir).items())

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.model.load_weights(weights)
        self.apply()

    def apply(self) -> None:
        """Decode with what the model holds now."""
        self.load_weights(self.version, self.model.tensors)

    def enter(self, key: int, tokens: list[int], sampling: dict[str, Any], most_cached: int, extra_key: str) -> int:
        """Let a sample enter at the next step; how many tokens of it were in the radix cache."""
        prompt = np.array(tokens, np.int32)
        hit, keys = self.radix.match(extra_key, prompt[:-1])
        self._extra_keys[key] = extra_key
        hit = min(hit, most_cached)
        self._hits[key] = hit, keys
        room = self.max_length - len(tokens)
        self.generate([Request(key, prompt, 1, Sampling(room, seed=self._seed, **sampling))])
        return hit

    def advance(self) -> Iterator[tuple[int, int, float, list[list[Any]]]]:
        """One decode step: (key, token, log-probability, the likeliest tokens) of every running sample."""
        finished = self.step()
        assert not finished, "the scheduler ends samples before they are as long as the engine holds"
        slots = self._slots
        for row in range(slots.running):
            pending, last = slots.pending[row], int(slots.length[row]) - 1
            assert pending is not None
            top: list[list[Any]] = []
            if pending.request.sampling.alternatives:
                ids, values = slots.alternatives[row].pop()
                top = [[value, token, None] for value, token in zip(values.tolist(), ids.tolist(), strict=True)]
            yield pending.request.id, int(slots.tokens[row, last]), float(slots.logprobs[row, last]), top

    @torch.inference_mode()
    def remember(self, keys: set[int]) -> None:
        """Put the sequences of samples into the radix cache."""
        for row in self._rows(keys):
            length, pending = int(self._slots.length[row]) - 1, self._slots.pending[row]
            assert pending is not None
            tokens, extra_key = self._slots.tokens[row, :length], self._extra_keys[pending.request.id]
            self.radix.insert(extra_key, tokens, lambda: self._cache.copy_out(row, length))  # noqa: B023

    @torch.inference_mode()
    def drop(self, keys: set[int]) -> None:
        """Take samples out."""
        gone = np.zeros(self._slots.running, np.bool_)
        gone[self._rows(keys)] = True
        self._remove(gone)

    def _rows(self, keys: set[int]) -> list[int]:
        slots = self._slots
        return [row for row in range(slots.running) if (p := slots.pending[row]) and p.request.id in keys]

    def _enter(self, due: list[_Due]) -> int:
        while self._waiting:
            pending = self._waiting.popleft()
            rows = self._slots.enter(pending, 1)
            hit, keys = self._hits.pop(pending.request.id)
            prefix = pending.request.prompt_tokens[:-1]
            if keys is not None and hit:
                self._reserve()
                self._cache.copy_in(rows.start, rows.stop, keys[:, :, :, :hit])
            if len(prefix) > hit:
                due.append(_Due(prefix[hit:], np.arange(rows.start, rows.stop), hit))
        return 0
