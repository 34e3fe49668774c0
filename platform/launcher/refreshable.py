"""Whether a model of scorer.models can be trained while the run trains the policy, by the labels that are asked for."""

from __future__ import annotations

from collections.abc import Mapping

from offtrail.platform.config.errors import ConfigError, refuse
from offtrail.platform.config.schema import Config
from offtrail.platform.model.layouts import require_trained_head
from offtrail.platform.model.scoring import Scoring
from offtrail.tasks.base import TaskError, tagged
from offtrail.tasks.registry import make_task

LOOKS = 32
"""Training problems that are looked at for a checker: a mixture's families need not all have one."""


def require_refresh(config: Config, models: Mapping[str, Scoring]) -> None:
    """Raise ConfigError where the model that the run is to train cannot be trained, or by labels that there are not."""
    name, method = config.scorer.refreshed, config.scorer.refresh.method
    scoring = models[name]
    spec, key = scoring.spec, f"scorer.models.{name}"
    if spec.reads == "tokens" and not spec.beta:
        raise refuse(f"{key}.reads", "tokens", "nothing labels tokens; refresh a model of steps or outcomes")
    if not spec.beta:
        require_trained_head(scoring.key, scoring.given, scoring.folder)
    if spec.insert or spec.closed:
        field, value = ("insert", spec.insert) if spec.insert else ("closed", True)
        way = "take a model of job=prm" if spec.insert else f"set {key}.closed=false"
        raise refuse(
            f"{key}.{field}", value, "a model that reads more than the policy's own tokens can be asked, not trained "
            f"in the run; {way}",
        )  # fmt: skip
    if method != "outcome" and (spec.reads != "steps" or spec.beta):
        what = "learns from outcomes" if spec.beta else f"reads the {spec.reads}"
        raise refuse("scorer.refresh.method", method, f"labels steps, and {name} {what}; take outcome")
    if method == "exact":
        try:
            task = make_task(config.task, config.run.seed)
            checks = any(task.check_steps(task.train(i), tagged("?", "")) for i in range(LOOKS))
        except TaskError as error:
            raise ConfigError(str(error)) from None
        if not checks:
            raise refuse(
                "scorer.refresh.method", method, f"task={config.task.name} has no checker of steps; take rollouts or "
                "outcome",
            )  # fmt: skip
