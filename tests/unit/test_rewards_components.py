"""The components by rule beside accuracy: what each gives, its bounds, and what must not pay."""

from __future__ import annotations

import math
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offtrail.core.types import Problem
from offtrail.rewards.base import RewardError
from offtrail.rewards.components.language import Language, by_script
from offtrail.rewards.components.length import cosine, linear
from offtrail.rewards.components.repetition import repeated_grams, repeated_suffix
from offtrail.rewards.config import RewardConfig
from offtrail.rewards.format import TAGS
from offtrail.rewards.registry import make_reward

PROBLEM = Problem("chain", 0, "p", "4")
RIGHT, WRONG = "<think></think><answer>4</answer>", "<think></think><answer>5</answer>"


def judge(name: str, *texts: str, finished: bool = True, **settings: object) -> list[float | None]:
    config = RewardConfig(weights={name: 1.0}, settings={name: settings})
    reward = make_reward(config, lambda problem, answer: answer == problem.answer)
    return reward.judge(PROBLEM, texts, [finished] * len(texts))[name]


# format


def test_format_graded():
    assert judge("format", RIGHT, how="graded") == [1.0]
    assert judge("format", RIGHT, how="graded", finished=False) == [0.8]
    texts = ["", "<think>a</think>4", "<answer>4</answer><think></think>", "<think><think></think><answer>4</answer>"]
    assert judge("format", *texts, how="graded") == pytest.approx([0.0, 0.4, 0.8, 0.6])


def test_format_by_an_expression_is_of_the_whole_text():
    texts = ["a\n#### 4", "a #### 4 b", "####"]
    assert judge("format", *texts, how="regex", pattern=r".*#### -?\d+") == [1.0, 0.0, 0.0]
    assert judge("format", "#### 4", how="regex", pattern=r".*#### -?\d+", finished=False) == [0.0]


@given(st.lists(st.sampled_from([*TAGS, "4", " "]), max_size=9).map("".join), st.booleans())
def test_graded_is_1_where_strict_is(text: str, finished: bool):
    (strict,), (graded,) = (judge("format", text, finished=finished, how=how) for how in ("strict", "graded"))
    assert graded is not None
    assert 0 <= graded <= 1
    assert (strict == 1) == (graded > 0.9)


# language


@pytest.mark.parametrize(
    ("text", "target", "share"),
    [
        ("the answer is four", "en", 1.0),
        ("the answer is four", "de", 1.0),  # by script the two are one
        ("the answer is four", "zh", 0.0),
        ("答案是四", "zh", 1.0),
        ("所以 the answer 是", "en", 2 / 5),
        ("答えは四", "ja", 1.0),
        ("答えは四", "zh", 2 / 4),
        ("ответ четыре", "ru", 1.0),
        ("so $答案$ and `变量` are left out", "en", 1.0),
        ("```\n变量 = 1\n```\nfour", "en", 1.0),
        ("```\nthe code that was cut off", "zh", 1.0),
        (r"\frac{a}{b} \text \(x\) \[ yy \] <think> https://example.org x y", "zh", 1.0),
        ("", "en", 1.0),
    ],
)
def test_language_by_script(text: str, target: str, share: float):
    assert judge("language", text, target=target) == pytest.approx([share])


@pytest.mark.parametrize(
    ("text", "counted"),
    [
        # money: what stands between is counted
        ("it costs $5 and then $7", "it costs and then"),
        ("it costs $5, then $7.", "it costs then"),
        ("pay $5.50 for it or 6$", "pay for it or"),
        ("pay 5$ or 7$ now", "pay or now"),
        ("from $3-$5 to $10/day", "from to day"),
        ("($5) plus ($7)", "plus"),
        ("$5 million and $7 million", "million and million"),
        ("$1,000 of $2,000 and US$ 300", "of and US"),
        ("价格是$5元，运费$7元", "价格是元运费元"),
        ("先付$5，再付7$。", "先付再付"),
        ("先付 $5 再付 $7", "先付再付"),
        ("итого $5 или $7 рублей", "итого или рублей"),
        (r"it costs \$5 and then \$7", "it costs and then"),
        (r"it costs \$5 and $答案$ is", "it costs and is"),
        ("between $a and $b", "between and"),
        ("echo $HOME and $PATH", "echo HOME and PATH"),
        ("the price $p and its cost c$ rise", "the price and its cost rise"),
        # formulas: it is not
        ("so $答案$ is", "so is"),
        ("so $x$ and $yy$ are", "so and are"),
        ("so $5$ and $7$ are", "so and are"),
        ("so $2x$和$3yy$ are", "so 和 are"),
        ("so $100 = 10^2$ is", "so is"),
        ("so $5 + aa$ is", "so is"),
        (r"so $5 \cdot aa$ is", "so is"),
        (r"so $5 \text{ apples and pears}$ is", "so is"),
        (r"so $\frac{\text{total cost of it}}{2}$ is", "so is"),
        (r"so $p = \$5 + aa$ is", "so is"),
        ("it costs $5 and $x = aa$ is", "it costs and is"),
        ("so $$aa = 5\n答案$$ is", "so is"),
        (r"so \(aa = 5\) and \[答案\] is", "so and is"),
        # unbalanced: nothing is left out
        ("so $x is aa", "so is aa"),
        ("so $答案\n是 aa$", "so 答案是 aa"),
        (r"so \(aa is 答案", "so aa is 答案"),
        ("so $$aa is 答案", "so aa is 答案"),
    ],
)
def test_money_is_no_formula(text: str, counted: str):
    others = "\nbut 字 слово"  # so that each word that is counted moves a share
    for target in ("en", "zh", "ru"):
        expected = by_script(counted + others, target)
        assert judge("language", text + others, target=target) == pytest.approx([expected]), target


@given(st.lists(st.sampled_from(["word", "слово", "字"]), min_size=1, max_size=20))
def test_the_shares_of_languages_of_different_scripts_are_one_whole(words: list[str]):
    text = " ".join(words)
    shares = {target: by_script(text, target) for target in ("en", "ru", "zh")}
    assert shares == pytest.approx(
        {k: words.count(w) / len(words) for k, w in zip(shares, ("word", "слово", "字"), strict=True)}
    )


def test_language_by_sentences():
    english, german = "The answer of this question is four.", "Die Antwort auf diese Frage ist vier."
    config = {"target": "en", "detector": "lingua", "others": ["de"]}
    texts = [english, german, f"{english} {german}", f"{german} Hmm. {german}", f"{english} So ist es.", "Hmm. Ok."]
    assert judge("language", *texts, **config) == pytest.approx([1.0, 0.0, 0.5, 0.0, 1.0, 1.0])


def test_language_without_lingua(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "lingua", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RewardError, match=r"needs lingua: pip install offtrail\[lingua\]"):
        Language(target="en", detector="lingua", others=["de"])


# length


def test_length_linear():
    """Kimi k1.5, §2.3.3, by hand: λ is .5, 0 and −.5."""
    texts = [RIGHT, RIGHT + " " * 10, RIGHT + " " * 20]
    assert judge("length", *texts) == pytest.approx([0.5, 0.0, -0.5])
    assert judge("length", WRONG, WRONG + " " * 10, WRONG + " " * 20) == pytest.approx([0.0, 0.0, -0.5])
    assert judge("length", RIGHT, WRONG) == [0.0, 0.0]


@given(st.lists(st.tuples(st.integers(0, 99), st.booleans()), min_size=1, max_size=9))
def test_linear_never_pays_a_wrong_answer_nor_length(answers: list[tuple[int, bool]]):
    found = linear(*zip(*answers, strict=True))  # type: ignore[arg-type]
    for (length, right), value in zip(answers, found, strict=True):
        assert -0.5 <= value <= (0.5 if right else 0.0)
        others = [(other, v) for (other, good), v in zip(answers, found, strict=True) if good == right]
        assert all(v <= value for other, v in others if other > length)


def test_length_cosine():
    settings = {"how": "cosine", "longest": 2 * len(RIGHT), "right": [2, 1], "wrong": [-10, 0], "beyond": -10}
    texts = [RIGHT, WRONG, RIGHT + " " * len(RIGHT)]
    assert judge("length", *texts, **settings) == pytest.approx([1.5, -5.0, -10.0])
    assert judge("length", RIGHT, finished=False, **settings) == [-10.0]
    assert (cosine(0, 10, 2, 1), cosine(10, 10, 2, 1)) == (2, 1)


@given(st.integers(1, 99), st.data())
def test_cosine_is_monotone_between_its_ends(longest: int, data: st.DataObject):
    one, other = sorted(data.draw(st.tuples(st.integers(0, longest), st.integers(0, longest))))
    assert 2 >= cosine(one, longest, 2, 1) >= cosine(other, longest, 2, 1) >= 1


# repetition


def test_repetition():
    loop = " ".join(["so"] * 40)
    assert judge("repetition", "a b c", loop, n=2) == pytest.approx([0.0, 1 - 1 / 39])
    assert judge("repetition", "a b c", loop, how="suffix") == pytest.approx([0.0, 39 / 40])
    assert judge("repetition", "", loop, "一二三一二三", n=3, how="ngram") == pytest.approx([0.0, 37 / 38, 1 / 4])


@given(st.lists(st.sampled_from("abc"), max_size=12), st.integers(1, 4))
def test_repetition_against_its_definition(words: list[str], n: int):
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    expected = sum(gram in grams[:i] for i, gram in enumerate(grams)) / len(grams) if grams else 0.0
    assert math.isclose(repeated_grams(words, n), expected, abs_tol=1e-12)
    size = len(words)
    ends = [k for k in range(1, size) if any(words[i : i + k] == words[size - k :] for i in range(size - k))]
    assert repeated_suffix(words) == max(ends, default=0) / (size or 1)


# settings, and long texts


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("format", {"how": "loose"}, "how=loose: must be one of strict, graded, regex"),
        ("format", {"how": "regex"}, "pattern=: goes with how=regex"),
        ("format", {"pattern": "a"}, "pattern=a: goes with how=regex"),
        ("format", {"how": "regex", "pattern": "("}, r"pattern=\(: is no regular expression"),
        ("language", {"target": "english"}, "english is not known"),
        ("language", {"detector": "fasttext"}, "detector=fasttext: must be script or lingua"),
        ("language", {"detector": "lingua"}, r"others=\[\]: goes with detector=lingua"),
        ("length", {"how": "log"}, "how=log: must be linear or cosine"),
        ("length", {"longest": 0}, "longest=0: must be ≥ 1"),
        ("length", {"right": [1]}, r"right=\[1\]: must be two numbers"),
        ("repetition", {"how": "x"}, "how=x: must be ngram or suffix"),
        ("repetition", {"n": 0}, "n=0: must be ≥ 1"),
    ],
)
def test_a_setting_that_cannot_be_is_one_line_before_the_run(name: str, settings: dict[str, object], message: str):
    with pytest.raises(RewardError, match=message):
        judge(name, RIGHT, **settings)


@pytest.mark.parametrize("piece", ["a ", "a", "字", "$", "`", "```", "\\(", "<think>", "\\[ $ ", "http://"])
def test_long_texts_are_read_in_one_pass(piece: str):
    """Far from done within the suite's timeout if any of them were quadratic."""
    text = piece * (400_000 // len(piece))
    for name, settings in (("language", {}), ("repetition", {}), ("repetition", {"how": "suffix"}), ("format", {})):
        judge(name, text, **settings)
