"""runs/NAME/summary.json: what a run came to, written at every commit and at the end.

The broker and the launcher write it; ablations and people read it. Invariant: a reader sees a whole file or the one
before it, and it is strict JSON (a number that is not finite stands as null).
"""

from __future__ import annotations

import json
import math
import os
import subprocess
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

LOSSES = ("loss/sft", "loss/preference", "loss/outcome", "loss/process")
"""Of the jobs that learn from examples, each has one."""
PACKAGES = ("offtrail", "torch", "transformers", "accelerate", "pyzmq", "omegaconf", "msgspec")


def write_summary(run_dir: Path, summary: Mapping[str, Any]) -> None:
    """Replace summary.json atomically; `versions` and `git_commit` are added where ``summary`` lacks them."""
    full = {**summary, "versions": summary.get("versions") or package_versions()}
    full.setdefault("git_commit", git_commit())
    write_atomic(
        run_dir / "summary.json", json.dumps(finite(full), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    )


def read_summary(run_dir: Path) -> dict[str, Any]:
    """The summary as it stands; empty where the run died before the first one."""
    try:
        summary: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    except FileNotFoundError:
        return {}
    return summary


@cache
def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def package_versions() -> dict[str, str | None]:
    """Installed versions of PACKAGES from their metadata (nothing is imported); None where not installed."""
    return dict(_versions())


@cache
def git_commit() -> str | None:
    """The commit that offtrail's files stand on, with "+" after it when they were changed; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if changed else "")


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()


def finite(value: Any) -> Any:
    """The same JSON value with null for every number that JSON cannot hold; NumPy scalars become Python's."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if hasattr(value, "item") and not isinstance(value, (str, bytes)):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_atomic(path: Path, text: str | bytes) -> None:
    """Write beside the file and rename: no reader ever sees a part."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(text.encode() if isinstance(text, str) else text)
    partial.replace(path)
