"""Settings with which no run can learn, whatever the model and the task: refused before anything starts. No torch.

validate.py runs RULES. What only a run itself can show is said while it runs (platform/tracking/diagnosis.py).
"""

from __future__ import annotations

from collections.abc import Callable

from offtrail.algos.config import PpoConfig
from offtrail.algos.correction_config import VcpoConfig
from offtrail.platform.config.errors import refuse
from offtrail.platform.config.schema import Config

GROUP_RELATIVE = ("group", "rloo", "reinforce_pp_baseline")
"""Estimators that measure an answer by the others of its group: alone, its advantage is exactly 0."""


def an_answer_is_measured_by_others(config: Config) -> None:
    """A group of one has no mean but itself, and a batch of one answer none to be whitened by."""
    batch, algo, correction = config.batch, config.algo, config.correction
    own_baseline = isinstance(correction, VcpoConfig) and correction.baseline == "batch"
    if config.job != "rl" or batch.group_size > 1 or algo.process.channel or config.search.flexible:
        return
    if algo.advantage in GROUP_RELATIVE and not own_baseline:
        raise refuse(
            "batch.group_size",
            1,
            f"algo.advantage={algo.advantage} measures an answer by the others of its group: alone every advantage is "
            "0; take at least 2, or algo.advantage=reinforce_pp or reward, or algo=ppo (a critic)",
        )
    if algo.advantage == "reinforce_pp" and batch.groups == 1:
        raise refuse(
            "batch.groups",
            1,
            "algo.advantage=reinforce_pp measures an answer by the others of its batch: alone every advantage is 0; "
            "take at least 2, or algo.advantage=reward, or algo=ppo (a critic)",
        )


def a_reward_counts_at_some_step(config: Config) -> None:
    """Components that begin after the last learner step leave the reward at 0 throughout."""
    reward, steps = config.reward, config.learner.steps
    if config.job != "rl" or config.algo.process.channel:
        return
    begins = {name: reward.only.get(name, {}).get("from_step", 0) for name, weight in reward.weights.items() if weight}
    if min(begins.values()) >= steps:
        name, first = min(begins.items(), key=lambda item: item[1])
        why = f"learner.steps={steps} ends before it, and nothing else counts: the reward is 0 throughout; lower it"
        raise refuse(f"reward.only.{name}.from_step", first, why)


def the_policy_is_trained(config: Config) -> None:
    """The critic's steps of its own end before the run does."""
    algo, steps = config.algo, config.learner.steps
    if config.job == "rl" and isinstance(algo, PpoConfig) and algo.critic.pretrain_steps >= steps:
        raise refuse(
            "algo.critic.pretrain_steps",
            algo.critic.pretrain_steps,
            f"must be < learner.steps={steps}: the policy is not trained before",
        )


RULES: tuple[Callable[[Config], None], ...] = (
    an_answer_is_measured_by_others,
    a_reward_counts_at_some_step,
    the_policy_is_trained,
)
