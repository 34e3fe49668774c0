"""The `sample` driver: G independent answers to one prompt. The baseline that every search is compared with."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from offtrail.core.protocols import Completion, Request
from offtrail.core.types import FINISH_REASONS, Group, Int32, Lease, Sampling


def assemble(lease: Lease, prompt_tokens: Int32, temperature: float, generator: str, done: list[Completion]) -> Group:
    """One columnar group out of its completions (any order), rewards still zero.

    Raises ValueError when the completions are not exactly samples 0…G−1.
    """
    done = sorted(done, key=lambda c: c.index)
    if [c.index for c in done] != list(range(lease.samples)):
        raise ValueError(f"group {lease.group}: samples {[c.index for c in done]}, expected 0…{lease.samples - 1}")
    return Group(
        group=lease.group,
        slot=lease.slot,
        attempt=lease.attempt,
        problem=lease.problem,
        generator=generator,
        temperature=temperature,
        prompt_tokens=prompt_tokens,
        lengths=np.array([len(c.tokens) for c in done], np.int32),
        tokens=np.concatenate([c.tokens for c in done]).astype(np.int32, copy=False),
        logprobs=np.concatenate([c.logprobs for c in done]).astype(np.float32, copy=False),
        versions=np.concatenate([c.versions for c in done]).astype(np.int32, copy=False),
        finish=np.array([FINISH_REASONS.index(c.finish) for c in done], np.uint8),
        rewards=np.zeros(len(done), np.float32),
        components={},
        times=np.array([c.times for c in done], np.float64),
    )


@dataclass
class SampleDriver:
    """G independent samples; the prompt is prefilled once for all of them."""

    sampling: Sampling
    generator: str
    _lease: Lease = field(init=False)
    _prompt: Int32 = field(init=False)
    _done: list[Completion] = field(init=False, default_factory=list)

    def start(self, lease: Lease, prompt_tokens: Int32) -> list[Request]:
        """One request for all G samples, under the group's id (which keys its randomness)."""
        self._lease, self._prompt = lease, prompt_tokens
        return [Request(lease.group, prompt_tokens, lease.samples, self.sampling)]

    def finished(self, completion: Completion) -> tuple[list[Request], Group | None]:
        """The group, once its last sample is there; never further requests."""
        self._done.append(completion)
        if len(self._done) < self._lease.samples:
            return [], None
        return [], assemble(self._lease, self._prompt, self.sampling.temperature, self.generator, self._done)
