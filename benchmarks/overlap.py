"""How much of the ideal overlap of generation and training the asynchronous run reaches, on the same tokens.

    python benchmarks/overlap.py [--steps 60] [--repeats 5] [KEY=VALUE …]

Learning rate 0, so that every arm works on the same tokens: randomness is keyed by (seed, group, sample, token), and
the weights of all versions are equal. The first run's archive is the reference; `same_tokens_share` is the share of
groups of every later arm that are the reference's token for token.

- T_gen: engine, driver and verification of the groups of N batches in one process, pinned to one core.
- T_train: Trainer.step, gather and publish of the same N batches at hand, pinned to the other core.
- T_async: the real command with all its processes, unpinned; from the commit of version `first` to that of version
  `first` + N, by the broker's clock, while the generators still have groups to make (steady state).
- T_sync: the plain synchronous loop of platform/learner/synchronous.py over the same N batches, unpinned, with one or
  two threads, whichever a trial finds faster.

fraction_of_ideal = max(T_gen, T_train) / T_async and speedup_over_synchronous = T_sync / T_async, each a median over
repeats of the ratio within a repeat; the order of the arms turns round in every second repeat. CPU contention by
anything else on the machine makes the asynchronous run, which needs both cores at once, look worse than it is. The last
line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Arm, Run, Stopwatch, cores, launch, machine, say

from offtrail.core.types import Batch, Group, Lease
from offtrail.platform.config.schema import Config
from offtrail.platform.engines.local import LocalEngine
from offtrail.platform.engines.make import local_config
from offtrail.platform.generator.role import training_sampling
from offtrail.platform.learner.checkpoint import gather
from offtrail.platform.learner.make import make_trainer
from offtrail.platform.learner.synchronous import Synchronous
from offtrail.platform.learner.world import World
from offtrail.platform.model.policy import load_model
from offtrail.platform.model.text import Text
from offtrail.platform.runtime.activity import Activity
from offtrail.platform.weights.store import Publisher, remove
from offtrail.rewards.registry import make_reward
from offtrail.rewards.total import columns, total
from offtrail.search.sample import SampleDriver
from offtrail.tasks.registry import make_task

FIRST = 10
"""The version whose commit starts the clock of the asynchronous run: all processes are warm, the queue is steady."""
TAIL = 4
"""Steps after the clock's stop, beyond staleness.max, so that the generators never run out of work before it."""

Measured = dict[str, Any]


def same(found: Sequence[Group], batches: Sequence[Batch]) -> int:
    """How many groups have the reference's tokens."""
    reference = {group.group: group for batch in batches for group in batch.groups}
    return sum(np.array_equal(group.tokens, reference[group.group].tokens) for group in found)


class Generation:
    """T_gen: what a generator does for its groups, without broker, wire and weights."""

    def __init__(self, run: Run, first: int, last: int) -> None:
        self.config, self.batches = run.config, run.batches(first, last)
        self.task = make_task(self.config.task, self.config.run.seed)
        self.reward = make_reward(self.config.reward, self.task.verify)
        self.text = Text(run.start)
        self.engine = LocalEngine(
            run.start,
            local_config(self.config.engine),
            max_length=self.config.model.max_length,
            threads=self.config.generator.threads,
        )
        self.make([group for batch in self.batches[:3] for group in batch.groups])  # warm

    def __call__(self) -> Measured:
        """Seconds, and how many groups came out as in the reference."""
        watch = Stopwatch()
        made = self.make([group for batch in self.batches for group in batch.groups])
        return watch.read() | {"same": same(made, self.batches), "groups": len(made)}

    def make(self, wanted: Sequence[Group]) -> list[Group]:
        """The groups again, with the engine kept as full as the generator role keeps it."""
        todo, drivers, made = list(reversed(wanted)), dict[int, SampleDriver](), list[Group]()
        while todo or self.engine.unfinished:
            while todo and self.engine.unfinished < 2 * self.config.engine.max_running:
                group = todo.pop()
                step = group.slot // self.config.batch.groups
                sampling = training_sampling(self.config, self.text.stop_token_ids, step)
                lease = Lease(group.group, group.slot, 1, group.problem, group.size, min_version=0)
                drivers[group.group] = driver = SampleDriver(lease, sampling, "alone")
                [ask] = driver.start(self.text.encode(group.problem))
                self.engine.generate([ask.request(group.group, group.group)])
            for completion in self.engine.step():
                driver = drivers[completion.request]
                driver.answered(0, completion)
                if driver.group is not None:
                    made.append(self.scored(driver.group))
        return made

    def scored(self, group: Group) -> Group:
        """The group with its rewards."""
        texts = [self.text.decode(sample.tokens) for sample in group.samples()]
        finished = [sample.finish == "stop" for sample in group.samples()]
        group.components = columns(self.reward.judge(group.problem, texts, finished))
        step = group.slot // self.config.batch.groups
        group.rewards = total(self.config.reward, group.components, task=group.problem.task, step=step)
        return group


class Training:
    """T_train: what a learner does with its batches, without broker and wire."""

    def __init__(self, run: Run, first: int, last: int, channel: Path) -> None:
        config = run.config
        torch.set_num_threads(config.learner.threads)
        self.batches, self.channel = run.batches(first, last), channel
        model = load_model(run.start, device=config.learner.device)
        world = World(0, 1, torch.device(config.learner.device))
        self.trainer = make_trainer(config, world, model, run.start, Activity())
        self.train(self.batches[:5])  # warm

    def __call__(self) -> Measured:
        """Seconds, and the samples trained."""
        watch = Stopwatch()
        self.train(self.batches)
        return watch.read() | {"samples": sum(group.size for batch in self.batches for group in batch.groups)}

    def train(self, batches: Sequence[Batch]) -> None:
        """Each batch: train, gather, publish."""
        publisher = Publisher(self.channel)
        for batch in batches:
            self.trainer.step(batch.step, batch)
            publisher.publish(batch.step + 1, gather(self.trainer.module))
        publisher.close()
        remove(self.channel)


class Loop:
    """T_sync: the synchronous loop."""

    def __init__(self, run: Run, first: int, last: int, threads: int) -> None:
        config: Config = run.config
        config.generator.threads = config.learner.threads = threads
        self.batches = run.batches(first, last)
        self.loop = Synchronous(config, run.start)
        self.loop.engine.load_weights(first, gather(self.loop.trainer.module))
        self(3)

    def __call__(self, count: int | None = None) -> Measured:
        """Seconds of all steps, or the first ``count``, and how many groups came out as in the reference."""
        found, seconds = list[Group](), 0.0
        self.loop.engine.load_weights(self.batches[0].step, gather(self.loop.trainer.module))
        for batch in self.batches[:count]:
            step = self.loop.step(batch.step)
            seconds += step.generate_seconds + step.train_seconds
            found += step.batch.groups
        return {"seconds": seconds, "same": same(found, self.batches), "groups": len(found)}


def asynchronous(folder: Path, name: str, overrides: Sequence[str], first: int, last: int, reference: Run) -> Measured:
    """T_async: one run of the real command."""
    run = launch(folder, name, overrides)
    batches = run.batches(first, last)
    groups = [group for batch in batches for group in batch.groups]
    found = {
        "seconds": run.seconds(first, last),
        "same": same(groups, reference.batches(first, last)),
        "groups": len(groups),
        "shares": {
            what: round(run.mean(f"time/{what}", first, last), 3)
            for what in (
                "learner_busy_train", "learner_busy_prox", "learner_busy_publish", "learner_waiting_batch",
                "learner_waiting_commit", "generator_busy", "generator_waiting_leases", "evaluator_busy",
            )
        },
        "staleness": round(run.mean("staleness/mean", first, last), 2),
    }  # fmt: skip
    run.remove()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="N, the learner steps that are timed")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("keys", nargs="*", help="keys of the run, as launch.py takes them")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="overlap-") as folder:
        print(json.dumps(report(Path(folder), args)))


def report(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """All arms, repeat by repeat."""
    about, (one, other) = machine(), cores()
    first, last = FIRST, FIRST + args.steps
    eta = next(
        (int(key.partition("=")[2]) for key in args.keys if key.startswith("staleness.max=")), Config().staleness.max
    )
    steps = last + eta + TAIL
    overrides = [
        "learner.optim.lr=0", f"learner.steps={steps}", f"learner.checkpoint_every={steps}", "eval.every=0",
        "eval.prompts=16", *args.keys,
    ]  # fmt: skip
    say("the reference run (makes the start model if the cache has none)")
    reference = launch(folder, "reference", overrides)
    span = (reference, first, last)
    trials = {threads: Arm(Loop, *span, threads, cores={one, other}, threads=threads) for threads in (1, 2)}
    took = {threads: arm.measure(5)["seconds"] for threads, arm in trials.items()}
    threads = min(took, key=took.__getitem__)
    say(f"synchronous loop: {took[1]:.2f} s with one thread, {took[2]:.2f} s with two")
    trials.pop(3 - threads).close()
    arms: dict[str, Callable[..., Measured]] = {
        "gen": Arm(Generation, *span, cores={other}).measure,
        "train": Arm(Training, *span, Path("/dev/shm") / f"overlap-{os.getpid()}", cores={one}).measure,
        "sync": trials[threads].measure,
    }
    repeats: list[dict[str, Measured]] = []
    for repeat in range(args.repeats):
        real = partial(asynchronous, folder, f"run-{repeat}", overrides, first, last, reference)
        order = list((arms | {"async": real}).items())
        found = {name: arm() for name, arm in (order if repeat % 2 == 0 else reversed(order))}
        repeats.append(found)
        say(
            " · ".join(f"{name} {found[name]['seconds']:.3f} s" for name in sorted(found))
            + f" · {found['async']['shares']}"
        )
    return summary(repeats, reference.config) | {
        "settings": {
            "steps_timed": [first, last], "steps_of_the_run": steps, "repeats": args.repeats,
            "overrides": overrides, "synchronous_threads": threads, **about,
        }
    }  # fmt: skip


def summary(repeats: Sequence[dict[str, Measured]], config: Config) -> dict[str, Any]:
    """Medians over the repeats of the ratios within each."""

    def seconds(name: str) -> list[float]:
        return [found[name]["seconds"] for found in repeats]

    ideal = [max(pair) for pair in zip(seconds("gen"), seconds("train"), strict=True)]
    fractions = [best / real for best, real in zip(ideal, seconds("async"), strict=True)]
    speedups = [plain / real for plain, real in zip(seconds("sync"), seconds("async"), strict=True)]
    checked = [found[name] for found in repeats for name in ("gen", "sync", "async")]
    last = repeats[-1]["async"]
    return {
        "benchmark": "overlap",
        "fraction_of_ideal": round(statistics.median(fractions), 3),
        "fractions": [round(f, 3) for f in fractions],
        "speedup_over_synchronous": round(statistics.median(speedups), 3),
        "speedups": [round(s, 3) for s in speedups],
        **{f"t_{name}": round(statistics.median(seconds(name)), 3) for name in ("gen", "train", "async", "sync")},
        "ideal_speedup": round(statistics.median(seconds("sync")) / statistics.median(ideal), 3),
        "same_tokens_share": round(sum(c["same"] for c in checked) / sum(c["groups"] for c in checked), 5),
        "samples_per_step": config.batch.groups * config.batch.group_size,
        "shares_of_time": last["shares"],
        "staleness_mean": last["staleness"],
    }


if __name__ == "__main__":
    main()
