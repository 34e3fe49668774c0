"""The local engine against transformers' `generate` and continuous batching, on the demo's model and prompts.

    python benchmarks/local_engine.py [--model DIR] [--repeats 5] [--device cpu]

A figure is useful tokens (up to each sample's end) per second of CPU time of this process (wall time on a GPU), on one
thread, at 64 and 256 samples in flight, with 8 prompts a place in flight. The engine also gives log-probabilities; the
others are not asked for any. `generate` takes the prompts in batches of as many as are in flight, left-padded, and
leaves a batch when its last sample ends; of its attention and cache settings the fastest in a trial counts.
Continuous batching is timed once, on one filling of equal lengths, where it has nothing to wait for.

Ragged lengths: with --model (a cold-started demo checkpoint, say) each side samples until the model's own eos. Without
it the model is random and each prompt has a length drawn from a lognormal around 32, at most 64; both sides are made to
end there, `generate` by a stopping criterion, so that both make exactly the same number of tokens.
The ways alternate within a repeat; a ratio is the median over repeats of the ratio within the repeat. The last line of
stdout is one JSON object: `tokens_per_second_ratio` (ragged) and `equal_lengths_ratio`, each the worse of 64 and 256.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.utils import logging as transformers_logging

from offtrail.core.protocols import Request
from offtrail.core.types import Int32, Sampling
from offtrail.platform.config.schema import LocalConfig, ModelConfig
from offtrail.platform.engines.local import LocalEngine
from offtrail.platform.model.text import Text
from offtrail.platform.model.tiny import build_model, build_tokenizer
from offtrail.tasks.chain import ChainConfig
from offtrail.tasks.registry import make_task

IN_FLIGHT = (64, 256)
PLACES = 8
MAX_NEW = 64
SETTINGS = [(attention, cache) for attention in ("sdpa", "eager") for cache in (None, "static")]


@dataclass(frozen=True)
class Work:
    """Prompts and where their samples end: at ``lengths``, or at ``eos`` or after ``most`` tokens if there are none."""

    prompts: list[Int32]
    lengths: list[int] | None
    eos: int
    pad: int
    device: str
    most: int = MAX_NEW


class EndAt(StoppingCriteria):  # type: ignore[misc]
    """Ends each sample of a batch at its own length."""

    def __init__(self, lengths: list[int], padded_prompt: int, device: str) -> None:
        self.ends = torch.tensor(lengths, device=device) + padded_prompt

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Which samples [B] have ended."""
        return self.ends <= input_ids.shape[1]


def run_engine(engine: LocalEngine, work: Work, repeat: int) -> int:
    """Useful tokens that the engine made of the work."""
    stop = () if work.lengths else (work.eos,)
    lengths = work.lengths or [work.most] * len(work.prompts)
    engine.generate(
        [
            Request(i, prompt, 1, Sampling(length, stop_token_ids=stop, seed=repeat))
            for i, (prompt, length) in enumerate(zip(work.prompts, lengths, strict=True))
        ]
    )
    tokens = 0
    while engine.unfinished:
        tokens += sum(len(completion.tokens) for completion in engine.step())
    return tokens


@torch.inference_mode()
def run_generate(model: Any, cache: str | None, work: Work, in_flight: int, repeat: int) -> int:
    """Useful tokens that `generate` made of the work, batch by batch."""
    torch.manual_seed(repeat)
    config = GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=work.most, pad_token_id=work.pad, cache_implementation=cache,
        eos_token_id=None if work.lengths else work.eos, disable_compile=True,
    )  # fmt: skip
    tokens = 0
    for first in range(0, len(work.prompts), in_flight):
        batch = work.prompts[first : first + in_flight]
        width = max(map(len, batch))
        ids = torch.full((len(batch), width), work.pad)
        for row, prompt in zip(ids, batch, strict=True):
            row[width - len(prompt) :] = torch.from_numpy(prompt)
        mask = torch.arange(width) >= width - torch.tensor([[len(prompt)] for prompt in batch])
        criteria = StoppingCriteriaList()
        if work.lengths:
            lengths = work.lengths[first : first + in_flight]
            criteria.append(EndAt(lengths, width, work.device))
        out = model.generate(
            ids.to(work.device), attention_mask=mask.long().to(work.device), generation_config=config,
            stopping_criteria=criteria,
        )  # fmt: skip
        made = out[:, width:]
        if work.lengths:
            tokens += sum(lengths)
        else:
            ended = (made == work.eos).int()
            tokens += int(torch.where(ended.any(1), ended.argmax(1) + 1, made.shape[1]).sum())
    return tokens


def run_continuous(model: Any, work: Work, in_flight: int) -> int:
    """Tokens that transformers' continuous batching made of one filling of equal lengths."""
    config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=work.most, pad_token_id=work.pad, eos_token_id=-1)
    blocks = ContinuousBatchingConfig(
        num_blocks=(1 + -(-work.most // 128)) * in_flight, block_size=128, max_batch_tokens=1024
    )
    prompts = [prompt.tolist() for prompt in work.prompts[:in_flight]]
    results = model.generate_batch(
        prompts, generation_config=config, continuous_batching_config=blocks, progress_bar=False, warmup=False
    )
    return sum(len(result.generated_tokens) for result in results.values())


def rate(run: Callable[[], int], device: str) -> float:
    """Tokens per second of ``run``."""
    cuda = device.startswith("cuda")
    clock = time.perf_counter if cuda else time.process_time
    start = clock()
    tokens = run()
    if cuda:
        torch.cuda.synchronize()
    return tokens / (clock() - start)


def start_model(folder: Path) -> None:
    """The demo's model and tokenizer with random weights."""
    tokenizer = build_tokenizer()
    build_model(ModelConfig(), len(tokenizer), seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def compare(folder: Path, work: Work, in_flight: int, args: argparse.Namespace) -> dict[str, Any]:
    """Rates and ratio of one kind of work at one number in flight."""
    engine = LocalEngine(folder, LocalConfig(device=args.device, max_running=in_flight), max_length=128, threads=1)
    models = {
        attention: AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention).to(args.device).eval()
        for attention in ("sdpa", "eager")
    }
    trial = Work(work.prompts[:in_flight], work.lengths and work.lengths[:in_flight], work.eos, work.pad, work.device)
    trials: dict[tuple[str, str | None], float] = {}
    for attention, cache in SETTINGS:
        run_generate(models[attention], cache, trial, in_flight, 0)  # warm
        trials[attention, cache] = max(
            rate(partial(run_generate, models[attention], cache, trial, in_flight, 0), args.device) for _ in range(2)
        )
    attention, cache = max(trials, key=trials.__getitem__)
    run_engine(engine, trial, 0)  # warm
    runs: dict[str, Callable[[int], int]] = {
        "engine": lambda repeat: run_engine(engine, work, repeat),
        "generate": lambda repeat: run_generate(models[attention], cache, work, in_flight, repeat),
    }
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(args.repeats):
        for name in list(runs) if repeat % 2 == 0 else reversed(runs):
            rates[name].append(rate(partial(runs[name], repeat), args.device))
    ratios = [ours / theirs for ours, theirs in zip(rates["engine"], rates["generate"], strict=True)]
    return {
        "engine": round(statistics.median(rates["engine"])),
        "generate": round(statistics.median(rates["generate"])),
        "generate_setting": f"{attention}, {cache or 'dynamic'} cache",
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(r, 2) for r in ratios],
    }


def continuous_rate(folder: Path, work: Work, in_flight: int, device: str) -> float:
    """Tokens per second of transformers' continuous batching."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="paged|sdpa").to(device).eval()
    return rate(lambda: run_continuous(model, work, in_flight), device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a Hugging Face directory whose eos makes the lengths")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        folder = args.model or Path(made)
        if args.model is None:
            start_model(folder)
        print(json.dumps(report(folder, args)))


def report(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """All figures; one line of text for each as it comes."""
    text = Text(folder)
    tokenizer = text.tokenizer
    task, rng = make_task(ChainConfig(), 0), np.random.default_rng(0)
    result: dict[str, Any] = {
        "benchmark": "local_engine",
        "lengths": "the model's own eos" if args.model else f"lognormal around 32, at most {MAX_NEW}",
        "clock": "wall" if args.device.startswith("cuda") else "cpu",
    }
    for in_flight in IN_FLIGHT:
        prompts = text.encode_all([task.train(i) for i in range(PLACES * in_flight)])
        drawn = np.clip(rng.lognormal(np.log(32), 0.4, len(prompts)).round(), 1, MAX_NEW).astype(int).tolist()
        works = {"ragged": None if args.model else drawn, "equal": [MAX_NEW] * len(prompts)}
        eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        slow = continuous_rate(folder, Work(prompts, None, eos, pad, args.device, MAX_NEW // 2), in_flight, args.device)
        for kind, lengths in works.items():
            found = compare(folder, Work(prompts, lengths, eos, pad, args.device), in_flight, args)
            found["continuous_batching"] = round(slow)
            found["ratio_to_best"] = round(min(found["ratio"], found["engine"] / slow), 3)
            result[f"{kind}_{in_flight}"] = found
            print(f"{kind} lengths, {in_flight} in flight: {found}", flush=True)
    for name, kind in (("tokens_per_second_ratio", "ragged"), ("equal_lengths_ratio", "equal")):
        result[name] = min(result[f"{kind}_{n}"]["ratio_to_best"] for n in IN_FLIGHT)
    return result


if __name__ == "__main__":
    main()
