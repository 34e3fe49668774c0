"""Problems answered and verified under the version that an engine holds: `Answers.groups`.

    problems ──► prompt tokens ──► engine ──► verifiers ──► one group a problem, with components and rewards

Used by the evaluator, by the plain synchronous loop, and by jobs that make data. Nothing here knows a broker: leases
are made on the spot, and whoever calls decides which version the engine holds.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from offtrail.core.protocols import Engine, Request
from offtrail.core.types import FINISH_REASONS, Float32, Group, Int32, Lease, Problem, Sampling
from offtrail.platform.config.schema import Config
from offtrail.platform.model.text import Text
from offtrail.rewards.registry import Reward
from offtrail.rewards.total import columns, nothing_earned, total
from offtrail.search.sample import SampleDriver

log = logging.getLogger("offtrail.answers")

STOP = FINISH_REASONS.index("stop")


class Verifiers(Protocol):
    """What is used of VerifierPool."""

    @property
    def counters(self) -> dict[str, float]:
        """What they have done, cumulative."""

    def submit(self, key: int, problem: Problem, texts: list[str], finished: list[bool]) -> None:
        """Queue the answers to one problem."""

    def poll(self, timeout_s: float = 0.0) -> list[tuple[int, dict[str, Float32] | None]]:
        """Components of every group that was decided, or None."""

    def reason(self, key: int) -> str:
        """Why there are none."""

    def close(self) -> None:
        """End."""


@dataclass
class Answers:
    """An engine, a tokenizer and verifiers. Not thread-safe. ``maker`` names who made the groups."""

    config: Config
    engine: Engine
    text: Text
    verifiers: Verifiers
    maker: str
    _too_long: int = field(init=False, default=0)

    def groups(
        self,
        problems: Sequence[Problem],
        samples: int,
        sampling: Sampling,
        *,
        first: int = 0,
        step: int = 0,
        reload: Callable[[], None] = lambda: None,
        some: bool = True,
    ) -> list[Group | None]:
        """One group of ``samples`` answers for each problem, in order; None where its prompt leaves no room for one.

        Groups are numbered from ``first``, and the number keys a group's randomness (I3). ``step`` is the learner step
        that rewards are totalled for. ``reload`` brings the version to a server that was started anew; what died with
        a server is asked again. Answers without a verdict (their verifier was killed) earn nothing.

        Raises ValueError when no prompt leaves room, unless there need not be ``some``.
        """
        prompts = self.text.encode_all(problems)
        fits = self._fitting(prompts, sampling, some)
        made: dict[int, Group] = {}
        for place, group in self._made(problems, prompts, fits, samples, sampling, first, reload):
            texts = [self.text.answer_text(group.problem, sample.tokens) for sample in group.samples()]
            self.verifiers.submit(place, group.problem, texts, (group.finish == STOP).tolist())
            made[place] = group
        self._verify(made, step)
        return [made.get(place) for place in range(len(problems))]

    def close(self) -> None:
        """End the verifiers and the engine."""
        self.verifiers.close()
        self.engine.close()

    def _made(
        self,
        problems: Sequence[Problem],
        prompts: Sequence[Int32],
        fits: Sequence[int],
        samples: int,
        sampling: Sampling,
        first: int,
        reload: Callable[[], None],
    ) -> Iterator[tuple[int, Group]]:
        """(place, group without rewards) as they are finished."""
        engine, version = self.engine, self.engine.version
        drivers: dict[int, SampleDriver] = {}

        def asked(places: Sequence[int]) -> list[Request]:
            requests = []
            for place in places:
                number = first + place
                lease = Lease(number, number, 1, problems[place], samples, min_version=version)
                drivers[number] = driver = SampleDriver(lease, sampling, self.maker)
                requests += [ask.request(number, number) for ask in driver.start(prompts[place])]
            return requests

        engine.generate(asked(fits))
        while engine.unfinished:
            for completion in engine.step():
                driver = drivers[completion.request]
                driver.answered(0, completion)
                if driver.group is not None:
                    yield completion.request - first, driver.group
            if engine.version != version:
                reload()
            if lost := engine.lost():
                engine.generate(asked([number - first for number in lost]))

    def _fitting(self, prompts: Sequence[Int32], sampling: Sampling, some: bool) -> list[int]:
        """Places of the prompts that the engine has room for; says so when it has not for as many as before."""
        limit = self.config.model.max_length
        fits = [place for place, prompt in enumerate(prompts) if len(prompt) + sampling.max_new_tokens <= limit]
        too_long, before = len(prompts) - len(fits), self._too_long
        self._too_long = too_long
        if too_long != before:
            line = (
                f"{too_long} of {len(prompts)} prompts leave no room for {sampling.max_new_tokens} new tokens in "
                f"model.max_length={limit}"
            )
            if some and not fits:
                raise ValueError(f"{line}; raise it or lower sampling.max_new_tokens")
            log.warning("%s: they count as wrong; raise it or lower sampling.max_new_tokens", line)
        return fits

    def _verify(self, made: Mapping[int, Group], step: int) -> None:
        """Fill in components and rewards; waits for every verdict."""
        reward, pending = self.config.reward, len(made)
        while pending:
            for place, components in self.verifiers.poll(timeout_s=0.05):
                pending -= 1
                group = made[place]
                if components is None:
                    log.warning("problem %d counts as wrong: %s", place, self.verifiers.reason(place))
                    components = nothing_earned(reward, group.problem.task, group.size)
                group.components = components
                group.rewards = total(reward, components, task=group.problem.task, step=step)


class InProcess:
    """Verifiers that judge at once, in the caller's own process: for a loop that is to be plain, and nothing else."""

    def __init__(self, reward: Reward) -> None:
        self._reward = reward
        self._done: list[tuple[int, dict[str, Float32] | None]] = []
        self.counters: dict[str, float] = {}

    def submit(self, key: int, problem: Problem, texts: list[str], finished: list[bool]) -> None:
        """Judge."""
        self._done.append((key, columns(self._reward.judge(problem, texts, finished))))

    def poll(self, timeout_s: float = 0.0) -> list[tuple[int, dict[str, Float32] | None]]:
        """Everything that was submitted since."""
        done, self._done = self._done, []
        return done

    def reason(self, key: int) -> str:
        """Never asked for: a reward that raises does so in `submit`."""
        raise KeyError(key)

    def close(self) -> None:
        """Nothing to end."""
