"""How a model is asked for data: what is put before or around a problem, which stays what is verified and recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from offtrail.core.problem import Problem
from offtrail.rewards.config import RewardConfig
from offtrail.tasks.addition import AdditionConfig
from offtrail.tasks.base import Task, TaskError
from offtrail.tasks.chain import ChainConfig
from offtrail.tasks.config import TaskConfig
from offtrail.tasks.data_config import SampleConfig
from offtrail.tasks.jsonl import JsonlConfig
from offtrail.tasks.mixture import MixtureConfig
from offtrail.tasks.prompting import put, questions, reflecting, template_of
from offtrail.tasks.registry import make_task, training_problems

REWARD = RewardConfig()
CHAIN = make_task(ChainConfig(), 3)


def asked(sample: SampleConfig, task: Task = CHAIN, *, chats: bool = False) -> tuple[list[Problem], list[Problem]]:
    return questions(task, sample, REWARD, 3, chats=chats)


def file_task(folder: Path, n: int = 12, **given: str) -> Task:
    rows = [{"question": f"What is {i} + {i}?", "answer": f"#### {2 * i}"} for i in range(n)]
    path = folder / "set.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return make_task(JsonlConfig(path=str(path), held_out_share=0.0, **given), 3)


def test_plain_is_as_in_training_in_the_data_order() -> None:
    problems, told = asked(SampleConfig(prompts=3, first=5))
    assert problems == told == [CHAIN.train(i) for i in (5, 6, 7)]


def test_every_problem_of_a_file_is_asked_once_and_no_more(tmp_path: Path) -> None:
    task = file_task(tmp_path)
    everything = training_problems(task, 0, 0)
    assert sorted(p.prompt for p in everything) == sorted(p.prompt for p in task.training())  # type: ignore[attr-defined]
    assert training_problems(task, 4, 0) == everything[4:]
    for first, n in ((0, 13), (12, 0), (10, 3)):
        with pytest.raises(TaskError, match=rf"^sample.prompts={n} from sample.first={first} on: task=jsonl has 12"):
            training_problems(task, first, n)
    with pytest.raises(TaskError, match=r"^sample.prompts=0: task=chain has no last problem"):
        training_problems(CHAIN, 0, 0)


def test_few_shots_stand_before_the_question_and_leave_the_problem_as_it_is() -> None:
    problems, told = asked(SampleConfig(prompts=4, prompting="few_shot", shots=2))
    for problem, put_to in zip(problems, told, strict=True):
        assert put_to.prompt.endswith(problem.prompt)
        assert put_to.prompt.count("</answer>") == 2
        assert (put_to.index, put_to.answer, put_to.meta) == (problem.index, problem.answer, problem.meta)
    _, turns = asked(SampleConfig(prompts=1, prompting="few_shot", shots=2), chats=True)
    assert [turn["role"] for turn in turns[0].messages] == ["user", "assistant"] * 2 + ["user"]


def test_a_question_is_no_example_for_itself(tmp_path: Path) -> None:
    task = file_task(tmp_path, 4)
    problems, told = asked(SampleConfig(prompts=0, prompting="few_shot", shots=3), task)
    assert len(problems) == 4
    for problem, put_to in zip(problems, told, strict=True):
        assert put_to.prompt.count(problem.prompt) == 1
        assert put_to.prompt.count("What is") == 4  # three others and itself
    with pytest.raises(TaskError, match="5 examples were asked"):
        asked(SampleConfig(prompts=0, prompting="few_shot", shots=4), task)


def test_examples_of_a_file_are_taken_from_its_fields(tmp_path: Path) -> None:
    path = tmp_path / "shots.jsonl"
    path.write_text('{"q": "2?", "a": "<think>long</think><answer>2</answer>"}\n{"q": "3?", "a": "three"}\n')
    sample = SampleConfig(
        prompts=1, prompting="few_shot", shots=1, shots_path=str(path), shots_prompt_field="q", shots_answer_field="a"
    )
    [problem], [told] = asked(sample)
    assert told.prompt in (
        f"2?<think>long</think><answer>2</answer>\n\n{problem.prompt}",
        f"3?\nthree\n\n{problem.prompt}",
    )


def test_reflection_is_asked_for_around_the_question_inside_the_template(tmp_path: Path) -> None:
    task = file_task(tmp_path, template="User: {prompt}. Assistant:")
    sample = SampleConfig(prompts=1, prompting="reflect", instruction="Check twice: {prompt} Verify.")
    [problem], [told] = asked(sample, task)
    question = problem.prompt.removeprefix("User: ").removesuffix(". Assistant:")
    assert told.prompt == f"User: Check twice: {question} Verify.. Assistant:"
    assert told.answer == problem.answer
    [plain], [around] = asked(sample)
    assert around.prompt == f"Check twice: {plain.prompt} Verify."


def test_of_messages_the_last_one_is_asked_to_reflect() -> None:
    turns = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "<2?>"})
    told = reflecting(Problem("t", 0, "…", "4", messages=turns), "Check: {prompt}", "<{prompt}>")
    assert told.messages == (turns[0], {"role": "user", "content": "<Check: 2?>"})
    # a template that the problem was not written with, or that holds the question twice, is left alone
    one = Problem("t", 0, "2?", "4")
    assert reflecting(one, "Check: {prompt}", "<{prompt}>").prompt == "Check: 2?"
    assert reflecting(one, "Check: {prompt}", "{prompt} {prompt}").prompt == "Check: 2?"


def test_in_a_mixture_each_family_has_its_own_template(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text('{"question": "2?", "answer": "#### 2"}\n')
    jsonl = {"path": str(path), "template": "Q: {prompt}", "held_out_share": 0.0}
    weights = {"chain": 0.5, "jsonl": 0.5}
    task = make_task(MixtureConfig(weights=weights, settings={"jsonl": jsonl}), 0)
    assert template_of(Problem("jsonl", 0, "", ""), task) == "Q: {prompt}"
    assert template_of(Problem("chain", 0, "", ""), task) == "{prompt}"


def test_an_instruction_without_a_place_for_the_question_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^sample.instruction='think': must contain \{prompt\}"):
        SampleConfig(instruction="think")


@pytest.mark.parametrize("config", [ChainConfig(), AdditionConfig()])
def test_worked_examples_are_worked_and_right(config: TaskConfig) -> None:
    task = make_task(config, 1)
    [_], [told] = questions(task, SampleConfig(prompts=1, prompting="few_shot", shots=3), REWARD, 1, chats=True)
    for question, answer in zip(told.messages[0:-1:2], told.messages[1::2], strict=True):
        assert "<think></think>" not in answer["content"]
        assert question["content"] != told.messages[-1]["content"]


def test_the_same_is_put_in_every_launch() -> None:
    sample = SampleConfig(prompts=2, prompting="few_shot")
    assert put([CHAIN.train(0)], sample, CHAIN, REWARD, 5, chats=False) == put(
        [CHAIN.train(0)], sample, make_task(ChainConfig(), 3), REWARD, 5, chats=False
    )
