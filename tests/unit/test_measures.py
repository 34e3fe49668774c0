"""avg@n, pass@k and cons@k against what they mean, worked out by trying every draw."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
from rich.console import Console

from offtrail.platform.evaluator.measures import (
    average,
    best_of,
    consensus,
    over_questions,
    pass_at,
    ratio,
    sizes_up_to,
    weighted_vote,
)
from offtrail.platform.evaluator.report import Asked, measured, table

SCORES = np.array([[1, 0, 0, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0.5, 0, 1, 0]], np.float64)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_pass_at_k_is_the_share_of_draws_with_a_right_answer(k: int) -> None:
    expected = [
        np.mean([max(draw) >= 1 for draw in itertools.combinations(row, k)]) for row in SCORES
    ]  # partial credit is no right answer
    assert pass_at(SCORES, k) == pytest.approx(expected)


def test_pass_at_k_stays_exact_where_factorials_overflow_a_float() -> None:
    scores = np.zeros((1, 4096))
    scores[0, :7] = 1
    assert pass_at(scores, 1)[0] == pytest.approx(7 / 4096)
    assert 0 < pass_at(scores, 2048)[0] < 1


def test_the_average_counts_partial_credit() -> None:
    assert average(SCORES) == pytest.approx([0.4, 0, 1, 0.3])


@pytest.mark.parametrize("k", [0, 6])
def test_more_answers_than_there_are_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"@{k}: needs 1 ≤ k ≤ n = 5"):
        pass_at(SCORES, k)
    with pytest.raises(ValueError, match=f"@{k}: needs 1 ≤ k ≤ n = 5"):
        consensus([["a"] * 5] * 4, SCORES, k)


def voted(answers: list[str | None], right: str, k: int, weights: list[float] | None = None) -> float:
    scores = np.array([[float(answer == right) for answer in answers]])
    return float(consensus([answers], scores, k, None if weights is None else np.array([weights]))[0])


def test_the_most_frequent_answer_wins_and_a_tie_is_drawn() -> None:
    assert voted(["7", "7", "3", "9"], "7", 4) == 1
    assert voted(["7", "7", "3", "9"], "3", 4) == 0
    assert voted(["7", "7", "3", "3", "9"], "3", 5) == 0.5
    assert voted(["7", "3", "9"], "9", 3) == pytest.approx(1 / 3)


def best(marks: list[float], right: list[float], k: int) -> float:
    return float(best_of(np.array([marks]), np.array([right]), k)[0])


NONE = np.nan


def test_the_answer_with_the_highest_mark_is_taken_and_a_tie_is_drawn() -> None:
    assert best([0.1, 0.9, 0.5], [1, 0, 1], 3) == 0
    assert best([-5, -0.2, -0.1], [0, 1, 0.25], 3) == 0.25  # no probabilities, and partial credit
    assert best([0.9, 0.9, 0.5, 0.9], [1, 0, 0, 0], 4) == pytest.approx(1 / 3)
    assert best([0.1, 0.2, 0.9, 0.3, 0.8], [0, 1, 0, 1, 1], 2) == 0.5  # of two choices of two; the fifth is left over
    assert best([0.1, 0.2], [0, 1], 1) == 0.5  # is avg


def test_an_answer_without_a_mark_is_never_taken_and_a_choice_of_such_is_lost() -> None:
    assert best([NONE, 0.1, NONE], [1, 0, 1], 3) == 0
    assert best([NONE, -3.0], [0, 1], 2) == 1
    assert best([NONE, NONE], [1, 1], 2) == 0
    with pytest.raises(ValueError, match="best of 3: needs 1 ≤ k ≤ n = 2"):
        best([0.1, 0.2], [0, 1], 3)


def test_a_tie_counts_what_draws_at_random_come_to() -> None:
    """Few marks, so that ties are many: the mean over 4,000 random draws is the expectation, up to .03."""
    rng = np.random.default_rng(3)
    marks, right = rng.integers(0, 3, (20, 8)).astype(np.float64), rng.integers(0, 2, (20, 8)).astype(np.float64)
    drawn = np.zeros(20)
    for _ in range(4000):
        drawn += right[np.arange(20), (marks + rng.random((20, 8)) / 2).argmax(1)]
    assert best_of(marks, right, 8) == pytest.approx(drawn / 4000, abs=0.03)


def test_a_vote_weighs_what_a_model_says_of_its_answer() -> None:
    def weighed(marks: list[float], right: str, answers: list[str | None]) -> float:
        scores = np.array([[float(answer == right) for answer in answers]])
        return float(weighted_vote([answers], np.array([marks]), scores, len(answers))[0])

    assert weighed([0.9, 0.3, 0.5], "7", ["7", "3", "3"]) == 1  # .9 against .8
    assert weighed([0.9, 0.3, NONE], "3", ["7", "3", "3"]) == 0  # without a mark there is no vote
    assert weighed([0.9, NONE, 0.3], "7", [None, "7", "3"]) == 0  # nor without an answer
    assert weighed([NONE, NONE, NONE], "7", ["7", "7", "7"]) == 0
    assert weighed([0.5, 0.25, 0.25], "3", ["7", "3", "3"]) == 0.5


def test_who_gives_no_answer_does_not_vote() -> None:
    assert voted([None, None, "7"], "7", 3) == 1
    assert voted([None, None], "7", 2) == 0


def test_smaller_votes_are_taken_of_all_answers_and_one_is_the_average() -> None:
    assert voted(["7", "7", "3", "3"], "7", 2) == 0.5
    answers = ["7", "3", "7", "1", "7"]
    assert voted(answers, "7", 1) == pytest.approx(3 / 5)


def test_weights_outvote_numbers() -> None:
    assert voted(["7", "7", "3"], "3", 3, [0.2, 0.3, 0.6]) == 1
    assert voted(["7", "7", "3"], "3", 3, [0.1, 0.2, 0.3]) == 0.5  # .1 + .2 is not .3 in floats


def test_ties_are_worth_what_drawing_them_at_random_gives() -> None:
    """Votes held one by one, each tie broken by a draw among the answers with the most votes, weighted or not."""
    rng = np.random.default_rng(3)
    for weighted in (False, True):
        for _ in range(8):
            answers = [["a", "b", "c", None][i] for i in rng.integers(0, 4, 6)]
            scores = np.array([[float(answer == "a") for answer in answers]])
            weights = rng.integers(1, 3, (1, 6)).astype(np.float64) if weighted else None
            drawn = []
            for _ in range(2000):
                won = []
                for at in (0, 3):
                    votes = dict.fromkeys(answers[at : at + 3], 0.0)
                    for i in range(at, at + 3):
                        votes[answers[i]] += 1.0 if weights is None else weights[0, i]
                    votes.pop(None, None)
                    best = [answer for answer, count in votes.items() if count == max(votes.values())]
                    won.append(bool(best) and rng.choice(best) == "a")
                drawn.append(np.mean(won))
            assert consensus([answers], scores, 3, weights)[0] == pytest.approx(np.mean(drawn), abs=0.05)


def test_a_ratio_with_the_same_below_everywhere_is_the_mean_over_questions() -> None:
    one, mean = ratio(SCORES, np.ones_like(SCORES)), over_questions(average(SCORES))
    assert (one.mean, one.error, one.low) == pytest.approx((mean.mean, mean.error, mean.low))


def test_a_ratio_leaves_questions_out_that_have_nothing_below() -> None:
    above, below = np.array([[2.0, 0], [1, 1], [0, 0]]), np.array([[4.0, 0], [1, 3], [0, 0]])
    assert ratio(above, below).mean == 4 / 8
    assert ratio(above, below) == ratio(above[:2], below[:2])
    assert np.isnan(ratio(above[:1], below[:1]).error)
    assert np.isnan(ratio(above[2:], below[2:]).mean)


def test_the_interval_of_a_ratio_covers_what_it_says() -> None:
    """Answers of a question are alike and long ones say more: an interval over answers would be far too narrow."""
    rng = np.random.default_rng(9)
    inside = 0
    for _ in range(2000):
        rate, length = rng.gamma(2.0, 0.01, (60, 1)), rng.integers(20, 200, (60, 4)).astype(np.float64)
        estimate = ratio(rng.poisson(rate * length).astype(np.float64), length)
        inside += estimate.low <= 0.02 <= estimate.high
    assert 0.92 <= inside / 2000 <= 0.97


def test_the_interval_over_questions_covers_what_it_says() -> None:
    """Questions of different difficulty, 8 answers each: an interval over all answers would be far too narrow."""
    rng = np.random.default_rng(5)
    inside, naive = 0, 0
    for _ in range(2000):
        chance = rng.beta(0.6, 0.6, 40)
        scores = (rng.random((40, 8)) < chance[:, None]).astype(np.float64)
        estimate = over_questions(average(scores))
        inside += estimate.low <= 0.5 <= estimate.high
        naive += abs(scores.mean() - 0.5) <= 1.96 * scores.std() / np.sqrt(scores.size)
    assert 0.93 <= inside / 2000 <= 0.97
    assert naive / 2000 < 0.7


def test_one_question_has_no_interval() -> None:
    assert np.isnan(over_questions(np.array([0.5])).low)


@pytest.mark.parametrize(("n", "sizes"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_sizes(n: int, sizes: list[int]) -> None:
    assert sizes_up_to(n) == sizes


def test_a_table_of_many_sets_shows_every_number_on_a_narrow_terminal() -> None:
    answers: list[list[str | None]] = [["1", "2", None, "2", "1"]] * 4
    sets = [Asked(f"set-{i}", SCORES * i / 8, answers, SCORES + 30, SCORES) for i in range(8)]
    console = Console(width=80, file=(told := io.StringIO()))
    console.print(table({asked.name: measured(asked) for asked in sets}, sets))
    lines = told.getvalue().splitlines()
    for i, asked in enumerate(sets):
        estimate = measured(asked)["avg@5"]
        (line,) = [line for line in lines if line.strip().startswith(f"set-{i} (4 × 5)")]
        assert line.split()[4:] == ["avg@5", f"{estimate.mean:.3f}", f"{estimate.low:.3f}", "–", f"{estimate.high:.3f}"]
