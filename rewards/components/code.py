"""Code: the program in the answer, judged by running its problem's tests in the sandbox (docs/sandbox.md)."""

from __future__ import annotations

from typing import get_args

from offtrail.rewards.base import Answered, RewardError
from offtrail.rewards.program import program_in, whole
from offtrail.rewards.sandbox.box import Box, Wall
from offtrail.rewards.sandbox.judge import REASONS, Judged, has_tests, judge
from offtrail.rewards.sandbox.runs import Limits, SandboxError


class Code:
    """From 0 to 1: 1 where all tests pass; ``partial``: the share of them that does. None for a problem without tests.
    ``reasons``: how many answers have failed first by which of REASONS, or are ok.

    ``wall``: auto, bwrap or landlock. ``seconds`` by the clock are for all tests of an answer, ``cpu_seconds`` for each
    of its processes, ``memory_mb`` for the program alone. Raises RewardError where no sandbox stands.
    """

    def __init__(
        self, *, wall: Wall = "auto", seconds: float = 10.0, cpu_seconds: int = 3, memory_mb: int = 512,
        partial: bool = False,
    ) -> None:  # fmt: skip
        key = "reward.settings.code"
        if wall not in get_args(Wall):
            raise RewardError(f"{key}.wall={wall}: must be one of {', '.join(get_args(Wall))}")
        for name, value, most in (("seconds", seconds, 3600), ("cpu_seconds", cpu_seconds, 3600)):
            if not isinstance(value, (int, float)) or not 0 < value <= most:
                raise RewardError(f"{key}.{name}={value}: must be in (0, {most}]")
        if int(cpu_seconds) != cpu_seconds:
            raise RewardError(f"{key}.cpu_seconds={cpu_seconds}: must be whole seconds, as the kernel counts them")
        if not isinstance(memory_mb, int) or not 128 <= memory_mb <= 1 << 20:
            raise RewardError(f"{key}.memory_mb={memory_mb}: must be a whole number in [128, {1 << 20}]")
        self._share = partial
        self.reasons = dict.fromkeys((*REASONS, "malformed"), 0)
        try:
            self._box = Box(wall, Limits(seconds, int(cpu_seconds), memory_mb << 20))
        except SandboxError as error:
            raise RewardError(f"{key}.{error}") from None

    def __call__(self, answered: Answered) -> float | None:
        """See Code."""
        if not has_tests(answered.problem.meta):
            return None
        judged = self.judged(answered)
        self.reasons[judged.reason.partition(":")[0]] += 1
        return judged.score

    def judged(self, answered: Answered) -> Judged:
        """The score, and why it is not 1."""
        program = program_in(answered.text)
        if program is None:
            return Judged(0.0, "malformed: the answer tags are not one pair")
        if not program.strip():
            return Judged(0.0, "malformed: no program")
        return judge(self._box, whole(program, answered.problem.meta), answered.problem.meta, share=self._share)


score = Code
