"""Problems answered and verified on one version: places, numbers, lost servers, and verdicts that never came."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from offtrail.core.protocols import Completion, Request
from offtrail.core.types import Problem, Sampling
from offtrail.platform.config.schema import Config, LocalConfig
from offtrail.platform.engines.limits import MOST_LOST
from offtrail.platform.engines.local import LocalEngine
from offtrail.platform.evaluator.answers import Answers, InProcess, Round
from offtrail.platform.model.text import Text
from offtrail.rewards.registry import make_reward
from offtrail.tasks.chain import ChainConfig
from offtrail.tasks.registry import make_task

TASK = make_task(ChainConfig(), 0)
SAMPLING = Sampling(max_new_tokens=6, stop_token_ids=(), seed=5)


def answers(start_dir: Path, engine: Any = None) -> Answers:
    config = Config()
    config.model.max_length = 64
    engine = engine or LocalEngine(start_dir, LocalConfig(max_running=8), max_length=64, threads=1)
    return Answers(config, engine, Text(start_dir), InProcess(make_reward(config.reward, TASK.verify)), "maker-0")


def test_a_group_a_problem_in_order_with_its_number_components_and_reward(start_dir: Path) -> None:
    problems = [TASK.train(i) for i in range(3)]
    groups = answers(start_dir).groups(problems, 2, SAMPLING, first=40)
    assert [(g.group, g.problem, g.size, g.generator) for g in groups if g] == [
        (40 + i, problem, 2, "maker-0") for i, problem in enumerate(problems)
    ]
    for group in groups:
        assert group is not None
        assert set(group.components) == {"accuracy", "format"}
        group.check()


def test_a_groups_number_keys_its_randomness_and_its_place_does_not(start_dir: Path) -> None:
    problems = [TASK.train(i) for i in range(3)]
    together = answers(start_dir).groups(problems, 2, SAMPLING, first=40)
    [alone] = answers(start_dir).groups(problems[2:], 2, SAMPLING, first=42)
    [other] = answers(start_dir).groups(problems[2:], 2, SAMPLING, first=43)
    assert together[2] is not None
    assert alone is not None
    assert other is not None
    assert together[2].tokens.tolist() == alone.tokens.tolist()
    assert other.tokens.tolist() != alone.tokens.tolist()


def test_a_prompt_without_room_has_no_group(start_dir: Path) -> None:
    problems = [TASK.train(0), replace(TASK.train(1), prompt="1" * 60)]
    first, second = answers(start_dir).groups(problems, 1, SAMPLING)
    assert first is not None
    assert second is None


class LosesOnce:
    """Loses the first request once, after one of its samples came back, and comes back at version 0."""

    vocab_size, counters, replicas = 64, dict[str, float](), 1

    def __init__(self) -> None:
        self.version, self.unfinished, self.asked = 7, 0, list[Request]()
        self._lost: list[int] = []
        self._turn = 0

    def generate(self, requests: list[Request]) -> None:
        self.asked += requests
        self.unfinished += sum(request.samples for request in requests)

    def step(self) -> list[Completion]:
        self._turn += 1
        if self._turn == 1:  # one of two samples; the other dies with the server
            self._lost, self.version, self.unfinished = [self.asked[0].id], 0, self.unfinished - 2
            return [completion(self.asked[0], 0, token=9)]
        request = self.asked[-1]
        self.unfinished -= request.samples
        return [completion(request, index, token=11) for index in range(request.samples)]

    def lost(self) -> list[int]:
        lost, self._lost = self._lost, []
        return lost


def completion(request: Request, index: int, token: int) -> Completion:
    tokens = np.array([token], np.int32)
    return Completion(request.id, index, tokens, np.zeros(1, np.float32), np.array([7], np.int32), "stop", (0, 0, 0))


def test_what_died_with_a_server_is_asked_again_whole(start_dir: Path) -> None:
    engine, reloads = LosesOnce(), list[int]()

    def reload() -> None:
        engine.version = 7
        reloads.append(len(engine.asked))

    [group] = answers(start_dir, engine).groups([TASK.train(0)], 2, SAMPLING, reload=reload)
    assert group is not None
    assert group.tokens.tolist() == [11, 11]  # the sample that had come back before the death is not in it
    assert reloads == [1]  # the version is there before the second asking
    assert [request.random_key for request in engine.asked] == [0, 0]


class AlwaysLost(LosesOnce):
    """Its server dies of every request."""

    def step(self) -> list[Completion]:
        self._lost, self.unfinished = [self.asked[-1].id], 0
        return []


def test_a_question_that_every_server_dies_of_ends_the_asking(start_dir: Path) -> None:
    engine = AlwaysLost()
    engine.version = 0
    with pytest.raises(ConnectionError, match=rf"^question 40 was lost {MOST_LOST + 1} times"):
        answers(start_dir, engine).groups([TASK.train(0)], 2, SAMPLING, first=40)
    assert len(engine.asked) == 1 + MOST_LOST


class OneAtATime(LosesOnce):
    """Finishes the oldest request but the very first, which comes last; has room for four samples."""

    capacity = 4

    def __init__(self) -> None:
        super().__init__()
        self.log = list[str]()
        self._open = list[Request]()

    def generate(self, requests: list[Request]) -> None:
        super().generate(requests)
        self._open += requests
        self.log += [f"asked {request.id}" for request in requests]

    def step(self) -> list[Completion]:
        request = self._open.pop(1 if len(self._open) > 1 else 0)
        self.unfinished -= request.samples
        self.log.append(f"made {request.id}")
        return [completion(request, index, token=11) for index in range(request.samples)]


def test_a_round_begins_beside_the_last_answers_of_others_where_that_is_asked(start_dir: Path) -> None:
    def asked(ahead: int) -> tuple[list[str], list[int]]:
        engine, ticks = OneAtATime(), list[int]()
        rounds = [Round([TASK.train(i), TASK.train(i + 1)], 2, SAMPLING, first=i) for i in (0, 2, 4)]
        made = list(answers(start_dir, engine).rounds(rounds, ahead=ahead, tick=ticks.append))
        assert sorted(round.first for round, _ in made) == [0, 2, 4]
        for round, groups in made:
            assert [group and group.group for group in groups] == [round.first, round.first + 1]
            assert all(group is not None and set(group.components) == {"accuracy", "format"} for group in groups)
        assert sum(ticks) == 6
        return engine.log, [round.first for round, _ in made]

    log, order = asked(1)
    assert order == [0, 2, 4]
    assert log.index("asked 2") > log.index("made 0")
    log, order = asked(2)
    assert log[:5] == ["asked 0", "asked 1", "made 1", "asked 2", "asked 3"]
    assert order == [2, 4, 0]  # whoever is whole comes first


def test_what_is_put_to_the_model_is_not_what_is_verified(start_dir: Path) -> None:
    engine, problem, put_to = OneAtATime(), TASK.train(0), replace(TASK.train(1), prompt="1+1=<think>")
    made = answers(start_dir, engine)
    seen = list[tuple[Problem, str]]()
    judged = made.verifiers.submit

    def submit(key: int, problem: Problem, texts: list[str], finished: list[bool]) -> None:
        seen.append((problem, texts[0]))
        judged(key, problem, texts, finished)

    made.verifiers.submit = submit  # type: ignore[method-assign]
    [(_, [group])] = made.rounds([Round([problem], 1, SAMPLING, put=[put_to])])
    assert group is not None
    assert engine.asked[0].prompt_tokens.tolist() == made.text.encode(put_to).tolist()
    assert group.problem == seen[0][0] == problem
    assert seen[0][1].startswith("<think>")  # what its prompt has opened counts as the answer's


def test_an_answer_that_has_begun_is_gone_on_with_and_judged_whole(start_dir: Path) -> None:
    engine, problems = OneAtATime(), [TASK.train(i) for i in range(3)]
    made, seen = answers(start_dir, engine), dict[int, str]()
    begun = [np.array(made.text.tokenizer.encode(words), np.int32) for words in ("<think>1+", "2", "123456")]
    judged = made.verifiers.submit

    def submit(key: int, problem: Problem, texts: list[str], finished: list[bool]) -> None:
        seen[key] = texts[0]
        judged(key, problem, texts, finished)

    made.verifiers.submit = submit  # type: ignore[method-assign]
    [(_, groups)] = made.rounds([Round(problems, 1, SAMPLING, first=5, begun=begun)])
    assert [group is None for group in groups] == [False, False, True]  # the third is as long as an answer may be
    said = made.text.decode(np.array([11], np.int32))
    assert seen == {5: f"<think>1+{said}", 6: f"2{said}"}
    for request, problem, own in zip(engine.asked, problems, begun, strict=False):
        assert request.prompt_tokens.tolist() == [*made.text.encode(problem), *own]
        assert request.sampling.max_new_tokens == SAMPLING.max_new_tokens - len(own)


def test_whoever_looks_in_between_can_end_it(start_dir: Path) -> None:
    def look(groups: int) -> None:
        if groups:
            raise KeyboardInterrupt

    engine = OneAtATime()
    with pytest.raises(KeyboardInterrupt):
        list(answers(start_dir, engine).rounds([Round([TASK.train(0), TASK.train(1)], 2, SAMPLING)], tick=look))
    assert engine.log == ["asked 0", "asked 1", "made 1"]


class NoVerdict(InProcess):
    """Gives a verdict on nothing."""

    def poll(self, timeout_s: float = 0.0) -> list[tuple[int, Any]]:
        return [(key, None) for key, _ in super().poll()]

    def reason(self, key: int) -> str:
        return "its verifier was killed"


def test_answers_without_a_verdict_earn_nothing(start_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = answers(start_dir)
    made.verifiers = NoVerdict(make_reward(made.config.reward, TASK.verify))
    [group] = made.groups([Problem("chain", 0, "1+1", "2")], 2, SAMPLING)
    assert group is not None
    assert {name: column.tolist() for name, column in group.components.items()} == {
        "accuracy": [0.0, 0.0],
        "format": [0.0, 0.0],
    }
    assert group.rewards.tolist() == [0.0, 0.0]
    assert "problem 0 counts as wrong: its verifier was killed" in caplog.text
