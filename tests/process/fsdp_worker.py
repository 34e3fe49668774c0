"""One rank of test_fsdp.py: train batches from a file, from a model or a checkpoint, and leave what came of it.

python fsdp_worker.py JOBS.json        with RANK, WORLD_SIZE, … set; each job is run in turn
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from offtrail.algos.config import AlgoConfig, CriticConfig, GrpoConfig, PpoConfig
from offtrail.algos.correction_config import TisConfig
from offtrail.core.types import Batch
from offtrail.platform.config.head_config import PrmConfig, RewardModelConfig
from offtrail.platform.config.schema import Config, LoraConfig, OptimConfig, SftConfig
from offtrail.platform.learner import checkpoint, held_out
from offtrail.platform.learner.checkpoint import TrainerState
from offtrail.platform.learner.data import make_examples
from offtrail.platform.learner.labelled import Labelled
from offtrail.platform.learner.make import load_trained, make_sft_trainer
from offtrail.platform.learner.role import layer_classes, make_job_trainer
from offtrail.platform.learner.train import Trainer
from offtrail.platform.learner.world import World, join
from offtrail.platform.model.text import Text
from offtrail.platform.runtime.activity import Activity
from offtrail.platform.wire.groups import unpack_group


def algorithm(name: str) -> AlgoConfig:
    """GRPO with a KL term, with an exact one, or PPO with every quantity that is made of all ranks' scores."""
    if name == "ppo":
        critic = CriticConfig(lr=1e-3, warmup_updates=3)
        return PpoConfig(kl="k1", kl_in="reward", kl_coef=0.01, ref_refresh=4, gae_lambda=0.9, critic=critic)
    if name == "lora":
        return GrpoConfig(kl="full", kl_coef=0.01, ref_refresh=4)
    if name == "full":
        return GrpoConfig(kl="full", kl_coef=0.01, entropy_coef=0.01)
    return GrpoConfig(kl="k3", kl_coef=0.01)


def config_of(ranks: int, name: str = "grpo", path: str = "") -> Config:
    """With TIS, two updates a step, micro-batches of a few samples; with an exact KL, sharded layers run twice."""
    config = Config(algo=algorithm(name), correction=TisConfig(normalise=name == "ppo"))
    config.learner.activation_checkpointing = name in ("full", "sft") and ranks > 1
    config.sft = SftConfig(steps=8, batch_size=8, lr=1e-3, warmup_steps=2)
    config.learner.ranks, config.learner.tokens_per_microbatch = ranks, 60
    config.learner.optim = OptimConfig(lr=1e-3, warmup_updates=3)
    config.learner.lora = LoraConfig(rank=4 if name == "lora" else 0, alpha=8.0)
    learned = {"lr": 1e-3, "steps": 8, "batch_size": 4, "warmup_steps": 2, "held_out_share": 0.4}
    if name == "reward_model":
        config.job, config.reward_model = name, RewardModelConfig(path=path, **learned)
    elif name in ("prm", "implicit"):
        objective: Literal["steps", "implicit"] = "implicit" if name == "implicit" else "steps"
        config.job, config.prm = "prm", PrmConfig(path=path, objective=objective, **learned)
    return config


def run(world: World, model: Any, job: dict[str, Any]) -> None:
    """Train ``job["steps"]`` from ``job["origin"]``, with a checkpoint in ``job["out"]`` at step ``job["save"]``."""
    origin, out = Path(job["origin"]), Path(job["out"])
    start, config = Path(job["start"]), config_of(world.size, job["algo"], job.get("labels", ""))
    activity, text = Activity(), Text(start)
    examples = make_examples(config, text)
    trainer: Trainer[Any] = (
        make_sft_trainer(config, world, model, activity)
        if job["algo"] == "sft"
        else make_job_trainer(config, world, model, start, activity)
    )
    if (origin / "trainer.json").is_file():
        checkpoint.restore(origin, trainer)
    sharded = [isinstance(p, DTensor) for p in trainer.module.parameters()]
    metrics: dict[str, float] = {}
    for step in job["steps"]:
        own = job["algo"] == "sft" or config.head is not None
        batch = examples.table(step) if own else read_batch(Path(job["batches"]), step)
        metrics = trainer.step(step, batch).metrics
        if step + 1 == job.get("save"):
            state = TrainerState.of(step + 1, trainer)
            checkpoint.save(out, world, state, model, text, trainer, {}, config.learner.lora)
    local = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in trainer.module.parameters())
    if isinstance(examples, Labelled):
        metrics = metrics | held_out.scores(config, trainer, examples.held)
    parameters = checkpoint.gather(trainer.module)
    if "value" in trainer.trained:
        critic = trainer.trained["value"].module
        parameters |= {f"critic.{name}": value for name, value in checkpoint.gather(critic).items()}
        sharded += [isinstance(p, DTensor) for p in critic.parameters()]
    told = {
        "dtensor": all(sharded),
        "plain": not any(sharded),
        "local": local,
        "size": sum(p.numel() for p in trainer.module.parameters()),
        "metrics": metrics,
        "compute": activity.snapshot().compute,
    }
    (out / f"rank_{world.rank}.json").write_text(json.dumps(told))
    if world.main:
        save_file({k: v.contiguous() for k, v in parameters.items()}, out / "parameters.safetensors")


def read_batch(folder: Path, step: int) -> Batch:
    """The groups that the test has packed."""
    groups = msgspec.msgpack.decode((folder / str(step)).read_bytes(), type=list[bytes])
    return Batch(step, tuple(unpack_group(g) for g in groups))


def main(jobs: list[dict[str, Any]]) -> None:
    """Join once, run every job."""
    world = None
    for job in jobs:
        origin, ranks = Path(job["origin"]), int(job["ranks"])
        begun = origin if (origin / "trainer.json").is_file() else None
        model = load_trained(config_of(ranks, job["algo"], job.get("labels", "")), begun, Path(job["start"]))
        if world is None:
            world = join(config_of(ranks).learner, layer_classes(model), deadline_s=240.0)
            check_broadcast(world)
        run(world, model, job)
    assert world is not None
    world.close()


def check_broadcast(world: World) -> None:
    """Bytes of rank 0, none too, reach all ranks as they were."""
    for blob in (b"", b"w", bytes(range(256)) * 500):
        assert bytes(world.broadcast(blob if world.main else b"ignored")) == blob


if __name__ == "__main__":
    warnings.simplefilter("error")
    # of SWIG's types (pyproject.toml): as an error it crashes Python when that ends
    warnings.filterwarnings("ignore", "builtin type")
    torch.set_num_threads(1)
    main(json.loads(Path(sys.argv[1]).read_text()))
    sys.exit()
