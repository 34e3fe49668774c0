"""Rules between the models that score, the reward that names them and the processes that serve them. No torch.

validate.py runs RULES. What a model's own files say is looked at later, by model/scoring.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from offtrail.platform.config.errors import ConfigError, refuse
from offtrail.platform.config.schema import Config


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
    if not re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", config.scorer.device):
        raise refuse("scorer.device", config.scorer.device, "must be cpu, cuda or cuda:N")


def scorers_are_not_refreshed(config: Config) -> None:
    """A key that does nothing would be taken for one that does."""
    if config.scorer.refresh_every:
        raise refuse(
            "scorer.refresh_every",
            config.scorer.refresh_every,
            "nothing trains a model of scorer.models beside the policy yet, so that none would be new; leave it 0",
        )


RULES: tuple[Callable[[Config], None], ...] = (
    reward_names_what_scores,
    somebody_serves_the_models,
    scorers_have_a_device,
    scorers_are_not_refreshed,
)
