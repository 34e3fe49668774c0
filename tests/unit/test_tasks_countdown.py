"""Countdown: any right expression is accepted, nothing else is, and no text can do harm."""

from __future__ import annotations

import random
from itertools import permutations, product

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from offtrail.core.types import Problem
from offtrail.tasks.countdown import CountdownConfig, CountdownTask, evaluate, reachable
from offtrail.tasks.split import stream

TASK = CountdownTask(CountdownConfig(), 0)
PROBLEM = Problem(
    "countdown",
    0,
    "make 30 with 3 7 9?",
    "3*7+9",
    {"numbers": [3, 7, 9], "target": 30, "plan": [[0, "*", 1], [1, "+", 0]]},
)

Tree = int | tuple["Tree", str, "Tree"]
trees: st.SearchStrategy[Tree] = st.recursive(
    st.integers(0, 99), lambda inner: st.tuples(inner, st.sampled_from("+-*"), inner), max_leaves=12
)


def compute(tree: Tree) -> int:
    if isinstance(tree, int):
        return tree
    a, operation, b = compute(tree[0]), tree[1], compute(tree[2])
    return a + b if operation == "+" else a - b if operation == "-" else a * b


def leaves(tree: Tree) -> list[int]:
    return [tree] if isinstance(tree, int) else leaves(tree[0]) + leaves(tree[2])


def write(tree: Tree, rng: random.Random) -> str:
    """Fully bracketed, with blanks and needless brackets thrown in."""
    text = str(tree) if isinstance(tree, int) else f"({write(tree[0], rng)}{tree[1]}{write(tree[2], rng)})"
    return rng.choice(["{}", "({})", " {} "]).format(text)


@given(trees, st.randoms(use_true_random=False))
def test_bracketed_expressions_are_computed_as_their_trees(tree: Tree, rng: random.Random):
    text = write(tree, rng)
    assume(len(text) <= 500)
    assert evaluate(text) == (compute(tree), leaves(tree))


@pytest.mark.parametrize(
    ("text", "value"),
    [("2+3*4", 14), ("2*3+4", 10), ("10-3-4", 3), ("10-(3-4)", 11), ("2*(3+4)*5", 70), ("((7))", 7), ("2-3*4+5", -5)],
)
def test_precedence_and_left_association(text: str, value: int):
    result = evaluate(text)
    assert result is not None
    assert result[0] == value


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "+", "3+", "-3", "3+-7", "3 7", "(3", "3)", "()", "3()", "(3)(7)", "3(7)", "03+7", "1_0", "3**7",
        "3//7", "3/7", "3=3", "3*7+9=30", "x", "__import__('os')", "3.0", "1e3", "٣+٧", "³", "3×7", "9" * 13, "(" * 400,
        "1+" * 300 + "1",
    ],
)  # fmt: skip
def test_what_is_no_expression(text: str):
    assert evaluate(text) is None


@given(st.text(alphabet="0123456789+-*() ", max_size=60))
def test_any_text_is_read_without_an_error(text: str):
    result = evaluate(text)
    assert result is None or len(result[1]) >= 1


def test_deep_brackets_cost_no_recursion():
    assert evaluate("(" * 240 + "7" + ")" * 240) == (7, [7])


def test_every_right_expression_of_a_problem_and_no_other_is_accepted():
    """All ways to write three numbers: orders × operations × both bracketings."""
    meta = {"numbers": [2, 5, 7], "target": 14}
    problem = Problem("countdown", 0, "make 14 with 2 5 7?", "2+5+7", meta)
    right = 0
    for (a, b, c), (f, g) in product(permutations((2, 5, 7)), product("+-*", repeat=2)):
        for text, tree in ((f"({a}{f}{b}){g}{c}", ((a, f, b), g, c)), (f"{a}{f}({b}{g}{c})", (a, f, (b, g, c)))):
            assert TASK.verify(problem, text) == (compute(tree) == 14)
            right += compute(tree) == 14
    # By hand: 7×2 leaves the 5 over, (7−5)×2 = 4, 7+5+2 = 14: the sum alone, in 6 orders × 2 bracketings.
    assert right == 12


@pytest.mark.parametrize("text", ["3*7+9", "9+7*3", "(3*7)+9", " 9 + 3 * 7 "])
def test_right_answers(text: str):
    assert TASK.verify(PROBLEM, text)


@pytest.mark.parametrize("text", ["30", "3*9+3", "3*7+9+0", "3*7", "9*3+7-4", "3*7+9-7+7", "21+9", "3*7+9=30", "3+7*9"])
def test_wrong_numbers_or_value(text: str):
    assert not TASK.verify(PROBLEM, text)


def test_a_number_given_twice_must_be_used_twice():
    problem = Problem("countdown", 0, "make 9 with 3 3 3?", "3+3+3", {"numbers": [3, 3, 3], "target": 9})
    assert TASK.verify(problem, "3+3+3")
    assert not TASK.verify(problem, "3*3")
    assert not TASK.verify(problem, "3+3+3+3-3")


@pytest.mark.parametrize(
    ("steps", "verdicts"),
    [
        ("3*7=21;21+9=30", [True, True]),
        ("7*3=21;9+21=30", [True, True]),
        ("3*7=22;22+9=31", [False, True]),  # a slip is carried on: marked once
        ("3+7=10;10+9=19", [False, True]),  # true, but 30 is out of reach from 9 and 10: the wrong turn is marked
        ("3*8=24;24+9=33", [False, False]),  # 8 is not at hand, nor then 24
        ("3*3=9", [False]),
        ("3*7=21;21+9=30;30+0=30", [True, True, False]),
        ("3*7", [False]),
    ],
)
def test_step_checker(steps: str, verdicts: list[bool]):
    assert TASK.check_steps(PROBLEM, f"<think>{steps}</think><answer>3*7+9</answer>") == verdicts


@pytest.mark.parametrize(
    ("numbers", "target", "there"), [((3, 7, 9), 30, True), ((9, 10), 30, False), ((9, 10), -1, True)]
)
def test_reachable(numbers: tuple[int, ...], target: int, there: bool):
    assert reachable(numbers, target) == there


@pytest.mark.parametrize("numbers", [2, 3, 4, 5])
def test_drawn_answers_and_worked_answers_are_right(numbers: int):
    task = CountdownTask(CountdownConfig(numbers=numbers, worked_share=1.0), 0)
    rng = stream("worked")
    for problem in map(task.train, range(100)):
        assert task.verify(problem, problem.answer)
        assert 1 <= problem.meta["target"] <= 100
        steps, answer = task.work(problem, rng)
        assert task.verify(problem, answer)
        assert len(steps) == numbers - 1
        if numbers < 5:
            assert task.check_steps(problem, f"<think>{';'.join(steps)}") == [True] * (numbers - 1)


def test_a_noisy_step_is_true_arithmetic_the_wrong_way():
    task = CountdownTask(CountdownConfig(worked_share=1.0, noise=1.0), 0)
    steps, answer = task.work(PROBLEM, stream(0))
    assert (steps, answer) in [
        (["3+7=10", "10-9=1"], "3+7-9"),
        (["3+7=10", "10*9=90"], "(3+7)*9"),
        (["3-7=-4", "-4-9=-13"], "3-7-9"),
        (["3-7=-4", "-4*9=-36"], "(3-7)*9"),
    ]
    assert not TASK.verify(PROBLEM, answer)


def test_numbers_stand_in_rising_order_so_that_no_reordering_is_held_out():
    for problem in map(TASK.train, range(200)):
        assert problem.meta["numbers"] == sorted(problem.meta["numbers"])
        assert problem.prompt == f"make {problem.meta['target']} with {' '.join(map(str, problem.meta['numbers']))}?"
