"""offtrail's weight loader inside an SGLang server: reads a published version where it lies (shm, disk).

    control.FromFile ── request ──► server ── load ──► the version's file: mapped, checked, copied into the model
                     ◄── verdict (a file beside it, one a TP rank) ──────────────────────────────────┘

The server is started with ``--custom-weight-loader`` naming `load`. Trap: an exception here kills the server's
scheduler, and SGLang answers success whatever happened, so that a verdict file tells what became of a request.

Invariant: everything that can be checked (the file's checksum, the base of a delta, names) is checked before the model
is touched; a verdict other than ``ok`` or ``refused`` means that the model may hold a part of the version.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offtrail.platform.weights.store import Subscriber

_readers: dict[Path, Subscriber] = {}
"""One a folder for the life of the server: it holds the base that the next delta applies to."""


def request(folder: str, version: int, verdict: str) -> bytes:
    """What `control.FromFile` sends as the only "tensor": its name says all, as JSON; the tensor is empty."""
    buffer = io.BytesIO()
    told = json.dumps({"folder": folder, "version": version, "verdict": verdict})
    ForkingPickler(buffer).dump([(told, torch.empty(0))])  # an empty tensor takes no shared memory
    return buffer.getvalue()


def load(model: Any, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Load the version that the request names into ``model``, and write the verdict. Never raises."""
    [(told, _)] = named_tensors
    asked = json.loads(told)
    verdict = Path(f"{asked['verdict']}.{_rank()}")
    try:
        words = _load(model, Path(asked["folder"]), int(asked["version"]))
    except BaseException as error:
        words = f"torn: {type(error).__name__}: {error}"
    temporary = verdict.with_name(f"{verdict.name}.writing")
    temporary.write_text(words)
    os.replace(temporary, verdict)


def _load(model: Any, folder: Path, version: int) -> str:
    reader = _readers.setdefault(folder, Subscriber(folder))
    try:
        published = reader.open(version)
    except Exception as error:
        return f"refused: {type(error).__name__}: {error}"
    with published as tensors:
        model.load_weights(list(tensors.items()))
    return "ok"


def _rank() -> int:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return 0
