"""The broker role: binds, writes endpoint.json, runs the loop in broker.py.

The only role that binds: every other one reads endpoint.json and dials.
"""

from __future__ import annotations

import logging

from offtrail.platform.broker.broker import Broker
from offtrail.platform.runtime.context import RoleContext
from offtrail.platform.runtime.host import own_age, take_all_descriptors
from offtrail.platform.wire.sockets import Server, ServerKeys
from offtrail.tasks.registry import make_task

log = logging.getLogger("offtrail.broker")


def main(context: RoleContext) -> None:
    """Run until the run has ended and every role has left.

    Raises LedgerError when the run directory cannot hold the ledger, ConfigError when the settings are another run's,
    ValueError when the address cannot be bound.
    """
    config, run_dir = context.config, context.run_dir
    take_all_descriptors()
    task = make_task(config.task, config.run.seed)
    server = Server(config.broker.address, config.broker.port, ServerKeys.read(run_dir))
    try:
        broker = Broker(config, run_dir, server, task.train, age=own_age())
        try:
            # Last of all: whoever reads it finds a broker that answers.
            server.endpoint.write(run_dir / "endpoint.json")
            log.info("listening")
            broker.run()
        finally:
            broker.close()
    finally:
        server.close()
