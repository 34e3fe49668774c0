"""The head's cost: log-probability + loss + backward against TRL's and Liger's, by vocabulary, in one run.

    pip install --no-deps liger-kernel==0.8.5 trl==1.16.0        (--target DIR and PYTHONPATH=DIR will do)
    python benchmarks/learner.py [--vocabulary 1024 32768 151936] [--rounds 5] [--device cpu|cuda]

From hidden states [B, T, H] and the head [V, H], both with gradient, to a clipped policy-gradient loss and its
gradients, float32. Arms:

- offtrail      the loss inside the head (model/head.py, loss_in_head), as the learner trains; gives entropies too
- two_pass      scores first, loss behind them (token_logprobs), where a loss needs all tokens at once
- trl           GRPOTrainer's own head since 1.1x, ChunkedLogProbFunction with log-probabilities and entropies
- trl_logits    selective_log_softmax and entropy_from_logits over full logits, its path before that
- liger         LigerFusedLinearGRPOLoss(compiled=False), a sample a chunk as by default; no entropies

No sample is padded, which favours the peers; samples of 256 tokens fit in one piece (one above the limit of
head.default_elements is scored as in two_pass). Speed: rounds alternate between arms in one process, every other
backwards; CPU time of the process (wall time on a GPU); medians, of ratios within a round. Memory: the most that a
step needs above its inputs. On a CPU each arm runs in a process of its own, the high-water mark of its resident set is
reset after a small warm-up (/proc/self/clear_refs, then VmHWM), because torch's CPU allocations are invisible to
tracemalloc, and glibc gives freed blocks back at once (MALLOC_MMAP_THRESHOLD_), so that what is resident is in use; on
a GPU, torch.cuda.max_memory_allocated. All arms' losses and gradients are compared first. The last line is one JSON
object: ``peak_memory_ratio`` is offtrail / the best peer (less is better), ``tokens_per_second_ratio`` offtrail / the
best peer (more is better), each the worst over the vocabularies.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offtrail.platform.model.head import Head, TokenOutputs, default_elements, loss_in_head, pieces, token_logprobs

EPSILON = 0.2
TOKENS = {1024: 8_192, 32_768: 1_024, 151_936: 512}
"""Tokens of a step, so that a round of all arms takes about as long at each vocabulary."""
SMALL = 4_096
"""Up to this vocabulary a step is short, and noise wants three times the rounds."""
PEERS = ("trl", "trl_logits", "liger")
INSTALL = "pip install --no-deps liger-kernel==0.8.5 trl==1.16.0"


@dataclass
class Case:
    """``hidden`` [B, T, H] and ``weight`` [V, H] with gradient; ``targets``, ``old`` [B, T]; ``advantages`` [B]."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    old: Tensor
    advantages: Tensor

    def step(self, loss: Callable[[Case], Tensor]) -> float:
        """Loss and gradients, as a training step leaves them."""
        self.hidden.grad = self.weight.grad = None
        value = loss(self)
        value.backward()  # type: ignore[no-untyped-call]
        return float(value.detach())


def make_case(tokens: int, length: int, width: int, vocabulary: int, device: str) -> Case:
    """Logits of standard deviation 2, behaviour log-probabilities 0.05 nats beside the current ones."""
    torch.manual_seed(0)
    B = max(1, tokens // length)
    hidden = torch.randn(B, length, width, device=device)
    weight = torch.randn(vocabulary, width, device=device).mul_(2 * width**-0.5)
    targets = torch.randint(vocabulary, (B, length), device=device)
    with torch.no_grad():
        now = token_logprobs(hidden.flatten(0, 1), Head(weight), targets.flatten()).logprobs.view(B, length)
    old = now + 0.05 * torch.randn(B, length, device=device)
    return Case(hidden.requires_grad_(), weight.requires_grad_(), targets, old, torch.randn(B, device=device))


def surrogate(logprobs: Tensor, old: Tensor, advantages: Tensor, tokens: int) -> Tensor:
    """Clipped objective, mean over ``tokens``."""
    ratio = torch.exp(logprobs - old)
    clipped = ratio.clamp(1 - EPSILON, 1 + EPSILON)
    return -torch.minimum(ratio * advantages, clipped * advantages).sum() / tokens


def offtrail(case: Case) -> Tensor:
    B, T = case.targets.shape
    old, advantages = case.old.flatten(), case.advantages.repeat_interleave(T)

    def loss(rows: slice, scores: TokenOutputs) -> Tensor:
        return surrogate(scores.logprobs, old[rows], advantages[rows], B * T)

    cut = pieces([T] * B, len(case.weight), default_elements(case.weight))
    return loss_in_head(case.hidden.flatten(0, 1), Head(case.weight), case.targets.flatten(), loss, pieces=cut)[0]


def two_pass(case: Case) -> Tensor:
    scores = token_logprobs(case.hidden.flatten(0, 1), Head(case.weight), case.targets.flatten())
    advantages = case.advantages.repeat_interleave(case.targets.shape[1])
    return surrogate(scores.logprobs, case.old.flatten(), advantages, case.targets.numel())


def trl(case: Case) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    found = ChunkedLogProbFunction.apply(
        case.hidden.reshape(-1, case.hidden.shape[-1]), case.weight, None, case.targets.reshape(-1), 1.0,
        _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("log_probs", "entropy"),
    )  # fmt: skip
    logprobs: Tensor = found[0].view(case.targets.shape)
    return surrogate(logprobs, case.old, case.advantages[:, None], case.targets.numel())


def trl_logits(case: Case) -> Tensor:
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    logits = torch.nn.functional.linear(case.hidden, case.weight)
    logprobs = selective_log_softmax(logits, case.targets)
    with torch.no_grad():
        entropy_from_logits(logits)
    return surrogate(logprobs, case.old, case.advantages[:, None], case.targets.numel())


def liger(case: Case) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(
        beta=0.0, compiled=False, use_ref_model=False, epsilon_low=EPSILON, epsilon_high=EPSILON, loss_type="dapo"
    )
    mask = torch.ones_like(case.targets)
    value: Tensor = loss(
        case.hidden, case.weight, case.targets, mask, case.advantages, old_per_token_logps=case.old
    )[0]  # fmt: skip
    return value


ARMS: dict[str, Callable[[Case], Tensor]] = {
    "offtrail": offtrail,
    "two_pass": two_pass,
    "trl": trl,
    "trl_logits": trl_logits,
    "liger": liger,
}


def check_installed() -> None:
    for name in ("trl", "liger_kernel"):
        try:
            __import__(name)
        except ImportError as error:
            raise SystemExit(
                f"benchmarks/learner.py compares with {name}, which is not here ({error}): {INSTALL}"
            ) from None


def high_water() -> int:
    """Bytes of the resident set at its largest since the last reset."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024


def peak_bytes(arm: str, sizes: tuple[int, int, int, int], device: str) -> int:
    """What one step of an arm needs above its inputs."""
    run = ARMS[arm]
    make_case(64, 32, sizes[2], 512, device).step(run)
    case = make_case(*sizes, device)
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")
        before = high_water()
        case.step(run)
        return high_water() - before
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    case.step(run)
    return torch.cuda.max_memory_allocated() - held


def peak_in_its_own_process(arm: str, sizes: tuple[int, int, int, int], device: str) -> int:
    command = [sys.executable, __file__, "--device", device, "--peak", arm, *map(str, sizes)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return int(done.stdout.splitlines()[-1])


def seconds(case: Case, arm: str, device: str) -> float:
    """CPU seconds of one step; on a GPU wall seconds."""
    if device == "cpu":
        start = time.process_time()
        case.step(ARMS[arm])
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    case.step(ARMS[arm])
    torch.cuda.synchronize()
    return time.perf_counter() - start


def disagreement(case: Case) -> dict[str, float]:
    """Largest relative difference of loss and gradients to trl_logits, which is plain autograd over full logits."""

    def gradients(arm: str) -> tuple[float, Tensor, Tensor]:
        value = case.step(ARMS[arm])
        assert case.hidden.grad is not None
        assert case.weight.grad is not None
        return value, case.hidden.grad, case.weight.grad

    value, d_hidden, d_weight = gradients("trl_logits")
    apart = {}
    for arm in ARMS:
        other, h, w = gradients(arm)
        norms = [float((a - b).norm() / b.norm()) for a, b in ((h, d_hidden), (w, d_weight))]
        apart[arm] = max(abs(other - value) / abs(value), *norms)
    return apart


def measure(sizes: tuple[int, int, int, int], rounds: int, device: str) -> dict[str, Any]:
    """All figures at one vocabulary."""
    vocabulary = sizes[3]
    peaks = {arm: peak_in_its_own_process(arm, sizes, device) for arm in ARMS}
    case = make_case(*sizes, device)
    apart = disagreement(case)
    if max(apart.values()) > 1e-3:
        raise SystemExit(f"the arms do not compute the same: {apart}")
    times: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for turn in range(rounds if vocabulary > SMALL else 3 * rounds):
        for arm in list(ARMS)[:: 1 if turn % 2 else -1]:
            times[arm].append(seconds(case, arm, device))
    ratios = {
        peer: statistics.median(b / a for a, b in zip(times["offtrail"], times[peer], strict=True)) for peer in PEERS
    }
    speed = {arm: case.targets.numel() / statistics.median(t) for arm, t in times.items()}
    for arm in ARMS:
        print(
            f"V {vocabulary:7d}  {arm:11s} {speed[arm]:9.0f} tokens/s {peaks[arm] / 2**20:8.0f} MiB "
            f"(gradients differ by {apart[arm]:.1e})",
            flush=True,
        )
    return {
        "peak_memory_ratio": round(peaks["offtrail"] / min(peaks[p] for p in PEERS), 3),
        "tokens_per_second_ratio": round(min(ratios.values()), 3),
        "peak_mib": {arm: round(p / 2**20) for arm, p in peaks.items()},
        "tokens_per_second": {arm: round(s) for arm, s in speed.items()},
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--vocabulary", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--tokens", type=int, default=0, help="0: by vocabulary")
    parser.add_argument("--length", type=int, default=256, help="of a sample")
    parser.add_argument("--width", type=int, default=896, help="H; 896 is Qwen2.5-0.5B's")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peak", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.peak:
        arm, *sizes = args.peak
        tokens, length, width, vocabulary = map(int, sizes)
        print(peak_bytes(arm, (tokens, length, width, vocabulary), args.device))
        return
    check_installed()
    rows = {}
    for vocabulary in args.vocabulary:
        tokens = args.tokens or TOKENS.get(vocabulary, max(256, (1 << 27) // vocabulary))
        rows[str(vocabulary)] = measure((tokens, args.length, args.width, vocabulary), args.rounds, args.device)
    figures = {
        "peak_memory_ratio": max(row["peak_memory_ratio"] for row in rows.values()),
        "tokens_per_second_ratio": min(row["tokens_per_second_ratio"] for row in rows.values()),
    }
    print(json.dumps({"benchmark": "learner", **figures, "device": args.device, "vocabulary": rows}))


if __name__ == "__main__":
    main()
