"""The scorer role: loads the models of scorer.models and answers whoever asks for their scores.

It binds, and tells the broker where (Serving) once its models are loaded; generators hear of it with their heartbeats.
"""

from __future__ import annotations

import logging
import time

from offtrail.platform.model.scoring import scorings
from offtrail.platform.runtime.context import RoleContext
from offtrail.platform.scorer.desk import Desk
from offtrail.platform.scorer.served import Served
from offtrail.platform.scorer.service import Service
from offtrail.platform.wire.messages import Serving
from offtrail.platform.wire.sockets import Server, ServerKeys, WaitError

log = logging.getLogger("offtrail.scorer")


def main(context: RoleContext) -> None:
    """Run until the broker says stop. Raises ConfigError where a model cannot be read, ValueError where the address
    cannot be bound, WaitError when the broker has answered no heartbeat for broker.deadline_seconds.
    """
    connection, config = context.connect(), context.config
    settings, deadline, heartbeat = config.scorer, config.broker.deadline_seconds, connection.heartbeat
    try:
        with connection.activity.busy("load_weights"):
            models = {name: Served.open(config, context.run_dir, one) for name, one in scorings(config).items()}
        server = Server(
            settings.address or config.broker.address, 0, ServerKeys.read(context.run_dir), "scorer.address"
        )
        try:
            served = Serving(url=server.endpoint.url)
            connection.client.request(served, what="an acknowledged address", deadline_s=deadline)
            log.info("loaded, answering at %s", server.endpoint.url)
            # What packing rounds must not depend on who asks when (I2b).
            alone = config.staleness.mode == "exact"
            desk = Desk(
                list(models), budget=0 if alone else settings.tokens_per_batch, finish=settings.on_refresh == "finish"
            )
            again = settings.on_refresh == "again"
            service = Service(server, desk, models, connection.activity, again=again)
            while not heartbeat.stop:
                service.turn()
                if heartbeat.lost > deadline:
                    since = time.time() - heartbeat.lost
                    raise WaitError.passed("an answer to heartbeats", "the broker", since, heartbeat.lost)
        finally:
            server.close()
    finally:
        connection.close()
