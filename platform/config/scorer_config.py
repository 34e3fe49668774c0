"""Settings of neural scores. No torch here: `launch.py --help` imports this."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

from offtrail.core.settings import section, setting
from offtrail.rewards.config import COMPONENTS
from offtrail.rewards.step_config import Aggregate, StepSettings

CHOICES: dict[str, tuple[str, ...]] = {
    "reads": ("outcome", "steps", "tokens"),
    "of": ("answer", "response"),
    "squash": ("none", "sigmoid"),
    "aggregate": get_args(Aggregate),
}
TYPES: dict[str, type] = {"path": str, "steps": dict, "insert": str, "closed": bool, "beta": float, "reference": str}
ENTRY = (*TYPES, *CHOICES, "empty")
"""What an entry of scorer.models may say; all but path, aggregate and empty stand in a model's scores.json too."""
TAKEN = (
    "accuracy", "proxy", "version", "prompts", "prompts_without_room", "length_mean", "truncated_share", "behaviour",
    "answered", "truncated", "length", "samples",
)  # fmt: skip
"""What eval/NAME and the measures of job=eval mean already."""
NAME = re.compile(r"[A-Za-z_][\w-]*", re.ASCII)


@dataclass
class RefreshConfig:
    """How a model of scorer.models is trained while the run trains the policy (scorer.refresh_every)."""

    model: str = ""
    """Which of scorer.models; empty = the only one."""
    method: Literal["outcome", "rollouts", "exact"] = "outcome"
    """Labels of the policy's answers. outcome: the verifier's verdict on the whole answer. Of steps also rollouts:
    answers that the policy goes on to from their ends; exact: the task's own checker."""
    rollouts: int = setting(4, "[1, 65536]")
    """rollouts: answers from the end of each step."""
    labels: Literal["soft", "hard"] = "soft"
    """rollouts: a step's label is the share of right answers from its end, or whether any is right."""
    groups: int = setting(64, "[1, 65536]")
    """The most groups that are labelled for a version: of those trained on since the one before, the newest."""
    updates: int = setting(8, "[0, inf)")
    """Optimizer updates of a version; 0 = none: the model stays as it is, and is measured on the labels."""
    batch_size: int = setting(32, "[1, inf)")
    """Labelled answers (of a pairwise reward model: pairs) of an update."""
    lr: float = setting(1e-5, "(0, 10]", resumable="noted")
    """Learning rate of AdamW, constant."""
    betas: tuple[float, float] = setting((0.9, 0.98), "[0, 1)")
    """Decay of AdamW's first and second moment."""
    keep: int = setting(2, "[2, inf)", resumable=True)
    """Versions that runs/NAME/scorers keeps, the newest."""
    device: str = "cpu"
    """cpu, cuda or cuda:N: where it trains and makes rollouts."""
    threads: int = setting(1, "[1, 1024]", resumable=True)
    """torch threads."""
    max_restarts: int = setting(3, "[0, inf)", resumable=True)
    """A refresher that dies is started again so often in one launch; then the run fails."""


@dataclass
class ScorerConfig:
    """Models that score every group of answers (docs/scorer.md)."""

    models: dict[str, dict[str, Any]] = setting({})
    """Name → a model that scores, as {rm: {path: DIR}}: a folder or a run, and what is to be otherwise than its
    scores.json says. The name is that of its component, which reward.weights may weigh, and of its channel."""
    count: int = setting(1, "[0, 1024]", resumable=True)
    """Scorer processes, where there are models; each holds all of them."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the models' products; weights are kept in float32."""
    threads: int = setting(1, "[1, 1024]", resumable=True)
    """torch threads of each scorer."""
    tokens_per_batch: int = setting(16_384, "[1, inf)", resumable=True)
    """Tokens of one forward pass, of the requests of all generators together; with staleness.mode=exact each request is
    by itself."""
    refresh_every: int = setting(0, "[0, inf)")
    """Learner steps between two versions of a model that is trained in the run; 0 = never. Nobody waits for one."""
    refresh: RefreshConfig = section(RefreshConfig)
    on_refresh: Literal["finish", "again"] = "finish"
    """New weights: what was asked before is answered under the old ones first, or scored again under the new."""
    deadline_seconds: float = setting(300.0, "(0, 1e9]", resumable=True)
    """The longest that a group waits for its scores."""
    on_deadline: Literal["fail", "refuse"] = setting("fail", resumable=True)
    """What it means then: the run fails and says for whom it waited, or the group is refused as `unscored`."""
    hang_seconds: float = setting(60.0, "(0, 1e9]", resumable=True)
    """A scorer that is asked and says nothing for so long is passed over: another is asked the same."""
    max_restarts: int = setting(3, "[0, inf)", resumable=True)
    """A scorer that dies is started again so often in one launch; then the run fails."""
    address: str = setting("", resumable=True)
    """Address to bind, as broker.address, which it is where this is empty."""

    def __post_init__(self) -> None:
        """Raise ValueError for a name or an entry of models that cannot be."""
        for name, entry in self.models.items():
            if not NAME.fullmatch(name) or name in (*COMPONENTS, *TAKEN):
                raise ValueError(
                    f"scorer.models.{name}: a name is letters, digits, - and _, and none that means something already: "
                    f"{', '.join((*COMPONENTS, *TAKEN))}"
                )
            _check_entry(f"scorer.models.{name}", entry)

    @property
    def refreshed(self) -> str:
        """The name of the model that is trained in the run; empty where none is."""
        return (self.refresh.model or next(iter(self.models), "")) if self.refresh_every else ""


def _check_entry(key: str, entry: dict[str, Any]) -> None:
    for name, value in entry.items():
        if name not in ENTRY:
            raise ValueError(f"{key}.{name}={value}: unknown; must be one of {', '.join(ENTRY)}")
        if name in CHOICES and value not in CHOICES[name]:
            raise ValueError(f"{key}.{name}={value}: must be one of {', '.join(CHOICES[name])}")
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if name in TYPES and not (number if TYPES[name] is float else isinstance(value, TYPES[name])):
            kinds = {str: "a text", dict: "a mapping", bool: "true or false", float: "a number"}
            raise ValueError(f"{key}.{name}={value}: must be {kinds[TYPES[name]]}")
        if name == "empty" and not number:
            raise ValueError(f"{key}.empty={value}: must be a number, the score of an answer without text")
    if not entry.get("path"):
        raise ValueError(f"{key}.path=: a model is needed: {key}.path=DIR, a Hugging Face folder or a run")
    StepSettings.of(entry.get("steps", {}), f"{key}.steps")
