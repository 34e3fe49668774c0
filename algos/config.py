"""Settings of the objective. No torch here: `launch.py --help` imports this.

An algorithm is an advantage estimator × an objective × an aggregation; what is done about data that an older policy
made is the correction's (algos/correction_config.py). A dataclass per *objective*: what papers vary without changing
the formula (GRPO, Dr. GRPO, DAPO, RLOO, REINFORCE++ share PPO's clip) is an option file in configs/algo/ over the same
class.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from offtrail.core.plugins import is_plugin
from offtrail.core.settings import check_limits, section, setting

Aggregation = Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum_norm", "prompt_mean"]
ADVANTAGES = ("group", "rloo", "reinforce_pp", "reinforce_pp_baseline", "reward", "gae")
KlKind = Literal["none", "k1", "k2", "k3", "k3_weighted", "full"]
Std = Literal["sample", "population", "none"]
Level = Literal["token", "sequence"]
ProcessForm = Literal["sum", "min", "clip", "delta", "clip_delta", "shaping"]
ProcessBaseline = Literal["leave_one_out", "group", "group_std", "none"]


@dataclass
class ProcessConfig:
    """Scores along the way in the advantage: A = A of the rewards + weight·A of the scores (algos/process.py)."""

    channel: str = ""
    """The groups' channel, of axis step or token, that holds the scores; empty = rewards alone."""
    weight: float = setting(1.0, "[0, inf)")
    """Of the scores' advantages beside the rewards'."""
    form: ProcessForm = "sum"
    """What a step's score is worth as a reward: itself, the weakest step's alone, or bounded in the number of steps."""
    baseline: ProcessBaseline = "leave_one_out"
    """Taken from each step's reward: the other samples' mean, the mean of the group's steps (_std: divided too)."""
    gamma: float = setting(1.0, "[0, 1]")
    """Discount from one step to the next; with a critic only form=shaping reads it, and algo.gamma the tokens'."""
    temperature: float = setting(0.1, "(0, inf)")
    """form=min: the smaller, the more the weakest step alone counts."""
    threshold: float = setting(0.0, "(-inf, inf)")
    """form=clip, clip_delta: what lies above it earns nothing."""


@dataclass
class AlgoConfig:
    """What every algorithm has."""

    off_policy: ClassVar[bool] = False
    """Whether the objective holds the ratio to the behaviour policy itself, so that a weight would count it twice."""
    has_ratio: ClassVar[bool] = True
    """Whether the objective holds a ratio at all, which `correction=none` takes to the behaviour policy."""
    level: ClassVar[Level] = "token"
    """Whether ratios, and so importance weights, are per token or geometric means over a sample."""

    name: str = "grpo"
    """The algorithm."""
    loss: str = ""
    """Your own module:function in place of the algorithm's loss of each token; empty = the algorithm's."""
    loss_settings: dict[str, Any] = setting({})
    """Its settings, as {key: value}."""
    advantage: str = "group"
    """Estimator: group (centred in it), rloo (leave-one-out), reinforce_pp, reinforce_pp_baseline (whitened over the
    batch), reward (as it is), gae (a critic), or your own module:function."""
    advantage_settings: dict[str, Any] = setting({})
    """Settings of your own estimator, as {key: value}."""
    std: Std = "sample"
    """Divide centred rewards by this standard deviation (n−1, n, or not at all); also of REINFORCE++'s whitening."""
    std_eps: float = setting(1e-6, "[0, inf)")
    """Added to that standard deviation."""
    aggregation: Aggregation = "token_mean"
    """How per-token losses become one number: over all tokens of the update, or per sample first."""
    kl: KlKind = "none"
    """Estimator of KL(policy‖reference); none = no reference policy. k3_weighted: k3 times the attached ratio."""
    kl_coef: float = setting(0.0, "[0, inf)")
    """Weight of the KL term; needs kl."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Where the KL term stands: a loss at each token (not k1), or (k1, k2, k3) a penalty in each token's reward."""
    ref_refresh: int = setting(0, "[0, inf)")
    """The reference becomes the policy every so many optimizer updates; 0 = it stays the start model."""
    entropy_coef: float = setting(0.0, "[0, inf)")
    """Weight of the entropy bonus."""
    overlong_share: float = setting(0.0, "[0, 1]")
    """DAPO's soft penalty begins at (1 − this)·sampling.max_new_tokens and reaches overlong_penalty at the end."""
    overlong_penalty: float = setting(1.0, "[0, inf)")
    """Taken from the reward of a sample of sampling.max_new_tokens tokens; needs overlong_share."""
    filter_groups: Literal["none", "accuracy", "variance"] = "none"
    """Groups without signal give their place back: main component 0 or 1 throughout, or all rewards equal."""
    process: ProcessConfig = section(ProcessConfig)
    """Step or token scores."""

    @property
    def needs_ref(self) -> bool:
        """Whether a reference policy is held."""
        return self.kl != "none"

    @property
    def needs_values(self) -> bool:
        """Whether a critic is trained."""
        return self.advantage == "gae"

    def __post_init__(self) -> None:
        check_limits(self, "algo")
        if self.advantage not in ADVANTAGES and not is_plugin(self.advantage):
            near = difflib.get_close_matches(self.advantage, ADVANTAGES, n=3)
            hint = f"; nearest: {', '.join(near)}" if near else ""
            raise ValueError(
                f"algo.advantage={self.advantage}: must be one of {', '.join(ADVANTAGES)}, or module:function{hint}"
            )
        for key, plugin in (("loss", bool(self.loss)), ("advantage", is_plugin(self.advantage))):
            if getattr(self, f"{key}_settings") and not plugin:
                raise ValueError(f"algo.{key}_settings: nothing reads them; they are of algo.{key}=module:function")
        if (self.kl_coef > 0) != (self.kl != "none"):
            raise ValueError(
                f"algo.kl_coef={self.kl_coef} with algo.kl={self.kl}: set both (kl=k3 kl_coef=0.001) or neither"
            )
        if self.kl_in == "reward" and self.kl not in ("k1", "k2", "k3"):
            raise ValueError(
                f"algo.kl_in=reward with algo.kl={self.kl}: a reward carries no gradient, so only an estimate of the "
                "sampled token fits: algo.kl=k1, k2 or k3"
            )
        if self.kl_in == "loss" and self.kl == "k1":
            raise ValueError(
                "algo.kl=k1 with algo.kl_in=loss: the expected gradient of k1 as a loss is 0, it pulls nowhere; take "
                "algo.kl=k2 or k3, or algo.kl_in=reward"
            )
        if self.ref_refresh and self.kl == "none":
            raise ValueError(
                f"algo.ref_refresh={self.ref_refresh}: there is no reference; set algo.kl and algo.kl_coef"
            )
        if (self.advantage == "gae") != isinstance(self, PpoConfig):
            raise ValueError(
                f"algo.advantage={self.advantage} with algo={self.name}: gae and its critic belong to algo=ppo, and "
                "algo=ppo without them is algo=grpo"
            )
        if self.process.channel and self.needs_values and self.process.baseline != "none":
            raise ValueError(
                f"algo.process.baseline={self.process.baseline} with algo={self.name}: the critic is the baseline of "
                "step scores too; take algo.process.baseline=none"
            )


@dataclass
class GrpoConfig(AlgoConfig):
    """Group-relative policy optimisation (arXiv:2402.03300, eq. 3): PPO's clip on group advantages. The defaults take
    the mean over all tokens and no KL term; the paper's mean over samples with its k3 is algo=deepseekmath.
    """

    name: str = "grpo"
    clip_low: float = setting(0.2, "[0, 1]")
    """The ratio to the proximal policy is clipped below at 1 − clip_low; 1 = never."""
    clip_high: float = setting(0.2, "[0, inf)")
    """… and above at 1 + clip_high."""
    dual_clip: float = setting(0.0, "[0, inf)")
    """With a negative advantage the ratio also stops counting above this (arXiv:1912.09729, eq. 5); 0 = off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dual_clip and self.dual_clip <= 1 + self.clip_high:
            raise ValueError(
                f"algo.dual_clip={self.dual_clip}: must be > 1 + algo.clip_high = {1 + self.clip_high:g}, or 0 for off"
            )


@dataclass
class CriticConfig:
    """The critic: the policy's architecture with a scalar head, trained by an AdamW of its own."""

    path: str = setting("", path="model")
    """A Hugging Face directory to start its decoder from, of the policy's vocabulary; empty = the start model's."""
    lr: float = setting(1e-3, "[0, 10]", resumable="noted")
    """Constant after the warm-up; with model.path 1e-5."""
    betas: tuple[float, float] = setting((0.9, 0.95), "[0, 1)")
    """Decay of the first and second moment."""
    eps: float = setting(1e-8, "(0, inf)")
    """Added to the root of the second moment."""
    weight_decay: float = setting(0.0, "[0, inf)")
    """Decoupled."""
    grad_clip: float = setting(1.0, "(0, inf)", resumable="noted")
    """Largest gradient norm."""
    warmup_updates: int = setting(0, "[0, inf)")
    """Optimizer updates of linear warm-up."""
    pretrain_steps: int = setting(0, "[0, inf)")
    """Learner steps at the start that train the critic alone; their versions hold the same policy."""


@dataclass
class PpoConfig(GrpoConfig):
    """PPO with a critic (arXiv:1707.06347): generalised advantage estimation at each token."""

    name: str = "ppo"
    advantage: str = "gae"
    dual_clip: float = 3.0
    std: Std = "sample"
    """Whitening of the advantages over the batch (n−1, n, or none)."""
    gamma: float = setting(1.0, "[0, 1]")
    """Discount from one token to the next."""
    gae_lambda: float = setting(1.0, "[0, 1]")
    """λ of the policy's advantages; 1 = return minus value, 0 = one-step errors."""
    gae_alpha: float = setting(0.0, "[0, inf)")
    """Length-adaptive λ = 1 − 1/(α·length) in its place (VAPO, arXiv:2504.05118, eq. 9); 0 = off."""
    value_lambda: float = setting(1.0, "[0, 1]")
    """λ of the returns that the critic learns."""
    value_clip: float = setting(0.2, "[0, inf)")
    """The value may move so far from its old one before the larger loss counts; 0 = no clip."""
    critic: CriticConfig = section(CriticConfig)


@dataclass
class GspoConfig(AlgoConfig):
    """Group sequence policy optimisation (arXiv:2507.18071, eq. 5): one clipped geometric-mean ratio a sample."""

    level: ClassVar[Level] = "sequence"

    name: str = "gspo"
    aggregation: Aggregation = "seq_mean_token_mean"
    clip_low: float = setting(3e-4, "[0, 1]")
    """The sample's ratio is clipped below at 1 − clip_low."""
    clip_high: float = setting(4e-4, "[0, inf)")
    """… and above at 1 + clip_high."""


@dataclass
class CispoConfig(AlgoConfig):
    """CISPO (MiniMax-M1, arXiv:2506.13585, eq. 4): −sg(clip(r))·A·log π; every token keeps a gradient."""

    name: str = "cispo"
    clip_low: float = setting(0.0, "[0, 1]")
    """The ratio's weight is at least this: an absolute floor, not a distance from 1; 0 = none."""
    clip_high: float = setting(5.0, "[1, inf)")
    """… and at most this: the absolute cap itself, not a distance from 1 (others write 1 + ε)."""

    def __post_init__(self) -> None:
        if self.clip_high < 1:  # the mistake that readers of other papers make: it has a sentence of its own
            raise ValueError(f"algo.clip_high={self.clip_high}: must be ≥ 1, it is the cap of the ratio itself")
        super().__post_init__()


@dataclass
class SapoConfig(AlgoConfig):
    """SAPO (arXiv:2511.20347): a sigmoid gate (4/τ)·σ(τ(r − 1)) in place of the clip."""

    name: str = "sapo"
    aggregation: Aggregation = "seq_mean_token_mean"
    tau_positive: float = setting(1.0, "(0, inf)")
    """Steepness of the gate for positive advantages."""
    tau_negative: float = setting(1.05, "(0, inf)")
    """… and for the others: steeper, so their gradients fade faster."""


@dataclass
class ToprConfig(AlgoConfig):
    """Tapered off-policy REINFORCE (arXiv:2503.14286, eq. 9): positives at weight 1, negatives at min(∏ρ, cap)."""

    off_policy: ClassVar[bool] = True

    name: str = "topr"
    std: Std = "none"
    cap: float = setting(1.0, "[1, inf)")
    """Largest weight of a negative sample: its sequence ratio is truncated here."""


@dataclass
class AipoConfig(AlgoConfig):
    """AIPO (LlamaRL, arXiv:2505.24034): −sg(min(ρ, cap))·A·log π, one-sided."""

    off_policy: ClassVar[bool] = True

    name: str = "aipo"
    cap: float = setting(4.0, "[1, inf)")
    """The ratio to the behaviour policy is truncated here; the paper uses 2–10."""


@dataclass
class AspoConfig(AlgoConfig):
    """ASPO (arXiv:2510.06062): positive advantages get the ratio turned over, so that unlikely tokens weigh more."""

    name: str = "aspo"
    clip_low: float = setting(0.2, "[0, 1]")
    """Negative advantages: PPO's clip below at 1 − clip_low."""
    clip_high: float = setting(0.2, "[0, inf)")
    """Positive advantages: no gradient above 1 + clip_high."""
    cap: float = setting(3.0, "[1, inf)")
    """Largest weight 1/r of a positive token, and where a negative token's ratio stops counting."""


@dataclass
class BapoConfig(AlgoConfig):
    """BAPO (arXiv:2510.18927): clip bounds move until positive tokens carry their share of the update. The authors'
    code (github.com/WooooDyy/BAPO) is counted=clipped; algos/update.py says what that changes.
    """

    off_policy: ClassVar[bool] = True

    name: str = "bapo"
    low_start: float = setting(0.6, "[0, 1]")
    """The lower bound of the ratio to the behaviour policy begins here (a ratio, not a distance from 1) …"""
    low_end: float = setting(0.9, "[0, 1]")
    """… and is raised first, up to this."""
    low_step: float = setting(0.02, "(0, inf)")
    """Size of a step of the lower bound."""
    high_start: float = setting(1.2, "[1, inf)")
    """The upper bound begins here …"""
    high_end: float = setting(3.0, "[1, inf)")
    """… and is raised next, up to this."""
    high_step: float = setting(0.05, "(0, inf)")
    """Size of a step of the upper bound."""
    positive_share: float = setting(0.5, "[0, 1]")
    """Both stop where positive tokens make up this share of Σ ratio·|advantage|."""
    counted: Literal["unclipped", "clipped"] = "unclipped"
    """Of a token beyond its bound that sum holds nothing, as its gradient is 0, or (clipped) the bound·|advantage|."""
    dual_clip: float = setting(3.0, "[0, inf)")
    """With a negative advantage the ratio stops counting above this; 0 = off, and one token may weigh e^20."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if 0 < self.dual_clip < 1:
            raise ValueError(f"algo.dual_clip={self.dual_clip}: must be ≥ 1, or 0 for off")
        if not self.low_start <= self.low_end <= 1 <= self.high_start <= self.high_end:
            raise ValueError(
                f"algo.low_start={self.low_start}: needs low_start ≤ low_end={self.low_end} ≤ 1 ≤ "
                f"high_start={self.high_start} ≤ high_end={self.high_end}"
            )


@dataclass
class OpmdConfig(AlgoConfig):
    """Online policy mirror descent (Kimi k1.5, arXiv:2501.12599, eq. 3): −(R − R̄)·log π + (τ/2)(log π − log π_beh)²."""

    off_policy: ClassVar[bool] = True

    name: str = "opmd"
    std: Std = "none"
    tau: float = setting(0.1, "[0, inf)")
    """Strength of the pull to the behaviour policy."""
    square_of: Level = "token"
    """The square is of each token's log-ratio, or, as in the paper, of the whole answer's (split over its tokens)."""


@dataclass
class DppoConfig(AlgoConfig):
    """DPPO with the total-variation mask (arXiv:2602.04879; prime-rl's default loss): −keep·ρ·A + penalty·(log ρ)²."""

    off_policy: ClassVar[bool] = True

    name: str = "dppo"
    std: Std = "none"
    mask_low: float = setting(0.2, "[0, 1]")
    """A token of negative advantage is left out when its probability fell by more than this, …"""
    mask_high: float = setting(0.2, "[0, 1]")
    """… one of positive advantage when it rose by more."""
    penalty: float = setting(1e-3, "[0, inf)")
    """Weight of (log ρ)², at every token."""


@dataclass
class ReinforceConfig(AlgoConfig):
    """REINFORCE: −A·log π. What an older policy made is put right by the correction's weight alone, or not at all."""

    has_ratio: ClassVar[bool] = False

    name: str = "reinforce"


ALGOS: dict[str, type[AlgoConfig]] = {
    "grpo": GrpoConfig,
    "ppo": PpoConfig,
    "gspo": GspoConfig,
    "cispo": CispoConfig,
    "sapo": SapoConfig,
    "topr": ToprConfig,
    "aipo": AipoConfig,
    "aspo": AspoConfig,
    "bapo": BapoConfig,
    "opmd": OpmdConfig,
    "dppo": DppoConfig,
    "reinforce": ReinforceConfig,
}
