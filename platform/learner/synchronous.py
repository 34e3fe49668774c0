"""The plain synchronous loop, in one process: generate batch k under version k, score, train, load version k+1.

What invariant I3 is tested against (η = 0 through broker, wire and processes gives these numbers, bit for bit) and what
benchmarks/overlap.py calls the synchronous loop. It uses the engine, driver, reward and trainer that the roles use, and
none of what makes them asynchronous: no broker, ledger, wire, weight channel or verifier process.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from offtrail.core.types import Batch
from offtrail.platform.config.schema import Config
from offtrail.platform.engines.local import LocalEngine
from offtrail.platform.engines.make import local_config
from offtrail.platform.evaluator.answers import Answers, InProcess
from offtrail.platform.generator.role import training_sampling
from offtrail.platform.learner.checkpoint import gather
from offtrail.platform.learner.make import load_trained, make_trainer
from offtrail.platform.learner.train import Report, Trainer
from offtrail.platform.learner.world import World
from offtrail.platform.model.text import Text
from offtrail.platform.runtime.activity import Activity
from offtrail.platform.weights.store import checksum
from offtrail.rewards.registry import make_reward
from offtrail.tasks.registry import make_task


@dataclass(frozen=True)
class Step:
    """One step: the batch, what training it reported, the new version's checksum, seconds of either half."""

    batch: Batch
    report: Report
    checksum: str
    generate_seconds: float
    train_seconds: float


class Synchronous:
    """Engine and trainer of one process, from the start model in ``start``."""

    def __init__(self, config: Config, start: Path) -> None:
        self.config = config
        self.task = make_task(config.task, config.run.seed)
        self.engine = LocalEngine(
            start, local_config(config.engine), max_length=config.model.max_length, threads=config.generator.threads
        )
        judge = InProcess(make_reward(config.reward, self.task.verify))
        self.answers = Answers(config, self.engine, Text(start, config.prompt), judge, "synchronous")
        torch.set_num_threads(config.learner.threads)
        world = World(0, 1, torch.device(config.learner.device))
        model = load_trained(config, None, start)
        self.trainer: Trainer[Batch] = make_trainer(config, world, model, start, Activity())

    def run(self, steps: int) -> Iterator[Step]:
        """``steps`` learner steps from version 0."""
        return (self.step(step) for step in range(steps))

    def step(self, step: int) -> Step:
        """One learner step, from the version that the engine holds, which is ``step``, to the next."""
        began = time.perf_counter()
        batch = self.generate(step)
        generated = time.perf_counter()
        report = self.trainer.step(step, batch)
        weights = gather(self.trainer.module)
        self.engine.load_weights(step + 1, weights)
        trained = time.perf_counter()
        return Step(batch, report, checksum(weights), generated - began, trained - generated)

    def generate(self, step: int) -> Batch:
        """Batch ``step``: all its groups enter the engine in slot order before the first decode.

        Raises ValueError when a prompt leaves no room for an answer.
        """
        B, G = self.config.batch.groups, self.config.batch.group_size
        problems = [self.task.train(slot) for slot in range(step * B, (step + 1) * B)]
        sampling = training_sampling(self.config, self.answers.text.stop_token_ids, step)
        groups = self.answers.groups(problems, G, sampling, first=step * B, step=step)
        if None in groups:
            raise ValueError(f"batch {step}: a prompt leaves no room for an answer; raise model.max_length")
        return Batch(step, tuple(group for group in groups if group is not None))
