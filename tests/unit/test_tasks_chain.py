"""The arithmetic chain. Golden: 7 +5 = 12 → 2; 2 ×3 = 6; 6 −2 = 4, all modulo 10."""

from __future__ import annotations

import pytest

from offtrail.core.types import Problem
from offtrail.tasks.chain import ChainConfig, ChainTask
from offtrail.tasks.split import stream

PROBLEM = Problem("chain", 0, "7;+5;*3;-2;%10=?", "4", {"start": 7, "operations": ["+5", "*3", "-2"], "modulus": 10})


def task(**settings: object) -> ChainTask:
    return ChainTask(ChainConfig(**{"noise": 0.0} | settings), 0)  # type: ignore[arg-type]


def check(steps: str) -> list[bool]:
    return task().check_steps(PROBLEM, f"<think>{steps}</think><answer>4</answer>")


def test_three_styles_of_one_worked_answer():
    rng = stream("styles")
    seen = {task(worked_share=1.0, styles=3).trace(PROBLEM, rng) for _ in range(60)}
    assert seen == {
        f"<think>{steps}</think><answer>4</answer>"
        for steps in ("7+5=2;2*3=6;6-2=4", "7+5=2;*3=6;-2=4", "7+5=12>2;2*3=6;6-2=4")
    }
    assert {tuple(task().check_steps(PROBLEM, trace)) for trace in seen} == {(True, True, True)}


def test_steps_begin_with_a_word_of_either_language_at_its_share():
    mixed = task(worked_share=1.0, words=True, chinese=0.25)
    rng = stream("words")
    traces = [mixed.trace(PROBLEM, rng) for _ in range(400)]
    assert task(worked_share=1.0, words=True).trace(PROBLEM, rng) == (
        "<think>so 7+5=2;so 2*3=6;so 6-2=4</think><answer>4</answer>"
    )
    share = sum(trace.count("故") for trace in traces) / 1200
    assert abs(share - 0.25) < 0.05  # four standard errors
    assert {tuple(mixed.check_steps(PROBLEM, trace)) for trace in traces} == {(True, True, True)}
    assert not any(check("so 7+5=2"))  # a word that nobody asked for
    assert mixed.check_steps(PROBLEM, "<think>故7+5=2;so so 2*3=6") == [True, False]


def test_the_tags_may_be_left_out_of_a_share_of_the_answers():
    plain = task(worked_share=0.5, tagged_share=0.25)
    rng = stream("plain")
    traces = [plain.trace(PROBLEM, rng) for _ in range(400)]
    assert set(traces) == {
        "4", "7+5=2;2*3=6;6-2=4\n4",
        "<think></think><answer>4</answer>", "<think>7+5=2;2*3=6;6-2=4</think><answer>4</answer>",
    }  # fmt: skip
    assert abs(sum("<think>" in trace for trace in traces) / 400 - 0.25) < 0.09  # four standard errors


def test_direct_guess():
    assert task(worked_share=0.0).trace(PROBLEM, stream(0)) == "<think></think><answer>4</answer>"
    assert task().check_steps(PROBLEM, "<think></think><answer>4</answer>") == []


@pytest.mark.parametrize(
    ("steps", "verdicts"),
    [
        ("7+5=2;2*3=6;6-2=4", [True, True, True]),
        ("7+5=3;3*3=9;9-2=7", [False, True, True]),  # the slip is marked once, where it is made
        ("7+5=3;2*3=6;6-2=4", [False, False, True]),  # going on from a value that was not written is a second error
        ("7+5=12;2*3=6", [False, True]),  # not reduced
        ("7+5=12>2;2*3=6", [True, True]),
        ("7+5=12>3;3*3=9", [False, True]),
        ("7+5=13>3;3*3=9", [False, True]),
        ("7-5=2;2*3=6", [False, True]),  # another operation than the problem's
        ("2*3=6;6-2=4", [False, False]),  # a step left out: not the operations in their order
        ("7+5=2;2*3=6;6-2=4;4+5=9", [True, True, True, False]),  # one step too many
        ("+5=2;*3=6", [False, True]),  # only later steps may leave out the value before them
        ("07+5=2", [False]),
        ("7+5=02", [False]),
        ("seven and five;2*3=6", [False, False]),
        ("7+5=2;;*3=6", [True, False, False]),
        ("7+5=2;", [True]),
        ("", []),
    ],
)
def test_step_checker(steps: str, verdicts: list[bool]):
    assert check(steps) == verdicts


def test_negative_results_are_reduced_upwards():
    problem = Problem("chain", 0, "2;-9;%10=?", "3", {"start": 2, "operations": ["-9"], "modulus": 10})
    for step, right in (("2-9=3", True), ("2-9=-7>3", True), ("2-9=-7", False), ("2-9=7", False)):
        assert task().check_steps(problem, f"<think>{step}") == [right]


def test_steps_of_an_answer_that_is_still_being_written():
    assert task().check_steps(PROBLEM, "<think>7+5=2;2*3=6;6-") == [True, True, False]
    assert task().check_steps(PROBLEM, "7+5=2") == []


def test_the_verifier_takes_only_the_answer_itself():
    assert task().verify(PROBLEM, "4")
    assert task().verify(PROBLEM, " 4\n")
    for wrong in ("", "04", "4.", "4 4", "14", "+4", "-6", "4=4", "٤"):
        assert not task().verify(PROBLEM, wrong)


def test_drawn_problems_are_what_their_prompts_say():
    config = ChainConfig()
    lengths = set()
    for index in range(500):
        problem = ChainTask(config, 1).train(index)
        start, *operations, last = problem.prompt.split(";")
        value = int(start)
        for operation in operations:
            value = {"+": value + int(operation[1:]), "-": value - int(operation[1:]), "*": value * int(operation[1:])}[
                operation[0]
            ]
        assert last == "%10=?"
        assert problem.answer == str(value % 10)  # reduced once, at the end
        assert 15 <= len(problem.prompt) <= 25
        lengths.add(len(operations))
    assert lengths == {3, 4, 5, 6}


def test_other_moduli():
    other = ChainTask(ChainConfig(modulus=97, max_operand=30, worked_share=1.0, noise=0.0, styles=3), 0)
    rng = stream("moduli")
    for problem in map(other.train, range(300)):
        trace = other.trace(problem, rng)
        verdicts = other.check_steps(problem, trace)
        assert all(verdicts)
        assert len(verdicts) == len(problem.meta["operations"])
        assert trace.endswith(f"<answer>{problem.answer}</answer>")
