"""The score heads that models are published with, as their files tell it. No torch.

    linear      score.weight [n, H] (and .bias): transformers' classifiers of sequences or tokens, n = 1 or 2 classes
    two layers  score.0, ReLU, score.2 [n, H]: Qwen2.5-Math-RM (n = 1) and Qwen2.5-Math-PRM (n = 2)
    value       v_head.summary.weight [1, H] and .bias: TRL's value head, as in Skywork-o1-Open-PRM

Two classes make one number, the second logit minus the first, whose sigmoid is the probability of the second.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from offtrail.platform.config.errors import refuse
from offtrail.platform.model.folder import tensors_of

Head = Literal["none", "linear", "two layers", "value"]
LAST = {"linear": "score.weight", "two layers": "score.2.weight", "value": "v_head.summary.weight"}
"""Head → the matrix whose rows are its classes."""


@dataclass(frozen=True)
class Layout:
    """``labels``: classes of the head, 0 where there is none. ``architecture``: as config.json names it."""

    head: Head
    labels: int
    architecture: str


def layout_of(folder: Path, key: str, given: str) -> Layout:
    """The head of the model in ``folder``. Raises ConfigError, naming ``key`` and what the user gave, where its files
    cannot be read, or the head is of another shape than these.
    """
    shapes = tensors_of(key, given, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    architecture = next(iter(config.get("architectures") or ()), "")
    heads: tuple[Head, ...] = ("two layers", "linear", "value")
    head: Head = next((head for head in heads if LAST[head] in shapes), "none")
    if head == "none":
        return Layout("none", 0, architecture)
    name, width = LAST[head], config.get("hidden_size")
    shape = shapes[name]
    if len(shape) != 2 or shape[1] != width or not 1 <= shape[0] <= (1 if head == "value" else 2):
        raise refuse(
            key, given, f"its score head is of the wrong shape: {name} is {list(shape)}, must be [1, {width}] for one "
            f"number or [2, {width}] for two classes; name a model with such a head"
        )  # fmt: skip
    return Layout(head, shape[0], architecture)


def require_trained_head(key: str, given: str, folder: Path) -> None:
    """Raise ConfigError where the model has a score head that cannot be trained, or one of a wrong shape."""
    if (head := layout_of(folder, key, given).head) not in ("none", "linear"):
        raise refuse(
            key, given, f"its score head ({head}) can be asked, but not trained and saved as transformers' classifiers "
            "are; name the language model that it was made from, or a model with a linear head"
        )  # fmt: skip
