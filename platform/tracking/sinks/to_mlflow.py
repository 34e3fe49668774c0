"""MLflow (mlflow or mlflow-skinny), through its client: no global run that another library could end."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from offtrail.platform.tracking.sinks.base import label_of

LONGEST = 6000
"""Characters of a parameter."""
AT_ONCE = 100
"""Parameters of a request; of metrics it may be ten times as many."""
TAG = "offtrail.run_id"


class MlflowSink:
    """``uri``: a server or a folder (empty: as $MLFLOW_TRACKING_URI says, else runs/NAME/mlruns)."""

    def __init__(self, run_dir: Path, *, experiment: str = "offtrail", uri: str = "") -> None:
        import os

        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._metric, self._param = Metric, Param
        given = uri or os.environ.get("MLFLOW_TRACKING_URI", "")
        if not given:
            # MLflow wants to be told that a folder, which needs no database, is meant.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            given = (run_dir.absolute() / "mlruns").as_uri()
        self._client: Any = MlflowClient(given)
        self._experiment, self._name, self._run = experiment, label_of(run_dir), ""

    def start(self, config: Mapping[str, Any], run_id: str, resume_step: int) -> None:
        """See Sink. The run of an earlier launch is found by its tag."""
        found = self._client.get_experiment_by_name(self._experiment)
        experiment = found.experiment_id if found is not None else self._client.create_experiment(self._experiment)
        runs = self._client.search_runs([experiment], f"tags.`{TAG}` = '{run_id}'", max_results=1)
        if runs:
            self._run = runs[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
            return
        made = self._client.create_run(experiment, tags={TAG: run_id}, run_name=self._name)
        self._run = made.info.run_id
        params = [self._param(_key(name), str(value)[:LONGEST]) for name, value in config.items()]
        for start in range(0, len(params), AT_ONCE):
            self._client.log_batch(self._run, params=params[start : start + AT_ONCE])

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """See Sink."""
        now = int(time.time() * 1000)
        metrics = [self._metric(_key(name), value, now, step) for name, value in scalars.items()]
        for start in range(0, len(metrics), 10 * AT_ONCE):
            self._client.log_batch(self._run, metrics=metrics[start : start + 10 * AT_ONCE])

    def text(self, step: int, name: str, text: str) -> None:
        """See Sink."""
        self._client.log_text(self._run, text, f"{_key(name)}/{step}.md")

    def close(self) -> None:
        """See Sink."""
        self._client.set_terminated(self._run)


def _key(name: str) -> str:
    """MLflow's names: letters, digits and _ - . / : and blanks. Trap: its folders hold a metric as a file, so that one
    named a/b leaves no place for a/b/c, which is a/b.c there.
    """
    area, slash, rest = re.sub(r"[^\w\-./: ]", "_", name, flags=re.ASCII).partition("/")
    return area + slash + rest.replace("/", ".")
