"""The real asynchronous run against TRL's GRPOTrainer: same start checkpoint, task, prompts, rewards and updates.

    python benchmarks/vs_trl.py [--repeats 3] [--target 0.9] [--steps 60] [KEY=VALUE …]

Both have the machine's two cores. Of a learner step both make the same: B prompts in the same order, G samples each at
T = 1, K optimizer updates on whole or shuffled halves of them, GRPO with advantages divided by the group's standard
deviation, token-mean loss, the same clip range, no KL, AdamW with the same settings, gradient clipping, float32.

TRL gets what makes it fastest here: no gradient checkpointing, the whole batch in one generation and one forward a
minibatch, no logging, no saving, the same verifier as a plain function; and the fastest of one or two threads, then of
its attention and cache implementations, in a trial of a few steps each (all rates are reported).

The clock starts at the first generation (TRL) or the first published version (ours): start-up counts for neither.
Held-out accuracy is measured every `--every` steps by the same code on the same prompts with the same random numbers;
TRL's clock stands still meanwhile, ours runs on with the evaluator beside. Seconds to the target are the clock at the
first measured version that reaches it. Ratios are medians over repeats with different seeds; where a run does not reach
the target in --steps, its time at the end stands in for it, and `reached` says so.

- time_to_accuracy_ratio: TRL's seconds to the target ÷ ours.
- samples_per_second_ratio: ours ÷ TRL's, samples trained per second, from step 5 to TAIL steps before our run's end (so
  that our generators still work), and from step 5 to the end of TRL's, without its evaluations.
- ceiling_share: our samples per second ÷ those of training alone on the same batches at hand, on one pinned core, the
  other core idle.
- ceiling_share_beside: the same while another such training keeps the other core busy, as generation does in ours: what
  two busy cores of this machine take from each other is in neither side then.

The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from common import Arm, Run, cores, launch, machine, say
from overlap import Training

from offtrail.algos.config import GrpoConfig
from offtrail.platform.config.schema import Config
from offtrail.platform.evaluator.role import Evaluation
from offtrail.platform.model.text import Text
from offtrail.platform.runtime.activity import Activity
from offtrail.platform.runtime.context import RoleContext
from offtrail.rewards.registry import make_reward
from offtrail.rewards.total import columns, total
from offtrail.tasks.registry import make_task

WARM, TAIL = 5, 6
SETTINGS: tuple[tuple[str, str | None], ...] = (("sdpa", None), ("eager", None), ("sdpa", "static"))
"""Attention and cache implementations of transformers that TRL can be given."""

Measured = dict[str, Any]


class Trl:
    """TRL on a completed run's start model and configuration; one call is one training. ``parts``: micro-batches of an
    update; ``mixed``: under autocast to bfloat16.
    """

    parts = 1
    mixed = False

    def __init__(self, run: Run, threads: int) -> None:
        logging.disable(logging.WARNING)
        torch.set_num_threads(threads)
        self.run, self.config, self.text = run, run.config, Text(run.start)
        self.evaluation = Evaluation(RoleContext(self.config, run.folder, "evaluator", 0), Activity())

    def __call__(
        self, seed: int, steps: int, attention: str, cache: str | None, every: int = 0, target: float = 2.0
    ) -> Measured:
        """Learner steps until the target is reached, measured every ``every`` steps (0: never), at most ``steps``."""
        from transformers import AutoModelForCausalLM
        from trl import GRPOTrainer

        clock = clock_of(self.config.learner.minibatches, every, target, self.accuracy)
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(
                self.run.start, dtype=torch.float32, attn_implementation=attention
            ),
            reward_funcs=self.reward,
            args=self.arguments(seed, steps, cache),
            train_dataset=self.prompts(seed, steps),
            processing_class=self.text.tokenizer,
            callbacks=[clock],
        )
        trainer.train()
        return {"seconds": clock.seconds, "accuracy": clock.accuracy, "threads": torch.get_num_threads()}

    def arguments(self, seed: int, steps: int, cache: str | None) -> Any:
        """GRPOConfig that does what our configuration does."""
        from trl import GRPOConfig

        config, algo = self.config, self.config.algo
        assert isinstance(algo, GrpoConfig)
        B, G, K, optim = config.batch.groups, config.batch.group_size, config.learner.minibatches, config.learner.optim
        return GRPOConfig(
            output_dir=str(self.run.folder / "trl"), seed=seed, max_steps=steps * K, use_cpu=True, bf16=self.mixed,
            per_device_train_batch_size=B * G // (K * self.parts), gradient_accumulation_steps=self.parts,
            steps_per_generation=K * self.parts, num_generations=G, num_iterations=1, shuffle_dataset=False,
            max_completion_length=config.sampling.max_new_tokens, temperature=config.sampling.temperature,
            beta=0.0, epsilon=algo.clip_low, epsilon_high=algo.clip_high, loss_type="bnpo",
            scale_rewards="group", cache_implementation=cache,
            learning_rate=optim.lr, lr_scheduler_type="constant", warmup_steps=0, weight_decay=optim.weight_decay,
            adam_beta1=optim.betas[0], adam_beta2=optim.betas[1], adam_epsilon=optim.eps, optim="adamw_torch_fused",
            max_grad_norm=optim.grad_clip, gradient_checkpointing=False, logging_strategy="no", report_to=[],
            save_strategy="no", eval_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip

    def prompts(self, seed: int, steps: int) -> Any:
        """The same prompts in the same order as ours of that seed."""
        from datasets import Dataset

        self.task = make_task(self.config.task, seed)
        self.ours = make_reward(self.config.reward, self.task.verify)
        count = steps * self.config.batch.groups
        return Dataset.from_list([{"prompt": self.task.train(i).prompt, "index": i} for i in range(count)])

    def reward(self, completion_ids: Sequence[list[int]], index: Sequence[int], **_: Any) -> list[float]:
        """The total reward of each completion, as rewards/ has it."""
        stops, rewards = self.text.stop_token_ids, []
        for ids, place in zip(completion_ids, index, strict=True):
            finished = bool(ids) and ids[-1] in stops
            answer = self.text.tokenizer.decode(ids[:-1] if finished else ids, skip_special_tokens=False)
            problem = self.task.train(place)
            components = columns(self.ours.judge(problem, [answer], [finished]))
            [reward] = total(self.config.reward, components, task=problem.task, step=0).tolist()
            rewards.append(reward)
        return rewards

    def accuracy(self, version: int, model: Any) -> float:
        """Held-out accuracy, as our evaluator measures it."""
        weights = {name: tensor.detach() for name, tensor in model.named_parameters()}
        self.evaluation.engine.load_weights(version, weights)
        metrics, _ = self.evaluation.run()
        return metrics["eval/accuracy"]


def clock_of(updates: int, every: int, target: float, accuracy: Any) -> Any:
    """A TrainerCallback: ``seconds`` [step] since the first generation without evaluations, ``accuracy`` by version."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.seconds: list[float] = [0.0]
            self.accuracy: dict[int, float] = {}

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if every:
                self.accuracy[0] = accuracy(0, model)
            self.began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if state.global_step % updates:
                return
            now = time.perf_counter()
            self.seconds.append(now - self.began)
            step = state.global_step // updates
            if every and step % every == 0:
                self.accuracy[step] = accuracy(step, model)
                control.should_training_stop = self.accuracy[step] >= target
            self.began += time.perf_counter() - now

    return Clock()


def reached(accuracy: dict[int, float], seconds: Sequence[float], target: float) -> tuple[float, int, bool]:
    """Seconds to the first measured version that has the target, that version, and whether there is one."""
    for version in sorted(accuracy):
        if accuracy[version] >= target:
            return seconds[version], version, True
    return seconds[-1], len(seconds) - 1, False


def ours(run: Run, steps: int, target: float) -> Measured:
    """What the asynchronous run reached."""
    rows = run.rows()
    seconds = [0.0]
    for row in rows[1:]:
        seconds.append(seconds[-1] + row["time/step_seconds"])
    accuracy = {row["step"]: row["eval/accuracy"] for row in rows if "eval/accuracy" in row}
    took, version, there = reached(accuracy, seconds, target)
    samples = run.config.batch.groups * run.config.batch.group_size
    first, last = WARM, steps - TAIL
    return {
        "seconds": took, "version": version, "reached": there, "accuracy": accuracy,
        "samples_per_second": samples * (last - first) / run.seconds(first, last),
        "learner_busy": run.mean("time/learner_busy", first, last),
        "evaluator_busy": run.mean("time/evaluator_busy", first, last),
        "length": run.mean("length/mean", first, last),
    }  # fmt: skip


def theirs(found: Measured, samples: int, target: float) -> Measured:
    """What TRL reached."""
    seconds = found["seconds"]
    took, version, there = reached(found["accuracy"], seconds, target)
    rate = samples * (len(seconds) - 1 - WARM) / (seconds[-1] - seconds[WARM])
    return {
        "seconds": took,
        "version": version,
        "reached": there,
        "accuracy": found["accuracy"],
        "samples_per_second": rate,
    }


def fastest(reference: Run, both: set[int]) -> tuple[Arm, int, tuple[str, str | None], dict[str, float]]:
    """TRL's best settings, by samples per second in short trainings, and all the rates."""
    config, trial = reference.config, WARM + 5
    samples = config.batch.groups * config.batch.group_size
    rates: dict[str, float] = {}

    def rate(arm: Arm, threads: int, setting: tuple[str, str | None]) -> float:
        name = f"{threads} threads, {setting[0]}, {setting[1] or 'dynamic'} cache"
        rates[name] = round(theirs(arm.measure(0, trial, *setting), samples, 2.0)["samples_per_second"], 1)
        say(f"TRL: {name}: {rates[name]} samples/s")
        return rates[name]

    arms = {threads: Arm(Trl, reference, threads, cores=both, threads=threads) for threads in (1, 2)}
    by_threads = {threads: rate(arm, threads, SETTINGS[0]) for threads, arm in arms.items()}
    threads = max(by_threads, key=by_threads.__getitem__)
    arms.pop(3 - threads).close()
    by_setting = {SETTINGS[0]: by_threads[threads]}
    by_setting |= {setting: rate(arms[threads], threads, setting) for setting in SETTINGS[1:]}
    return arms[threads], threads, max(by_setting, key=by_setting.__getitem__), rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="seeds")
    parser.add_argument("--target", type=float, default=0.9, help="held-out accuracy")
    parser.add_argument(
        "--steps", type=int, default=60, help="learner steps of a run, at most (TRL stops at the target)"
    )
    parser.add_argument("--every", type=int, default=5, help="learner steps between two measurements of accuracy")
    parser.add_argument("keys", nargs="*", help="keys of the run, as launch.py takes them")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vs-trl-") as folder:
        print(json.dumps(report(Path(folder), args)))


def report(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """All runs, seed by seed; the order turns round in every second one."""
    about, (one, other) = machine(), cores()
    overrides = [f"eval.every={args.every}", *args.keys]
    say("a short run first (makes the start model if the cache has none)")
    reference = launch(folder, "reference", [*overrides, "learner.steps=2"])
    samples = reference.config.batch.groups * reference.config.batch.group_size
    trl, threads, setting, rates = fastest(reference, {one, other})
    repeats: list[dict[str, Measured]] = []
    for seed in range(args.repeats):
        found: dict[str, Measured] = {}
        for name in ("ours", "trl") if seed % 2 == 0 else ("trl", "ours"):
            if name == "trl":
                found[name] = theirs(
                    trl.measure(seed, args.steps, *setting, args.every, args.target), samples, args.target
                )
            else:
                run = launch(folder, f"run-{seed}", [*overrides, f"learner.steps={args.steps}", f"run.seed={seed}"])
                found[name] = ours(run, args.steps, args.target)
                found["alone"] = alone(run, args.steps, one)
                found["beside"] = alone(run, args.steps, one, other)
                run.remove()
            say(f"seed {seed}: {name} {found[name]}")
        repeats.append(found)
    return summary(repeats) | {
        "target": args.target, "trl_settings": {"threads": threads, "attention": setting[0], "cache": setting[1]},
        "trl_trials_samples_per_second": rates,
        "settings": {"repeats": args.repeats, "overrides": overrides, "recipe": recipe(reference.config), **about},
    }  # fmt: skip


def alone(run: Run, steps: int, core: int, other: int | None = None) -> Measured:
    """Training alone on the run's batches at hand, on one pinned core; with ``other``, the same there meanwhile."""
    pinned = [core] if other is None else [core, other]
    channel = Path("/dev/shm")
    arms = [
        Arm(Training, run, WARM, steps - TAIL, channel / f"vs-trl-{os.getpid()}-{one}", cores={one}) for one in pinned
    ]
    found: Measured
    with ThreadPoolExecutor(len(arms)) as pool:
        found, *_ = pool.map(lambda arm: arm.measure(), arms)
    for arm in arms:
        arm.close()
    return found | {"samples_per_second": found["samples"] / found["seconds"]}


def recipe(config: Config) -> dict[str, Any]:
    """What both were told to do."""
    return {
        "B": config.batch.groups, "G": config.batch.group_size, "K": config.learner.minibatches,
        "lr": config.learner.optim.lr, "max_new_tokens": config.sampling.max_new_tokens, "task": config.task.name,
        "staleness.max": config.staleness.max, "eval.prompts": config.eval.prompts,
    }  # fmt: skip


def summary(repeats: Sequence[dict[str, Measured]]) -> dict[str, Any]:
    """Medians over seeds of the ratios within each."""

    def ratios(name: str, above: str, below: str) -> list[float]:
        return [found[above][name] / found[below][name] for found in repeats]

    times = ratios("seconds", "trl", "ours")
    speeds = ratios("samples_per_second", "ours", "trl")
    shares = ratios("samples_per_second", "ours", "alone")
    beside = ratios("samples_per_second", "ours", "beside")
    result: dict[str, Any] = {"benchmark": "vs_trl"}
    for name, values in (
        ("time_to_accuracy_ratio", times),
        ("samples_per_second_ratio", speeds),
        ("ceiling_share", shares),
        ("ceiling_share_beside", beside),
    ):
        result |= {name: round(statistics.median(values), 3), f"{name}s": [round(v, 3) for v in values]}
    for name in ("ours", "trl"):
        result[name] = {
            "seconds_to_target": [round(found[name]["seconds"], 2) for found in repeats],
            "steps_to_target": [found[name]["version"] for found in repeats],
            "reached": [found[name]["reached"] for found in repeats],
            "samples_per_second": [round(found[name]["samples_per_second"], 1) for found in repeats],
            "accuracy": [{v: round(a, 3) for v, a in found[name]["accuracy"].items()} for found in repeats],
        }
    for name in ("alone", "beside"):
        result[f"{name}_samples_per_second"] = [round(found[name]["samples_per_second"], 1) for found in repeats]
    return result


if __name__ == "__main__":
    main()
