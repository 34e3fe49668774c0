"""Settings of jobs that learn from examples, and of the heads that score. No torch here: `launch.py --help` imports
this.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from offtrail.core.settings import setting
from offtrail.rewards.step_config import StepSettings


@dataclass
class SupervisedConfig:
    """What all jobs have that learn from examples. What they share with job=rl too, such as ranks, dtype, gradient norm
    and checkpoints, stands under learner.
    """

    seed: int = setting(0, "[0, 4294967295]")
    """Keys start weights and the order of examples; it is not run.seed, so that runs of several seeds share a start."""

    steps: int = setting(1000, "[1, inf)")
    """Optimizer updates."""
    batch_size: int = setting(32, "[1, inf)")
    """Examples of an update."""
    lr: float = setting(4e-3, "(0, 10]", resumable="noted")
    """Peak learning rate of AdamW; with model.path 1e-5."""
    betas: tuple[float, float] = setting((0.9, 0.98), "[0, 1)")
    """Decay of AdamW's first and second moment."""
    warmup_steps: int = setting(50, "[0, inf)")
    """Updates of linear warm-up."""
    final_lr_share: float = setting(0.1, "[0, 1]")
    """Cosine decay ends at this share of lr."""


@dataclass
class HeadConfig(SupervisedConfig):
    """What the jobs have that train a model to score answers."""

    lr: float = 1e-3
    path: str = setting("", path="file")
    """Labelled answers (docs/reward_models.md), JSON lines or Parquet; of a folder its train split."""
    eval_path: str = setting("", path="file")
    """Held-out ones, of a folder its test split; empty = held_out_share of `path`, by hash of the prompt."""
    held_out_share: float = setting(0.1, "[0, 1)")
    """Share of the prompts of `path` that is scored at every checkpoint and not trained on; 0 = none."""
    long: Literal["refuse", "drop"] = "refuse"
    """What becomes of answers above model.max_length: an error, or their rows are left out and counted."""


PREFERENCE_FIELDS = ("prompt", "messages", "chosen", "rejected", "answer", "label")
STEP_FIELDS = ("prompt", "messages", "answer", "steps", "labels", "label")


@dataclass
class RewardModelConfig(HeadConfig):
    """job=reward_model: a model that scores answers."""

    objective: Literal["pairwise", "pointwise"] = "pairwise"
    """pairwise: which of two answers is preferred (Bradley–Terry). pointwise: whether one is good, yes or no."""
    of: Literal["auto", "answer", "response"] = "auto"
    """What it reads: the answer behind the thought, or the whole response; auto: the first if pairwise, else the
    second."""
    fields: dict[str, str] = setting({})
    """What a file calls prompt, messages, chosen, rejected, answer or label, as {answer: response, label: is_safe}."""

    def __post_init__(self) -> None:
        """Raise ValueError for a field that no row has."""
        _check_fields("reward_model.fields", self.fields, PREFERENCE_FIELDS)

    @property
    def reads(self) -> Literal["answer", "response"]:
        """What it reads, auto resolved."""
        if self.of != "auto":
            return self.of
        return "answer" if self.objective == "pairwise" else "response"


@dataclass
class PrmConfig(HeadConfig):
    """job=prm: a model that scores the steps of answers."""

    objective: Literal["steps", "implicit"] = "steps"
    """steps: whether each step is good, at its last token. implicit: β·log π/π_ref, learned from outcomes alone."""
    cut: dict[str, Any] = setting({})
    """How an answer is cut into steps, as {by: separator, separator: ";", within: thought}; empty = {by: newline}."""
    labels: Literal["soft", "hard"] = "soft"
    """soft: labels as they stand, from 0 to 1. hard: those of one half and more are 1, all others 0."""
    fields: dict[str, str] = setting({})
    """What a file calls prompt, messages, answer, steps, labels or label, as {steps: solution_steps}."""
    beta: float = setting(0.05, "(0, 1000]")
    """implicit: β."""
    reference: str = setting("", path="model")
    """implicit: π_ref, a Hugging Face directory or name with the model's tokenizer; empty = the start model."""

    def __post_init__(self) -> None:
        """Raise ValueError for a field that no row has, and for a cut that cannot be."""
        _check_fields("prm.fields", self.fields, STEP_FIELDS)
        StepSettings.of(self.cut, "prm.cut")
        if self.reference and self.objective != "implicit":
            raise ValueError(f"prm.reference={self.reference}: is read with prm.objective=implicit; leave it empty")


def _check_fields(key: str, fields: dict[str, str], known: tuple[str, ...]) -> None:
    for name, value in fields.items():
        if name not in known:
            raise ValueError(f"{key}.{name}={value}: unknown; must be one of {', '.join(known)}")
