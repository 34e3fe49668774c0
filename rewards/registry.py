"""From settings to a reward: `make_reward` is the only way to one, and `Reward.judge` runs where verifiers run.

A component is found by its name: NAME is rewards/components/NAME.py, `package.module:attribute` is anybody's own. The
weighted sum is apart (total.py): generators, evaluator and broker need it without loading any component.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from offtrail.core.plugins import bind, is_plugin, load
from offtrail.core.types import Problem
from offtrail.rewards.answer import find_answer
from offtrail.rewards.base import Answered, RewardError, Verify
from offtrail.rewards.config import RewardConfig
from offtrail.rewards.format import parse
from offtrail.rewards.trl import TrlFunction, is_trl


class Reward:
    """The components of ``config``, made with their settings; ``verify`` is the task's. Raises PluginError and
    RewardError when one of them cannot be made.
    """

    def __init__(self, config: RewardConfig, verify: Verify) -> None:
        self._config, self._verify = config, verify
        self._components = dict[str, Ask]()
        self._reasons = dict[str, dict[str, int]]()
        for name in config.components:
            self._components[name], reasons = _component(name, config.settings.get(name, {}))
            if isinstance(reasons, dict):
                self._reasons[name] = reasons

    @property
    def components(self) -> tuple[str, ...]:
        """Their names, in the order of reward.weights."""
        return tuple(self._components)

    @property
    def counts(self) -> dict[str, float]:
        """NAME/REASON → how many of the answers that were judged last have it, of the components that have reasons."""
        return {f"{name}/{why}": float(n) for name, reasons in self._reasons.items() for why, n in reasons.items()}

    def judge(self, problem: Problem, texts: Sequence[str], finished: Sequence[bool]) -> dict[str, list[float | None]]:
        """Name → [G] scores of a prompt's G answers, None where a component does not apply.

        ``texts`` are without their stop token; ``finished``: a stop token ended the answer. Raises RewardError that
        names the component which raised, gave no number, or when none applies to an answer.
        """
        for reasons in self._reasons.values():
            reasons.update(dict.fromkeys(reasons, 0))
        asked = [self._read(problem, text, ended) for text, ended in zip(texts, finished, strict=True)]
        nothing: list[float | None] = [None] * len(asked)
        scores = {
            name: ask(asked) if self._config.applies(name, problem.task) else nothing
            for name, ask in self._components.items()
        }
        if any(all(value is None for value in row) for row in zip(*scores.values(), strict=True)):
            raise RewardError(
                f"task={problem.task}: no component of reward.weights applies to an answer ({', '.join(scores)}); add "
                "one that does, or widen reward.only"
            )
        return scores

    def _read(self, problem: Problem, text: str, finished: bool) -> Answered:
        parts = parse(text)
        answer = find_answer(text, parts, finished, self._config)
        return Answered(problem, text, finished, parts, answer, self._verify)


def make_reward(config: RewardConfig, verify: Verify) -> Reward:
    """See Reward."""
    return Reward(config, verify)


Ask = Callable[[Sequence[Answered]], list[float | None]]


def _component(name: str, settings: dict[str, Any]) -> tuple[Ask, Any]:
    """All answers of a prompt in, as many scores out; and what its reasons are counted in, None where it has none."""
    source = name if is_plugin(name) else f"offtrail.rewards.components.{name}:score"
    target = load(source, what="reward.weights")
    if not callable(target):
        raise RewardError(f"reward.weights={name}: is {target!r}, which cannot be called; name a function or a class")
    if is_trl(target):
        return partial(_ask, name, TrlFunction(target, settings, name=name), True), None
    score = bind(target, settings, name=name, what=f"reward.settings.{name}")
    made = score() if isinstance(target, type) else score
    return partial(_ask, name, made, getattr(target, "whole_group", False)), getattr(made, "reasons", None)


def _ask(name: str, score: Callable[..., Any], together: bool, asked: Sequence[Answered]) -> list[float | None]:
    try:
        given = list(score(asked)) if together else [score(one) for one in asked]
    except RewardError:
        raise
    except Exception as error:
        raise RewardError(f"reward component {name} raised {type(error).__name__}: {error}") from error
    if len(given) != len(asked):
        raise RewardError(f"reward component {name} gave {len(given)} scores for the {len(asked)} answers of a group")
    return [_number(name, value) for value in given]


def _number(name: str, given: Any) -> float | None:
    if given is None:
        return None
    try:
        value = float(given)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise RewardError(f"reward component {name} gave {given!r}: must be a finite number, or None where it has none")
    return value
