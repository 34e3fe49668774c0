"""The model that version 0 comes from: runs/NAME/start, a link to a Hugging Face directory.

``model.path`` names it; without one the small model of ``model=tiny`` is made and cold-started (job=sft) once, kept in
the cache, and found there by every later run of the same model, task and sft settings. No torch here: the cold start
runs in a process of its own, and its progress comes back as one JSON line a step.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from offtrail.platform.config.schema import Config

RECIPE = 1
"""Raise it when the code of the cold start changes what it makes: it is part of the cache key."""


class StartError(RuntimeError):
    """The start model cannot be had; one line that says why and the way out."""


def prepare_start_model(config: Config, run_dir: Path, interrupted: list[int]) -> None:
    """Make runs/NAME/start, with a cold start where the cache has none. A resumed run keeps its link.

    Raises StartError when the model cannot be found, fetched or made.
    """
    link = run_dir / "start"
    if link.exists():
        return
    link.unlink(missing_ok=True)  # it may dangle: the cache was emptied
    link.symlink_to(resolve(config.model.path) if config.model.path else cold_start(config, run_dir, interrupted))


def resolve(path: str) -> Path:
    """A local Hugging Face directory as it is; any other name through the hub's cache or the hub itself."""
    if Path(path).is_dir():
        return Path(path).resolve()
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]))
    except Exception as error:  # the hub's errors are many; each means that there is no model
        raise StartError(
            f"model.path={path}: not a directory here, and the hub did not give it ({type(error).__name__}); "
            "name a directory that holds config.json and *.safetensors"
        ) from error


def cold_start(config: Config, run_dir: Path, interrupted: list[int]) -> Path:
    """The cold-started checkpoint of this configuration, made now if the cache lacks it."""
    target = cache_dir() / cache_key(config)
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    run_sft(run_dir, target, "cold start", config, interrupted)
    return target


def run_sft(run_dir: Path, target: Path, title: str, config: Config, interrupted: list[int]) -> None:
    """Run job=sft in a process of its own, with a progress bar; it writes ``target`` whole or not at all.

    Raises StartError when it fails, and KeyboardInterrupt when a signal was noted in ``interrupted`` meanwhile.
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
            for row in show(config, title, progress_lines(process)):
                if interrupted:
                    raise KeyboardInterrupt(f"at step {row['step']:.0f}")
        except BaseException:
            process.terminate()
            raise
    if process.returncode:
        words = log.read_text(errors="replace").strip().splitlines()
        raise StartError(f"{title} failed: {words[-1] if words else process.returncode} (log: {log})")


def progress_lines(process: subprocess.Popen[bytes]) -> Iterator[dict[str, float]]:
    """The JSON lines that the process prints."""
    assert process.stdout is not None
    for line in process.stdout:
        yield json.loads(line)


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
    """$OFFTRAIL_CACHE, or ~/.cache/offtrail."""
    return Path(os.environ.get("OFFTRAIL_CACHE") or Path.home() / ".cache" / "offtrail")


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
