"""Instructions that a program checks: each checker on what follows it and what does not; the rows that hold them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from offtrail.platform.config.compose import compose
from offtrail.rewards.base import RewardError
from offtrail.rewards.components.instructions import Instructions
from offtrail.rewards.config import RewardConfig
from offtrail.rewards.instructions import CHECKERS, complaint, followed, followed_loosely, sentences
from offtrail.rewards.registry import make_reward
from offtrail.tasks.base import TaskError
from offtrail.tasks.ifeval import IfevalConfig, IfevalTask
from offtrail.tasks.registry import make_task, remarks_on
from offtrail.tasks.split import stream

LEAST, LESS = "at least", "less than"
CASES: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    ("keywords:existence", {"keywords": ["Moss", "fern"]}, ["ferns and MOSSES"], ["moss alone", ""]),
    ("keywords:frequency", {"keyword": "oak", "frequency": 2, "relation": LEAST}, ["Oak, oaks"], ["one oak"]),
    ("keywords:frequency", {"keyword": " oak ", "frequency": 2, "relation": LESS}, ["one oak", "no tree"], ["oak oak"]),
    ("keywords:forbidden_words", {"forbidden_words": ["ash", "a.b"]}, ["ashes and axb"], ["Ash falls", "see a.b."]),
    ("keywords:letter_frequency", {"letter": "E", "let_frequency": 3, "let_relation": LEAST}, ["Eel ease"], ["eel"]),
    ("keywords:letter_frequency", {"letter": "#", "let_frequency": 1, "let_relation": LESS}, ["none"], ["# one"]),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": LEAST}, ["One. Two!"], ["Only Mr. Fox."]),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": LESS}, ["It is 3.5 m."], ["Yes. No."]),
    ("length_constraints:number_words", {"num_words": 3, "relation": LEAST}, ["one, two three"], ["one two"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": LESS}, ["one two"], ["one two three"]),
    (
        "length_constraints:number_paragraphs", {"num_paragraphs": 2},
        ["a\n***\nb", "***\na\n***\nb", "a\n***\nb\n***"], ["a\n\nb", "a***b***c", "a\n***\n\n***\nb"],
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Weekend"},
        ["a b\n\nweekend, at last", "a\n\n\"Weekend\" b", "a\n\n\nweekend's end"],
        [
            "weekend\n\nb", "a\n\nb\n\nweekend", "a\n\nweekends", "a\n\n**weekend**",
            "a\n\n\n\nweekend", "a\n \nweekend",
        ],
    ),
    (
        "detectable_content:number_placeholders", {"num_placeholders": 2},
        ["[name] [street 3]", "[] []"], ["[name]", "[a\nb] [c]"],
    ),
    (
        "detectable_content:postscript", {"postscript_marker": "P.S."},
        ["Hi\nP.S. buy", "Hi. p. s. buy", "P.P.S. x", "Hi P.S."], ["Hi", "PS: x", "P.S: x"],
    ),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["Hi\nP.P.S more"], ["Hi\nP.S. more"]),
    (
        "detectable_format:number_bullet_lists", {"num_bullets": 2},
        ["* a\n- b", "x\n * a\n * b", "- a\n---"], ["* a", "* a\n* b\n* c", "**a**\n**b**"],
    ),
    (
        "detectable_format:constrained_response", {},
        ["So: My answer is maybe."], ["My answer is yes", "maybe", "my answer is MAYBE."],
    ),
    (
        "detectable_format:number_highlighted_sections", {"num_highlights": 2},
        ["*one* and **two**", "*one* *two*", "***one***"], ["*one*", "** ** * *", "*a\nb* *c*"],
    ),
    (
        "detectable_format:multiple_sections", {"section_spliter": "SECTION", "num_sections": 2},
        ["SECTION 1\na\nSECTION 2\nb", "SUBSECTION 1SECTION2"],
        ["SECTION 1 a", "Section 1 Section 2", "SECTION A SECTION B"],
    ),
    (
        "detectable_format:json_format", {},
        ['{"a": [1]}', '```json\n{"a": 1}\n```'], ["{a: 1}", 'see {"a": 1}', "```json\n```"],
    ),
    ("detectable_format:title", {}, ["<<on moss>>\ntext", "<<->>"], ["<on moss>", "<<>>", "<< >>", "<<a\nb>>"]),
    (
        "combination:two_responses", {},
        ["a ****** b", "******\na\n******\nb"], ["a", "a ****** a", "a ****** b ****** c", "a ******"],
    ),
    ("combination:repeat_prompt", {"prompt_to_repeat": "What is moss?"}, [" what is moss? It is."], ["Moss: what is"]),
    (
        "startend:end_checker", {"end_phrase": "That is all."},
        ['He said "that is all."', "x THAT IS ALL. "], ["That is all. No."],
    ),
    ("startend:quotation", {}, [' "all of it" '], ['"some" of it', '"', "'all'"]),
    (
        "change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": LEAST},
        ["I say NO", "A WELL-KNOWN x", "IT'S", "DON’T", "I'm HERE", "CANNOT", "**NOTE**:ME"],
        ["I say no", "Ice Is nice", "AND/OR", "U.S.A.", "WELL-KNOWN", "I’m", "NASA's"],
    ),
    ("change_case:capital_word_frequency", {"capital_frequency": 1, "capital_relation": LESS}, ["none"], ["ONE"]),
    ("change_case:english_capital", {}, ["ALL OF 3."], ["ALL of it", "123", "ВСЁ"]),
    ("change_case:english_lowercase", {}, ["all of 3."], ["All of it", "всё"]),
    ("punctuation:no_comma", {}, ["one; two"], ["one, two"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "arguments", "right", "wrong"), CASES)
def test_a_checker_tells_what_follows_it(
    name: str, arguments: dict[str, Any], right: list[str], wrong: list[str]
) -> None:
    assert complaint(name, arguments) == ""
    assert [text for text in right if not followed(text, name, arguments)] == []
    assert [text for text in wrong if followed(text, name, arguments)] == []


def test_every_checker_has_a_case_and_an_answer_of_nothing_follows_none() -> None:
    assert {name for name, *_ in CASES} == set(CHECKERS)
    assert len(CHECKERS) == 24
    assert not any(followed(" \n", name, arguments) for name, arguments, *_ in CASES)


@pytest.mark.parametrize(
    "piece", ["\n", " ", "[", "<", "<<", ">", "*", "-", ".", ". ", "a", "A'", "p.", "1. ", "(", '"', "- \n"]
)
def test_long_answers_are_read_in_one_pass(piece: str) -> None:
    """Far from done within the suite's timeout if any checker were quadratic."""
    text = "a" + piece * (60_000 // len(piece)) + "b"
    for name, arguments, *_ in CASES:
        followed_loosely(text, name, arguments)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("One. Two? Three!", 3),
        ("Dr. No met Mr. J. Bond at 3.30 in the U.S. capital. He left.", 2),
        ("So says Mr. T. He left at 5 p.m. It was late. It was 3. in all.", 4),
        ("apples, e.g. red ones", 2),  # as Punkt counts: no abbreviation of nltk's English model
        ("See no. 7 of the list.", 2),
        ("Wait... what?! Yes.", 2),
        ("Wait... What?! Yes.", 3),
        ('He said "stop." Then he left.', 2),
        ("1. First\n2. Second", 3),
        ("The sum is 42. So it is even.", 2),
        ("It costs 3.50 at www.example.org today.", 1),
        ("My answer is no. It was yes.", 2),
        ("no end", 1),
        ("", 0),
        ("...", 0),
    ],
)
def test_sentences_end_as_punkt_ends_them(text: str, count: int) -> None:
    assert sentences(text) == count


def test_the_loose_reading_forgives_an_introduction_a_last_word_and_markup() -> None:
    comma, end = ("punctuation:no_comma", {}), ("startend:end_checker", {"end_phrase": "the end"})
    assert not followed("Sure, here it is:\nmoss is green", *comma)
    assert followed_loosely("Sure, here it is:\nmoss is green", *comma)
    assert followed_loosely("The end\nHope that helps, friend", *end)
    assert followed_loosely("it is **the end**", *end)
    assert not followed("it is **the end**", *end)
    assert not followed_loosely("so, it, is", *comma)
    assert not followed_loosely("a, b", *comma)  # the cut readings of one line are empty: they follow nothing


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("keywords:existence", {}, "keywords:existence needs keywords"),
        ("keywords:existence", {"keywords": "moss"}, "keywords='moss' must be list[str]"),
        (
            "keywords:frequency",
            {"keyword": "a", "frequency": 2, "relation": "about"},
            "must be one of at least, less than",
        ),
        ("length_constraints:number_words", {"num_words": 2.5, "relation": LEAST}, "num_words=2.5 must be int"),
        ("punctuation:no_comma", {"n": 1}, "takes no n, but nothing"),
    ],
)
def test_arguments_that_cannot_be_are_told(name: str, arguments: dict[str, Any], words: str) -> None:
    assert words in complaint(name, arguments)


def row(i: int, *instructions: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    given = instructions or (("punctuation:no_comma", {}),)
    return {
        "key": i,
        "prompt": f"Write about moss, number {i}.",
        "instruction_id_list": [name for name, _ in given],
        "kwargs": [arguments for _, arguments in given],
    }


def test_rows_without_a_checker_are_left_out_by_name_and_count(tmp_path: Path) -> None:
    language = ("language:response_language", {"language": "kn"})
    rows = [row(0), row(1, language), row(2, ("punctuation:no_comma", {}), language), row(3)]
    path = tmp_path / "ifeval.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    task = make_task(IfevalConfig(eval_path=str(path)), 0)
    assert {problem.prompt for problem in task.held_out(2)} == {rows[0]["prompt"], rows[3]["prompt"]}
    assert remarks_on(task) == [
        f"task.eval_path={path}: 2 of its 4 rows are left out: no checker for language:response_language (2)"
    ]
    path.write_text(json.dumps(rows[1]))
    with pytest.raises(TaskError, match=r"no checker for any of its rows \(language:response_language \(1\)\)"):
        make_task(IfevalConfig(eval_path=str(path)), 0)


def test_parquet_rows_hold_every_argument_null_where_there_is_none(tmp_path: Path) -> None:
    empty = {"num_words": None, "relation": None, "keywords": None}
    given = [
        ("length_constraints:number_words", empty | {"num_words": 3, "relation": LEAST}),
        ("keywords:existence", empty | {"keywords": ["moss"]}),
    ]
    pq.write_table(pa.Table.from_pylist([row(i, *given) for i in range(3)]), tmp_path / "set.parquet")
    task = IfevalTask(IfevalConfig(eval_path=str(tmp_path / "set.parquet")), 0)
    [problem] = task.held_out(1)
    assert problem.meta["instructions"] == [
        {"name": "length_constraints:number_words", "arguments": {"num_words": 3, "relation": LEAST}},
        {"name": "keywords:existence", "arguments": {"keywords": ["moss"]}},
    ]
    assert [task.verify(problem, text) for text in ("the green moss", "green moss", "one two three")] == [
        True,
        False,
        False,
    ]
    assert task.counts(problem, "one two three") == {
        "prompts": 1, "instructions": 2, "prompt_strict": 0, "strict": 1, "prompt_loose": 0, "loose": 1,
    }  # fmt: skip
    assert task.counts(problem, None)["loose"] == 0
    with pytest.raises(TaskError, match="task=ifeval has no worked answers"):
        task.trace(problem, stream(0))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kwargs": []}, r"line 1: field 'kwargs' must be a list of 1 mappings"),
        ({"instruction_id_list": "punctuation:no_comma"}, r"line 1: field 'instruction_id_list' must be a list"),
        ({"kwargs": [{"n": 1}]}, r"line 1: punctuation:no_comma takes no n"),
        ({"prompt": ""}, r"line 1: field 'prompt' is empty"),
    ],
)
def test_a_row_that_cannot_be_used_is_told_with_its_place(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(row(0) | change))
    with pytest.raises(TaskError, match=words):
        IfevalTask(IfevalConfig(path=str(path)), 0)


def test_the_reward_is_the_share_that_is_followed_of_the_answer_that_is_looked_at(tmp_path: Path) -> None:
    """Three instructions of which two are followed; the thought, which has a comma, is not looked at."""
    path = tmp_path / "set.jsonl"
    given = [("punctuation:no_comma", {}), ("startend:quotation", {}), ("change_case:english_lowercase", {})]
    path.write_text("".join(json.dumps(row(i, *given)) + "\n" for i in range(4)))
    config = compose(["task=ifeval", f"task.path={path}", "task.held_out_share=0"])
    assert (config.reward.answer, config.reward.main) == ("text", "accuracy")
    task = make_task(config.task, 0)
    reward = make_reward(config.reward, task.verify)
    texts = ["<think>well, hm</think>green moss", '"green moss"', "<think>never ends", ""]
    scores = reward.judge(task.train(0), texts, [True, False, True, True])
    assert scores == {"accuracy": [0, 1, 0, 0], "instructions": [pytest.approx(2 / 3), 1, 0, 0]}
    whole = RewardConfig(
        weights={"instructions": 1.0}, settings={"instructions": {"level": "all", "how": "loose"}}, answer="text"
    )
    assert make_reward(whole, task.verify).judge(task.train(0), ['Sure:\n"green moss"'], [True]) == {
        "instructions": [1]
    }
    with pytest.raises(RewardError, match=r"reward\.settings\.instructions\.how=lax: must be strict or loose"):
        Instructions(how="lax")
