"""Weights & Biases. Online with a key (`wandb login`, $WANDB_API_KEY), else mode=offline: files for `wandb sync`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from offtrail.platform.tracking.sinks.base import label_of


class WandbSink:
    """``mode``: online, offline or disabled (empty: as $WANDB_MODE says); files in runs/NAME/wandb.

    Scores come behind later steps, and wandb's own step only rises: the x-axis is the metric ``step``.
    """

    def __init__(
        self, run_dir: Path, *, project: str = "offtrail", entity: str = "", group: str = "", mode: str = "",
    ) -> None:  # fmt: skip
        import wandb

        self._wandb: Any = wandb
        self._run: Any = None
        self._run_dir, self._place = run_dir, {"project": project, "entity": entity, "group": group, "mode": mode}

    def start(self, config: Mapping[str, Any], run_id: str, resume_step: int) -> None:
        """See Sink. Nothing of the machine is watched, and no code is sent."""
        place = {name: value for name, value in self._place.items() if value}
        settings = self._wandb.Settings(
            console="off", disable_code=True, disable_git=True, x_disable_stats=True, save_code=False, silent=True
        )
        self._run = self._wandb.init(
            id=run_id, name=label_of(self._run_dir), dir=str(self._run_dir), config=dict(config), settings=settings,
            resume="allow", **place,
        )  # fmt: skip
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """See Sink."""
        self._run.log({"step": step, **scalars})

    def text(self, step: int, name: str, text: str) -> None:
        """See Sink."""
        self._run.log({"step": step, f"{name}/text": self._wandb.Html(f"<pre>{_escaped(text)}</pre>")})

    def close(self) -> None:
        """See Sink."""
        self._run.finish()
        self._wandb.teardown()  # or its service outlives this process for a while


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
