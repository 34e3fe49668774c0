"""Worked examples before a question: which ones, right ones, and how they are put to a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from offtrail.core.problem import Problem
from offtrail.rewards.config import RewardConfig
from offtrail.rewards.format import parse
from offtrail.tasks.base import TaskError
from offtrail.tasks.chain import ChainConfig
from offtrail.tasks.jsonl import JsonlConfig, JsonlTask
from offtrail.tasks.registry import make_task
from offtrail.tasks.shots import Shot, before, of_file, of_task

CHAIN = make_task(ChainConfig(worked_share=0.2, noise=0.3), 0)
QUESTION = Problem("chain", 7, "1;+1;%10=?", "2", {"start": 1})


def test_shots_are_right_worked_training_problems_keyed_by_the_seed() -> None:
    """Four of five traces are guesses here, and a third of the worked steps go wrong: none of that is shown."""
    shots = of_task(CHAIN, 5, 3, RewardConfig())
    held_out = {problem.prompt for problem in CHAIN.held_out(400)}
    assert len({shot.prompt for shot in shots}) == 5
    for shot in shots:
        parts = parse(shot.answer)
        assert parts is not None
        start, *operations, _ = shot.prompt.split(";")
        value = int(start)
        for operation in operations:
            value = eval(f"value {operation}") % 10
        assert (parts.answer, parts.thought != "", shot.prompt in held_out) == (str(value), True, False)
        assert len(parts.thought.split(";")) == len(operations)
    assert of_task(CHAIN, 5, 3, RewardConfig()) == shots
    assert of_task(CHAIN, 2, 3, RewardConfig()) == shots[:2]
    assert of_task(CHAIN, 5, 4, RewardConfig()) != shots


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("tags", "<think>2+2=4</think><answer>4</answer>"),
        ("boxed", "2+2=4\n\\boxed{4}"),
        ("mark", "2+2=4\nAnswer: 4"),
        ("last_number", "2+2=4\n4"),
    ],
)
def test_an_answer_is_written_as_answers_are_looked_for(answer: str, expected: str, tmp_path: Path) -> None:
    rows = [{"question": f"two and two, {i}?", "answer": "2+2=4 #### 4"} for i in range(9)]
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = JsonlTask(JsonlConfig(path=str(tmp_path / "set.jsonl"), held_out_share=0.0), 0)
    [shot] = of_task(task, 1, 0, RewardConfig(answer=answer))  # type: ignore[arg-type]
    assert shot.answer == expected
    with pytest.raises(TaskError, match="10 examples were asked of the training problems of task=jsonl, which has 9"):
        of_task(task, 10, 0, RewardConfig())


def test_a_file_of_examples_is_drawn_from_by_the_seed(tmp_path: Path) -> None:
    path = tmp_path / "shots.jsonl"
    path.write_text("".join(json.dumps({"q": f"{i}?", "a": f"is {i}"}) + "\n" for i in range(20)))
    shots = of_file(path, 4, 1, ("q", "a"), "eval.few_shot_path")
    assert all(shot.answer == f"is {shot.prompt[:-1]}" for shot in shots)
    assert len({shot.prompt for shot in shots}) == 4
    assert of_file(path, 3, 1, ("q", "a"), "eval.few_shot_path") == shots[:3]
    assert of_file(path, 4, 2, ("q", "a"), "eval.few_shot_path") != shots
    with pytest.raises(TaskError, match=r"^eval\.few_shot_path=.*: 21 examples were asked, and it holds 20"):
        of_file(path, 21, 1, ("q", "a"), "eval.few_shot_path")
    with path.open("a") as file:  # the same questions again, up to blanks
        file.writelines(json.dumps({"q": f" {i}? ", "a": "again"}) + "\n" for i in range(20))
    for seed in range(9):
        shots = of_file(path, 12, seed, ("q", "a"), "eval.few_shot_path")
        assert len({shot.prompt.strip() for shot in shots}) == 12
    with pytest.raises(TaskError, match="21 examples were asked, and it holds 20 questions"):
        of_file(path, 21, 1, ("q", "a"), "eval.few_shot_path")
    with pytest.raises(TaskError, match=r"line 1: field 'no' is missing .* set eval\.few_shot_prompt_field"):
        of_file(path, 1, 1, ("no", "a"), "eval.few_shot_path")


def test_plain_prompts_hold_the_shots_as_text() -> None:
    shots = [Shot("0;+1;%10=?", "<think>0+1=1</think><answer>1</answer>"), Shot("Two and two?", "It is 4.")]
    asked = before(QUESTION, shots, chats=False)
    assert asked.prompt == ("0;+1;%10=?<think>0+1=1</think><answer>1</answer>\n\nTwo and two?\nIt is 4.\n\n1;+1;%10=?")
    assert (asked.task, asked.index, asked.answer, asked.meta, asked.messages) == ("chain", 7, "2", {"start": 1}, ())
    opened = before(QUESTION, [Shot("Q: a <think>", "<think>b</think><answer>c</answer>")], chats=False)
    assert opened.prompt.startswith("Q: a <think>b</think><answer>c</answer>\n\n")


def test_a_chat_holds_them_as_turns_after_the_questions_own_system_prompt() -> None:
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}
    shots = [
        Shot("1+1?", "2"),
        Shot("", "3", ({"role": "system", "content": "No."}, {"role": "user", "content": "1+2?"})),
    ]
    asked = before(Problem("mine", 0, "…", "4", {}, (system, user)), shots, chats=True)
    assert [(m["role"], m["content"]) for m in asked.messages] == [
        ("system", "Be brief."), ("user", "1+1?"), ("assistant", "2"), ("user", "1+2?"), ("assistant", "3"),
        ("user", "2+2?"),
    ]  # fmt: skip
    plain = before(QUESTION, shots[:1], chats=True)
    assert [m["content"] for m in plain.messages] == ["1+1?", "2", QUESTION.prompt]
    assert before(QUESTION, [], chats=True) == QUESTION
    with pytest.raises(TaskError, match="need a chat template"):
        before(QUESTION, shots, chats=False)
