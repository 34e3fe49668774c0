"""What each filter of answers catches, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from offtrail.rewards.components.language import Language
from offtrail.tasks import filters

ENGLISH = Language(target="en").share
LOOP = "so we try again and again and again with the very same words as before in this line. "

CAUGHT: list[tuple[Callable[[str], str], str]] = [
    (lambda t: filters.mixed_language(t, ENGLISH, 0.9), "First we add the numbers, 然后我们把它们相乘, and so on."),
    (lambda t: filters.long_paragraph(t, 50), "Short.\n\n" + "word " * 20),
    (filters.code_block, "We run\n```python\nprint(1)\n```\nand see 1."),
    (filters.code_block, "~~~\nx = 1\n~~~"),
    (filters.code_block, "- ```sh\nls\n```"),
    (filters.unbalanced, r"So \frac{1}{2 is a half."),
    (filters.unbalanced, "A } before {."),
    (filters.unbalanced, r"The answer is \(x + 1."),
    (filters.unbalanced, r"\begin{align} x \end{aligned}"),
    (filters.unbalanced, r"\begin{cases} x"),
    (filters.unbalanced, "We have $x + y and stop."),
    (filters.unbalanced, "$$x = 1$$ and $$y"),
    (filters.unbalanced, "She pays $5 for $x of them."),
    (filters.unbalanced, "So $x + y, and it costs $5 in all."),
    (lambda t: filters.garbled(t, 0.3), "a\x00b"),
    (lambda t: filters.garbled(t, 0.3), "what � is"),
    (lambda t: filters.garbled(t, 0.3), "ab ▓▒░█ ▓▒░█"),
    (lambda t: filters.garbled(t, 0.3), "\x0crac{1}{2}"),  # what JSON makes of "\frac"
    (lambda t: filters.repetitive(t, 0.2, 5), LOOP * 3),
    (lambda t: filters.short(t, 10), "four"),
    (lambda t: filters.long(t, 10), "more than ten"),
]
LEFT: list[tuple[Callable[[str], str], str]] = [
    (
        lambda t: filters.mixed_language(t, ENGLISH, 0.9),
        "We add `数字` and get $变量 + 1$, that is 3.",
    ),  # code, formula
    (lambda t: filters.mixed_language(t, ENGLISH, 0.9), "1 + 2 = 3"),  # no words
    (lambda t: filters.long_paragraph(t, 50), ("word " * 8 + "\n \n") * 9),
    (filters.code_block, "We call `print(1)` and ```in line``` too."),
    (filters.unbalanced, r"So \frac{1}{2} and \{1, 2\} and \left\{ x \right. are fine."),
    (filters.unbalanced, r"\[ x \\[2pt] y \] and \(z\)"),
    (filters.unbalanced, r"\begin{align} \begin{cases} x \end{cases} \end{align}"),
    (filters.unbalanced, "It costs $5, then $7.50 more, and $3."),
    (filters.unbalanced, "She pays $5 for $x$ of them."),
    (filters.unbalanced, "We get $5 + 3 = 8$ apples."),
    (filters.unbalanced, "It is $2.5$, or $1,234$; then $3, 4, 5$ and $x$."),
    (filters.unbalanced, "For $12 she gets $2.5x$ of them, $x = 4.$"),
    (filters.unbalanced, "Code may: `if (x) {` and\n```\n} else {\n```\n"),
    (lambda t: filters.garbled(t, 0.3), "Σ x² ≤ 3·y → «é» 数学 हिन्दी, a\tb\nc"),
    (lambda t: filters.garbled(t, 0.3), "(((1+2)*3)-4)/5=1;[x]{y}<z>"),
    (lambda t: filters.repetitive(t, 0.2, 5), "One two three four five six. Seven eight nine ten eleven twelve."),
    (lambda t: filters.short(t, 4), "four"),
    (lambda t: filters.long(t, 4), "four"),
]


@pytest.mark.parametrize(("judge", "text"), CAUGHT)
def test_what_is_unfit_is_caught_and_told(judge: Callable[[str], str], text: str) -> None:
    assert judge(text)


@pytest.mark.parametrize(("judge", "text"), LEFT)
def test_what_is_fit_is_left(judge: Callable[[str], str], text: str) -> None:
    assert judge(text) == ""


def test_an_answer_is_the_same_up_to_blanks_and_composition() -> None:
    assert filters.same_text(" cafe\u0301 \n\t is ") == filters.same_text("caf\u00e9 is")
    assert filters.same_text("Cafe") != filters.same_text("cafe")


def test_similarity_is_the_share_of_n_grams_that_both_have() -> None:
    one, other = filters.shingles("a b c d e", 2), filters.shingles("a b c d f", 2)
    assert filters.similarity(one, other) == 3 / 5  # ab bc cd of ab bc cd de df
    assert filters.similarity(one, one) == 1.0
    shorter = filters.shingles("a b c d", 2)  # ab bc cd: the share is as large as sizes allow, 3 of 4
    assert filters.similarity(one, shorter) == filters.most_similar(one, shorter) == filters.most_similar(shorter, one)
    assert filters.most_similar(one, other) == 1.0
    assert (
        filters.similarity(filters.shingles("a b", 5), filters.shingles("b a", 5)) == 0.0
    )  # shorter than n: the whole
