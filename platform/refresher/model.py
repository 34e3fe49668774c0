"""The model that the refresher trains: the learner's own head trainer on labels of the policy, and its versions.

    Refreshed.open ── newest version in runs/NAME/scorers/MODEL, or its folder (0) ──► measure ⇄ train ──► keep, publish

What a version of the model needs is what a checkpoint of job=prm or job=reward_model holds, written by the same code:
it opens as a model, and the next process goes on with its optimizer. Invariant: a version is kept before it is out.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from offtrail.platform.config.schema import Config
from offtrail.platform.learner import checkpoint, held_out
from offtrail.platform.learner.checkpoint import TrainerState
from offtrail.platform.learner.labelled import batch_of, drawn
from offtrail.platform.learner.make import load_trained, make_head_trainer
from offtrail.platform.learner.train import Trainer
from offtrail.platform.learner.world import World
from offtrail.platform.model.scoring import Scoring
from offtrail.platform.model.text import Text
from offtrail.platform.refresher.labels import Labelled
from offtrail.platform.runtime.activity import Activity
from offtrail.platform.runtime.context import (
    RoleContext,
    newest_score_model,
    reuses_files,
    score_models_folder,
    score_weights_folder,
)
from offtrail.platform.weights.store import Publisher

log = logging.getLogger("offtrail.refresher")


def head_config(config: Config, scoring: Scoring) -> Config:
    """The run's configuration as the job has it that trains such a model: one process, on scorer.refresh's device."""
    refresh, spec = config.scorer.refresh, scoring.spec
    same: dict[str, Any] = {
        "lr": refresh.lr, "betas": refresh.betas, "batch_size": refresh.batch_size, "seed": config.run.seed,
        "warmup_steps": 0, "final_lr_share": 1.0,
    }  # fmt: skip
    settings = config.learner
    learner = replace(
        settings, device=refresh.device, threads=refresh.threads, ranks=1, lora=replace(settings.lora, rank=0)
    )
    told = replace(config, learner=learner, model=replace(config.model, path=str(scoring.folder)))
    if spec.reads == "outcome" and not spec.beta:
        same["objective"] = "pairwise" if spec.squash == "none" else "pointwise"
        return replace(told, job="reward_model", reward_model=replace(told.reward_model, **same))
    if spec.beta:
        same |= {"objective": "implicit", "beta": spec.beta, "reference": spec.reference}
    else:
        same |= {"objective": "steps", "reference": ""}
    return replace(told, job="prm", prm=replace(told.prm, **same))


@dataclass
class Refreshed:
    """``version``: the newest one, which is kept and out; 0 is the model's own folder."""

    context: RoleContext
    scoring: Scoring
    config: Config
    activity: Activity
    trainer: Trainer[Any]
    model: Any
    text: Text
    publisher: Publisher | None
    version: int

    @classmethod
    def open(cls, context: RoleContext, scoring: Scoring, activity: Activity) -> Refreshed:
        """Raises ConfigError, ValueError, ModelError or CheckpointError where the model, or its newest version, cannot
        be trained or kept.
        """
        folder, refresh = score_models_folder(context.run_dir, scoring.name), context.config.scorer.refresh
        config = head_config(context.config, scoring)
        torch.set_num_threads(refresh.threads)
        version, kept = newest_score_model(context.run_dir, scoring.name)
        model = load_trained(config, kept, scoring.folder)
        world = World(0, 1, torch.device(refresh.device))
        trainer = make_head_trainer(config, world, model, scoring.folder, activity)
        trainer.scores, trainer.main.lr_key = scoring.spec, "scorer.refresh.lr"
        if kept is not None:
            checkpoint.restore(kept, trainer)
        text, publisher = Text(scoring.folder), None
        if refresh.updates:
            folder.mkdir(parents=True, exist_ok=True)
            checkpoint.rehearse(folder, model, text, trainer)
            # Before the folder in it is made, or it would be open to others.
            context.weights_folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            channel = score_weights_folder(context.config, context.run_dir, scoring.name)
            publisher = Publisher(channel, reuse=reuses_files(context.config))
        made = cls(context, scoring, config, activity, trainer, model, text, publisher, version)
        made._publish()
        return made

    def measure(self, labelled: Labelled, seen: int) -> None:
        """scores/MODEL/…: the version that is out, on labels that it has not seen, of answers up to a learner step."""
        found = held_out.scores(self.config, self.trainer, labelled.items) if labelled.items else {}
        short = {key.removeprefix("eval/").removeprefix("outcome_"): value for key, value in found.items()}
        self.activity.forget_gauges(self._area)
        self._tell(
            **short,
            version=self.version,
            measured_version=self.version,
            policy_version=seen,
            answers=labelled.answers,
            label_share=labelled.used / max(1, labelled.answers),
            good_share=labelled.good_share,
        )

    def train(self, labelled: Labelled, version: int, look: Callable[[], None]) -> None:
        """scorer.refresh.updates updates on the labels make ``version``. What ``look`` raises between two of them ends
        it, and leaves no version.
        """
        head, items, losses = self.config.head, labelled.items, list[float]()
        assert head is not None
        batch, size = batch_of(self.config), min(head.batch_size, len(items))
        for update in range(self.context.config.scorer.refresh.updates):
            look()
            places = drawn(len(items), size, update, head.seed + version)
            report = self.trainer.step(self.trainer.main.updates, batch([items[place] for place in places]))
            losses += [value for key, value in report.metrics.items() if key.startswith("loss/")]
        self.version = version
        self._keep()
        self._publish()
        self._tell(loss=sum(losses) / len(losses))
        log.info("%s: version %d, of %d labelled answers", self.scoring.name, version, labelled.used)

    def _keep(self) -> None:
        folder = score_models_folder(self.context.run_dir, self.scoring.name)
        with self.activity.busy("checkpoint"):
            state = TrainerState.of(self.version, self.trainer)
            checkpoint.save(folder, self.trainer.world, state, self.model, self.text, self.trainer, {})
            checkpoint.prune(folder, self.version, self.context.config.scorer.refresh.keep)

    def _publish(self) -> None:
        if self.publisher is not None and self.version:
            with self.activity.busy("publish"):
                self.publisher.publish(self.version, checkpoint.gather(self.trainer.module))
        self._tell(version=self.version)

    @property
    def _area(self) -> str:
        return f"scores/{self.scoring.name}/"

    def _tell(self, **values: float) -> None:
        """For TensorBoard, with the next heartbeat."""
        for name, value in values.items():
            if not math.isnan(value):
                self.activity.gauge(f"{self._area}{name}", float(value))

    def close(self) -> None:
        """Let go of the channel; the launcher removes it."""
        if self.publisher is not None:
            self.publisher.close()
