"""Settings of the reward. No torch here: `launch.py --help` imports this."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class RewardConfig:
    """Weighted sum of named components; the verifiers run in killable worker processes."""

    name: str = "rule"
    """The reward."""
    accuracy_weight: float = 1.0
    """Weight of a right answer."""
    format_weight: float = 0.1
    """Weight of a well-formed answer."""
    workers: int = 1
    """Verifier processes of each generator."""
    deadline_seconds: float = 5.0
    """A verifier that takes longer on one group is killed and restarted."""
    on_timeout: Literal["zero", "refuse"] = "zero"
    """What a killed verifier means: every component 0, or the group refused as `failed`."""
    memory_mb: int = 1024
    """Address space of each verifier process; one that asks for more fails its group."""

    def __post_init__(self) -> None:
        """Raise ValueError when a value is out of bounds."""
        for key, least in (("workers", 1), ("memory_mb", 512)):
            if getattr(self, key) < least:
                raise ValueError(f"reward.{key}={getattr(self, key)}: must be at least {least}")
        if not self.deadline_seconds > 0:
            raise ValueError(f"reward.deadline_seconds={self.deadline_seconds}: must be above 0")


REWARDS: dict[str, type[RewardConfig]] = {"rule": RewardConfig}
