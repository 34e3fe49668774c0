"""Supervised fine-tuning on the task's worked answers: job=sft, and the cold start of the small model.

    python -m offtrail.platform.learner.sft CONFIG.yaml OUT_DIR

trains the start model and writes a Hugging Face directory; each line of its standard output is one JSON object of
progress ({"step", "steps", "loss"}). The loop is train.py's, with traces as source and likelihood as objective.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from offtrail.platform.config.compose import load_config
from offtrail.platform.config.schema import Config
from offtrail.platform.learner.checkpoint import gather, write_model
from offtrail.platform.learner.make import make_sft_trainer
from offtrail.platform.learner.sources import TraceSource
from offtrail.platform.learner.train import Trainer
from offtrail.platform.learner.world import World
from offtrail.platform.model.packing import SampleTable
from offtrail.platform.model.policy import load_model
from offtrail.platform.model.start import resolve
from offtrail.platform.model.text import Text
from offtrail.platform.model.tiny import save_start
from offtrail.platform.runtime.activity import Activity
from offtrail.platform.runtime.device import require_device
from offtrail.tasks.jsonl import task_template
from offtrail.tasks.registry import make_task

SFT_SEED = 0x5F7
"""Of the data order, beside sft.seed: other problems than those that reinforcement learning begins with."""

Progress = Callable[[int, float], None]
"""Called after each update with the updates done and the loss in nats a token."""


def cold_start(config: Config, out_dir: Path, on_progress: Progress | None = None) -> dict[str, float]:
    """Train config.sft.steps updates from model.path, or from random weights, and write ``out_dir``, whole or not at
    all.

    Its seed is sft.seed, not run.seed: runs of job=rl with several seeds share one cold start.
    Returns the last step's metrics. Raises StartError, DivergedError, TaskError, ValueError where the
    device is not there, and FileExistsError where ``out_dir`` is not empty.
    """
    require_device("learner.device", config.learner.device)
    torch.set_num_threads(config.learner.threads)
    seed = config.sft.seed
    with tempfile.TemporaryDirectory() as scratch:
        start = resolve(config.model.path) if config.model.path else Path(scratch) / "start"
        if not config.model.path:
            save_start(start, config.model, seed)
        text = Text(start, config.prompt, task_template=task_template(config.task))
        model = load_model(start, device=config.learner.device)
    world = World(0, 1, torch.device(config.learner.device))
    trainer = make_sft_trainer(config, world, model, Activity())
    source = TraceSource(
        make_task(config.task, seed + SFT_SEED),
        text,
        batch_size=config.sft.batch_size,
        seed=seed,
        max_length=config.model.max_length,
    )
    metrics: dict[str, float] = {}
    for step in range(config.sft.steps):
        metrics = trainer.step(step, source.next(step)).metrics
        if on_progress is not None:
            on_progress(step + 1, metrics["loss/sft"])
    write(out_dir, model, text, trainer)
    return metrics


def write(out_dir: Path, model: Any, text: Text, trainer: Trainer[SampleTable]) -> None:
    """A Hugging Face directory under another name, then renamed to ``out_dir``."""
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}-", dir=out_dir.parent))
    try:
        write_model(temporary, model, text, gather(trainer.module))
        temporary.chmod(0o755)
        if out_dir.exists() and any(out_dir.iterdir()):
            raise FileExistsError(f"{out_dir} exists and is not empty")
        temporary.replace(out_dir)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def main(argv: list[str]) -> int:
    """The command of the file's head; the exit status."""
    config, out_dir = load_config(Path(argv[0])), Path(argv[1])

    def show(step: int, loss: float) -> None:
        print(json.dumps({"step": step, "steps": config.sft.steps, "loss": loss}), flush=True)

    cold_start(config, out_dir, show)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
