"""How full the learner's micro-batches are, and training tokens per CPU second against a padded forward.

    python benchmarks/packing.py [--rounds 7]

``efficiency``: tokens / (bins × budget) of best-fit-decreasing, model/packing.py's ``pack``, on 8,192 lognormal
lengths (median 2,981 tokens, σ 1, cut at 32,768 = the budget), beside next-fit, first-fit in the order of arrival,
padded micro-batches of 8 and padding to the cap; means of five draws.

``throughput_ratio``: the learner's step against transformers' padded forward, in one run, on one thread. Both train the
same batch on the embedded default's model: 16 groups of 8, prompts of the chain task, answers as long as its worked and
guessed traces, K = 2 updates, proximal log-probabilities of the second minibatch, GRPO with TIS, clipping, AdamW. The
peer is what a plain script does: right-padded batches through AutoModelForCausalLM (its default attention),
log-softmax, gather, mask, torch's AdamW. Rounds alternate; the best of each counts, in CPU time of this process. The
parameters of both are compared at the end, so that they did the same work. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from offtrail.algos.config import GrpoConfig
from offtrail.algos.correction_config import TisConfig
from offtrail.algos.loss import LossInput, policy_loss
from offtrail.core.types import Batch, Group
from offtrail.platform.config.schema import Config
from offtrail.platform.learner.objectives import PolicyGradient, StepData
from offtrail.platform.learner.train import Trained, Trainer, adamw, warmup
from offtrail.platform.learner.world import World
from offtrail.platform.model.packing import SampleTable, pack
from offtrail.platform.model.policy import Policy, load_model
from offtrail.platform.model.tiny import build_tokenizer, save_start
from offtrail.platform.runtime.activity import Activity
from offtrail.tasks.registry import make_task


def make_batch(config: Config) -> Batch:
    """Groups whose answers are traces of their problem, with random rewards and plausible log-probabilities."""
    tokenizer, task, rng = build_tokenizer(), make_task(config.task, 0), random.Random(0)
    draw, groups = np.random.default_rng(0), []
    for slot in range(config.batch.groups):
        problem = task.train(slot)
        prompt = np.array(tokenizer.encode(problem.prompt, add_special_tokens=False), np.int32)
        texts = [task.trace(problem, rng) for _ in range(config.batch.group_size)]
        answers = [np.array([*tokenizer.encode(t, add_special_tokens=False), 1], np.int32) for t in texts]
        tokens, G = np.concatenate(answers), len(answers)
        rewards = draw.integers(0, 2, G).astype(np.float32)
        groups.append(
            Group(
                group=slot, slot=slot, attempt=0, problem=problem, generator="bench", temperature=1.0,
                prompt_tokens=prompt, lengths=np.array([len(a) for a in answers], np.int32), tokens=tokens,
                logprobs=-draw.gamma(16.0, 0.25, len(tokens)).astype(np.float32),
                versions=np.zeros(len(tokens), np.int32), finish=np.zeros(G, np.uint8), rewards=rewards,
                components={"accuracy": rewards}, times=np.zeros((G, 3)),
            )
        )  # fmt: skip
    return Batch(0, tuple(groups))


class Padded:
    """The peer: the same K updates with padding, through transformers' own forward."""

    def __init__(self, start: Path, config: Config) -> None:
        self.config, self.objective = config, PolicyGradient(config)
        self.model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
        optim = config.learner.optim
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=optim.lr, betas=optim.betas, weight_decay=0.0)

    def step(self, step: int, batch: Batch) -> None:
        """K updates on the batch."""
        work = self.objective.advance(self.objective.prepare(step, batch))
        parts = [np.flatnonzero(np.isin(work.rows.group_of, update)).tolist() for update in work.updates]
        with torch.no_grad():
            prox = [None, *(self.logprobs(work.rows, part) for part in parts[1:])]
        for part, before in zip(parts, prox, strict=True):
            loss, _ = policy_loss(self._input(work, part, before), self.objective.algo, self.objective.correction)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.learner.optim.grad_clip)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def _input(self, work: StepData, part: list[int], prox: Tensor | None) -> LossInput:
        assert work.behaviour is not None
        assert work.advantages is not None
        sample = torch.from_numpy(np.repeat(part, work.rows.lengths[part]))
        start, stop = int(work.rows.starts[part[0]]), int(work.rows.starts[part[-1] + 1])
        return LossInput(
            logprobs=self.logprobs(work.rows, part), behaviour_logprobs=work.behaviour[start:stop],
            advantages=work.advantages[start:stop], token_weights=work.weights[sample], sample_index=sample,
            prox_logprobs=prox,
        )  # fmt: skip

    def logprobs(self, rows: SampleTable, part: list[int]) -> Tensor:
        """Log-probabilities of the samples' output tokens, in order."""
        texts = [
            np.concatenate([rows.prompts[rows.group_of[i]], rows.tokens[rows.starts[i] : rows.starts[i + 1]]])
            for i in part
        ]
        ids = torch.zeros(len(part), max(map(len, texts)), dtype=torch.long)
        mask, answer = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for row, i in enumerate(part):
            n = len(texts[row])
            ids[row, :n], mask[row, :n] = torch.from_numpy(texts[row].astype(np.int64)), 1
            answer[row, len(rows.prompts[rows.group_of[i]]) : n] = True
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        picked = torch.log_softmax(logits, -1).gather(2, ids[:, 1:, None])[..., 0]
        chosen: Tensor = picked[answer[:, 1:]]
        return chosen


def offtrail(start: Path, config: Config) -> Trainer[Batch]:
    """The learner's own trainer."""
    policy, optim = Policy(load_model(start)), config.learner.optim
    optimizer = adamw(policy.parameters(), lr=optim.lr, betas=optim.betas, eps=optim.eps, decay=0.0)
    alone = World(0, 1, torch.device("cpu"))
    objective, budget = PolicyGradient(config), config.learner.tokens_per_microbatch
    trained = Trained("policy", policy, objective, optimizer, warmup(optim), optim.grad_clip)
    return Trainer(alone, objective, [trained], Activity(), budget=budget)


def cpu_seconds(work: Callable[[], Any]) -> float:
    """CPU time of one call."""
    before = time.process_time()
    work()
    return time.process_time() - before


CAP = 32_768


def next_fit(lengths: list[int]) -> int:
    """Bins of at most CAP tokens, when only the last is open."""
    bins, used = 1, 0
    for length in lengths:
        if used + length > CAP:
            bins, used = bins + 1, 0
        used += length
    return bins


def first_fit(lengths: list[int]) -> int:
    """Bins of at most CAP tokens, when each item goes to the first that takes it."""
    free: list[int] = []
    for length in lengths:
        place = next((i for i, left in enumerate(free) if left >= length), len(free))
        if place == len(free):
            free.append(CAP)
        free[place] -= length
    return len(free)


def efficiencies(draws: int = 5) -> dict[str, float]:
    """Mean share of real tokens over draws of 8,192 lengths."""
    found: dict[str, list[float]] = {}
    for seed in range(draws):
        lengths = np.clip(np.random.default_rng(seed).lognormal(8, 1, 8_192), 1, CAP).astype(int)
        total, items = int(lengths.sum()), lengths.tolist()
        room = {
            "best_fit_decreasing": len(pack(range(len(items)), items, CAP)) * CAP,
            "first_fit": first_fit(items) * CAP,
            "next_fit": next_fit(items) * CAP,
            "padded_eights": 8 * int(lengths.reshape(-1, 8).max(1).sum()),
            "pad_to_cap": len(items) * CAP,
        }
        for name, tokens in room.items():
            found.setdefault(name, []).append(total / tokens)
    return {name: sum(values) / len(values) for name, values in found.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    config = dataclasses.replace(Config(), algo=GrpoConfig(), correction=TisConfig())
    batch = make_batch(config)
    with tempfile.TemporaryDirectory() as folder:
        start = Path(folder) / "start"
        save_start(start, config.model, 0)
        mine, peer = offtrail(start, config), Padded(start, config)
    seconds: dict[str, list[float]] = {"offtrail": [], "padded": []}
    for _ in range(rounds + 1):  # the first warms up
        seconds["offtrail"].append(cpu_seconds(lambda: mine.step(0, batch)))
        seconds["padded"].append(cpu_seconds(lambda: peer.step(0, batch)))
    best = {name: min(values[1:]) for name, values in seconds.items()}
    apart = max(
        float((a - b).detach().abs().max())
        for a, b in zip(mine.module.parameters(), peer.model.parameters(), strict=True)
    )
    tokens = sum(len(g.tokens) + g.size * len(g.prompt_tokens) for g in batch.groups)
    print(f"{tokens} tokens a step (prompts once a sample); parameters differ by {apart:.1e} after {rounds + 1} steps")
    figures = {f"{name}_tokens_per_cpu_second": round(tokens / value) for name, value in best.items()}
    figures |= {f"{name}_samples_per_cpu_second": round(128 / value) for name, value in best.items()}
    shares = efficiencies()
    for name, share in shares.items():
        print(f"{name:20s} {share:.4f}")
    efficiency = round(shares["best_fit_decreasing"], 4)
    ratio = round(best["padded"] / best["offtrail"], 3)
    others = {f"efficiency_{name}": round(share, 4) for name, share in shares.items() if name != "best_fit_decreasing"}
    row = {"benchmark": "packing", "efficiency": efficiency, "throughput_ratio": ratio, **others, **figures}
    print(json.dumps(row))


if __name__ == "__main__":
    main()
