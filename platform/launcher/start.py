"""The model that version 0 comes from: runs/NAME/start, a link to a Hugging Face directory.

``model.path`` names it, a directory or a name in the local Hugging Face cache; without one the small model of
``model=tiny`` is made and cold-started (job=sft) once, kept in the cache, and found there by every later run of the
same model, task and sft settings. No torch here: the cold start runs in a process of its own, and its progress comes
back as one JSON line a step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from offtrail.platform.config.schema import Config
from offtrail.platform.model.start import StartError, resolve

LOOK_SECONDS = 0.25
"""Between two looks for a signal of the user."""
RECIPE = 1
"""Raise it when the code of the cold start changes what it makes: it is part of the cache key."""


def prepare_start_model(config: Config, run_dir: Path, interrupted: list[int]) -> None:
    """Make runs/NAME/start, with a cold start where the cache has none. A resumed run keeps its link.

    Raises StartError when the model cannot be found or made, and KeyboardInterrupt when a signal is noted meanwhile.
    """
    link = run_dir / "start"
    if link.exists():
        return
    link.unlink(missing_ok=True)  # it may dangle: the cache was emptied
    link.symlink_to(resolve(config.model.path) if config.model.path else cold_start(config, run_dir, interrupted))


def cold_start(config: Config, run_dir: Path, interrupted: list[int]) -> Path:
    """The cold-started checkpoint of this configuration, made now if the cache lacks it; of several launches at once
    one makes it, and the others wait for it.
    """
    target = cache_dir() / cache_key(config)
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with only_one(target, interrupted):
        if not target.is_dir():
            try:
                run_sft(run_dir, target, "cold start", config, interrupted)
            except StartError:
                if not target.is_dir():  # it is there whole: a launch made it that the lock did not reach
                    raise
    return target


@contextlib.contextmanager
def only_one(target: Path, interrupted: list[int]) -> Iterator[None]:
    """Hold the lock on making ``target``; whoever dies lets go of it. A file system without locks has none."""
    with (target.parent / f".{target.name}.lock").open("a") as lock:
        waiting = False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not waiting:
                    print(f"waiting for another run, which makes the same start model: {target}", flush=True)
                waiting = True
                if interrupted:
                    raise interruption("while another run made its start model", interrupted) from None
                time.sleep(LOOK_SECONDS)
            except OSError:
                break
            else:
                break
        yield


def interruption(when: str, interrupted: list[int]) -> KeyboardInterrupt:
    """What a noted signal becomes where no role is up yet."""
    return KeyboardInterrupt(f"stopped by {signal.Signals(interrupted[0]).name} {when}")


def run_sft(
    run_dir: Path,
    target: Path,
    title: str,
    config: Config,
    interrupted: list[int],
    record: Callable[[dict[str, float]], None] | None = None,
) -> None:
    """Run job=sft in a process of its own, with a progress bar; it writes ``target`` whole or not at all.

    ``record`` is given each of its rows of progress: step, steps, loss.
    Raises StartError when it fails, and KeyboardInterrupt when a signal is noted in ``interrupted`` meanwhile.
    """
    log = run_dir / "logs" / "sft-0.log"
    log.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "offtrail.platform.learner.sft", str(run_dir / "config.yaml"), str(target)]
    env = os.environ | {"OMP_NUM_THREADS": str(config.learner.threads)}
    # A process group of its own: Ctrl-C on the terminal is the launcher's alone.
    with (
        log.open("ab") as err,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=err, env=env, process_group=0) as process,
    ):
        try:
            for row in show(config, title, progress_lines(process, title, interrupted)):
                if record is not None:
                    record(row)
        except BaseException:
            process.terminate()
            raise
    if process.returncode:
        words = log.read_text(errors="replace").strip().splitlines()
        raise StartError(f"{title} failed: {words[-1] if words else process.returncode} (log: {log})")


def progress_lines(process: subprocess.Popen[bytes], title: str, interrupted: list[int]) -> Iterator[dict[str, float]]:
    """The JSON lines that the process prints; a signal is noticed while it prints none."""
    assert process.stdout is not None
    pipe, rest, step = process.stdout.fileno(), b"", 0
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while True:
            if interrupted:
                raise interruption(f"in the {title}, after step {step}", interrupted)
            if not selector.select(LOOK_SECONDS):
                continue
            if not (chunk := os.read(pipe, 1 << 16)):
                return
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                row = json.loads(line)
                step = int(row["step"])
                yield row


def show(config: Config, title: str, rows: Iterator[dict[str, float]]) -> Iterator[dict[str, float]]:
    """The rows as they come, shown on the way: a bar on a terminal, a line for every tenth elsewhere."""
    console = Console()
    mode = config.tracking.progress
    live = mode == "live" or (mode == "auto" and console.is_terminal)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not live) as bar:
        task = bar.add_task(title, total=config.sft.steps, loss=float("nan"))
        for row in rows:
            step, loss = int(row["step"]), row["loss"]
            bar.update(task, completed=step, loss=loss)
            if not live and mode != "off" and step % max(1, config.sft.steps // 10) == 0:
                line = f"{title}: step {step}/{config.sft.steps} · loss {loss:.3f}"
                console.print(line, highlight=False, soft_wrap=True)
            yield row


def cache_dir() -> Path:
    """$OFFTRAIL_CACHE, or ~/.cache/offtrail; absolute, because links lead there."""
    return Path(os.environ.get("OFFTRAIL_CACHE") or "~/.cache/offtrail").expanduser().resolve()


def cache_key(config: Config) -> str:
    """Names the cold-start checkpoint of ``config``: a hash of everything that decides its weights."""
    model = dataclasses.asdict(config.model)
    del model["path"]
    decides = {
        "recipe": RECIPE,
        "model": model,
        "task": dataclasses.asdict(config.task),
        "sft": dataclasses.asdict(config.sft),
        "dtype": config.learner.dtype,
        "torch": metadata.version("torch"),
    }
    digest = hashlib.blake2b(json.dumps(decides, sort_keys=True).encode(), digest_size=8).hexdigest()
    return f"{config.model.name}-{config.task.name}-{digest}"
