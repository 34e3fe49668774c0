"""The generator role: keeps its engine full and turns leases into acknowledged groups (parts in rollout.py).

The loop consumes leases and weight versions and yields groups; it is unblocked by the broker (leases) and by the
learner (versions), and waits only while the engine is empty.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from offtrail.core.protocols import Driver
from offtrail.core.types import Float32, Int32, Lease, Sampling
from offtrail.platform.config.schema import Config
from offtrail.platform.engines.channels import open_reader
from offtrail.platform.engines.make import make_engine
from offtrail.platform.generator.judges import Judges
from offtrail.platform.generator.rollout import Rollout
from offtrail.platform.model.text import Text
from offtrail.platform.runtime.context import Connection, RoleContext
from offtrail.platform.scorer.asking import open_scorers
from offtrail.platform.verifier.pool import VerifierPool
from offtrail.rewards.total import total
from offtrail.search.registry import make_driver

log = logging.getLogger("offtrail.generator")


def main(context: RoleContext) -> None:
    """Run until the broker says stop."""
    connection = context.connect()
    rollout = open_rollout(context, connection)
    log.info("loaded")
    try:
        while not rollout.stopping:
            rollout.take_replies()
            rollout.ask_for_leases()
            rollout.apply_weights()
            rollout.start_ready()
            if rollout.engine.unfinished:
                rollout.decode()
            else:
                rollout.wait()
            rollout.submit_judged()
            rollout.charge()
    finally:
        rollout.close()


def open_rollout(context: RoleContext, connection: Connection) -> Rollout:
    """Engine, tokenizer, verifiers and weight channel of one generator."""
    config = context.config
    text = Text(context.start_model, config.prompt)
    name = f"{context.role}-{context.index}"

    def encode(lease: Lease) -> Int32:
        return text.encode(lease.problem)

    def step_of(slot: int) -> int:
        # A slot belongs to one batch; in completion order (on_violation=drop) to the one it is likely to enter.
        return slot // config.batch.groups

    def driver(lease: Lease) -> Driver:
        sampling = training_sampling(config, text.stop_token_ids, step_of(lease.slot))
        return make_driver(config.search, lease, sampling, name)

    def rewards(components: Mapping[str, Float32], task: str, slot: int) -> Float32:
        return total(config.reward, components, task=task, step=step_of(slot))

    return Rollout(
        config=config,
        connection=connection,
        engine=make_engine(context),
        weights=open_reader(config, context.weights_folder),
        judges=Judges(VerifierPool(config), open_scorers(context, connection, text), text.answer_text, rewards),
        make_driver=driver,
        encode=encode,
    )


def training_sampling(config: Config, stop_token_ids: tuple[int, ...], step: int) -> Sampling:
    """How the samples of a learner step's batch are drawn: the run's seed keys every token's random number (I3)."""
    return Sampling(
        max_new_tokens=config.sampling.longest_at(step),
        temperature=config.sampling.temperature,
        top_p=config.sampling.top_p,
        top_k=config.sampling.top_k,
        stop_token_ids=stop_token_ids,
        seed=config.run.seed,
    )
