"""A model of 135M parameters on two cores: the whole asynchronous run against TRL, and the engine against transformers.

    python benchmarks/real_model.py [--model DIR] [--steps 2] [--trl-steps 1] [--trl-parts 8] [--runs-only] [--quick]
        [KEY=VALUE …]

Without --model it is SmolLM2-135M's architecture with random weights and a byte-pair tokenizer as large as its own
(49,152), so that every answer is as long as it may be. B = 2 groups of G = 8 samples of 256 new tokens at T = 1, one
update a batch (K = 1), GRPO, AdamW; the reward is the share of vowels among an answer's letters.

Both train in float32, and then both under autocast to bfloat16 (--dtypes). Ours generates in bfloat16 in either case
(engine.dtype; TRL generates with the module that it trains), and trains micro-batches of two samples, as TRL does with
--trl-parts 8, its default here. KEY=VALUE replaces any of this, and more such keys may follow.

samples_per_second_ratio: trained samples a second, ours ÷ TRL's. Ours: the real command, from the commit of version
WARM until generation ends, by the broker's clock. TRL: GRPOTrainer on two threads after its first step, with the
fastest of its settings here: attention and cache of `generate` as measured below, and the fastest of --trl-parts. No
evaluation, logging or checkpoint is in TRL's figure; our evaluator scores versions 0 and last.

cpu_ratio: CPU seconds of all processes a trained sample, TRL's ÷ ours: what is left of the ratio where others share the
machine.

memory_ratio: the largest sum over all processes, ours ÷ TRL's leanest setting. A sum is proportional set sizes (PSS:
what n processes share counts 1/n in each), looked at every two seconds, and what stands in the weight channel without
being mapped. It covers everything from start to end: import, load, training, and our checkpoint.

engine: useful tokens per second of CPU time of one thread, ENGINE_TOKENS a sample, at B·G samples in flight and at what
the run has in flight (`staleness.max` lets it generate ahead), against transformers' `generate` with B·G (its best
setting of those in local_engine.py) and its continuous batching; all in float32, and all in bfloat16.

The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from common import Arm, Run, cores, launch, machine, say
from local_engine import SETTINGS, Work, rate, run_continuous, run_engine, run_generate
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from vs_trl import Trl

from offtrail.platform.config.schema import LocalConfig
from offtrail.platform.engines.local import LocalEngine
from offtrail.platform.model.text import Text
from offtrail.platform.runtime.context import own_name
from offtrail.tasks.chain import ChainConfig
from offtrail.tasks.registry import make_task

B, G, NEW_TOKENS, LONGEST = 2, 8, 256, 320
WARM, TAIL = 1, 3
"""Versions before the clock starts, and after it stops: staleness.max and one more, while which nothing generates."""
ENGINE_TOKENS = 64
LOOK_SECONDS = 2.0
"""A look costs the kernel a walk over all pages of all processes, .1 CPU seconds here."""
VOCABULARY, END = 49_152, "<|endoftext|>"
REWARD = '''
def share(answered):
    """Vowels among the letters."""
    letters = [c for c in answered.text.lower() if c.isalpha()]
    return sum(c in "aeiou" for c in letters) / max(1, len(letters))
'''

Measured = dict[str, Any]


def start_model(folder: Path, layers: int) -> None:
    """SmolLM2-135M's architecture with random weights. Tokens are bytes and pairs of bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in letters for b in letters][: VOCABULARY - 1 - len(letters)]
    vocabulary = {token: i for i, token in enumerate((END, *letters, *(a + b for a, b in pairs)))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    ).save_pretrained(folder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers,
            num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192, rms_norm_eps=1e-5,
            rope_theta=1e5, tie_word_embeddings=True, initializer_range=1 / 24, bos_token_id=0, eos_token_id=0,
            pad_token_id=0, dtype="float32",
        )
    )  # fmt: skip
    model.generation_config = GenerationConfig(do_sample=True, eos_token_id=0, pad_token_id=0)
    model.save_pretrained(folder)


class Memory:
    """The largest sum of memory over this process's descendants, and of what stands in ``run``'s weight channel, while
    ``watching``; and the CPU seconds that they had taken when each version was committed.
    """

    def __init__(self, run: Path | None = None) -> None:
        self.run, self.peak, self.parts = run, 0, dict[str, int]()
        self.cpu_seconds: list[float] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look at them every LOOK_SECONDS."""
        done = threading.Event()
        thread = threading.Thread(target=self._look_until, args=(done,))
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _look_until(self, done: threading.Event) -> None:
        while not done.wait(LOOK_SECONDS):
            parts: dict[str, int] = {}
            mapped, cpu = 0, 0.0
            for process in psutil.Process().children(recursive=True):
                try:
                    fields = _rollup(process.pid)
                    name = _role(process.cmdline())
                    cpu += sum(process.cpu_times()[:2])
                except (psutil.Error, OSError):  # it has just left
                    continue
                parts[name] = parts.get(name, 0) + fields["Pss"] - fields["Pss_Shmem"]
                mapped += fields["Pss_Shmem"]
            rows = self.run / "metrics.jsonl" if self.run is not None else None
            committed = len(rows.read_text().splitlines()) if rows is not None and rows.is_file() else 0
            self.cpu_seconds += [cpu] * (committed - len(self.cpu_seconds))
            held = {found.st_ino: found.st_blocks * 512 for found in _stats(self._versions())}
            parts["weight channel and shared memory"] = max(mapped, sum(held.values()))
            if sum(parts.values()) > self.peak:
                self.peak, self.parts = sum(parts.values()), parts

    def _versions(self) -> Iterator[Path]:
        """Files of the weight channel, whatever the name of the run's attempt."""
        if self.run is not None:
            yield from Path("/dev/shm").glob(f"{own_name(self.run)}-*/**/*.safetensors")


def _stats(paths: Iterator[Path]) -> Iterator[os.stat_result]:
    for path in paths:
        try:
            yield path.stat()
        except FileNotFoundError:
            continue


def _rollup(pid: int) -> dict[str, int]:
    """Fields of /proc/PID/smaps_rollup, in bytes."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}


def _role(command: list[str]) -> str:
    """What a process is, by its command line."""
    modules = {
        "launch.py": "launcher",
        "verifier.worker": "verifiers",
        "reaper": "reaper",
        "forkserver": "fork server",
        "spawn_main": "arm",
    }
    for role in ("broker", "learner", "generator", "evaluator"):
        if role in command:
            return role
    return next((name for part, name in modules.items() if part in " ".join(command)), "other")


class TrlInParts(Trl):
    """TRL with a batch in ``parts`` micro-batches, and no engine beside it for evaluations."""

    def __init__(self, run: Run, threads: int, parts: int, mixed: bool) -> None:
        logging.disable(logging.WARNING)
        torch.set_num_threads(threads)
        sys.path.insert(0, str(run.folder.parent))  # the reward's module
        self.run, self.config, self.text = run, run.config, Text(run.start)
        self.parts, self.mixed = parts, mixed

    def __call__(self, seed: int, steps: int, attention: str, cache: str | None, *_: Any) -> Measured:
        """Also ``cpu_seconds``, with the trainer's own start."""
        before = time.process_time()
        found = super().__call__(seed, steps, attention, cache)
        return found | {"cpu_seconds": time.process_time() - before}


class Engines:
    """Tokens per CPU second of one thread, by the engine, by `generate` or by continuous batching."""

    def __init__(self, folder: Path, samples: int, dtype: Literal["float32", "bfloat16"]) -> None:
        torch.set_num_threads(1)
        logging.disable(logging.WARNING)
        text, task = Text(folder), make_task(ChainConfig(), 0)
        self.folder, self.end = folder, text.stop_token_ids[0]
        self.dtype: Literal["float32", "bfloat16"] = dtype
        self.prompts = text.encode_all([task.train(i) for i in range(samples)])

    def __call__(
        self, way: str, in_flight: int, tokens: int, setting: tuple[str, str | None] = ("sdpa", None)
    ) -> float:
        """One filling of ``in_flight`` samples of at most ``tokens`` new tokens."""
        work = Work(self.prompts[:in_flight], None, self.end, self.end, "cpu", tokens)
        if way == "engine":
            config = LocalConfig(max_running=in_flight, dtype=self.dtype)
            engine = LocalEngine(self.folder, config, max_length=LONGEST, threads=1)
            return rate(lambda: run_engine(engine, work, 0), "cpu")
        attention = "paged|sdpa" if way == "continuous" else setting[0]
        dtype = getattr(torch, self.dtype)
        model = AutoModelForCausalLM.from_pretrained(self.folder, attn_implementation=attention, dtype=dtype).eval()
        if way == "continuous":
            return rate(lambda: run_continuous(model, work, in_flight), "cpu")
        return rate(lambda: run_generate(model, setting[1], work, in_flight, 0), "cpu")


def compare_engines(folder: Path, core: int, tokens: int, dtype: str) -> Measured:
    """All rates, the best setting of `generate`, and the engine's ratios to the better of the two others."""
    ahead = 3 * B * G
    arm = Arm(Engines, folder, ahead, dtype, cores={core})
    trials = {setting: arm.measure("generate", B * G, tokens // 4, setting) for setting in SETTINGS}
    best = max(trials, key=trials.__getitem__)
    found = {
        f"engine_{B * G}": arm.measure("engine", B * G, tokens),
        f"engine_{ahead}": arm.measure("engine", ahead, tokens),
        f"generate_{B * G}": arm.measure("generate", B * G, tokens, best),
        f"continuous_{B * G}": arm.measure("continuous", B * G, tokens),
    }
    arm.close()
    theirs = max(found[f"generate_{B * G}"], found[f"continuous_{B * G}"])
    return {
        "tokens_per_cpu_second": {name: round(value, 1) for name, value in found.items()},
        "generate_setting": best,
        "same_in_flight_ratio": round(found[f"engine_{B * G}"] / theirs, 2),
        "ahead_ratio": round(found[f"engine_{ahead}"] / theirs, 2),
    }


def ours(folder: Path, model: Path, args: argparse.Namespace, dtype: str) -> tuple[Run, Measured]:
    """The real command, with the memory of all its processes."""
    (folder / "vowels.py").write_text(REWARD)
    steps = WARM + args.steps + TAIL
    keys = [
        f"model.path={model}", f"model.max_length={LONGEST}", f"batch.groups={B}", f"batch.group_size={G}",
        f"sampling.max_new_tokens={args.new_tokens}", f"learner.steps={steps}", f"learner.checkpoint_every={steps}",
        "learner.minibatches=1", f"learner.tokens_per_microbatch={2 * LONGEST}", "tracking.gradient_cosine=false",
        "reward.weights={vowels:share: 1.0}", "eval.every=0", f"eval.prompts={G}",
        f"learner.dtype={dtype}", "engine.dtype=bfloat16",
    ]  # fmt: skip
    given = {key.partition("=")[0] for key in args.keys}
    keys = [key for key in keys if key.partition("=")[0] not in given] + args.keys
    memory = Memory(folder / dtype)
    with memory.watching():
        run = launch(folder, dtype, keys)
    last = steps - TAIL
    return run, {
        "samples_per_second": B * G * (last - WARM) / run.seconds(WARM, last),
        "cpu_seconds_a_sample": (memory.cpu_seconds[last] - memory.cpu_seconds[WARM]) / (B * G * (last - WARM)),
        "learner_busy": run.mean("time/learner_busy", WARM, last),
        "generator_busy": run.mean("time/generator_busy", WARM, last),
        "length": run.mean("length/mean", WARM, last),
        "peak_bytes": memory.peak, "peak_parts": memory.parts,
    }  # fmt: skip


def trl(run: Run, parts: int, steps: int, setting: tuple[str, str | None], both: set[int]) -> Measured:
    """TRL on two threads, in the run's precision, with the memory of its process."""
    memory = Memory()
    with memory.watching():
        arm = Arm(TrlInParts, run, 2, parts, run.config.learner.dtype == "bfloat16", cores=both, threads=2)
        found = arm.measure(0, WARM + steps, *setting)
        arm.close()
    seconds = found["seconds"]
    return {
        "samples_per_second": B * G * steps / (seconds[-1] - seconds[WARM]),
        "cpu_seconds_a_sample": found["cpu_seconds"] / (B * G * (WARM + steps)),
        "peak_bytes": memory.peak, "peak_parts": memory.parts,
    }  # fmt: skip


def compare(
    folder: Path, model: Path, args: argparse.Namespace, dtype: str, setting: tuple[str, str | None]
) -> Measured:
    """Ours and TRL's settings in one precision, one after the other, so that each has the machine."""
    run, mine = ours(folder, model, args, dtype)
    say(f"ours, {dtype}: {shown(mine)}")
    arms: dict[int, Measured] = {}
    for parts in args.trl_parts:
        arms[parts] = trl(run, parts, args.trl_steps, setting, set(cores()))
        say(f"TRL, {dtype}, in {parts} micro-batches: {shown(arms[parts])}")
    run.remove()
    fastest = max(arm["samples_per_second"] for arm in arms.values())
    cheapest = min(arm["cpu_seconds_a_sample"] for arm in arms.values())
    leanest = min(arm["peak_bytes"] for arm in arms.values())
    return {
        "samples_per_second_ratio": round(mine["samples_per_second"] / fastest, 3),
        "cpu_ratio": round(cheapest / mine["cpu_seconds_a_sample"], 3),
        "memory_ratio": round(mine["peak_bytes"] / leanest, 3),
        "ours": shown(mine), "trl": {f"{parts} micro-batches": shown(arm) for parts, arm in arms.items()},
    }  # fmt: skip


def report(folder: Path, args: argparse.Namespace) -> Measured:
    """All parts; one line of text for each as it comes."""
    about, model = machine(), args.model
    if model is None:
        start_model(model := folder / "model", args.layers)
    engines: dict[str, Measured] = {}
    for dtype in () if args.runs_only else ("float32", "bfloat16"):
        engines[dtype] = compare_engines(model, cores()[0], args.engine_tokens, dtype)
        say(f"engines, {dtype}: {engines[dtype]}")
    setting = SETTINGS[0] if args.runs_only else engines["float32"]["generate_setting"]
    found = {dtype: compare(folder, model, args, dtype, setting) for dtype in args.dtypes}
    return {
        "benchmark": "real_model", "engine": engines, **found,
        "settings": {
            "B": B, "G": G, "new_tokens": args.new_tokens, "model": str(args.model or "random"), "keys": args.keys,
            **about,
        },
    }  # fmt: skip


def shown(found: Measured) -> Measured:
    """Rounded; memory in MiB."""
    parts = {name: round(size / 2**20) for name, size in found["peak_parts"].items()}
    rest = {name: round(value, 3) for name, value in found.items() if isinstance(value, float)}
    return rest | {"peak_mib": round(found["peak_bytes"] / 2**20), "peak_parts_mib": parts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a Hugging Face directory in place of random weights")
    parser.add_argument("--steps", type=int, default=2, help="learner steps of ours under the clock")
    parser.add_argument("--trl-steps", type=int, default=1, help="steps of TRL under the clock, for each setting")
    parser.add_argument("--trl-parts", type=int, nargs="+", default=[8], help="micro-batches of a batch of TRL's")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="precisions of training")
    parser.add_argument(
        "--runs-only", action="store_true", help="without the engines; TRL then has the first setting of `generate`"
    )
    parser.add_argument("--quick", action="store_true", help="a trial of this script: 2 layers, 8 tokens, 1 step")
    parser.add_argument("keys", nargs="*", help="keys of the run, as launch.py takes them")
    args = parser.parse_args()
    args.layers, args.new_tokens, args.engine_tokens = (2, 8, 8) if args.quick else (30, NEW_TOKENS, ENGINE_TOKENS)
    if args.quick:
        args.steps = args.trl_steps = 1
    with tempfile.TemporaryDirectory(prefix="real-model-") as folder:
        print(json.dumps(report(Path(folder), args)))


if __name__ == "__main__":
    main()
