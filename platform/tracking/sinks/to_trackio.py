"""trackio: local first (`trackio show`), or a Hugging Face Space."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


class TrackioSink:
    """Without ``space_id`` into the local database of trackio, $TRACKIO_DIR. A run goes on under its id."""

    def __init__(self, run_dir: Path, *, project: str = "offtrail", space_id: str = "", group: str = "") -> None:
        import trackio

        self._trackio: Any = trackio
        self._run: Any = None
        self._place = {"project": project, "space_id": space_id or None, "group": group or None}

    def start(self, config: Mapping[str, Any], run_id: str, resume_step: int) -> None:
        """See Sink. Nothing of the machine is watched."""
        self._run = self._trackio.init(
            name=run_id, config=dict(config), resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False,
            **self._place,
        )  # fmt: skip

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """See Sink."""
        self._run.log(dict(scalars), step=step)

    def text(self, step: int, name: str, text: str) -> None:
        """See Sink."""
        self._run.log({f"{name}/text": self._trackio.Markdown(text)}, step=step)

    def close(self) -> None:
        """See Sink."""
        self._run.finish()
