"""Rules between the models that score, the reward that names them and the processes that serve them. No torch.

validate.py runs RULES. What a model's own files say is looked at later, by model/scoring.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from offtrail.platform.config.errors import ConfigError, refuse
from offtrail.platform.config.schema import Config, LocalConfig


def reward_names_what_scores(config: Config) -> None:
    """A weight is a component's, or a model's of scorer.models; and some component says how good an answer is."""
    try:
        config.reward.check_names(config.scorer.models)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def somebody_serves_the_models(config: Config) -> None:
    """Else every group would wait."""
    scorer = config.scorer
    if config.job == "rl" and scorer.models and not scorer.count:
        names = ", ".join(scorer.models)
        raise refuse("scorer.count", 0, f"scorer.models names {names}, which nobody would serve; take at least 1")


def scorers_have_a_device(config: Config) -> None:
    """As learner and engine."""
    for key, device in (
        ("scorer.device", config.scorer.device),
        ("scorer.refresh.device", config.scorer.refresh.device),
    ):
        if not re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", device):
            raise refuse(key, device, "must be cpu, cuda or cuda:N")


def a_model_is_refreshed(config: Config) -> None:
    """One of those that score, in a run that does not depend on when its versions come."""
    every, refresh, models = config.scorer.refresh_every, config.scorer.refresh, config.scorer.models
    if not every:
        return
    if config.job == "rl" and not models:
        raise refuse("scorer.refresh_every", every, "there is no model to train; name one in scorer.models, or take 0")
    if refresh.model and refresh.model not in models:
        raise refuse("scorer.refresh.model", refresh.model, f"must be one of scorer.models: {', '.join(models)}")
    if not refresh.model and len(models) > 1:
        raise refuse("scorer.refresh.model", "", f"scorer.models has several; say which: {', '.join(models)}")
    if config.staleness.mode == "exact":
        raise refuse(
            "scorer.refresh_every", every, "versions of scorer.models come when they are ready, and with "
            "staleness.mode=exact numbers depend on nothing of the kind; take staleness.mode=bound, or 0",
        )  # fmt: skip
    if refresh.method == "rollouts" and not isinstance(config.engine, LocalConfig):
        raise refuse(
            "scorer.refresh.method", "rollouts", "an embedded engine makes them, of versions that are published as "
            "files; take engine=local, or scorer.refresh.method=outcome",
        )  # fmt: skip


RULES: tuple[Callable[[Config], None], ...] = (
    reward_names_what_scores,
    somebody_serves_the_models,
    scorers_have_a_device,
    a_model_is_refreshed,
)
