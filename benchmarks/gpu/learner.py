"""MFU of the learner's update on one GPU: a random-weight model, a micro-batch of 16k packed tokens, AdamW.

    python benchmarks/gpu/learner.py [--model 0.5b|1.5b] [--tokens 16384] [--length 2048] [--rounds 10]
    python benchmarks/gpu/learner.py --device cpu --model tiny --tokens 256 --length 64      (does the script work?)

One update is what train.py does for one micro-batch: decoder in bfloat16 under autocast, head, clipped
policy-gradient loss inside the head, backward, gradient norm and clipping, fused AdamW on float32 weights. Arms
alternate: the head's products in float32 and in bfloat16, and activation checkpointing; then, where it is installed,
the first two with Liger's decoder kernels, which come last because its rotary embedding counts for a whole process.
With --compare the head alone is measured too, by benchmarks/learner.py.

MFU counts the model's operations, not what is computed twice: forward 2·P·F + 2·layers·heads·D·Σ L² (causal), three
times that for forward and backward; P all weights but an untied input embedding, of which the V·H of the head count for
the M predicted tokens only; over wall time (median) and the device's dense bfloat16 peak. The last line is one JSON
object: ``mfu`` of the best arm.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config

from offtrail.platform.learner.train import adamw
from offtrail.platform.model import attention, liger
from offtrail.platform.model.head import TokenOutputs
from offtrail.platform.model.packing import Packed, SampleTable, lay_out
from offtrail.platform.model.policy import Policy

SHAPES: dict[str, dict[str, int]] = {
    # Qwen2.5's, by their config.json
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
             "num_key_value_heads": 2, "vocab_size": 151_936},
    "1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
             "num_key_value_heads": 2, "vocab_size": 151_936},
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 128},
}  # fmt: skip
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "4090": 165.0}
"""Dense bfloat16 with float32 sums, of the vendor's data sheets (SXM parts)."""
PROMPT = 64
ARMS: dict[str, dict[str, Any]] = {
    "plain": {"liger": "never"},
    "head_bf16": {"liger": "never", "head_dtype": "bfloat16"},
    "liger": {"liger": "always"},
    "liger_head_bf16": {"liger": "always", "head_dtype": "bfloat16"},
    "checkpointing": {"liger": "never", "head_dtype": "bfloat16", "activation_checkpointing": True},
}


def make_model(name: str, device: str) -> Any:
    """Random float32 weights with packed attention, as load_model gives them."""
    torch.manual_seed(0)
    config = Qwen2Config(**SHAPES[name], tie_word_embeddings=True, max_position_embeddings=32_768)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention.NAME)
    model.config.use_cache = False
    return model.to(device).eval()


def make_packed(tokens: int, length: int, vocabulary: int) -> tuple[SampleTable, Packed]:
    """``tokens`` inputs of samples around ``length``, uniform in ± half of it; each prompt with one sample."""
    draw = np.random.default_rng(0)
    lengths: list[int] = []
    while sum(lengths) < tokens:
        lengths.append(max(PROMPT + 2, int(draw.uniform(length / 2, 3 * length / 2))))
    lengths[-1] -= sum(lengths) - tokens
    if lengths[-1] <= PROMPT and len(lengths) > 1:
        lengths[-2] += lengths.pop()
    outputs = [n - PROMPT + 1 for n in lengths]  # a sample's last token is not an input
    rows = SampleTable(
        prompts=tuple(draw.integers(0, vocabulary, PROMPT).astype(np.int32) for _ in lengths),
        group_of=np.arange(len(lengths)),
        starts=np.concatenate([[0], np.cumsum(outputs)]),
        tokens=draw.integers(0, vocabulary, sum(outputs)).astype(np.int32),
        temperatures=np.ones(len(lengths), np.float32),
        ids=np.arange(len(lengths)),
    )
    return rows, lay_out(rows, range(rows.size))


def model_flops(policy: Policy, rows: SampleTable, packed: Packed) -> float:
    """Operations of forward and backward that the result needs."""
    config = policy.model.config
    head = config.vocab_size * config.hidden_size
    layers = sum(p.numel() for p in policy.model.parameters()) - head  # tied: the embedding is the head
    width = config.num_hidden_layers * config.num_attention_heads * (config.hidden_size // config.num_attention_heads)
    F, M = packed.input_ids.numel(), len(packed.targets)
    squares = float((rows.inputs().astype(np.float64) ** 2).sum())
    return float(3 * (2 * layers * F + 2 * head * M + 2 * width * squares))


class Arm:
    """A policy with its optimizer, made anew for its turn so that memory is its own."""

    def __init__(self, model_name: str, device: str, options: dict[str, Any]) -> None:
        dtype = "float32" if device == "cpu" and options.get("head_dtype") is None else "bfloat16"
        self.policy = Policy(make_model(model_name, device), dtype=dtype, **options)
        self.optimizer = adamw(self.policy.parameters(), lr=1e-6, betas=(0.9, 0.99), eps=1e-8, decay=0.0)

    def update(self, packed: Packed, behaviour: Tensor, advantages: Tensor) -> float:
        """One optimizer update; returns the gradient's norm, so that the host waits as train.py does."""

        def loss(rows: slice, scores: TokenOutputs) -> Tensor:
            ratio = torch.exp(scores.logprobs - behaviour[rows])
            clipped = ratio.clamp(0.8, 1.2)
            return -torch.minimum(ratio * advantages[rows], clipped * advantages[rows]).sum() / len(behaviour)

        value, _ = self.policy.loss(packed, loss)
        value.backward()  # type: ignore[no-untyped-call]
        norm = float(torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm


def wall(work: Callable[[], Any], device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_flops(device: str, given: float) -> float:
    """Dense bfloat16 operations a second of the device."""
    if given:
        return given * 1e12
    if device == "cpu":
        return 1e11  # any number: on a CPU this script is only tried out
    name = torch.cuda.get_device_name()
    for part, tflops in PEAK_TFLOPS.items():
        if part in name:
            return tflops * 1e12
    raise SystemExit(f"the bfloat16 peak of {name} is not in PEAK_TFLOPS; give --peak-tflops")


def measure(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Figures by arm."""
    without = liger.missing(args.device)
    if without:
        print(f"arms with Liger's kernels are left out: {without}")
    names = args.arms or list(ARMS)
    plain = [n for n in names if ARMS[n]["liger"] == "never"]
    patched = [n for n in names if n not in plain and not without]
    found: dict[str, dict[str, float]] = {}
    for together in (plain, patched):
        found |= alternate(together, args) if together else {}
    return found


def alternate(names: list[str], args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Figures of arms whose rounds alternate; memory is what an update needs above weights and optimizer state."""
    rows, packed = make_packed(args.tokens, args.length, SHAPES[args.model]["vocab_size"])
    packed = packed.to(torch.device(args.device))
    arms = {name: Arm(args.model, args.device, ARMS[name]) for name in names}
    with torch.no_grad():
        behaviour = arms[names[0]].policy(packed)[0]
    advantages = torch.randn(len(behaviour), generator=torch.Generator().manual_seed(0)).to(args.device)
    times: dict[str, list[float]] = {name: [] for name in arms}
    peaks = dict.fromkeys(arms, 0)
    for turn in range(args.rounds + 2):  # the first two warm up
        for name, arm in arms.items():
            held = 0
            if args.device != "cpu":
                torch.cuda.reset_peak_memory_stats()
                held = torch.cuda.memory_allocated()
            seconds = wall(functools.partial(arm.update, packed, behaviour, advantages), args.device)
            if args.device != "cpu":
                peaks[name] = torch.cuda.max_memory_allocated() - held
            if turn > 1:
                times[name].append(seconds)
    found = {}
    for name, arm in arms.items():
        seconds = statistics.median(times[name])
        found[name] = {
            "mfu": round(
                model_flops(arm.policy, rows, packed) / seconds / peak_flops(args.device, args.peak_tflops), 4
            ),
            "tokens_per_second": round(args.tokens / seconds),
            "milliseconds": round(1e3 * seconds, 1),
            "peak_gib_above_state": round(peaks[name] / 2**30, 2),
        }
        print(name, found[name], flush=True)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=SHAPES, default="0.5b")
    parser.add_argument("--tokens", type=int, default=16_384, help="inputs of the micro-batch")
    parser.add_argument("--length", type=int, default=2_048, help="of a sample, on average")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--peak-tflops", type=float, default=0.0)
    parser.add_argument("--arms", nargs="*", choices=ARMS)
    parser.add_argument("--compare", action="store_true", help="run benchmarks/learner.py --device cuda as well")
    args = parser.parse_args()
    if args.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here; --device cpu --model tiny --tokens 256 --length 64 tries the script out")
    found = measure(args)
    best = max(found, key=lambda name: found[name]["mfu"])
    figures: dict[str, Any] = {"benchmark": "gpu_learner", "mfu": found[best]["mfu"], "arm": best, "model": args.model}
    if args.compare:
        script = Path(__file__).parent.parent / "learner.py"
        done = subprocess.run(
            [sys.executable, str(script), "--device", args.device, "--tokens", str(args.tokens)],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        figures["head"] = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(figures | {"tokens": args.tokens, "arms": found}))


if __name__ == "__main__":
    main()
