"""Addition with carry. Golden: 347+5821: 7+1=8, 4+2=6, 3+8=11, 0+5+1=6 → 6168."""

from __future__ import annotations

import pytest

from offtrail.core.types import Problem
from offtrail.tasks.addition import AdditionConfig, AdditionTask
from offtrail.tasks.split import stream

PROBLEM = Problem("addition", 0, "347+5821=?", "6168", {"numbers": [347, 5821]})
NINES = Problem("addition", 0, "999+999=?", "1998", {"numbers": [999, 999]})
WORKED = "7+1=8;4+2=6;3+8=11;0+5+1=6"


def test_worked_answers():
    task = AdditionTask(AdditionConfig(worked_share=1.0), 0)
    assert task.trace(PROBLEM, stream(0)) == f"<think>{WORKED}</think><answer>6168</answer>"
    assert task.trace(NINES, stream(0)) == "<think>9+9=18;9+9+1=19;9+9+1=19</think><answer>1998</answer>"


@pytest.mark.parametrize(
    ("steps", "verdicts"),
    [
        (WORKED, [True] * 4),
        ("7+1=9;4+2=6;3+8=11;0+5+1=6", [False, True, True, True]),
        ("7+1=18;4+2+1=7;3+8=11;0+5+1=6", [False, True, True, True]),  # carried on as written
        ("7+1=18;4+2=6;3+8=11;0+5+1=6", [False, False, True, True]),  # the written carry is dropped
        ("7+1=8;4+2=6;3+8=11;0+5=5", [True, True, True, False]),
        ("1+7=8", [False]),  # the first number's digit comes first
        ("7+1=08", [False]),
        (f"{WORKED};0+0=0", [True, True, True, True, False]),
        ("", []),
    ],
)
def test_step_checker(steps: str, verdicts: list[bool]):
    task = AdditionTask(AdditionConfig(), 0)
    assert task.check_steps(PROBLEM, f"<think>{steps}</think><answer>6168</answer>") == verdicts


def test_the_answer_follows_from_the_written_steps_even_when_they_are_wrong():
    task = AdditionTask(AdditionConfig(worked_share=1.0, noise=0.5), 0)
    rng = stream("follow")
    for problem in map(task.train, range(300)):
        thought, answer = (
            task.trace(problem, rng).removeprefix("<think>").removesuffix("</answer>").split("</think><answer>")
        )
        sums = [int(step.partition("=")[2]) for step in thought.split(";")]
        digits = [total % 10 for total in sums] + [sums[-1] // 10]
        assert int(answer) == sum(digit * 10**i for i, digit in enumerate(digits))


def test_verifier():
    task = AdditionTask(AdditionConfig(), 0)
    assert task.verify(PROBLEM, "6168")
    for wrong in ("6169", "06168", "6,168", "6168.0", "", "347+5821"):
        assert not task.verify(PROBLEM, wrong)


def test_mirrored_prompts_are_on_one_side_of_the_split():
    held_out = {
        tuple(p.meta["numbers"]) for p in AdditionTask(AdditionConfig(min_digits=1, max_digits=2), 0).held_out(200)
    }
    task = AdditionTask(AdditionConfig(min_digits=1, max_digits=2), 0)
    assert not {(b, a) for a, b in held_out} & {tuple(task.train(i).meta["numbers"]) for i in range(5000)}


def test_digits_are_within_bounds():
    numbers = [n for i in range(500) for n in AdditionTask(AdditionConfig(), 0).train(i).meta["numbers"]]
    assert {len(str(n)) for n in numbers} == {3, 4}
