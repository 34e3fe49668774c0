"""The learner role of every training job: batches in, versions out. One process a rank; rank 0 talks to the broker and
publishes.

    broker ── batch k ──► train (K updates) ──► publish version k+1 ──► commit ──► checkpoint, now and then

The loop consumes batches in their durable order; it is unblocked by the broker (a batch is whole) and unblocks
generators and evaluator (a version is out). The broker says which step was the last one, and which versions are to be
kept for the evaluator. After the last step it waits for the broker's stop, because a run is complete only when its last
version is checkpointed and scored.

A job without generators (job=sft, reward_model, prm) has data of its own (data.py), which the broker's empty batches
pace, and nobody reads its versions: what is committed of them is the checksum, where a checkpoint is due. A model that
scores is measured on held-out answers at its start and before each of its checkpoints (held_out.py).

Invariants: a version is published before it is committed, so that whoever hears of it can read it; nothing is published
of a step that failed; a restart is the checkpoint plus a replay of the batches logged after it (I1).
"""

from __future__ import annotations

import contextlib
import logging
import resource
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from offtrail.core.types import Batch
from offtrail.platform.config.schema import Config, LocalConfig
from offtrail.platform.engines.channels import Channel, open_channel
from offtrail.platform.learner import checkpoint, held_out
from offtrail.platform.learner.checkpoint import TrainerState
from offtrail.platform.learner.data import LocalSource, make_examples
from offtrail.platform.learner.labelled import Labelled
from offtrail.platform.learner.make import load_trained, make_head_trainer, make_sft_trainer, make_trainer
from offtrail.platform.learner.objectives import StalenessError, rows_of_pairs
from offtrail.platform.learner.report import batch_histograms, batch_metrics, sample_texts
from offtrail.platform.learner.sources import BrokerSource
from offtrail.platform.learner.train import DivergedError, Report, Trainer
from offtrail.platform.learner.world import World, join
from offtrail.platform.model.check import ModelError
from offtrail.platform.model.packing import lay_out
from offtrail.platform.model.text import Text
from offtrail.platform.model.tiny import save_start
from offtrail.platform.runtime.activity import Activity
from offtrail.platform.runtime.context import Connection, RoleContext
from offtrail.platform.runtime.roles import JOBS
from offtrail.platform.scorer.proxies import proxy_metrics
from offtrail.platform.weights.probe import probe_text
from offtrail.platform.weights.store import checksum as checksum_of
from offtrail.platform.wire.messages import Checkpointed, Commit, Committed, HeldOut
from offtrail.platform.wire.sockets import RefusedError, WaitError
from offtrail.tasks.templates import task_template

log = logging.getLogger("offtrail.learner")

FAULTS_OF_A_BATCH = (ArithmeticError, DivergedError, IndexError, StalenessError, ValueError)
"""What a batch can raise in training. Not among them: a full memory, a disk, a network, a GPU; nor what a bug raises,
such as a plug-in's KeyError: it comes with every batch, and each launch would refuse another one that is sound.
"""


class BatchError(RuntimeError):
    """A batch cannot be trained. ``batch``: its step, which the broker is told (process.py)."""

    def __init__(self, batch: int, error: Exception) -> None:
        self.batch = batch
        super().__init__(
            f"batch {batch} cannot be trained ({type(error).__name__}: {error}); run.resume=true goes on without it, "
            "and tries it again where a setting that decides numbers is changed"
        )


def main(context: RoleContext) -> None:
    """Run until the broker says stop."""
    learner = Learner.open(context)
    log.info("loaded")
    try:
        learner.publish_start()
        log.info("version %d is out", learner.step)
        while (batch := learner.source.next(learner.step)) is not None:
            report = learner.train(batch)
            learner.publish(batch, report)
            learner.checkpoint_if_due()
        if learner.source.finished:
            learner.finish()
            learner.wait_for_stop()
    finally:
        learner.close()


@dataclass
class Learner:
    """State of one rank; each public method is one verb of the loop. ``step``: learner steps done = newest version.

    ``saved``: the version of the newest checkpoint. ``committed``: the newest commit, rank 0's. ``evaluate``: the next
    version to be published is due for evaluation, as rank 0 was told; ``spared``: versions whose checkpoints still wait
    for the evaluator. ``pinned_bytes``: what its pin keeps.
    """

    context: RoleContext
    connection: Connection
    world: World
    trainer: Trainer[Any]
    source: BrokerSource | LocalSource
    model: Any
    text: Text
    publisher: Channel | None
    """Rank 0's, where anybody reads versions."""
    step: int
    saved: int
    evaluate: bool
    spared: Sequence[int] = ()
    committed: Commit | None = None
    publish_seconds: float = 0.0
    pinned_bytes: int = 0
    unacknowledged: tuple[int, int] | None = None
    """Version and ticket of a commit whose acknowledgement is still to come: nothing more is published before it."""

    @classmethod
    def open(cls, context: RoleContext) -> Learner:
        """Connect, restore the checkpoint that the broker names (0: the start model), shard, open the weight
        channel.
        """
        config = context.config
        connection = context.connect()
        step = connection.welcome.step
        start = start_model(config, context.run_dir)
        origin = checkpoint.path_of(context.run_dir, step) if step else None
        with connection.activity.busy("load"):
            model = load_trained(config, origin, start)
            world = join(config.learner, layer_classes(model), deadline_s=config.broker.deadline_seconds)
            trainer = make_job_trainer(config, world, model, start, connection.activity)
            if origin is not None:
                checkpoint.restore(origin, trainer)
            asks = {} if config.head is not None else {"task_template": task_template(config.task)}
            text = Text(start, config.prompt, **asks)
            if world.main:
                checkpoint.rehearse(context.run_dir, model, text, trainer)
        publisher = None
        if world.main and has_readers(config):
            publisher = open_channel(config, context.weights_folder, context.run_dir, versions_kept(config))
        late = publisher.serve_late_readers if publisher is not None else None
        source = BrokerSource(connection, world, config.broker.deadline_seconds, late)
        return cls(
            context=context,
            connection=connection,
            world=world,
            trainer=trainer,
            source=LocalSource(source, make_examples(config, text)) if config.supervised else source,
            model=model,
            text=text,
            publisher=publisher,
            step=step,
            saved=step,
            evaluate=connection.welcome.evaluate,
        )

    def publish_start(self) -> None:
        """Publish the version to start from; in exact mode, after a restart, first those that its leases still name."""
        if self.step and self.publisher is not None and self.context.config.staleness.mode == "exact":
            for version, tensors in checkpoint.read_window(checkpoint.path_of(self.context.run_dir, self.step)).items():
                self.publisher.publish(version, tensors)
        checksum = self._publish()
        self._commit(Commit(step=-1, version=self.step, checksum=checksum, pinned_bytes=self.pinned_bytes))
        if not self.step:
            self._measure()

    def train(self, batch: Any) -> Report:
        """One step. Raises BatchError where it fails for what the broker's batch holds; the next launch goes on without
        it.
        """
        try:
            return self.trainer.step(self.step, batch)
        except FAULTS_OF_A_BATCH as error:
            if not isinstance(batch, Batch):  # the learner's own data: nobody could hand it others
                raise
            raise BatchError(self.step, error) from error

    def publish(self, batch: Any, report: Report) -> None:
        """Publish the new version, then commit the batch with its metrics. The acknowledgement comes while the next
        batch trains.
        """
        self._settle()
        self.step += 1
        checksum = self._publish()
        if not self.world.main:
            return
        metrics, histograms, texts = dict(report.metrics), dict(report.histograms), {}
        metrics["memory/learner_peak_bytes"] = float(peak_memory(self.world.device))
        if isinstance(batch, Batch):
            metrics |= batch_metrics(batch, self.context.config.reward, self.text.vocabulary)
            metrics |= proxy_metrics(batch.groups, self.context.config)
            histograms |= batch_histograms(batch)
            shown = 0 if batch.replay else self.context.config.tracking.sample_texts
            texts = sample_texts(batch, self.text.tokenizer.decode, shown)
        if self.publisher is not None:
            metrics["weights/publish_seconds"] = self.publish_seconds
            metrics["weights/bytes"] = float(self.publisher.bytes_last)
            metrics["weights/delta_share"] = self.publisher.delta_share
        self._commit(
            Commit(
                step=self.step - 1,
                version=self.step,
                checksum=checksum,
                pinned_bytes=self.pinned_bytes,
                metrics=metrics,
                histograms=histograms,
                texts=texts,
                tokens=report.tokens,
            )
        )

    def checkpoint_if_due(self) -> None:
        """Every learner.checkpoint_every steps."""
        if self.step % self.context.config.learner.checkpoint_every == 0:
            self.checkpoint()

    def checkpoint(self) -> None:
        """Write one of this version, tell the broker, let old ones go."""
        self.saved = self.step
        self._measure()
        with self.connection.activity.busy("checkpoint"):
            state = TrainerState.of(self.step, self.trainer)
            path = checkpoint.save(
                self.context.run_dir, self.world, state, self.model, self.text, self.trainer, self._window(),
                self.context.config.learner.lora,
            )  # fmt: skip
        if path is not None:
            self._settle()
            ticket = self.connection.client.send(Checkpointed(step=self.step, path=str(path)))
            self._reply(ticket, "an acknowledged checkpoint")
            keep = self.context.config.learner.keep_checkpoints
            checkpoint.prune(self.context.run_dir, self.step, keep, self.spared)

    def finish(self) -> None:
        """The newest version is the last one: keep it for the evaluator, and write its checkpoint, if not done yet."""
        self._settle()
        if self.publisher is not None and self.committed is not None and not self.committed.pinned_bytes:
            kept, checksum = self.publisher.pin(self.step), self.committed.checksum
            self._commit(Commit(step=self.step - 1, version=self.step, checksum=checksum, pinned_bytes=kept))
            self._settle()
        if self.saved != self.step:
            self.checkpoint()

    def _measure(self) -> None:
        """Tell the broker what this version is worth on held-out answers, where the job has some (a collective)."""
        examples = self.source.examples if isinstance(self.source, LocalSource) else None
        if not isinstance(examples, Labelled) or not examples.held:
            return
        metrics = held_out.scores(self.context.config, self.trainer, examples.held)
        if self.world.main:
            self._settle()
            ticket = self.connection.client.send(HeldOut(version=self.step, metrics=metrics))
            self._reply(ticket, f"acknowledged scores of version {self.step}")

    def _checkpoint_is_due(self) -> bool:
        """By the schedule, or because it should be the last version."""
        config = self.context.config
        return self.step % config.learner.checkpoint_every == 0 or self.step == config.steps

    def wait_for_stop(self) -> None:
        """Stay until the run is over. Raises WaitError (I4) when the broker falls silent."""
        heartbeat, deadline = self.connection.heartbeat, self.context.config.broker.deadline_seconds
        with self.connection.activity.waiting("stop", on="evaluator"):
            while not heartbeat.stop:
                if heartbeat.lost > deadline:
                    raise WaitError.passed("the end of the run", "the broker", time.time() - heartbeat.lost, deadline)
                if self.publisher is not None:
                    self.publisher.serve_late_readers()
                time.sleep(0.05)

    def close(self) -> None:
        """Leave the world and the broker; the launcher removes the weight channel."""
        with contextlib.suppress(WaitError, RefusedError):  # after a failure: what was published should be known
            self._settle(1.0)
        if self.publisher is not None:
            self.publisher.close()
        self.connection.close()
        self.world.close()

    def _publish(self) -> str:
        """Gather (a collective) and write the version, pinned where it is to be scored; its checksum on rank 0. Without
        readers only the checksum, where a checkpoint is due: "" elsewhere.
        """
        readers = has_readers(self.context.config)
        if not readers and not self._checkpoint_is_due():
            return ""
        gather = checkpoint.gather_adapters if self.context.config.publishes_adapters else checkpoint.gather
        with self.connection.activity.busy("publish"):
            probe = self._probe() if readers else []
            tensors = gather(self.trainer.module)
            if self.publisher is None:
                return checksum_of(tensors) if self.world.main else ""
            started = time.monotonic()
            checksum = self.publisher.publish(self.step, tensors, probe)
            self.pinned_bytes = self.publisher.pin(self.step) if self.evaluate else 0
            self.publish_seconds = time.monotonic() - started
        return checksum

    def _probe(self) -> list[float]:
        """Log-probabilities of the fixed text where this version carries them (I5); a forward of all ranks."""
        every, vocabulary = self.context.config.weights.probe_every, int(self.model.config.vocab_size)
        if not every or self.step % every:
            return []
        prompt, output = probe_text(vocabulary)
        packed = lay_out(rows_of_pairs([prompt], [output]), [0]).to(self.world.device)
        with torch.no_grad():
            logprobs, _ = self.trainer.module(packed)
        return [float(value) for value in logprobs]

    def _commit(self, commit: Commit) -> None:
        if self.world.main:
            self.committed = commit
            self.unacknowledged = commit.version, self.connection.client.send(commit)

    def _settle(self, deadline_s: float | None = None) -> None:
        """Wait for the acknowledgement of the last commit, if it is still to come."""
        if self.unacknowledged is None:
            return
        version, ticket = self.unacknowledged
        self.unacknowledged = None
        reply = self._reply(ticket, f"an acknowledged commit of version {version}", deadline_s)
        assert isinstance(reply, Committed)
        self.evaluate, self.spared = reply.evaluate, reply.spared
        if reply.diverged:
            log.warning("version %d differs from the one logged before the restart: lineage %d", version, reply.lineage)

    def _reply(self, ticket: int, what: str, deadline_s: float | None = None) -> Any:
        deadline_s = deadline_s or self.context.config.broker.deadline_seconds
        with self.connection.activity.waiting("commit", on="broker"):
            return self.connection.client.wait(ticket, what=what, deadline_s=deadline_s)[0]

    def _window(self) -> dict[int, Path]:
        """Exact mode: the published files of the last η versions, which leases may still name after a restart."""
        staleness, folder = self.context.config.staleness, self.context.weights_folder
        if staleness.mode != "exact" or not self.world.main:
            return {}
        versions = range(max(0, self.step - staleness.max), self.step)
        files = {v: folder / f"v{v:08d}.safetensors" for v in versions}
        return {v: file for v, file in files.items() if file.is_file()}


def start_model(config: Config, run_dir: Path) -> Path:
    """The Hugging Face directory that version 0 comes from: runs/NAME/start, or model.path where there is none.

    A job that learns from examples, without a model.path, begins from random weights, which the first of its ranks to
    come makes.
    """
    link = run_dir / "start"
    if link.exists() or config.model.path:
        return link if link.exists() else Path(config.model.path)
    with tempfile.TemporaryDirectory(dir=run_dir, prefix=".start-") as scratch:
        save_start(Path(scratch) / "start", config.model, config.seed)
        with contextlib.suppress(OSError):  # another rank was first, and has made the same
            (Path(scratch) / "start").rename(link)
    return link


def make_job_trainer(config: Config, world: World, model: Any, start: Path, activity: Activity) -> Trainer[Any]:
    """The trainer of the configuration's job."""
    if config.head is not None:
        return make_head_trainer(config, world, model, start, activity)
    if config.job == "sft":
        return make_sft_trainer(config, world, model, activity)
    return make_trainer(config, world, model, start, activity)


def has_readers(config: Config) -> bool:
    """Whether anybody applies the versions that are published."""
    return "generator" in JOBS[config.job]


def layer_classes(model: Any) -> set[str]:
    """Class names of the decoder's layers, FSDP2's units. Raises ModelError where it does not say which they are."""
    layers = getattr(model.base_model, "layers", None)
    if layers is None:
        raise ModelError(
            f"model.path={model.name_or_path}: {type(model).__name__} has no list of layers under this name, which the "
            "learner shards and checkpoints by; take a model of another architecture"
        )
    return {type(layer).__name__ for layer in layers}


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held so far: allocated by torch on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def versions_kept(config: Config) -> int:
    """Published versions that stay readable: in exact mode a lease may name one η versions old. A local engine reads
    the newest by its next turn, or takes the one after it; a server may still load one when the next is out.
    """
    if config.staleness.mode == "exact":
        return config.staleness.max + 2
    return 1 if isinstance(config.engine, LocalConfig) else 2
