"""The fixed-text probe (I5): learner and engine take the log-probabilities of the same tokens under the same version.

The learner publishes its numbers with every weights.probe_every-th version; each generator compares its engine's when
it has applied that version. Not trained on and not sampled: what differs is numerics, a wrong weight, or a wrong
temperature, never the policy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from offtrail.core.types import Float32, Int32
from offtrail.platform.config.errors import FinalError

PROMPT_TOKENS, OUTPUT_TOKENS = 8, 24


class MismatchError(FinalError):
    """Engine and learner disagree by more than weights.probe_alarm: training on such data would be off by as much."""


def probe_text(vocab_size: int) -> tuple[Int32, Int32]:
    """(prompt [8], output [24]): token ids spread over the vocabulary, the same in every role."""
    ids = (np.arange(PROMPT_TOKENS + OUTPUT_TOKENS, dtype=np.int64) * 7919 + 11) % vocab_size
    return ids[:PROMPT_TOKENS].astype(np.int32), ids[PROMPT_TOKENS:].astype(np.int32)


def compare(
    engine: Float32, learner: Sequence[float], *, version: int, alarm: float, rounded: bool = False
) -> dict[str, float]:
    """mismatch/probe_* of one version. Raises MismatchError when mean |Δ| exceeds ``alarm`` nats (0: never).

    ``rounded``: one of the two computes in bfloat16, whose error grows with the logits. Then ``alarm`` is for each nat
    of the text's mean −log p, which is 10 and more under a trained model: to it these tokens are nonsense.
    """
    theirs = np.asarray(learner, np.float64)
    delta = theirs - engine.astype(np.float64)
    mean = float(np.abs(delta).mean())
    allowed = alarm * max(1.0, -float(theirs.mean())) if rounded else alarm
    if alarm and not mean <= allowed:
        way = f", {allowed:.2g} here: raise it" if rounded else ": use one dtype for engine and learner, or raise it"
        raise MismatchError(
            f"engine and learner disagree by {mean:.3g} nats a token on the fixed text under version {version}; "
            f"weights.probe_alarm={alarm:g}{way} (0 = never fail)"
        )
    return {
        "mismatch/probe_abs_dlogp_mean": mean,
        "mismatch/probe_abs_dlogp_max": float(np.abs(delta).max()),
        "mismatch/probe_k3": float(np.mean([math.expm1(d) - d for d in delta])),
    }
