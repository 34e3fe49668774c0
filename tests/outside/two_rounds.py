"""A driver that lives outside the package: `search=two_rounds:TwoRounds` with this folder on PYTHONPATH.

round 1: half of the group ──► a verdict on it ──► round 2: `more` answers that go on from half of the best one
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from offtrail.core.protocols import Answer, Ask, Cancel, Completion, Generate, Verdict, Verify
from offtrail.core.types import Group, Int32, Lease, Sampling
from offtrail.search.assemble import assemble, continued

FIRST, VERDICT, SECOND, SPARE = range(4)


@dataclass
class TwoRounds:
    """A group of G/2 + ``more`` samples. With ``spare`` it asks for one answer too many, and cancels it."""

    lease: Lease
    sampling: Sampling
    generator: str
    more: int = 3
    spare: bool = False
    group: Group | None = None
    prompt: Int32 = field(init=False)
    first: dict[int, Completion] = field(default_factory=dict)
    second: dict[int, Completion] = field(default_factory=dict)
    best: int = 0

    @property
    def width(self) -> int:
        return max(self.lease.samples // 2, self.more)

    def start(self, prompt_tokens: Int32) -> Sequence[Ask]:
        self.prompt = prompt_tokens
        asks: list[Ask] = [Generate(FIRST, prompt_tokens, self.lease.samples // 2, self.sampling)]
        return [*asks, Generate(SPARE, prompt_tokens, 1, self.sampling)] if self.spare else asks

    def answered(self, ask: int, answer: Answer) -> Sequence[Ask]:
        if isinstance(answer, Verdict):
            self.best = int(np.argmax(answer.rewards))
            return [self.go_on()]
        assert isinstance(answer, Completion)
        samples = {FIRST: self.first, SECOND: self.second}.get(ask, {})
        samples[answer.index] = answer
        if ask == FIRST and len(self.first) == self.lease.samples // 2:
            return [self.judge(), Cancel(SPARE)]
        if ask == SECOND and len(self.second) == self.more:
            self.group = self.whole()
        return []

    def judge(self) -> Verify:
        done = self.ordered(self.first)
        return Verify(VERDICT, tuple(c.tokens for c in done), tuple(c.finish == "stop" for c in done))

    @property
    def cut(self) -> int:
        return len(self.first[self.best].tokens) // 2

    def go_on(self) -> Generate:
        prefix = np.concatenate([self.prompt, self.first[self.best].tokens[: self.cut]])
        left = self.sampling.max_new_tokens - self.cut
        return Generate(SECOND, prefix, self.more, replace(self.sampling, max_new_tokens=left))

    def whole(self) -> Group:
        best, cut = self.first[self.best], self.cut
        samples = self.ordered(self.first) + [continued(best, cut, rest) for rest in self.ordered(self.second)]
        return assemble(self.lease, self.prompt, self.sampling.temperature, self.generator, samples)

    @staticmethod
    def ordered(samples: dict[int, Completion]) -> list[Completion]:
        return [samples[index] for index in sorted(samples)]
