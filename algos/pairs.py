"""Which objective and which correction stand together, and what the two need. No torch."""

from __future__ import annotations

from offtrail.algos.config import AlgoConfig, BapoConfig, GrpoConfig
from offtrail.algos.correction_config import CorrectionConfig, M2poConfig, VcpoConfig, WeightConfig


def incompatible(algo: AlgoConfig, correction: CorrectionConfig) -> str | None:
    """Why the two cannot stand together, as one line that names the keys and the way out; None where they can."""
    if algo.off_policy and correction.name not in ("none", "seq_mask"):
        return (
            f"correction={correction.name} with algo={algo.name}: the objective holds the ratio to the behaviour "
            "policy itself, and a weight or another anchor would count it twice; take correction=none or seq_mask"
        )
    if correction.name in ("none", "seq_mask") and not (algo.has_ratio or algo.loss):
        return (
            f"correction={correction.name} with algo={algo.name}: the objective has no ratio that could hold the "
            "importance weight; take correction=tis, or uncorrected to do without one"
        )
    if isinstance(correction, M2poConfig) and not isinstance(algo, GrpoConfig):
        return f"correction=m2po with algo={algo.name}: its mask takes the place of PPO's clip; take algo=grpo"
    if isinstance(correction, VcpoConfig) and correction.baseline != "none" and algo.advantage == "gae":
        return f"correction.baseline={correction.baseline} with algo={algo.name}: the critic is the baseline; take none"
    if isinstance(correction, VcpoConfig) and correction.baseline != "none" and algo.process.channel:
        return (
            f"correction.baseline={correction.baseline} with algo.process.channel={algo.process.channel}: it makes the "
            "advantages of the rewards alone; take correction.baseline=none"
        )
    return None


def needs_whole_update(algo: AlgoConfig, correction: CorrectionConfig) -> bool:
    """Whether `algos.update.prepare_update` must see the log-probabilities of every token of an update before it."""
    return (
        isinstance(algo, BapoConfig)
        or isinstance(correction, M2poConfig | VcpoConfig)
        or (isinstance(correction, WeightConfig) and correction.normalise)
    )
