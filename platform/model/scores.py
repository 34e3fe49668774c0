"""scores.json, beside the weights of a score model: how its numbers are read, and of what. No torch.

    job=reward_model, job=prm ── write ──► scores.json ── spec_of ──► whoever asks the model

A model of other people's has none: what is known of its layout (layouts.py) says it then.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from offtrail.platform.config.errors import ConfigError, refuse
from offtrail.platform.model.layouts import Layout, layout_of

FILE = "scores.json"

Reads = Literal["outcome", "steps", "tokens"]
Of = Literal["answer", "response"]
Squash = Literal["none", "sigmoid"]
ALLOWED = {
    "reads": ("outcome", "steps", "tokens"),
    "of": ("answer", "response"),
    "squash": ("none", "sigmoid"),
}


@dataclass(frozen=True)
class ScoreSpec:
    """What a score model says.

    ``reads``: one number a sample, a step or a token. ``of``: of the whole response, or of the answer alone, which is
    what stands behind the thought. ``steps``: how a response is cut into steps (rewards/steps.py). ``squash``: what
    makes a score of a number; by ``sigmoid`` it is a probability. ``insert``: a token that is put behind each step, and
    read in place of the step's own last one. ``closed``: what the chat template writes behind an answer's stop token is
    read too, as in the model's own training. ``beta``: of an implicit process reward, β·log π/π_ref of each token, with
    ``reference`` the folder of π_ref; 0: the model has a head.
    """

    reads: Reads = "outcome"
    of: Of = "response"
    steps: dict[str, Any] = field(default_factory=dict)
    squash: Squash = "none"
    insert: str = ""
    closed: bool = False
    beta: float = 0.0
    reference: str = ""


_DEFAULTS = dataclasses.asdict(ScoreSpec())
_NEWLINES: dict[str, Any] = {"by": "newline"}
PUBLIC = {
    "linear": ScoreSpec("outcome", closed=True),
    "tokens": ScoreSpec("steps", steps=_NEWLINES, squash="sigmoid"),
    "value": ScoreSpec("steps", steps=_NEWLINES, squash="sigmoid"),
    "two layers": ScoreSpec("outcome", closed=True),
    "two layers, two classes": ScoreSpec("steps", steps=_NEWLINES, squash="sigmoid", insert="<extra_0>"),
}
"""Layout → what its models mean: Skywork-Reward-V2 (linear), transformers' and TRL's PRMs (tokens),
Skywork-o1-Open-PRM (value), Qwen2.5-Math-RM and Qwen2.5-Math-PRM (two layers).
"""


def write(folder: Path, spec: ScoreSpec) -> None:
    """Write scores.json: the four fields that always say something, and of the others those that do."""
    told = dataclasses.asdict(spec)
    always = ("reads", "of", "steps", "squash")
    kept = {name: value for name, value in told.items() if name in always or value != _DEFAULTS[name]}
    (folder / FILE).write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def spec_of(folder: Path, key: str, given: str) -> ScoreSpec:
    """What the model in ``folder`` says. Raises ConfigError, naming ``key`` and what the user gave, where its
    scores.json cannot be read, or it has no score head.
    """
    file = folder / FILE
    if not file.is_file():
        return PUBLIC[_kind(layout_of(folder, key, given), key, given)]
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise refuse(key, given, f"its {FILE} cannot be read ({error}); mend it, or write it anew") from None
    if not isinstance(told, dict):
        raise refuse(key, given, f"its {FILE} holds no JSON object; mend it")
    for name, value in told.items():
        if name not in _DEFAULTS:
            raise refuse(key, given, f"its {FILE} has {name!r}, which nothing reads; there are {', '.join(_DEFAULTS)}")
        if name in ALLOWED and value not in ALLOWED[name]:
            raise refuse(key, given, f"its {FILE} has {name}={value!r}: must be one of {', '.join(ALLOWED[name])}")
        kind = type(_DEFAULTS[name])
        if not isinstance(value, kind) and not (kind is float and isinstance(value, int)):
            raise refuse(key, given, f"its {FILE} has {name}={value!r}: must be of type {kind.__name__}")
    return ScoreSpec(**told)


def _kind(layout: Layout, key: str, given: str) -> str:
    if layout.head == "linear":
        return "tokens" if layout.architecture.endswith("ForTokenClassification") else "linear"
    if layout.head == "none":
        raise ConfigError(
            f"{key}={given}: {layout.architecture or 'the model'} has no score head (score.weight), and no {FILE} says "
            "how it is read; train one with job=reward_model or job=prm, or name a model that has one"
        )
    return "two layers, two classes" if layout.head == "two layers" and layout.labels == 2 else layout.head
