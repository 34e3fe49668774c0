"""Problems answered and verified under the version that an engine holds: `Answers.groups`, and `rounds` of them.

    problems ──► prompt tokens ──► engine ──► verifiers ──► one group a problem, with components and rewards

Used by the evaluator, by the plain synchronous loop, and by jobs that make data. Nothing here knows a broker: leases
are made on the spot, and whoever calls decides which version the engine holds.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from offtrail.core.protocols import Engine, Request
from offtrail.core.types import FINISH_REASONS, Float32, Group, Int32, Lease, Problem, Sampling
from offtrail.platform.config.schema import Config
from offtrail.platform.engines.limits import MOST_LOST
from offtrail.platform.model.text import Text
from offtrail.platform.runtime.nice import Runs, here
from offtrail.rewards.registry import Reward
from offtrail.rewards.total import Scored, columns, nothing_earned, total
from offtrail.search.sample import SampleDriver

log = logging.getLogger("offtrail.answers")

STOP = FINISH_REASONS.index("stop")
WAIT_SECONDS = 0.05
"""For verdicts, while there is nothing to sample."""


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


@dataclass(frozen=True)
class Round:
    """Problems that are asked together: one group of ``samples`` answers for each, numbered from ``first``. The number
    keys a group's randomness (I3). ``put``: what the model is asked in place of each problem, which stays what is
    verified; empty = the problem. ``begun``: tokens of an answer to each that the model is to go on with: they count
    among its new tokens, and what is verified is the whole of it; empty = answers from their beginning.
    """

    problems: Sequence[Problem]
    samples: int
    sampling: Sampling
    first: int = 0
    put: Sequence[Problem] = ()
    begun: Sequence[Int32] = ()

    def sampling_at(self, place: int) -> Sampling:
        """How the answer to the problem at a place is drawn, or the rest of it."""
        if not self.begun:
            return self.sampling
        return replace(self.sampling, max_new_tokens=self.sampling.max_new_tokens - len(self.begun[place]))


@dataclass
class _Open:
    """A round that is being asked: its prompts, with what is begun of the answers, its groups by place, and those that
    have no verdict yet.
    """

    round: Round
    prompts: Sequence[Int32]
    fits: Sequence[int]
    made: dict[int, Group] = field(default_factory=dict)
    unjudged: int = 0

    @property
    def whole(self) -> bool:
        """Whether every group is there, and judged."""
        return len(self.made) == len(self.fits) and not self.unjudged

    def groups(self) -> list[Group | None]:
        """In the order of the problems."""
        return [self.made.get(place) for place in range(len(self.round.problems))]


@dataclass
class Answers:
    """An engine, a tokenizer and verifiers. Not thread-safe. ``maker`` names who made the groups, ``compute`` does the
    engine's steps.
    """

    config: Config
    engine: Engine
    text: Text
    verifiers: Verifiers
    maker: str
    compute: Runs = here
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
        """One round; see ``rounds``."""
        [(_, groups)] = self.rounds([Round(problems, samples, sampling, first)], step=step, reload=reload, some=some)
        return groups

    def rounds(
        self,
        rounds: Iterable[Round],
        *,
        step: int = 0,
        reload: Callable[[], None] = lambda: None,
        some: bool = True,
        ahead: int = 1,
        tick: Callable[[int], None] = lambda groups: None,
    ) -> Iterator[tuple[Round, list[Group | None]]]:
        """Each round and its groups in order, None where a prompt leaves no room for an answer; whoever is whole comes
        first. At most ``ahead`` rounds are asked at a time: the next one begins while the engine has room beside the
        last answers of those before.

        ``step`` is the learner step that rewards are totalled for. ``reload`` brings the version to a server that was
        started anew; what died with a server is asked again. Answers without a verdict (their verifier was killed) earn
        nothing. ``tick`` is called again and again, with the number of groups made since; what it raises ends the
        asking. Raises ValueError when no prompt of a round leaves room, unless there need not be ``some``, and
        ConnectionError where servers lose one question again and again.
        """
        engine, version = self.engine, self.engine.version
        coming, waiting = iter(rounds), True
        opened: list[_Open] = []
        drivers: dict[int, SampleDriver] = {}
        asked_again: Counter[int] = Counter()
        while waiting or opened:
            while waiting and (not opened or (len(opened) < ahead and engine.unfinished < engine.capacity)):
                if (round := next(coming, None)) is None:
                    waiting = False
                else:
                    opened.append(self._open(round, some))
                    engine.generate(self._asked(opened[-1], opened[-1].fits, drivers, version))
            whole = 0
            for completion in self.compute(engine.step) if engine.unfinished else ():
                driver = drivers[completion.request]
                driver.answered(0, completion)
                if driver.group is not None:
                    whole += 1
                    self._submit(_holder(opened, completion.request), drivers.pop(completion.request).group)
            tick(whole)
            if engine.version != version and any(len(one.made) < len(one.fits) for one in opened):
                reload()
            for number in engine.lost():
                asked_again[number] += 1
                if asked_again[number] > MOST_LOST:
                    raise ConnectionError(
                        f"question {number} was lost {asked_again[number]} times by the servers, which die of it or "
                        "refuse it; their log, and the lines above, say why"
                    )
                holder = _holder(opened, number)
                engine.generate(self._asked(holder, [number - holder.round.first], drivers, version))
            self._judge(opened, step, 0.0 if engine.unfinished else WAIT_SECONDS)
            for done in [one for one in opened if one.whole]:
                opened.remove(done)
                yield done.round, done.groups()

    def close(self) -> None:
        """End the verifiers and the engine."""
        self.verifiers.close()
        self.engine.close()

    def _open(self, round: Round, some: bool) -> _Open:
        prompts = self.text.encode_all(round.put or round.problems)
        fits = self._fitting(prompts, round.sampling, some)
        if round.begun:
            prompts = [np.concatenate(both) for both in zip(prompts, round.begun, strict=True)]
            fits = [place for place in fits if round.sampling_at(place).max_new_tokens > 0]
        return _Open(round, prompts, fits)

    def _asked(
        self, one: _Open, places: Sequence[int], drivers: dict[int, SampleDriver], version: int
    ) -> list[Request]:
        """The requests for some places of a round, and a driver for each."""
        requests, round = list[Request](), one.round
        for place in places:
            number = round.first + place
            lease = Lease(number, number, 1, round.problems[place], round.samples, min_version=version)
            drivers[number] = driver = SampleDriver(lease, round.sampling_at(place), self.maker)
            requests += [ask.request(number, number) for ask in driver.start(one.prompts[place])]
        return requests

    def _submit(self, one: _Open, group: Group | None) -> None:
        """A group is made, and goes to the verifiers."""
        assert group is not None
        place, asked, begun = group.group - one.round.first, one.round.put or one.round.problems, one.round.begun
        answers = [sample.tokens for sample in group.samples()]
        if begun:
            answers = [np.concatenate((begun[place], rest)) for rest in answers]
        texts = [self.text.answer_text(asked[place], answer) for answer in answers]
        self.verifiers.submit(group.group, group.problem, texts, (group.finish == STOP).tolist())
        one.made[place], one.unjudged = group, one.unjudged + 1

    def _judge(self, opened: Sequence[_Open], step: int, timeout_s: float) -> None:
        """Fill in components and rewards of what was decided."""
        if not any(one.unjudged for one in opened):
            return
        reward = self.config.reward
        for number, components in self.verifiers.poll(timeout_s):
            one = _holder(opened, number)
            group = one.made[number - one.round.first]
            if components is None:
                log.warning("problem %d counts as wrong: %s", number, self.verifiers.reason(number))
                components = nothing_earned(reward, group.problem.task, group.size)
            group.components = components
            group.counts = dict(components.counts) if isinstance(components, Scored) else {}
            group.rewards = total(reward, components, task=group.problem.task, step=step)
            one.unjudged -= 1

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


def _holder(opened: Sequence[_Open], number: int) -> _Open:
    """The round of a group."""
    return next(one for one in opened if 0 <= number - one.round.first < len(one.round.problems))


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
