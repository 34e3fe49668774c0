"""Scores through a scorer, batched over all who ask, against one-at-a-time calls of its model; and what a run pays.

    python benchmarks/scorer.py [--askers 4] [--rounds 5] [--steps 40] [--no-runs]

``batched_ratio``: steps scored per second through a scorer's own service (socket, codec, desk and forward passes, in
a process of its own on one thread) that ``askers`` clients ask about groups of the embedded default's task, over those
of the same model asked by transformers' own forward, an answer at a time. Rounds alternate; the median of their ratios.

``added_wall_ratio``: wall time of a run with that model over one without, both of equal samples, on whatever cores this
process may use (pin it with taskset: one core more than the run has roles that compute is a scorer's own core).
``idle_share``: of the scorer's time in that run, what it waited for requests. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import statistics
import subprocess
import sys
import tempfile
import time
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import ROOT, say
from transformers import AutoModelForTokenClassification, Qwen3Config, Qwen3ForTokenClassification

from offtrail.core.types import Int32
from offtrail.platform.config.compose import compose
from offtrail.platform.config.schema import Config
from offtrail.platform.model.scoring import scorings
from offtrail.platform.model.tiny import build_tokenizer
from offtrail.platform.runtime.activity import Activity
from offtrail.platform.scorer.desk import Desk
from offtrail.platform.scorer.served import Served
from offtrail.platform.scorer.service import Service
from offtrail.platform.wire.auth import new_keys
from offtrail.platform.wire.messages import Scored, ScoreRequest
from offtrail.platform.wire.sockets import Client, Endpoint, Server, ServerKeys
from offtrail.tasks.registry import make_task

GROUPS, SAMPLES = 32, 8


def make_model(folder: Path, config: Config) -> None:
    """A random process reward model of the embedded default's size, on its tokenizer."""
    tokenizer, model = build_tokenizer(), config.model
    torch.manual_seed(0)
    shape = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=model.hidden_size, intermediate_size=model.mlp_size, num_labels=1,
        num_hidden_layers=model.layers, num_attention_heads=model.heads, num_key_value_heads=model.kv_heads,
        head_dim=model.hidden_size // model.heads, max_position_embeddings=model.max_length, pad_token_id=0,
    )  # fmt: skip
    Qwen3ForTokenClassification(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_questions(config: Config) -> list[tuple[Int32, list[Int32], list[Int32]]]:
    """Of each group its prompt, its answers and where their steps end: worked traces, cut into four."""
    tokenizer, task, rng = build_tokenizer(), make_task(config.task, 0), random.Random(0)
    found = []
    for place in range(GROUPS):
        problem = task.train(place)
        prompt = np.array(tokenizer.encode(problem.prompt), np.int32)
        answers = [np.array(tokenizer.encode(task.trace(problem, rng)), np.int32) for _ in range(SAMPLES)]
        ends = [np.unique(np.linspace(1, len(answer), 4).astype(np.int32)) for answer in answers]
        found.append((prompt, answers, ends))
    return found


def serve(folder: str, settings: list[str], line: Any, keys: ServerKeys, over: Event) -> None:
    """A scorer without a run."""
    torch.set_num_threads(1)
    config, activity = compose(settings), Activity()
    models = {name: Served.open(config, Path(folder), one) for name, one in scorings(config).items()}
    server = Server("127.0.0.1", 0, keys)
    line.send((server.endpoint.url, server.endpoint.hints_url))
    service = Service(server, Desk(list(models), budget=config.scorer.tokens_per_batch, finish=True), models, activity)
    while not over.is_set():
        service.turn()
    server.close()


def through_the_scorer(
    clients: list[Client], questions: list[tuple[Int32, list[Int32], list[Int32]]]
) -> tuple[float, list[np.ndarray]]:
    """Seconds, and the scores of each question."""
    begin, open_tickets = time.perf_counter(), dict[tuple[int, int], int]()
    for place, (prompt, answers, ends) in enumerate(questions):
        lengths = np.array([len(answer) for answer in answers], np.int32)
        before = np.cumsum(lengths) - lengths
        joined = np.concatenate([end + start for end, start in zip(ends, before, strict=True)]).astype(np.int32)
        asker = place % len(clients)
        arrays = [prompt, lengths, np.concatenate(answers), joined]
        open_tickets[asker, clients[asker].send(ScoreRequest(model="prm"), arrays)] = place
    found: list[np.ndarray] = [np.zeros(0)] * len(questions)
    while open_tickets:
        for asker, client in enumerate(clients):
            for ticket, message, arrays in client.poll(0.001):
                assert isinstance(message, Scored), message
                found[open_tickets.pop((asker, ticket))] = arrays[0]
    return time.perf_counter() - begin, found


@torch.no_grad()
def one_at_a_time(
    model: Any, questions: list[tuple[Int32, list[Int32], list[Int32]]]
) -> tuple[float, list[np.ndarray]]:
    """The same, an answer at a time through transformers' own forward."""
    begin, found = time.perf_counter(), []
    for prompt, answers, ends in questions:
        scores = []
        for answer, end in zip(answers, ends, strict=True):
            ids = torch.from_numpy(np.concatenate([prompt, answer]).astype(np.int64))[None]
            logits = model(input_ids=ids, use_cache=False).logits[0, :, 0]
            scores.append(torch.sigmoid(logits[len(prompt) - 1 + torch.from_numpy(end.astype(np.int64))]).numpy())
        found.append(np.concatenate(scores))
    return time.perf_counter() - begin, found


def batched_ratio(folder: Path, askers: int, rounds: int) -> dict[str, float]:
    """Steps a second of both, and their ratio."""
    settings = [f"scorer.models={{prm: {{path: {folder / 'prm'}}}}}", f"weights.dir={folder}"]
    questions = make_questions(compose(settings))
    steps = sum(len(end) for _, _, ends in questions for end in ends)
    server_keys, client_keys = new_keys("127.0.0.1")
    spawn = multiprocessing.get_context("spawn")
    (line, theirs), over = spawn.Pipe(), spawn.Event()
    process = spawn.Process(target=serve, args=(str(folder), settings, theirs, server_keys, over))
    process.start()
    endpoint = Endpoint(*line.recv())
    clients = [Client(endpoint, f"generator-{i}", client_keys) for i in range(askers)]
    torch.set_num_threads(1)
    alone = AutoModelForTokenClassification.from_pretrained(folder / "prm").eval()
    ratios, fast, slow = [], [], []
    for place in range(rounds + 1):  # the first warms both up
        batched, scores = through_the_scorer(clients, questions)
        single, expected = one_at_a_time(alone, questions)
        worst = max(float(np.abs(a - b).max()) for a, b in zip(scores, expected, strict=True))
        assert worst < 1e-4, f"the two disagree by {worst}"
        if place:
            ratios.append(single / batched)
            fast.append(steps / batched)
            slow.append(steps / single)
            say(f"round {place}: {fast[-1]:,.0f} steps/s through the scorer, {slow[-1]:,.0f} one at a time")
    over.set()
    process.join()
    for client in clients:
        client.close()
    return {
        "batched_ratio": statistics.median(ratios),
        "batched_steps_per_second": statistics.median(fast),
        "single_steps_per_second": statistics.median(slow),
    }


def run_seconds(folder: Path, name: str, steps: int, *more: str) -> tuple[float, dict[str, Any]]:
    """Seconds of learner steps 2 … last of a run, by the broker's clock, and its summary."""
    settings = [f"run.name={name}", f"run.dir={folder}", f"learner.steps={steps}", "eval.every=0", *more]
    subprocess.run([sys.executable, str(ROOT / "launch.py"), *settings], check=True, stdout=sys.stderr)
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    summary: dict[str, Any] = json.loads((folder / name / "summary.json").read_text())
    return sum(row.get("time/step_seconds", 0.0) for row in rows[2:]), summary


def added(folder: Path, steps: int) -> dict[str, float]:
    """What the model costs a run."""
    plain, _ = run_seconds(folder, "plain", steps)
    prm = (f"scorer.models={{prm: {{path: {folder / 'prm'}, empty: 0}}}}", "reward.weights.prm=0")
    scored, summary = run_seconds(folder, "scored", steps, *prm)
    waiting = float(summary["compute/scorer_waiting_requests_seconds"])
    busy = sum(v for k, v in summary.items() if k.startswith("compute/scorer_busy_score"))
    return {"added_wall_ratio": scored / plain, "idle_share": waiting / (waiting + busy)}


def main() -> None:
    """Measure, and say it in one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--askers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40, help="learner steps of each run")
    parser.add_argument("--no-runs", action="store_true", help="the service alone")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "prm", compose([]))
        found = batched_ratio(folder, given.askers, given.rounds)
        if not given.no_runs:
            found |= added(folder, given.steps)
    print(json.dumps({name: round(value, 3) for name, value in found.items()}))


if __name__ == "__main__":
    main()
