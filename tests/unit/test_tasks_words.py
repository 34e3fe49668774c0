"""Instructions on a made-up word: what each asks, what a worked answer shows, what is held out."""

from __future__ import annotations

import pytest

from offtrail.core.types import Problem
from offtrail.tasks.split import stream
from offtrail.tasks.words import KINDS, WordsConfig, WordsTask


def problem(kind: str, word: str = "mola") -> Problem:
    return Problem("words", 0, f"{kind}: {word}=?", KINDS[kind](word), {"kind": kind, "word": word})


def test_what_each_instruction_asks() -> None:
    made = {kind: problem(kind).answer for kind in KINDS}
    assert made == {"copy": "mola", "reverse": "alom", "first": "m", "last": "a", "double": "molamola", "count": "4"}


def test_a_worked_answer_spells_and_a_slip_is_carried_into_the_answer() -> None:
    sure, wrong = (WordsTask(WordsConfig(worked_share=1.0, noise=noise), 0) for noise in (0.0, 1.0))
    asked = problem("reverse")
    assert sure.trace(asked, stream(0)) == "<think>1m;2o;3l;4a</think><answer>alom</answer>"
    trace = wrong.trace(asked, stream(0))
    assert sure.check_steps(asked, trace) == [False] * 4
    answer = trace.partition("<answer>")[2].removesuffix("</answer>")
    assert not sure.verify(asked, answer)
    assert answer == "".join(step[-1] for step in reversed(trace.partition("</think>")[0].split(";")))


@pytest.mark.parametrize(
    ("steps", "verdicts"),
    [
        ("1m;2o;3l;4a", [True] * 4),
        ("1m;2x;3l", [True, False, True]),
        ("1m;1o", [True, False]),
        ("1m;2o;3l;4a;5", [True] * 4 + [False]),  # a place without a letter
        ("m", [False]),
    ],
)
def test_step_checker(steps: str, verdicts: list[bool]) -> None:
    assert WordsTask(WordsConfig(), 0).check_steps(problem("copy"), f"<think>{steps}</think>") == verdicts


def test_lengths_and_instructions_are_all_drawn() -> None:
    drawn = [WordsTask(WordsConfig(min_letters=2, max_letters=4), 0).train(i) for i in range(300)]
    assert {p.meta["kind"] for p in drawn} == set(KINDS)
    assert {len(p.meta["word"]) for p in drawn} == {2, 3, 4}
    assert all(p.prompt == f"{p.meta['kind']}: {p.meta['word']}=?" for p in drawn)


def test_a_shortest_word_above_the_longest_is_refused() -> None:
    with pytest.raises(ValueError, match=r"task\.min_letters=6: must be from 1 to task\.max_letters=5"):
        WordsConfig(min_letters=6)
