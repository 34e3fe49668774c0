"""Reward functions written for TRL: a function with a parameter `completions` is one, and is called as TRL calls it.

By keyword, with those names alone that its signature takes, each a list of G but for the last:

    prompts, completions   texts; of a problem of messages, lists of {"role", "content"}
    completion_ids         None: components see text
    answer, …              the problem's columns: its answer, and what its `meta` holds
    trainer_state          None

None among what it gives is "does not apply", as in TRL. An async function is waited for.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from offtrail.core.plugins import PluginError
from offtrail.rewards.base import Answered, RewardError, whole_group
from offtrail.rewards.config import TRL_MARK


def is_trl(target: Any) -> bool:
    """Whether ``target`` is a function of TRL's signature."""
    return inspect.isroutine(target) and TRL_MARK in inspect.signature(target).parameters


@whole_group
class TrlFunction:
    """``function`` as a component. ``settings`` are given to it beside the rest, by keyword. Raises PluginError at one
    that it does not take.
    """

    def __init__(self, function: Callable[..., Any], settings: Mapping[str, Any], *, name: str) -> None:
        parameters = inspect.signature(function).parameters.values()
        self._anything = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self._takes = {
            p.name: p.default is p.empty for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        }
        for key, value in settings.items():
            if key not in self._takes and not self._anything:
                takes = ", ".join(self._takes)
                raise PluginError(f"reward.settings.{name}.{key}={value}: no such setting; {name} takes {takes}")
        self._function, self._settings, self._name = function, settings, name

    def __call__(self, answers: Sequence[Answered]) -> Sequence[float | None]:
        """See GroupComponent. Raises RewardError where the function needs a column that the problem does not have."""
        given = columns(answers) | dict(self._settings)
        if missing := [key for key, needed in self._takes.items() if needed and key not in given]:
            known = ", ".join(given)
            raise RewardError(
                f"reward component {self._name} needs {missing[0]}, which the problem lacks; it has {known}"
            )
        result = self._function(**{key: value for key, value in given.items() if self._anything or key in self._takes})
        return asyncio.run(_awaited(result)) if inspect.isawaitable(result) else result


def columns(answers: Sequence[Answered]) -> dict[str, Any]:
    """What TRL would give a reward function, of the answers to one prompt."""
    problem, size = answers[0].problem, len(answers)
    texts: list[Any] = [one.text for one in answers]
    prompt: Any = problem.prompt
    if problem.messages:
        prompt = [dict(message) for message in problem.messages]
        texts = [[{"role": "assistant", "content": text}] for text in texts]
    rows = {key: [value] * size for key, value in problem.meta.items()}
    return rows | {
        "answer": [problem.answer] * size,
        "prompts": [prompt] * size,
        "completions": texts,
        "completion_ids": None,
        "trainer_state": None,
    }


async def _awaited(result: Any) -> Any:
    return await result
