"""Verifiers beside generation: VerifierPool scores finished groups in killable worker processes.

    submit ──► waiting ──► a worker's pipe (head = running) ──► verdict ──► poll

Called by the rollout loop and the evaluator between decode steps; nothing here blocks unless ``poll`` is given a time.
Invariants
- Every submitted key comes back from ``poll`` exactly once, whatever its verifier or its worker does.
- A group takes at most reward.deadline_seconds, counted from when it is seen to be its worker's next, without the time
  that the worker itself waited for a core, and at most EXCUSED times as long with it: then the worker is killed with
  all that it started (keeper.py) and restarted; the groups behind it go to the front of the queue.
- A worker that dies by itself costs its running group one retry, then that group fails with a named reason.
- No worker outlives its parent: it reads the end of stdin, or in the middle of a verifier is killed by its keeper.
- What verifiers print goes to the role's log, up to PRINTED bytes between two verdicts and PRINTED_IN_ALL of a worker.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

import msgspec

import offtrail
from offtrail.core.types import Float32, Problem
from offtrail.platform.config.errors import FinalError
from offtrail.platform.config.schema import Config
from offtrail.platform.verifier.keeper import verifier_below, waited_for_a_core
from offtrail.platform.verifier.worker import LENGTH, READY, Job, Setup, Verdict, frame_of
from offtrail.rewards.config import RewardConfig
from offtrail.rewards.total import Scored, columns, nothing_earned

log = logging.getLogger("offtrail.verifiers")

COMMAND = (sys.executable, "-P", "-m", "offtrail.platform.verifier.worker")
PIPE_DEPTH = 4
"""Groups sent to one worker at a time: it works on while its caller decodes, and little waits behind a slow one."""
START_ATTEMPTS = 3
UNREADABLE = -2
BUSY_LOOK_SECONDS = 0.05
"""Between two looks at a worker that is late by the clock."""
EXCUSED = 10
"""Deadlines after which a worker is late, whatever it waited for: a verifier can make its machine busy by itself."""
END_SECONDS = 5.0
"""The longest that a keeper may take to end all below it; then its process group is killed."""
PRINTED, PRINTED_IN_ALL = 16 << 10, 1 << 20
MAX_RESULT = 16 << 20
"""Bytes of unread verdicts that a worker may send before it counts as broken."""

Components = dict[str, Float32]
_decoder = msgspec.msgpack.Decoder(Verdict)


class VerifierError(FinalError):
    """No verifier can be started: nothing could ever be scored."""


@dataclass(eq=False)
class _Group:
    """A submitted group and its encoded job; ``deaths`` counts the workers that died of it."""

    key: int
    ticket: int
    task: str
    size: int
    frame: bytes
    reward: RewardConfig
    deaths: int = 0


class VerifierPool:
    """reward.workers processes. Not thread-safe; a context manager. Raises VerifierError from submit and poll.

    ``counters`` are cumulative: ``verified_groups``, ``verified_samples``, ``verifier_seconds`` (CPU),
    ``verifier_timeouts``, ``verifier_deaths``. ``command`` starts one worker. ``sets``: name → configuration of what
    it judges beside the task (`of`), each by its own reward; workers and their memory are shared. ``nice``: what
    workers add to this process's CPU niceness, until `renew`.
    """

    def __init__(
        self,
        config: Config,
        command: Sequence[str] = COMMAND,
        sets: Mapping[str, Config] | None = None,
        nice: int = 0,
    ) -> None:
        self._reward, sets = config.reward, sets or {}
        self._rewards = {"": config.reward} | {name: one.reward for name, one in sets.items()}
        memory = max(reward.memory_mb for reward in self._rewards.values()) << 20
        setup = _setup(config, memory, {name: _setup(one, memory, {}) for name, one in sets.items()})
        self._waiting: deque[_Group] = deque()
        self._pending: set[int] = set()
        self._done: list[tuple[int, Components | None]] = []
        self._reasons: dict[int, str] = {}
        self._submitted = 0
        self.counters = dict.fromkeys(
            ("verified_groups", "verified_samples", "verifier_seconds", "verifier_timeouts", "verifier_deaths"), 0.0
        )
        self._workers = [_Worker(command, frame_of(setup), nice) for _ in range(config.reward.workers)]

    @property
    def pending(self) -> int:
        """Groups submitted and not yet returned."""
        return len(self._pending)

    def of(self, name: str) -> OfSet:
        """The same verifiers for one of the sets, or for the task (""). Keys are shared."""
        return OfSet(self, name)

    def submit(self, key: int, problem: Problem, texts: list[str], finished: list[bool], of: str = "") -> None:
        """Queue a group's G answers: ``texts`` without their stop token, ``finished`` where a stop token came.

        Raises ValueError when the lengths differ or ``key`` is still pending.
        """
        if len(texts) != len(finished) or not texts:
            raise ValueError(
                f"group {key}: {len(texts)} texts, {len(finished)} finished flags; expected as many, and some"
            )
        if key in self._pending:
            raise ValueError(f"group {key}: submitted twice")
        self._submitted += 1
        frame = frame_of(Job(self._submitted, problem, texts, finished, of))
        self._waiting.append(_Group(key, self._submitted, problem.task, len(texts), frame, self._rewards[of]))
        self._pending.add(key)
        self._dispatch()

    def poll(self, timeout_s: float = 0.0) -> list[tuple[int, Components | None]]:
        """(key, components) of every group decided since the last call; wait up to ``timeout_s`` for the first.

        Components are name → [G] float32, NaN where one does not apply, or None where the group must be refused;
        ``reason(key)`` then says why.
        """
        end = time.monotonic() + timeout_s
        while True:
            for worker in self._workers:
                self._look_after(worker)
            self._dispatch()
            left = end - time.monotonic()
            if self._done or left <= 0 or not self._pending:
                done, self._done = self._done, []
                return done
            self._wait(left)

    def reason(self, key: int) -> str:
        """Why ``poll`` returned None for ``key``; forgotten once asked."""
        return self._reasons.pop(key)

    def renew(self) -> None:
        """Other workers, which are not nice (nobody but root can lower a niceness); what has no verdict yet is judged
        anew.
        """
        for worker in self._workers:
            worker.nice = 0
            self._restart(worker)
        self._dispatch()

    def close(self) -> None:
        """Kill the workers and wait until they are gone; pending groups are given up."""
        for worker in self._workers:
            worker.end()
        self._workers.clear()
        self._waiting.clear()
        self._pending.clear()

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- one worker's turn ---

    def _look_after(self, worker: _Worker) -> None:
        """Take its verdicts, then see whether it died or its running group is out of time (in that order)."""
        alive = worker.flush()
        alive = worker.receive() and alive
        honest = all(self._take(worker, verdict) for verdict in worker.verdicts())
        if not alive:
            self._replace_dead(worker, worker.end())
        elif not honest:
            worker.end()
            self._replace_dead(worker, "sent what it does not owe")
        elif worker.ready and worker.groups and worker.late(worker.groups[0].reward.deadline_seconds):
            self._time_out(worker)
        elif not worker.ready and worker.late(self._reward.start_seconds):
            raise VerifierError(
                f"a verifier process was not ready within reward.start_seconds={self._reward.start_seconds:g} "
                f"({worker.seconds:.0f} s with waiting for a core); raise it, or see what task and reward import"
            )

    def _take(self, worker: _Worker, verdict: Verdict) -> bool:
        """Credit one verdict; False when it is not what this worker owes."""
        if verdict.ticket == READY and not worker.ready:
            if verdict.error:
                raise VerifierError(verdict.error)
            worker.report_ready()
            return True
        if not worker.groups or worker.groups[0].ticket != verdict.ticket:
            return False
        group = worker.groups.popleft()
        worker.restart_clock()
        self.counters["verified_groups"] += 1
        self.counters["verified_samples"] += group.size
        self.counters["verifier_seconds"] += verdict.seconds
        if verdict.error:
            self._refuse(group, verdict.error)
        elif any(len(verdict.components.get(name, ())) != group.size for name in group.reward.components):
            self._refuse(group, f"verifier gave {sorted(verdict.components)} of another length than the group")
        else:
            scored = Scored(columns(verdict.components))
            scored.counts = verdict.counts
            self._return(group, scored)
        return True

    def _time_out(self, worker: _Worker) -> None:
        """Kill it; its running group is decided by reward.on_timeout."""
        group = worker.groups.popleft()
        self.counters["verifier_timeouts"] += 1
        what = f"verifier ran past reward.deadline_seconds={group.reward.deadline_seconds:g} and was killed"
        log.warning("%d answers to a problem of %s: %s", group.size, group.task, what)
        self._restart(worker)
        if group.reward.on_timeout == "refuse":
            self._refuse(group, what)
        else:
            self._return(group, nothing_earned(group.reward, group.task, group.size))

    def _replace_dead(self, worker: _Worker, how: str) -> None:
        """It died, or broke its protocol: one retry for its running group, a bound on deaths before it was ready."""
        self.counters["verifier_deaths"] += 1
        log.warning("a verifier worker died (%s)", how)
        running = worker.groups.popleft() if worker.ready and worker.groups else None
        worker.failed_starts += not worker.ready
        if worker.failed_starts >= START_ATTEMPTS:
            raise VerifierError(f"verifier workers die while starting ({how}); their message stands above in this log")
        self._restart(worker)
        if running is None:
            return
        running.deaths += 1
        if running.deaths > 1:
            self._refuse(running, f"verifier worker died twice on this group ({how})")
        else:
            self._waiting.appendleft(running)

    def _restart(self, worker: _Worker) -> None:
        """A new process in its place; what it had not begun goes back to the front of the queue."""
        worker.end()
        self._waiting.extendleft(reversed(worker.groups))
        worker.start()

    # --- the queue ---

    def _dispatch(self) -> None:
        """Fill the pipes, the emptiest first."""
        while self._waiting and self._workers:
            worker = min(self._workers, key=lambda w: len(w.groups))
            if len(worker.groups) >= PIPE_DEPTH:
                return
            worker.send(self._waiting.popleft())

    def _wait(self, left: float) -> None:
        """Sleep until a pipe moves, the nearest deadline or ``left`` seconds."""
        poller = select.poll()
        for worker in self._workers:
            for descriptor, events in worker.watched():
                poller.register(descriptor, events)
            if worker.groups and worker.ready:
                deadline = worker.groups[0].reward.deadline_seconds
                left = min(left, max(BUSY_LOOK_SECONDS, deadline - worker.seconds))
        poller.poll(max(0.0, left) * 1000 + 1)

    def _return(self, group: _Group, components: Components | None) -> None:
        self._pending.remove(group.key)
        self._done.append((group.key, components))

    def _refuse(self, group: _Group, reason: str) -> None:
        self._reasons[group.key] = reason
        self._return(group, None)


def _setup(config: Config, memory: int, sets: dict[str, Setup]) -> Setup:
    task, reward = dataclasses.asdict(config.task), dataclasses.asdict(config.reward)
    counts = config.tracking.behaviour and config.job == "rl"
    language = config.reward.settings.get("language", {}).get("target", "en") if counts else ""
    return Setup(config.task.name, task, reward, memory, sets, language)


@dataclass(frozen=True)
class OfSet:
    """A pool's verifiers for one set; ``close`` leaves them to the pool."""

    pool: VerifierPool
    name: str

    @property
    def counters(self) -> dict[str, float]:
        """The pool's, of all that it judges."""
        return self.pool.counters

    def submit(self, key: int, problem: Problem, texts: list[str], finished: list[bool]) -> None:
        """See VerifierPool.submit."""
        self.pool.submit(key, problem, texts, finished, self.name)

    def poll(self, timeout_s: float = 0.0) -> list[tuple[int, Components | None]]:
        """See VerifierPool.poll."""
        return self.pool.poll(timeout_s)

    def reason(self, key: int) -> str:
        """See VerifierPool.reason."""
        return self.pool.reason(key)

    def close(self) -> None:
        """Nothing: the pool is closed by who made it."""


class _Worker:
    """One process and its two non-blocking pipes. ``groups``: what it was sent and has not answered, oldest first."""

    _excused = False

    def __init__(self, command: Sequence[str], setup: bytes, nice: int) -> None:
        self._command, self._setup, self.nice = command, setup, nice
        self.failed_starts = 0
        self.ready = False
        self.groups: deque[_Group] = deque()
        self.start()

    def start(self) -> None:
        """Start the process; it imports while its first jobs already lie in its pipe."""
        source = str(Path(offtrail.__file__).parents[1])
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH")))),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",  # each BLAS thread would reserve address space (reward.memory_mb)
            "OFFTRAIL_PARENT": str(os.getpid()),
        }
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            env=environment,
            start_new_session=True,  # a process group to kill, and no Ctrl-C meant for the role
        )
        if self.nice:  # all that it will start inherits it
            own = os.getpriority(os.PRIO_PROCESS, os.getpid())
            os.setpriority(os.PRIO_PROCESS, self._process.pid, own + self.nice)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._printed = _Printed(self._process.stderr)
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        os.set_blocking(self._stdin.fileno(), False)
        os.set_blocking(self._stdout.fileno(), False)
        self.groups.clear()
        self.ready = False
        self._inbox = bytearray()
        self._outbox = bytearray(self._setup)
        self.restart_clock()
        self.flush()  # it gets ready while its caller decodes, maybe for minutes, before the first look

    @property
    def seconds(self) -> float:
        """How long it has been starting, or at its oldest group."""
        return time.monotonic() - self._since

    def late(self, seconds: float) -> bool:
        """Whether it has had so long, without the time that it waited for a core: a busy machine is not its fault.
        What it starts is on its clock. EXCUSED times as long is late in any case.
        """
        if not seconds < self.seconds <= EXCUSED * seconds:
            return self.seconds > seconds
        own = self.seconds - max(0.0, self._waited() - self._waited_before)
        if own <= seconds and not self._excused:
            self._excused = True
            log.warning(
                "a verifier has taken %.1f s, of which it had a core or slept %.1f: busy machine", self.seconds, own
            )
        return own > seconds

    def restart_clock(self) -> None:
        """It begins something new."""
        self._since, self._waited_before = time.monotonic(), self._waited()
        self._excused = False
        self._printed.allow()

    def _waited(self) -> float:
        """Of the verifier, and while it starts of the process that imports for it and becomes its keeper."""
        keeper = self._process.pid
        own = waited_for_a_core(verifier := verifier_below(keeper))
        return own if self.ready or verifier == keeper else own + waited_for_a_core(keeper)

    def report_ready(self) -> None:
        """It has imported and rebuilt its verifier."""
        self.ready, self.failed_starts = True, 0
        self.restart_clock()

    def send(self, group: _Group) -> None:
        """Put a group into its pipe, as far as the pipe takes it."""
        if not self.groups and self.ready:
            self.restart_clock()
        self.groups.append(group)
        self._outbox += group.frame
        self.flush()

    def flush(self) -> bool:
        """Write what the pipe takes; False when nobody reads it any more."""
        try:
            while self._outbox:
                written = self._stdin.write(self._outbox)
                if not written:
                    return True
                del self._outbox[:written]
        except BrokenPipeError:
            self._outbox.clear()
            return False
        return True

    def receive(self) -> bool:
        """Read what has come; False when the pipe has ended or holds more than a worker can honestly owe."""
        while len(self._inbox) <= MAX_RESULT:
            chunk = self._stdout.read(1 << 16)
            if chunk is None:
                return True
            if not chunk:
                return False
            self._inbox += chunk
        return False

    def verdicts(self) -> Iterator[Verdict]:
        """Whole verdicts among what was read; one that cannot be decoded is UNREADABLE."""
        while len(self._inbox) >= LENGTH.size:
            end = LENGTH.size + LENGTH.unpack_from(self._inbox)[0]
            if len(self._inbox) < end:
                return
            body = bytes(self._inbox[LENGTH.size : end])
            del self._inbox[:end]
            try:
                yield _decoder.decode(body)
            except msgspec.MsgspecError:
                yield Verdict(UNREADABLE)

    def watched(self) -> list[tuple[int, int]]:
        """Descriptors and events for select.poll."""
        reading = (self._stdout.fileno(), select.POLLIN)
        return [reading, (self._stdin.fileno(), select.POLLOUT)] if self._outbox else [reading]

    def end(self) -> str:
        """Kill it with all below it, wait until they are gone, close the pipes; how it ended (a dead one keeps its
        code).
        """
        if self._process.poll() is None:  # its number may be another's once it has been waited for
            for signum in (signal.SIGTERM, signal.SIGCONT):
                self._process.send_signal(signum)
            try:
                self._process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                with suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
        code = self._process.wait()
        self._stdin.close()
        self._stdout.close()
        self._printed.close()
        return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"


class _Printed:
    """What one process prints, read as it comes by a thread, so that printing never holds a verifier up: so much of it
    goes to this process's stderr, and the rest nowhere.
    """

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe, self._left, self._left_in_all, self._told = pipe, PRINTED, PRINTED_IN_ALL, False
        self._thread = threading.Thread(target=self._read, name="verifier output", daemon=True)
        self._thread.start()

    def allow(self) -> None:
        """It begins a new group."""
        self._left, self._told = PRINTED, self._left_in_all <= 0

    def close(self) -> None:
        """The process has ended. What holds its end of the pipe longer is left alone."""
        self._thread.join(END_SECONDS)

    def _read(self) -> None:
        with self._pipe as pipe:
            while chunk := pipe.read(1 << 16):
                room = max(0, min(self._left, self._left_in_all))
                shown = chunk[:room]
                self._left -= len(shown)
                self._left_in_all -= len(shown)
                if len(chunk) > room and not self._told:
                    shown, self._told = shown + b"\n(a verifier prints more than is kept)\n", True
                with suppress(OSError):
                    os.write(2, shown)
