"""What a run will hold in this host's memory, role by role, against what is free: before its roles start.

    the start model's config.json and file headers ─► Shape ┐
    the configuration ───────────────────────────────────────┴─► estimate ─► Parts ─► check ─► StartError, a warning

It is an estimate from above at full length (`model.max_length`), of host memory: what stands on a GPU is not in it.
docs/memory.md has it beside measured peaks.

Watched is what a role's process really holds, so that a SIGKILL can be explained: the kernel kills without a word.
"""

from __future__ import annotations

import json
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

from offtrail.algos.config import PpoConfig
from offtrail.platform.config.schema import Config, LoraConfig, SglangConfig
from offtrail.platform.config.sets import sets_of
from offtrail.platform.engines.make import local_config
from offtrail.platform.model.scoring import scorings
from offtrail.platform.model.start import StartError
from offtrail.platform.runtime.context import reuses_files
from offtrail.platform.runtime.host_memory import FreeMemory, free_memory, kills, resident
from offtrail.platform.runtime.roles import roles_of

WARN_SHARE = 0.85
"""Of the free memory."""
MIB = 1 << 20
LOOK_SECONDS = 0.5
BASES = {"broker": 110 * MIB, "learner": 260 * MIB, "generator": 240 * MIB, "evaluator": 240 * MIB}
"""What a role's process has for itself of Python and what it imports, without a model; measured (docs/memory.md)."""
OTHER_ROLE = 240 * MIB
"""Of a role that has no row there."""
BASE = 220 * MIB
"""Launcher, fork server and reaper."""
VERIFIER = 40 * MIB
FLOAT32 = 4
HEAD_LOGITS = 1 << 25
"""Logits that the learner's head holds at a time, at least (model/head.py)."""
SAMPLED_BYTES = 8
"""Of each logit of a decode step: it, and its like in the products before."""


TOKEN_KEYS = "learner.tokens_per_microbatch or activation_checkpointing"
SAMPLE_KEYS = {
    "generator": "engine.kv_cache_mb, engine.max_running, batch.group_size or staleness.max",
    "evaluator": "engine.kv_cache_mb, engine.max_running or eval.prompts",
    "refresher": "engine.kv_cache_mb or engine.max_running",
}
SCORER_KEYS = "scorer.tokens_per_batch"
REFRESHER_KEYS = "learner.tokens_per_microbatch or scorer.refresh.groups"
LOWER = {"learner": TOKEN_KEYS, "scorer": SCORER_KEYS, **SAMPLE_KEYS, "refresher": REFRESHER_KEYS}
"""Role → the keys that lower its memory."""


@dataclass
class Watched:
    """A role's process: the most that it was seen to hold, and the least that was free meanwhile."""

    pid: int
    peak: int = 0
    least_free: FreeMemory | None = None
    kills_before: int | None = field(default_factory=lambda: kills())
    _looked: float = -LOOK_SECONDS

    def look(self) -> None:
        """While it runs, as often as one likes: every LOOK_SECONDS it is done."""
        if time.monotonic() < self._looked + LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        self.peak = max(self.peak, resident(self.pid))
        free = free_memory()
        if free is not None and (self.least_free is None or free.bytes < self.least_free.bytes):
            self.least_free = free

    def why_killed(self, role: str) -> str:
        """The likely cause of a SIGKILL that nobody here sent, and what to do."""
        now, least = kills(), self.least_free
        seen = f"it was seen to hold {gib(self.peak)}" + (
            f", and {gib(least.bytes)} were free on {least.bound} at the least" if least is not None else ""
        )
        counted = None if now is None or self.kills_before is None else now - self.kills_before
        if counted == 0:
            return f"the kernel has counted no kill for lack of memory (oom_kill), so that somebody sent it; {seen}"
        likely = "likely out of memory" if counted is None else f"out of memory: oom_kill rose by {counted}"
        lower = f"; lower {LOWER[role]}" if role in LOWER else ""
        return f"{likely}; {seen}{lower}, or stop what else runs there"


@dataclass(frozen=True)
class Shape:
    """Of a decoder, as far as its memory depends on it. ``parameters``: how many numbers its files hold."""

    parameters: int
    vocabulary: int
    hidden: int
    layers: int
    mlp: int
    heads: int
    kv_heads: int
    head_size: int

    @property
    def kv_numbers(self) -> int:
        """Keys and values of one token, in numbers."""
        return 2 * self.layers * self.kv_heads * self.head_size

    @property
    def qkv_size(self) -> int:
        """Queries, keys and values of one token in one layer."""
        return (self.heads + 2 * self.kv_heads) * self.head_size

    @property
    def kept_numbers(self) -> int:
        """What one token's forward pass keeps for its backward (the saved tensors of the fused layers, counted)."""
        return self.layers * (5 * self.hidden + 2 * self.mlp + 2 * self.qkv_size)

    def adapter_numbers(self, lora: LoraConfig) -> int:
        """Of the adapters of learner.lora; a name that is none of the usual seven counts as all of them."""
        heads, kv = self.heads * self.head_size, self.kv_heads * self.head_size
        sides = {
            "q_proj": self.hidden + heads, "k_proj": self.hidden + kv, "v_proj": self.hidden + kv,
            "o_proj": heads + self.hidden, "gate_proj": self.hidden + self.mlp, "up_proj": self.hidden + self.mlp,
            "down_proj": self.mlp + self.hidden,
        }  # fmt: skip
        known = all(name in sides for name in lora.targets)
        return self.layers * lora.rank * sum(sides[name] for name in (lora.targets if known else sides))


@dataclass(frozen=True)
class Part:
    """``bytes`` that a role will hold as ``what``, and the ``keys`` that lower it."""

    role: str
    what: str
    bytes: int
    keys: str = ""


def check(config: Config, run_dir: Path, free: FreeMemory | None = None) -> None:
    """Raise StartError where the run will need more than is free, with the sum and the keys that lower it; say so on
    stderr where it comes near. Nothing where ``run.memory_check`` is off, or there is no way to know.
    """
    free = free or free_memory()
    parts = list(estimate(config, run_dir / "start")) if config.run.memory_check != "off" else []
    needed = sum(part.bytes for part in parts)
    if free is None or needed <= WARN_SHARE * free.bytes:
        return
    told = f"the roles may need {gib(needed)} of memory, {gib(free.bytes)} are free on {free.bound}: {table(parts)}"
    if needed <= free.bytes or config.run.memory_check == "warn":
        print(f"offtrail: warning: {told}", file=sys.stderr, flush=True)
        return
    raise StartError(f"{told}; lower what is named, or set run.memory_check=warn to start all the same")


def table(parts: list[Part]) -> str:
    """The sum role by role, the largest first, and in each what is large."""
    total = sum(part.bytes for part in parts)
    roles = [(role, list(found)) for role, found in groupby(parts, key=lambda part: part.role)]
    roles.sort(key=lambda item: -sum(part.bytes for part in item[1]))
    return ", ".join(f"{role} {gib(sum(part.bytes for part in found))}{_within(found, total)}" for role, found in roles)


def _within(parts: list[Part], total: int) -> str:
    large = sorted((part for part in parts if part.bytes > total / 20), key=lambda part: -part.bytes)
    named = [f"{part.what} {gib(part.bytes)}{f' by {part.keys}' if part.keys else ''}" for part in large]
    return f" ({', '.join(named)})" if named else ""


def gib(size: float) -> str:
    """Such as 1.5 GiB."""
    return f"{size / 2**30:.1f} GiB"


def estimate(config: Config, start: Path) -> Iterator[Part]:
    """What each role of the job will hold; nothing where the model's config.json does not say its sizes."""
    shape = read_shape(start) if (start / "config.json").is_file() else made_shape(config)
    if shape is None:
        return
    counts: dict[str, int] = {}
    for spec in roles_of(config):
        counts[spec.role] = counts.get(spec.role, 0) + 1
    yield Part("launcher", "Python", BASE)
    for role, count in counts.items():
        yield Part(role, "Python", count * BASES.get(role, OTHER_ROLE))
        parts = {"learner": _learner, "generator": _generators, "evaluator": _evaluator, "scorer": _scorers,
                 "refresher": _refresher}  # fmt: skip
        yield from parts.get(role, _nothing)(config, shape, count)
    if "generator" in counts and config.weights.channel == "shm":
        alone = config.publishes_adapters
        size = (
            shape.adapter_numbers(config.learner.lora) * FLOAT32 if alone else shape.parameters * _engine_bytes(config)
        )
        versions = config.staleness.max + 2 if config.staleness.mode == "exact" else 1
        # On a CPU the next one is written when the gradients, which are larger, are gone.
        versions += reuses_files(config) + _waiting_versions(config, size)
        what = f"{versions} versions: those kept, the next, and those that wait for the evaluator"
        yield Part("weight channel", what, versions * size)


def _waiting_versions(config: Config, size: int) -> int:
    """How many versions of ``size`` bytes may wait for their score: eval.waiting_mb of them, or one."""
    planned = 2 + (config.steps // config.eval.every if config.eval.every else 0)
    return min(planned, max(1, (config.eval.waiting_mb << 20) // max(1, size)))


def _nothing(config: Config, shape: Shape, count: int) -> Iterator[Part]:
    yield from ()


def _learner(config: Config, shape: Shape, ranks: int) -> Iterator[Part]:
    """Float32 parameters, gradients and AdamW's two moments, and what the backward pass needs of a micro-batch."""
    learner, algo, examples = config.learner, config.algo, config.supervised
    if learner.device != "cpu":
        return
    cosine = config.tracking.gradient_cosine and examples is None
    implicit = config.job == "prm" and config.prm.objective == "implicit"
    reference = implicit or (algo.needs_ref and examples is None)
    critic = 4 if isinstance(algo, PpoConfig) and examples is None else 0
    if learner.lora.rank:
        # The base, and while a version is published or saved the merged one; of adapters the rest, a reference's too.
        adapters = shape.adapter_numbers(learner.lora) * (4 + cosine + 2 * reference)
        numbers = (2 + critic) * shape.parameters + adapters
        yield Part("learner", "parameters, merged ones, adapters and their optimizer", FLOAT32 * numbers)
    else:
        copies = 4 + cosine + reference + critic
        yield Part("learner", "parameters, gradients and optimizer", copies * FLOAT32 * shape.parameters)
    longest = config.model.max_length
    update = config.batch.groups * config.batch.group_size // learner.minibatches
    if examples is not None:  # of pairs, two samples each
        update = examples.batch_size * (2 if config.job == "reward_model" else 1)
    tokens = max(longest, min(learner.tokens_per_microbatch, update * longest // ranks))
    kept = shape.layers * shape.hidden + shape.kept_numbers // shape.layers
    kept = tokens * (kept if learner.activation_checkpointing else shape.kept_numbers)
    width = FLOAT32 if learner.dtype == "float32" else 3  # under autocast some stay float32
    yield Part("learner", f"activations of {tokens} tokens", ranks * width * kept, TOKEN_KEYS)
    if config.head is not None and not implicit:
        return
    logits = min(max(HEAD_LOGITS, shape.vocabulary * shape.hidden // 2), update * longest * shape.vocabulary)
    table = shape.vocabulary * shape.hidden
    yield Part("learner", "the head", ranks * FLOAT32 * (logits + 2 * table))


def _generators(config: Config, shape: Shape, count: int) -> Iterator[Part]:
    """What admission can put in flight, over all generators."""
    groups = min(config.generator.max_in_flight, (config.staleness.max + 1) * config.batch.groups)
    samples = min(count * _running(config, shape), groups * config.batch.group_size)
    yield from _engines("generator", config, shape, count, samples)


def _evaluator(config: Config, shape: Shape, count: int) -> Iterator[Part]:
    asked = max(one.prompts * one.samples for one in sets_of(config))  # one set after another
    samples = min(_running(config, shape), asked)
    yield from _engines("evaluator", config, shape, count, samples)


def _scorers(config: Config, shape: Shape, count: int) -> Iterator[Part]:
    """Of each scorer every model in float32, and the forward pass of a batch: nothing is kept for a backward."""
    settings = config.scorer
    if settings.device != "cpu":
        return
    folders = [one.folder for one in scorings(config).values()]
    shapes = [found for folder in folders if (found := read_shape(folder)) is not None]
    yield Part("scorer", "weights", count * sum(one.parameters for one in shapes) * FLOAT32)
    tokens = max(settings.tokens_per_batch, config.model.max_length)
    widest = max((2 * one.mlp + 2 * one.hidden + 2 * one.qkv_size for one in shapes), default=0)
    yield Part("scorer", f"activations of {tokens} tokens", count * tokens * widest * FLOAT32, SCORER_KEYS)


def _refresher(config: Config, shape: Shape, count: int) -> Iterator[Part]:
    """As a learner, of the model that it trains; and the engine that makes rollouts. Its versions wait for the scorers
    in memory, too.
    """
    refresh = config.scorer.refresh
    scoring = scorings(config)[config.scorer.refreshed]
    own = read_shape(scoring.folder)
    if own is None:
        return
    if refresh.updates and config.weights.channel == "shm":
        yield Part("refresher", "2 versions for the scorers", 2 * own.parameters * FLOAT32)
    if refresh.device != "cpu":
        return
    copies = 5 if scoring.spec.beta else 4
    yield Part("refresher", "parameters, gradients and optimizer", copies * FLOAT32 * own.parameters)
    tokens = max(config.model.max_length, config.learner.tokens_per_microbatch)
    yield Part("refresher", f"activations of {tokens} tokens", tokens * own.kept_numbers * FLOAT32, REFRESHER_KEYS)
    if refresh.method == "rollouts":
        yield from _engines("refresher", config, shape, count, _running(config, shape))


def _engines(role: str, config: Config, shape: Shape, count: int, samples: int) -> Iterator[Part]:
    yield Part(role, "verifiers", count * config.reward.workers * VERIFIER)
    local = not isinstance(config.engine, SglangConfig) or (role == "evaluator" and config.eval.engine == "local")
    if not local or config.engine.device != "cpu":
        return
    width, longest, keys = _engine_bytes(config), config.model.max_length, SAMPLE_KEYS[role]
    yield Part(role, "weights", count * shape.parameters * width)
    if config.publishes_adapters:
        yield Part(role, "the start model, while adapters are merged into it", count * shape.parameters * FLOAT32)
    cache = samples * longest * shape.kv_numbers * width
    if role == "generator":  # while the start model is read it stands beside the weights; the cache comes later
        cache = max(cache, count * shape.parameters * width)
    yield Part(role, f"{samples} samples of {longest} tokens", cache, keys)
    yield Part(role, "sampling", samples * shape.vocabulary * SAMPLED_BYTES, keys)


def _running(config: Config, shape: Shape) -> int:
    """Samples of full length that one local engine lets run."""
    sample = config.model.max_length * shape.kv_numbers * _engine_bytes(config)
    cache = local_config(config.engine).kv_cache_mb * MIB
    return min(config.engine.max_running, max(1, cache // sample))


def _engine_bytes(config: Config) -> int:
    return 2 if config.engine.dtype == "bfloat16" else FLOAT32


def made_shape(config: Config) -> Shape:
    """Of the model that offtrail makes itself; its vocabulary is 61 tokens."""
    model = config.model
    head = model.hidden_size // model.heads
    attention = model.hidden_size * head * (2 * model.heads + 2 * model.kv_heads)
    parameters = 61 * model.hidden_size + model.layers * (attention + 3 * model.hidden_size * model.mlp_size)
    return Shape(
        parameters, 61, model.hidden_size, model.layers, model.mlp_size, model.heads, model.kv_heads, head
    )  # fmt: skip


def read_shape(model_dir: Path) -> Shape | None:
    """Of a Hugging Face directory with safetensors; None where something is missing or named otherwise."""
    try:
        config: dict[str, Any] = json.loads((model_dir / "config.json").read_text())
        config = config.get("text_config", config)
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        return Shape(
            parameters=sum(map(_numbers, sorted(model_dir.glob("*.safetensors")))),
            vocabulary=int(config["vocab_size"]),
            hidden=hidden,
            layers=int(config["num_hidden_layers"]),
            mlp=int(config["intermediate_size"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_size=int(config.get("head_dim") or hidden // heads),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error):
        return None


def _numbers(file: Path) -> int:
    """How many numbers a safetensors file holds, by its header."""
    with file.open("rb") as opened:
        (size,) = struct.unpack("<Q", opened.read(8))
        header: dict[str, Any] = json.loads(opened.read(min(size, 100 * MIB)))
    return sum(prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
