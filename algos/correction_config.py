"""Settings of the off-policy corrections: what is done about data that an older policy made. No torch here either.

A dataclass per correction; what each computes stands in algos/corrections.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from offtrail.core.settings import check_limits, setting

Age = Literal["trained", "made"]


@dataclass
class CorrectionConfig:
    """What is done about data that an older policy made. `none` trusts the behaviour log-probabilities as proximal."""

    needs_prox: ClassVar[bool] = False
    """Whether log-probabilities from before the batch's first update are needed in the later ones."""
    weighted: ClassVar[bool] = False
    """Whether the loss is multiplied by an importance weight."""

    name: str = "none"
    """none: the objective's ratio is to the behaviour policy itself (r = π_θ/π_beh), with no further weight."""

    def __post_init__(self) -> None:
        check_limits(self, "correction")


@dataclass
class UncorrectedConfig(CorrectionConfig):
    """Nothing is put right: clip around the proximal policy, as if the data were its own. What corrections are
    measured against.
    """

    needs_prox: ClassVar[bool] = True

    name: str = "uncorrected"


@dataclass
class WeightConfig(CorrectionConfig):
    """Corrections that weigh by w = π_prox/π_beh."""

    needs_prox: ClassVar[bool] = True
    weighted: ClassVar[bool] = True

    normalise: bool = False
    """Divide the weights, truncated first, by their mean over the update's tokens (seq_tis, vcpo: samples)."""


@dataclass
class DecoupledConfig(WeightConfig):
    """Decoupled PPO: clip around the proximal policy, weight by the full w = π_prox/π_beh (AReaL, arXiv:2505.24298).
    No cap but the clamp of log w at 20: a token of which the learner thinks otherwise may weigh 4.9e8. `tis` has one.
    """

    name: str = "decoupled"


@dataclass
class A3poConfig(WeightConfig):
    """Decoupled PPO without the proximal forward (A-3PO, arXiv:2512.06547): log π_prox = log π_beh + α·(log π_θ −
    log π_beh), α = (d − 1)/d by the token's age d. Its weight has no cap.
    """

    needs_prox: ClassVar[bool] = False

    name: str = "a3po"
    age: Age = "trained"
    """d counts to the version that is being trained (the paper, AReaL; d = 0: α = 0), or to the one being made, one
    more, so that π_prox itself lies at d − 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.normalise:
            raise ValueError("correction.normalise=true with correction=a3po: its weights follow θ; take decoupled")


@dataclass
class TisConfig(WeightConfig):
    """Token-level truncated importance sampling on w = π_prox/π_beh (arXiv:2505.24298, eq. 5, w truncated). The
    default: what engine and learner do not agree on cannot become the whole update.
    """

    name: str = "tis"
    cap: float = setting(2.0, "(0, inf)")
    """w is truncated here."""


@dataclass
class SeqTisConfig(WeightConfig):
    """Sequence-level truncated importance sampling: every token weighs min(∏w, cap)."""

    name: str = "seq_tis"
    cap: float = setting(5.0, "(0, inf)")
    """The product of w over a sample is truncated here."""


@dataclass
class VcpoConfig(SeqTisConfig):
    """VCPO (arXiv:2602.17616): sequence weights, a step scaled by √(ESS/B), and the least-variance baseline."""

    name: str = "vcpo"
    cap: float = 8.0
    baseline: Literal["none", "group", "batch"] = "none"
    """Advantages become R − Σw²‖g‖²R/Σw²‖g‖², over each group or over the update; none = the algorithm's own."""


@dataclass
class IcepopConfig(WeightConfig):
    """IcePop (Ring-1T, arXiv:2510.18855): w where low ≤ w ≤ high, nothing elsewhere."""

    name: str = "icepop"
    low: float = setting(0.5, "[0, 1]")
    """Tokens of a smaller w are left out, …"""
    high: float = setting(5.0, "[1, inf)")
    """… and of a larger one."""


@dataclass
class FilterConfig(CorrectionConfig):
    """Corrections that leave whole samples out, clip around the proximal policy, and may weigh what stays."""

    needs_prox: ClassVar[bool] = True

    cap: float = setting(0.0, "[0, inf)")
    """What stays weighs min(w, cap) at each token; 0 = it weighs 1."""


@dataclass
class GeoConfig(FilterConfig):
    """Geometric filter: a sample stays where low ≤ exp(mean log w) ≤ high."""

    name: str = "geo"
    low: float = setting(0.999, "[0, 1]")
    """Samples of a smaller mean are left out, …"""
    high: float = setting(1.001, "[1, inf)")
    """… and of a larger one."""


@dataclass
class K3FilterConfig(FilterConfig):
    """k3 filter: a sample stays where its mean w − 1 − log w is at most limit."""

    name: str = "k3_filter"
    limit: float = setting(0.01, "(0, inf)")
    """Largest mean k3 of a sample that stays, in nats."""


@dataclass
class VetoConfig(FilterConfig):
    """Veto: one token with w below floor leaves its whole sample out; the others weigh min(w, cap)."""

    name: str = "veto"
    cap: float = 2.0
    floor: float = setting(1e-4, "[0, inf)")
    """Smallest w of a token that does not leave its sample out."""


@dataclass
class SeqMaskConfig(CorrectionConfig):
    """DeepSeek-V3.2's off-policy mask (arXiv:2512.02556, eq. 9): bad samples that the policy has moved away from."""

    name: str = "seq_mask"
    limit: float = setting(0.5, "[0, inf)")
    """A sample of negative advantage is left out where the mean of log π_beh − log π_θ exceeds this, in nats."""


@dataclass
class M2poConfig(CorrectionConfig):
    """M2PO (arXiv:2510.01161): in place of the clip, the farthest tokens are masked until (log r)² is small."""

    name: str = "m2po"
    limit: float = setting(0.04, "(0, inf)")
    """Largest mean (log r)² over the tokens that stay, of those that a clip could act on."""


CORRECTIONS: dict[str, type[CorrectionConfig]] = {
    "none": CorrectionConfig,
    "uncorrected": UncorrectedConfig,
    "decoupled": DecoupledConfig,
    "a3po": A3poConfig,
    "tis": TisConfig,
    "seq_tis": SeqTisConfig,
    "icepop": IcepopConfig,
    "geo": GeoConfig,
    "k3_filter": K3FilterConfig,
    "veto": VetoConfig,
    "m2po": M2poConfig,
    "seq_mask": SeqMaskConfig,
    "vcpo": VcpoConfig,
}
