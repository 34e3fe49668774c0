"""From completions to one columnar group: what every driver ends with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from offtrail.core.protocols import Completion
from offtrail.core.types import FINISH_REASONS, Group, Int32, Lease


def assemble(
    lease: Lease, prompt_tokens: Int32, temperature: float, generator: str, samples: Sequence[Completion]
) -> Group:
    """The group whose samples are the completions, in the order given; rewards are still zero.

    Raises ValueError when there is none.
    """
    if not samples:
        raise ValueError(f"group {lease.group}: the driver made no sample")
    return Group(
        group=lease.group,
        slot=lease.slot,
        attempt=lease.attempt,
        problem=lease.problem,
        generator=generator,
        temperature=temperature,
        prompt_tokens=prompt_tokens,
        lengths=np.array([len(c.tokens) for c in samples], np.int32),
        tokens=np.concatenate([c.tokens for c in samples]).astype(np.int32, copy=False),
        logprobs=np.concatenate([c.logprobs for c in samples]).astype(np.float32, copy=False),
        versions=np.concatenate([c.versions for c in samples]).astype(np.int32, copy=False),
        finish=np.array([FINISH_REASONS.index(c.finish) for c in samples], np.uint8),
        rewards=np.zeros(len(samples), np.float32),
        components={},
        times=np.array([c.times for c in samples], np.float64),
    )


def continued(sample: Completion, cut: int, rest: Completion) -> Completion:
    """The first ``cut`` tokens of a sample and then the whole of ``rest``, which was asked to go on from them: each
    token keeps its log-probability and its version, and the sample began when the first one did.
    """
    return replace(
        rest,
        tokens=np.concatenate([sample.tokens[:cut], rest.tokens]),
        logprobs=np.concatenate([sample.logprobs[:cut], rest.logprobs]),
        versions=np.concatenate([sample.versions[:cut], rest.versions]),
        times=(*sample.times[:2], rest.times[2]),
    )
