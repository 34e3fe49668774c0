"""Settings of the objective. No torch here: `launch.py --help` imports this."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Aggregation = Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum_norm", "prompt_mean"]
KlKind = Literal["none", "k1", "k2", "k3"]


@dataclass
class AlgoConfig:
    """What every algorithm has."""

    name: str = "grpo"
    """The algorithm."""
    aggregation: Aggregation = "token_mean"
    """How per-token losses become one number: over all tokens of the update, or per sample first."""
    kl: KlKind = "none"
    """Estimator of KL(policy‖reference) in the loss; none = no reference policy is held."""
    kl_coef: float = 0.0
    """Weight of the KL term; needs kl."""


@dataclass
class GrpoConfig(AlgoConfig):
    """Group-relative policy optimisation (arXiv:2402.03300, eq. 3)."""

    name: str = "grpo"
    clip_low: float = 0.2
    """The ratio to the proximal policy is clipped below at 1 − clip_low."""
    clip_high: float = 0.2
    """… and above at 1 + clip_high."""
    std: Literal["sample", "population", "none"] = "sample"
    """Divide the centred rewards of a group by this standard deviation (n−1, n, or not at all)."""
    std_eps: float = 1e-6
    """Added to that standard deviation."""

    def __post_init__(self) -> None:
        if not 0 <= self.clip_low <= 1:
            raise ValueError(f"algo.clip_low={self.clip_low}: must lie in [0, 1]")
        if self.clip_high < 0:
            raise ValueError(f"algo.clip_high={self.clip_high}: must be ≥ 0")
        if self.kl_coef < 0 or (self.kl_coef > 0) != (self.kl != "none"):
            raise ValueError(
                f"algo.kl_coef={self.kl_coef} with algo.kl={self.kl}: set both (kl=k3 kl_coef=0.001) or neither"
            )


@dataclass
class CorrectionConfig:
    """What is done about data that an older policy made. `none` trusts the behaviour log-probabilities as proximal."""

    name: str = "none"
    """none: the ratio is to the behaviour policy itself (r = π_θ/π_beh), with no further weight."""


@dataclass
class TisConfig(CorrectionConfig):
    """Token-level truncated importance sampling on w = π_prox/π_beh (arXiv:2505.24298, eq. 5, w truncated)."""

    name: str = "tis"
    cap: float = 2.0
    """w is truncated here."""

    def __post_init__(self) -> None:
        if self.cap <= 0:
            raise ValueError(f"correction.cap={self.cap}: must be > 0")


@dataclass
class DecoupledConfig(CorrectionConfig):
    """Decoupled PPO: clip around the proximal policy, weight by the full w = π_prox/π_beh (AReaL, arXiv:2505.24298)."""

    name: str = "decoupled"


ALGOS: dict[str, type[AlgoConfig]] = {"grpo": GrpoConfig}
CORRECTIONS: dict[str, type[CorrectionConfig]] = {
    "none": CorrectionConfig,
    "tis": TisConfig,
    "decoupled": DecoupledConfig,
}
