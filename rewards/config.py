"""Settings of the reward. No torch here: `launch.py --help` imports this."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from offtrail.core.plugins import is_plugin
from offtrail.core.settings import check_limits, setting

COMPONENTS = tuple(sorted(p.stem for p in (Path(__file__).parent / "components").glob("*.py") if p.stem != "__init__"))
"""The components of the tree, by name."""
TRL_MARK = "completions"
"""The parameter by which a function of TRL's signature is known (trl.py)."""
READ_THE_ANSWER = ("accuracy", "gym_score", "instructions")
"""Components that judge what `answer` finds; others read the text."""
LIMITS_OF_A_COMPONENT = ("from_step", "to_step", "tasks")


@dataclass
class RewardConfig:
    """Weighted sum of named components. The verifiers run in killable worker processes."""

    name: str = "rule"
    """Label of the reward."""
    weights: dict[str, float] = setting({"accuracy": 1.0, "format": 0.1})
    """Component → its weight, below 0 for a penalty, 0 to log it only; rewards/components/NAME.py, your own
    module:function, or a model of scorer.models."""
    settings: dict[str, dict[str, Any]] = setting({})
    """Component → its settings, as {NAME: {key: value}}."""
    only: dict[str, dict[str, Any]] = setting({})
    """Component → where it counts, as {NAME: {from_step: 1300, to_step: 1700, tasks: [TASK]}}: from_step ≤ learner step
    < to_step, and problems of these tasks."""
    answer: Literal["tags", "boxed", "mark", "last_number", "text"] = "tags"
    """Where the answer that is compared is looked for. tags: the answer block of a well-formed text; boxed: the last
    \\boxed{}; mark: the line after the last answer_mark; last_number; text: all that follows the thought."""
    answer_mark: str = "Answer:"
    """The mark of answer=mark, such as #### or Answer:."""
    workers: int = setting(1, "[1, 1024]", resumable=True)
    """Verifier processes of each generator."""
    deadline_seconds: float = setting(5.0, "(0, 1e9]")
    """A verifier that takes longer on one group is killed and restarted; waiting for a busy machine's core is not
    counted."""
    start_seconds: float = setting(120.0, "(0, inf)", resumable=True)
    """A verifier process that takes longer to import and report ready fails the run; counted in the same way."""
    on_timeout: Literal["zero", "refuse"] = "zero"
    """What a killed verifier means: every component 0, or the group refused as `failed`."""
    memory_mb: int = setting(1024, "[512, 16777216]")
    """Address space of each verifier process; one that asks for more fails its group."""

    def __post_init__(self) -> None:
        """Raise ValueError when a value is out of bounds or a name unknown."""
        check_limits(self, "reward")
        if not self.answer_mark.strip():
            raise ValueError(f"reward.answer_mark={self.answer_mark!r}: must be a text that answers hold, such as ####")
        if not any(self.weights.values()):
            raise ValueError(
                f"reward.weights={_shown(self.weights)}: at least one must not be 0, such as accuracy: 1.0; with all "
                "weights 0 every advantage is 0"
            )
        for name, weight in self.weights.items():
            if not math.isfinite(weight):
                raise ValueError(f"reward.weights.{name}={weight}: must be a finite number")
        for key, entries in (("settings", self.settings), ("only", self.only)):
            for name, entry in entries.items():
                if name not in self.weights:
                    raise _unknown(f"reward.{key}", name, self.weights, "a component that reward.weights names")
                if not isinstance(entry, dict):
                    raise ValueError(f"reward.{key}.{name}={entry}: must be a mapping {{name: value}}")
        for name, limits in self.only.items():
            _check_only(f"reward.only.{name}", limits)

    @property
    def components(self) -> tuple[str, ...]:
        """Those of rules, which verifiers score, by name, in order."""
        return tuple(name for name in self.weights if name in COMPONENTS or is_plugin(name))

    @property
    def looks_for_answers(self) -> bool:
        """Whether a component judges what `answer` finds."""
        return any(name in READ_THE_ANSWER for name in self.weights)

    @property
    def scored(self) -> tuple[str, ...]:
        """Those that models of scorer.models score, by name, in order."""
        return tuple(name for name in self.weights if name not in self.components)

    def check_names(self, models: Collection[str]) -> None:
        """Raise ValueError for a weight that is neither a component's nor one of the ``models`` that score, and where
        no component of rules is among them.
        """
        known = (*COMPONENTS, *models)
        also = "your own module:function, or a model of scorer.models={NAME: {path: DIR}}"
        for name in self.weights:
            if name not in known and not is_plugin(name):
                raise _unknown("reward.weights", name, known, also)
            if name in models and name in self.settings:
                raise ValueError(
                    f"reward.settings.{name}: is a model that scores; its settings are scorer.models.{name}"
                )
        if not self.components:
            raise ValueError(
                f"reward.weights={_shown(self.weights)}: needs a component of rules too, by which eval/accuracy and "
                "algo.filter_groups say how good an answer is, such as accuracy: 0"
            )

    @property
    def main(self) -> str:
        """The component that says how good an answer is: `accuracy` where it is weighted, else the first one. It is
        what eval/accuracy and reward/accuracy show, and what algo.filter_groups=accuracy reads.
        """
        return "accuracy" if "accuracy" in self.weights else self.components[0]

    def applies(self, name: str, task: str) -> bool:
        """Whether a component is asked about problems of ``task``."""
        tasks = self.only.get(name, {}).get("tasks")
        return tasks is None or task in tasks

    def counts(self, name: str, step: int) -> bool:
        """Whether its weight stands in the rewards of the batch of learner step ``step``."""
        limits = self.only.get(name, {})
        end = limits.get("to_step")
        return limits.get("from_step", 0) <= step and (end is None or step < end)


def _check_only(key: str, limits: dict[str, Any]) -> None:
    for name, value in limits.items():
        if name not in LIMITS_OF_A_COMPONENT:
            raise _unknown(key, name, LIMITS_OF_A_COMPONENT, "")
        if name == "tasks":
            if not isinstance(value, list) or not value or not all(isinstance(task, str) for task in value):
                raise ValueError(f"{key}.tasks={value}: must be a list of tasks, such as [chain, addition]")
        elif isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{key}.{name}={value}: must be a learner step, a whole number ≥ 0")
    start, end = limits.get("from_step", 0), limits.get("to_step")
    if end is not None and end <= start:
        raise ValueError(f"{key}.to_step={end}: must be > from_step={start}; it is the first step without it")


def _unknown(key: str, name: str, known: Iterable[str], also: str) -> ValueError:
    names = list(known)
    near = difflib.get_close_matches(name, names, n=3)
    allowed = ", ".join(filter(None, (*names, also)))
    hint = f"; nearest: {', '.join(near)}" if near else ""
    return ValueError(f"{key}.{name}: unknown; must be one of {allowed}{hint}")


def _shown(mapping: dict[str, float]) -> str:
    return "{" + ", ".join(f"{name}: {value:g}" for name, value in mapping.items()) + "}"
