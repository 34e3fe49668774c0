"""One role process, started by the launcher: `python -m offtrail.platform.runtime.process ROLE INDEX RUN_DIR PARENT`.

A role leaves with 0 when the broker says stop. An exception is written to the role's log in full and told to the broker
in one line (Failure) before the process exits: with 2 where it would come again in every process (`is_final`), so that
the run ends at once; else with 1, and a role whose row says so (roles.py) is started again.
"""

from __future__ import annotations

import importlib
import logging
import signal
import sys
from operator import attrgetter
from pathlib import Path

from offtrail.platform.config.compose import load_config
from offtrail.platform.config.errors import ConfigError, FinalError
from offtrail.platform.runtime.context import RoleContext
from offtrail.platform.runtime.device import require_device
from offtrail.platform.runtime.host import die_with
from offtrail.platform.runtime.roles import role_of

FINAL_STATUS = 2
"""Exit status of a role that no other start would cure."""
TERMINATED = 128 + signal.SIGTERM
"""Exit status of a role that was told to leave by SIGTERM."""

log = logging.getLogger("offtrail")


def leave_on_terminate(signum: int, frame: object) -> None:
    """SIGTERM becomes SystemExit, so that `finally` blocks end child processes and unlink what is shared."""
    sys.exit(TERMINATED)


def leave_it_to_the_launcher(signum: int, frame: object) -> None:
    """A cluster signals all processes of a job: what the end is to be, the launcher tells. No SIG_IGN: servers and
    verifiers would inherit it.
    """


def main(argv: list[str]) -> int:
    """Run one role to its end; the exit status of the process."""
    role, index, run_dir, parent = argv[0], int(argv[1]), Path(argv[2]), int(argv[3])
    die_with(parent, signal.SIGTERM)
    signal.signal(signal.SIGTERM, leave_on_terminate)
    for signum in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, leave_it_to_the_launcher)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    context = RoleContext(load_config(run_dir / "config.yaml"), run_dir, role, index)
    try:
        check_device(context)
        module = importlib.import_module(f"offtrail.platform.{role}.role")
        log.info("imported")
        module.main(context)
    except Exception as error:
        log.exception("%s-%d failed", role, index)
        report_failure(context, error)
        return FINAL_STATUS if is_final(error) else 1
    return 0


def is_final(error: Exception) -> bool:
    """Whether another start would fail in the same way: a mistake in the settings, the data or the installation."""
    return isinstance(error, ConfigError | FinalError | ValueError | ImportError)


def check_device(context: RoleContext) -> None:
    """Raise ValueError when the role's device is not on this machine."""
    key = role_of(context.config, context.role, context.index).device
    if key:
        require_device(key, attrgetter(key)(context.config))


def report_failure(context: RoleContext, error: Exception) -> None:
    """Best effort: the launcher sees the exit status anyway, the broker's word only says why sooner, and on which batch
    (``error.batch``, the learner's). On a line of its own and without a Hello, which would begin the role anew.
    """
    from offtrail.platform.wire.messages import Failure
    from offtrail.platform.wire.sockets import Client, ClientKeys, Endpoint

    if context.role == "broker":
        return
    try:
        endpoint = Endpoint.read(context.run_dir / "endpoint.json", 1.0)
        name, keys = f"{context.role}-{context.index}-failure", ClientKeys.read(context.run_dir)
        client = Client(endpoint, name, keys, context.process)
        failure = Failure(
            role=context.role,
            index=context.index,
            error=f"{type(error).__name__}: {error}",
            final=is_final(error),
            batch=getattr(error, "batch", -1),
        )
        client.request(failure, what="an acknowledged failure", deadline_s=2.0)
        client.close()
    except Exception:
        log.exception("the broker could not be told")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
