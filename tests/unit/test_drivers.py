"""Drivers with several rounds: owners, randomness, rounds of exact mode, losses, refusals, verdicts and scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from offtrail.core.plugins import PluginError
from offtrail.core.protocols import Answer, Ask, Cancel, Completion, Generate, Request, Score, Scores, Verify
from offtrail.core.types import Channel, Float32, Group, Int32, Lease, Problem, Sampling, ScoredBy
from offtrail.platform.config.compose import compose, to_yaml
from offtrail.platform.config.errors import ConfigError
from offtrail.platform.generator.drivers import Drivers
from offtrail.platform.generator.judges import Judges, Refused
from offtrail.search.config import OutsideConfig, SearchConfig
from offtrail.search.registry import SearchError, check, make_driver
from offtrail.search.sample import SampleDriver
from outside.two_rounds import TwoRounds

SAMPLING = Sampling(max_new_tokens=8, seed=1)
PROMPT = np.array([3, 4], np.int32)
SECOND = 2 << 40
"""What ask 2 adds to the group's id in the key of its randomness."""


@dataclass
class Dice:
    """An engine whose samples are max_new_tokens long and thrown by their keys alone; at most ``quick`` end a step."""

    version: int = 0
    quick: int = 1000
    longest: int = 10
    queue: list[tuple[Request, int]] = field(default_factory=list)
    entered: list[int] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)
    dead: list[int] = field(default_factory=list)

    @property
    def unfinished(self) -> int:
        return len(self.queue)

    def generate(self, requests: Sequence[Request]) -> None:
        for request in requests:
            if len(request.prompt_tokens) + request.sampling.max_new_tokens > self.longest:
                raise ValueError(f"prompt of {len(request.prompt_tokens)} tokens: model.max_length is {self.longest}")
        self.queue += [(request, index) for request in requests for index in range(request.samples)]
        self.entered += [request.random_key for request in requests]

    def step(self) -> list[Completion]:
        done, self.queue = self.queue[: self.quick], self.queue[self.quick :]
        return [self.thrown(request, index) for request, index in reversed(done)]

    def thrown(self, request: Request, index: int) -> Completion:
        n, sampling = request.sampling.max_new_tokens, request.sampling
        dice = np.random.default_rng([sampling.seed, request.random_key, index])
        tokens, logprobs = dice.integers(5, 1000, n).astype(np.int32), -dice.random(n).astype(np.float32)
        versions, times = np.full(n, self.version, np.int32), (1.0, 2.0, 3.0 + self.version)
        return Completion(request.id, index, tokens, logprobs, versions, "length", times)

    def cancel(self, requests: Sequence[int]) -> None:
        self.cancelled += requests
        self.queue = [(request, index) for request, index in self.queue if request.id not in requests]

    def die(self) -> list[int]:
        """Its server dies: the requests that were on it."""
        dead = list(dict.fromkeys(request.id for request, _ in self.queue))
        self.queue = []
        return dead


@dataclass
class Slow:
    """A verifier, or a scorer of that ``name``, that answers when it is told to, the newest question first. An
    output's reward is its first token; a scorer says 1, 2, … of its tokens.
    """

    name: str = ""
    counters: dict[str, float] = field(default_factory=dict)
    asked: list[tuple[int, list[Any]]] = field(default_factory=list)
    decided: list[tuple[int, Any]] = field(default_factory=list)
    every_group: bool = True
    too_long: int = 1000
    extra: int = 0
    closed: bool = False

    def submit(self, key: int, problem: Problem, *outputs: Any) -> None:
        texts = outputs[-1] if self.name else [np.fromstring(text, np.int32, sep=" ") for text in outputs[0]]
        if sum(map(len, texts)) > self.too_long:
            raise ValueError(f"{self.name} holds {self.too_long} tokens")
        self.asked.append((key, list(texts)))

    def applies(self, group: Group) -> bool:
        return self.every_group

    @property
    def waiting_on(self) -> str:
        return self.name

    def answer(self, *, refuse: bool = False) -> None:
        self.decided += [(key, None if refuse else self.say(outputs)) for key, outputs in reversed(self.asked)]
        self.asked.clear()

    def say(self, outputs: list[Int32]) -> Any:
        if not self.name:
            return {"first": np.array([output[0] for output in outputs], np.float32)}
        values = np.arange(1, sum(map(len, outputs)) + 1 + self.extra, dtype=np.float32)
        good = np.array([len(output) for output in outputs], np.float32)
        return Scores(ScoredBy(self.name, 7), {"length": good}, {self.name: Channel("token", values)})

    def poll(self) -> list[tuple[int, Any]]:
        decided, self.decided = self.decided, []
        return decided

    def reason(self, key: int) -> str:
        return "killed"

    def close(self) -> None:
        self.closed = True


def total(components: Mapping[str, Float32], task: str, slot: int) -> Float32:
    return np.sum([components[name] for name in components], axis=0, dtype=np.float32)


@dataclass
class House:
    """An engine, judges and the drivers between them."""

    engine: Dice = field(default_factory=Dice)
    verifier: Slow = field(default_factory=Slow)
    scorers: dict[str, Slow] = field(default_factory=dict)
    rounds: bool = False

    def __post_init__(self) -> None:
        def text(problem: Problem, tokens: Int32) -> str:
            return " ".join(map(str, tokens.tolist()))

        self.judges = Judges(self.verifier, self.scorers, text, total)
        self.drivers = Drivers(self.engine, self.judges, rounds=self.rounds)  # type: ignore[arg-type]

    def decode(self) -> None:
        self.drivers.completed(self.engine.step())

    def listen(self) -> list[tuple[Group, Refused | None]]:
        answers, groups = self.judges.poll()
        self.drivers.judged(answers)
        return groups

    def finish(self) -> list[Any]:
        """Until no driver runs: what they came to, in the order of their groups."""
        while self.drivers:
            self.decode()
            self.verifier.answer()
            self.listen()
        return [outcome for _, outcome in sorted(self.drivers.ended, key=lambda one: one[0].group)]


def lease(group: int = 5, **fields: Any) -> Lease:
    problem = Problem("chain", group, "1+1=", "2")
    return Lease(
        **({"group": group, "slot": group, "attempt": 1, "problem": problem, "samples": 4, "min_version": 0} | fields)
    )


def two_rounds(group: int = 5, **fields: Any) -> TwoRounds:
    return TwoRounds(lease(group), SAMPLING, "generator-0", **fields)


@dataclass
class Scripted:
    """A driver that asks what the test says: at the start, and after each answer."""

    script: list[Sequence[Ask]]
    lease: Lease = field(default_factory=lease)
    width: int = 2
    group: Group | None = None
    heard: list[tuple[int, Answer]] = field(default_factory=list)

    def start(self, prompt_tokens: Int32) -> Sequence[Ask]:
        return self.script.pop(0)

    def answered(self, ask: int, answer: Answer) -> Sequence[Ask]:
        self.heard.append((ask, answer))
        return self.script.pop(0) if self.script else []


def generate(ask: int, samples: int = 1, prompt: int = 2) -> Generate:
    return Generate(ask, np.ones(prompt, np.int32), samples, SAMPLING)


def start(house: House, *drivers: Any) -> None:
    for driver in drivers:
        house.drivers.start(driver, PROMPT)


# --- two rounds ---


def test_a_second_round_goes_on_from_half_of_the_best_answer_under_the_newest_weights():
    house = House()
    driver = two_rounds()
    start(house, driver)
    house.decode()
    assert house.judges.waiting_for == ("verdicts", "verifiers")
    house.verifier.answer()
    house.engine.version = 1  # applied while the verdict was out
    house.listen()
    house.decode()
    [(_, group)] = house.drivers.ended
    group.check()
    assert group.lengths.tolist() == [8, 8, 8, 8, 8]  # G/2 = 2 samples of the first round and 3 of the second
    first, second, *rest = group.samples()
    best = max(first, second, key=lambda sample: int(sample.tokens[0]))  # its reward is its first token
    for sample in rest:
        assert sample.tokens[:4].tolist() == best.tokens[:4].tolist()
        assert sample.logprobs[:4].tolist() == best.logprobs[:4].tolist()
        assert sample.versions.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert len({sample.tokens.tobytes() for sample in rest}) == 3
    assert group.times[2].tolist() == [1.0, 2.0, 4.0]  # it began with the first round and ended with the second


def test_later_rounds_draw_numbers_of_their_own_which_repeat_and_the_first_draws_those_of_the_plain_driver():
    made = []
    for quick in (1000, 1):  # whatever ends when
        house = House(Dice(quick=quick))
        start(house, Scripted([[generate(0)], [generate(4)]], lease(9)), two_rounds())  # other work, other ids
        house.finish()
        assert sorted(house.engine.entered) == sorted([9, 5, 9 + (4 << 40), 5 + SECOND])
        made.append(next(group for _, group in house.drivers.ended if isinstance(group, Group)))
    assert made[0].tokens.tobytes() == made[1].tokens.tobytes()
    house = House()
    start(house, SampleDriver(lease(samples=2), SAMPLING, "generator-0"))
    [plain] = house.finish()
    assert plain.tokens.tolist() == made[0].tokens[:16].tolist()


def test_completions_of_many_drivers_find_their_owners():
    house = House(Dice(quick=3))
    start(house, *(two_rounds(group) for group in range(6)))
    groups = house.finish()
    assert [group.group for group in groups] == list(range(6))
    for number, group in enumerate(groups):
        alone = House()
        start(alone, two_rounds(number))
        [expected] = alone.finish()
        assert group.tokens.tobytes() == expected.tokens.tobytes()


# --- rounds: exact mode ---


def test_in_rounds_nothing_goes_on_before_all_verdicts_are_in_and_then_in_the_order_of_slots():
    house = House(rounds=True)
    start(house, two_rounds(1), two_rounds(2), two_rounds(3))
    house.decode()
    for _ in range(2):  # the newest question is answered first, and one is late
        late = house.verifier.asked.pop(0)
        house.verifier.answer()
        house.listen()
        house.verifier.asked = [late]
        assert house.engine.entered == [1, 2, 3]
    house.verifier.answer()
    house.listen()
    assert house.engine.entered == [1, 2, 3, 1 + SECOND, 2 + SECOND, 3 + SECOND]


def test_in_rounds_a_verdict_waits_for_samples_that_still_decode():
    house = House(Dice(quick=2), rounds=True)
    start(house, two_rounds(1), two_rounds(2))
    house.decode()
    house.verifier.answer()
    house.listen()
    assert house.engine.entered == [1, 2]
    house.decode()
    house.verifier.answer()
    house.listen()
    assert house.engine.entered == [1, 2, 1 + SECOND, 2 + SECOND]


def test_out_of_rounds_a_verdict_is_taken_at_once():
    house = House(Dice(quick=2))
    start(house, two_rounds(1), two_rounds(2))
    house.decode()
    house.verifier.answer()
    house.listen()
    assert house.engine.entered == [1, 2, 1 + SECOND]


# --- losses and cancelling ---


@pytest.mark.parametrize("second_round", [False, True])
def test_a_lost_server_gives_the_lease_back_and_the_next_attempt_makes_the_same_group(second_round: bool):
    house = House(Dice(quick=2 if second_round else 1))
    driver = two_rounds(spare=not second_round)
    start(house, driver)
    house.decode()
    if second_round:
        house.verifier.answer()
        house.listen()
        assert house.engine.unfinished == 3
    assert [one.group for one in house.drivers.lost(house.engine.die())] == [5]
    assert len(house.drivers) == house.engine.unfinished == 0
    assert house.drivers.ended == []
    start(house, replace(two_rounds(), lease=lease(attempt=2)))
    [group] = house.finish()
    undisturbed = House()
    start(undisturbed, two_rounds())
    [expected] = undisturbed.finish()
    assert group.tokens.tobytes() == expected.tokens.tobytes()
    assert group.attempt == 2


def test_one_lost_request_takes_the_others_of_its_driver_along_and_late_answers_count_for_nothing():
    house = House()
    driver = Scripted([[generate(0), generate(1, 2), Verify(2, (PROMPT,), (True,))]])
    start(house, driver)
    requests = {request.random_key: request for request, _ in house.engine.queue}
    late = [house.engine.thrown(request, 0) for request in requests.values()]
    house.drivers.lost([requests[5].id])
    assert house.engine.unfinished == 0
    assert requests[5 + (1 << 40)].id in house.engine.cancelled
    house.drivers.completed(late)
    house.verifier.answer()
    house.listen()
    assert driver.heard == []


def test_a_cancelled_ask_is_stopped_and_answers_nothing():
    house = House(Dice(quick=2))
    driver = two_rounds(spare=True)
    start(house, driver)
    spare, _ = house.engine.queue[2]
    late = house.engine.thrown(spare, 0)
    house.decode()  # the first round is whole: the driver cancels the spare answer
    assert house.engine.cancelled == [spare.id]
    house.drivers.completed([late])
    assert driver.first.keys() == {0, 1}
    [group] = house.finish()
    assert group.size == 5


def test_a_cancelled_question_is_not_waited_for_in_rounds():
    house = House(rounds=True)
    driver = Scripted(
        [[Verify(0, (PROMPT,), (True,)), Verify(1, (PROMPT,), (True,)), generate(2)], [Cancel(0)], [generate(3)]]
    )
    start(house, driver)
    cancelled = house.verifier.asked.pop(0)
    house.decode()
    house.verifier.answer()
    house.listen()
    assert [ask for ask, _ in driver.heard] == [2, 1]
    house.verifier.asked = [cancelled]
    house.verifier.answer()
    house.listen()
    assert [ask for ask, _ in driver.heard] == [2, 1]


def test_what_is_in_flight_when_the_group_is_whole_is_cancelled():
    house = House(Dice(quick=1))
    start(house, *(drivers := [SampleDriver(lease(samples=1), SAMPLING, "g"), two_rounds(6)]))
    house.decode()
    assert [outcome.group for _, outcome in house.drivers.ended] == [5]
    eager = Eager(lease(7))
    start(house, eager)
    for _ in range(8):
        house.decode()
    assert house.drivers.ended[-1][1] is eager.group
    assert 7 + (1 << 40) not in [request.random_key for request, _ in house.engine.queue]
    assert drivers[1].lease.group in house.drivers


@dataclass
class Eager:
    """Whole with the first of its two asks."""

    lease: Lease
    width: int = 2
    group: Group | None = None

    def start(self, prompt_tokens: Int32) -> Sequence[Ask]:
        return [generate(0), generate(1, 50)]

    def answered(self, ask: int, answer: Answer) -> Sequence[Ask]:
        inner = SampleDriver(replace(self.lease, samples=1), SAMPLING, "g")
        inner.start(PROMPT)
        inner.answered(ask, answer)
        self.group = inner.group
        return []


# --- what does not fit ---


@pytest.mark.parametrize(
    ("asks", "reason"),
    [
        ([generate(1, prompt=3)], "prompt of 3 tokens: model.max_length is 10"),
        ([generate(0)], "driver sample: ask 0 must be a number from 0 to 8388607, not used before"),
        ([generate(1 << 23)], "ask 8388608 must be a number from 0 to 8388607"),
        ([generate(-1)], "ask -1 must be a number"),
        ([Score(1, "prm", (PROMPT,))], "driver sample asks the scorer prm; this generator has: value"),
        ([Score(1, "value", (np.ones(1001, np.int32),))], "value holds 1000 tokens"),
        ([], "driver sample has nothing in flight and no group"),
        ([Cancel(7)], "driver sample has nothing in flight and no group"),
    ],
)
def test_follow_up_asks_that_do_not_fit_fail_their_group_alone(asks: list[Ask], reason: str):
    house = House(scorers={"value": Slow("value", every_group=False)})
    start(house, Scripted([[generate(0)], asks], lease(1)), two_rounds(2))
    failed, group = house.finish()
    assert reason in failed
    assert group.size == 5


def test_a_refused_verdict_fails_its_group():
    house = House()
    start(house, two_rounds())
    house.decode()
    house.verifier.answer(refuse=True)
    house.listen()
    assert [outcome for _, outcome in house.drivers.ended] == ["killed"]


def test_a_driver_that_waits_for_its_verdict_keeps_its_place_in_the_engine():
    house = House(Dice(quick=2))
    start(house, two_rounds(1), two_rounds(2))
    assert house.drivers.samples == 4
    house.decode()
    assert house.drivers.samples == 2 + 3  # driver 2 decodes 2, driver 1 will come back with 3


# --- scores, and whole groups ---


def scored(house: House) -> Group:
    start(house, SampleDriver(lease(samples=2), SAMPLING, "g"))
    house.decode()
    [(_, group)] = house.drivers.ended
    house.judges.judge(group)
    return group


def test_a_driver_is_told_scores_with_model_and_version():
    house = House(scorers={"value": Slow("value")})
    driver = Scripted([[Score(0, "value", (PROMPT, PROMPT[:1]))]])
    start(house, driver)
    assert house.judges.waiting_for == ("scores", "value")
    house.scorers["value"].answer()
    house.listen()
    [(ask, scores)] = driver.heard
    assert ask == 0
    assert isinstance(scores, Scores)
    assert scores.by == ScoredBy("value", 7)
    assert scores.components["length"].tolist() == [2, 1]
    assert scores.channels["value"].values.tolist() == [1, 2, 3]


def test_a_group_is_judged_when_the_verifiers_and_every_scorer_that_applies_have_answered():
    house = House(scorers={"prm": Slow("prm"), "value": Slow("value", every_group=False)})
    group = scored(house)
    assert house.judges.waiting_for == ("scores", "prm")
    house.verifier.answer()
    assert house.listen() == []
    house.scorers["prm"].answer()
    assert house.listen() == [(group, None)]
    first = [float(sample.tokens[0]) for sample in group.samples()]
    assert {name: column.tolist() for name, column in group.components.items()} == {"first": first, "length": [8, 8]}
    assert group.rewards.tolist() == [value + 8 for value in first]
    assert group.channels["prm"].values.tolist() == list(range(1, 17))
    assert group.scored_by == {"length": ScoredBy("prm", 7), "prm": ScoredBy("prm", 7)}
    group.check()


@pytest.mark.parametrize(
    ("scorer", "refuse", "reason"),
    [
        (Slow("prm"), True, "killed"),
        (Slow("prm", too_long=15), False, "prm holds 15 tokens"),
        (Slow("prm", extra=1), False, "channel prm has shape (17,)"),
    ],
)
def test_scores_that_are_refused_or_do_not_fit_refuse_the_group(scorer: Slow, refuse: bool, reason: str):
    house = House(scorers={"prm": scorer})
    group = scored(house)
    scorer.answer(refuse=refuse)
    house.verifier.answer()
    [(judged, refused)] = house.listen()
    assert judged is group
    assert refused is not None
    assert reason in refused
    assert refused.kind == "unscored"


def test_components_that_the_driver_filled_are_not_asked_for_again():
    house = House()
    start(house, SampleDriver(lease(samples=2), SAMPLING, "g"))
    house.decode()
    [(_, group)] = house.drivers.ended
    group.components = {"first": np.array([1, 2], np.float32)}
    house.judges.judge(group)
    assert house.listen() == [(group, None)]
    assert group.rewards.tolist() == [1, 2]


def test_closing_the_judges_closes_all_of_them():
    house = House(scorers={"prm": Slow("prm")})
    house.judges.close()
    assert house.verifier.closed
    assert house.scorers["prm"].closed


# --- which driver ---


def outside(name: str = "outside.two_rounds:TwoRounds", **settings: Any) -> OutsideConfig:
    return OutsideConfig(name=name, settings=settings)


def test_the_lease_names_the_driver_and_the_configuration_has_its_settings():
    made = make_driver(outside(more=2), lease(driver="outside.two_rounds:TwoRounds"), SAMPLING, "generator-0")
    assert type(made).__name__ == "TwoRounds"
    assert vars(made)["more"] == 2
    assert isinstance(make_driver(outside(), lease(driver="sample"), SAMPLING, "generator-0"), SampleDriver)
    assert isinstance(make_driver(SearchConfig(), lease(), SAMPLING, "generator-0"), SampleDriver)


@pytest.mark.parametrize(
    ("attempt", "line"),
    [
        (
            lambda: check(outside("outside.two_rounds:TwoRound")),
            "has no TwoRound; nearest: TwoRounds",
        ),
        (
            lambda: check(outside("outside.two_rounds:SPARE")),
            "two_rounds:SPARE: is 3, which cannot be called",
        ),
        (lambda: check(outside(mroe=2)), "search.settings={'mroe': 2}: outside.two_rounds:TwoRounds is called with"),
        (
            lambda: make_driver(SearchConfig(), lease(driver="tree"), SAMPLING, "g"),
            "search.name=sample: the lease asks for driver tree, of which there are no settings here",
        ),
    ],
)
def test_a_driver_that_cannot_be_made_is_one_line(attempt: Callable[[], Any], line: str):
    with pytest.raises((PluginError, SearchError)) as error:
        attempt()
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_a_driver_from_outside_is_an_option_of_search_and_stands_in_the_saved_configuration(tmp_path: Path):
    given = ("search=outside.two_rounds:TwoRounds", "search.flexible=true", "search.settings.more=2")
    config = compose(given)
    assert config.search == OutsideConfig(name="outside.two_rounds:TwoRounds", flexible=True, settings={"more": 2})
    (tmp_path / "saved.yaml").write_text(to_yaml(config))
    assert compose([str(tmp_path / "saved.yaml")]).search == config.search
    assert compose([str(tmp_path / "saved.yaml"), "search=sample"]).search == SearchConfig()


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("search=tree", "search=tree: unknown option; options: sample"),
        ("search.name=tree", "search.name=tree: must be one of sample, module:function"),
        (
            "search.flexible=true",
            "flexible=true: not a key of search.name=sample, but of search.name=module:function",
        ),
    ],
)
def test_a_search_that_is_not_there_is_one_line(argument: str, line: str):
    with pytest.raises(ConfigError) as error:
        compose([argument])
    assert line in str(error.value)
