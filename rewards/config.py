"""Settings of the reward. No torch here: `launch.py --help` imports this."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from offtrail.core.settings import check_limits, setting


@dataclass
class RewardConfig:
    """Weighted sum of named components; the verifiers run in killable worker processes."""

    name: str = "rule"
    """The reward."""
    accuracy_weight: float = setting(1.0, "[0, inf)")
    """Weight of a right answer."""
    format_weight: float = setting(0.1, "[0, inf)")
    """Weight of a well-formed answer."""
    workers: int = setting(1, "[1, inf)", resumable=True)
    """Verifier processes of each generator."""
    deadline_seconds: float = setting(5.0, "(0, inf)")
    """A verifier that takes longer on one group is killed and restarted."""
    on_timeout: Literal["zero", "refuse"] = "zero"
    """What a killed verifier means: every component 0, or the group refused as `failed`."""
    memory_mb: int = setting(1024, "[512, inf)")
    """Address space of each verifier process; one that asks for more fails its group."""

    def __post_init__(self) -> None:
        """Raise ValueError when a value is out of bounds."""
        check_limits(self, "reward")


REWARDS: dict[str, type[RewardConfig]] = {"rule": RewardConfig}
