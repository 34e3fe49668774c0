"""The local launcher: starts every role of a run as a process of this host, watches them, and ends the run in order.

    launch ─► start model (cold start if it is not in the cache) ─► broker ─► learner ranks, generators, evaluator
           ─► watch: progress view, dead roles, Ctrl-C ─► stop ─► summary, learning.png

Invariant: a run never hangs silently and never loses a role unnoticed. Any role that leaves before the broker has said
that the run is finished ends the run: status `failed`, with the role, how it died, and its last words. The ledger is
durable, so `run.resume=true` goes on from there.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from offtrail.platform.config.schema import Config
from offtrail.platform.launcher.serve import run_serve
from offtrail.platform.launcher.start import prepare_start_model, run_sft
from offtrail.platform.model.start import StartError
from offtrail.platform.runtime.context import remove_shared_memory
from offtrail.platform.runtime.host import free_port
from offtrail.platform.runtime.roles import RoleSpec, roles_of
from offtrail.platform.tracking.plot import learning_curve
from offtrail.platform.tracking.progress import Progress
from offtrail.platform.tracking.recorder import Recorder
from offtrail.platform.tracking.summary import read_summary, write_summary
from offtrail.platform.wire.auth import make_keys
from offtrail.platform.wire.codec import WireError
from offtrail.platform.wire.messages import Status, StatusRequest, StopRun
from offtrail.platform.wire.sockets import Client, ClientKeys, Endpoint, RefusedError, WaitError

STATUS_PERIOD_S = 0.5
LEAVE_SECONDS = 30.0
"""How long roles that know of the end may take to leave, and how long the broker may be silent meanwhile."""
SEAL_SECONDS = 600.0
"""The longest that the broker of a completed run may take to archive the last trajectories."""
TERMINATE_SECONDS = 5.0
"""Between SIGTERM and SIGKILL."""
EXIT_CODES = {"completed": 0, "failed": 1, "interrupted": 130}


@dataclass
class Role:
    """One child process and where its words go."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def exit_report(self) -> str:
        """How it died, in one line: its exit status or signal, and the last line of its log."""
        code = self.process.returncode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"
        lines = self.log.read_text(errors="replace").strip().splitlines() if self.log.is_file() else []
        words = f"; last words: {lines[-1].strip()}" if lines and code >= 0 else ""
        return f"{self.name} {how}{words} (log: {self.log})"


@dataclass
class Run:
    """The processes of one run on this host."""

    config: Config
    run_dir: Path
    roles: list[Role] = field(default_factory=list)
    client: Client | None = None

    def start(self, spec: RoleSpec, **environment: str) -> None:
        """Start one role; its output goes to logs/ROLE-INDEX.log."""
        log = self.run_dir / "logs" / f"{spec.name}.log"
        log.parent.mkdir(exist_ok=True)
        # Two busy processes on two cores: more threads than asked for make both several times slower.
        env = os.environ | {"OMP_NUM_THREADS": str(spec.threads), "TOKENIZERS_PARALLELISM": "false"} | environment
        command = [
            sys.executable,
            "-m",
            "offtrail.platform.runtime.process",
            spec.role,
            str(spec.index),
            str(self.run_dir),
        ]
        command.append(str(os.getpid()))
        with log.open("ab") as out:  # a process group of its own: Ctrl-C on the terminal is the launcher's alone
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env, process_group=0
            )
        self.roles.append(Role(spec.name, process, log))

    def start_all(self) -> None:
        """Broker first: every other role dials its endpoint.json."""
        config = self.config
        (self.run_dir / "endpoint.json").unlink(missing_ok=True)
        make_keys(self.run_dir, config.broker.address)
        rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        for spec in roles_of(config):
            rank = {"RANK": str(spec.index), "LOCAL_RANK": str(spec.index), "WORLD_SIZE": str(spec.world)}
            self.start(spec, **(rank | rendezvous if spec.world else {}))

    def dead(self) -> Role | None:
        """A role that left before its time."""
        return next((role for role in self.roles if role.process.poll() is not None), None)

    @property
    def broker_lives(self) -> bool:
        """Whether there is anybody to ask: the broker is the first role."""
        return bool(self.roles) and self.roles[0].process.poll() is None

    def dial(self) -> Client:
        """The line to the broker. Raises WaitError while endpoint.json is not there, WireError when it is damaged."""
        if self.client is None:
            endpoint = Endpoint.read(self.run_dir / "endpoint.json", 0.0)
            self.client = Client(endpoint, "launcher-0", ClientKeys.read(self.run_dir))
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
                if self.client is None:
                    return False
        return False

    def leave(self, told: bool, completed: bool) -> None:
        """Wait for every role to leave by itself, the broker last; roles that were not told are terminated at once."""
        deadline = time.monotonic() + (LEAVE_SECONDS if told else 0.0)
        for role in self.roles[1:]:
            self._wait(role, deadline - time.monotonic())
        self._end(self.roles[1:])
        if completed:
            self._wait_for_the_archive()
        elif told:
            self._wait(self.roles[0], max(TERMINATE_SECONDS, deadline - time.monotonic()))
        self._end(self.roles[:1])

    def _wait_for_the_archive(self) -> None:
        """The broker of a completed run leaves when the last shard is sealed: it has as long as it answers."""
        limit = time.monotonic() + SEAL_SECONDS
        answered = time.monotonic()
        while self.broker_lives and time.monotonic() < min(limit, answered + LEAVE_SECONDS):
            with contextlib.suppress(WireError, RefusedError):
                if self.status() is not None:
                    answered = time.monotonic()
            self._wait(self.roles[0], STATUS_PERIOD_S)

    def _wait(self, role: Role, seconds: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            role.process.wait(max(0.0, seconds))

    def _end(self, roles: list[Role]) -> None:
        """Terminate, then kill, those that are still there."""
        for kill in (subprocess.Popen.terminate, subprocess.Popen.kill):
            deadline = time.monotonic() + TERMINATE_SECONDS
            for role in roles:
                if role.process.poll() is None:
                    kill(role.process)
            for role in roles:
                self._wait(role, deadline - time.monotonic())

    def close(self) -> None:
        """No process and no shared memory outlives the run, whatever happened."""
        for role in self.roles:
            if role.process.poll() is None:
                role.process.kill()
                role.process.wait()
        if self.client is not None:
            self.client.close()
        remove_shared_memory(self.config, self.run_dir)


def launch(config: Config, run_dir: Path) -> int:
    """Run one job to its end in a run directory that exists; the exit status of the command."""
    started = time.monotonic()
    try:
        with interrupts() as interrupted:
            status, reason = JOBS[config.job](config, run_dir, interrupted)
    except KeyboardInterrupt as stopped:
        status, reason = "interrupted", str(stopped)
    except (StartError, OSError) as error:
        status, reason = "failed", str(error)
    return finish(run_dir, status, reason, time.monotonic() - started)


def run_rl(config: Config, run_dir: Path, interrupted: list[int]) -> tuple[str, str]:
    """job=rl: the start model, then every role until the end; how it ended, and why."""
    prepare_start_model(config, run_dir, interrupted)
    run = Run(config, run_dir)
    try:
        run.start_all()
        status, reason = watch(run, interrupted)
        run.leave(run.stop(status, reason), status == "completed")
    finally:
        run.close()
    return status, reason


def run_supervised(config: Config, run_dir: Path, interrupted: list[int]) -> tuple[str, str]:
    """job=sft: one process, one checkpoint, which is there whole when the training has ended.

    A resumed run whose checkpoint is there is completed at once; any other begins again, with its records.
    """
    target = run_dir / "checkpoints" / f"step_{config.sft.steps}"
    if target.is_dir():
        return "completed", ""
    started = time.monotonic()
    recorder = Recorder(run_dir, config)
    recorder.restore([])
    try:
        run_sft(run_dir, target, "sft", config, interrupted, lambda row: recorder.step(supervised_row(row)))
    finally:
        recorder.close()
        summary: dict[str, Any] = {"steps": 0, "seed": config.sft.seed, "wall_seconds": time.monotonic() - started}
        if rows := recorder.rows:
            ends = {"loss/sft_first": rows[0]["loss/sft"], "loss/sft_last": rows[-1]["loss/sft"]}
            summary |= {"steps": rows[-1]["step"]} | ends
        write_summary(run_dir, summary)
    return "completed", ""


def supervised_row(row: dict[str, float]) -> dict[str, float]:
    """The metrics row of a row of progress."""
    return {"step": row["step"], "loss/sft": row["loss"]}


JOBS = {"rl": run_rl, "sft": run_supervised, "serve": run_serve}


def watch(run: Run, interrupted: list[int]) -> tuple[str, str]:
    """The launcher's loop: until the broker says finished, a role dies, or the user interrupts."""
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
                    return "completed", ""
            if dead is not None:
                # Between two looks the run may have ended: the broker writes its status before it lets anybody go.
                if dead.process.returncode == 0 and read_summary(run.run_dir).get("status") == "completed":
                    return "completed", ""
                return "failed", dead.exit_report()
            time.sleep(STATUS_PERIOD_S)


@contextlib.contextmanager
def interrupts() -> Iterator[list[int]]:
    """SIGINT and SIGTERM are noted and end the run in order; the second one raises KeyboardInterrupt."""
    seen: list[int] = []

    def note(signum: int, frame: object) -> None:
        seen.append(signum)
        if len(seen) == 1:
            say("stopping… (once more: at once)")
        if len(seen) == 2:  # a third one must not break into the end of the processes
            raise KeyboardInterrupt(f"stopped at once by a second signal, {signal.Signals(signum).name}")

    before = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def say(text: str) -> None:
    """A line on stderr from a signal handler, which must not enter a stream that it has interrupted."""
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode(sys.stderr.encoding or "utf-8", "replace"))


def finish(run_dir: Path, status: str, reason: str, seconds: float) -> int:
    """Say what happened, set the final status (the broker may have died before it could), draw the curves.

    The reason comes first: a disk that is full may have been it, and takes no summary either.
    """
    if status == "failed":
        print(f"offtrail: error: {reason}", file=sys.stderr, flush=True)
    summary: dict[str, Any] = {"status": status, "launch_seconds": round(seconds, 3)}
    if reason:
        summary["reason"] = reason
    try:
        before = read_summary(run_dir)
        before.pop("reason", None)  # of an earlier launch
        summary = before | summary
        write_summary(run_dir, summary)
        if (run_dir / "metrics.jsonl").is_file():
            learning_curve(run_dir)
    except (OSError, ValueError) as error:  # ValueError: a file that was cut where the disk was full
        words = " ".join(str(error).split())
        print(f"offtrail: error: summary.json or learning.png could not be written: {words}", file=sys.stderr)
    with contextlib.suppress(OSError):  # a terminal that is gone
        report(run_dir, summary)
    return EXIT_CODES[status]


def report(run_dir: Path, summary: dict[str, Any]) -> None:
    """The last words of a run on the terminal: what its summary says, and where to look."""
    shown = {
        "status": summary["status"],
        "learner steps": summary.get("steps"),
        "loss": _between(summary, "loss/sft"),
        "held-out accuracy": _between(summary, "eval/accuracy"),
        "training reward accuracy": _between(summary, "reward/accuracy"),
        "staleness mean / max": _pair(summary, "staleness/mean", "staleness/max"),
        "stale tokens": summary.get("staleness/stale_token_share"),
        "groups trained / lost / twice": _pair(summary, "groups/trained", "groups/lost", "groups/duplicated"),
        "busy learner / generator": _pair(summary, "learner/busy_fraction", "generator/busy_fraction"),
    }
    table = Table.grid(padding=(0, 2))
    for name, value in shown.items():
        if value is not None:
            table.add_row(name, f"{value:.3f}" if isinstance(value, float) else str(value))
    for name in ("learning.png", "summary.json", "logs"):
        if (run_dir / name).exists():
            table.add_row("" if name != "learning.png" else "see", str(run_dir / name))
    Console().print(table, highlight=False)


def _between(summary: dict[str, Any], name: str) -> str | None:
    first, last = summary.get(f"{name}_first"), summary.get(f"{name}_last")
    return None if first is None or last is None else f"{first:.3f} → {last:.3f}"


def _pair(summary: dict[str, Any], *names: str) -> str | None:
    values = [summary.get(name) for name in names]
    shown = ("–" if v is None else f"{v:.2f}" if isinstance(v, float) else str(v) for v in values)
    return None if all(v is None for v in values) else " / ".join(shown)
