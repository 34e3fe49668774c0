"""The roles of one run, over whatever hosts they run on: their order, their restarts, and their end.

    start_all: broker ─► learner ranks, generators, evaluator
    watch: progress view, dead roles, Ctrl-C ──► stop: the broker tells every role ──► leave ──► close

Invariant: a run never hangs silently and never loses a role unnoticed. A role that dies before the broker has said that
the run is finished is started again where its row of the table allows it (runtime/roles.py), and its leases go back at
once; any other ends the run: status `failed`, with the role, how it died, and its last words. The ledger is durable,
so `run.resume=true` goes on from there.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from offtrail.platform.config.schema import Config
from offtrail.platform.launcher.hosts import Handle, Hosts
from offtrail.platform.runtime.context import remove_earlier, remove_leftovers
from offtrail.platform.runtime.process import FINAL_STATUS, TERMINATED
from offtrail.platform.runtime.roles import RoleSpec, roles_of
from offtrail.platform.tracking.progress import Progress
from offtrail.platform.tracking.summary import read_summary
from offtrail.platform.wire.auth import make_keys
from offtrail.platform.wire.codec import WireError
from offtrail.platform.wire.messages import LAUNCHER, Failure, Hello, Status, StatusRequest, StopRun
from offtrail.platform.wire.sockets import Client, ClientKeys, Endpoint, RefusedError, WaitError, new_process

STATUS_PERIOD_S = 0.5
LOOK_SECONDS = 0.02
"""Between two looks at a process that is to leave."""
LEAVE_SECONDS = 30.0
"""How long roles that know of the end may take to leave, and how long the broker may be silent meanwhile."""
SEAL_SECONDS = 600.0
"""The longest that the broker of a completed run may take to archive the last trajectories."""
SIGNAL_SECONDS = 1.0
"""How much later than its roles the launcher may hear a signal that was sent to all of them."""
TERMINATE_SECONDS = 5.0
"""Between SIGTERM and SIGKILL."""


@dataclass
class Role:
    """One role, the process that it is now, and how often it was started again."""

    spec: RoleSpec
    handle: Handle
    restarts: int = 0

    def final_report(self) -> str:
        """Why the death of its process ends the run; empty where another start may cure it."""
        report, code = self.handle.exit_report(), self.handle.poll()
        if not self.spec.restarts or code in (0, FINAL_STATUS):
            return report
        if self.restarts >= self.spec.restarts:
            return f"{report}, after {self.restarts} restarts ({self.spec.restarts_key}={self.spec.restarts})"
        return ""


@dataclass
class Run:
    """The processes of one run."""

    config: Config
    run_dir: Path
    hosts: Hosts
    roles: list[Role] = field(default_factory=list)
    client: Client | None = None
    process: str = field(default_factory=new_process, repr=False)

    def start_all(self) -> None:
        """In the order of the table, the broker first: every other role dials its endpoint.json."""
        remove_earlier(self.config, self.run_dir)
        (self.run_dir / "endpoint.json").unlink(missing_ok=True)
        make_keys(self.run_dir, self.config.broker.address)
        for spec in roles_of(self.config):
            self.roles.append(Role(spec, self._start(spec)))

    def _start(self, spec: RoleSpec) -> Handle:
        """Its output goes to logs/ROLE-INDEX.log."""
        log = self.run_dir / "logs" / f"{spec.name}.log"
        log.parent.mkdir(exist_ok=True)
        module = "offtrail.platform.runtime.process"
        return self.hosts.start(
            spec, [sys.executable, "-m", module, spec.role, str(spec.index), str(self.run_dir)], log
        )

    def dead(self) -> list[Role]:
        """The roles that left before their time."""
        return [role for role in self.roles if role.handle.poll() is not None]

    def restart(self, role: Role) -> str:
        """Start a dead role again; how it died, for the user. The broker hears of it now, and issues its leases again
        before the new process says Hello.
        """
        report, spec = role.handle.exit_report(), role.spec
        with contextlib.suppress(WireError, RefusedError, WaitError):
            death = Failure(role=spec.role, index=spec.index, error=report, pid=role.handle.pid)
            self.dial().request(death, what="a noted death", deadline_s=2.0)
        role.handle = self._start(spec)
        role.restarts += 1
        return f"{report}; started again ({role.restarts} of {spec.restarts_key}={spec.restarts})"

    @property
    def broker_lives(self) -> bool:
        """Whether there is anybody to ask: the broker is the first role."""
        return bool(self.roles) and self.roles[0].handle.poll() is None

    def dial(self) -> Client:
        """The line to the broker. Raises WaitError while endpoint.json is not there, WireError when it is damaged."""
        if self.client is None:
            endpoint = Endpoint.read(self.run_dir / "endpoint.json", 0.0)
            client = Client(endpoint, f"{LAUNCHER}-0", ClientKeys.read(self.run_dir), self.process)
            hello = Hello(role=LAUNCHER, index=0, pid=os.getpid(), run=self.run_dir.name)
            try:
                client.request(hello, what="a welcome", deadline_s=2.0)
            except BaseException:
                client.close()
                raise
            self.client = client
        return self.client

    def status(self) -> Status | None:
        """The broker's word on the run; None while it is not up yet, is dead, or is too busy to answer at once.

        Raises WireError and RefusedError when it answers something else.
        """
        if not self.broker_lives:
            return None
        try:
            reply, _ = self.dial().request(StatusRequest(), what="the run's status", deadline_s=2.0)
        except WaitError:
            return None
        if not isinstance(reply, Status):
            raise WireError(f"asked for the run's status, the broker answered {type(reply).__name__}")
        return reply

    def written_end(self) -> tuple[str, str] | None:
        """How and why the run ended between two looks: the broker writes it down before it lets anybody go. None where
        it has not; a failure is this launch's only once the broker has left in order.
        """
        summary = read_summary(self.run_dir)
        status, reason = summary.get("status"), summary.get("reason", "")
        if status == "completed" or (status == "failed" and reason and self.roles[0].handle.poll() == 0):
            return status, reason
        return None

    def stop(self, status: str, reason: str) -> bool:
        """Tell the broker how the run ends; it tells the roles to leave, and the ledger is durable as it is.

        Returns whether the broker heard.
        """
        if status == "completed":  # its own word
            return True
        limit = time.monotonic() + 20.0
        while self.broker_lives and time.monotonic() < limit:
            try:  # asked in short turns, so that a broker that dies meanwhile is noticed; only the first end counts
                self.dial().request(StopRun(status=status, reason=reason), what="the end of the run", deadline_s=2.0)
                return True
            except (WireError, RefusedError):
                return False
            except WaitError:
                if not (self.run_dir / "endpoint.json").exists():
                    return False
        return False

    def leave(self, told: bool, completed: bool) -> None:
        """Wait for every role to leave by itself, the broker last; roles that were not told are terminated at once."""
        deadline = time.monotonic() + (LEAVE_SECONDS if told else 0.0)
        self._wait(self.roles[1:], deadline - time.monotonic())
        self._end(self.roles[1:])
        if completed:
            self._wait_for_the_archive()
        elif told:
            self._wait(self.roles[:1], max(TERMINATE_SECONDS, deadline - time.monotonic()))
        self._end(self.roles[:1])

    def _wait_for_the_archive(self) -> None:
        """The broker of a completed run leaves when the last shard is sealed: it has as long as it answers."""
        limit = time.monotonic() + SEAL_SECONDS
        answered = time.monotonic()
        while self.broker_lives and time.monotonic() < min(limit, answered + LEAVE_SECONDS):
            with contextlib.suppress(WireError, RefusedError):
                if self.status() is not None:
                    answered = time.monotonic()
            self._wait(self.roles[:1], STATUS_PERIOD_S)

    def _wait(self, roles: Sequence[Role], seconds: float) -> None:
        """Until all have left, at most ``seconds``."""
        deadline = time.monotonic() + seconds
        while any(role.handle.poll() is None for role in roles) and time.monotonic() < deadline:
            time.sleep(LOOK_SECONDS)

    def _end(self, roles: Sequence[Role]) -> None:
        """Terminate, then kill, those that are still there."""
        for kill in (False, True):
            for role in roles:
                role.handle.end(kill)
            self._wait(roles, TERMINATE_SECONDS)

    def close(self) -> None:
        """No process and nothing shared outlives the run, whatever happened."""
        for role in self.roles:
            role.handle.end(kill=True)
        self._wait(self.roles, TERMINATE_SECONDS)
        if self.client is not None:
            self.client.close()
        self.hosts.sweep()
        remove_leftovers(self.config, self.run_dir)
        self.hosts.close()


def signal_follows(interrupted: list[int]) -> bool:
    """Whether the launcher hears a signal too: a cluster that ends a job tells all of its processes, one by one."""
    deadline = time.monotonic() + SIGNAL_SECONDS
    while not interrupted and time.monotonic() < deadline:
        time.sleep(LOOK_SECONDS)
    return bool(interrupted)


def watch(run: Run, interrupted: list[int]) -> tuple[str, str]:
    """The launcher's loop: until the broker says finished, a role that the run needs dies, or the user interrupts."""
    with Progress(run.config) as progress:
        while True:
            if interrupted:
                return "interrupted", f"stopped by {signal.Signals(interrupted[0]).name}"
            dead = run.dead()  # looked at before the broker is asked: what it says is then newer than the death
            try:
                status = run.status()
            except (WireError, RefusedError) as error:
                return "failed", f"the launcher cannot follow the run: {error}"
            if status is not None:
                progress.update(status)
                if status.failures:
                    failure = status.failures[0]
                    return "failed", f"{failure.role}-{failure.index}: {failure.error}"
                if status.finished:
                    return "completed", status.summary.get("reason", "")
            for role in dead:
                if role.handle.poll() == 0 and (end := run.written_end()):
                    return end
                if report := role.final_report():
                    if role.handle.poll() in (TERMINATED, -signal.SIGTERM) and signal_follows(interrupted):
                        break
                    return "failed", report
                progress.tell(run.restart(role))
            time.sleep(STATUS_PERIOD_S)
