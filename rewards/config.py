"""Settings of the reward. No torch here: `launch.py --help` imports this."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class RewardConfig:
    """Weighted sum of named components; the verifiers run in killable worker processes."""

    name: str = "rule"
    accuracy_weight: float = 1.0
    format_weight: float = 0.1
    workers: int = 1
    """Verifier processes of each generator."""
    deadline_seconds: float = 5.0
    """A verifier that takes longer on one group is killed and restarted."""
    on_timeout: Literal["zero", "refuse"] = "zero"
    """What a killed verifier means: every component 0, or the group refused as `failed`."""


REWARDS: dict[str, type[RewardConfig]] = {"rule": RewardConfig}
