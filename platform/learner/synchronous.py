"""The plain synchronous loop, in one process: generate batch k under version k, score, train, load version k+1.

What invariant I3 is tested against (η = 0 through broker, wire and processes gives these numbers, bit for bit) and what
benchmarks/overlap.py calls the synchronous loop. It uses the engine, driver, reward and trainer that the roles use, and
none of what makes them asynchronous: no broker, ledger, wire, weight channel or verifier process.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from offtrail.core.types import Batch, Group, Lease
from offtrail.platform.config.schema import Config
from offtrail.platform.engines.local import LocalEngine
from offtrail.platform.generator.role import training_sampling
from offtrail.platform.learner.checkpoint import gather
from offtrail.platform.learner.make import make_trainer
from offtrail.platform.learner.train import Report, Trainer
from offtrail.platform.learner.world import World
from offtrail.platform.model.policy import load_model
from offtrail.platform.model.text import Text
from offtrail.platform.runtime.activity import Activity
from offtrail.platform.weights.store import checksum
from offtrail.rewards.registry import make_reward
from offtrail.rewards.total import columns, total
from offtrail.search.sample import SampleDriver
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
        self.reward = make_reward(config.reward, self.task.verify)
        self.text = Text(start, config.prompt)
        self.engine = LocalEngine(
            start, config.engine, max_length=config.model.max_length, threads=config.generator.threads
        )
        torch.set_num_threads(config.learner.threads)
        world = World(0, 1, torch.device(config.learner.device))
        model = load_model(start, device=config.learner.device)
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
        """Batch ``step``: all its groups enter the engine in slot order before the first decode."""
        B = self.config.batch.groups
        sampling = training_sampling(self.config, self.text.stop_token_ids, step)
        drivers: dict[int, SampleDriver] = {}
        for slot in range(step * B, (step + 1) * B):
            problem = self.task.train(slot)
            lease = Lease(slot, slot, 1, problem, self.config.batch.group_size, min_version=step)
            drivers[slot] = driver = SampleDriver(lease, sampling, "synchronous")
            [ask] = driver.start(self.text.encode(problem))
            self.engine.generate([ask.request(slot, slot)])
        groups: dict[int, Group] = {}
        while self.engine.unfinished:
            for completion in self.engine.step():
                driver = drivers[completion.request]
                driver.answered(0, completion)
                if driver.group is not None:
                    groups[completion.request] = self.scored(driver.group)
        return Batch(step, tuple(groups[i] for i in sorted(groups)))

    def scored(self, group: Group) -> Group:
        """The group with its reward."""
        texts = [self.text.answer_text(group.problem, sample.tokens) for sample in group.samples()]
        finished = [sample.finish == "stop" for sample in group.samples()]
        components = columns(self.reward.judge(group.problem, texts, finished))
        step = group.slot // self.config.batch.groups
        rewards = total(self.config.reward, components, task=group.problem.task, step=step)
        return replace(group, components=components, rewards=rewards)
