"""offtrail's SGLang engine on one GPU: tokens a second, updates in flight, mismatch to the learner, overlap.

    python benchmarks/gpu/sglang.py [--model 0.5b|1.5b|DIR] [--parts generate updates mismatch train]
    python benchmarks/gpu/sglang.py --device cpu --model tiny --in-flight 4 8 --prompt 16 --new 48 --steps 4
                                                                                             (does the script work?)

The model is Qwen2.5's architecture with random weights, or a Hugging Face directory; servers are bfloat16. Parts, each
with servers of its own, and each by itself: one that fails is told in `failed`, and the exit status is 1.

- generate: seconds until the server is up; tokens a second of so many samples in flight, different prompts, prefill
  included, median of the rounds after a warm-up. Beside it the embedded engine on the same device, and the roofline of
  decoding: weights and keys and values read once a step, at the bandwidth of a copy on this device.
- updates: a version published by the learner (this process) and loaded while samples run, by each channel. Seconds of
  publishing, of applying and of both; the longest time between two reports of a sample around it, the longest and the
  median over samples, beside the usual one; what was copied, twice, on the device where the channel keeps it, as the
  least that a channel could take. Then all tokens are scored by the learner under the version before and after: where
  these tell a token's version apart, `misplaced` counts the tokens whose stamp is not the one that fits better.
- mismatch: sampled tokens scored by the learner's own forward, Δ = learner − engine: k3 a token, mean(exp Δ − 1 − Δ),
  and quantiles of |Δ|; with the head's products in float32 and in bfloat16, and for a learner in float32. Yardstick:
  the learner in bfloat16 against itself in float32 (`learner_rounding`).
- train: samples a second of two runs of the real command, staleness.max=0 (synchronous) and --staleness, by the
  broker's clock between two commits. Learner and server share the GPU. Answers of random weights have all the same
  length, which is the case where waiting for the longest costs least.

Random weights give nearly uniform distributions: their mismatch says less than a trained model's. The last line of
stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.pop(0)  # trap: from this file's folder `import sglang` would find this file
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from common import launch, machine, say
from gpu.learner import SHAPES, make_model, wall
from torch import Tensor
from transformers import GenerationConfig
from transformers.utils import logging as transformers_logging

from offtrail.core.protocols import Completion, Engine, Request
from offtrail.core.types import Float32, Sampling
from offtrail.platform.config.schema import Config, LocalConfig, SglangConfig
from offtrail.platform.engines.channels import Channel, Reader, open_channel, open_reader
from offtrail.platform.engines.local import LocalEngine
from offtrail.platform.engines.sglang.engine import SglangEngine
from offtrail.platform.engines.sglang.job import Job
from offtrail.platform.engines.spec import read_spec
from offtrail.platform.engines.stops import StopStrings
from offtrail.platform.learner.objectives import rows_of_pairs
from offtrail.platform.model.packing import lay_out, pack
from offtrail.platform.model.policy import Policy, load_model
from offtrail.platform.model.tiny import build_tokenizer, save_pretrained

Figures = dict[str, Any]

FLAGS = {
    # what benchmarks/gpu/bundle.sh carries: no FlashAttention 3; the learner needs the rest of the memory
    "cuda": "--attention-backend triton --sampling-backend pytorch --mem-fraction-static 0.3 "
    "--cuda-graph-max-bs-decode 256",
    "cpu": "",
}
WARM_TOKENS = 16
ANSWER_FACTOR = 4
"""Answers of the updates' part are so many times --new tokens, so that they outlast the update."""
BEFORE = 0.1
"""Share of an answer that every sample has before a version is published."""
SHIFT = 0.5
"""The other version's matrices: noise of so many standard deviations of their own is added."""
TELLING = 0.5
"""A token tells two versions apart where its log-probabilities differ by so many standard deviations of that."""
BUDGET = 16_384
"""Tokens of one scoring pass."""
START_SECONDS, HANG_SECONDS = 1200.0, 480.0
"""A machine's first server compiles kernels, also at its first requests."""
QUANTILES = (0.5, 0.9, 0.99, 0.999, 1.0)
LEARNERS = {"float32": ("float32", "float32"), "head_float32": ("bfloat16", "float32"),
            "head_bfloat16": ("bfloat16", "bfloat16")}  # fmt: skip
"""Arm → dtype of the decoder, of the head's products. float32 first: Liger's kernels, once applied, stay."""
FIRST, TAIL = 3, 2
"""Learner steps of a run before its clock starts, and after it stops."""
GROUP_SIZE = 8


class Setup:
    """What all parts share: arguments, a folder, and the model in it."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.device = torch.device(args.device)
        self.model_dir = model_in(args.model, folder)
        (folder / "start").symlink_to(Path(self.model_dir).absolute())  # as in a run: what servers come up with
        self.spec = read_spec(self.model_dir)
        self.flags = FLAGS[self.device.type] if args.flags is None else args.flags

    def config(self, longest: int, **keys: Any) -> SglangConfig:
        """Of one server whose samples are at most ``longest`` tokens."""
        return SglangConfig(
            device=self.args.device, dtype="bfloat16", flags=self.flags, max_running=max(self.args.in_flight),
            start_seconds=START_SECONDS, hang_seconds=HANG_SECONDS, **keys,
        )  # fmt: skip

    def requests(self, count: int, new: int, seed: int = 0) -> list[Request]:
        """One sample to each of ``count`` different prompts."""
        draw = np.random.default_rng(seed)
        prompts = draw.integers(3, self.spec.vocab_size, (count, self.args.prompt)).astype(np.int32)
        return [Request(i, prompt, 1, Sampling(new, seed=seed)) for i, prompt in enumerate(prompts)]

    @contextlib.contextmanager
    def server(self, new: int, **keys: Any) -> Iterator[tuple[SglangEngine, float]]:
        """An engine whose server is up, and the seconds that this took; answers are at most ``new`` tokens."""
        started = time.perf_counter()
        folder = Path(tempfile.mkdtemp(prefix="server-", dir=self.folder))
        command = {"command": self.args.command} if self.args.command else {}
        longest = self.args.prompt + new
        engine = SglangEngine(
            self.model_dir, self.config(longest, **keys), max_length=longest, threads=self.args.threads,
            owner="benchmark", count=1, run_dir=folder, **command,
        )  # fmt: skip
        try:
            while engine.waiting_for:  # a server that does not start raises here
                time.sleep(0.02)
            yield engine, time.perf_counter() - started
        finally:
            engine.close()


def model_in(name: str, folder: Path) -> Path:
    """The directory ``name``; or random weights of that size, saved with the tiny model's tokenizer, whose 61 tokens
    are the first of its vocabulary.
    """
    if name not in SHAPES:
        return Path(name).resolve()
    tokenizer = build_tokenizer(32_768)
    model = make_model(name, "cpu")
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    model.config.update(ends)
    model.generation_config = GenerationConfig(do_sample=True, **ends)
    save_pretrained(folder / name, model, tokenizer)
    return folder / name


# --- generate


def generate(setup: Setup) -> Figures:
    """Tokens a second of the server and of the embedded engine, and what a step must read."""
    args = setup.args
    with setup.server(args.new) as (engine, up):
        found: Figures = {"up_seconds": round(up, 1), "sglang": speeds(engine, setup)}
    settings = LocalConfig(device=args.device, dtype="bfloat16", max_running=max(args.in_flight))
    embedded = LocalEngine(setup.model_dir, settings, max_length=args.prompt + args.new, threads=args.threads)
    found["embedded"] = speeds(embedded, setup)
    embedded.close()
    found["roofline"] = {n: round(roofline(setup, n)) for n in args.in_flight}
    found["of_embedded"] = {n: round(found["sglang"][n] / found["embedded"][n], 2) for n in args.in_flight}
    found["of_roofline"] = {n: round(found["sglang"][n] / found["roofline"][n], 3) for n in args.in_flight}
    return found


def speeds(engine: Engine, setup: Setup) -> dict[int, float]:
    """Samples in flight → tokens a second."""
    found = {}
    for count in setup.args.in_flight:
        answer(engine, setup.requests(count, WARM_TOKENS, seed=1))
        rounds = [answer(engine, setup.requests(count, setup.args.new, seed=2 + i)) for i in range(setup.args.rounds)]
        found[count] = round(statistics.median(count * setup.args.new / seconds for _, seconds in rounds), 1)
        say(f"{type(engine).__name__}, {count} in flight: {found[count]:,} tokens/s")
    return found


def answer(engine: Engine, requests: Sequence[Request]) -> tuple[list[Completion], float]:
    """Every sample, in the order of the requests, and the seconds they took. RuntimeError when a server dies."""
    started = time.perf_counter()
    engine.generate(requests)
    done = list[Completion]()
    while engine.unfinished:
        done += engine.step()
    seconds = time.perf_counter() - started
    if lost := engine.lost():
        raise RuntimeError(f"{len(lost)} of {len(requests)} requests were lost with their server; see its log")
    return sorted(done, key=lambda c: c.request), seconds


def roofline(setup: Setup, count: int) -> float:
    """Tokens a second if a decode step took as long as reading the weights and all keys and values."""
    spec, width = setup.spec, 2
    weights = sum(math.prod(shape) for shape in spec.tensors().values())
    length = setup.args.prompt + setup.args.new / 2
    cached = 2 * spec.layers * spec.kv_heads * spec.head_size * length * count
    return float(count * bandwidth(setup.args.device) / (width * (weights + cached)))


@functools.cache
def bandwidth(device: str) -> float:
    """Bytes a second that a copy reads and writes on the device."""
    source = torch.ones(1 << (30 if device != "cpu" else 27), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = min(wall(lambda: target.copy_(source), device) for _ in range(5))
    return 2 * len(source) / seconds


# --- updates


class Pair:
    """Two sets of weights on the learner's device; version v is the first where v is even."""

    def __init__(self, setup: Setup) -> None:
        self.models = [load_model(setup.model_dir, device=setup.args.device) for _ in range(2)]
        draw = torch.Generator(setup.args.device).manual_seed(1)
        with torch.no_grad():
            for parameter in self.models[1].parameters():
                if parameter.dim() > 1:
                    noise = torch.randn(parameter.shape, generator=draw, device=parameter.device)
                    parameter += SHIFT * parameter.std() * noise

    def tensors(self, version: int) -> dict[str, Tensor]:
        """As the learner publishes them; a tied head goes by the embedding's name."""
        return {name: parameter.detach() for name, parameter in self.models[version % 2].named_parameters()}

    def policy(self, version: int) -> Policy:
        """The learner's forward."""
        return Policy(self.models[version % 2], dtype="bfloat16", liger="never")


class Reports:
    """When each sample was given tokens, and how many it had then: the client's own bookkeeping, listened to, of every
    engine in this process.
    """

    def __init__(self) -> None:
        self.heard: dict[int, list[tuple[float, int]]] = defaultdict(list)
        grow = Job.grow

        def listen(job: Job, report: dict[str, Any], stops: StopStrings) -> None:
            before = len(job.tokens)
            grow(job, report, stops)
            if len(job.tokens) > before:
                self.heard[job.request.id].append((time.perf_counter(), len(job.tokens)))

        Job.grow = listen  # type: ignore[method-assign, assignment]

    def least(self, samples: int) -> int:
        """Tokens of the sample that has the fewest."""
        found = [reports[-1][1] for reports in list(self.heard.values())]
        return min(found) if len(found) == samples else 0

    def gaps(self, begin: float, end: float) -> tuple[list[float], list[float]]:
        """Seconds between two reports of a sample: the longest of each sample that overlaps [begin, end], and all that
        do not.
        """
        across, others = list[float](), list[float]()
        for reports in self.heard.values():
            pairs = [(a, b) for (a, _), (b, _) in itertools.pairwise(reports)]
            meet = [b - a for a, b in pairs if a < end and b > begin]
            across += [max(meet)] if meet else []
            others += [b - a for a, b in pairs if not (a < end and b > begin)]
        return across, others


def updates(setup: Setup) -> Figures:
    """Figures by channel, each with a server of its own."""
    pair = Pair(setup)
    return {
        channel: alone(f"updates by {channel}", functools.partial(by_channel, channel, pair, setup))
        for channel in setup.args.channels
    }


def by_channel(channel: str, pair: Pair, setup: Setup) -> Figures:
    """Waves of samples, each with an update in its middle; the first warms the channel up."""
    new, rounds = ANSWER_FACTOR * setup.args.new, range(setup.args.updates + 1)
    with setup.server(new, stream_interval=setup.args.stream_interval) as (engine, up):
        reports = Reports()
        answer(engine, setup.requests(setup.args.in_flight[0], WARM_TOKENS, seed=1))
        with channel_of(channel, engine, setup) as (publisher, reader):
            waves = [wave(engine, reports, publisher, reader, pair, setup) for _ in rounds][1:]
            copied = publisher.bytes_last
    found: Figures = {"up_seconds": round(up, 1), "bytes": copied}
    for key in waves[0]:
        values = [one[key] for one in waves]
        if key.endswith("seconds"):
            found[key] = round(statistics.median(values), 4)
        else:
            found[key] = round(max(values), 4) if key.endswith("longest") else sum(values)
    home = setup.args.device if channel == "ipc" else "cpu"
    return found | {"two_copies_seconds": round(2 * 2 * copied / bandwidth(home), 4)}


@contextlib.contextmanager
def channel_of(name: str, engine: SglangEngine, setup: Setup) -> Iterator[tuple[Channel, Reader]]:
    """Both ends of a weight channel, in a folder that is removed."""
    config = Config(engine=engine._config)
    config.weights.channel = name  # type: ignore[assignment]
    base = setup.folder if name == "disk" else Path("/dev/shm")  # where a run has it: a socket's path must be short
    with tempfile.TemporaryDirectory(prefix=f"offtrail-{name}-", dir=base) as folder:
        publisher = open_channel(config, Path(folder), setup.folder, 2)
        try:
            yield publisher, open_reader(config, Path(folder))
        finally:
            publisher.close()


def wave(
    engine: SglangEngine, reports: Reports, publisher: Channel, reader: Reader, pair: Pair, setup: Setup
) -> dict[str, float]:
    """One update while --in-flight samples run, and the check of every token's version."""
    count, new, version = setup.args.in_flight[0], ANSWER_FACTOR * setup.args.new, engine.version + 1
    asked = setup.requests(count, new, seed=version)
    reports.heard.clear()
    engine.generate(asked)
    while reports.least(count) < BEFORE * new:
        time.sleep(0.001)
        if engine.waiting_for:
            raise RuntimeError(f"the server died before the update: {engine.waiting_for}")
    began = time.perf_counter()
    publisher.publish(version, pair.tensors(version))
    published = time.perf_counter()
    with reader.open(version) as opened:
        engine.load_weights(version, opened)
    applied = time.perf_counter()
    if engine.version != version:
        raise RuntimeError(f"the server does not hold version {version} but {engine.version}; see its log")
    done, _ = answer(engine, ())
    across, others = reports.gaps(published, applied)
    if not across or not others:
        raise RuntimeError(
            f"no sample was running any more when version {version} was there; raise --new={setup.args.new}"
        )
    found = {"publish_seconds": published - began, "apply_seconds": applied - published,
             "publish_to_applied_seconds": applied - began, "usual_gap_seconds": statistics.median(others),
             "pause_seconds": statistics.median(across), "pause_seconds_longest": max(across)}  # fmt: skip
    return found | versions_of(done, asked, version, pair, setup)


def versions_of(
    done: Sequence[Completion], asked: Sequence[Request], version: int, pair: Pair, setup: Setup
) -> dict[str, float]:
    """Whether each token's stamp is the version that made it: the one under which its log-probability is right."""
    stamps = np.concatenate([c.versions for c in done])
    if not set(stamps.tolist()) <= {version - 1, version} or any((np.diff(c.versions) < 0).any() for c in done):
        raise RuntimeError(f"versions {sorted(set(stamps.tolist()))} around an update from {version - 1} to {version}")
    logprobs = np.concatenate([c.logprobs for c in done])
    old, new = (outputs(pair.policy(v), asked, done, setup) for v in (version - 1, version))
    right, wrong = np.where(stamps == version, (new, old), (old, new))
    telling = np.abs(old - new) > TELLING * (old - new).std()
    return {
        "samples": len(done),
        "samples_across": sum(len(set(c.versions.tolist())) == 2 for c in done),
        "tokens": len(stamps),
        "tokens_told_apart": int(telling.sum()),
        "misplaced": int((telling & (np.abs(wrong - logprobs) < np.abs(right - logprobs))).sum()),
    }


# --- mismatch


def outputs(policy: Policy, asked: Sequence[Request], done: Sequence[Completion], setup: Setup) -> Float32:
    """The learner's log-probabilities [T] of every sampled token; ``done`` holds one sample of each of ``asked``."""
    rows = rows_of_pairs([r.prompt_tokens for r in asked], [c.tokens for c in done])
    found = torch.empty(len(rows.tokens))
    for part in pack(range(rows.size), rows.inputs().tolist(), BUDGET):
        packed = lay_out(rows, part, share_up_to=policy.share_up_to).to(setup.device)
        with torch.no_grad():
            found[packed.tokens.cpu()] = policy(packed)[0].float().cpu()
    return found.numpy()


def mismatch(setup: Setup) -> Figures:
    """Learners against the engine on the same sampled tokens, and a learner against itself."""
    asked = setup.requests(setup.args.in_flight[0], setup.args.new, seed=3)
    with setup.server(setup.args.new) as (engine, _):
        done, _ = answer(engine, asked)
    engine_says = np.concatenate([c.logprobs for c in done])
    learner_says = {}
    for name, (dtype, head) in LEARNERS.items():
        model = load_model(setup.model_dir, device=setup.args.device)
        policy = Policy(model, dtype=dtype, head_dtype=head, liger="never" if dtype == "float32" else setup.args.liger)
        learner_says[name] = outputs(policy, asked, done, setup)
    found = {name: compare(said, engine_says) for name, said in learner_says.items()}
    found["learner_rounding"] = compare(learner_says["head_float32"], learner_says["float32"])
    return found | {"tokens": len(engine_says), "logprob_mean": round(float(engine_says.mean()), 3)}


def compare(mine: Float32, theirs: Float32) -> Figures:
    """k3 a token of mine against theirs, who sampled, and quantiles of |Δ|, in nats."""
    delta = mine.astype(np.float64) - theirs.astype(np.float64)
    quantiles = np.quantile(np.abs(delta), QUANTILES)
    return {
        "k3": float(f"{np.mean(np.expm1(delta) - delta):.3g}"),
        "mean": float(f"{delta.mean():.3g}"),
        "abs": {str(q): float(f"{value:.3g}") for q, value in zip(QUANTILES, quantiles, strict=True)},
    }


# --- train


def train(setup: Setup) -> Figures:
    """Samples a second of the synchronous and of the asynchronous run."""
    found: Figures = {}
    for name, eta in (("synchronous", 0), ("asynchronous", setup.args.staleness)):
        say(f"train, staleness.max={eta}")
        found[name] = trained(setup, name, eta)
    ratio = found["asynchronous"]["samples_per_second"] / found["synchronous"]["samples_per_second"]
    return found | {"speedup": round(ratio, 3)}


def trained(setup: Setup, name: str, eta: int) -> Figures:
    """One run of the real command; rates between the commits of two versions."""
    args, last = setup.args, FIRST + setup.args.steps
    kind = setup.device.type
    keys = {
        "engine": "sglang", "engine.device": args.device, "engine.dtype": "bfloat16", "engine.flags": setup.flags,
        "engine.max_running": max(args.in_flight), "engine.start_seconds": START_SECONDS,
        "engine.hang_seconds": HANG_SECONDS, "broker.deadline_seconds": START_SECONDS, "eval.engine": "local",
        "eval.every": 0, "eval.prompts": 8, "model.path": setup.model_dir, "model.max_length": 64 + args.new,
        "sampling.max_new_tokens": args.new, "batch.groups": args.groups, "batch.group_size": GROUP_SIZE,
        "learner.device": args.device, "learner.dtype": "bfloat16", "learner.liger": args.liger,
        "learner.optim.lr": 1e-6,
        "learner.steps": last + eta + TAIL, "learner.checkpoint_every": last + eta + TAIL,
        "weights.channel": args.channels[0], "weights.probe_alarm": 0, "staleness.max": eta,
        "learner.threads": args.threads, "generator.threads": args.threads, "eval.threads": args.threads,
        "learner.tokens_per_microbatch": max(BUDGET, 64 + args.new) if kind == "cuda" else 2048,
    }  # fmt: skip
    given = {key.partition("=")[0] for key in args.keys}
    overrides = [f"{key}={value}" for key, value in keys.items() if key not in given and value != ""]
    run = launch(setup.folder, name, [*overrides, *args.keys])
    seconds = run.seconds(FIRST, last)
    shares = ("learner_busy_train", "learner_busy_publish", "learner_waiting_batch", "generator_busy")
    return {
        "samples_per_second": round(args.steps * run.config.batch.groups * run.config.batch.group_size / seconds, 2),
        "step_seconds": round(seconds / args.steps, 3),
        "staleness_mean": round(run.mean("staleness/mean", FIRST, last), 2),
        "probe_k3": max((row.get("mismatch/probe_k3", 0.0) for row in run.rows()), default=0.0),
        "shares": {share: round(run.mean(f"time/{share}", FIRST, last), 3) for share in shares},
    }


# --- the whole


PARTS: dict[str, Callable[[Setup], Figures]] = {
    "generate": generate, "updates": updates, "mismatch": mismatch, "train": train,
}  # fmt: skip
failed: list[str] = []
"""One line for each part that failed; what else was measured is still told."""


def alone(name: str, measure: Callable[[], Figures]) -> Figures:
    """A part's figures, and the device's memory given back; or none, where it fails."""
    say(name)
    try:
        return measure()
    except Exception as error:
        traceback.print_exc()
        failed.append(" ".join(f"{name}: {type(error).__name__}: {error}".split()))
        return {}
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def about(setup: Setup) -> Figures:
    """What the figures were measured on, and with what."""
    device = torch.cuda.get_device_name() if setup.device.type == "cuda" else "cpu"
    return {
        "device": device, "versions": {name: metadata.version(name) for name in ("sglang", "torch", "transformers")},
        "settings": {key: value for key, value in vars(setup.args).items() if key not in ("command", "folder")},
        "flags": setup.flags, "parameters": sum(math.prod(shape) for shape in setup.spec.tensors().values()),
        "machine": machine(),
    }  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--model", default="0.5b", help=f"{', '.join(SHAPES)}: random weights; or a directory")
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--in-flight", nargs="+", type=int, default=[64, 256], help="samples; the first for all parts")
    parser.add_argument("--prompt", type=int, default=256, help="tokens")
    parser.add_argument("--new", type=int, default=512, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=3, help="of generation")
    parser.add_argument("--updates", type=int, default=3, help="by each channel, after one that is not counted")
    parser.add_argument("--channels", nargs="+", choices=("ipc", "disk", "shm"), default=["ipc", "disk", "shm"],
                        help="of updates; the first one trains")  # fmt: skip
    parser.add_argument("--stream-interval", type=int, default=8, help="of updates: tokens between two reports")
    parser.add_argument("--steps", type=int, default=10, help="learner steps that are timed")
    parser.add_argument("--groups", type=int, default=16, help=f"of a batch, of {GROUP_SIZE} samples each")
    parser.add_argument("--staleness", type=int, default=4, help="staleness.max of the asynchronous run")
    parser.add_argument(
        "--liger", choices=("auto", "never"), default="auto", help="learner.liger of mismatch and train"
    )
    parser.add_argument("--threads", type=int, default=1, help="torch threads of a server, a role and this script")
    parser.add_argument("--flags", help="of sglang's servers; default: what bundle.sh's wheels need")
    parser.add_argument("--folder", type=Path, help="keep models, runs and servers' logs here")
    parser.add_argument("--command", help=argparse.SUPPRESS)  # the module of a server, for tests
    parser.add_argument("--keys", nargs="+", default=[], help="KEY=VALUE of the runs of train, as launch.py takes them")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here; --device cpu --model tiny … tries the script out (see its first lines)")
    torch.set_num_threads(args.threads)
    transformers_logging.disable_progress_bar()
    with contextlib.ExitStack() as stack:
        if args.folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gpu-sglang-")))
        else:
            folder = Path(tempfile.mkdtemp(prefix="run-", dir=args.folder))
        setup = Setup(args, folder)
        found: Mapping[str, Figures] = {name: alone(name, functools.partial(PARTS[name], setup)) for name in args.parts}
        print(json.dumps({"benchmark": "gpu_sglang", **about(setup), **found, "failed": failed}, default=str))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
