"""The rule reward of DeepSeek-R1 (arXiv 2501.12948, §2.2.2): accuracy and format, no learned part.

Only a well-formed answer is read at all (format.py), so accuracy cannot be had around the format.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from offtrail.core.types import Problem
from offtrail.rewards.config import RewardConfig
from offtrail.rewards.format import parse

COMPONENTS = ("accuracy", "format")


def score(
    problem: Problem, text: str, verify: Callable[[Problem, str], bool], *, finished: bool = True
) -> dict[str, float]:
    """Components of one answer, each 0 or 1. ``text`` is without its stop token; ``finished``: a stop token ended it.

    format: well-formed and finished. accuracy: well-formed and ``verify`` accepts what the answer block holds; an
    answer that was cut off after its closing tag has said all it had to say and keeps its accuracy.
    """
    parts = parse(text)
    if parts is None:
        return {"accuracy": 0.0, "format": 0.0}
    return {"accuracy": float(verify(problem, parts.answer)), "format": float(finished)}


def total(components: Mapping[str, float], config: RewardConfig) -> float:
    """The weighted sum that becomes the sample's reward."""
    return config.accuracy_weight * components["accuracy"] + config.format_weight * components["format"]
