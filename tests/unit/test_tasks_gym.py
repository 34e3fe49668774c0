"""reasoning-gym as a task: what a place holds, what is held out, levels, scores, and what is refused."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import pytest

from offtrail.core.problem import Problem
from offtrail.platform.config.compose import compose
from offtrail.platform.config.errors import ConfigError
from offtrail.rewards import gym
from offtrail.rewards.config import RewardConfig
from offtrail.rewards.registry import make_reward
from offtrail.tasks.base import TaskError
from offtrail.tasks.gym import REFUSED, GymConfig, GymTask, Level
from offtrail.tasks.mixture import MixtureConfig, MixtureTask
from offtrail.tasks.split import stream

FEW = ("chain_sum", "gcd", "letter_counting", "gsm_symbolic", "prime_factorization", "graph_color")


@pytest.fixture
def anew() -> None:
    """As in another process: nothing is kept of what was made."""
    gym.entry.cache_clear()
    gym.dataset.cache_clear()


def task(generator: str = "chain_sum", seed: int = 0, **settings: Any) -> GymTask:
    return GymTask(GymConfig(generator=generator, **settings), seed)


@pytest.mark.parametrize("generator", FEW)
def test_a_place_always_holds_the_same_and_its_answer_is_right(generator: str) -> None:
    one = [task(generator).train(i) for i in (0, 3, 2_000_000)]
    gym.entry.cache_clear()
    gym.dataset.cache_clear()
    assert [task(generator).train(i) for i in (2_000_000, 3, 0)][::-1] == one
    for problem in one:
        assert json.loads(json.dumps(problem.meta)) == problem.meta
        if problem.answer:
            assert task(generator).verify(problem, f"\n {problem.answer} ") is True
        assert task(generator).verify(problem, "") is False


def test_each_seed_trains_on_problems_of_its_own_and_all_are_held_out_alike() -> None:
    """reasoning-gym's own seeds 0 and 1 have all items but one in common."""
    first, second = ([task(seed=seed).train(i).prompt for i in range(200)] for seed in (0, 1))
    assert len(set(first) & set(second)) < 5
    assert task(seed=0).held_out(20) == task(seed=1).held_out(20)
    assert task().held_out(19) == task().held_out(20)[:19]


def test_no_held_out_prompt_is_trained_on_where_there_are_few() -> None:
    """Sums of two digits: 100 prompts in a few wordings."""
    options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    small = task(options=options, held_out_share=0.3)
    held_out = {problem.prompt for problem in small.held_out(30)}
    assert not held_out & {small.train(i).prompt for i in range(1000)}


def test_the_template_is_around_the_question_and_not_in_the_split() -> None:
    plain, wrapped = task(), task(template="boxed")
    assert wrapped.train(5).prompt == plain.train(5).prompt + (
        "\nPlease reason step by step, and put your final answer within \\boxed{}."
    )
    assert [p.answer for p in wrapped.held_out(9)] == [p.answer for p in plain.held_out(9)]


def test_levels_rise_with_the_data_order_and_the_last_is_evaluated() -> None:
    rising = task(level=1, last_level=3, level_problems=10)
    assert [rising.train(i).meta["level"] for i in (0, 9, 10, 19, 20, 1000)] == [1, 1, 2, 2, 3, 3]
    assert {problem.meta["level"] for problem in rising.held_out(5)} == {3}
    terms = [[len(re.findall(r"\d+", rising.train(i).prompt)) for i in range(k, k + 10)] for k in (0, 20)]
    assert max(terms[0]) < max(terms[1])
    assert task(level=2).train(0).meta["level"] == 2
    problem = rising.train(25)
    assert rising.verify(problem, problem.answer) is True


def test_a_level_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    class Counted(Level):
        def __init__(self, config: GymConfig, seed: int, level: int) -> None:
            made.append(level)
            super().__init__(config, seed, level)

    monkeypatch.setattr("offtrail.tasks.gym.Level", Counted)
    rising = task(level=1, last_level=2, level_problems=3)
    for index in range(6):
        rising.train(index)
    rising.held_out(3)
    assert made == [1, 2]


def test_accuracy_is_the_full_score_and_the_component_has_the_rest() -> None:
    """Generator gcd gives part of the score to a text that holds the answer."""
    dealt = task("gcd")
    problem = dealt.train(0)
    reward = make_reward(RewardConfig(weights={"accuracy": 1.0, "gym_score": 0.0}), dealt.verify)
    right, near = (f"<think></think><answer>{text}</answer>" for text in (problem.answer, f"it is {problem.answer}"))
    scores = reward.judge(problem, [right, near, "nothing"], [True] * 3)
    assert scores["accuracy"] == [1.0, 0.0, 0.0]
    assert scores["gym_score"][::2] == [1.0, 0.0]
    assert scores["gym_score"][1] is not None
    assert 0.0 < scores["gym_score"][1] < 1.0
    elsewhere = make_reward(RewardConfig(weights={"format": 1.0, "gym_score": 0.0}), dealt.verify)
    assert elsewhere.judge(Problem("chain", 0, "1;+1;%10=?", "2"), [right], [True])["gym_score"] == [None]


def test_a_scorer_that_raises_gives_nothing() -> None:
    problem = task("prime_factorization").train(0)
    with pytest.raises(ValueError, match="zzz"):
        gym.dataset("prime_factorization", "{}", 0).score_answer(
            "zzz", {"metadata": {"number": 12}, "answer": "2 × 2 × 3"}
        )
    assert gym.raw_score(problem, "zzz") == 0.0


def test_a_generator_without_answers_has_a_verifier_and_teaches_nothing() -> None:
    coloured = task("graph_color")
    problem = coloured.train(0)
    assert problem.answer == ""
    with pytest.raises(TaskError, match=r"task.generator=graph_color has a verifier and no worked answers$"):
        coloured.trace(problem, stream(0))
    assert task().trace(task().train(0), stream(0)) == f"<think></think><answer>{task().train(0).answer}</answer>"


@pytest.mark.parametrize("generator", REFUSED)
def test_what_cannot_be_a_task_is_refused_by_name_with_the_reason(generator: str) -> None:
    with pytest.raises(ConfigError, match=rf"task.generator={generator}: is not a task, since it \w+"):
        compose(["task=gym", f"task.generator={generator}", "model.path=nobody/model"])


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"generator": "chain_sums"}, r"task.generator=chain_sums: no such generator; nearest: .*chain_sum"),
        ({"options": {"terms": 2}}, r"task.options.terms: no setting of chain_sum; choose one of min_terms, max_terms"),
        ({"options": {"seed": 2}}, r"task.options.seed: no setting of chain_sum"),
        ({"options": {"min_terms": 0}}, r"task.options=\{.*0.*\}: chain_sum takes no such values \(min_terms must be"),
        ({"level": 99}, r"task.level=99: the curriculum of chain_sum has 11 levels"),
        ({"generator": "gsm_symbolic", "level": 1}, r"task.level=1: gsm_symbolic has no curriculum; set task.options"),
        ({"level": 2, "options": {"max_terms": 9}}, r"task.options.max_terms=9: task.level sets it; leave it out"),
    ],
)
def test_settings_that_the_generator_does_not_take(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(TaskError, match=complaint):
        task(**settings)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"level_problems": 10}, "task.level=0: must be from 1 to below task.last_level"),
        ({"level": 3, "last_level": 3, "level_problems": 10}, "task.level=3: must be from 1 to below"),
        ({"last_level": 3}, "task.last_level=3: must be 0 unless task.level_problems is set"),
        ({"template": "x"}, r"task.template='x': must be r1_zero, boxed, tags, or a text that contains \{prompt\}"),
    ],
)
def test_settings_that_mean_nothing(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        GymConfig(**settings)


def test_without_the_package_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch, anew: None) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(TaskError, match=r"^task=gym needs the package reasoning-gym: pip install offtrail\[gym\]$"):
        task()


def test_a_generator_within_a_mixture() -> None:
    settings = {"gym": {"generator": "gcd", "options": {"max_value": 50}}}
    mixture = MixtureTask(MixtureConfig(weights={"gym": 0.5, "chain": 0.5}, settings=settings), 0)
    assert {problem.task for problem in mixture.held_out(10)} == {"gym", "chain"}
    dealt = next(problem for problem in (mixture.train(i) for i in range(10)) if problem.task == "gym")
    assert mixture.verify(dealt, dealt.answer) is True
