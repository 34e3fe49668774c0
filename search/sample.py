"""The `sample` driver: G independent answers to one prompt. The baseline that every search is compared with."""

from __future__ import annotations

from dataclasses import dataclass, field

from offtrail.core.protocols import Answer, Ask, Completion, Generate
from offtrail.core.types import Group, Int32, Lease, Sampling
from offtrail.search.assemble import assemble


@dataclass
class SampleDriver:
    """G independent samples; the prompt is prefilled once for all of them."""

    lease: Lease
    sampling: Sampling
    generator: str
    group: Group | None = None
    _prompt: Int32 = field(init=False)
    _done: list[Completion] = field(init=False, default_factory=list)

    @property
    def width(self) -> int:
        """All G at once."""
        return self.lease.samples

    def start(self, prompt_tokens: Int32) -> list[Generate]:
        """One ask for all G samples."""
        self._prompt = prompt_tokens
        return [Generate(0, prompt_tokens, self.lease.samples, self.sampling)]

    def answered(self, ask: int, answer: Answer) -> list[Ask]:
        """Keep the sample, and make the group with the last one; never further asks."""
        assert isinstance(answer, Completion)
        self._done.append(answer)
        if len(self._done) == self.lease.samples:
            samples = sorted(self._done, key=lambda sample: sample.index)
            self.group = assemble(self.lease, self._prompt, self.sampling.temperature, self.generator, samples)
        return []
